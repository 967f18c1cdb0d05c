"""`GroupedPages` on a CUDA device."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import numpy as np

from ..grouped_keys import class_for
from ..grouped_pages import POOLS, GroupedPages
from .device_grouped_keys import OnDevice


class DeviceGroupedPages(OnDevice, GroupedPages):
    """Pages on the device of the keys that they were made like. All work is queued on a stream."""

    def __repr__(self) -> str:
        """Return what error messages say of it."""
        return f"{super().__repr__()} on a CUDA device"

    def _finish(self, blocks: dict[int, Any]) -> None:
        """Reduce as many pages together as a workspace takes; no bit depends on how many."""
        _, heads, size, width = self.tails.shape
        numbers, at_once = list(blocks), self._blocks_at_once(heads, width, self.dtype)
        pools = [getattr(self, name) for name in POOLS]
        for first in range(0, len(numbers), at_once):
            pages = numbers[first : first + at_once]
            X = class_for(self.kind).empty((heads, len(pages), size, width), self.tails)
            for i, page in enumerate(pages):
                self._put(X[:, i], blocks[page])
            made = [self._zeros((len(pages), *pool.shape[1:]), pool.dtype, self.tails) for pool in pools]
            self._reduce(X, self.queries, self.grouping, self.scale, [self._as_room(x) for x in made])
            for pool, new in zip(pools, made, strict=True):
                self._put_pages(pool, np.array(pages), new)

    def _as_room(self, new: Any) -> Any:
        """Return a view (heads, pages, ...) as one of the rooms of `DeviceGroupedKeys`."""
        (pages, heads, *shape), (of_page, of_head, *strides) = new.shape, new.strides
        if not shape:
            shape, strides = [1], [new.dtype.itemsize]
        return self._with_strides(new, (heads, pages, *shape), (of_head, of_page, *strides))

    @abstractmethod
    def _put_pages(self, pool: Any, pages: np.ndarray, new: Any) -> None:
        """Write ``new``, one after another, into these pages of a pool."""
