"""Keys that are grouped once, as they come, for queries that nobody knows yet (docs/math.md, eq. 26 to 28)."""

from __future__ import annotations

import numpy as np

from .exact_attention import attend_heads
from .gram import gram
from .score_options import NO_OPTIONS, ScoreOptions
from .subspace_attention import Maps
from .subspace_maps import subspace_maps


def finished_blocks(keys: int, block_size: int) -> int:
    """Return how many blocks of this many keys are finished: all but the last that has a key (eq. 26)."""
    return max(-(-keys // block_size) - 1, 0)


def query_statistics(q: np.ndarray, kv_heads: int) -> tuple[np.ndarray, int]:
    """Return the Gram matrices (B, H_kv, D, D) of the queries (B, H, rows, D) of each key head, and their rows."""
    B, H, rows, D = q.shape
    shared = H // kv_heads if kv_heads else 0
    grams = np.zeros((B, kv_heads, D, D))
    for b, h in np.ndindex(B, kv_heads):
        for head in q[b, h * shared : (h + 1) * shared]:
            grams[b, h] += gram(head.astype(np.float64))
    return grams, shared * rows


def expected_gram(keys: np.ndarray, queries: np.ndarray | None) -> np.ndarray:
    """Return B of a block (eq. 28) from Gram matrices (..., D, D): of its keys, not centred, and of known queries."""
    if queries is None:
        return keys
    of_keys, of_queries = (np.trace(G, axis1=-2, axis2=-1)[..., np.newaxis, np.newaxis] for G in (keys, queries))
    # so written that a side of zeros leaves the other alone, and NaN is kept
    weight = np.divide(of_queries, of_keys, out=np.zeros_like(of_keys), where=of_keys != 0)
    return np.where(of_queries == 0, keys, np.where(of_keys == 0, queries, (queries + weight * keys) / 2))


def group_block(
    X: np.ndarray,
    mean: np.ndarray,
    queries: np.ndarray | None,
    query_rows: int,
    *,
    scale: float,
    rank: int | None,
    score_tol: float | None,
    refine: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return W and Z (B, H_kv, D, R) of one block of keys X (B, H_kv, L, D), its ranks and errors (B, H_kv).

    ``mean`` (B, H_kv, D) is subtracted from the keys; ``queries`` (B, H_kv, D, D) is a sum over ``query_rows`` queries.
    """
    B, H_kv, L, D = X.shape
    R = D if rank is None else rank
    shape = (B, H_kv)
    W, Z = np.empty((2, *shape, D, R))
    ranks, errors = np.empty(shape, np.int32), np.empty(shape)
    # one head at a time: the bits of a stack of them may depend on its other members (`cholesky`)
    for head in np.ndindex(shape):
        W[head], Z[head], ranks[head], errors[head] = subspace_maps(
            gram(X[head] - mean[head]),
            expected_gram(gram(X[head]), None if queries is None else queries[head]),
            x_rows=np.array(L),
            y_rows=np.array(L if queries is None else query_rows),
            scale=scale,
            rank=rank,
            score_tol=score_tol,
            refine=refine,
        )
    return W, Z, ranks, errors


def make_key_maps(
    k: np.ndarray,
    q: np.ndarray | None = None,
    *,
    scale: float,
    rank: int | None,
    score_tol: float | None = None,
    refine: int = 1,
    block_size: int,
) -> Maps:
    """Return the maps of the finished blocks of keys (B, H_kv, M, D); ``key_mean`` (B, H_kv, F, D) is each block's own.

    ``q`` (B, H, rows, D) are known queries.
    """
    B, H_kv, M, D = k.shape
    blocks = finished_blocks(M, block_size)
    queries, query_rows = (None, 0) if q is None else query_statistics(q, H_kv)
    shape = (B, H_kv, blocks)
    columns = D if rank is None else rank
    maps = Maps(
        np.zeros((*shape, D, columns)),
        np.zeros((*shape, D, columns)),
        np.zeros((*shape, D)),
        np.zeros(shape, np.int32),
        np.zeros(shape),
    )
    for c in range(blocks):
        X = k[:, :, c * block_size : (c + 1) * block_size].astype(np.float64)
        block = (slice(None), slice(None), c)
        maps.key_mean[block] = X.mean(axis=2)
        maps.sampling[block], maps.fusion[block], maps.ranks[block], maps.score_errors[block] = group_block(
            X,
            maps.key_mean[block],
            queries,
            query_rows,
            scale=scale,
            rank=rank,
            score_tol=score_tol,
            refine=refine,
        )
    return maps


def grouped_keys_scores(
    Q: np.ndarray, K: np.ndarray, W: np.ndarray, Z: np.ndarray, means: np.ndarray, *, block_size: int
) -> np.ndarray:
    """Return the approximate ``Q K^T`` (N, M) of one head before scaling (eq. 27); W, Z (F, D, R), means (F, D)."""
    scores: np.ndarray = Q @ K.T
    for c, mean in enumerate(means):
        rows = slice(c * block_size, (c + 1) * block_size)
        scores[:, rows] = (Q @ mean)[:, np.newaxis] + (Q @ Z[c]) @ ((K[rows] - mean) @ W[c]).T
    return scores


def grouped_keys_attention(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    maps: Maps,
    *,
    scale: float,
    block_size: int,
    causal_offset: int | None = None,
    options: ScoreOptions = NO_OPTIONS,
) -> tuple[np.ndarray, np.ndarray]:
    """Return attention through `make_key_maps` (B, H, N, E) and its lse (B, H, N), in float64."""
    H, N = q.shape[1:3]

    def scores_of(b: int, h: int) -> np.ndarray:
        h_kv = h * k.shape[1] // H
        return scale * grouped_keys_scores(
            q[b, h].astype(np.float64),
            k[b, h_kv].astype(np.float64),
            maps.sampling[b, h_kv],
            maps.fusion[b, h_kv],
            maps.key_mean[b, h_kv],
            block_size=block_size,
        )

    return attend_heads(scores_of, v, heads=H, queries=N, causal_offset=causal_offset, options=options)
