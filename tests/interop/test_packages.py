"""The question: do arrays of JAX and PyTorch go in and come back, on a CPU and (marked gpu) on a device."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from kit.compare import assert_same_bits, to_host
from numpy.testing import assert_allclose

from distrattn_np import distr_attention, exact_attention
from distrattn_np.arrays import in_place, kind_of

DTYPES = ["float16", "bfloat16", "float32", "float64"]
SHAPES = [(1, 4, 33, 16), (1, 2, 40, 16), (1, 2, 40, 8)]


@dataclass(frozen=True)
class Package:
    """One package: an array of a dtype and device from NumPy float32, and back."""

    name: str
    make: Callable[[Any, np.ndarray, str, str], Any]
    take_back: Callable[[Any, Any], Any]


def make_jax(jax: Any, values: np.ndarray, dtype: str, device: str) -> Any:
    kind = "gpu" if device == "cuda" else "cpu"
    try:
        place = jax.devices(kind)[0]
    except RuntimeError:
        pytest.skip(f"JAX has no {kind} here")
    if dtype == "float64":
        pytest.skip("JAX makes float64 only where a process-wide switch allows it")
    return jax.device_put(jax.numpy.asarray(values, dtype=dtype), place)


def make_torch(torch: Any, values: np.ndarray, dtype: str, device: str) -> Any:
    return torch.tensor(values.tolist(), dtype=getattr(torch, dtype), device=device)


PACKAGES = [
    Package("jax", make_jax, lambda jax, x: jax.dlpack.from_dlpack(x)),
    Package("torch", make_torch, lambda torch, x: torch.from_dlpack(x)),
]
ON = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(params=PACKAGES, ids=lambda package: package.name)
def package(request: pytest.FixtureRequest) -> tuple[Any, Package]:
    return pytest.importorskip(request.param.name, reason=f"pip install {request.param.name}"), request.param


def values() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.standard_normal(shape, dtype=np.float32) for shape in SHAPES]


@pytest.mark.parametrize("device", ON)
@pytest.mark.parametrize("dtype", DTYPES)
def test_arrays_go_in_and_come_back(package: tuple[Any, Package], dtype: str, device: str) -> None:
    module, is_package = package
    given = [is_package.make(module, x, dtype, device) for x in values()]
    views = [in_place(x) for x in given]
    kind = "cupy" if device == "cuda" else "numpy"
    assert [kind_of(x) for x in views] == [kind] * 3
    assert [x.dtype.name for x in views] == [dtype] * 3
    for view, x in zip(views, values(), strict=True):
        assert_same_bits(to_host(view), x.astype(view.dtype))
    for call in (distr_attention, exact_attention):
        out, lse = call(*given, causal=True, return_lse=True)
        expected, expected_lse = call(*views, causal=True, return_lse=True)
        assert kind_of(out) == kind_of(lse) == kind
        assert_same_bits(to_host(out), to_host(expected))
        assert_same_bits(to_host(lse), to_host(expected_lse))
    if dtype == "bfloat16" and kind == "numpy":
        return  # NumPy exports no bfloat16: docs/interop.md says how else
    back = is_package.take_back(module, out)
    assert type(back) is type(given[0])
    assert_same_bits(to_host(in_place(back)), to_host(out))


@pytest.mark.parametrize("device", ON)
def test_masks_go_in(package: tuple[Any, Package], device: str) -> None:
    module, is_package = package
    given = [is_package.make(module, x, "float32", device) for x in values()]
    mask = np.random.default_rng(1).random((33, 40)) < 0.6
    out = exact_attention(*given, mask=is_package.make(module, mask, "bool", device))
    assert_allclose(to_host(out), exact_attention(*values(), mask=mask), rtol=0, atol=1e-5)


@pytest.mark.parametrize("device", ON)
@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_out_is_written_and_returned(dtype: str, device: str) -> None:
    torch = pytest.importorskip("torch", reason="pip install torch")
    given = [make_torch(torch, x, dtype, device) for x in values()]
    out = torch.full((1, 4, 33, 8), torch.nan, dtype=given[0].dtype, device=device)
    assert exact_attention(*given, out=out) is out
    assert_same_bits(to_host(in_place(out)), to_host(exact_attention(*given)))


def test_torch_that_requires_grad_is_refused() -> None:
    torch = pytest.importorskip("torch", reason="pip install torch")
    q, k, v = (make_torch(torch, x, "float32", "cpu") for x in values())
    with pytest.raises(TypeError, match=r"^k: must be readable without a copy, got Tensor: .*detach"):
        exact_attention(q, k.requires_grad_(), v)


def test_torch_strides_are_kept() -> None:
    """A (B, N, H, D) buffer seen as (B, H, N, D), as projections leave it."""
    torch = pytest.importorskip("torch", reason="pip install torch")
    given = [make_torch(torch, x.swapaxes(1, 2), "float32", "cpu").transpose(1, 2) for x in values()]
    view = in_place(given[0])
    assert view.strides == tuple(4 * x for x in given[0].stride())
    assert view.ctypes.data == given[0].data_ptr()
    assert_same_bits(exact_attention(*given), exact_attention(*values()))


def test_jax_arrays_stay_as_they_are() -> None:
    jax = pytest.importorskip("jax", reason="pip install jax")
    cpu = jax.devices("cpu")[0]  # on a GPU they are CuPy arrays, which know no read-only memory
    given = [jax.device_put(x, cpu) for x in values()]
    assert not in_place(given[0]).flags.writeable
    assert in_place(given[0]).ctypes.data == given[0].unsafe_buffer_pointer()
    out = jax.device_put(np.zeros((1, 4, 33, 8), np.float32), cpu)
    with pytest.raises(ValueError, match=r"^out: must be writeable, got read-only numpy array"):
        exact_attention(*given, out=out)


def test_jax_tracer_is_refused() -> None:
    """Inside jit there is no memory yet."""
    jax = pytest.importorskip("jax", reason="pip install jax")
    q, k, v = values()
    with pytest.raises(TypeError, match=r"^q: must be a NumPy, CuPy or Numba device array, got \w*Tracer\b"):
        jax.jit(lambda q: exact_attention(q, k, v))(q)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_cuda_array_interface_alone_is_enough(dtype: str) -> None:
    import cupy

    class Interface:
        def __init__(self, x: Any) -> None:
            self.x, self.__cuda_array_interface__ = x, x.__cuda_array_interface__

    arrays = [cupy.asarray(x.astype(dtype)) for x in values()]
    given = [Interface(x) for x in arrays]
    assert [in_place(x).data.ptr for x in given] == [x.data.ptr for x in arrays]
    assert_same_bits(to_host(distr_attention(*given)), to_host(distr_attention(*arrays)))


@pytest.mark.gpu
def test_host_and_device_arrays_of_one_package_do_not_mix() -> None:
    torch = pytest.importorskip("torch", reason="pip install torch")
    q, k, v = (make_torch(torch, x, "float32", "cuda") for x in values())
    message = "k: must be a cupy array, as q is, got numpy array of shape (1, 2, 40, 16) and dtype float32"
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        exact_attention(q, k.cpu(), v)


@pytest.mark.gpu
def test_producer_stream_comes_first() -> None:
    """The inputs are written late on a stream of PyTorch's own: a call that did not wait would read poison."""
    import cupy

    torch = pytest.importorskip("torch", reason="pip install torch")
    good = [make_torch(torch, x, "float32", "cuda") for x in values()]
    expected = to_host(exact_attention(*good))
    late = [torch.full_like(x, torch.nan) for x in good]
    busy = torch.ones((4096, 4096), device="cuda")
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side), cupy.cuda.Stream(non_blocking=True) as stream:
        for _ in range(20):  # some 50 ms of work before the inputs arrive
            busy = busy @ busy * 1e-4
        for x, value in zip(late, good, strict=True):
            x.copy_(value)
        result = exact_attention(*late)
        host = result.get(stream=stream)
    assert_same_bits(host, expected)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_strided_memory_view_of_a_host(dtype: str) -> None:
    utils = pytest.importorskip("cuda.core.utils", reason="pip install cuda-core")
    arrays = [x.astype(dtype) for x in values()]
    given = [utils.StridedMemoryView.from_dlpack(x, stream_ptr=-1) for x in arrays]
    assert [in_place(x).ctypes.data for x in given] == [x.ctypes.data for x in arrays]
    assert_same_bits(exact_attention(*given), exact_attention(*arrays))
