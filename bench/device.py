"""Where a run takes place: inputs, arrays of each backend, the stopwatch, the cache scrubber, the largest product."""

from __future__ import annotations

import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from importlib import import_module
from typing import Any, ClassVar, Literal

import numpy as np

from .axes import Shape, dtype_named

Call = Callable[[], Any]
Kind = Literal["cpu", "gpu"]

BACKENDS: dict[str, Kind] = {"numpy": "cpu", "cupy": "gpu", "numba": "gpu"}
"""Backends of the package, and what each is timed on."""


class Device(ABC):
    """One machine part that all contenders of a run share."""

    kind: ClassVar[Kind]
    default_dtype: ClassVar[str]
    default_rounds: ClassVar[int]
    product_size: int
    """Rows and columns of the matrices whose product is the yardstick."""
    copy_bytes: int
    """Bytes whose copy is the yardstick of memory."""

    @abstractmethod
    def inputs(self, shape: Shape, seed: int) -> tuple[Any, Any, Any]:
        """Return q, k and v, standard normal: NumPy arrays on the CPU, CuPy arrays on the GPU."""

    @abstractmethod
    def not_a_number(self, shape: Shape) -> Any:
        """Return a result array full of NaN, so that rows which nobody wrote show."""

    @abstractmethod
    def all_finite(self, array: Any) -> bool:
        """Whether no element is NaN or infinite."""

    @abstractmethod
    def start(self, call: Call, calls: int = 1) -> Callable[[], float]:
        """Start ``calls`` calls; return a function that waits for them and tells the seconds that they took."""

    @abstractmethod
    def scrub(self) -> None:
        """Write a buffer larger than the last cache, so that the next call finds none of its data there."""

    @abstractmethod
    def matrix_product(self, dtype: str) -> tuple[str, int, Call]:
        """Return a description, the FLOP and the call of a large square product: the yardstick of this dtype."""

    @abstractmethod
    def copy(self) -> tuple[str, int, Call]:
        """Return a description, the bytes read and written, and the call of a large copy: the yardstick of memory."""

    @abstractmethod
    def release(self) -> None:
        """Give memory that is no longer used back to the device."""

    def native(self, array: Any, backend: str) -> Any:  # noqa: ARG002
        """Return ``array`` as the kind that ``backend`` takes, without a copy."""
        return array


class Cpu(Device):
    """NumPy arrays, a wall clock."""

    kind = "cpu"
    default_dtype = "float32"
    default_rounds = 7
    product_size = 2048
    copy_bytes = 64 << 20

    def __init__(self) -> None:
        names: dict[str, int] = getattr(os, "sysconf_names", {})
        last_cache = os.sysconf("SC_LEVEL3_CACHE_SIZE") if "SC_LEVEL3_CACHE_SIZE" in names else 0
        self._scrub_buffer = np.empty(2 * max(last_cache, 32 << 20), dtype=np.uint8)

    def inputs(self, shape: Shape, seed: int) -> tuple[Any, Any, Any]:
        """Return q, k and v as NumPy arrays."""
        rng = np.random.default_rng(seed)
        dtype = dtype_named(shape.dtype)
        q, k, v = (rng.standard_normal(s, dtype=np.float32).astype(dtype) for s in shape.array_shapes)
        return q, k, v

    def not_a_number(self, shape: Shape) -> Any:
        """Return a NumPy array full of NaN."""
        return np.full((shape.B, shape.H, shape.N, shape.E), np.nan, dtype_named(shape.dtype))

    def all_finite(self, array: Any) -> bool:
        """Whether no element is NaN or infinite."""
        return bool(np.isfinite(array).all())

    def start(self, call: Call, calls: int = 1) -> Callable[[], float]:
        """Run the calls at once; the function that is returned tells their time."""
        begin = time.perf_counter()
        for _ in range(calls):
            call()
        seconds = time.perf_counter() - begin
        return lambda: seconds

    def scrub(self) -> None:
        """Write twice the size of the last cache."""
        self._scrub_buffer.fill(1)

    def matrix_product(self, dtype: str) -> tuple[str, int, Call]:
        """Return NumPy's product; 16-bit types are multiplied in float32, as the backend does."""
        size = self.product_size
        compute = np.float64 if dtype == "float64" else np.float32
        a, b = np.random.default_rng(0).standard_normal((2, size, size)).astype(compute)
        out = np.empty_like(a)
        return f"numpy matmul {size}^3 {a.dtype}", 2 * size**3, lambda: np.matmul(a, b, out=out)

    def copy(self) -> tuple[str, int, Call]:
        """Return NumPy's copy, on one core."""
        source = np.ones(self.copy_bytes, np.uint8)
        out = np.empty_like(source)
        return f"numpy copy of {self.copy_bytes >> 20} MB", 2 * self.copy_bytes, lambda: np.copyto(out, source)

    def release(self) -> None:
        """Do nothing: the allocator of the host sees to it."""


