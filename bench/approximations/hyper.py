"""HyperAttention (Han et al., arXiv 2310.05869): blocks of alike rows, and sampled keys for the rest."""

from __future__ import annotations

from typing import Any

import numpy as np

from ...reference import gray_rank
from ...work import visible_pairs
from .common import array_module, even_edges, for_query_heads

BITS = 7
"""Hyperplanes of the hash."""


def hyper_attention(
    q: Any, k: Any, v: Any, *, causal: bool = False, block_size: int = 128, samples: int = 128, seed: int = 0
) -> Any:
    """Attention over the keys of a query's own block, and over ``samples`` keys that stand for all others.

    Queries and keys are hashed by the signs of products with random directions and sorted by the hash, words that
    differ in one bit side by side (the paper's sortLSH); equal parts of the two orders, of ``block_size`` keys at most,
    form the blocks whose scores are computed. Keys drawn uniformly, once for all rows, estimate the sum over the keys
    outside a row's block, with weight M / samples. Causal: the later half of the queries meets the earlier half of the
    keys without a mask, and each half is treated in the same way, down to `exact_rows` rows, which are exact.

    Left out: the cap on single terms of the sampled row sums, and drawing the keys for the product with V by the
    lengths of its rows: one draw serves both sums, so a row remains a mean of values. Exact where one block, or the
    sample, holds all keys.
    """
    xp = array_module(q)
    k, v = for_query_heads(k, q.shape[1]), for_query_heads(v, q.shape[1])
    q = q * q.dtype.type(q.shape[3] ** -0.5)
    rng = np.random.default_rng(seed)
    planes = xp.asarray(rng.standard_normal((q.shape[3], BITS)), dtype=q.dtype)
    attend = _Hyper(xp, planes, rng, block_size, samples)
    out = xp.empty((*q.shape[:3], v.shape[3]), dtype=q.dtype)
    for b, h in np.ndindex(*q.shape[:2]):
        head = attend.causal if causal else attend.full
        out[b, h], _ = head(q[b, h], k[b, h], v[b, h])
    return out


def hyper_flop(
    N: int,
    M: int,
    D: int,
    E: int,
    *,
    causal: bool = False,
    block_size: int = 128,
    samples: int = 128,
    seed: int = 0,  # noqa: ARG001
) -> int:
    """Return the FLOP of a head; sampled keys that lie in a row's own block are left out."""
    if causal:
        if exact_rows(block_size) >= N:
            return 2 * visible_pairs(N, N, 0) * (D + E)
        half = N // 2
        return (
            hyper_flop(half, half, D, E, causal=True, block_size=block_size, samples=samples)
            + hyper_flop(N - half, N - half, D, E, causal=True, block_size=block_size, samples=samples)
            + hyper_flop(N - half, half, D, E, block_size=block_size, samples=samples)
        )
    if max(block_size, samples) >= M:
        return 2 * N * M * (D + E)
    own = M / -(-M // block_size)
    return round(2 * N * (own + samples * (1 - own / M)) * (D + E)) + 2 * (N + M) * D * BITS


def exact_rows(block_size: int) -> int:
    """Return how many rows a causal call no longer halves."""
    return 2 * block_size


class _Hyper:
    """One head at a time; queries are scaled already, and results come with their log-sum-exp."""

    def __init__(self, xp: Any, planes: Any, rng: np.random.Generator, block_size: int, samples: int) -> None:
        self.xp, self.planes, self.rng, self.block_size, self.samples = xp, planes, rng, block_size, samples

    def causal(self, Q: Any, K: Any, V: Any) -> tuple[Any, Any]:
        xp, half = self.xp, len(Q) // 2
        if len(Q) <= exact_rows(self.block_size):
            return _weigh(xp, xp.where(xp.tri(len(Q), dtype=bool), Q @ K.T, -xp.inf), V)
        early, early_lse = self.causal(Q[:half], K[:half], V[:half])
        late, late_lse = self.causal(Q[half:], K[half:], V[half:])
        cross, cross_lse = self.full(Q[half:], K[:half], V[:half])
        lse = xp.logaddexp(late_lse, cross_lse)
        late = xp.exp(late_lse - lse)[:, np.newaxis] * late + xp.exp(cross_lse - lse)[:, np.newaxis] * cross
        return xp.concatenate([early, late]), xp.concatenate([early_lse, lse])

    def full(self, Q: Any, K: Any, V: Any) -> tuple[Any, Any]:
        xp, M = self.xp, len(K)
        if max(self.block_size, self.samples) >= M:
            return _weigh(xp, Q @ K.T, V)
        blocks = -(-M // self.block_size)
        q_order, k_order = self._order(Q), self._order(K)
        q_edges, k_edges = even_edges(len(Q), blocks), even_edges(M, blocks)
        # positions in the order of the keys, so that those of a block are a range
        sampled = np.sort(self.rng.choice(M, self.samples, replace=False))
        sampled_keys = k_order[xp.asarray(sampled)]
        out, lse = xp.empty((len(Q), V.shape[1]), dtype=Q.dtype), xp.empty(len(Q), dtype=Q.dtype)
        for c in range(blocks):
            first, stop = k_edges[c], k_edges[c + 1]
            rows, own = q_order[q_edges[c] : q_edges[c + 1]], k_order[first:stop]
            others = sampled_keys[xp.asarray((sampled < first) | (sampled >= stop))]
            keys = xp.concatenate([own, others])
            scores = Q[rows] @ K[keys].T
            scores[:, len(own) :] += Q.dtype.type(np.log(M / self.samples))
            out[rows], lse[rows] = _weigh(xp, scores, V[keys])
        return out, lse

    def _order(self, x: Any) -> Any:
        bits = self.xp.asarray(1 << np.arange(BITS), dtype=np.uint16)
        words = ((x @ self.planes > 0) * bits).sum(axis=1, dtype=np.uint16)
        return self.xp.argsort(gray_rank(words), kind="stable")


def _weigh(xp: Any, scores: Any, V: Any) -> tuple[Any, Any]:
    """Return ``softmax(scores) V`` and the log-sum-exp of the scores."""
    row_max = scores.max(axis=1, keepdims=True)
    weights = xp.exp(scores - row_max)
    row_sum = weights.sum(axis=1, keepdims=True)
    return weights @ V / row_sum, (xp.log(row_sum) + row_max)[:, 0]
