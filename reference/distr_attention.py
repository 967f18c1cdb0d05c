"""The whole method, block by block, in float64 (docs/math.md, eq. 4)."""

from __future__ import annotations

import numpy as np

from .channel_norms import channel_norms
from .exact_attention import attend_heads
from .fuse_channels import fuse_channels, sample_channels
from .fusion_gains import fusion_gains
from .group_channels import group_channels
from .hash_channels import hash_channels, hyperplanes
from .score_options import NO_OPTIONS, ScoreOptions


def rows_that_meet(
    start: int, stop: int, *, group_by: str, N: int, M: int, causal_offset: int | None
) -> tuple[int, int]:
    """Return the range of rows of the other side that meet rows ``start`` to ``stop - 1`` of the grouped side.

    Blocks over queries: the keys that the last query of the block sees. Blocks over keys: the queries from the first
    that sees the block's first key.
    """
    if causal_offset is None:
        return 0, M if group_by == "queries" else N
    if group_by == "queries":
        return 0, min(max(stop + causal_offset, 0), M)
    return min(max(start - causal_offset, 0), N), N


def group_maps(
    q: np.ndarray,
    k: np.ndarray,
    *,
    group_size: int,
    block_size: int,
    group_by: str,
    fusion: str,
    seed: int,
    causal_offset: int | None = None,
) -> tuple[np.ndarray, np.ndarray | None]:
    """Return channels (B, H_x, C, D) int32 and gains (B, H_x, C, D) float64 or None, as in ``GroupMaps``.

    H_x is H for blocks over queries and H_kv for blocks over keys, where the query heads that share a key head share
    its maps: their channel norms are added up.
    """
    B, H, N, D = q.shape
    H_kv, M = k.shape[1:3]
    grouped = q if group_by == "queries" else k
    heads, rows = grouped.shape[1:3]
    starts = range(0, rows, block_size)
    planes = hyperplanes(seed, block_size)
    channels = np.empty((B, heads, len(starts), D), dtype=np.int32)
    gains = np.ones(channels.shape) if fusion == "lstsq" else None
    for b, h in np.ndindex(B, heads):
        for c, start in enumerate(starts):
            stop = min(start + block_size, rows)
            X = grouped[b, h, start:stop].astype(np.float64)
            order = group_channels(hash_channels(X, planes))
            if gains is not None:
                first, last = rows_that_meet(start, stop, group_by=group_by, N=N, M=M, causal_offset=causal_offset)
                if group_by == "queries":
                    others = k[b, h * H_kv // H, first:last]
                else:
                    others = q[b, h * H // H_kv : (h + 1) * H // H_kv, first:last].reshape(-1, D)
                norms = channel_norms(others.astype(np.float64))
                order, gains[b, h, c] = fusion_gains(X, order, norms, group_size)
            channels[b, h, c] = order
    return channels, gains


def fused_scores(
    Q: np.ndarray,
    K: np.ndarray,
    channels: np.ndarray,
    gains: np.ndarray | None,
    *,
    group_size: int,
    block_size: int,
    group_by: str,
) -> np.ndarray:
    """Return the approximate ``Q K^T`` (N, M) of one head before scaling (eq. 4); channels and gains are (C, D)."""
    scores = np.empty((len(Q), len(K)), dtype=Q.dtype)
    for c, order in enumerate(channels):
        rows = slice(c * block_size, (c + 1) * block_size)
        gain = None if gains is None else gains[c]
        if group_by == "queries":
            sampled = sample_channels(Q[rows], order, group_size)
            scores[rows] = sampled @ fuse_channels(K, order, gain, group_size).T
        else:
            sampled = sample_channels(K[rows], order, group_size)
            scores[:, rows] = fuse_channels(Q, order, gain, group_size) @ sampled.T
    return scores


def distr_attention(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    *,
    scale: float,
    group_size: int,
    block_size: int,
    group_by: str,
    fusion: str,
    seed: int,
    causal_offset: int | None = None,
    options: ScoreOptions = NO_OPTIONS,
    maps: tuple[np.ndarray, np.ndarray | None] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Return approximate attention (B, H, N, E) and its lse (B, H, N) in float64.

    ``maps`` takes the result of `group_maps`, so that several implementations can be compared on one permutation.
    """
    if maps is None:
        maps = group_maps(
            q,
            k,
            group_size=group_size,
            block_size=block_size,
            group_by=group_by,
            fusion=fusion,
            seed=seed,
            causal_offset=causal_offset,
        )
    channels, gains = maps
    H, N = q.shape[1:3]

    def scores_of(b: int, h: int) -> np.ndarray:
        h_kv = h * k.shape[1] // H
        h_x = h if group_by == "queries" else h_kv
        return scale * fused_scores(
            q[b, h].astype(np.float64),
            k[b, h_kv].astype(np.float64),
            channels[b, h_x],
            None if gains is None else gains[b, h_x],
            group_size=group_size,
            block_size=block_size,
            group_by=group_by,
        )

    return attend_heads(scores_of, v, heads=H, queries=N, causal_offset=causal_offset, options=options)
