"""Sequences of lengths of their own, packed one after another (docs/math.md, eq. 29)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Attend = Callable[[np.ndarray, np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]


def ragged_attention(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    cu_seqlens_q: np.ndarray,
    cu_seqlens_k: np.ndarray,
    attend: Attend,
) -> tuple[np.ndarray, np.ndarray]:
    """Return attention (N, H, E) of packed q (N, H, D), k (M, H_kv, D) and v (M, H_kv, E), and its lse (H, N), float64.

    ``attend`` is attention of one sequence, with its options: it takes (1, H, rows, D), (1, H_kv, keys, D) and
    (1, H_kv, keys, E), as `exact_attention` does, and returns (out, lse).
    """
    N, H, _ = q.shape
    out = np.zeros((N, H, v.shape[2]))
    lse = np.full((H, N), -np.inf)
    for b in range(len(cu_seqlens_q) - 1):
        rows, keys = (slice(edges[b], edges[b + 1]) for edges in (cu_seqlens_q, cu_seqlens_k))
        Q, K, V = (x.swapaxes(0, 1)[np.newaxis] for x in (q[rows], k[keys], v[keys]))
        one, lse_of_one = attend(Q, K, V)
        out[rows], lse[:, rows] = one[0].swapaxes(0, 1), lse_of_one[0]
    return out, lse
