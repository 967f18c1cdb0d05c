"""Laws of grouped keys in pages: each sequence is `GroupedKeys` of its own, wherever its pages lie."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kit.backends import to_kind
from kit.cases import BFLOAT16
from kit.compare import assert_agrees, assert_same_bits, to_host
from kit.grouped_pages import Sequences, in_grouped_pages

from distrattn_np import GroupedPages, distr_attention, group_keys, group_pages
from distrattn_np.arrays import Kind, address

Draw = Any
of_kinds = pytest.mark.parametrize("kind", ["numpy", "numba", pytest.param("cupy", marks=pytest.mark.gpu)])


def draw_sequences(draw: Draw, *, shared: bool = False) -> tuple[np.ndarray, Sequences, str]:
    """Return queries (B, H, N, D), sequences in pages and a layout."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    B, (H, H_kv), N = draw(st.sampled_from([1, 3])), draw(st.sampled_from([(1, 1), (4, 2)])), draw(st.integers(1, 3))
    S, D, layout = (
        draw(st.sampled_from([16, 32])),
        draw(st.sampled_from([8, 33])),
        draw(st.sampled_from(["bhnd", "bnhd"])),
    )
    dtype = np.dtype(draw(st.sampled_from(["float16", "float32", "float64", BFLOAT16])))
    common = draw(st.integers(1, 2)) if shared else 0
    lengths = draw(st.lists(st.integers(common * S + 1 if shared else 0, 100), min_size=B, max_size=B))
    k, v = ([rng.standard_normal((1, H_kv, M, width)).astype(dtype) for M in lengths] for width in (D, 5))
    for x in (*k[1:], *v[1:]):
        first = k[0] if x.shape[3] == D else v[0]
        x[:, :, : common * S] = first[:, :, : common * S]
    known = rng.standard_normal((1, H, 20, D)).astype(dtype) if draw(st.booleans()) else None
    q = rng.standard_normal((B, H, N, D)).astype(dtype)
    options = {"rank": draw(st.integers(1, D - 1)), "block_size": S, "refine": draw(st.integers(0, 1))}
    return q, in_grouped_pages(k, v, known, rng, layout=layout, shared=common, **options), layout


def assert_each_is_a_call_of_its_own(q: np.ndarray, sequences: Sequences, layout: str, **options: Any) -> None:
    arrays, tables = sequences.given(q, layout=layout)
    out, lse = distr_attention(*arrays, **tables, **options, return_lse=True)
    out = out.swapaxes(1, 2) if layout == "bnhd" else out
    for b, v in enumerate(sequences.v):
        one = slice(b, b + 1)
        expected = distr_attention(q[one], sequences.one(b), v, **options, return_lse=True)
        assert_same_bits(np.ascontiguousarray(out[one]), expected[0])
        assert_same_bits(lse[one], expected[1])


@given(data=st.data())
def test_each_sequence_has_keys_of_its_own(data: st.DataObject) -> None:
    """In pieces of any lengths, in pages of any order, with anything in entries that nobody uses."""
    q, sequences, layout = draw_sequences(data.draw)
    options = {
        "causal": data.draw(st.sampled_from([False, True, "top-left"])),
        "window": data.draw(st.sampled_from([None, (30, 3)])),
        "softcap": data.draw(st.sampled_from([0.0, 2.0])),
    }
    assert_each_is_a_call_of_its_own(q, sequences, layout, **options)


@given(data=st.data())
def test_a_common_beginning_is_kept_once(data: st.DataObject) -> None:
    q, sequences, layout = draw_sequences(data.draw, shared=True)
    if len(sequences.k) > 1:
        assert (sequences.page_table[:, 0] == sequences.page_table[0, 0]).all()
    assert_each_is_a_call_of_its_own(q, sequences, layout, causal=True)


@given(data=st.data())
def test_a_file_gives_everything_back(data: st.DataObject) -> None:
    q, sequences, layout = draw_sequences(data.draw)
    file = io.BytesIO()
    sequences.keys.save(file)
    file.seek(0)
    loaded = GroupedPages.load(file)
    for name in ("sampled", "maps", "ranks", "score_errors", "tails", "tail_of", "filled"):
        assert_same_bits(getattr(loaded, name), getattr(sequences.keys, name))
    assert loaded.nbytes == sequences.keys.nbytes
    sequences.keys = loaded
    assert_each_is_a_call_of_its_own(q, sequences, layout)


