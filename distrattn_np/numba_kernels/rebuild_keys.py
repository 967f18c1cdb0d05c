"""The keys that a cache stands for, D numbers each (docs/math.md, eq. 27).

    k_m = mean_c + Z_c s_m        where block c of the keys is finished,        k_m where it is not

What follows is exact attention to these keys: q_n . k_m = q_n . mean_c + (q_n Z_c) . s_m.

Reference : reference/grouped_keys.py        CUDA C++ : raw_kernels/rebuild_keys.cu
Launcher  : distrattn_np/backends/numba_grouped_keys.py

Grid      : B * H_kv * row tiles; row_tiles = ceil(M / thread_rows)
Block     : (thread_columns, thread_rows); thread (tx, ty) owns key ty of the tile and its columns tx, tx +
            thread_columns, ...
"""

from __future__ import annotations

from functools import cache
from typing import Any

from numba import cuda


@cache
def make_rebuild_keys(accumulator: Any, rank: int, thread_rows: int, thread_columns: int) -> Any:
    """Return the kernel for maps of ``rank`` columns; sums run in ``accumulator``, keys are rounded to their dtype."""

    def rebuild_keys(
        keys: Any,  # [B, H_kv, M, D]
        sampled: Any,  # [B, H_kv, blocks, L, R]
        maps: Any,  # [B, H_kv, blocks, R + 1, D]: Z transposed, then the mean
        tail: Any,  # [B, H_kv, M - exact_from, D]
        exact_from: int,
    ) -> None:
        heads, M, width = keys.shape[1], keys.shape[2], keys.shape[3]
        row_tiles = (M + thread_rows - 1) // thread_rows
        m = cuda.blockIdx.x % row_tiles * thread_rows + cuda.threadIdx.y
        h = cuda.blockIdx.x // row_tiles % heads
        b = cuda.blockIdx.x // row_tiles // heads
        if m >= M:
            return
        block_size = sampled.shape[3]
        c = m // block_size
        row = m % block_size
        for d in range(cuda.threadIdx.x, width, thread_columns):
            if m >= exact_from:
                keys[b, h, m, d] = tail[b, h, m - exact_from, d]
            else:
                key = accumulator(maps[b, h, c, rank, d])
                for r in range(rank):
                    key += accumulator(sampled[b, h, c, row, r]) * accumulator(maps[b, h, c, r, d])
                keys[b, h, m, d] = key

    return cuda.jit(rebuild_keys)
