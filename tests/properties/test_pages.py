"""Laws of keys and values in pages: each sequence is a call of its own, and where its pages lie does not matter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kit.backends import SIMULATED, options_to_kind, to_kind
from kit.compare import assert_same_bits, to_host
from kit.pages import in_pages, unpacked

from distrattn_np import distr_attention, exact_attention
from distrattn_np.arrays import Kind

CAPACITY = 512
"""Keys that the pages of a sequence hold, whatever their size."""
METHODS: list[dict[str, Any]] = [
    {"group_size": 1},
    {"rank": 3, "block_size": 40},
    {"method": "lsh", "group_size": 2, "block_size": 64, "group_by": "keys"},
]
KINDS = ["numpy", "numba", pytest.param("cupy", marks=pytest.mark.gpu)]


def draw_sequences(
    data: st.DataObject, dtype: str, width: int, capacity: int = CAPACITY, rows: tuple[int, ...] = (1, 3, 8)
) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[int]]:
    """Return q (B, H, N, D), rows k and v of which each sequence has some, and how many."""
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    B, (H, H_kv) = data.draw(st.sampled_from([1, 2, 3])), data.draw(st.sampled_from([(1, 1), (4, 2)]))
    N = data.draw(st.sampled_from(rows))
    lengths = data.draw(st.lists(st.integers(0, capacity), min_size=B, max_size=B))
    shapes = ((B, H, N, width), (B, H_kv, capacity, width), (B, H_kv, capacity, 8))
    return *(rng.standard_normal(shape).astype(dtype) for shape in shapes), lengths


def check(examples: Callable[[st.DataObject], None], kind: Kind, most: int) -> None:
    """Run a property; with few examples where they build kernels, or a simulator runs these."""
    examples.__name__ = f"{examples.__name__}_{kind}"
    usual = settings().max_examples
    settings(max_examples=usual if kind == "numpy" else min(usual, most))(given(data=st.data())(examples))()


@given(data=st.data())
def test_each_sequence_is_a_call_of_its_own(data: st.DataObject) -> None:
    q, k, v, lengths = draw_sequences(data, data.draw(st.sampled_from(["float16", "float32", "float64"])), 8)
    layout, size = data.draw(st.sampled_from(["bhnd", "bnhd"])), data.draw(st.sampled_from([16, 32, 64, 128, 256]))
    options = data.draw(st.sampled_from(METHODS)) | {
        "causal": data.draw(st.sampled_from([False, True, "top-left"])),
        "window": data.draw(st.sampled_from([None, (100, 3), (None, 0)])),
        "softcap": data.draw(st.sampled_from([0.0, 2.0])),
        "return_lse": True,
    }
    paged = in_pages(k, v, lengths, size, order=np.random.default_rng(size))
    arrays, tables = paged.given(q, "numpy", layout)
    out, lse = distr_attention(*arrays, **tables, **options)
    for b, length in enumerate(lengths):
        one = slice(b, b + 1)
        rows = (q[one], k[one, :, :length], v[one, :, :length])
        # in the same layout: a matrix product may add up strided rows in another order
        alone = (np.ascontiguousarray(x.swapaxes(1, 2)) if layout == "bnhd" else x for x in rows)
        expected = distr_attention(*alone, **options, layout=layout)
        assert_same_bits(out[one], expected[0])
        assert_same_bits(lse[one], expected[1])


@pytest.mark.parametrize("kind", ["numpy", pytest.param("cupy", marks=pytest.mark.gpu)])
def test_where_pages_lie_changes_no_bit(kind: Kind) -> None:
    """Their order, size and layout, who else has them, and what stands in entries that nobody uses."""

    def where_pages_lie(data: st.DataObject) -> None:
        q, k, v, lengths = draw_sequences(data, "float16", data.draw(st.sampled_from([8, 33])))
        size, layout = data.draw(st.sampled_from([16, 32, 64, 128])), data.draw(st.sampled_from(["bhnd", "bnhd"]))
        shared = data.draw(st.integers(0, min(lengths) // size))
        for x in (k, v):
            x[:, :, : shared * size] = x[:1, :, : shared * size]
        options = {"causal": data.draw(st.sampled_from([False, True, "top-left"])), "return_lse": True}

        def attend(size: int, layout: str, **how: Any) -> list[np.ndarray]:
            arrays, tables = in_pages(k, v, lengths, size, **how).given(q, kind, layout)
            out, lse = (to_host(x) for x in exact_attention(*arrays, **tables, **options))
            return [np.ascontiguousarray(out.swapaxes(1, 2) if layout == "bnhd" else out), lse]

        plain = attend(256, "bhnd")
        elsewhere = attend(size, layout, order=np.random.default_rng(size), shared=shared)
        for one, other in zip(elsewhere, plain, strict=True):
            assert_same_bits(one, other)

    check(where_pages_lie, kind, 12)


@pytest.mark.parametrize("kind", KINDS)
def test_pages_are_packed_sequences(kind: Kind) -> None:
    """Bit for bit, with NaN in all rows and numbers of no page in all entries that are not used."""
    pytest.importorskip("numba" if kind == "numba" else "numpy")
    capacity, width, rows = (64, 4, (1, 3)) if kind == "numba" and SIMULATED else (CAPACITY, 8, (1, 9, 20))

    def packed_sequences(data: st.DataObject) -> None:
        # decode.cu reads few 16-bit queries' pages where they lie
        dtype, rows_of_dtype = data.draw(st.sampled_from([("float32", rows), ("float16", rows[1:])]))
        q, k, v, lengths = draw_sequences(data, dtype, width, capacity, rows_of_dtype)
        layout, size = data.draw(st.sampled_from(["bhnd", "bnhd"])), data.draw(st.sampled_from([16, 32, 64]))
        options = data.draw(st.sampled_from([*METHODS, {"group_size": 1, "window": (30, 1), "softcap": 2.0}]))
        options = options | {"causal": data.draw(st.sampled_from([True, "top-left"])), "return_lse": True}
        pages = in_pages(k, v, lengths, size, order=np.random.default_rng(size))
        arrays, tables = pages.given(q, kind, layout)
        out, lse = (to_host(x) for x in distr_attention(*arrays, **tables, **options))
        arrays, edges = pages.packed(q)
        given = [to_kind(x, kind) for x in arrays]
        packed = distr_attention(*given, **options_to_kind(edges, kind), **options)
        results = [np.ascontiguousarray(out.swapaxes(1, 2) if layout == "bnhd" else out), lse]
        for one, other in zip(results, unpacked(*map(to_host, packed), len(q)), strict=True):
            assert_same_bits(one, other)

    check(packed_sequences, kind, 6)


@pytest.mark.parametrize("layout", ["bhnd", "bnhd"])
@pytest.mark.parametrize("kind", KINDS)
def test_results_go_where_the_caller_wants_them(kind: Kind, layout: str) -> None:
    pytest.importorskip("numba" if kind == "numba" else "numpy")
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal(shape, dtype=np.float32) for shape in ((2, 4, 3, 8), (2, 2, 64, 8), (2, 2, 64, 5)))
    arrays, tables = in_pages(k, v, [50, 9], 16).given(q, kind, layout)
    expected = [to_host(x) for x in exact_attention(*arrays, **tables, return_lse=True)]
    out, lse = (to_kind(np.full_like(x, np.nan), kind) for x in expected)
    if kind == "numpy":
        out, lse = np.array(out), np.array(lse)
    results = exact_attention(*arrays, **tables, out=out, lse=lse, return_lse=True)
    assert results[0] is out
    assert results[1] is lse
    for written, wanted in zip(results, expected, strict=True):
        assert_same_bits(to_host(written), wanted)


@pytest.mark.parametrize("backend", ["numba", pytest.param("cupy", marks=pytest.mark.gpu)])
def test_host_arrays_give_the_bits_of_device_arrays(backend: Kind) -> None:
    pytest.importorskip(backend)
    rng = np.random.default_rng(1)
    q, k, v = (rng.standard_normal(shape, dtype=np.float32) for shape in ((2, 4, 3, 8), (2, 2, 64, 8), (2, 2, 64, 5)))
    pages = in_pages(k, v, [50, 9], 16, order=rng)
    results = []
    for kind in ("numpy", backend):
        arrays, tables = pages.given(q, kind, "bnhd")
        results.append(exact_attention(*arrays, **tables, return_lse=True, backend=backend))
    for host, on_device in zip(*results, strict=True):
        assert isinstance(host, np.ndarray)
        assert_same_bits(np.ascontiguousarray(host), np.ascontiguousarray(to_host(on_device)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("batch", "heads", "rows"), [(0, 2, 3), (2, 0, 3), (2, 2, 0)])
def test_empty_axes(batch: int, heads: int, rows: int, kind: Kind) -> None:
    pytest.importorskip("numba" if kind == "numba" else "numpy")
    q, k, v = (np.ones(shape, np.float32) for shape in ((batch, heads, rows, 4), (3, heads, 16, 4), (3, heads, 16, 5)))
    tables = {"page_table": np.zeros((batch, 2), np.int32), "seqlens_k": np.full(batch, 20, np.int32)}
    given = [to_kind(x, kind) for x in (q, k, v)]
    out, lse = exact_attention(*given, **options_to_kind(tables, kind), return_lse=True)
    assert out.shape == (batch, heads, rows, 5)
    assert lse.shape == (batch, heads, rows)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", METHODS, ids=str)
def test_no_pages_at_all(options: dict[str, Any], kind: Kind) -> None:
    pytest.importorskip("numba" if kind == "numba" else "numpy")
    q, k, v = np.ones((2, 1, 3, 4), np.float32), np.ones((0, 1, 16, 4), np.float32), np.ones((0, 1, 16, 5), np.float32)
    tables = {"page_table": np.zeros((2, 0), np.int32), "seqlens_k": np.zeros(2, np.int32)}
    given = [to_kind(x, kind) for x in (q, k, v)]
    out, lse = (
        to_host(x) for x in distr_attention(*given, **options_to_kind(tables, kind), **options, return_lse=True)
    )
    assert not out.any()
    assert np.isneginf(lse).all()
