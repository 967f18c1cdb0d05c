"""Attention as it is defined (docs/math.md, eq. 1 to 3 and 21 to 24)."""

from __future__ import annotations

from collections.abc import Callable

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


def attend_heads(
    scores_of: Callable[[int, int], np.ndarray],
    v: np.ndarray,
    *,
    heads: int,
    queries: int,
    causal_offset: int | None,
    options: ScoreOptions,
) -> tuple[np.ndarray, np.ndarray]:
    """Return attention (B, H, N, E) over v (B, H_kv, M, E) and its lse (B, H, N), in float64.

    ``scores_of(b, h)`` is the scaled scores (N, M) of a query head, to which the options are applied.
    """
    B, H_kv, M, E = v.shape
    out = np.zeros((B, heads, queries, E))
    lse = np.full((B, heads, queries), -np.inf)
    seen = visible_keys(queries, M, causal_offset, options.window)
    for b, h in np.ndindex(B, heads):
        S = np.where(seen, options.apply(scores_of(b, h), b, h), -np.inf)
        out[b, h], lse[b, h] = softmax_attention(S, v[b, h * H_kv // heads].astype(np.float64))
    return out, lse


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
    H, N = q.shape[1:3]

    def scores_of(b: int, h: int) -> np.ndarray:
        Q, K = (x.astype(np.float64) for x in (q[b, h], k[b, h * k.shape[1] // H]))
        scores: np.ndarray = scale * (Q @ K.T)
        return scores

    return attend_heads(scores_of, v, heads=H, queries=N, causal_offset=causal_offset, options=options)
