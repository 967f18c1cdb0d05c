"""Numba's simulator without its busy waiting: the threads of a block take turns, each up to its next barrier.

The simulator starts an operating-system thread for every CUDA thread and polls them all, and lists all attributes of an
array to find one: that took most of the time. Here threads are kept from block to block and one runs at a time.
From barrier to barrier their order turns round, and neighbouring blocks begin at either end, so that a value which is
read without a barrier before it is missing in one of them.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numba.cuda.simulator import kernel
from numba.cuda.simulator.cudadrv.devicearray import FakeWithinKernelCUDAArray
from numba.cuda.simulator.kernelapi import Dim3

_NUMBAS = kernel.BlockManager.run, FakeWithinKernelCUDAArray.__getattr__


class _Thread(kernel.BlockThread):
    """Plays one CUDA thread after another."""

    def __init__(self) -> None:
        threading.Thread.__init__(self, daemon=True)
        self.turn, self.paused = threading.Lock(), threading.Lock()
        self.turn.acquire()
        self.paused.acquire()
        self.start()

    def play(self, manager: Any, block: tuple[int, ...], thread: tuple[int, ...], args: tuple[Any, ...]) -> None:
        """Have the next turn begin this CUDA thread."""
        self._manager, self.blockIdx, self.threadIdx, self.args = manager, Dim3(*block), Dim3(*thread), args
        self.exception: Exception | None = None
        self.abort = self.is_done = False

    def take_turn(self) -> None:
        """Run up to the next barrier or the end."""
        self.turn.release()
        self.paused.acquire()

    def run(self) -> None:
        while True:
            self.turn.acquire()
            try:
                self._manager._f(*self.args)
            except Exception as error:
                self.exception = error
            self._manager = self.args = None
            self.is_done = True
            self.paused.release()

    def syncthreads(self) -> None:
        self.paused.release()
        self.turn.acquire()
        if self.abort:
            raise RuntimeError("another thread of the block failed")


_THREADS: list[_Thread] = []


def _run_in_turns(manager: Any, block: tuple[int, ...], *args: Any) -> None:
    """Run one block: `BlockManager.run`."""
    indices = list(np.ndindex(*manager._block_dim))
    while len(_THREADS) < len(indices):
        _THREADS.append(_Thread())
    running = _THREADS[: len(indices)]
    for thread, index in zip(running, indices, strict=True):
        thread.play(manager, block, index, args)
    if sum(block) % 2:
        running.reverse()
    failed: Exception | None = None
    while running:
        for thread in running:
            thread.abort = failed is not None
            thread.take_turn()
            failed = failed or thread.exception
        running = [thread for thread in reversed(running) if not thread.is_done]
    if failed is not None:
        raise failed


def _attribute(array: Any, name: str) -> Any:
    """Return an attribute of an array in a kernel, whose elements are numbers: `FakeWithinKernelCUDAArray`."""
    return getattr(array._item._ary, name)


def hasten() -> None:
    """Run simulated kernels from here on in turns."""
    kernel.BlockManager.run, FakeWithinKernelCUDAArray.__getattr__ = _run_in_turns, _attribute


@contextmanager
def as_numba_has_it() -> Iterator[None]:
    """Run simulated kernels as elsewhere."""
    kernel.BlockManager.run, FakeWithinKernelCUDAArray.__getattr__ = _NUMBAS
    try:
        yield
    finally:
        hasten()
