"""Gram matrices of segments of rows (docs/math.md, eq. 11 and 12).

    gram_c = sum over the rows x of segment c, and over the heads that share a matrix, of (x - mean)^T (x - mean)

Reference : reference/gram.py        CUDA C++ : raw_kernels/gram.cu
Launcher  : distrattn_np/backends/numba_backend.py

Grid      : B * H_g * C * ceil(D / size)^2, one block per square part of each matrix
Block     : (thread_columns, thread_rows); thread (tx, ty) owns the rows ty, ty + thread_rows, ... of the part and, of
            these, the columns tx, tx + thread_columns, ...
Shared    : two tiles [depth, size] of X
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

from numba import cuda

from .sequences import SEQUENCE


class ProductTiles(NamedTuple):
    """How a thread block multiplies matrices: the square part of the product, the terms of one step, the threads."""

    size: int
    depth: int
    thread_rows: int
    thread_columns: int


@cache
def make_gram(accumulator: Any, is_centred: bool, tiles: ProductTiles) -> Any:
    """Return the kernel for any width; ``is_centred=False`` takes the mean as zero."""
    SIZE, DEPTH, THREAD_ROWS, THREAD_COLUMNS = tiles
    THREADS = THREAD_ROWS * THREAD_COLUMNS
    TILE_SHAPE = (DEPTH, SIZE)
    SUMS_SHAPE = (SIZE // THREAD_ROWS, SIZE // THREAD_COLUMNS)
    ZERO = accumulator(0)

    def gram(
        X: Any,  # [B, H, rows, D]
        mean: Any,  # [B or sequences, H, D]; read only where centred
        blocks: Any,  # [BLOCK_FIELDS, C], sequences.py
        edge: int,  # a field: segment c is rows blocks[edge, c] to blocks[edge + 1, c] - 1
        grams: Any,  # [B, H_g, C, D, D]; H / H_g heads share a matrix
    ) -> None:
        left_smem = cuda.shared.array(TILE_SHAPE, accumulator)
        right_smem = cuda.shared.array(TILE_SHAPE, accumulator)
        sums = cuda.local.array(SUMS_SHAPE, accumulator)
        tx = cuda.threadIdx.x
        ty = cuda.threadIdx.y

        # ---- which part of which matrix this block owns ----
        heads, segments, width = grams.shape[1], grams.shape[2], grams.shape[3]
        parts = (width + SIZE - 1) // SIZE
        first_right = cuda.blockIdx.x % parts * SIZE
        first_left = cuda.blockIdx.x // parts % parts * SIZE
        item = cuda.blockIdx.x // parts // parts
        c = item % segments
        h = item // segments % heads
        b = item // segments // heads
        heads_per_gram = X.shape[1] // heads
        stop = blocks[edge + 1, c]
        mean_b = b + blocks[SEQUENCE, c]

        for i in range(SUMS_SHAPE[0]):
            for j in range(SUMS_SHAPE[1]):
                sums[i, j] = ZERO
        for head in range(h * heads_per_gram, (h + 1) * heads_per_gram):
            for tile_start in range(blocks[edge, c], stop, DEPTH):
                # ---- the channels of either side, [DEPTH, SIZE] ----
                for place in range(ty * THREAD_COLUMNS + tx, DEPTH * SIZE, THREADS):
                    row = place // SIZE
                    left = first_left + place % SIZE
                    right = first_right + place % SIZE
                    x = ZERO
                    y = ZERO
                    if tile_start + row < stop:
                        if left < width:
                            x = accumulator(X[b, head, tile_start + row, left])
                            if is_centred:
                                x -= mean[mean_b, head, left]
                        if right < width:
                            y = accumulator(X[b, head, tile_start + row, right])
                            if is_centred:
                                y -= mean[mean_b, head, right]
                    left_smem[row, place % SIZE] = x
                    right_smem[row, place % SIZE] = y
                cuda.syncthreads()  # both tiles are there
                for row in range(min(DEPTH, stop - tile_start)):
                    for i in range(SUMS_SHAPE[0]):
                        x = left_smem[row, ty + i * THREAD_ROWS]
                        for j in range(SUMS_SHAPE[1]):
                            sums[i, j] += x * right_smem[row, tx + j * THREAD_COLUMNS]
                cuda.syncthreads()  # both tiles are used up

        for i in range(SUMS_SHAPE[0]):
            left = first_left + ty + i * THREAD_ROWS
            for j in range(SUMS_SHAPE[1]):
                right = first_right + tx + j * THREAD_COLUMNS
                if left < width and right < width:
                    grams[b, h, c, left, right] = sums[i, j]

    return cuda.jit(gram)
