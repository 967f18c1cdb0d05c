"""Hydra attention (Bolya et al., arXiv 2209.07484): linear attention with as many heads as channels."""

from __future__ import annotations

from typing import Any

from .common import array_module, for_query_heads


def hydra_attention(q: Any, k: Any, v: Any, *, causal: bool = False) -> Any:
    """Attention ``phi(Q) * sum_m(phi(K)_m * V_m)``, channel by channel, ``phi(x) = x / |x|``.

    Each channel is a head of its own, so the model's heads are joined: x is a token's whole row over all heads. Left
    out: replacing the last layers only, and the training that the paper does with it in place. Equal, by construction,
    to linear attention with this kernel and heads of one channel; it does not estimate softmax, and its rows are sums
    over the keys, not means. Causal, which the paper does not treat, is a running sum. Widths D and E must be equal.
    """
    xp = array_module(q)
    k, v = for_query_heads(k, q.shape[1]), for_query_heads(v, q.shape[1])
    products = _unit_tokens(xp, k) * v
    summed = products.cumsum(axis=2) if causal else products.sum(axis=2, keepdims=True)
    return _unit_tokens(xp, q) * summed


def hydra_flop(N: int, M: int, D: int, E: int, *, causal: bool = False) -> int:  # noqa: ARG001
    """Return the FLOP of a head."""
    return 3 * (N + M) * D + 2 * M * E + N * E


def _unit_tokens(xp: Any, x: Any) -> Any:
    """Return x (B, H, rows, D) with every token's row over all heads of length one."""
    length = xp.sqrt((x * x).sum(axis=(1, 3), keepdims=True))
    return x / xp.where(length == 0, 1, length).astype(x.dtype)
