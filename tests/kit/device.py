"""What tests on a GPU do to its memory and streams."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from .compare import assert_same_bits


def poison(array: Any) -> Any:
    """Fill ``array`` with NaN, whatever its dtype, and return it."""
    array.view(np.uint8)[...] = 0xFF
    return array


def poisoned_like(array: Any) -> Any:
    import cupy

    return poison(cupy.empty(array.shape, array.dtype))


def told_of_launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list to which every launch of a kernel adds its stem."""
    from distrattn_np.backends.cupy_device import CupyWork

    stems: list[str] = []
    launch = CupyWork.launch

    def told(self: CupyWork, stem: str, *arguments: Any) -> None:
        stems.append(stem)
        launch(self, stem, *arguments)

    monkeypatch.setattr(CupyWork, "launch", told)
    return stems


class Allocations:
    """Counts what CuPy allocates in a context, from its pool or from the device."""

    def __enter__(self) -> Allocations:
        import cupy

        class Hook(cupy.cuda.MemoryHook):
            name = "count"
            sizes: list[int] = []  # noqa: RUF012

            def malloc_preprocess(self, *, device_id: int, size: int, mem_size: int) -> None:  # noqa: ARG002
                self.sizes.append(size)

            def alloc_preprocess(self, *, device_id: int, mem_size: int) -> None:  # noqa: ARG002
                self.sizes.append(mem_size)

        self.hook = Hook()
        self.hook.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self.hook.__exit__()

    @property
    def sizes(self) -> list[int]:
        return self.hook.sizes


class Captured:
    """A call in a CUDA graph, captured so that an allocation or synchronisation is an error."""

    def __init__(self, call: Callable[..., Any], out: Any, lse: Any, workspace: Any) -> None:
        """Capture ``call`` on a stream of its own, writing to these arrays."""
        import cupy

        self.results, self.workspace = (out, lse), workspace
        self.stream = cupy.cuda.Stream(non_blocking=True)
        cupy.cuda.Device().synchronize()
        self.stream.begin_capture(cupy.cuda.runtime.streamCaptureModeThreadLocal)
        try:
            call(out=out, lse=lse, workspace=workspace, stream=self.stream)
        finally:
            self.graph = self.stream.end_capture()

    def assert_gives(self, expected: tuple[Any, Any]) -> None:
        """Launch the graph over poison and compare the bits of the result and the lse."""
        import cupy

        for array in (*self.results, self.workspace):
            poison(array)
        cupy.cuda.Device().synchronize()
        self.graph.launch(self.stream)
        self.stream.synchronize()
        for got, wanted in zip(self.results, expected, strict=True):
            assert_same_bits(got, wanted)


def assert_stays_in_workspace(
    call: Callable[..., Any], out: Any, lse: Any, size: int, expected: tuple[Any, Any]
) -> Any:
    """Make a call in ``size`` bytes of poison: it allocates nothing, writes nothing behind them, and gives these bits.

    Returns the memory, which has 4096 bytes more.
    """
    import cupy

    memory = cupy.full(size + 4096, 0xFF, np.uint8)  # NaN wherever it is read before it is written
    cupy.cuda.Device().synchronize()
    with Allocations() as allocations:
        call(out=out, lse=lse, workspace=memory[:size])
    assert allocations.sizes == []
    for got, wanted in zip((out, lse), expected, strict=True):
        assert_same_bits(got, wanted)
    assert bool((memory[size:] == 0xFF).all())
    return memory


def write_late(stream: Any, late: list[Any], good: list[Any]) -> None:
    """Enqueue some 50 ms of work on ``stream``, then the values of ``good``: elsewhere one reads poison till then."""
    import cupy

    busy = cupy.ones((4096, 4096), np.float32)
    cupy.cuda.Device().synchronize()
    with stream:
        for _ in range(20):
            busy = busy @ busy * np.float32(1e-4)
        for array, value in zip(late, good, strict=True):
            array[...] = value
