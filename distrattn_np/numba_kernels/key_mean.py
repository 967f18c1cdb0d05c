"""The mean of the keys of every head, which the subspace method takes from each of them (docs/math.md, eq. 12).

    mean = sum over all m of k_m / M

in every sequence, and over some of the keys of a long one, as `keys_of_mean` of the reference takes them.

Reference : reference/subspace_attention.py
Launcher  : distrattn_np/backends/numba_backend.py

Grid      : B * sequences * H_kv * ceil(D / THREAD_COLUMNS), one block per (batch or sequence, key head), few channels
Block     : (THREAD_COLUMNS, THREAD_ROWS); the keys are dealt out to the thread rows
Shared    : one partial sum a thread
"""

from __future__ import annotations

from functools import cache
from typing import Any

from numba import cuda

from .sequences import KEYS

LEAST_KEYS = 2048
"""How many keys the mean is taken of at least, where there are so many."""


@cache
def make_key_mean(accumulator: Any, of_all: bool, thread_rows: int, thread_columns: int) -> Any:
    """Return the kernel for any width; ``of_all``: of every key, however many there are."""
    PARTIAL_SHAPE = (thread_rows, thread_columns)
    ZERO = accumulator(0)

    def key_mean(
        K: Any,  # [B, H_kv, M, D]
        mean: Any,  # [B or sequences, H_kv, D]; zero without keys
        sequences: Any,  # [SEQUENCE_FIELDS, S + 1], sequences.py
    ) -> None:
        partial_smem = cuda.shared.array(PARTIAL_SHAPE, accumulator)
        tx = cuda.threadIdx.x
        ty = cuda.threadIdx.y

        # ---- which channels this block owns ----
        heads, width, sequence_count = K.shape[1], K.shape[3], sequences.shape[1] - 1
        chunks = (width + thread_columns - 1) // thread_columns
        j = cuda.blockIdx.x % chunks * thread_columns + tx
        h = cuda.blockIdx.x // chunks % heads
        mean_b = cuda.blockIdx.x // chunks // heads
        b = mean_b // sequence_count
        first = sequences[KEYS, mean_b % sequence_count]
        stop = sequences[KEYS, mean_b % sequence_count + 1]
        step = 1 if of_all else max((stop - first) // LEAST_KEYS, 1)

        # ---- partial sums, then their sum ----
        partial = ZERO
        if j < width:
            for m in range(first + ty * step, stop, thread_rows * step):
                partial += accumulator(K[b, h, m, j])
        partial_smem[ty, tx] = partial
        cuda.syncthreads()  # all partial sums are there
        if ty == 0 and j < width:
            for i in range(1, thread_rows):
                partial += partial_smem[i, tx]
            mean[mean_b, h, j] = partial / accumulator(max((stop - first + step - 1) // step, 1))

    return cuda.jit(key_mean)