def small(kind: Kind, tails: int = 2) -> tuple[np.ndarray, np.ndarray, GroupedPages]:
    pytest.importorskip(kind)
    rng = np.random.default_rng(7)
    k, v = rng.standard_normal((1, 2, 48, 6), dtype=np.float32), rng.standard_normal((8, 2, 16, 3), dtype=np.float32)
    return k, v, group_pages(to_kind(k, kind), pages=8, tails=tails, block_size=16, rank=3)


@of_kinds
def test_appending_writes_nothing_to_the_pages_before(kind: Kind) -> None:
    """Growth appends pages and copies none."""
    k, _, keys = small(kind)
    table = np.array([[5, 1, 3]], np.int32)
    keys.append(to_kind(k[:, :, :33], kind), table, np.array([0], np.int32))
    tail_of = to_host(keys.tail_of)
    assert tail_of.tolist() == [-1, -1, -1, tail_of[3], -1, -1, -1, -1]
    pools = [keys.sampled, keys.maps]
    before = [to_host(x)[[5, 1]] for x in pools]
    assert all(x.any() for x in before)
    keys.append(to_kind(k[:, :, 33:], kind), table, np.array([33], np.int32))
    assert address(keys.sampled) == address(pools[0])
    for x, was in zip(pools, before, strict=True):
        assert_same_bits(to_host(x)[[5, 1]], was)


@of_kinds
def test_a_fork_at_the_end_of_a_full_page(kind: Kind) -> None:
    """Two sequences go on from 16 common keys, whichever of them finishes the page; its bits are the same."""
    k, v, keys = small(kind, tails=3)
    one, two = np.array([[0, 1]], np.int32), np.array([[0, 2]], np.int32)
    keys.append(to_kind(k[:, :, :16], kind), one, np.array([0], np.int32))
    assert to_host(keys.tail_of)[0] >= 0
    both = np.concatenate([one, two])
    new = np.concatenate([k[:, :, 16:20], k[:, :, 30:34]])
    keys.append(to_kind(new, kind), both, np.array([16, 16], np.int32))
    assert keys.filled.tolist()[:3] == [16, 4, 4]
    q = np.random.default_rng(8).standard_normal((2, 4, 1, 6), dtype=np.float32)
    q_given, v_given, table, lengths = (to_kind(x, kind) for x in (q, v, both, np.array([20, 20], np.int32)))
    out = to_host(distr_attention(q_given, keys, v_given, page_table=table, seqlens_k=lengths, causal=True))
    for b, rows in enumerate((k[:, :, 16:20], k[:, :, 30:34])):
        plain = group_keys(np.concatenate([k[:, :, :16], rows], axis=2), block_size=16, rank=3)
        values = np.concatenate([v[0], v[1 + b][:, :4]], axis=1)[np.newaxis]
        # the sums of a GPU run in another order
        atol = 0 if kind == "numpy" else 1e-5
        assert_agrees(out[b : b + 1], distr_attention(q[b : b + 1], plain, values, causal=True), rtol=0, atol=atol)


@of_kinds
def test_a_released_page_serves_again(kind: Kind) -> None:
    k, _, keys = small(kind, tails=1)
    begin = np.array([0], np.int32)
    keys.append(to_kind(k[:, :, :3], kind), np.array([[4]], np.int32), begin)
    with pytest.raises(ValueError, match=r"^k: at most 1 pages can be unfinished, as tails says, got one more$"):
        keys.append(to_kind(k[:, :, :3], kind), np.array([[5]], np.int32), begin)
    assert keys.filled.tolist() == [0, 0, 0, 0, 3, 0, 0, 0]
    keys.release([4])
    keys.append(to_kind(k[:, :, :5], kind), np.array([[5]], np.int32), begin)
    assert keys.filled.tolist() == [0, 0, 0, 0, 0, 5, 0, 0]
    keys.append(to_kind(k[:, :, 5:7], kind), np.array([[5]], np.int32), np.array([5], np.int32))
    assert_same_bits(np.ascontiguousarray(to_host(keys.tails)[0, :, :7]), np.ascontiguousarray(k[0, :, :7]))


@of_kinds
def test_no_keys_change_nothing(kind: Kind) -> None:
    k, _, keys = small(kind)
    keys.append(to_kind(k[:, :, :3], kind), np.array([[4]], np.int32), np.array([0], np.int32))
    keys.append(to_kind(k[:, :, :0], kind), np.array([[4]], np.int32), np.array([9], np.int32))
    assert keys.filled.tolist() == [0, 0, 0, 0, 3, 0, 0, 0]
