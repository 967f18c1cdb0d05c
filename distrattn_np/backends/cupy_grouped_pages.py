"""`GroupedPages` on a CUDA device: pools that decode.cu reads as they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import cupy
import numpy as np

from ..arrays import Kind
from ..grouped_pages import as_bits
from .cupy_grouped_keys import OnCupy, blocks_at_once, reduce_blocks
from .device_grouped_pages import DeviceGroupedPages


class CupyGroupedPages(OnCupy, DeviceGroupedPages):
    """Pages of CuPy arrays; work goes to the current stream."""

    kind: ClassVar[Kind] = "cupy"

    @property
    def device(self) -> int:
        """Number of the device that holds them."""
        return int(self.tails.device.id)

    def _blocks_at_once(self) -> int:
        _, heads, _, width = self.tails.shape
        return blocks_at_once(heads, width, self.dtype)

    def _reduce_blocks(self, X: Any, kept: Sequence[Any]) -> None:
        reduce_blocks(X, self.queries, self.grouping, self.scale, kept)

    def _put_pages(self, pool: Any, pages: np.ndarray, new: Any) -> None:
        as_bits(pool)[cupy.asarray(pages)] = as_bits(new)


GROUPED_PAGES = CupyGroupedPages
