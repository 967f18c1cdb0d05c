"""What tests on a GPU do to its memory and streams."""

from __future__ import annotations

from typing import Any

import numpy as np


def poison(array: Any) -> Any:
    """Fill ``array`` with NaN, whatever its dtype, and return it."""
    array.view(np.uint8)[...] = 0xFF
    return array


def poisoned_like(array: Any) -> Any:
    import cupy

    return poison(cupy.empty(array.shape, array.dtype))


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
