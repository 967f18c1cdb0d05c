"""From the Gram matrices of segments to those of all rows that meet a block (docs/math.md, eq. 11).

    forwards:  gram_s <- gram_0 + ... + gram_s        backwards:  gram_s <- gram_s + ... + gram_(S-1)

Called by : the steps of reference/subspace_attention.py        CUDA C++ : raw_kernels/sum_segments.cu
Launcher  : distrattn_np/backends/numba_backend.py

Grid      : B * H_g * ceil(D / rows), one block per few rows of the matrices of a head
Block     : any number of threads, an entry of the matrices each at a time
"""

from __future__ import annotations

from functools import cache
from typing import Any

from numba import cuda


@cache
def make_sum_segments(is_forwards: bool, rows: int) -> Any:
    """Return the kernel for one direction."""

    def sum_segments(
        grams: Any,  # [B, H_g, S, D, D], summed in place
    ) -> None:
        heads, segments, width = grams.shape[1], grams.shape[2], grams.shape[3]
        parts = (width + rows - 1) // rows
        first_row = cuda.blockIdx.x % parts * rows
        h = cuda.blockIdx.x // parts % heads
        b = cuda.blockIdx.x // parts // heads
        for place in range(cuda.threadIdx.x, min(rows, width - first_row) * width, cuda.blockDim.x):
            i = first_row + place // width
            j = place % width
            for step in range(1, segments):
                if is_forwards:
                    grams[b, h, step, i, j] += grams[b, h, step - 1, i, j]
                else:
                    s = segments - 1 - step
                    grams[b, h, s, i, j] += grams[b, h, s + 1, i, j]

    return cuda.jit(sum_segments)