class Gpu(Device):
    """CuPy arrays on the current device and stream, timed by CUDA events."""

    kind = "gpu"
    default_dtype = "float16"
    default_rounds = 30
    product_size = 8192
    copy_bytes = 1 << 30

    def __init__(self) -> None:
        import cupy

        self._cupy = cupy
        l2_bytes = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)["l2CacheSize"]
        self._scrub_buffer = cupy.empty(4 * max(l2_bytes, 16 << 20), dtype=cupy.uint8)

    def inputs(self, shape: Shape, seed: int) -> tuple[Any, Any, Any]:
        """Return q, k and v as CuPy arrays, drawn in float32 one batch entry at a time to bound the memory."""
        cupy = self._cupy
        rng = cupy.random.default_rng(seed)
        dtype = dtype_named(shape.dtype)
        arrays = []
        for array_shape in shape.array_shapes:
            array = cupy.empty(array_shape, dtype)
            for entry in array:
                entry[...] = rng.standard_normal(entry.shape, dtype=cupy.float32).astype(dtype)
            arrays.append(array)
        q, k, v = arrays
        return q, k, v

    def not_a_number(self, shape: Shape) -> Any:
        """Return a CuPy array full of NaN."""
        array = self._cupy.empty((shape.B, shape.H, shape.N, shape.E), dtype_named(shape.dtype))
        # all bits set is a NaN in every floating-point format
        array.view(self._cupy.uint8).fill(0xFF)
        return array

    def all_finite(self, array: Any) -> bool:
        """Whether no element is NaN or infinite; asked of one batch entry at a time to bound the memory."""
        cupy = self._cupy
        return all(bool(cupy.isfinite(entry.astype(cupy.float32)).all()) for entry in cupy.asarray(array))

    def start(self, call: Call, calls: int = 1) -> Callable[[], float]:
        """Put the calls between two events of the current stream."""
        cupy = self._cupy
        begin, end = cupy.cuda.Event(), cupy.cuda.Event()
        begin.record()
        for _ in range(calls):
            call()
        end.record()

        def seconds() -> float:
            end.synchronize()
            return float(cupy.cuda.get_elapsed_time(begin, end)) / 1e3

        return seconds

    def scrub(self) -> None:
        """Write four times the size of the L2 cache."""
        self._scrub_buffer.fill(1)

    def matrix_product(self, dtype: str) -> tuple[str, int, Call]:
        """Return cuBLAS's product through CuPy; bfloat16 runs at the rate of float16, which stands for it."""
        cupy = self._cupy
        size = self.product_size
        compute = "float16" if dtype == "bfloat16" else dtype
        rng = cupy.random.default_rng(0)
        a, b = (rng.standard_normal((size, size), dtype=cupy.float32).astype(compute) for _ in range(2))
        out = cupy.empty_like(a)
        return f"cupy matmul {size}^3 {compute}", 2 * size**3, lambda: cupy.matmul(a, b, out=out)

    def copy(self) -> tuple[str, int, Call]:
        """Return CuPy's copy."""
        cupy = self._cupy
        source = cupy.ones(self.copy_bytes, cupy.uint8)
        out = cupy.empty_like(source)
        return f"cupy copy of {self.copy_bytes >> 20} MB", 2 * self.copy_bytes, lambda: cupy.copyto(out, source)

    def release(self) -> None:
        """Empty CuPy's pool, which peers cannot draw from."""
        self._cupy.cuda.get_current_stream().synchronize()
        self._cupy.get_default_memory_pool().free_all_blocks()

    def native(self, array: Any, backend: str) -> Any:
        """Return a CuPy array as it is, or as a Numba device array over the same memory."""
        if backend != "numba":
            return array
        return import_module("numba.cuda").as_cuda_array(array)


def open_device(kind: Kind) -> Device:
    """Return the device of this kind; ImportError or CuPy's own error where there is none."""
    return Gpu() if kind == "gpu" else Cpu()


def to_host(array: Any) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return a NumPy, CuPy, Numba or PyTorch array as float64 on the host."""
    if hasattr(array, "copy_to_host"):
        array = array.copy_to_host()
    elif hasattr(array, "get"):
        array = array.get()
    elif hasattr(array, "cpu"):
        array = array.double().cpu().numpy()
    return np.asarray(array).astype(np.float64)
