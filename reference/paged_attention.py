"""Keys and values of sequences that lie in pages (docs/caches.md)."""

from __future__ import annotations

import numpy as np

from .ragged_attention import Attend


def rows_of_pages(pages: np.ndarray, page_table: np.ndarray, length: int) -> np.ndarray:
    """Return the rows (H, length, D) of a sequence: m is row ``m % S`` of page ``page_table[m // S]`` (P, H, S, D)."""
    H, S, D = pages.shape[1:]
    used = pages[page_table[: -(-length // S)]]
    rows: np.ndarray = used.swapaxes(0, 1).reshape(H, len(used) * S, D)
    return rows[:, :length]


def paged_attention(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, page_table: np.ndarray, seqlens_k: np.ndarray, attend: Attend
) -> tuple[np.ndarray, np.ndarray]:
    """Return attention (B, H, N, E) of q (B, H, N, D) to pages k (P, H_kv, S, D) and v (P, H_kv, S, E), and its lse.

    ``attend`` is attention of one sequence, as in `ragged_attention`. Both results are float64.
    """
    B, H, N, _ = q.shape
    out, lse = np.zeros((B, H, N, v.shape[3])), np.zeros((B, H, N))
    for b in range(B):
        K, V = (rows_of_pages(x, page_table[b], seqlens_k[b])[np.newaxis] for x in (k, v))
        out[b : b + 1], lse[b : b + 1] = attend(q[b : b + 1], K, V)
    return out, lse
