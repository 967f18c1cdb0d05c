"""Do pages of grouped keys on a GPU keep what `GroupedKeys` keeps, and are they read right? With CuPy."""

from __future__ import annotations

import io
from functools import partial
from typing import Any

import numpy as np
import pytest
from kit.backends import to_kind
from kit.cases import BFLOAT16
from kit.compare import assert_agrees, assert_same_bits, relative_error, to_host
from kit.device import Allocations, Captured, poisoned_like
from kit.grouped_pages import Sequences, in_grouped_pages

from distrattn_np import GroupedPages, distr_attention, workspace_size

pytestmark = pytest.mark.gpu

# (H, H_kv), N, S, D, R, E, dtype, layout, lengths, shared pages
CASES = [
    ((8, 2), 1, 64, 128, 64, 128, "float16", "bhnd", [700, 129, 65, 200], 1),
    ((4, 4), 8, 16, 64, 32, 64, "bfloat16", "bnhd", [300, 16, 0], 0),
    ((6, 1), 3, 256, 128, 64, 128, "float16", "bhnd", [1025, 520], 2),
    ((4, 2), 2, 32, 33, 9, 7, "float16", "bnhd", [100, 65, 96], 2),
]
REBUILT: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
    (((8, 2), 20, 64, 128, 64, 128, "float16", "bhnd", [700, 129, 65, 200], 1), {"causal": True}),
    (((4, 2), 3, 256, 64, 32, 64, "bfloat16", "bnhd", [300, 16, 0], 0), {"window": (100, 3), "softcap": 5.0}),
    (((4, 2), 2, 32, 33, 9, 7, "float32", "bhnd", [100, 65, 96], 2), {"causal": True}),
    (((2, 2), 9, 16, 40, 8, 24, "float64", "bhnd", [40, 17], 1), {}),
]
"""What decode.cu does not take, with options."""
TOLERANCE = {"float16": 2e-3, "bfloat16": 1.6e-2, "float32": 2e-6, "float64": 1e-13}
"""Of the length of a result: weights, results and queries times maps are rounded to the dtype."""


def draw(case: tuple[Any, ...], kind: str = "cupy", seed: int = 0, pieces: int = 2) -> tuple[np.ndarray, Sequences]:
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


def host(array: Any, layout: str) -> np.ndarray:
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


@pytest.mark.parametrize("case", CASES, ids=str)
def test_pages_keep_the_bits_of_grouped_keys(case: tuple[Any, ...]) -> None:
    _, sequences = draw(case)
    keys, S = on_host(sequences.keys), case[2]
    finished = 0
    for b, k in enumerate(sequences.k):
        one = sequences.one(b, "cupy")
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


@pytest.mark.parametrize(
    ("case", "options"),
    [*((case, {"causal": causal}) for case in CASES for causal in (False, True, "top-left")), *REBUILT],
    ids=str,
)
def test_call_agrees_with_what_is_kept(case: tuple[Any, ...], options: dict[str, Any]) -> None:
    q, sequences = draw(case)
    options = options | {"return_lse": True}
    S, layout, shared = case[2], case[7], case[9]
    if shared:  # the last sequence asks before it has a key of its own: its last page is finished
        sequences.k[-1] = sequences.k[-1][:, :, : shared * S - 3]
    arrays, tables = sequences.given(q, "cupy", layout)
    out, lse = distr_attention(*arrays, **tables, **options)
    wide = on_host(sequences.keys, np.float64)
    swapped = [x.swapaxes(1, 2) if layout == "bnhd" else x for x in (q, np.nan_to_num(sequences.pages_v))]
    wide_q, wide_v = (np.ascontiguousarray(x.astype(np.float64)) for x in swapped)
    named = {"page_table": sequences.page_table, "seqlens_k": sequences.lengths, "layout": layout}
    expected, expected_lse = distr_attention(wide_q, wide, wide_v, **named, **options)
    assert relative_error(host(out, layout), host(expected, layout)) <= TOLERANCE[case[6]]
    tolerance = max(10 * TOLERANCE[case[6]], 1e-6)  # of scores with queries times maps in 16 bits; an lse is float32
    assert_agrees(to_host(lse), expected_lse, rtol=tolerance, atol=tolerance, context=str(case))


