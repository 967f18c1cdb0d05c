"""Laws of pooled keys and projected values: what they leave as it was."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kit.backends import to_kind
from kit.compare import assert_same_bits, to_host

from distrattn_np import distr_attention, exact_attention, pool_keys, project_values

KINDS = ["numpy", pytest.param("cupy", marks=pytest.mark.gpu)]
ROUNDING = {"float16": 4e-3, "float32": 2e-5, "float64": 1e-12}
DTYPES = st.sampled_from(list(ROUNDING))


def normal(seed: int, *shape: int, dtype: str = "float64") -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def check_clusters(marks: np.ndarray, means: np.ndarray, size: int) -> None:
    """Fail unless ``means`` are those of disjoint clusters that hold all of ``marks``, which are 1, 2, 4, ..."""
    counts = np.minimum(size, len(marks) - size * np.arange(len(means)))
    sums = np.rint(means * counts).astype(np.int64)
    assert [int(x).bit_count() for x in sums] == counts.tolist()
    assert np.bitwise_or.reduce(sums) == sums.sum() == marks.sum()


@pytest.mark.parametrize("layout", ["bhnd", "bnhd"])
@pytest.mark.parametrize("kind", KINDS)
@given(st.integers(1, 40), st.integers(1, 45), st.integers(0, 9))
@settings(deadline=None)
def test_every_key_is_in_one_cluster(kind: Any, layout: str, rows: int, size: int, seed: int) -> None:
    k, v = normal(seed, 2, 3, rows, 4), normal(seed + 1, 2, 3, rows, 2)
    v[..., 0] = 2.0 ** np.arange(rows)
    given_arrays = [to_kind(np.ascontiguousarray(x.swapaxes(1, 2)) if layout == "bnhd" else x, kind) for x in (k, v)]
    pooled = pool_keys(*given_arrays, size, layout=layout)
    K, V, bias = (to_host(x) for x in pooled)
    K, V = (x.swapaxes(1, 2) if layout == "bnhd" else x for x in (K, V))
    clusters = -(-rows // size)
    assert K.shape == (2, 3, clusters, 4)
    assert bias.shape == (1, 1, 1, clusters)
    assert bias.dtype == np.float32
    counts = np.minimum(size, rows - size * np.arange(clusters))
    np.testing.assert_allclose(np.exp(bias.ravel()), counts, rtol=1e-6)
    np.testing.assert_allclose((K * counts[:, np.newaxis]).sum(axis=2), k.sum(axis=2), atol=1e-11)
    for head in V.reshape(6, clusters, 2):
        check_clusters(2 ** np.arange(rows), head[:, 0], size)


@pytest.mark.parametrize("kind", KINDS)
@given(DTYPES, st.sampled_from([1, 2, 3, 7]), st.integers(0, 9))
@settings(deadline=None)
def test_clusters_of_equal_keys_are_exact(kind: Any, dtype: str, size: int, seed: int) -> None:
    """Output and lse, in any order of the keys, and where the last cluster is not full."""
    q, k = normal(seed, 2, 4, 9, 8, dtype=dtype), normal(seed + 1, 2, 2, 5, 8, dtype=dtype)
    v = normal(seed + 2, 2, 2, 5, 3, dtype=dtype)
    order = np.random.default_rng(seed).permutation(5 * size)
    K, V = (x.repeat(size, axis=2)[:, :, order] for x in (k, v))
    arrays = [to_kind(x, kind) for x in (q, K, V)]
    expected = exact_attention(*arrays, return_lse=True)
    pooled = pool_keys(*arrays[1:], size)
    found = exact_attention(arrays[0], pooled.k, pooled.v, bias=pooled.bias, return_lse=True)
    for one, other, slack in zip(found, expected, (ROUNDING[dtype], ROUNDING[dtype] + 3e-7), strict=True):
        np.testing.assert_allclose(to_host(one), to_host(other), atol=slack, rtol=slack)


@pytest.mark.parametrize("kind", KINDS)
def test_clusters_of_one_are_the_keys_in_another_order(kind: Any) -> None:
    q, k, v = (normal(seed, 1, 2, rows, 4, dtype="float32") for seed, rows in ((0, 7), (1, 13), (2, 13)))
    pooled = pool_keys(to_kind(k, kind), to_kind(v, kind), 1)
    assert not to_host(pooled.bias).any()
    before, after = (np.concatenate([to_host(x) for x in two], axis=3) for two in ((k, v), pooled[:2]))
    for rows, others in zip(before[0], after[0], strict=True):
        assert sorted(map(tuple, rows)) == sorted(map(tuple, others))
    found = to_host(exact_attention(to_kind(q, kind), pooled.k, pooled.v))
    np.testing.assert_allclose(found, exact_attention(q, k, v), atol=2e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_one_cluster_averages_the_values(kind: Any) -> None:
    k, v = normal(0, 1, 2, 30, 4), normal(1, 1, 2, 30, 3)
    pooled = pool_keys(to_kind(k, kind), to_kind(v, kind), 10**9)
    np.testing.assert_allclose(to_host(pooled.v), v.mean(axis=2, keepdims=True), atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_stays_in_its_head(bad: float, kind: Any) -> None:
    k, v = normal(0, 2, 2, 50, 4, dtype="float32"), normal(1, 2, 2, 50, 4, dtype="float32")
    spoilt_k, spoilt_v = k.copy(), v.copy()
    spoilt_k[0, 1, 3, 2] = spoilt_v[0, 1, 7, 1] = bad
    clean = pool_keys(to_kind(k, kind), to_kind(v, kind), 3)
    spoilt = pool_keys(to_kind(spoilt_k, kind), to_kind(spoilt_v, kind), 3)
    values = [project_values(to_kind(x, kind), 2).values for x in (v, spoilt_v)]
    for one, other in (*zip(spoilt[:2], clean[:2], strict=True), (values[1], values[0])):
        found, wanted = to_host(one), to_host(other)
        for head in ((0, 0), (1, 0), (1, 1)):
            assert_same_bits(found[head], wanted[head])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [0, 1])
def test_few_rows(rows: int, kind: Any) -> None:
    k, v = (to_kind(normal(0, 2, 2, rows, 4), kind) for _ in range(2))
    assert pool_keys(k, v, 3).k.shape == (2, 2, rows, 4)
    projected = project_values(v, 2)
    assert projected.values.shape == (2, 2, rows, 2)
    out = projected.restore(exact_attention(to_kind(normal(1, 2, 4, 3, 4), kind), k, projected.values))
    wanted = np.broadcast_to(to_host(v).repeat(2, axis=1), (2, 4, 3, 4)) if rows else np.zeros((2, 4, 3, 4))
    np.testing.assert_allclose(to_host(out), wanted, atol=1e-12)


@pytest.mark.parametrize(("batch", "kv_heads", "rows"), [(0, 2, 3), (2, 0, 3), (2, 2, 0)])
def test_empty_axes(batch: int, kv_heads: int, rows: int) -> None:
    k = normal(0, batch, kv_heads, 5, 4)
    assert pool_keys(k, k, 2).v.shape == (batch, kv_heads, 3, 4)
    out = normal(1, batch, 2 * kv_heads, rows, 3)
    assert project_values(k, 3).restore(out).shape == (batch, 2 * kv_heads, rows, 4)


@pytest.mark.parametrize("layout", ["bhnd", "bnhd"])
@pytest.mark.parametrize("kind", KINDS)
@given(DTYPES, st.integers(1, 5), st.sampled_from([False, True]), st.integers(0, 9))
@settings(deadline=None)
def test_values_of_low_rank_come_back(kind: Any, layout: str, dtype: str, rank: int, causal: bool, seed: int) -> None:
    """Around any mean, whatever the weights: causal or not, exact or approximate."""
    q, k = normal(seed, 2, 4, 20, 8, dtype=dtype), normal(seed + 1, 2, 2, 20, 8, dtype=dtype)
    v = (normal(seed + 2, 2, 2, 20, rank) @ normal(seed + 3, 2, 2, rank, 5) + 3 * normal(seed + 4, 2, 2, 1, 5)).astype(
        dtype
    )
    arrays = [to_kind(np.ascontiguousarray(x.swapaxes(1, 2)) if layout == "bnhd" else x, kind) for x in (q, k, v)]
    projected = project_values(arrays[2], rank, layout=layout)
    options = {"causal": causal, "layout": layout, "rank": 4, "block_size": 8}
    out = projected.restore(distr_attention(*arrays[:2], projected.values, **options))
    assert out.dtype == dtype
    expected = to_host(distr_attention(*arrays, **options))
    np.testing.assert_allclose(to_host(out), expected, atol=8 * ROUNDING[dtype], rtol=ROUNDING[dtype])


@pytest.mark.parametrize("kind", KINDS)
def test_basis_is_orthonormal_and_loses_the_least(kind: Any) -> None:
    v = normal(0, 2, 3, 40, 6) * [1, 5, 2, 4, 0.5, 3]
    projected = project_values(to_kind(v, kind), 3)
    basis, mean = to_host(projected.basis), to_host(projected.mean)
    np.testing.assert_allclose(basis.swapaxes(2, 3) @ basis, np.broadcast_to(np.eye(3), (2, 3, 3, 3)), atol=1e-12)
    np.testing.assert_allclose(mean, v.mean(axis=2, keepdims=True), atol=1e-12)
    lost = np.linalg.norm(v - mean - to_host(projected.values) @ basis.swapaxes(2, 3), axis=(2, 3))
    least = np.sqrt((np.linalg.svd(v - mean, compute_uv=False)[..., 3:] ** 2).sum(axis=-1))
    np.testing.assert_allclose(lost, least, rtol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_queries_that_see_no_key_get_zeros_where_lse_says_so(kind: Any) -> None:
    q, k, v = (to_kind(normal(seed, 1, 2, rows, 4), kind) for seed, rows in ((0, 6), (1, 4), (2, 4)))
    projected = project_values(v, 2)
    out, lse = exact_attention(q, k, projected.values, causal=True, return_lse=True)  # two queries come before all keys
    found, without = to_host(projected.restore(out, lse)), to_host(projected.restore(out))
    assert not found[:, :, :2].any()
    assert_same_bits(found[:, :, 2:], without[:, :, 2:])
    np.testing.assert_allclose(without[:, :, :2], np.broadcast_to(to_host(v).mean(axis=2, keepdims=True), (1, 2, 2, 4)))


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_size_of_values_makes_no_difference(scale: float) -> None:
    v = normal(0, 1, 2, 30, 5, dtype="float32")
    plain, scaled = (project_values((v * x).astype(np.float32), 2) for x in (1, scale))
    for one, other in ((scaled.values / np.float32(scale), plain.values), (scaled.basis, plain.basis)):
        np.testing.assert_allclose(np.abs(one), np.abs(other), atol=1e-5)
