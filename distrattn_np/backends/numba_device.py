"""Memory and launches through Numba: device arrays of Numba's or CuPy's, a caller's workspace, Numba's simulator.

A native array is a Numba device array that carries its stream. One made from a CuPy array shares its memory and runs on
CuPy's current stream; whatever is allocated beside such an array comes from CuPy too, but for constants.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numba
import numpy as np
from numba import cuda
from numba.cuda.cudadrv import devicearray

from ..arrays import REGION, StreamHandle, Unreadable, array_at, kind_of
from .device_work import BuiltOnce, Bump, Placed

SIMULATED = bool(numba.config.ENABLE_CUDASIM)
"""Whether kernels run in Numba's simulator, where a CUDA thread is an operating-system thread: few threads then."""

SIMULATOR_SWITCH_SECONDS = 1e-4

if not SIMULATED and not hasattr(np, "row_stack"):
    # numba-cuda up to 0.30 asks for this name of vstack when it is first used; NumPy 2.5 no longer has it
    vars(np)["row_stack"] = np.vstack
    from numba.cuda import cudaimpl  # noqa: F401

    del vars(np)["row_stack"]


def on_device_of(array: Any) -> AbstractContextManager[Any]:
    """Return a context in which the device that holds ``array`` is current."""
    stack = ExitStack()
    if kind_of(array) == "cupy":
        stack.enter_context(array.device)
        stack.enter_context(cuda.gpus[array.device.id])
    elif kind_of(array) == "numba" and not SIMULATED:
        stack.enter_context(cuda.gpus[array.gpu_data.context.device.id])
    return stack


def bound(array: Any, stream: int | None) -> Any:
    """Return a Numba array bound to the stream, which all launches with it go to; any other array as it is."""
    if stream is None or SIMULATED or kind_of(array) != "numba":
        return array
    return array.bind(cuda.external_stream(stream) if stream else 0)


def view(array: Any, shape: tuple[int, ...], strides: tuple[int, ...]) -> Any:
    """Return a native array's memory in another shape: Numba has views of matrices and contiguous arrays only."""
    if isinstance(array, MeasuredArray):
        return MeasuredArray.of(shape, array.dtype, strides)
    if SIMULATED:
        return type(array)(np.lib.stride_tricks.as_strided(array._ary, shape, strides), array.stream)
    return devicearray.DeviceNDArray(
        shape=shape, strides=strides, dtype=array.dtype, stream=array.stream, gpu_data=array.gpu_data
    )


def swap_rows_and_heads(array: Any) -> Any:
    """Return a view of a native (B, N, H, D) array as (B, H, N, D), or back."""
    b, n, h, d = zip(array.shape, array.strides, strict=True)
    return view(array, *zip(b, h, n, d, strict=True))


def broadcast(array: Any, shape: tuple[int, ...]) -> Any:
    """Return a view of a native array in a shape that it broadcasts to."""
    missing = len(shape) - len(array.shape)
    steps = [step if size > 1 else 0 for size, step in zip(array.shape, array.strides, strict=True)]
    return view(array, shape, (*[0] * missing, *steps))


def with_batch_axis(array: Any) -> Any:
    """Return a view of a native array as a batch of one."""
    return view(array, (1, *array.shape), (array.shape[0] * array.strides[0], *array.strides))


def without_batch_axis(array: Any) -> Any:
    """Return a view of the only one of a batch."""
    return view(array, tuple(array.shape[1:]), tuple(array.strides[1:]))


def as_batch(packed: Any) -> Any:
    """Return a view of a native (rows, H, width) array as (1, H, rows, width)."""
    return swap_rows_and_heads(with_batch_axis(packed))


def new(shape: tuple[int, ...], dtype: Any, like: Any) -> Any:
    """Return memory that outlives the call, with the stream and allocator of ``like``."""
    if _owned_by_cupy(like):
        import cupy

        with _cupy_stream(like):
            return from_cupy(cupy.empty(shape, dtype))
    return cuda.device_array(shape, dtype).bind(like.stream)


def empty(shape: tuple[int, ...], dtype: Any, like: Any) -> Any:
    """Return memory for the length of the call: the next place in a workspace that was lent, else as `new`."""
    lent = _lent.get()
    return new(shape, dtype, like) if lent is None else lent.take(shape, np.dtype(dtype), like.stream)


def constant(key: tuple[Any, ...], make: Callable[[], np.ndarray], like: Any) -> Any:
    """Return one copy for each device of what ``make`` draws; it stays, whatever the workspace."""
    if _is_measured():
        return MeasuredArray.of((), np.uint8)
    device = -1 if SIMULATED else cuda.current_context().device.id
    return _CONSTANTS.get((device, *key), lambda: cuda.to_device(make())).bind(like.stream)


@contextmanager
def lending(workspace: Any) -> Iterator[Bump]:
    """Give calls in this context their memory from a native array of bytes, and tell what they took.

    None: they take no memory and run nothing; it is told what they would have taken.
    """
    lent = _Lent(workspace)
    token = _lent.set(lent)
    try:
        yield lent.places
    finally:
        _lent.reset(token)


