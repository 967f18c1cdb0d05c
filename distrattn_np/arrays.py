"""Which kind of array a caller handed over, told without importing CuPy or Numba."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

Kind = Literal["numpy", "cupy", "numba"]


def kind_of(array: Any) -> Kind | None:
    """Return the kind of ``array``: a NumPy, CuPy or Numba device array; None for anything else."""
    if isinstance(array, np.ndarray):
        return "numpy"
    module = type(array).__module__
    if module.partition(".")[0] == "cupy" and hasattr(array, "__cuda_array_interface__"):
        return "cupy"
    if module.startswith(("numba.cuda", "numba_cuda")) and hasattr(array, "copy_to_host"):
        return "numba"
    return None


def describe(array: Any) -> str:
    """Return what an error message says of an array: kind, shape and dtype; of anything else, its type."""
    kind = kind_of(array)
    if kind is None:
        return type(array).__name__
    return f"{kind} array of shape {tuple(array.shape)} and dtype {array.dtype}"


def address_range(array: Any) -> tuple[int, int]:
    """Return the first and past-the-last byte address that ``array`` can touch."""
    if kind_of(array) == "numpy":
        start = array.__array_interface__["data"][0]
    elif hasattr(array, "__cuda_array_interface__"):
        start = array.__cuda_array_interface__["data"][0] or 0
    else:  # Numba's simulator keeps its data in a NumPy array
        start = array.__array_interface__["data"][0]
    if 0 in array.shape:
        return start, start
    reach = [(size - 1) * stride for size, stride in zip(array.shape, array.strides, strict=True)]
    low = sum(step for step in reach if step < 0)
    high = sum(step for step in reach if step > 0)
    return start + low, start + high + array.dtype.itemsize
