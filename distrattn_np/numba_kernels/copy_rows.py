"""One array copied into another, whatever their strides and dtypes: Numba's own assignment makes the host wait.

    target <- source

Listed: those rows of every head alone that a list names.

Launcher  : distrattn_np/backends/numba_grouped_keys.py

Grid      : any; the threads of all blocks take turns at the elements
Assumes   : numbers pass through ``number``, which holds those of both arrays; no row of the target is listed twice
"""

from __future__ import annotations

from functools import cache
from typing import Any

from numba import cuda


@cache
def make_copy_rows(number: Any, is_listed: bool) -> Any:
    """Return the kernel for numbers that are at most as wide as ``number``."""

    def copy_rows(
        target: Any,  # [B, H, rows, D]
        source: Any,  # [B, H, rows, D]
        rows: Any,  # [4, count], where listed: b and n of the target, then of the source
    ) -> None:
        batch, heads, count, width = target.shape
        if is_listed:
            batch, count = 1, rows.shape[1]
        step = cuda.gridDim.x * cuda.blockDim.x
        for place in range(cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x, batch * heads * count * width, step):
            d = place % width
            n = place // width % count
            h = place // width // count % heads
            b = place // width // count // heads
            if is_listed:
                target[rows[0, n], h, rows[1, n], d] = number(source[rows[2, n], h, rows[3, n], d])
            else:
                target[b, h, n, d] = number(source[b, h, n, d])

    return cuda.jit(copy_rows)
