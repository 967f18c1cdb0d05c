"""The subspace method, block by block, in float64 (docs/math.md, eq. 11 to 20)."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from .distr_attention import rows_that_meet
from .exact_attention import attend_heads
from .gram import gram
from .score_options import NO_OPTIONS, ScoreOptions
from .subspace_maps import subspace_maps


class Maps(NamedTuple):
    """What ``SubspaceMaps`` describes, in float64."""

    sampling: np.ndarray  # (B, H_x, C, D, R)
    fusion: np.ndarray  # (B, H_x, C, D, R)
    key_mean: np.ndarray  # (B, H_kv, D)
    ranks: np.ndarray  # (B, H_x, C) int32
    score_errors: np.ndarray  # (B, H_x, C)


def keys_of_mean(k: Any) -> Any:
    """Return the keys (B, H_kv, M, D) that the mean is taken of, evenly spread and 2048 to 4095 of a longer axis.

    What is subtracted from all keys may be any vector (eq. 12); to read every key for it takes longer than it helps.
    """
    return k[:, :, :: max(k.shape[2] // 2048, 1)]


def key_mean(k: np.ndarray) -> np.ndarray:
    """Return the mean of the keys (B, H_kv, M, D), shape (B, H_kv, D), float64; zero without keys (eq. 12)."""
    sample = keys_of_mean(k)
    mean: np.ndarray = sample.sum(axis=2, dtype=np.float64) / max(sample.shape[2], 1)
    return mean


def own_block_begin(queries: np.ndarray, *, block_size: int, causal_offset: int) -> np.ndarray:
    """Return the first key of the own block of each of these queries: it is scored exactly, and so is what follows.

    Only with blocks over keys in a causal call (eq. 20).
    """
    begin: np.ndarray = np.maximum((queries + causal_offset) // block_size * block_size, 0)
    return begin


def make_maps(
    q: np.ndarray,
    k: np.ndarray,
    *,
    scale: float,
    rank: int | None,
    score_tol: float | None,
    refine: int,
    block_size: int,
    group_by: str,
    causal_offset: int | None = None,
) -> Maps:
    """Return the maps of every block. H_x is H for blocks over queries and H_kv for blocks over keys."""
    B, H, N, D = q.shape
    H_kv, M = k.shape[1:3]
    mean = key_mean(k)
    centred = k.astype(np.float64) - mean[:, :, np.newaxis]
    q = q.astype(np.float64)
    grouped = q if group_by == "queries" else centred
    heads, rows = grouped.shape[1:3]
    starts = range(0, rows, block_size)
    # a causal query meets no block of keys that it scores exactly
    meeting_offset = causal_offset - block_size if causal_offset is not None and group_by == "keys" else causal_offset
    shape = (B, heads, len(starts))
    columns = D if rank is None else rank
    maps = Maps(
        np.zeros((*shape, D, columns)), np.zeros((*shape, D, columns)), mean, np.zeros(shape, np.int32), np.zeros(shape)
    )
    for b, h in np.ndindex(B, heads):
        for c, start in enumerate(starts):
            stop = min(start + block_size, rows)
            first, last = rows_that_meet(start, stop, group_by=group_by, N=N, M=M, causal_offset=meeting_offset)
            X = grouped[b, h, start:stop]
            if group_by == "queries":
                Y = centred[b, h * H_kv // H, first:last]
            else:
                Y = q[b, h * H // H_kv : (h + 1) * H // H_kv, first:last].reshape(-1, D)
            block = (b, h, c)
            maps.sampling[block], maps.fusion[block], maps.ranks[block], maps.score_errors[block] = subspace_maps(
                gram(X),
                gram(Y),
                x_rows=np.array(len(X)),
                y_rows=np.array(len(Y)),
                scale=scale,
                rank=rank,
                score_tol=score_tol,
                refine=refine,
            )
    return maps


def subspace_scores(
    Q: np.ndarray,
    K: np.ndarray,
    W: np.ndarray,
    Z: np.ndarray,
    *,
    block_size: int,
    group_by: str,
    exact_from: np.ndarray | None = None,
) -> np.ndarray:
    """Return the approximate ``Q K^T`` (N, M) of one head before scaling (eq. 4); K is centred, W and Z (C, D, R).

    ``exact_from`` (N,) is the first key that each query scores exactly, as from `own_block_begin`; None: there is none.
    """
    scores = np.empty((len(Q), len(K)))
    for c in range(len(W)):
        rows = slice(c * block_size, (c + 1) * block_size)
        if group_by == "queries":
            scores[rows] = (Q[rows] @ W[c]) @ (K @ Z[c]).T
        else:
            scores[:, rows] = (Q @ Z[c]) @ (K[rows] @ W[c]).T
    if exact_from is not None:
        np.copyto(scores, Q @ K.T, where=np.arange(len(K)) >= exact_from[:, np.newaxis])
    return scores


def subspace_attention(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    maps: Maps,
    *,
    scale: float,
    block_size: int,
    group_by: str,
    causal_offset: int | None = None,
    options: ScoreOptions = NO_OPTIONS,
) -> tuple[np.ndarray, np.ndarray]:
    """Return attention through `make_maps` (B, H, N, E) and its lse (B, H, N), in float64."""
    H, N = q.shape[1:3]
    exact_from = None
    if causal_offset is not None and group_by == "keys":
        exact_from = own_block_begin(np.arange(N), block_size=block_size, causal_offset=causal_offset)

    def scores_of(b: int, h: int) -> np.ndarray:
        h_kv = h * k.shape[1] // H
        h_x = h if group_by == "queries" else h_kv
        Q, mean = q[b, h].astype(np.float64), maps.key_mean[b, h_kv].astype(np.float64)
        K = k[b, h_kv].astype(np.float64) - mean
        S = subspace_scores(
            Q,
            K,
            maps.sampling[b, h_x],
            maps.fusion[b, h_x],
            block_size=block_size,
            group_by=group_by,
            exact_from=exact_from,
        )
        # centring takes the same number from all scores of a row: they get it back before they are capped (eq. 12)
        whole: np.ndarray = scale * (S + (Q @ mean)[:, np.newaxis])
        return whole

    return attend_heads(scores_of, v, heads=H, queries=N, causal_offset=causal_offset, options=options)