def test_full_pages_give_the_bits_of_grouped_keys() -> None:
    """As many keys, which are cut into the same splits; the last page is full and exact."""
    case = ((8, 2), 1, 64, 128, 64, 128, "float16", "bhnd", [2048], 0)
    q, sequences = draw(case)
    arrays, tables = sequences.given(q, "cupy")
    tables["page_table"] = to_kind(np.ascontiguousarray(sequences.page_table[:, :-1]), "cupy")
    got = distr_attention(*arrays, **tables, causal=True, return_lse=True)
    plain = [to_kind(q, "cupy"), sequences.one(0, "cupy"), to_kind(sequences.v[0], "cupy")]
    for one, other in zip(got, distr_attention(*plain, causal=True, return_lse=True), strict=True):
        assert_same_bits(one, other)


def test_where_pages_lie_and_how_keys_came_changes_no_bit() -> None:
    case = CASES[0]
    q, sequences = draw(case)
    arrays, tables = sequences.given(q, "cupy")
    expected = distr_attention(*arrays, **tables, causal=True, return_lse=True)
    rng = np.random.default_rng(11)
    other = in_grouped_pages(
        *(sequences.k, sequences.v, sequences.known, rng), kind="cupy", pieces=9, **sequences.options
    )
    other.page_table = np.ascontiguousarray(other.page_table)
    assert (other.page_table[:, 0] != sequences.page_table[:, 0]).any()
    arrays, tables = other.given(q, "cupy")
    for one, same in zip(distr_attention(*arrays, **tables, causal=True, return_lse=True), expected, strict=True):
        assert_same_bits(one, same)


def test_one_graph_while_sequences_grow() -> None:
    """A step allocates nothing, and what was captured once reads what is appended after it."""
    import cupy

    case = ((8, 2), 1, 64, 128, 64, 128, "float16", "bhnd", [130, 60], 0)
    q, sequences = draw(case)
    arrays, tables = sequences.given(q, "cupy")
    table, lengths = sequences.page_table.copy(), sequences.lengths
    free = np.setdiff1d(np.arange(len(sequences.keys.filled)), table)
    table[:, -1], table[1, 1] = free[:2], free[2]
    tables["page_table"][...] = to_kind(table, "cupy")
    arrays[2][...] = to_kind(np.nan_to_num(sequences.pages_v), "cupy")
    out, lse = (poisoned_like(x) for x in distr_attention(*arrays, **tables, causal=True, return_lse=True))
    size = workspace_size(*arrays, **tables, causal=True, out=out, lse=lse)
    memory = cupy.empty(size, np.uint8)
    with Allocations() as allocations:
        graph = Captured(partial(distr_attention, *arrays, **tables, causal=True), out, lse, memory)
    assert allocations.sizes == []
    rng = np.random.default_rng(5)
    for rows in (1, 5, 60):
        new = rng.standard_normal((2, 2, rows, 128)).astype(np.float16)
        sequences.keys.append(to_kind(new, "cupy"), table, lengths)
        lengths = lengths + np.int32(rows)
        tables["seqlens_k"][...] = to_kind(lengths, "cupy")
        graph.assert_gives(distr_attention(*arrays, **tables, causal=True, return_lse=True))


def test_files_go_to_either_kind() -> None:
    _, sequences = draw(CASES[3])
    file = io.BytesIO()
    sequences.keys.save(file)
    for kind in ("numpy", "cupy"):
        file.seek(0)
        again = io.BytesIO()
        GroupedPages.load(file, kind=kind).save(again)  # type: ignore[arg-type]
        file.seek(0)
        again.seek(0)
        with np.load(file) as wanted, np.load(again) as got:
            assert set(got) == set(wanted)
            for name in wanted:
                assert_same_bits(got[name], wanted[name])


@pytest.mark.parametrize(("case", "options"), REBUILT[:2], ids=str)
def test_a_call_with_rebuilt_keys_in_a_workspace_allocates_nothing(
    case: tuple[Any, ...], options: dict[str, Any]
) -> None:
    import cupy

    q, sequences = draw(case)
    arrays, tables = sequences.given(q, "cupy", case[7])
    expected, expected_lse = distr_attention(*arrays, **tables, **options, return_lse=True)
    out, lse = poisoned_like(expected), poisoned_like(expected_lse)
    size = workspace_size(*arrays, **tables, **options, out=out, lse=lse)
    memory = cupy.full(size + 4096, 0xFF, np.uint8)
    cupy.cuda.Device().synchronize()
    with Allocations() as allocations:
        distr_attention(*arrays, **tables, **options, out=out, lse=lse, workspace=memory[:size])
    assert allocations.sizes == []
    assert_same_bits(out, expected)
    assert_same_bits(lse, expected_lse)
    assert bool((memory[size:] == 0xFF).all())
