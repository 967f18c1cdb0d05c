"""Least-squares fusion: which member stands for its group, and how much of it each member is (docs/math.md, eq. 9).

    first = the member with the largest |x_j| |y_j|;   gain_j = <x_first, x_j> / <x_first, x_first>

Reference : reference/fusion_gains.py        CUDA C++ : raw_kernels/fusion_gains.cu
Launcher  : distrattn_np/backends/numba_backend.py

Grid      : B * H_x * C, one block per (batch, head, grouping block)
Block     : (thread_columns, thread_rows); the rows of X are dealt out to the thread rows
Shared    : the permutation and, for each channel, a weight and thread_rows partial sums
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
from numba import cuda

from .sequences import make_block_rows


@cache
def make_fusion_gains(
    accumulator: Any, width: int, group_size: int, is_ragged: bool, thread_rows: int, thread_columns: int
) -> Any:
    """Return the kernel for ``width`` channels in groups of ``group_size``."""
    PARTIAL_SHAPE = (thread_rows, width)
    ZERO = accumulator(0)
    ONE = accumulator(1)
    block_rows = make_block_rows(is_ragged)

    def add_products(
        X: Any, b: int, h: int, start: int, stop: int, channels: Any, span: int, partial: Any, ty: int, tx: int
    ) -> None:
        # <x_lead, x_j> over this thread's rows; lead is the first of each run of ``span`` places
        for place in range(tx, width, thread_columns):
            lead = channels[place - place % span]
            j = channels[place]
            products = ZERO
            for row in range(start + ty, stop, thread_rows):
                products += accumulator(X[b, h, row, lead]) * accumulator(X[b, h, row, j])
            partial[ty, place] = products

    def add_up(partial: Any, place: int) -> Any:
        total = ZERO
        for i in range(thread_rows):
            total += partial[i, place]
        return total

    device_add_products = cuda.jit(device=True)(add_products)
    device_add_up = cuda.jit(device=True)(add_up)

    def fusion_gains(
        X: Any,  # [B, H_x, rows, D]
        norms: Any,  # [B, H_x, C, D]
        channels: Any,  # [B, H_x, C, D], reordered in place
        gains: Any,  # [B, H_x, C, D]
        blocks: Any,  # [BLOCK_FIELDS, C], sequences.py; read only where ragged
        block_size: int,
    ) -> None:
        channels_smem = cuda.shared.array(width, np.int32)
        weights_smem = cuda.shared.array(width, accumulator)
        partial_smem = cuda.shared.array(PARTIAL_SHAPE, accumulator)
        tx = cuda.threadIdx.x
        ty = cuda.threadIdx.y
        thread = ty * thread_columns + tx
        threads = thread_rows * thread_columns
        heads, block_count = channels.shape[1], channels.shape[2]
        c = cuda.blockIdx.x % block_count
        h = cuda.blockIdx.x // block_count % heads
        b = cuda.blockIdx.x // block_count // heads
        start, stop = block_rows(blocks, c, block_size, X.shape[2])

        for place in range(thread, width, threads):
            channels_smem[place] = channels[b, h, c, place]
        cuda.syncthreads()  # the permutation is there

        # ---- weights |x_j| |y_j| ----
        device_add_products(X, b, h, start, stop, channels_smem, 1, partial_smem, ty, tx)
        cuda.syncthreads()  # all partial sums are there
        for place in range(thread, width, threads):
            y_norm = norms[b, h, c, channels_smem[place]]
            # roots first: the product of the squares would leave float32's range earlier
            weights_smem[place] = math.sqrt(device_add_up(partial_smem, place)) * math.sqrt(y_norm)
        cuda.syncthreads()  # all weights are there, the partial sums are used up

        # ---- the heaviest member to the front, the rest in order ----
        for group_start in range(thread * group_size, width, threads * group_size):
            first = group_start
            for place in range(group_start + 1, group_start + group_size):
                if weights_smem[place] > weights_smem[first]:
                    first = place
            channel = channels_smem[first]
            for place in range(first, group_start, -1):
                channels_smem[place] = channels_smem[place - 1]
            channels_smem[group_start] = channel
        cuda.syncthreads()  # the new order is there

        # ---- gains ----
        device_add_products(X, b, h, start, stop, channels_smem, group_size, partial_smem, ty, tx)
        cuda.syncthreads()  # all partial sums are there
        for place in range(thread, width, threads):
            first = place - place % group_size
            length = device_add_up(partial_smem, first)
            gain = ZERO
            if place == first:
                gain = ONE
            elif length > ZERO:
                gain = device_add_up(partial_smem, place) / length
            channels[b, h, c, place] = channels_smem[place]
            gains[b, h, c, place] = gain

    return cuda.jit(fusion_gains)
