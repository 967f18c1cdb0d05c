"""Attention as it is defined (docs/math.md, eq. 1 to 3 and 21 to 24)."""

from __future__ import annotations

import numpy as np

from .score_options import NO_OPTIONS, ScoreOptions, visible_keys


def softmax_attention(S: np.ndarray, V: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return ``softmax(S) V`` and the log of the sum of ``exp(S)`` over each row (eq. 2).

    Parameters
    ----------
    S : array, shape (N, M)
        Scores; minus infinity where a key must not be attended.
    V : array, shape (M, E)

    Returns
    -------
    O : array, shape (N, E)
        Zero in a row that has nothing to attend.
    lse : array, shape (N,)
        Natural logarithm; minus infinity in such a row.
    """
    row_max = S.max(axis=1, initial=-np.inf, keepdims=True)
    reference = np.where(row_max == -np.inf, 0, row_max)
    P = np.exp(S - reference)
    row_sum = P.sum(axis=1, keepdims=True)
    O = P @ V
    O = np.divide(O, row_sum, out=np.zeros_like(O), where=row_sum != 0)
    with np.errstate(divide="ignore"):
        lse = np.log(row_sum[:, 0]) + reference[:, 0]
    return O, lse


def exact_attention(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    *,
    scale: float,
    causal_offset: int | None = None,
    options: ScoreOptions = NO_OPTIONS,
) -> tuple[np.ndarray, np.ndarray]:
    """Return exact attention of (B, H, N, D), (B, H_kv, M, D), (B, H_kv, M, E) in float64, and its lse (B, H, N)."""
    B, H, N, _ = q.shape
    H_kv, M, E = k.shape[1], k.shape[2], v.shape[3]
    out = np.zeros((B, H, N, E))
    lse = np.full((B, H, N), -np.inf)
    seen = visible_keys(N, M, causal_offset, options.window)
    for b, h in np.ndindex(B, H):
        Q, K, V = (x.astype(np.float64) for x in (q[b, h], k[b, h * H_kv // H], v[b, h * H_kv // H]))
        S = np.where(seen, options.apply(scale * (Q @ K.T), b, h), -np.inf)
        out[b, h], lse[b, h] = softmax_attention(S, V)
    return out, lse
