"""Laws of growing caches: how keys came does not matter, what is exact stays exact, and a file gives it all back."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kit.backends import to_kind
from kit.cases import BFLOAT16
from kit.compare import assert_agrees, assert_same_bits, to_host
from kit.strategies import arrays

import distrattn_np
from distrattn_np import GroupedKeys, distr_attention, exact_attention, group_keys, reference
from distrattn_np.arrays import Kind

DTYPES = ["float16", "bfloat16", "float32", "float64"]
Draw = Any


def law_of_kinds(body: Callable[[st.DataObject, Kind], None]) -> Any:
    """Make a test of ``body(data, kind)`` for every kind of arrays that grouped keys are made of."""

    @pytest.mark.parametrize("kind", ["numpy", pytest.param("cupy", marks=pytest.mark.gpu)])
    def test(kind: Kind) -> None:
        def examples(data: st.DataObject) -> None:
            body(data, kind)

        # Hypothesis files failures under this name
        examples.__name__ = f"{body.__name__}_{kind}"
        # each new width on a GPU compiles kernels
        most = settings().max_examples if kind == "numpy" else min(settings().max_examples, 12)
        settings(max_examples=most)(given(data=st.data())(examples))()

    test.__doc__ = body.__doc__
    return test


@st.composite
def calls(draw: Draw) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
    """Draw queries, keys, values and options of `group_keys`, but no rank."""
    H, H_kv = draw(st.sampled_from([(1, 1), (4, 2), (3, 1)]))
    B, N, M = draw(st.sampled_from([1, 2])), draw(st.sampled_from([1, 2, 9])), draw(st.integers(0, 70))
    D, E = draw(st.sampled_from([1, 5, 16, 33])), draw(st.sampled_from([1, 8]))
    name = draw(st.sampled_from(DTYPES))
    dtype = BFLOAT16 if name == "bfloat16" else np.dtype(name)
    q, k, v = (draw(arrays(shape, dtype)) for shape in ((B, H, N, D), (B, H_kv, M, D), (B, H_kv, M, E)))
    for array in (q, k, v):
        array.flags.writeable = False
    return q, k, v, {"block_size": draw(st.sampled_from([1, 3, 16, 64, 10**12])), "refine": draw(st.integers(0, 2))}


@st.composite
def reductions(draw: Draw, width: int, *, with_queries: bool, kind: Kind = "numpy") -> dict[str, Any]:
    """Draw how far a width is reduced; on a GPU each new rank compiles kernels."""
    ranks = {"rank": draw(st.integers(1, width) if kind == "numpy" else st.sampled_from([1, (width + 1) // 2, width]))}
    return draw(st.sampled_from([ranks, {"score_tol": 0.3}])) if with_queries else ranks


def grown(draw: Draw, k: np.ndarray, *known: np.ndarray, kind: Kind = "numpy", **options: Any) -> GroupedKeys:
    """Append keys piece by piece, in either layout, as arrays of a kind."""
    layout = draw(st.sampled_from(["bhnd", "bnhd"]))
    cuts = sorted(draw(st.lists(st.integers(0, k.shape[2]), max_size=4)))
    pieces = np.split(k, cuts, axis=2) if draw(st.booleans()) else [k[:, :, m : m + 1] for m in range(k.shape[2])]
    pieces = [piece.swapaxes(1, 2) if layout == "bnhd" else piece for piece in (pieces or [k])]
    known = tuple(x.swapaxes(1, 2) if layout == "bnhd" else x for x in known)
    keys = group_keys(*(to_kind(x, kind) for x in (pieces[0], *known)), layout=layout, **options)
    for piece in pieces[1:]:
        keys.append(to_kind(piece, kind))
    return keys


def in_layout(keys: GroupedKeys, array: np.ndarray) -> np.ndarray:
    return array.swapaxes(1, 2) if keys.layout == "bnhd" else array


def attend(q: np.ndarray, keys: GroupedKeys, v: np.ndarray, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    given_q, given_v = (to_kind(in_layout(keys, x), keys.kind) for x in (q, v))
    out, lse = distr_attention(given_q, keys, given_v, layout=keys.layout, return_lse=True, **options)
    return np.ascontiguousarray(in_layout(keys, to_host(out))), to_host(lse)


def everything_in(keys: GroupedKeys) -> dict[str, np.ndarray]:
    file = io.BytesIO()
    keys.save(file)
    file.seek(0)
    with np.load(file, allow_pickle=False) as npz:
        return {name: array for name, array in npz.items() if name != "layout"}


def assert_same_keys(a: GroupedKeys, b: GroupedKeys) -> None:
    one, other = everything_in(a), everything_in(b)
    assert one.keys() == other.keys()
    for name in one:
        assert_same_bits(one[name], other[name], context=name)


@law_of_kinds
def test_how_keys_came_changes_no_bit(data: st.DataObject, kind: Kind) -> None:
    q, k, v, options = data.draw(calls())
    known = (q,) if data.draw(st.booleans()) else ()
    options |= data.draw(reductions(k.shape[3], with_queries=bool(known), kind=kind))
    at_once = group_keys(*(to_kind(x, kind) for x in (k, *known)), **options)
    piece_by_piece = grown(data.draw, k, *known, kind=kind, **options)
    assert_same_keys(piece_by_piece, at_once)
    causal = data.draw(st.sampled_from([False, True, "top-left"]))
    for one, other in zip(
        attend(q, piece_by_piece, v, causal=causal), attend(q, at_once, v, causal=causal), strict=True
    ):
        assert_same_bits(one, other)


@law_of_kinds
def test_full_rank_and_a_single_block_are_exact_attention_bit_for_bit(data: st.DataObject, kind: Kind) -> None:
    q, k, v, options = data.draw(calls())
    if data.draw(st.booleans()):
        options["rank"] = k.shape[3]
    else:
        options |= {"rank": data.draw(st.integers(1, k.shape[3])), "block_size": max(k.shape[2], 1)}
    keys = grown(data.draw, k, q, kind=kind, **options)
    given_options = {"causal": data.draw(st.sampled_from([False, True, "top-left"]))}
    if kind == "numpy":
        given_options["window"] = data.draw(st.sampled_from([None, (5, 1)]))
        given_options["softcap"] = data.draw(st.sampled_from([0.0, 2.0]))
    expected = exact_attention(*(to_kind(x, kind) for x in (q, k, v)), return_lse=True, **given_options)
    for one, other in zip(attend(q, keys, v, **given_options), expected, strict=True):
        assert_same_bits(one, np.ascontiguousarray(to_host(other)))


@law_of_kinds
def test_a_file_gives_it_back_bit_for_bit(data: st.DataObject, kind: Kind) -> None:
    q, k, v, options = data.draw(calls())
    known = (q,) if data.draw(st.booleans()) else ()
    options |= data.draw(reductions(k.shape[3], with_queries=bool(known), kind=kind))
    first = data.draw(st.integers(0, k.shape[2]))
    saved = grown(data.draw, k[:, :, :first], *known, kind=kind, **options)
    file = io.BytesIO()
    saved.save(file)
    file.seek(0)
    loaded = GroupedKeys.load(file, kind=kind)
    assert (loaded.shape, loaded.dtype, loaded.layout) == (saved.shape, saved.dtype, saved.layout)
    assert (loaded.grouping, loaded.scale) == (saved.grouping, saved.scale)
    for keys in (saved, loaded):
        keys.append(to_kind(in_layout(keys, k[:, :, first:]), kind))
    assert_same_keys(loaded, saved)
    for one, other in zip(attend(q, loaded, v), attend(q, saved, v), strict=True):
        assert_same_bits(one, other)


@given(st.data())
def test_merging_with_exact_attention_over_the_rest_makes_the_whole(data: st.DataObject) -> None:
    """Against the definition: the keys before a cut through it, those after it as they are."""
    q, k, v, options = data.draw(calls())
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    rank, cut = data.draw(st.integers(1, k.shape[3])), data.draw(st.integers(0, k.shape[2]))
    keys = grown(data.draw, k[:, :, :cut], q, rank=rank, **options)
    rest = exact_attention(q, k[:, :, cut:], v[:, :, cut:], return_lse=True)
    out, lse = distrattn_np.merge(*attend(q, keys, v[:, :, :cut]), *rest)
    # a rank of D is the last block alone
    L = k.shape[2] + 1 if rank == k.shape[3] else options["block_size"]
    scale = 1 / np.sqrt(q.shape[3])
    maps = reference.make_key_maps(
        k[:, :, :cut], q, scale=scale, rank=rank, refine=options["refine"], block_size=min(L, 10**6)
    )
    shared = q.shape[1] // k.shape[1]
    for b, h in np.ndindex(q.shape[:2]):
        g = h // shared
        S = q[b, h] @ k[b, g].T
        S[:, :cut] = reference.grouped_keys_scores(
            q[b, h],
            k[b, g, :cut],
            maps.sampling[b, g],
            maps.fusion[b, g],
            maps.key_mean[b, g],
            block_size=min(L, 10**6),
        )
        expected = reference.softmax_attention(scale * S, v[b, g])
        largest = 1 + np.abs(scale * S).max(initial=0)
        # lse is float32, and so are the weights of the parts
        assert_agrees(out[b, h], expected[0], rtol=0, atol=2e-6 * largest, check_dtype=False, constant_ok=True)
        assert_agrees(lse[b, h], expected[1], rtol=0, atol=1e-6 * largest, check_dtype=False, constant_ok=True)


@law_of_kinds
def test_blocks_within_as_many_dimensions_as_the_rank_are_exact(data: st.DataObject, kind: Kind) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    D, L, rank = 12, 20, data.draw(st.integers(1, 11) if kind == "numpy" else st.sampled_from([1, 6, 11]))
    blocks = [
        rng.standard_normal((1, 2, L, rank)) @ rng.standard_normal((1, 2, rank, D)) + rng.standard_normal(D)
        for _ in range(4)
    ]
    k, q = np.concatenate(blocks, axis=2), rng.standard_normal((1, 4, 3, D))
    v = rng.standard_normal((1, 2, 4 * L, 5))
    refine = data.draw(st.integers(0, 2))
    keys = group_keys(to_kind(k, kind), to_kind(q, kind), rank=rank, block_size=L, refine=refine)
    assert len(keys.blocks) == 3
    assert_agrees(attend(q, keys, v)[0], exact_attention(q, k, v), rtol=0, atol=1e-7)


@law_of_kinds
def test_rows_lie_within_the_values_that_they_see(data: st.DataObject, kind: Kind) -> None:
    q, k, v, options = data.draw(calls())
    options |= data.draw(reductions(k.shape[3], with_queries=False, kind=kind))
    keys = group_keys(to_kind(k, kind), **options)
    out, lse = attend(q, keys, v, causal="top-left")
    shared = q.shape[1] // k.shape[1]
    for n in range(q.shape[2]):
        seen = np.repeat(v[:, :, : n + 1].astype(np.float64), shared, axis=1)
        if k.shape[2] == 0:
            assert not out[:, :, n].any()
            assert np.isneginf(lse[:, :, n]).all()
            continue
        slack = 2e-6 * 8 + float(ml_dtypes.finfo(out.dtype).eps) * 8
        assert (out[:, :, n] >= seen.min(axis=2) - slack).all()
        assert (out[:, :, n] <= seen.max(axis=2) + slack).all()


def test_same_maps_are_the_same_attention_as_over_plain_keys() -> None:
    """Blocks of one set of keys without a mean, met by queries that are those keys doubled: A and B are the same."""
    rng = np.random.default_rng(5)
    half = rng.standard_normal((2, 2, 12, 16)) * 0.8 ** np.arange(16)
    one_block = np.concatenate([half, -half], axis=2)
    k = np.concatenate([one_block[:, :, rng.permutation(24)] for _ in range(5)], axis=2)
    q, v = 2 * one_block, rng.standard_normal((2, 2, 120, 7))
    out, info = distr_attention(q, k, v, causal=True, rank=5, block_size=24, return_info=True)
    keys = group_keys(k, q, rank=5, block_size=24)
    assert_agrees(distr_attention(q, keys, v, causal=True), out, rtol=0, atol=1e-12)
    assert_agrees(keys.score_errors, info.score_errors[:, :, :4], rtol=1e-9, atol=0)
    assert np.abs(out - exact_attention(q, k, v, causal=True)).max() > 1e-3  # maps had a part in it


@pytest.mark.parametrize("keys", [1, 15, 16, 17, 48, 49])
def test_a_decoding_step_keeps_exact_what_its_own_block_holds(keys: int) -> None:
    cache = group_keys(np.ones((1, 1, keys, 4), np.float32), rank=2, block_size=16)
    begin = reference.own_block_begin(np.zeros(1, int), block_size=16, causal_offset=keys - 1)
    assert cache.exact_from == begin[0]


@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_memory_is_that_of_the_rank(dtype: str) -> None:
    B, H_kv, L, D, R, F = 2, 3, 128, 64, 24, 7
    k = np.random.default_rng(0).standard_normal((B, H_kv, F * L + 1, D)).astype(dtype)
    keys = group_keys(k, rank=R, block_size=L)
    numbers = F * (L * R + D * R + D) + L * D  # blocks, and room for the tail
    few = 12 * F  # a rank and a predicted error a block
    assert keys.nbytes <= B * H_kv * (numbers * k.itemsize + few)
    assert keys.nbytes < 0.75 * k.nbytes  # (R + (R + 1) D / L) / D is 0.57, and an eighth is tail


def test_what_becomes_an_array_without_a_copy_is_taken() -> None:
    q, k, v = np.random.default_rng(1).standard_normal((3, 1, 1, 40, 8))
    keys = group_keys(memoryview(k[:, :, :9]), memoryview(q), rank=3, block_size=16)
    keys.append(memoryview(k[:, :, 9:]))
    assert_same_keys(keys, group_keys(k, q, rank=3, block_size=16))
    assert distr_attention(memoryview(q), keys, memoryview(v)).shape == q.shape


def test_keys_are_copied() -> None:
    q, k = np.random.default_rng(1).standard_normal((2, 1, 1, 40, 8))
    keys = group_keys(k, rank=3, block_size=16)
    expected = distr_attention(q, keys, k)
    values = k.copy()
    k[...] = 0
    assert_same_bits(distr_attention(q, keys, values), expected)


@pytest.mark.parametrize("wrong", [np.nan, np.inf, 1e300])
def test_what_is_not_finite_stays_in_its_head(wrong: float) -> None:
    q, k, v = np.random.default_rng(2).standard_normal((3, 1, 2, 60, 8))
    expected = distr_attention(q, group_keys(k, q, rank=3, block_size=16), v)
    k[0, 1, 5, 2] = wrong
    got = distr_attention(q, group_keys(k, q, rank=3, block_size=16), v)
    assert_same_bits(got[:, 0], expected[:, 0])
    assert np.isnan(got[:, 1]).any() or wrong == 1e300


@pytest.mark.parametrize("shape", [(0, 2, 40, 8), (2, 0, 40, 8), (1, 2, 0, 8)])
def test_empty_axes(shape: tuple[int, ...], tmp_path: Any) -> None:
    k = np.zeros(shape, np.float32)
    keys = group_keys(k, rank=3, block_size=16)
    keys.append(k)
    q, v = np.ones((*shape[:2], 3, 8), np.float32), np.ones((*shape[:2], 2 * shape[2], 5), np.float32)
    out, lse = distr_attention(q, keys, v, return_lse=True)
    assert out.shape == (*shape[:2], 3, 5)
    assert not out.any()
    assert np.isneginf(lse).all()
    keys.save(tmp_path / "keys")
    assert_same_keys(GroupedKeys.load(tmp_path / "keys"), keys)


def test_info_tells_of_the_finished_blocks() -> None:
    q, k, v = np.random.default_rng(3).standard_normal((3, 1, 2, 70, 32))
    keys = group_keys(k, q, score_tol=1e-6, block_size=32)
    _, info = distr_attention(q, keys, v, return_info=True)
    assert (info.method, info.block_size, info.reason) == ("subspace", 32, "that of the grouped keys")
    np.testing.assert_array_equal(info.ranks, np.full((1, 2, 2), 32, np.int32), strict=True)
    np.testing.assert_array_equal(info.score_errors, np.zeros((1, 2, 2)), strict=True)
    _, info = distr_attention(q, group_keys(k, rank=32), v, return_info=True)
    assert (info.method, info.block_size, info.ranks) == ("exact", None, None)


def test_out_is_written() -> None:
    q, k, v = np.random.default_rng(4).standard_normal((3, 1, 2, 70, 8))
    keys = group_keys(k, rank=3, block_size=32)
    out = np.empty_like(v)
    assert distr_attention(q, keys, v, out=out) is out
    assert_same_bits(out, distr_attention(q, keys, v))
