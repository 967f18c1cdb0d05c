"""Rows of sequences laid out in pages, as callers of `page_table` have them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from distrattn_np.reference import rows_of_pages

from distrattn_np.problem import ceil_div

from .backends import to_kind


@dataclass(frozen=True)
class Paged:
    """Keys and values in pages (P, H_kv, S, width), NaN where no sequence has a row, and who has which."""

    k: np.ndarray
    v: np.ndarray
    page_table: np.ndarray
    seqlens_k: np.ndarray

    @property
    def tables(self) -> dict[str, np.ndarray]:
        """Keywords of a call."""
        return {"page_table": self.page_table, "seqlens_k": self.seqlens_k}

    def packed(self, q: np.ndarray) -> tuple[list[np.ndarray], dict[str, np.ndarray]]:
        """Return q, k and v of the same sequences packed one after another, and the keywords of a call."""
        B, H, N, D = q.shape
        lengths = self.seqlens_k.tolist()
        arrays = [np.ascontiguousarray(q.swapaxes(1, 2).reshape(B * N, H, D))]
        for pool in (self.k, self.v):
            rows = (rows_of_pages(pool, *one) for one in zip(self.page_table, lengths, strict=True))
            arrays.append(np.concatenate([x.swapaxes(0, 1) for x in rows]))
        edges = (np.cumsum([0, *each], dtype=np.int32) for each in ([N] * B, lengths))
        return arrays, dict(zip(("cu_seqlens_q", "cu_seqlens_k"), edges, strict=True))

    def given(self, q: np.ndarray, kind: Any, layout: str = "bhnd") -> tuple[list[Any], dict[str, Any]]:
        """Return q, k and v and the keywords of a call in a kind of arrays and a layout."""
        arrays = [np.ascontiguousarray(x.swapaxes(1, 2)) if layout == "bnhd" else x for x in (q, self.k, self.v)]
        named = {name: to_kind(x, kind) for name, x in self.tables.items()}
        return [to_kind(x, kind) for x in arrays], named | {"layout": layout}


def unpacked(out: np.ndarray, lse: np.ndarray, batch: int) -> list[np.ndarray]:
    """Return results (rows, H, E) and (H, rows) of as many queries each as (B, H, N, E) and (B, H, N)."""
    rows, heads, width = out.shape
    out, lse = out.reshape(batch, rows // batch, heads, width), lse.reshape(heads, batch, rows // batch)
    return [np.ascontiguousarray(x) for x in (out.swapaxes(1, 2), lse.swapaxes(0, 1))]


def in_pages(
    k: np.ndarray,
    v: np.ndarray,
    lengths: list[int],
    page_size: int,
    *,
    order: np.random.Generator | None = None,
    shared: int = 0,
) -> Paged:
    """Return rows (B, H_kv, M, width), M whole pages, of which each sequence has so many, in pages.

    ``order`` puts them anywhere in a larger pool and anything at all into entries that nobody uses; without it they
    follow one another. The first ``shared`` pages, which must be equal, are kept once for all sequences.
    """
    B, H_kv, M, _ = k.shape
    each = M // page_size
    pages = B * each + (5 if order is not None else 0)
    numbers = np.arange(pages) if order is None else order.permutation(pages)
    table = numbers[: B * each].reshape(B, each).astype(np.int32)
    table[:, :shared] = table[:1, :shared]
    pools = [np.full((pages, H_kv, page_size, x.shape[3]), np.nan, x.dtype) for x in (k, v)]
    for b, length in enumerate(lengths):
        for c in range(ceil_div(length, page_size)):
            rows = slice(c * page_size, min((c + 1) * page_size, length))
            for pool, x in zip(pools, (k, v), strict=True):
                pool[table[b, c], :, : rows.stop - rows.start] = x[b, :, rows]
        if order is not None:
            unused = table[b, ceil_div(length, page_size) :]
            unused[...] = order.choice([-1, pages, 2**31 - 1, -(2**31)], len(unused))
    return Paged(*pools, table, np.array(lengths, np.int32))
