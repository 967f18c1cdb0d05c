"""8-bit scores with smoothed keys, as in SageAttention (Zhang et al., arXiv 2410.02367)."""

from __future__ import annotations

from typing import Any

from ...attention import exact_attention
from ...work import visible_pairs
from .common import array_module

QUERY_BLOCK, KEY_BLOCK = 128, 64
"""Rows that share a quantisation step."""
LARGEST = 127


def int8_attention(q: Any, k: Any, v: Any, *, causal: bool = False) -> Any:
    """Attention whose queries and keys are rounded to 8 bits before their product.

    The keys lose their mean over the rows, which softmax does not see. Blocks of rows are divided by their step
    ``max|x| / 127`` and rounded: S = step_q step_k (Q_int8 K_int8^T). The rounded values are multiplied as floats here:
    float32 holds every sum of up to 1040 products of 8-bit integers.

    Left out: the 16-bit product with V and its accumulation, and the choice of a kernel for each layer. Exact where the
    values lie on their blocks' grids. The mean that is taken off the keys is over all of them, later ones of a causal
    call too; that changes the rounding of a query's scores and nothing else.
    """
    xp = array_module(q)
    smooth = k - k.mean(axis=2, keepdims=True)
    return exact_attention(_rounded(xp, q, QUERY_BLOCK), _rounded(xp, smooth, KEY_BLOCK), v, causal=causal)


def int8_flop(N: int, M: int, D: int, E: int, *, causal: bool = False) -> int:
    """Return the operations of a head: as many as exact attention has, those of the scores on 8-bit integers."""
    return 2 * visible_pairs(N, M, M - N if causal else None) * (D + E) + 3 * (N + M) * D


def _rounded(xp: Any, x: Any, block: int) -> Any:
    """Return x (B, H, rows, D) on the grid of 8-bit integers of each block of rows."""
    result = xp.empty_like(x)
    for start in range(0, x.shape[2], block):
        rows = x[:, :, start : start + block]
        step = xp.abs(rows).max(axis=(2, 3), keepdims=True) / LARGEST
        step = xp.where(step == 0, 1, step).astype(x.dtype)
        result[:, :, start : start + block] = xp.rint(rows / step) * step
    return result
