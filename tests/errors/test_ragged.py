"""Is every misuse of packed sequences named? One broken argument a test, the whole message, and nothing written."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from kit.compare import assert_same_bits

from distrattn_np import distr_attention, exact_attention, group_keys

NUMPY = "numpy array of shape"
CALLS = (distr_attention, exact_attention)


def normal(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    return np.random.default_rng([0, *shape]).standard_normal(shape).astype(dtype)


def edges(*numbers: int, dtype: Any = np.int32) -> np.ndarray:
    return np.array(numbers, dtype)


def arguments(**changed: Any) -> dict[str, Any]:
    """Return a good call of three sequences with some arguments replaced."""
    good = {
        "q": normal(9, 4, 6),
        "k": normal(8, 2, 6),
        "v": normal(8, 2, 3),
        "cu_seqlens_q": edges(0, 5, 5, 9),
        "cu_seqlens_k": edges(0, 4, 7, 8),
        "out": np.full((9, 4, 3), 7, "f4"),
    }
    return good | changed


def shown(*shape: int, dtype: str = "int32") -> str:
    return f"{NUMPY} {shape} and dtype {dtype}"


ELEMENTS = "must have 1 axis of B + 1 elements, got"
NO_ARRAY = "must be a NumPy, CuPy or Numba device array, got"

WRONG_PACKED = {
    "q-alone": (
        {"cu_seqlens_k": None},
        ValueError,
        "cu_seqlens_k: must be given with the other cu_seqlens, got None",
    ),
    "k-alone": (
        {"cu_seqlens_q": None},
        ValueError,
        "cu_seqlens_q: must be given with the other cu_seqlens, got None",
    ),
    "q-list": ({"cu_seqlens_q": [0, 5, 5, 9]}, TypeError, f"cu_seqlens_q: {NO_ARRAY} list"),
    "k-number": ({"cu_seqlens_k": 8}, TypeError, f"cu_seqlens_k: {NO_ARRAY} int"),
    "q-2d": ({"cu_seqlens_q": edges(0, 5, 5, 9)[None]}, ValueError, f"cu_seqlens_q: {ELEMENTS} {shown(1, 4)}"),
    "k-empty": ({"cu_seqlens_k": edges()}, ValueError, f"cu_seqlens_k: {ELEMENTS} {shown(0)}"),
    "q-float": (
        {"cu_seqlens_q": edges(0, 5, 5, 9, dtype="f4")},
        TypeError,
        f"cu_seqlens_q: the dtype must be int32 or int64, got {shown(4, dtype='float32')}",
    ),
    "k-unsigned": (
        {"cu_seqlens_k": edges(0, 4, 7, 8, dtype="u4")},
        TypeError,
        f"cu_seqlens_k: the dtype must be int32 or int64, got {shown(4, dtype='uint32')}",
    ),
    "k-big-endian": (
        {"cu_seqlens_k": edges(0, 4, 7, 8, dtype=">i4")},
        TypeError,
        f"cu_seqlens_k: the dtype must be int32 or int64, got {shown(4, dtype='>i4')}",
    ),
    "q-every-second": (
        {"cu_seqlens_q": np.repeat(edges(0, 5, 5, 9), 2)[::2]},
        ValueError,
        f"cu_seqlens_q: the last axis must be contiguous, got {shown(4)} with strides (8,) bytes",
    ),
    "q-first": ({"cu_seqlens_q": edges(1, 5, 5, 9)}, ValueError, "cu_seqlens_q: must begin with 0, got 1"),
    "k-first": ({"cu_seqlens_k": edges(-1, 4, 7, 8)}, ValueError, "cu_seqlens_k: must begin with 0, got -1"),
    "q-falls": ({"cu_seqlens_q": edges(0, 5, 4, 9)}, ValueError, "cu_seqlens_q: must not fall, got 4 after 5"),
    "k-falls-by-much": (
        {"cu_seqlens_k": edges(0, 2**63 - 1, -(2**63), 8, dtype="i8"), "cu_seqlens_q": edges(0, 5, 5, 9, dtype="i8")},
        ValueError,
        "cu_seqlens_k: must not fall, got -9223372036854775808 after 9223372036854775807",
    ),
    "q-short": ({"cu_seqlens_q": edges(0, 5, 5, 8)}, ValueError, "cu_seqlens_q: must end with q's 9 rows, got 8"),
    "q-lengths": ({"cu_seqlens_q": edges(0, 5, 0, 4)}, ValueError, "cu_seqlens_q: must not fall, got 0 after 5"),
    "k-long": ({"cu_seqlens_k": edges(0, 4, 7, 9)}, ValueError, "cu_seqlens_k: must end with k's 8 rows, got 9"),
    "batch": (
        {"cu_seqlens_k": edges(0, 4, 8)},
        ValueError,
        f"cu_seqlens_k: must have cu_seqlens_q's 4 elements, got {shown(3)}",
    ),
    "dtypes": (
        {"cu_seqlens_k": edges(0, 4, 7, 8, dtype="i8")},
        TypeError,
        f"cu_seqlens_k: must have cu_seqlens_q's dtype int32, got {shown(4, dtype='int64')}",
    ),
    "layout": (
        {"layout": "bnhd"},
        ValueError,
        "layout: must be 'bhnd', the default, with cu_seqlens_q, got 'bnhd'",
    ),
    "layout-of-its-own": (
        {"layout": "nhd"},
        ValueError,
        "layout: must be 'bhnd', the default, with cu_seqlens_q, got 'nhd'",
    ),
    "mask": (
        {"mask": np.ones((9, 8), bool)},
        ValueError,
        f"mask: must be None with cu_seqlens_q, got {shown(9, 8, dtype='bool')}",
    ),
    "bias": (
        {"bias": normal(9, 8)},
        ValueError,
        f"bias: must be None with cu_seqlens_q, got {shown(9, 8, dtype='float32')}",
    ),
    "q-batched": (
        {"q": normal(1, 4, 9, 6)},
        ValueError,
        f"q: must have 3 axes, got {shown(1, 4, 9, 6, dtype='float32')}",
    ),
    "k-batched": (
        {"k": normal(1, 2, 8, 6)},
        ValueError,
        f"k: must have 3 axes, got {shown(1, 2, 8, 6, dtype='float32')}",
    ),
    "v-one-head": ({"v": normal(8, 3)}, ValueError, f"v: must have 3 axes, got {shown(8, 3, dtype='float32')}"),
    "out-batched": (
        {"out": normal(1, 4, 9, 3)},
        ValueError,
        f"out: must have 3 axes, got {shown(1, 4, 9, 3, dtype='float32')}",
    ),
    "out-heads-first": (
        {"out": normal(4, 9, 3)},
        ValueError,
        f"out: must have shape (9, 4, 3), got {shown(4, 9, 3, dtype='float32')}",
    ),
    "k-heads": (
        {"k": normal(8, 3, 6)},
        ValueError,
        f"k: the number of heads must divide q's 4, got {shown(8, 3, 6, dtype='float32')}",
    ),
    "v-rows": ({"v": normal(7, 2, 3)}, ValueError, f"v: must have k's 8 rows, got {shown(7, 2, 3, dtype='float32')}"),
    "q-wide": (
        {"q": normal(9, 4, 258)},
        ValueError,
        f"q: the last axis must have 1 to 256 elements, got {shown(9, 4, 258, dtype='float32')}",
    ),
}


def assert_refused(function: Any, changed: dict[str, Any], error: type[Exception], message: str) -> None:
    """Assert that the call fails with exactly this message and leaves every array as it was."""
    call = arguments(**changed)
    before = {name: x.copy() for name, x in call.items() if isinstance(x, np.ndarray)}
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        function(**call)
    for name, array in before.items():
        assert_same_bits(np.ascontiguousarray(call[name]), np.ascontiguousarray(array), context=name)


@pytest.mark.parametrize("function", CALLS)
@pytest.mark.parametrize(("changed", "error", "message"), WRONG_PACKED.values(), ids=WRONG_PACKED)
def test_wrong_packed_sequence_is_named(
    function: Any, changed: dict[str, Any], error: type[Exception], message: str
) -> None:
    assert_refused(function, changed, error, message)


@pytest.mark.parametrize("function", CALLS)
def test_good_arguments_are_taken(function: Any) -> None:
    """So that nothing above is refused for another reason."""
    assert np.isfinite(function(**arguments())).all()


@pytest.mark.parametrize("name", ["cu_seqlens_q", "cu_seqlens_k"])
def test_out_over_lengths_is_named(name: str) -> None:
    out = np.zeros((9, 4, 3), np.float32)
    good = arguments()[name]
    over = out.view(np.int32).reshape(-1)[: len(good)]
    over[...] = good
    message = f"out: must not share memory with {name}, got {shown(9, 4, 3, dtype='float32')}"
    assert_refused(exact_attention, {"out": out, name: over}, ValueError, message)


def test_grouped_keys_are_refused() -> None:
    keys = group_keys(normal(1, 2, 8, 6))
    message = f"cu_seqlens_q: must be None with GroupedKeys, got {shown(4)}"
    assert_refused(distr_attention, {"k": keys}, ValueError, message)


def test_lengths_of_another_kind_are_named() -> None:
    cuda = pytest.importorskip("numba.cuda")
    call = arguments(cu_seqlens_k=cuda.to_device(edges(0, 4, 7, 8)))
    message = f"cu_seqlens_k: must be a numpy array, as q is, got {shown(4).replace('numpy', 'numba')}"
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        exact_attention(**call)


def test_backend_that_does_not_take_the_kind_is_named() -> None:
    cuda = pytest.importorskip("numba.cuda")
    call = {name: cuda.to_device(x) for name, x in arguments().items()}
    message = (
        f"q: the numpy backend takes numpy arrays, got {shown(9, 4, 6, dtype='float32').replace('numpy', 'numba')}"
    )
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        exact_attention(**call, backend="numpy")


@pytest.mark.parametrize("lengths", [(3, 2, 1, 0), (0, 100, -7, 9), (9, 9, 9, 9), (-1, -1, -1, -1)])
@pytest.mark.parametrize("method", ["lsh", "subspace", "exact"])
def test_wrong_lengths_on_a_device_stay_in_the_arrays(method: str, lengths: tuple[int, ...]) -> None:
    """Their values are not read by the host, which would have to wait; rows may be wrong, but none beside them."""
    cuda = pytest.importorskip("numba.cuda")
    buffer = cuda.to_device(np.full((13, 4, 3), 7, np.float32))
    call = {name: cuda.to_device(x) for name, x in arguments(cu_seqlens_q=edges(*lengths)).items()}
    call["out"] = buffer[2:11]
    if method == "exact":
        assert exact_attention(**call) is call["out"]
    else:
        assert distr_attention(**call, method=method, group_by="keys", block_size=2, causal=True) is call["out"]
    written = buffer.copy_to_host()
    assert (written[:2] == 7).all()
    assert (written[11:] == 7).all()


@pytest.mark.parametrize("function", CALLS)
def test_dtype_without_a_kernel_is_named(function: Any) -> None:
    pytest.importorskip("numba.cuda")
    dtype = pytest.importorskip("ml_dtypes").bfloat16
    changed = {name: x.astype(dtype) for name, x in arguments().items() if not name.startswith("cu_")}
    rule = "q: the numba backend takes float16, float32 and float64"
    message = f"{rule}, got {shown(9, 4, 6, dtype='bfloat16')}"
    assert_refused(function, changed | {"backend": "numba"}, NotImplementedError, message)
