"""Rows times a dense map of their block: R numbers instead of D (docs/math.md, eq. 4 and 12).

    (x_n - mean) W        and, with Z in the place of W, the other side

Reference : reference/subspace_attention.py        CUDA C++ : raw_kernels/reduce_rows.cu
Launcher  : distrattn_np/backends/numba_backend.py, for the side that is cut into blocks; the other side is reduced by
            forward.py, while it loads a tile

Grid      : B * H_x * tiles, one block per few rows of a grouping block
Block     : (thread_columns, thread_rows); thread (tx, ty) owns the rows ty, ty + thread_rows, ... and of these the
            columns tx, tx + thread_columns, ...

The device functions name no ``cuda`` attribute: the caller hands over the thread's place.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from numba import cuda

from .gram import ProductTiles
from .sequences import BLOCKS, SAMPLE_TILES, find_sequence, make_block_rows


@cache
def make_load_rows(accumulator: Any, is_centred: bool, thread_rows: int, thread_columns: int) -> Any:
    """Return the device function that loads rows as they are, less their mean where centred."""
    ZERO = accumulator(0)

    def load_rows(
        X: Any,  # [B, H, rows, >= columns]
        b: int,
        h: int,
        start: int,
        stop: int,
        columns: int,
        mean: Any,  # [D]; read only where centred
        tile: Any,  # [tile rows, >= columns]; zero from row stop - start on
        ty: int,
        tx: int,
    ) -> None:
        for row in range(ty, tile.shape[0], thread_rows):
            for d in range(tx, columns, thread_columns):
                x = ZERO
                if start + row < stop:
                    x = accumulator(X[b, h, start + row, d])
                    if is_centred:
                        x -= mean[d]
                tile[row, d] = x

    return cuda.jit(device=True)(load_rows)


@cache
def make_reduce_tile(accumulator: Any, width: int, is_centred: bool, thread_rows: int, thread_columns: int) -> Any:
    """Return the device function that multiplies rows, less their mean where centred, by the first columns of a map."""
    ZERO = accumulator(0)

    def reduce_tile(
        X: Any,  # [B, H, rows, D]
        b: int,
        h: int,
        start: int,
        stop: int,
        block_map: Any,  # [D, R]
        columns: int,
        mean: Any,  # [D]; read only where centred
        tile: Any,  # [tile rows, >= columns]; zero from row stop - start on
        ty: int,
        tx: int,
    ) -> None:
        for row in range(ty, tile.shape[0], thread_rows):
            for r in range(tx, columns, thread_columns):
                reduced = ZERO
                if start + row < stop:
                    for d in range(width):
                        x = accumulator(X[b, h, start + row, d])
                        if is_centred:
                            x -= mean[d]
                        reduced += x * block_map[d, r]
                tile[row, r] = reduced

    return cuda.jit(device=True)(reduce_tile)


@cache
def make_reduce_rows(accumulator: Any, width: int, is_centred: bool, is_ragged: bool, tiles: ProductTiles) -> Any:
    """Return the kernel that reduces every row with the map of its own block."""
    SIZE = tiles.size
    block_rows = make_block_rows(is_ragged)
    reduce_tile = make_reduce_tile(accumulator, width, is_centred, tiles.thread_rows, tiles.thread_columns)

    def reduce_rows(
        X: Any,  # [B, H_x, rows, D]
        mean: Any,  # [B or sequences, H_kv, D]; read only where centred
        maps: Any,  # [B, H_x, C, D, R]
        ranks: Any,  # [B, H_x, C]
        out: Any,  # [B, H_x, rows, R]; columns from the rank of a row's block on are not written
        sequences: Any,  # [SEQUENCE_FIELDS, S + 1], sequences.py; this and the next are read only where ragged
        blocks: Any,  # [BLOCK_FIELDS, C]
        block_size: int,
    ) -> None:
        tx = cuda.threadIdx.x
        ty = cuda.threadIdx.y
        heads = maps.shape[1]
        tiles = cuda.gridDim.x // (maps.shape[0] * heads)
        tile = cuda.blockIdx.x % tiles
        h = cuda.blockIdx.x // tiles % heads
        b = cuda.blockIdx.x // tiles // heads
        mean_b = b
        first_block = 0
        if is_ragged:
            s, tile = find_sequence(sequences[SAMPLE_TILES], tile)
            if s < 0:
                return
            mean_b = s
            first_block = sequences[BLOCKS, s]
        tiles_per_block = (block_size + SIZE - 1) // SIZE
        c = first_block + tile // tiles_per_block
        start, stop = block_rows(blocks, c, block_size, X.shape[2])
        start += tile % tiles_per_block * SIZE
        stop = min(start + SIZE, stop)
        if start < stop:
            h_kv = h * mean.shape[1] // heads
            rows = out[b, h, start:stop]
            reduce_tile(X, b, h, start, stop, maps[b, h, c], ranks[b, h, c], mean[mean_b, h_kv], rows, ty, tx)

    return cuda.jit(reduce_rows)
