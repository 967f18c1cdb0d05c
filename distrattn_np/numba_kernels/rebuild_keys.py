"""The keys that a cache stands for, D numbers each (docs/math.md, eq. 27, 30).

    k_m = mean_c + Z_c s_m        where block c of the keys is finished,        k_m where it is not

What follows is exact attention to these keys: q_n . k_m = q_n . mean_c + (q_n Z_c) . s_m.

Paged: keys lie in pages, each a block, and the last page of a sequence may be unfinished. The keys of all sequences are
written one sequence after another, from the rows on that pack_rows.py found.

Reference : reference/grouped_keys.py        CUDA C++ : raw_kernels/rebuild_keys.cu
Launcher  : distrattn_np/backends/numba_grouped_keys.py, numba_paged_keys.py

Grid      : B * H_kv * row tiles; row_tiles = ceil(M / thread_rows)
            paged: M the keys that fill all pages of a sequence
Block     : (thread_columns, thread_rows); thread (tx, ty) owns key ty of the tile and its columns tx, tx +
            thread_columns, ...
"""

from __future__ import annotations

from functools import cache
from typing import Any

from numba import cuda


@cache
def make_rebuild_keys(accumulator: Any, rank: int, is_paged: bool, thread_rows: int, thread_columns: int) -> Any:
    """Return the kernel for maps of ``rank`` columns; sums run in ``accumulator``, keys are rounded to their dtype."""

    def rebuild_keys(
        keys: Any,  # [B, H_kv, M, D]; paged: [1, H_kv, B * M, D]
        sampled: Any,  # [B, H_kv, blocks, L, R]; paged: [1, H_kv, P, S, R]
        maps: Any,  # [B, H_kv, blocks, R + 1, D]: Z transposed, then the mean; paged: [1, H_kv, P, R + 1, D]
        tail: Any,  # [B, H_kv, M - exact_from, D]; paged: [places, H_kv, S, D]
        exact_from: int,  # not paged
        page_table: Any,  # [B, pages of a sequence], where paged; and so are:
        edges_k: Any,  # [B + 1], the first key of each sequence
        tail_of: Any,  # [P], among the places; -1 of a finished page
    ) -> None:
        heads, M, width = keys.shape[1], keys.shape[2], keys.shape[3]
        block_size = sampled.shape[3]
        if is_paged:
            M = page_table.shape[1] * block_size
        row_tiles = (M + thread_rows - 1) // thread_rows
        m = cuda.blockIdx.x % row_tiles * thread_rows + cuda.threadIdx.y
        h = cuda.blockIdx.x // row_tiles % heads
        b = cuda.blockIdx.x // row_tiles // heads
        c = m // block_size
        row = m % block_size
        if is_paged:
            begin, end = edges_k[b], edges_k[b + 1]
            if begin + m >= end:
                return
            c = page_table[b, c]
            place = tail_of[c]
            is_exact, tail_row = place >= 0, row
            b, m = 0, begin + m
        else:
            if m >= M:
                return
            place, is_exact, tail_row = b, m >= exact_from, m - exact_from
        for d in range(cuda.threadIdx.x, width, thread_columns):
            if is_exact:
                keys[b, h, m, d] = tail[place, h, tail_row, d]
            else:
                key = accumulator(maps[b, h, c, rank, d])
                for r in range(rank):
                    key += accumulator(sampled[b, h, c, row, r]) * accumulator(maps[b, h, c, r, d])
                keys[b, h, m, d] = key

    return cuda.jit(rebuild_keys)
