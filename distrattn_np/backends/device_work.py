"""What a call does to a CUDA device, behind one interface: take memory, launch kernels; or only plan to.

`CupyBackend` decides what is computed, and never allocates or launches but through here. Done for real
(cupy_device.py), a call computes; done as a `Plan`, the same code tells how much memory it takes and which kernels it
launches, where there is no device and no CuPy.
"""

from __future__ import annotations

import math
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np

from ..arrays import REGION, Unreadable, address, array_at, kind_of
from ..checks import WORKSPACE_ALIGNMENT
from ..problem import Layout, ceil_div
from ..tiles import Defines
from .tensor_map import Box


@dataclass(frozen=True, slots=True)
class DeviceFacts:
    """What the choice of kernels, tiles and grids depends on."""

    index: int
    capability: int
    """90 for an H100."""
    runs_sm90a: bool
    """Whether it takes code for sm_90a, and the compiler makes such."""
    multiprocessors: int
    shared_limit: int
    """Most bytes of shared memory that a block can ask for."""


class Beside(AbstractContextManager["Beside"]):
    """Launches that run beside those that come after the context; here in the order of the code."""

    def __exit__(self, *error: object) -> None:
        """End what runs beside."""

    def join(self) -> None:
        """Let what follows wait for what was launched within."""


class Work(ABC):
    """Memory and launches of one call."""

    device: DeviceFacts

    @abstractmethod
    def new(self, shape: tuple[int, ...], dtype: Any) -> Any:
        """Return memory that outlives the call: a result."""

    @abstractmethod
    def empty(self, shape: tuple[int, ...], dtype: Any) -> Any:
        """Return memory for the length of the call."""

    @abstractmethod
    def constant(self, key: tuple[Any, ...], make: Callable[[], np.ndarray]) -> Any:
        """Return the array that ``make`` draws on the host; kept for all calls that ask for ``key``."""

    @abstractmethod
    def tensor_map(self, array: Any, box: Box) -> Any:
        """Return the tensor map of an array as a kernel argument."""

    @abstractmethod
    def beside(self) -> Beside:
        """Return a context whose launches need not wait for later ones outside of it."""

    @abstractmethod
    def launch(
        self, stem: str, defines: Defines, blocks: int, threads: int, arguments: tuple[Any, ...], shared: int
    ) -> None:
        """Launch one kernel on ``blocks`` thread blocks with ``shared`` bytes of dynamic shared memory."""


_current: ContextVar[Work | None] = ContextVar("work", default=None)


def work() -> Work:
    """Return where memory comes from and launches go in this thread."""
    return _current.get() or _on_cupy()


@cache
def _on_cupy() -> Work:
    from .cupy_device import ON_CURRENT_DEVICE

    return ON_CURRENT_DEVICE


@contextmanager
def doing(what: Work) -> Iterator[None]:
    """Send memory and launches of this thread there."""
    token = _current.set(what)
    try:
        yield
    finally:
        _current.reset(token)


class Bump:
    """Places in a workspace, one behind the other; nothing is given back before the call ends."""

    def __init__(self) -> None:
        self.bytes = 0
        """Taken so far."""

    def take(self, shape: tuple[int, ...], dtype: Any) -> int:
        """Return the offset of a new array, in bytes."""
        start = self.bytes
        self.bytes += ceil_div(math.prod(shape) * np.dtype(dtype).itemsize, WORKSPACE_ALIGNMENT) * WORKSPACE_ALIGNMENT
        return start


def hyperplane_rows(block_size: int) -> int:
    """Return how many rows of hyperplanes are drawn for blocks of this size.

    A draw of fewer rows is the start of a draw of more, so blocks of similar sizes share one.
    """
    return max(1024, 1 << (block_size - 1).bit_length())


