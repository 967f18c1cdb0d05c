"""The mean of the keys of every head, which the subspace method takes from each of them (docs/math.md, eq. 12).

    mean = sum over all m of k_m / M

Reference : reference/subspace_attention.py
Launcher  : distrattn_np/backends/numba_backend.py

Grid      : B * H_kv * ceil(D / THREAD_COLUMNS), one block per (batch, key head) and few channels
Block     : (THREAD_COLUMNS, THREAD_ROWS); the keys are dealt out to the thread rows
Shared    : one partial sum a thread
"""

from __future__ import annotations

from functools import cache
from typing import Any

from numba import cuda


@cache
def make_key_mean(accumulator: Any, thread_rows: int, thread_columns: int) -> Any:
    """Return the kernel for any width."""
    PARTIAL_SHAPE = (thread_rows, thread_columns)
    ZERO = accumulator(0)

    def key_mean(
        K: Any,  # [B, H_kv, M, D]
        mean: Any,  # [B, H_kv, D]; zero without keys
    ) -> None:
        partial_smem = cuda.shared.array(PARTIAL_SHAPE, accumulator)
        tx = cuda.threadIdx.x
        ty = cuda.threadIdx.y

        # ---- which channels this block owns ----
        heads, M, width = K.shape[1], K.shape[2], K.shape[3]
        chunks = (width + thread_columns - 1) // thread_columns
        j = cuda.blockIdx.x % chunks * thread_columns + tx
        h = cuda.blockIdx.x // chunks % heads
        b = cuda.blockIdx.x // chunks // heads

        # ---- partial sums, then their sum ----
        partial = ZERO
        if j < width:
            for m in range(ty, M, thread_rows):
                partial += accumulator(K[b, h, m, j])
        partial_smem[ty, tx] = partial
        cuda.syncthreads()  # all partial sums are there
        if ty == 0 and j < width:
            for i in range(1, thread_rows):
                partial += partial_smem[i, tx]
            mean[b, h, j] = partial / accumulator(max(M, 1))

    return cuda.jit(key_mean)
