"""Sequences in `GroupedPages`, appended piece by piece as a server does, and the `GroupedKeys` that they must equal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from distrattn_np import GroupedKeys, GroupedPages, group_keys, group_pages

from .backends import to_kind


@dataclass
class Sequences:
    """Keys and values (1, H_kv, M, width) of each, in pages of both."""

    keys: GroupedPages
    k: list[np.ndarray]
    v: list[np.ndarray]
    page_table: np.ndarray
    pages_v: np.ndarray
    known: np.ndarray | None
    options: dict[str, Any]

    @property
    def lengths(self) -> np.ndarray:
        """How many keys each sequence has."""
        return np.array([k.shape[2] for k in self.k], np.int32)

    def one(self, b: int, kind: Any = "numpy") -> GroupedKeys:
        """Return the keys of one sequence as `GroupedKeys`."""
        arrays = [None if x is None else to_kind(x, kind) for x in (self.k[b], self.known)]
        return group_keys(*arrays, **self.options)

    def given(self, q: np.ndarray, kind: Any = "numpy", layout: str = "bhnd") -> tuple[list[Any], dict[str, Any]]:
        """Return q, keys and values and the keywords of a call."""
        q, v = (np.ascontiguousarray(x.swapaxes(1, 2)) if layout == "bnhd" else x for x in (q, self.pages_v))
        named = {"page_table": to_kind(self.page_table, kind), "seqlens_k": to_kind(self.lengths, kind)}
        return [to_kind(q, kind), self.keys, to_kind(v, kind)], named | {"layout": layout}


def in_grouped_pages(
    k: list[np.ndarray],
    v: list[np.ndarray],
    known: np.ndarray | None,
    rng: np.random.Generator,
    *,
    kind: Any = "numpy",
    layout: str = "bhnd",
    shared: int = 0,
    pieces: int = 3,
    **options: Any,
) -> Sequences:
    """Append sequences, in pieces of any lengths and in turn, to pages in any order; the first ``shared`` are common.

    What no sequence has is NaN among the values, and anything in the table.
    """
    S = options["block_size"]
    used = [-(-x.shape[2] // S) for x in k]
    width = max(*used, 1) + 1
    numbers = rng.permutation(sum(used) + 3)
    table = rng.choice([-1, 10**6, -(2**31)], (len(k), width)).astype(np.int32)
    pages_v = np.full((len(numbers), v[0].shape[1], S, v[0].shape[3]), np.nan, v[0].dtype)
    free = iter(numbers.tolist())
    for b, count in enumerate(used):
        table[b, :count] = [int(table[0, c]) if b and c < shared else next(free) for c in range(count)]
        for c in range(count):
            rows = v[b][0, :, c * S : (c + 1) * S]
            pages_v[table[b, c], :, : rows.shape[1]] = rows

    def give(array: np.ndarray) -> Any:
        return to_kind(np.ascontiguousarray(array.swapaxes(1, 2)) if layout == "bnhd" else array, kind)

    queries = None if known is None else give(known)
    keys = group_pages(give(k[0][:, :, :0]), queries, pages=len(numbers), tails=len(k) + 1, layout=layout, **options)
    done = [0] * len(k)
    for b, x in enumerate(k):
        done[b] = shared * S if b else 0
        cuts = sorted(rng.integers(done[b], x.shape[2] + 1, pieces).tolist())
        for stop in (*cuts, x.shape[2]):
            keys.append(give(x[:, :, done[b] : stop]), table[b : b + 1], np.array([done[b]], np.int32))
            done[b] = stop
    return Sequences(keys, k, v, table, pages_v, known, options)