class BuiltOnce:
    """Kernels by key, each built once however many threads ask for it first."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._built: dict[Any, Any] = {}

    def get(self, key: Any, build: Callable[[], Any]) -> Any:
        """Return what ``build`` returned for this key; what raises is tried again by the next that asks."""
        found = self._built.get(key)
        if found is None:
            with self._lock:  # two threads that build one RawKernel race
                found = self._built.get(key)
                if found is None:
                    found = self._built[key] = build()
        return found


# ---- plans ----


class PlannedArray(Unreadable):
    """An array as a plan has it: in a region of its own, never read."""

    @property
    def data(self) -> Any:
        """The address, as CuPy arrays tell it."""
        return _Address(self.ctypes.data)


@dataclass(frozen=True, slots=True)
class _Address:
    ptr: int


def _planned(start: int, shape: tuple[int, ...], dtype: Any, strides: tuple[int, ...] | None = None) -> PlannedArray:
    return array_at(start, shape, dtype, strides).view(PlannedArray)


@dataclass(frozen=True, slots=True)
class PlannedLaunch:
    """One launch of a `Plan`; its arguments are planned arrays and tensor maps, and numbers."""

    stem: str
    defines: Defines
    blocks: int
    threads: int
    arguments: tuple[Any, ...]
    shared: int


@dataclass(frozen=True, slots=True)
class PlannedTensorMap:
    """What a tensor map will describe."""

    array: PlannedArray
    box: Box


WORKSPACE = 1
"""The region of what a plan allocates; its constants have those behind."""
ARGUMENTS = 1 << 8
"""The region of the first argument of a plan."""


@dataclass(frozen=True, slots=True)
class Placed:
    """All of an array that the plan of a call depends on, in native order."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: Any
    misaligned_by: int
    """Bytes from a multiple of 256."""

    @classmethod
    def of(cls, array: Any, layout: Layout) -> Placed:
        """Return what a plan needs of one of the caller's arrays."""
        if kind_of(array) == "numpy":  # its copy on the device
            return cls.contiguous(tuple(array.shape), array.dtype).swapped(layout)
        return cls(tuple(array.shape), tuple(array.strides), array.dtype, address(array) % 256).swapped(layout)

    @classmethod
    def contiguous(cls, shape: tuple[int, ...], dtype: Any, layout: Layout = "bhnd") -> Placed:
        """Return a new array; ``shape`` is native, ``layout`` the order of its memory."""
        order = (0, 2, 1, 3) if layout == "bnhd" else range(len(shape))
        in_memory = [shape[axis] for axis in order]
        strides = [math.prod(in_memory[axis + 1 :]) * dtype.itemsize for axis in range(len(shape))]
        return cls(shape, tuple(strides[axis] for axis in order), dtype, 0)

    def swapped(self, layout: Layout) -> Placed:
        """Return an array of the caller's as a native view; packed rows (rows, heads, width) as a batch of one."""
        if layout == "bhnd":
            return self
        if len(self.shape) == 3:
            batch = Placed((1, *self.shape), (0, *self.strides), self.dtype, self.misaligned_by)
            return batch.swapped(layout)
        shape, strides = ((x[0], x[2], x[1], x[3]) for x in (self.shape, self.strides))
        return Placed(shape, strides, self.dtype, self.misaligned_by)

    def planned(self, place: int) -> Any:
        """Return it as the argument of a `Plan` that comes at this place."""
        return _planned((ARGUMENTS + place) * REGION + self.misaligned_by, self.shape, self.dtype, self.strides)


@dataclass
class Plan(Work):
    """What a call would do on ``device``."""

    device: DeviceFacts
    memory: Bump = field(default_factory=Bump)
    launches: list[PlannedLaunch] = field(default_factory=list)
    constants: dict[tuple[Any, ...], tuple[Any, np.ndarray]] = field(default_factory=dict)
    """By key: where a kernel reads it, and what it holds."""

    def new(self, shape: tuple[int, ...], dtype: Any) -> Any:
        """Refuse: the results of a plan are among its arguments."""
        raise AssertionError(f"a plan has no result of shape {shape} and dtype {dtype}")

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Any:
        """Return the next place in the workspace."""
        return _planned(WORKSPACE * REGION + self.memory.take(shape, dtype), shape, dtype)

    def constant(self, key: tuple[Any, ...], make: Callable[[], np.ndarray]) -> Any:
        """Return a place of its own for what ``make`` draws."""
        if key not in self.constants:
            host = make()
            region = WORKSPACE + 1 + len(self.constants)
            self.constants[key] = _planned(region * REGION, host.shape, host.dtype), host
        return self.constants[key][0]

    def tensor_map(self, array: Any, box: Box) -> Any:
        """Return what would be encoded."""
        return PlannedTensorMap(array, box)

    def beside(self) -> Beside:
        """Return a context that changes nothing: launches are noted one after the other."""
        return Beside()

    def launch(
        self, stem: str, defines: Defines, blocks: int, threads: int, arguments: tuple[Any, ...], shared: int
    ) -> None:
        """Note it down."""
        self.launches.append(PlannedLaunch(stem, defines, blocks, threads, arguments, shared))
