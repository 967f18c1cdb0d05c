"""Squared lengths of the channels of the other side, over the rows that meet each block (docs/math.md, eq. 9).

    norms_j = sum over the rows y that meet the block of y_j^2

Reference : reference/channel_norms.py        CUDA C++ : raw_kernels/channel_norms.cu
Launcher  : distrattn_np/backends/numba_backend.py

Grid      : B * H_x * C * ceil(D / THREAD_COLUMNS), one block per (batch, head, grouping block) and few channels
Block     : (THREAD_COLUMNS, THREAD_ROWS); the rows of Y are dealt out to the thread rows
Shared    : one partial sum a thread
"""

from __future__ import annotations

from functools import cache
from typing import Any

from numba import cuda

from .sequences import MET_START, MET_STOP, make_block_rows, make_rows_that_meet


@cache
def make_channel_norms(
    accumulator: Any, by_keys: bool, causal: bool, is_ragged: bool, thread_rows: int, thread_columns: int
) -> Any:
    """Return the kernel for one side of grouping.

    With blocks over keys, Y is Q: the query heads that share a key head are added up.
    """
    PARTIAL_SHAPE = (thread_rows, thread_columns)
    ZERO = accumulator(0)
    block_rows = make_block_rows(is_ragged)
    rows_that_meet = make_rows_that_meet(by_keys, causal)

    def channel_norms(
        Y: Any,  # [B, H_y, rows, D]
        norms: Any,  # [B, H_x, C, D]
        blocks: Any,  # [BLOCK_FIELDS, C], sequences.py; read only where ragged, what follows only elsewhere
        block_size: int,
        grouped_rows: int,
        causal_offset: int,
    ) -> None:
        partial_smem = cuda.shared.array(PARTIAL_SHAPE, accumulator)
        tx = cuda.threadIdx.x
        ty = cuda.threadIdx.y

        # ---- which channels this block owns ----
        heads, block_count, width = norms.shape[1], norms.shape[2], norms.shape[3]
        chunks = (width + thread_columns - 1) // thread_columns
        j = cuda.blockIdx.x % chunks * thread_columns + tx
        c = cuda.blockIdx.x // chunks % block_count
        h = cuda.blockIdx.x // chunks // block_count % heads
        b = cuda.blockIdx.x // chunks // block_count // heads

        # ---- which rows meet the grouping block (eq. 3) ----
        first_head = h * Y.shape[1] // heads
        last_head = (h + 1) * Y.shape[1] // heads if by_keys else first_head + 1
        if is_ragged:
            first_row = blocks[MET_START, c]
            last_row = blocks[MET_STOP, c]
        else:
            start, stop = block_rows(blocks, c, block_size, grouped_rows)
            first_row, last_row = rows_that_meet(start, stop, Y.shape[2], causal_offset)

        # ---- partial sums, then their sum ----
        partial = ZERO
        if j < width:
            for head in range(first_head, last_head):
                for row in range(first_row + ty, last_row, thread_rows):
                    y = accumulator(Y[b, head, row, j])
                    partial += y * y
        partial_smem[ty, tx] = partial
        cuda.syncthreads()  # all partial sums are there
        if ty == 0 and j < width:
            for i in range(1, thread_rows):
                partial += partial_smem[i, tx]
            norms[b, h, c, j] = partial

    return cuda.jit(channel_norms)
