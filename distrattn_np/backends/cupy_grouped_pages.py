"""`GroupedPages` on a CUDA device: pools that decode.cu reads as they are."""

from __future__ import annotations

from typing import Any, ClassVar

import cupy
import numpy as np

from ..arrays import Kind
from ..grouped_pages import as_bits
from .cupy_grouped_keys import OnCupy
from .device_grouped_pages import DeviceGroupedPages


class CupyGroupedPages(OnCupy, DeviceGroupedPages):
    """Pages of CuPy arrays; work goes to the current stream."""

    kind: ClassVar[Kind] = "cupy"

    @property
    def device(self) -> int:
        """Number of the device that holds them."""
        return int(self.tails.device.id)

    def _put_pages(self, pool: Any, pages: np.ndarray, new: Any) -> None:
        as_bits(pool)[cupy.asarray(pages)] = as_bits(new)


GROUPED_PAGES = CupyGroupedPages
