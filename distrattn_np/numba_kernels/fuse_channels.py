"""The two cheap products of eq. 4 (docs/math.md), made while a tile of rows is loaded to shared memory.

    (X W)_r = x_first(r),   (Y Z)_r = sum over j in group r of gain_j y_j            (eq. 8 and 9)

Reference : reference/fuse_channels.py        Called by : forward.py, whose whole thread block loads one tile

Device functions. They name no ``cuda`` attribute: the caller hands over the thread's place.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from numba import cuda


@cache
def make_sample_channels(accumulator: Any, rank: int, group_size: int, thread_rows: int, thread_columns: int) -> Any:
    """Return the device function that loads the first channel of each group."""
    ZERO = accumulator(0)

    def sample_channels(
        X: Any,  # [B, H, rows, D]
        b: int,
        h: int,
        start: int,
        stop: int,
        channels: Any,  # [D]
        gains: Any,  # not used: one signature for both functions  # noqa: ARG001
        tile: Any,  # [tile rows, >= R]; zero from row stop - start on
        ty: int,
        tx: int,
    ) -> None:
        for row in range(ty, tile.shape[0], thread_rows):
            for r in range(tx, rank, thread_columns):
                sampled = ZERO
                if start + row < stop:
                    sampled = accumulator(X[b, h, start + row, channels[r * group_size]])
                tile[row, r] = sampled

    return cuda.jit(device=True)(sample_channels)


@cache
def make_fuse_channels(
    accumulator: Any,
    rank: int,
    group_size: int,
    has_gains: bool,
    thread_rows: int,
    thread_columns: int,
) -> Any:
    """Return the device function that loads the sum of each group, every member times its gain."""
    ZERO = accumulator(0)

    def fuse_channels(
        Y: Any,  # [B, H, rows, D]
        b: int,
        h: int,
        start: int,
        stop: int,
        channels: Any,  # [D]
        gains: Any,  # [D] where has_gains
        tile: Any,  # [tile rows, >= R]; zero from row stop - start on
        ty: int,
        tx: int,
    ) -> None:
        for row in range(ty, tile.shape[0], thread_rows):
            for r in range(tx, rank, thread_columns):
                fused = ZERO
                if start + row < stop:
                    for place in range(r * group_size, (r + 1) * group_size):
                        y = accumulator(Y[b, h, start + row, channels[place]])
                        if has_gains:
                            fused += gains[place] * y
                        else:
                            fused += y
                tile[row, r] = fused

    return cuda.jit(device=True)(fuse_channels)
