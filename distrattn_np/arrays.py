"""Which kind of array a caller handed over, told without importing CuPy or Numba."""

from __future__ import annotations

from functools import cache
from typing import Any, Literal

import numpy as np

Kind = Literal["numpy", "cupy", "numba"]


def kind_of(array: Any) -> Kind | None:
    """Return the kind of ``array``: a NumPy, CuPy or Numba device array; None for anything else."""
    array_type: type = type(array)
    return _kind_of_type(array_type)


@cache
def _kind_of_type(array_type: type) -> Kind | None:
    if issubclass(array_type, np.ndarray):
        # a mask would be ignored without a word
        return None if issubclass(array_type, np.ma.MaskedArray) else "numpy"
    module = array_type.__module__
    if module.partition(".")[0] == "cupy" and hasattr(array_type, "__cuda_array_interface__"):
        return "cupy"
    if module.startswith(("numba.cuda", "numba_cuda")) and hasattr(array_type, "copy_to_host"):
        return "numba"
    return None


def describe(array: Any) -> str:
    """Return what an error message says of an array: kind, shape and dtype; of anything else, its type."""
    kind = kind_of(array)
    if kind is None:
        return type(array).__name__
    return f"{kind} array of shape {tuple(array.shape)} and dtype {array.dtype}"


def address(array: Any) -> int:
    """Return the address of the first element, in bytes; 0 where there is none."""
    if kind_of(array) == "cupy":
        return int(array.data.ptr)
    # Numba's simulator keeps its data in a NumPy array
    on_device = kind_of(array) != "numpy" and hasattr(array, "__cuda_array_interface__")
    interface = array.__cuda_array_interface__ if on_device else array.__array_interface__
    return interface["data"][0] or 0


def overlaps_itself(array: Any) -> bool:
    """Whether two elements of ``array`` may share memory: an axis steps by less than the axes inside it reach."""
    axes = sorted((abs(stride), size) for size, stride in zip(array.shape, array.strides, strict=True) if size > 1)
    reach = array.dtype.itemsize
    for stride, size in axes:
        if stride < reach:
            return 0 not in array.shape
        reach += (size - 1) * stride
    return False


def share_memory(a: Any, b: Any) -> bool:
    """Whether an element of ``a`` and one of ``b`` share memory; interleaved views of one buffer need not."""
    # where strides are too odd to decide within max_work, overlapping ranges count; NumPy's stub knows only 0 and -1
    return np.may_share_memory(_shape_in_memory(a), _shape_in_memory(b), max_work=10**6)  # type: ignore[arg-type]


def _shape_in_memory(array: Any) -> np.ndarray:
    """Return a NumPy array at the same addresses, on the device or not. It must not be read."""

    class Interface:
        __array_interface__ = {  # noqa: RUF012
            "version": 3,
            "typestr": f"|V{array.dtype.itemsize}",
            "data": (address(array), True),
            "shape": tuple(array.shape),
            "strides": tuple(array.strides),
        }

    return np.asarray(Interface())
