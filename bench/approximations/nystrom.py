"""Nystromformer (Xiong et al., arXiv 2102.03902): softmax attention through a few landmarks."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np

from .common import array_module, even_edges, for_query_heads, softmax


def nystrom_attention(q: Any, k: Any, v: Any, *, causal: bool = False, landmarks: int = 64, iterations: int = 6) -> Any:
    """Attention ``softmax(Q K~^T) softmax(Q~ K~^T)^+ softmax(Q~ K^T) V``.

    Q~ and K~ are the means of ``landmarks`` runs of neighbouring rows, the rows themselves where there are fewer. The
    pseudo-inverse of A = softmax(Q~ K~^T) is iterated:

        Z <- Z (13 I - A Z (15 I - A Z (7 I - A Z))) / 4,    Z_0 = A^T / (|A|_1 |A|_inf)

    Left out: the convolution over V that the paper adds as a skip connection, which is trained. Exact where every row
    is a landmark and the iteration has converged. There is no causal form: a landmark mixes rows of a whole run, and
    softmax over landmarks cannot tell the visible rows from the others.
    """
    if causal:
        raise NotImplementedError("nystrom: has no causal form")
    xp = array_module(q)
    k, v = for_query_heads(k, q.shape[1]), for_query_heads(v, q.shape[1])
    q = q * q.dtype.type(q.shape[3] ** -0.5)
    q_means, k_means = (_segment_means(xp, x, min(landmarks, q.shape[2], k.shape[2])) for x in (q, k))
    inverse = _pseudo_inverse(xp, softmax(xp, q_means @ k_means.swapaxes(2, 3)), iterations)
    of_landmarks = softmax(xp, q_means @ k.swapaxes(2, 3)) @ v
    return softmax(xp, q @ k_means.swapaxes(2, 3)) @ (inverse @ of_landmarks)


def nystrom_flop(
    N: int, M: int, D: int, E: int, *, causal: bool = False, landmarks: int = 64, iterations: int = 6
) -> int:
    """Return the FLOP of a head."""
    if causal:
        raise NotImplementedError("nystrom: has no causal form")
    m = min(landmarks, N, M)
    products = N * m * D + m * m * D + m * M * D + m * M * E + m * m * E + N * m * E
    return 2 * products + iterations * 4 * 2 * m**3 + (N + M) * D


def _segment_means(xp: Any, x: Any, segments: int) -> Any:
    """Return the means (B, H, segments, D) of runs of rows, as equal in length as can be."""
    edges = even_edges(x.shape[2], segments)
    return xp.stack([x[:, :, a:b].mean(axis=2) for a, b in pairwise(edges)], axis=2)


def _pseudo_inverse(xp: Any, A: Any, iterations: int) -> Any:
    identity = xp.eye(A.shape[-1], dtype=A.dtype)
    columns, rows = (xp.abs(A).sum(axis=axis).max(axis=-1)[..., np.newaxis, np.newaxis] for axis in (-2, -1))
    Z = A.swapaxes(2, 3) / (columns * rows)
    for _ in range(iterations):
        AZ = A @ Z
        Z = Z @ (13 * identity - AZ @ (15 * identity - AZ @ (7 * identity - AZ))) / 4
    return Z
