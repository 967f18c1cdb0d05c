"""What the maps of a finished block of a cache weigh directions by (docs/math.md, eq. 28).

    B = (Y^T Y + w X^T X) / 2,   w = tr(Y^T Y) / tr(X^T X);   where one is all zero, B is the other

X are the keys of the block, Y the queries that are known beforehand, of the key head.

Reference : reference/grouped_keys.py        CUDA C++ : raw_kernels/expected_gram.cu
Launcher  : distrattn_np/backends/numba_grouped_keys.py

Grid      : heads * blocks, blocks fastest
Block     : any number of threads, an entry of the matrices each at a time
"""

from __future__ import annotations

from functools import cache
from typing import Any

from numba import cuda


@cache
def make_expected_gram(accumulator: Any) -> Any:
    """Return the kernel for any width."""
    ZERO = accumulator(0)
    ONE = accumulator(1)
    TWO = accumulator(2)

    def expected_gram(
        keys: Any,  # [heads, blocks, 1, D, D]: X^T X, and B afterwards
        queries: Any,  # [B, H_kv, D, D]: Y^T Y; heads is B * H_kv
    ) -> None:
        blocks, width = keys.shape[1], keys.shape[3]
        c = cuda.blockIdx.x % blocks
        head = cuda.blockIdx.x // blocks
        b = head // queries.shape[1]
        h = head % queries.shape[1]
        of_keys = ZERO
        of_queries = ZERO
        for d in range(width):
            of_keys += keys[head, c, 0, d, d]
            of_queries += queries[b, h, d, d]
        cuda.syncthreads()  # every thread has both traces, the diagonal may be written

        # a side of zeros leaves the other alone, and NaN is kept
        half = ONE / TWO
        weight = ZERO
        if of_keys == ZERO:
            half = ONE
        elif of_queries == ZERO:
            weight = TWO
        else:
            weight = of_queries / of_keys
        for place in range(cuda.threadIdx.x, width * width, cuda.blockDim.x):
            i = place // width
            j = place % width
            keys[head, c, 0, i, j] = half * (queries[b, h, i, j] + weight * keys[head, c, 0, i, j])

    return cuda.jit(expected_gram)
