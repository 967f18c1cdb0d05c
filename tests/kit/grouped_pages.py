"""Sequences in `GroupedPages`, appended piece by piece as a server does, and the `GroupedKeys` that they must equal."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import numpy as np

from distrattn_np import GroupedKeys, GroupedPages, distr_attention, group_keys, group_pages
from distrattn_np.arrays import Kind

from .backends import to_kind
from .cases import BFLOAT16
from .compare import assert_agrees, assert_same_bits, relative_error, to_host


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


TOLERANCE = {"float16": 2e-3, "bfloat16": 1.6e-2, "float32": 2e-6, "float64": 1e-13}
"""Of the length of a result: weights, results and queries times maps are rounded to the dtype."""


def draw(case: tuple[Any, ...], kind: Kind, seed: int = 0, pieces: int = 2) -> tuple[np.ndarray, Sequences]:
    """Return queries and sequences of sizes (H, H_kv), N, S, D, R, E, dtype, layout, lengths, shared pages."""
    (H, H_kv), N, S, D, R, E, name, layout, lengths, shared = case
    dtype = BFLOAT16 if name == "bfloat16" else np.dtype(name)
    rng = np.random.default_rng([seed, H, S, D])
    weights = rng.standard_normal((D, D)) * 0.95 ** np.arange(D) / np.sqrt(D) * 2
    k = [(rng.standard_normal((1, H_kv, M, D)) @ weights + 0.5).astype(dtype) for M in lengths]
    v = [rng.standard_normal((1, H_kv, M, E)).astype(dtype) for M in lengths]
    for rows in (k, v):
        for x in rows[1:]:
            x[:, :, : shared * S] = rows[0][:, :, : shared * S][:, :, : x.shape[2]]
    known, q = (rng.standard_normal((B, H, rows, D)).astype(dtype) for B, rows in ((1, 40), (len(lengths), N)))
    options = {"rank": R, "block_size": S, "layout": layout, "shared": shared, "pieces": pieces}
    return q, in_grouped_pages(k, v, known, rng, kind=kind, **options)


def _host(array: Any, layout: str) -> np.ndarray:
    found = to_host(array)
    return np.ascontiguousarray(found.swapaxes(1, 2) if layout == "bnhd" else found)


def on_host(keys: GroupedPages, dtype: Any = None) -> GroupedPages:
    """Return the same numbers as NumPy arrays, of another dtype if any."""
    file = io.BytesIO()
    keys.save(file)
    file.seek(0)
    loaded = GroupedPages.load(file)
    if dtype is not None:
        loaded.sampled, loaded.maps, loaded.tails = (
            x.astype(dtype) for x in (loaded.sampled, loaded.maps, loaded.tails)
        )
    return loaded


def assert_pages_keep_the_bits_of_grouped_keys(case: tuple[Any, ...], kind: Kind) -> None:
    """Assert it of finished pages and of tails."""
    _, sequences = draw(case, kind)
    keys, S = on_host(sequences.keys), case[2]
    finished = 0
    for b, k in enumerate(sequences.k):
        one = sequences.one(b, kind)
        for c, block in enumerate(one.blocks):
            page = sequences.page_table[b, c]
            assert keys.tail_of[page] == -1
            assert_same_bits(keys.sampled[page], np.ascontiguousarray(to_host(block.sampled)[0]))
            assert_same_bits(keys.maps[page, :, :-1], np.ascontiguousarray(to_host(block.fusion)[0].swapaxes(1, 2)))
            assert_same_bits(keys.maps[page, :, -1], np.ascontiguousarray(to_host(block.mean)[0]))
            finished += 1
        if k.shape[2]:
            rows = k.shape[2] - len(one.blocks) * S
            place = keys.tail_of[sequences.page_table[b, len(one.blocks)]]
            assert_same_bits(keys.tails[place, :, :rows], np.ascontiguousarray(k[0, :, -rows:]))
    assert finished > 0


def assert_call_agrees_with_what_is_kept(case: tuple[Any, ...], options: dict[str, Any], kind: Kind) -> None:
    """Assert that a call gives what NumPy's does in float64 with the same numbers."""
    q, sequences = draw(case, kind)
    options = options | {"return_lse": True}
    S, layout, shared = case[2], case[7], case[9]
    if shared:  # the last sequence asks before it has a key of its own: its last page is finished
        sequences.k[-1] = sequences.k[-1][:, :, : shared * S - 3]
    arrays, tables = sequences.given(q, kind, layout)
    out, lse = distr_attention(*arrays, **tables, **options)
    wide = on_host(sequences.keys, np.float64)
    swapped = [x.swapaxes(1, 2) if layout == "bnhd" else x for x in (q, np.nan_to_num(sequences.pages_v))]
    wide_q, wide_v = (np.ascontiguousarray(x.astype(np.float64)) for x in swapped)
    named = {"page_table": sequences.page_table, "seqlens_k": sequences.lengths, "layout": layout}
    expected, expected_lse = distr_attention(wide_q, wide, wide_v, **named, **options)
    assert relative_error(_host(out, layout), _host(expected, layout)) <= TOLERANCE[case[6]]
    tolerance = max(10 * TOLERANCE[case[6]], 1e-6)  # of scores with queries times maps in 16 bits; an lse is float32
    assert_agrees(to_host(lse), expected_lse, rtol=tolerance, atol=tolerance, context=str(case))
