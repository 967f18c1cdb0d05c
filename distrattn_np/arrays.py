"""Which kind of array a caller handed over, and arrays of other packages read as one of these kinds where they are.

Nothing is imported to tell a kind. CuPy is, where device memory of another package comes in: it computes on that.
"""

from __future__ import annotations

import ctypes
import numbers
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib import import_module
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple

import numpy as np

Kind = Literal["numpy", "cupy", "numba"]

# device types of dlpack.h
_HOST = (1, 3)
_CUDA = (2, 13)


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


def sum_type(dtype: Any) -> Any:
    """Return the type that sums of elements of ``dtype`` run in: float32, or float64 for float64."""
    return np.float64 if dtype == np.float64 else np.float32


class StreamHandle(NamedTuple):
    """A CUDA stream as other packages take one."""

    handle: int

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.handle


def stream_handle(stream: Any) -> int:
    """Return the handle of a stream: an integer, or what any package's stream says by ``__cuda_stream__``.

    Raises
    ------
    TypeError
        If it is neither.
    ValueError
        If the handle is negative.
    """
    if hasattr(stream, "__cuda_stream__"):
        stream = stream.__cuda_stream__()[1]
    if isinstance(stream, bool) or not isinstance(stream, numbers.Integral):
        raise TypeError("must be None, an integer handle or a stream with __cuda_stream__")
    if stream < 0:
        raise ValueError("a handle must be at least 0")
    return int(stream)


def on_stream(handle: int | None) -> AbstractContextManager[Any]:
    """Return a context in which CuPy's current stream is the one with this handle; None: the current one stays."""
    if handle is None:
        return nullcontext()
    stream: AbstractContextManager[Any] = _needed("cupy", "cuda13").cuda.Stream.from_external(StreamHandle(handle))
    return stream


def in_place(array: Any, stream: int | None = None) -> Any:
    """Return the array of a known kind that has the memory of ``array``; what is no array, as it is.

    DLPack goes first: it carries bfloat16, and the producer's stream is made to come before the one with the handle
    ``stream``, or CuPy's current one.

    Raises
    ------
    BufferError
        If the memory is out of reach; what the exporter raises of its own passes through.
    ImportError
        If the package that reads such memory is not installed.
    """
    if array is None or isinstance(array, np.ndarray) or kind_of(array) is not None:
        return array
    if hasattr(array, "__dlpack__") and hasattr(array, "__dlpack_device__"):
        device = array.__dlpack_device__()[0]
        if device in _CUDA:
            with on_stream(stream):
                return _needed("cupy", "cuda13").from_dlpack(array)
        if device in _HOST:
            return _host_view(array)
        raise BufferError(f"memory of DLPack device type {int(device)} is neither a CPU's nor a CUDA device's")
    if hasattr(array, "__cuda_array_interface__"):
        if array.__cuda_array_interface__["typestr"][1] == "V":
            raise BufferError("__cuda_array_interface__ has no bfloat16, which takes __dlpack__")
        return _needed("cupy", "cuda13").asarray(array)
    try:
        return np.asarray(array, copy=False)
    except (TypeError, ValueError):  # no array, or only by a copy; NumPy 1 cannot be told not to make one
        return array


def is_declared_read_only(array: Any) -> bool:
    """Whether ``array`` says so, where the array of a known kind that has its memory does not."""
    interface = getattr(array, "__cuda_array_interface__", None)
    return interface is not None and bool(interface["data"][1])


def _needed(package: str, extra: str) -> Any:
    try:
        return import_module(package)
    except ImportError as error:
        raise ImportError(f"needs {package}: pip install 'distrattn_np[{extra}]'") from error


def _host_view(array: Any) -> np.ndarray:
    try:
        return np.from_dlpack(array)
    except (BufferError, RuntimeError):  # which of the two for a dtype that it does not know depends on its version
        bits = _Bfloat16Bits.of(array)
        if bits is None:
            raise
    return np.asarray(bits).view(_needed("ml_dtypes", "bf16").bfloat16)


class _DLTensor(ctypes.Structure):
    """What a DLPack capsule points to, as in dlpack.h."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", ctypes.c_int32 * 2),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _DLVersion(ctypes.Structure):
    """What stands before a tensor from version 1.0 of DLPack on."""

    _fields_ = (
        ("version", ctypes.c_uint32 * 2),
        ("manager_context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
    )


_BFLOAT16 = (4, 16, 1)
_READ_ONLY = 1

_capsule_holds = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_IsValid", ctypes.pythonapi)
)
_capsule_address = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)


class _Bfloat16Bits:
    """Host memory of bfloat16 as NumPy can read it, which knows no such dtype in DLPack: 16-bit integers.

    The array that NumPy makes of it holds this object, and this the capsule, which frees the memory at its end.
    """

    def __init__(self, capsule: Any, tensor: _DLTensor, *, read_only: bool) -> None:
        self._capsule = capsule
        shape, strides = (None if not x else tuple(x[: tensor.ndim]) for x in (tensor.shape, tensor.strides))
        self.__array_interface__ = {
            "version": 3,
            "typestr": np.dtype(np.uint16).str,
            "data": ((tensor.data or 0) + tensor.byte_offset, read_only),
            "shape": shape or (),
            "strides": strides and tuple(2 * stride for stride in strides),
        }

    @classmethod
    def of(cls, array: Any) -> _Bfloat16Bits | None:
        """Return what ``array`` exports by DLPack from a host; None if that is not bfloat16."""
        try:
            capsule = array.__dlpack__(max_version=(1, 0))
        except TypeError:  # before version 1.0
            capsule = array.__dlpack__()
        versioned = bool(_capsule_holds(capsule, b"dltensor_versioned"))
        start = _capsule_address(capsule, b"dltensor_versioned" if versioned else b"dltensor")
        tensor = _DLTensor.from_address(start + (ctypes.sizeof(_DLVersion) if versioned else 0))
        if (tensor.code, tensor.bits, tensor.lanes) != _BFLOAT16:
            return None
        # an older exporter cannot say that it may be written
        read_only = not versioned or bool(_DLVersion.from_address(start).flags & _READ_ONLY)
        return cls(capsule, tensor, read_only=read_only)


REGION = 1 << 44
"""Bytes between the addresses of arrays that are only measured: which of them one is in can be told from an address."""


class Unreadable(np.ndarray):
    """Shape, strides and an address that may be nobody's. Debuggers and tracebacks may show it all the same."""

    def __repr__(self) -> str:
        return describe(self)

    __str__ = __repr__


def array_at(start: int, shape: tuple[int, ...], dtype: Any, strides: tuple[int, ...] | None = None) -> Unreadable:
    """Return an array at any address; contiguous unless ``strides``, in bytes, say otherwise."""
    exporter = SimpleNamespace(
        __array_interface__={
            "version": 3,
            "typestr": f"|V{np.dtype(dtype).itemsize}",
            "data": (start, False),
            "shape": tuple(shape),
            "strides": strides,
        }
    )
    array: Unreadable = np.asarray(exporter).view(Unreadable).view(dtype)
    return array


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
    """Return a NumPy array at the same addresses, on the device or not."""
    return array_at(address(array), array.shape, f"V{array.dtype.itemsize}", tuple(array.strides))
