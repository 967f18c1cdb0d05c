"""The rows that sequences have in pages, packed one sequence after another (docs/math.md, eq. 29, 30).

    packed[c_b + m] <- row m mod S of page t_bc, c = floor(m / S),   m < s_b      with c_b the sum of s_i, i < b

Reference : reference/paged_attention.py        CUDA C++ : raw_kernels/pack_rows.cu
Launcher  : distrattn_np/backends/numba_paged_keys.py

Grid      : B * H * row tiles; row_tiles = max(ceil(M / thread_rows), 1), M the rows that fill all pages of a sequence
Block     : (thread_columns, thread_rows); thread (tx, ty) owns row ty of the tile and its columns tx, tx +
            thread_columns, ...
Assumes   : lengths are taken for 0 to M; pages are not looked at
"""

from __future__ import annotations

from functools import cache
from typing import Any

from numba import cuda


@cache
def make_pack_rows(number: Any, thread_rows: int, thread_columns: int) -> Any:
    """Return the kernel for rows of numbers that are at most as wide as ``number``."""

    def pack_rows(
        packed: Any,  # [1, H, B * M, D]
        pages: Any,  # [P, H, S, D]
        page_table: Any,  # [B, pages of a sequence]
        lengths: Any,  # [B]
        edges_q: Any,  # [B + 1], the first query of each sequence
        edges_k: Any,  # [B + 1], its first key
        queries: int,  # of each sequence
    ) -> None:
        heads, size, width = pages.shape[1], pages.shape[2], pages.shape[3]
        most = page_table.shape[1] * size
        row_tiles = max((most + thread_rows - 1) // thread_rows, 1)
        m = cuda.blockIdx.x % row_tiles * thread_rows + cuda.threadIdx.y
        h = cuda.blockIdx.x // row_tiles % heads
        b = cuda.blockIdx.x // row_tiles // heads
        begin = 0
        for before in range(b):
            begin += min(max(lengths[before], 0), most)
        rows = min(max(lengths[b], 0), most)
        if m == 0 and h == 0 and cuda.threadIdx.x == 0:
            edges_q[b] = b * queries
            edges_k[b] = begin
            if b + 1 == lengths.shape[0]:
                edges_q[b + 1] = (b + 1) * queries
                edges_k[b + 1] = begin + rows
        if m < rows:
            page = page_table[b, m // size]
            for d in range(cuda.threadIdx.x, width, thread_columns):
                packed[0, h, begin + m, d] = number(pages[page, h, m % size, d])

    return cuda.jit(pack_rows)
