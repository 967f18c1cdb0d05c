"""Rows of sequences laid out in pages, as callers of `page_table` have them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

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

    def given(self, q: np.ndarray, kind: Any, layout: str = "bhnd") -> tuple[list[Any], dict[str, Any]]:
        """Return q, k and v and the keywords of a call in a kind of arrays and a layout."""
        arrays = [np.ascontiguousarray(x.swapaxes(1, 2)) if layout == "bnhd" else x for x in (q, self.k, self.v)]
        named = {name: to_kind(x, kind) for name, x in self.tables.items()}
        return [to_kind(x, kind) for x in arrays], named | {"layout": layout}


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
