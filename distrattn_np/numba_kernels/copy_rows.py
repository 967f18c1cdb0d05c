"""One array copied into another, whatever their strides and dtypes: Numba's own assignment makes the host wait.

    target <- source

Launcher  : distrattn_np/backends/numba_grouped_keys.py

Grid      : any; the threads of all blocks take turns at the elements
Assumes   : numbers pass through ``number``, which holds those of both arrays
"""

from __future__ import annotations

from functools import cache
from typing import Any

from numba import cuda


@cache
def make_copy_rows(number: Any) -> Any:
    """Return the kernel for numbers that are at most as wide as ``number``."""

    def copy_rows(
        target: Any,  # [B, H, rows, D]
        source: Any,  # [B, H, rows, D]
    ) -> None:
        heads, rows, width = target.shape[1], target.shape[2], target.shape[3]
        step = cuda.gridDim.x * cuda.blockDim.x
        for place in range(
            cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x, target.shape[0] * heads * rows * width, step
        ):
            d = place % width
            n = place // width % rows
            h = place // width // rows % heads
            b = place // width // rows // heads
            target[b, h, n, d] = number(source[b, h, n, d])

    return cuda.jit(copy_rows)
