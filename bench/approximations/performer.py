"""Performer's FAVOR+ (Choromanski et al., arXiv 2009.14794): softmax attention through positive random features."""

from __future__ import annotations

from typing import Any

import numpy as np

from ...work import visible_pairs
from .common import array_module, for_query_heads

CAUSAL_CHUNK = 128
"""Rows between two updates of the running sums of a causal call; within them pairs are formed one by one."""
EPSILON = 1e-6
"""Added to every feature, so that a row whose features all underflow is a mean and not 0 / 0."""


def performer_attention(q: Any, k: Any, v: Any, *, causal: bool = False, features: int = 256, seed: int = 0) -> Any:
    """Attention ``phi(Q) (phi(K)^T V)`` over ``phi(Q) (phi(K)^T 1)``, whose products estimate exp(q . k / sqrt(D)).

        phi(x)_i = exp(w_i . x - |x|^2 / 2) / sqrt(m),    x = q / D^(1/4) or k / D^(1/4)

    with the m directions w_i orthogonal in groups of D and as long as normal vectors. Causal: running sums over the
    keys. Left out: drawing the w_i anew now and then, which serves training. What is taken off the exponents (the
    maximum of a query, and that of all keys of a head) cancels in the quotient.
    Converges to softmax attention as 1 / sqrt(features), with a constant that grows as exp(|q|^2 + |k|^2).
    """
    xp = array_module(q)
    k, v = for_query_heads(k, q.shape[1]), for_query_heads(v, q.shape[1])
    directions = xp.asarray(orthogonal_features(features, q.shape[3], seed), dtype=q.dtype)
    phi_q, phi_k = _features(xp, q, directions, (3,)), _features(xp, k, directions, (2, 3))
    ones_beside = xp.concatenate([v, xp.ones_like(v[..., :1])], axis=3)
    sums = _causal_sums(xp, phi_q, phi_k, ones_beside) if causal else phi_q @ (phi_k.swapaxes(2, 3) @ ones_beside)
    return sums[..., :-1] / sums[..., -1:]


def performer_flop(
    N: int,
    M: int,
    D: int,
    E: int,
    *,
    causal: bool = False,
    features: int = 256,
    seed: int = 0,  # noqa: ARG001
) -> int:
    """Return the FLOP of a head."""
    flop = 2 * (N + M) * D * features + 2 * (N + M) * features * (E + 1)
    if causal:
        chunks = [min(CAUSAL_CHUNK, N - start) for start in range(0, N, CAUSAL_CHUNK)]
        flop += sum(2 * visible_pairs(rows, rows, 0) * (features + E + 1) for rows in chunks)
    return flop


def orthogonal_features(features: int, width: int, seed: int) -> np.ndarray:
    """Return directions (features, width): orthogonal in groups of ``width``, with the lengths of normal vectors."""
    rng = np.random.default_rng(seed)
    factors = [np.linalg.qr(rng.standard_normal((width, width))) for _ in range(-(-features // width))]
    # QR leaves the signs to the algorithm; with a positive diagonal of R every orthogonal matrix is equally likely
    groups = [Q * np.sign(np.diag(R)) for Q, R in factors]
    lengths = np.linalg.norm(rng.standard_normal((features, width)), axis=1, keepdims=True)
    directions: np.ndarray = np.concatenate(groups)[:features] * lengths
    return directions


def _features(xp: Any, x: Any, directions: Any, largest_over: tuple[int, ...]) -> Any:
    x = x * x.dtype.type(x.shape[3] ** -0.25)
    exponent = x @ directions.T - (x * x).sum(axis=3, keepdims=True) / 2
    return xp.exp(exponent - exponent.max(axis=largest_over, keepdims=True)) + x.dtype.type(EPSILON)


def _causal_sums(xp: Any, phi_q: Any, phi_k: Any, v: Any) -> Any:
    """Return, for every row n, the sum of ``(phi(q_n) . phi(k_m)) v_m`` over m <= n."""
    sums = xp.empty((*phi_q.shape[:3], v.shape[3]), dtype=v.dtype)
    so_far = xp.zeros((*phi_k.shape[:2], phi_k.shape[3], v.shape[3]), dtype=v.dtype)
    for start in range(0, phi_q.shape[2], CAUSAL_CHUNK):
        rows = slice(start, start + CAUSAL_CHUNK)
        pairs = xp.tril(phi_q[:, :, rows] @ phi_k[:, :, rows].swapaxes(2, 3))
        sums[:, :, rows] = phi_q[:, :, rows] @ so_far + pairs @ v[:, :, rows]
        so_far += phi_k[:, :, rows].swapaxes(2, 3) @ v[:, :, rows]
    return sums
