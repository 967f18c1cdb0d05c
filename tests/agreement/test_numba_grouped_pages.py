"""Do pages of Numba device arrays keep what `GroupedKeys` keeps? On a GPU or in Numba's simulator.

And are they read right? Not checked here: speed.
"""

from __future__ import annotations

import io
from functools import partial
from typing import Any

import numpy as np
import pytest
from kit.backends import to_kind
from kit.compare import assert_same_bits, to_host
from kit.device import poisoned_like, write_late
from kit.grouped_pages import (
    assert_call_agrees_with_what_is_kept,
    assert_pages_keep_the_bits_of_grouped_keys,
    draw,
    in_grouped_pages,
)

from distrattn_np import GroupedPages, distr_attention, group_pages

pytest.importorskip("numba")

# as of kit.grouped_pages.draw
CASES: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
    (((2, 1), 1, 16, 6, 2, 5, "float32", "bhnd", [37, 33, 34], 2), {"causal": True}),
    (((2, 2), 3, 16, 7, 3, 4, "float16", "bnhd", [20, 16, 0], 0), {"window": (18, 1), "softcap": 5.0}),
    (((2, 1), 2, 16, 5, 4, 3, "float64", "bhnd", [48, 17], 1), {"causal": "top-left"}),
]
LONG: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
    (((8, 2), 1, 64, 128, 64, 128, "float16", "bhnd", [700, 129, 65, 200], 1), {"causal": True}),
    (((4, 2), 20, 256, 64, 32, 64, "float32", "bnhd", [600, 16, 0], 0), {"window": (100, 3)}),
    (((2, 2), 9, 16, 40, 8, 24, "float64", "bhnd", [40, 17], 1), {}),
]


@pytest.mark.parametrize("case", [case for case, _ in CASES], ids=str)
def test_pages_keep_the_bits_of_grouped_keys(case: tuple[Any, ...]) -> None:
    assert_pages_keep_the_bits_of_grouped_keys(case, "numba")


@pytest.mark.parametrize(("case", "options"), CASES, ids=str)
def test_call_agrees_with_what_is_kept(case: tuple[Any, ...], options: dict[str, Any]) -> None:
    assert_call_agrees_with_what_is_kept(case, options, "numba")


@pytest.mark.gpu
@pytest.mark.parametrize(("case", "options"), LONG, ids=str)
def test_long_sequences(case: tuple[Any, ...], options: dict[str, Any]) -> None:
    assert_pages_keep_the_bits_of_grouped_keys(case, "numba")
    assert_call_agrees_with_what_is_kept(case, options, "numba")


def test_where_pages_lie_and_how_keys_came_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    q, sequences = draw(CASES[0][0], "numba")
    rng = np.random.default_rng(11)
    monkeypatch.setattr("distrattn_np.backends.numba_grouped_keys.WORKSPACE_BYTES", 1)  # pages one after another
    other = in_grouped_pages(
        *(sequences.k, sequences.v, sequences.known, rng), kind="numba", pieces=9, **sequences.options
    )
    assert (other.page_table[:, 0] != sequences.page_table[:, 0]).any()
    results = []
    for one in (sequences, other):
        arrays, tables = one.given(q, "numba")
        results.append(distr_attention(*arrays, **tables, causal=True, return_lse=True))
    for one, same in zip(*results, strict=True):
        assert_same_bits(to_host(one), to_host(same))


def saved(keys: GroupedPages) -> io.BytesIO:
    file = io.BytesIO()
    keys.save(file)
    file.seek(0)
    return file


def assert_same_pages(one: GroupedPages, other: GroupedPages) -> None:
    """Assert it by what a file holds."""
    with np.load(saved(one)) as found, np.load(saved(other)) as wanted:
        assert set(found) == set(wanted)
        for name in wanted:
            assert_same_bits(found[name], wanted[name], context=name)


@pytest.mark.parametrize("case", [case for case, _ in CASES], ids=str)
def test_files_go_to_either_kind(case: tuple[Any, ...]) -> None:
    q, sequences = draw(case, "numba")
    loaded = GroupedPages.load(saved(sequences.keys), kind="numba")
    assert (loaded.kind, loaded.shape, loaded.dtype) == ("numba", sequences.keys.shape, sequences.keys.dtype)
    assert loaded.nbytes == sequences.keys.nbytes
    for keys in (loaded, GroupedPages.load(saved(loaded))):
        assert_same_pages(keys, sequences.keys)
    arrays, tables = sequences.given(q, "numba", case[7])
    expected = distr_attention(*arrays, **tables)
    assert_same_bits(to_host(distr_attention(arrays[0], loaded, arrays[2], **tables)), to_host(expected))
    # goes on where the file ends
    b = int(np.argmax(sequences.lengths % case[2]))
    heads_first = np.ones((1, case[0][1], 1, case[3]), case[6])
    new = partial(to_kind, heads_first.swapaxes(1, 2).copy() if case[7] == "bnhd" else heads_first, "numba")
    for keys in (loaded, sequences.keys):
        keys.append(new(), sequences.page_table[b : b + 1], sequences.lengths[b : b + 1])
    assert_same_pages(loaded, sequences.keys)


@pytest.mark.gpu
def test_work_goes_to_the_stream_that_is_named() -> None:
    """What comes is written there late; elsewhere poison would be read."""
    import cupy
    from numba import cuda

    rng = np.random.default_rng(3)
    known, k, q, v = (
        rng.standard_normal(shape).astype(np.float16)
        for shape in ((1, 4, 40, 64), (2, 2, 100, 64), (2, 4, 3, 64), (8, 2, 32, 64))
    )
    table, lengths = rng.permutation(8).astype(np.int32).reshape(2, 4), np.array([100, 100], np.int32)
    made: dict[str, Any] = {"pages": 8, "tails": 2, "block_size": 32, "rank": 16}
    keys = group_pages(to_kind(k[:1], "numba"), to_kind(known, "numba"), **made)
    for rows, before in ((k[:, :, :50], 0), (k[:, :, 50:], 50)):
        keys.append(to_kind(rows, "numba"), table, np.full_like(lengths, before))
    tables = {"page_table": to_kind(table, "numba"), "seqlens_k": to_kind(lengths, "numba")}
    expected = distr_attention(to_kind(q, "numba"), keys, to_kind(v, "numba"), **tables)

    good = [cupy.asarray(x) for x in (known, k[:, :, :50], k[:, :, 50:], q, v)]
    late = [poisoned_like(x) for x in good]
    given = [cuda.as_cuda_array(x) for x in late]
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()
    write_late(stream, late, good)
    other = group_pages(given[1][:1], given[0], **made, stream=stream)
    for rows, before in zip(given[1:3], (0, 50), strict=True):
        other.append(rows, table, np.full_like(lengths, before), stream=stream)
    found = distr_attention(given[3], other, given[4], **tables, stream=stream)
    stream.synchronize()
    assert_same_pages(other, keys)
    assert_same_bits(to_host(found), to_host(expected))
