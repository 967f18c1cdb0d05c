"""`GroupedPages` of Numba device arrays."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from ..arrays import Kind
from ..grouped_pages import POOLS, Append
from .device_grouped_pages import DeviceGroupedPages
from .numba_device import copy_in, view
from .numba_grouped_keys import OnNumba, put_listed


class NumbaGroupedPages(OnNumba, DeviceGroupedPages):
    """Pages of Numba arrays. Work goes to the stream of what was appended last."""

    kind: ClassVar[Kind] = "numba"

    def _append(self, new: Any, plan: Append) -> None:
        for name in (*POOLS, "tails", "tail_of"):
            setattr(self, name, getattr(self, name).bind(new.stream))
        super()._append(new, plan)

    def _put_rows(self, rows: list[tuple[int, int, int, int]], new: Any) -> None:
        if rows:
            put_listed(self.tails, new, np.array(rows).T.copy())

    def _take_tails(self, tail_of: np.ndarray) -> None:
        self._tail_of_on_host = tail_of
        self._put(self.tail_of, copy_in(tail_of, self.tail_of))  # on its stream, unlike `_on_device`

    def _put_pages(self, pool: Any, pages: np.ndarray, new: Any) -> None:
        none = np.zeros_like(pages)
        put_listed(_as_rows(pool), _as_rows(new), np.stack([pages, none, np.arange(len(pages)), none]))


def _as_rows(pool: Any) -> Any:
    """Return a view of contiguous pages as a row each, (P, 1, 1, numbers of a page)."""
    step = pool.strides[0]
    return view(pool, (pool.shape[0], 1, 1, step // pool.dtype.itemsize), (step, step, step, pool.dtype.itemsize))


GROUPED_PAGES = NumbaGroupedPages