@dataclass(frozen=True, slots=True)
class _Lent:
    """What memory for the length of a call comes from."""

    workspace: Any
    """None: nothing; it is measured what would be needed."""
    places: Bump = field(default_factory=Bump)

    def take(self, shape: tuple[int, ...], dtype: np.dtype[Any], stream: Any) -> Any:
        start = self.places.take(shape, dtype)
        if self.workspace is None:
            return MeasuredArray.of(shape, dtype)
        assert self.places.bytes <= self.workspace.size, "the call took less memory when it was measured"
        stop = start + math.prod(shape) * dtype.itemsize
        if SIMULATED:
            return type(self.workspace)(self.workspace._ary[start:stop].view(dtype).reshape(shape), stream)
        strides = Placed.contiguous(shape, dtype).strides
        memory = self.workspace.gpu_data.view(start, stop)
        return devicearray.DeviceNDArray(shape=shape, strides=strides, dtype=dtype, stream=stream, gpu_data=memory)


_lent: ContextVar[_Lent | None] = ContextVar("lent", default=None)
_CONSTANTS = BuiltOnce()


def _is_measured() -> bool:
    lent = _lent.get()
    return lent is not None and lent.workspace is None


class MeasuredArray(Unreadable):
    """A native array of a call that is only measured: nobody's memory."""

    stream = 0

    @classmethod
    def of(cls, shape: tuple[int, ...], dtype: Any, strides: tuple[int, ...] | None = None) -> MeasuredArray:
        """Return one; contiguous unless ``strides`` say otherwise."""
        return array_at(REGION, shape, dtype, strides).view(cls)

    def bind(self, _stream: Any) -> MeasuredArray:
        """Return the same: nothing runs."""
        return self


def copy_in(host: np.ndarray, like: Any) -> Any:
    """Return a copy with the stream and allocator of ``like``."""
    if _owned_by_cupy(like):
        import cupy

        with _cupy_stream(like):
            return from_cupy(cupy.asarray(host))
    return cuda.to_device(host, stream=like.stream)


def _cupy_stream(array: Any) -> Any:
    import cupy

    return cupy.cuda.Stream.from_external(StreamHandle(int(array.stream)))


def from_cupy(array: Any) -> Any:
    """Return a native view that keeps ``array`` alive and runs on CuPy's current stream."""
    import cupy

    pointer = cupy.cuda.get_current_stream().ptr
    return cuda.as_cuda_array(array, sync=False).bind(cuda.external_stream(pointer) if pointer else 0)


def to_cupy(array: Any) -> Any:
    """Return a CuPy view of a native array."""
    import cupy

    if array.size == 0:
        return cupy.empty(array.shape, array.dtype)
    owner = array.gpu_data.owner
    return cupy.ndarray(array.shape, array.dtype, owner.data, array.strides)


def _owned_by_cupy(array: Any) -> bool:
    return not SIMULATED and kind_of(array.gpu_data.owner) == "cupy"


def launch(kernel: Any, blocks: int, threads: int | tuple[int, int], first: Any, *others: Any) -> None:
    """Run ``kernel(first, *others)`` on the stream of ``first``; a call that is only measured runs nothing."""
    if blocks == 0 or _is_measured():
        return
    with warnings.catch_warnings(), _simulator_repaired():
        # Numba warns of small grids, which are the caller's to choose; the simulator, being NumPy, of the infinities
        # and NaNs that a GPU computes with in silence
        warnings.simplefilter("ignore")
        if not SIMULATED:
            kernel = _kernel_of_device(kernel, cuda.current_context().device.id)
        kernel[blocks, threads, first.stream](first, *others)


@cache
def _kernel_of_device(kernel: Any, index: int) -> Any:
    """Return what one device alone launches.

    numba-cuda 0.30 loads the code of a kernel once, and unloads it once for each device that it ran on: the process
    would end in a crash.
    """
    return kernel if index == 0 else cuda.jit(kernel.py_func)


class _SharedArrays:
    """Shared memory of one simulated launch, in the place of the simulator's own.

    That one looks an array up and then stores it, so two threads that arrive together can get one each. Here the two
    are one step. An array is known by the line that asks for it, as there.
    """

    def __init__(self, _dynamic_bytes: int) -> None:
        self._arrays: dict[tuple[Any, int], np.ndarray] = {}

    def array(self, shape: int | tuple[int, ...], dtype: Any) -> np.ndarray:
        caller = sys._getframe(1)
        return self._arrays.setdefault((caller.f_code, caller.f_lineno), np.empty(shape, dtype))


@contextmanager
def _simulator_repaired() -> Iterator[None]:
    """Give the simulator safe shared memory, and let Python change threads sooner.

    It waits for its threads in a busy loop, which makes them six times slower at the interval that Python starts with.
    """
    if not SIMULATED:
        yield
        return
    from numba.cuda.simulator import kernelapi

    shared, interval = kernelapi.FakeCUDAShared, sys.getswitchinterval()
    kernelapi.FakeCUDAShared = _SharedArrays
    sys.setswitchinterval(SIMULATOR_SWITCH_SECONDS)
    try:
        yield
    finally:
        kernelapi.FakeCUDAShared = shared
        sys.setswitchinterval(interval)
