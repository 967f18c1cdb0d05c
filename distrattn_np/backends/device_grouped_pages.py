"""`GroupedPages` on a CUDA device."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..grouped_keys import class_for
from ..grouped_pages import POOLS, GroupedPages


class DeviceGroupedPages(GroupedPages, ABC):
    """Pages on the device of the keys that they were made like. All work is queued on a stream."""

    def __repr__(self) -> str:
        """Return what error messages say of it."""
        return f"{super().__repr__()} on a CUDA device"

    def _finish(self, blocks: dict[int, Any]) -> None:
        """Reduce as many pages together as a workspace takes; no bit depends on how many."""
        _, heads, size, width = self.tails.shape
        numbers, at_once = list(blocks), self._blocks_at_once()
        pools = [getattr(self, name) for name in POOLS]
        for first in range(0, len(numbers), at_once):
            pages = numbers[first : first + at_once]
            X = class_for(self.kind).empty((heads, len(pages), size, width), self.tails)
            for i, page in enumerate(pages):
                self._put(X[:, i], blocks[page])
            made = [self._zeros((len(pages), *pool.shape[1:]), pool.dtype, self.tails) for pool in pools]
            self._reduce_blocks(X, [self._as_room(x) for x in made])
            for pool, new in zip(pools, made, strict=True):
                self._put_pages(pool, np.array(pages), new)

    def _as_room(self, new: Any) -> Any:
        """Return a view (heads, pages, ...) as one of the rooms of `DeviceGroupedKeys`."""
        (pages, heads, *shape), (of_page, of_head, *strides) = new.shape, new.strides
        if not shape:
            shape, strides = [1], [new.dtype.itemsize]
        return self._with_strides(new, (heads, pages, *shape), (of_head, of_page, *strides))

    # ---- what the kinds of arrays differ in ----

    @staticmethod
    @abstractmethod
    def _with_strides(array: Any, shape: tuple[int, ...], strides: tuple[int, ...]) -> Any:
        """Return a view with this shape and these strides, in bytes."""

    @abstractmethod
    def _blocks_at_once(self) -> int:
        """Return how many pages `_reduce_blocks` takes at a time."""

    @abstractmethod
    def _reduce_blocks(self, X: Any, kept: Sequence[Any]) -> None:
        """Write what is kept of blocks (H_kv, blocks, S, D) into such rooms, which are zero."""

    @abstractmethod
    def _put_pages(self, pool: Any, pages: np.ndarray, new: Any) -> None:
        """Write ``new``, one after another, into these pages of a pool."""
