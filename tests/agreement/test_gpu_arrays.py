"""Arrays of every kind are taken where they are: their stream, far addresses, huge grids. Needs a GPU."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from kit.backends import to_kind
from kit.cases import Case, in_memory, make_inputs
from kit.compare import assert_agrees, assert_same_bits, to_host

from distrattn_np import distr_attention, exact_attention
from distrattn_np.arrays import kind_of

pytestmark = pytest.mark.gpu

CASE = Case(N=100, M=140, D=32, E=32, L=64, causal=True)


@pytest.mark.parametrize("layout", ["bhnd", "bnhd"])
@pytest.mark.parametrize(("backend", "kind"), list(itertools.product(["cupy", "numba"], ["numpy", "cupy", "numba"])))
def test_every_kind_comes_back_as_it_went_in(backend: str, kind: Any, layout: str) -> None:
    case = Case(**{name: getattr(CASE, name) for name in CASE.__dataclass_fields__} | {"layout": layout})
    arrays = [in_memory(x, case) for x in make_inputs(case)]
    expected = distr_attention(*(to_kind(x, backend) for x in arrays), **case.options)
    given = [to_kind(x, kind) for x in arrays]
    result, lse = distr_attention(*given, **case.options, backend=backend, return_lse=True)
    assert kind_of(result) == kind_of(lse) == kind
    assert_same_bits(to_host(result), to_host(expected))
    poison = np.full(result.shape, np.nan, case.numpy_dtype)
    out = poison if kind == "numpy" else to_kind(poison, kind)
    assert distr_attention(*given, **case.options, backend=backend, out=out) is out
    assert_same_bits(to_host(out), to_host(expected))


def test_numba_stream_is_kept() -> None:
    """A Numba array that is bound to a stream: the result is ready on that stream."""
    from numba import cuda

    arrays = make_inputs(CASE)
    expected = distr_attention(*(to_kind(x, "numba") for x in arrays), **CASE.options)
    stream = cuda.stream()
    given = [cuda.to_device(x, stream=stream) for x in arrays]
    result = distr_attention(*given, **CASE.options)
    assert_same_bits(result.copy_to_host(stream=stream), to_host(expected))


@pytest.mark.parametrize("by", ["queries", "keys"])
def test_work_goes_to_the_current_stream(by: str) -> None:
    """The inputs are written late on a stream of their own: on any other one the call would read poison."""
    import cupy

    options = CASE.options | {"group_by": by}
    good = [cupy.asarray(x) for x in make_inputs(CASE)]
    expected = distr_attention(*good, **options)
    late = [cupy.full_like(x, cupy.nan) for x in good]
    out = cupy.full_like(expected, cupy.nan)
    busy = cupy.ones((4096, 4096), cupy.float32)
    cupy.cuda.Device().synchronize()
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        for _ in range(20):  # some 50 ms of work before the inputs arrive
            busy = busy @ busy * cupy.float32(1e-4)
        for array, value in zip(late, good, strict=True):
            array[...] = value
        distr_attention(*late, **options, out=out)
        host = out.get(stream=stream)
    stream.synchronize()
    assert_same_bits(host, expected.get())


@pytest.mark.parametrize(("B", "H"), [(70_000, 1), (1, 70_000)])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("by", ["queries", "keys"])
def test_batches_and_heads_past_the_limit_of_a_grid_axis(B: int, H: int, dtype: str, by: str) -> None:
    """Grid axes y and z end at 65535. With one key the output is its value, whatever the groups are."""
    import cupy

    rng = cupy.random.default_rng(0)
    q, k, v = (rng.standard_normal((B, H, rows, 8), dtype="f4").astype(dtype) for rows in (2, 1, 1))
    out = distr_attention(q, k, v, group_by=by)
    assert_same_bits(out, cupy.ascontiguousarray(cupy.broadcast_to(v, out.shape)))


def test_offsets_past_2_31_elements() -> None:
    """Two batches 2^31 + 8 elements apart in one buffer."""
    import cupy

    step, shape = 2**31 + 8, (2, 2, 65, 64)

    def far(array: np.ndarray) -> Any:
        buffer = cupy.empty(step + array[0].size, cupy.float16)
        strides = (step * buffer.itemsize, *array.strides[1:])
        view = cupy.ndarray(shape, buffer.dtype, memptr=buffer.data, strides=strides)
        view[...] = cupy.asarray(array)
        return view

    arrays = [x.astype(np.float16) for x in np.random.default_rng(0).standard_normal((3, *shape))]
    given, out = [far(x) for x in arrays], far(np.full_like(arrays[0], np.nan))
    for options in ({"group_by": "queries"}, {"group_by": "keys"}, {"group_size": 1}):
        expected = distr_attention(*(cupy.asarray(x) for x in arrays), **options)
        distr_attention(*given, **options, out=out)
        # far strides may take another kernel: results may differ in the last place
        assert_agrees(cupy.ascontiguousarray(out), expected, rtol=0, atol=2**-9, context=str(options))


def test_numpy_and_cupy_agree_on_a_long_call() -> None:
    """16 thousand keys: sums that drift would show."""
    import cupy

    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 1, rows, 64), dtype=np.float32) for rows in (256, 16_384, 16_384))
    k += 1
    expected = exact_attention(*(x.astype(np.float64) for x in (q, k, v)))
    got = exact_attention(*(cupy.asarray(x) for x in (q, k, v)))
    assert_agrees(got.get(), expected, rtol=0, atol=1e-5 * float(np.abs(expected).max()), check_dtype=False)
