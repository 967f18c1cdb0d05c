"""Work on the current CUDA device through CuPy: memory of its pool or of a workspace, kernels that are built once.

The only file that knows RawModule. RawKernel checks neither the number nor the types of its arguments and ignores
strides: cupy_backend.py passes explicit 4- and 8-byte scalars, and strides in elements.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import cache
from typing import Any

import cupy
import numpy as np

from ..kernel_sources import HOPPER_ONLY, kernel_source, options
from ..tiles import Defines
from .device_work import Beside, BuiltOnce, Bump, DeviceFacts, Work
from .tensor_map import Box, encode_tensor_map


class CupyWork(Work):
    """Memory from CuPy's pool, launches on its current stream."""

    @property
    def device(self) -> DeviceFacts:  # type: ignore[override]
        """Facts of the device that is current."""
        return _facts(cupy.cuda.Device().id)

    def new(self, shape: tuple[int, ...], dtype: Any) -> Any:
        """Return memory from CuPy's pool."""
        return cupy.empty(shape, dtype)

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Any:
        """Return memory from CuPy's pool, which has it back when nothing refers to it any longer."""
        return cupy.empty(shape, dtype)

    def constant(self, key: tuple[Any, ...], make: Callable[[], np.ndarray]) -> Any:
        """Return one copy for each device. It stays: captured graphs refer to it by address."""
        device = cupy.cuda.Device().id
        return _CONSTANTS.get((device, *key), lambda: _upload(make()))

    def tensor_map(self, array: Any, box: Box) -> Any:
        """Return the map as 128 bytes that are passed by value."""
        return encode_tensor_map(array.data.ptr, array.shape, array.strides, array.dtype.name, box)

    def beside(self) -> Beside:
        """Return a second stream."""
        return _SecondStream()

    def launch(
        self, stem: str, defines: Defines, blocks: int, threads: int, arguments: tuple[Any, ...], shared: int
    ) -> None:
        """Launch on the current stream."""
        kernel = kernel_of(stem, defines, shared)
        kernel((blocks,), (threads,), arguments, shared_mem=shared)


class _SecondStream(Beside):
    """Launches within it need not wait for later ones of the current stream, which waits for them at `join`.

    Threads and streams have one each, and so their own part of CuPy's memory pool: what is freed there is used again
    only by a later call, behind what this one does with it.
    """

    _streams = threading.local()

    def __init__(self) -> None:
        self._main = cupy.cuda.get_current_stream()
        streams = self._streams.__dict__
        key = f"{cupy.cuda.Device().id}:{self._main.ptr}"
        self._stream = streams.get(key) or streams.setdefault(key, cupy.cuda.Stream(non_blocking=True))

    def __enter__(self) -> _SecondStream:
        self._stream.wait_event(self._main.record())
        self._stream.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._stream.__exit__(*error)

    def join(self) -> None:
        """Let what follows on the current stream wait for what was launched within."""
        self._main.wait_event(self._stream.record())


class WorkspaceWork(CupyWork):
    """The same with the memory of one call from the caller's workspace."""

    def __init__(self, workspace: Any) -> None:
        self._workspace = workspace
        self._memory = Bump()

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Any:
        """Return the next place in the workspace, which was measured before."""
        start = self._memory.take(shape, dtype)
        assert self._memory.bytes <= self._workspace.nbytes, "the plan of this call took less memory"
        return cupy.ndarray(shape, dtype, memptr=self._workspace.data + start)


ON_CURRENT_DEVICE = CupyWork()

_CONSTANTS = BuiltOnce()
_KERNELS = BuiltOnce()


def _upload(host: np.ndarray) -> Any:
    array = cupy.asarray(host)
    cupy.cuda.get_current_stream().synchronize()  # other streams will read it
    return array


@cache
def _facts(index: int) -> DeviceFacts:
    device = cupy.cuda.Device(index)
    capability = int(device.compute_capability)
    return DeviceFacts(
        index=index,
        capability=capability,
        # NVRTC, from 12.9 on, takes the more specific target beside the sm_90 that CuPy names
        runs_sm90a=capability == 90 and cupy.cuda.nvrtc.getVersion() >= (12, 9),
        multiprocessors=device.attributes["MultiProcessorCount"],
        shared_limit=device.attributes["MaxSharedMemoryPerBlockOptin"],
    )


def kernel_of(stem: str, defines: Defines, shared: int) -> Any:
    """Return one kernel that may use ``shared`` bytes, built for the current device on first use."""
    key = (stem, *defines.items(), shared, cupy.cuda.Device().id)
    return _KERNELS.get(key, lambda: _build(stem, defines, shared))


def _build(stem: str, defines: Defines, shared: int) -> Any:
    flags = options(defines)
    if stem.endswith(HOPPER_ONLY):
        flags.append("-arch=sm_90a")
    # get_function compiles: nothing is left for a first launch, which other threads may share
    kernel = cupy.RawModule(code=kernel_source(stem), options=tuple(flags)).get_function(stem)
    if shared:  # with what the kernel declares itself it may pass what needs no asking for
        kernel.max_dynamic_shared_size_bytes = shared
    return kernel
