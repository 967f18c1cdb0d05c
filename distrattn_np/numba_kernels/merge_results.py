"""One result from two over disjoint keys (docs/math.md, eq. 25).

    lse = log(exp lse_a + exp lse_b),   O = exp(lse_a - lse) O_a + exp(lse_b - lse) O_b

Reference : reference/merge_results.py        CuPy : the reference, on CuPy arrays
Launcher  : distrattn_np/backends/numba_backend.py

Grid      : ceil(B * H * N * E / threads), one thread an element of O
Assumes   : a row that saw nothing has lse = -inf, and O = 0 where both did
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

from numba import cuda


@cache
def make_merge_results(accumulator: Any) -> Any:
    """Return the kernel for sums in ``accumulator``."""
    ZERO = accumulator(0)
    ONE = accumulator(1)
    NOTHING = accumulator(-math.inf)

    def merge_results(
        O_a: Any,  # [B, H, N, E]
        lse_a: Any,  # [B, H, N]
        O_b: Any,  # [B, H, N, E]
        lse_b: Any,  # [B, H, N]
        O: Any,  # [B, H, N, E]
        lse: Any,  # [B, H, N]
    ) -> None:
        # ---- which element this thread owns ----
        heads, rows, width = O.shape[1], O.shape[2], O.shape[3]
        index = cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x
        e = index % width
        n = index // width % rows
        h = index // width // rows % heads
        b = index // width // rows // heads
        if b >= O.shape[0]:
            return

        # ---- the weight of either result, of which the larger is one ----
        a_log = accumulator(lse_a[b, h, n])
        b_log = accumulator(lse_b[b, h, n])
        shift = max(a_log, b_log)
        if shift == NOTHING:
            shift = ZERO
        a_weight = math.exp(a_log - shift)
        b_weight = math.exp(b_log - shift)
        total = a_weight + b_weight
        divisor = total if total > ZERO else ONE
        # the heavier one first: a fused multiply-add rounds but one of the products, and not the one that came first
        heavier, lighter = accumulator(O_a[b, h, n, e]), accumulator(O_b[b, h, n, e])
        if a_log < b_log:
            heavier, lighter = lighter, heavier
        O[b, h, n, e] = (max(a_weight, b_weight) * heavier + min(a_weight, b_weight) * lighter) / divisor
        if e == 0:
            lse[b, h, n] = math.log(total) + shift if total > ZERO else NOTHING

    return cuda.jit(merge_results)
