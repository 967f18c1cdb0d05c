"""`GroupedPages` on a CUDA device: pools that decode.cu reads as they are."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import cupy
import numpy as np

from ..arrays import Kind, kind_of
from ..grouped_keys import QueryStatistics
from ..grouped_pages import POOLS, GroupedPages, as_bits
from ..problem import Layout, Subspace
from .cupy_grouped_keys import OnCupy, blocks_at_once, reduce_blocks


class CupyGroupedPages(OnCupy, GroupedPages):
    """Pages on the device of the keys that they were made like. All work is queued on a stream."""

    kind: ClassVar[Kind] = "cupy"

    def __init__(
        self,
        like: Any,
        pages: int,
        tails: int,
        *,
        grouping: Subspace,
        queries: QueryStatistics | None,
        scale: float,
        layout: Layout,
    ) -> None:
        """Take memory on the current device; ``like`` may be a NumPy array, as from a file."""
        if queries is not None and kind_of(queries.gram) == "numpy":
            queries = queries.padded(self._padded(like.shape[3]), self._sum_type(like.dtype))
            queries = replace(queries, gram=cupy.asarray(queries.gram))
        super().__init__(like, pages, tails, grouping=grouping, queries=queries, scale=scale, layout=layout)

    def __repr__(self) -> str:
        """Return what error messages say of it."""
        return f"{super().__repr__()} on a CUDA device"

    @property
    def device(self) -> int:
        """Number of the device that holds them."""
        return int(self.tails.device.id)

    def _finish(self, blocks: dict[int, Any]) -> None:
        """Reduce as many pages together as a workspace takes; no bit depends on how many."""
        _, heads, size, width = self.tails.shape
        numbers, at_once = list(blocks), blocks_at_once(heads, width, self.dtype)
        pools = [getattr(self, name) for name in POOLS]
        for first in range(0, len(numbers), at_once):
            pages = numbers[first : first + at_once]
            X = cupy.empty((heads, len(pages), size, width), self.dtype)
            for i, page in enumerate(pages):
                X[:, i] = blocks[page]
            made = [cupy.zeros((len(pages), *pool.shape[1:]), pool.dtype) for pool in pools]
            sampled, maps, ranks, score_errors = (x.swapaxes(0, 1) for x in made)
            kept = [sampled, maps, ranks[..., np.newaxis], score_errors[..., np.newaxis]]
            reduce_blocks(X, self.queries, self.grouping, self.scale, kept, slice(None))
            where = cupy.asarray(np.array(pages))
            for pool, new in zip(pools, made, strict=True):
                as_bits(pool)[where] = as_bits(new)


GROUPED_PAGES = CupyGroupedPages
