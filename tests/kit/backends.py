"""Which backends can run on this machine, and one way to call each of them with NumPy arrays."""

from __future__ import annotations

import ctypes
import importlib.util
import os
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

import distrattn_np
from distrattn_np.arrays import Kind, kind_of

from .compare import to_host


@cache
def count_cuda_devices() -> int:
    """Ask the driver, without importing CuPy or Numba: the answer decides whether Numba must simulate."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    failed = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count))
    return 0 if failed else count.value


def reason_for_no_gpu() -> str | None:
    """Say why the GPU tests cannot run here; None where they can."""
    if count_cuda_devices() == 0:
        return "no CUDA device"
    if importlib.util.find_spec("cupy") is None:
        return "CuPy is not installed"
    return None


SIMULATED = reason_for_no_gpu() is not None
"""Whether Numba's kernels run in its simulator; conftest.py switches that on before Numba is imported."""


def to_kind(array: np.ndarray, kind: Kind) -> Any:
    """Return a copy of a NumPy array as an array of ``kind`` with the same strides: views stay views of a buffer."""
    buffer = array
    while isinstance(buffer.base, np.ndarray):
        buffer = buffer.base
    if array.size == 0 or not buffer.flags.c_contiguous:  # nothing to be a view of; its strides do not matter
        array = buffer = np.ascontiguousarray(array)
    copy = buffer.copy()
    offset = array.__array_interface__["data"][0] - buffer.__array_interface__["data"][0]
    view = np.ndarray(array.shape, array.dtype, buffer=copy, offset=offset, strides=array.strides)
    if kind == "numpy":
        view.flags.writeable = False
        return view
    if kind == "numba" and SIMULATED:
        from numba import cuda

        return type(cuda.to_device(copy))(view)
    import cupy

    on_device = cupy.asarray(copy)
    if array.size:
        on_device = cupy.ndarray(view.shape, view.dtype, memptr=on_device.data + offset, strides=view.strides)
    if kind == "cupy":
        return on_device
    from numba import cuda

    return cuda.as_cuda_array(on_device) if array.size else cuda.device_array(view.shape, view.dtype)


def options_to_kind(options: dict[str, Any], kind: Kind) -> dict[str, Any]:
    """Return the keywords of a call with its arrays, mask and bias, in ``kind``."""
    return {name: to_kind(x, kind) if isinstance(x, np.ndarray) else x for name, x in options.items()}


@dataclass(frozen=True)
class Limits:
    """What a property may draw for a backend, so that the run stays short and compiles few kernels."""

    examples: int | None
    """None: as many as the Hypothesis profile says."""
    batches: tuple[int, ...]
    heads: tuple[tuple[int, int], ...]
    """(H, H_kv)"""
    rows: tuple[int, ...]
    widths: tuple[int, ...]
    dtypes: tuple[str, ...]
    methods: tuple[str, ...] = ("lsh",)
    """Those that the backend builds."""
    ragged: bool = False
    """Whether it builds packed sequences."""


# the sizes straddle the tile edges of every kernel: a tile has 16, 32, 64 or 128 rows
ROWS = (1, 2, 31, 32, 33, 63, 64, 65, 127, 128, 129)
HEADS = ((1, 1), (2, 2), (2, 1), (6, 2))
ANY_FLOAT = ("float16", "float32", "float64")
LIMITS = {
    "numpy": Limits(
        None,
        (1, 2),
        HEADS,
        ROWS,
        (1, 2, 3, 7, 8, 16, 33, 40, 64, 96),
        (*ANY_FLOAT, "bfloat16"),
        ("lsh", "subspace"),
        ragged=True,
    ),
    "cupy": Limits(12, (1, 2), HEADS, ROWS, (7, 64), ("float16", "float32"), ("lsh", "subspace"), ragged=True),
    "numba": Limits(5, (1, 2), HEADS, ROWS, (6, 32), ("float32",), ("lsh", "subspace"), ragged=True),
    # one operating-system thread plays each CUDA thread
    "numba-simulator": Limits(
        10,
        (1,),
        ((1, 1), (2, 1)),
        (1, 2, 15, 16, 17, 33),
        (1, 2, 3, 6, 8),
        ("float32", "float64"),
        ("lsh", "subspace"),
        ragged=True,
    ),
}


@dataclass(frozen=True)
class Runner:
    """A backend and the kind of array that it is given. Every call checks the kind of the results."""

    name: str
    backend: str
    kind: Kind

    @property
    def limits(self) -> Limits:
        """What to draw for it."""
        return LIMITS[self.name]

    def give(self, array: np.ndarray) -> Any:
        """Return a copy in this kind, read-only where the kind knows of that."""
        return to_kind(array, self.kind)

    def distr(self, q: np.ndarray, k: np.ndarray, v: np.ndarray, **options: Any) -> tuple[np.ndarray, np.ndarray]:
        """Return `distr_attention` and its lse as NumPy arrays."""
        return self._call(distrattn_np.distr_attention, q, k, v, options)

    def exact(self, q: np.ndarray, k: np.ndarray, v: np.ndarray, **options: Any) -> tuple[np.ndarray, np.ndarray]:
        """Return `exact_attention` and its lse as NumPy arrays."""
        return self._call(distrattn_np.exact_attention, q, k, v, options)

    def _call(self, function: Any, q: np.ndarray, k: np.ndarray, v: np.ndarray, options: dict[str, Any]) -> Any:
        given = [self.give(x) for x in (q, k, v)]
        results = function(*given, backend=self.backend, return_lse=True, **options_to_kind(options, self.kind))
        for result in results:
            assert kind_of(result) == self.kind
        return tuple(to_host(result) for result in results)


def runners() -> list[Runner]:
    """Return every backend that can run here."""
    found = [Runner("numpy", "numpy", "numpy")]
    if importlib.util.find_spec("numba") is not None:
        found.append(Runner("numba-simulator" if SIMULATED else "numba", "numba", "numba"))
    if not SIMULATED:
        found.append(Runner("cupy", "cupy", "cupy"))
    return found
