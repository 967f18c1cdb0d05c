"""From the Gram matrices of segments to those of all rows that meet a block (docs/math.md, eq. 11).

    forwards:  gram_c <- gram_0 + ... + gram_c        backwards:  gram_c <- gram_c + ... + gram_(C-1)

in every sequence.

Called by : the steps of reference/subspace_attention.py        CUDA C++ : raw_kernels/sum_segments.cu
Launcher  : distrattn_np/backends/numba_backend.py

Grid      : B * sequences * H_g * ceil(D / rows), one block per few rows of the matrices of a head
Block     : any number of threads, an entry of the matrices each at a time
"""

from __future__ import annotations

from functools import cache
from typing import Any

from numba import cuda

from .sequences import BLOCKS


@cache
def make_sum_segments(is_forwards: bool, rows: int) -> Any:
    """Return the kernel for one direction."""

    def sum_segments(
        grams: Any,  # [B, H_g, C, D, D], summed in place
        sequences: Any,  # [SEQUENCE_FIELDS, S + 1], sequences.py
    ) -> None:
        heads, width, sequence_count = grams.shape[1], grams.shape[3], sequences.shape[1] - 1
        parts = (width + rows - 1) // rows
        first_row = cuda.blockIdx.x % parts * rows
        h = cuda.blockIdx.x // parts % heads
        s = cuda.blockIdx.x // parts // heads % sequence_count
        b = cuda.blockIdx.x // parts // heads // sequence_count
        first = sequences[BLOCKS, s]
        last = sequences[BLOCKS, s + 1] - 1
        for place in range(cuda.threadIdx.x, min(rows, width - first_row) * width, cuda.blockDim.x):
            i = first_row + place // width
            j = place % width
            for step in range(last - first):
                if is_forwards:
                    c = first + 1 + step
                    grams[b, h, c, i, j] += grams[b, h, c - 1, i, j]
                else:
                    c = last - 1 - step
                    grams[b, h, c, i, j] += grams[b, h, c + 1, i, j]

    return cuda.jit(sum_segments)
