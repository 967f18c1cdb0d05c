"""Do pages of grouped keys on a GPU keep what `GroupedKeys` keeps, and are they read right? With CuPy."""

from __future__ import annotations

import io
from functools import partial
from typing import Any

import numpy as np
import pytest
from kit.backends import to_kind
from kit.compare import assert_same_bits
from kit.device import Allocations, Captured, assert_stays_in_workspace, poisoned_like
from kit.grouped_pages import (
    assert_call_agrees_with_what_is_kept,
    assert_pages_keep_the_bits_of_grouped_keys,
    draw,
    in_grouped_pages,
)

from distrattn_np import GroupedPages, distr_attention, workspace_size

pytestmark = pytest.mark.gpu

# as of kit.grouped_pages.draw
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


@pytest.mark.parametrize("case", CASES, ids=str)
def test_pages_keep_the_bits_of_grouped_keys(case: tuple[Any, ...]) -> None:
    assert_pages_keep_the_bits_of_grouped_keys(case, "cupy")


@pytest.mark.parametrize(
    ("case", "options"),
    [*((case, {"causal": causal}) for case in CASES for causal in (False, True, "top-left")), *REBUILT],
    ids=str,
)
def test_call_agrees_with_what_is_kept(case: tuple[Any, ...], options: dict[str, Any]) -> None:
    assert_call_agrees_with_what_is_kept(case, options, "cupy")


def test_full_pages_give_the_bits_of_grouped_keys() -> None:
    """As many keys, which are cut into the same splits; the last page is full and exact."""
    case = ((8, 2), 1, 64, 128, 64, 128, "float16", "bhnd", [2048], 0)
    q, sequences = draw(case, "cupy")
    arrays, tables = sequences.given(q, "cupy")
    tables["page_table"] = to_kind(np.ascontiguousarray(sequences.page_table[:, :-1]), "cupy")
    got = distr_attention(*arrays, **tables, causal=True, return_lse=True)
    plain = [to_kind(q, "cupy"), sequences.one(0, "cupy"), to_kind(sequences.v[0], "cupy")]
    for one, other in zip(got, distr_attention(*plain, causal=True, return_lse=True), strict=True):
        assert_same_bits(one, other)


def test_where_pages_lie_and_how_keys_came_changes_no_bit() -> None:
    case = CASES[0]
    q, sequences = draw(case, "cupy")
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
    q, sequences = draw(case, "cupy")
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
    _, sequences = draw(CASES[3], "cupy")
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

    q, sequences = draw(case, "cupy")
    arrays, tables = sequences.given(q, "cupy", case[7])
    expected, expected_lse = distr_attention(*arrays, **tables, **options, return_lse=True)
    out, lse = poisoned_like(expected), poisoned_like(expected_lse)
    size = workspace_size(*arrays, **tables, **options, out=out, lse=lse)
    call = partial(distr_attention, *arrays, **tables, **options)
    assert_stays_in_workspace(call, out, lse, size, (expected, expected_lse))
