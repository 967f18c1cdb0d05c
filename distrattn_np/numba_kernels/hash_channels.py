"""Locality-sensitive hashing of channels (docs/math.md, eq. 5).

    bit p of word_j = [ sum_l X_lj g_lp > 0 ]

Reference : reference/hash_channels.py        CUDA C++ : raw_kernels/hash_channels.cu
Launcher  : distrattn_np/backends/numba_backend.py

Grid      : B * H * C * ceil(D / channels), one block per (batch, head, grouping block) and handful of channels
Block     : (bit_threads, channels); a thread owns every bit_threads-th bit of one channel
Shared    : a tile of X and one of the hyperplanes, and the parts of the words
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numba import cuda

from ..reference import HASH_BITS
from .sequences import make_block_rows

ROWS_PER_TILE = 32


@cache
def make_hash_channels(accumulator: Any, channels: int, bit_threads: int, is_ragged: bool) -> Any:
    """Return the kernel that hashes ``channels`` channels a thread block; ``accumulator`` is the NumPy type of sums."""
    block_rows = make_block_rows(is_ragged)
    THREADS = channels * bit_threads
    BITS_PER_THREAD = HASH_BITS // bit_threads
    X_SHAPE = (ROWS_PER_TILE, channels)
    PLANES_SHAPE = (ROWS_PER_TILE, HASH_BITS)
    WORDS_SHAPE = (channels, bit_threads)
    ZERO = accumulator(0)

    def hash_channels(
        X: Any,  # [B, H, rows, D]
        planes: Any,  # [L, HASH_BITS]
        words: Any,  # [B, H, C, D]
        blocks: Any,  # [BLOCK_FIELDS, C], sequences.py; read only where ragged
        block_size: int,
    ) -> None:
        X_smem = cuda.shared.array(X_SHAPE, accumulator)
        planes_smem = cuda.shared.array(PLANES_SHAPE, accumulator)
        words_smem = cuda.shared.array(WORDS_SHAPE, np.int32)
        projections = cuda.local.array(BITS_PER_THREAD, accumulator)
        tx = cuda.threadIdx.x
        ty = cuda.threadIdx.y
        thread = ty * bit_threads + tx

        # ---- which channels this block owns ----
        heads, block_count, width = words.shape[1], words.shape[2], words.shape[3]
        chunks = (width + channels - 1) // channels
        first_channel = cuda.blockIdx.x % chunks * channels
        c = cuda.blockIdx.x // chunks % block_count
        h = cuda.blockIdx.x // chunks // block_count % heads
        b = cuda.blockIdx.x // chunks // block_count // heads
        start, stop = block_rows(blocks, c, block_size, X.shape[2])

        # ---- X^T g [channels, HASH_BITS] ----
        for i in range(BITS_PER_THREAD):
            projections[i] = ZERO
        for tile_start in range(start, stop, ROWS_PER_TILE):
            rows = min(stop - tile_start, ROWS_PER_TILE)
            for i in range(thread, rows * channels, THREADS):
                row = i // channels
                j = first_channel + i % channels
                X_smem[row, i % channels] = accumulator(X[b, h, tile_start + row, j]) if j < width else ZERO
            for i in range(thread, rows * HASH_BITS, THREADS):
                row = i // HASH_BITS
                planes_smem[row, i % HASH_BITS] = accumulator(planes[tile_start - start + row, i % HASH_BITS])
            cuda.syncthreads()  # both tiles are there
            for row in range(rows):
                x = X_smem[row, ty]
                for i in range(BITS_PER_THREAD):
                    projections[i] += x * planes_smem[row, tx + i * bit_threads]
            cuda.syncthreads()  # both tiles are used up

        # ---- this thread's bits, then the word ----
        word = 0
        for i in range(BITS_PER_THREAD):
            if projections[i] > ZERO:
                word |= 1 << (tx + i * bit_threads)
        words_smem[ty, tx] = word
        cuda.syncthreads()  # all bits are there
        if tx == 0 and first_channel + ty < width:
            for i in range(1, bit_threads):
                word |= words_smem[ty, i]
            words[b, h, c, first_channel + ty] = word

    return cuda.jit(hash_channels)
