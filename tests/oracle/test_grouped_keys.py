"""Whether grouped keys of reference/ are their equations, and the NumPy backend computes them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from kit.compare import assert_agrees
from oracle import definition

import distrattn_np
from distrattn_np import reference


def draw(*shape: int, seed: int = 0, dtype: Any = np.float64) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(dtype)


def attention_by_loops(q, k, v, maps, *, scale, L, offset):
    """Eq. 2, 3, 26 and 27, a number at a time."""
    B, H, N, _ = q.shape
    H_kv, M, E = k.shape[1], k.shape[2], v.shape[3]
    finished = math.ceil(M / L) - 1
    out, lse = np.zeros((B, H, N, E)), np.full((B, H, N), -np.inf)
    for b, h, n in np.ndindex(B, H, N):
        h_kv = h * H_kv // H
        weights = {}
        for m in range(M):
            if not definition.sees(n, m, offset):
                continue
            c = m // L
            query, key = q[b, h, n], k[b, h_kv, m]
            if c < finished:
                W, Z, mean = (x[b, h_kv, c] for x in (maps.sampling, maps.fusion, maps.key_mean))
                sampled = [definition.dot(key - mean, W[:, r]) for r in range(W.shape[1])]
                fused = [definition.dot(query, Z[:, r]) for r in range(W.shape[1])]
                score = definition.dot(query, mean) + sum(x * y for x, y in zip(sampled, fused, strict=True))
            else:
                score = definition.dot(query, key)
            weights[m] = math.exp(scale * score)
        if weights:
            total = sum(weights.values())
            lse[b, h, n] = math.log(total)
            for m, weight in weights.items():
                out[b, h, n] += weight / total * v[b, h_kv, m]
    return out, lse


# 12: the last block is full, and still exact; 13: it is finished, and the last has one key
@pytest.mark.parametrize("keys", [1, 4, 5, 12, 13])
@pytest.mark.parametrize("offset", [None, -2, 0, 7])
def test_attention_is_its_equations(keys, offset):
    q, k, v = draw(2, 4, 5, 6), draw(2, 2, keys, 6), draw(2, 2, keys, 3)
    maps = reference.make_key_maps(k, q, scale=0.4, rank=2, block_size=4)
    got = reference.grouped_keys_attention(q, k, v, maps, scale=0.4, block_size=4, causal_offset=offset)
    expected = attention_by_loops(q, k, v, maps, scale=0.4, L=4, offset=offset)
    for one, other in zip(got, expected, strict=True):
        assert_agrees(one, other, rtol=0, atol=1e-13)


def test_expected_gram_weighs_keys_and_queries_alike():
    X, Y = draw(9, 5), 3 * draw(30, 5)
    keys, queries = X.T @ X, Y.T @ Y
    B = reference.expected_gram(keys, queries)
    assert_agrees(B, (queries + keys * np.sum(Y**2) / np.sum(X**2)) / 2, rtol=1e-13, atol=1e-13)
    np.testing.assert_allclose(np.trace(B), np.sum(Y**2))  # in the units of the queries
    for one, other in ((keys, None), (keys, 0 * queries), (0 * keys, queries)):
        np.testing.assert_array_equal(
            reference.expected_gram(one, other), queries if not one.any() else keys, strict=True
        )
    np.testing.assert_array_equal(reference.expected_gram(np.stack([keys, X.T @ X * 4]), None)[0], keys)


def test_query_statistics_add_up_the_heads_that_share_a_key_head():
    q = draw(2, 6, 7, 3)
    grams, rows = reference.query_statistics(q, 2)
    assert rows == 21
    for b, h in np.ndindex(2, 2):
        expected = sum(np.outer(q[b, head, n], q[b, head, n]) for head in range(3 * h, 3 * h + 3) for n in range(7))
        assert_agrees(grams[b, h], expected, rtol=0, atol=1e-12)


# What the arithmetic adds: sums in the dtype, and keys, maps and means rounded to it. In units of its spacing
@pytest.mark.parametrize(("dtype", "atol"), [("float64", 1e-13), ("float32", 2e-6), ("float16", 4e-3)])
@pytest.mark.parametrize(
    ("options", "with_queries"),
    [({"rank": 9}, False), ({"rank": 9}, True), ({"group_size": 4, "refine": 0}, True), ({"score_tol": 0.4}, True)],
)
def test_numpy_backend_computes_it(dtype, atol, options, with_queries):
    q, k, v = (draw(2, heads, rows, 24, dtype=dtype) for heads, rows in ((6, 50), (2, 700), (2, 700)))
    known = q if with_queries else None
    keys = distrattn_np.group_keys(k, known, block_size=64, scale=0.3, **options)
    rank = options.get("rank", None if "score_tol" in options else 24 // options.get("group_size", 1))
    made = {"scale": 0.3, "block_size": 64}
    maps = reference.make_key_maps(
        k, known, rank=rank, score_tol=options.get("score_tol"), refine=options.get("refine", 1), **made
    )
    assert len(keys.blocks) == 10
    np.testing.assert_array_equal(keys.ranks, maps.ranks, strict=True)
    # the means that were subtracted are rounded
    np.testing.assert_allclose(keys.score_errors, maps.score_errors, rtol=0, atol=max(1e-9, atol))
    for causal, offset in ((False, None), (True, 650), ("top-left", 0)):
        got = distrattn_np.distr_attention(q, keys, v, causal=causal, return_lse=True)
        expected = reference.grouped_keys_attention(q, k, v, maps, causal_offset=offset, **made)
        assert_agrees(got[0], expected[0], rtol=0, atol=atol, check_dtype=False)
        assert_agrees(got[1], expected[1], rtol=2e-7, atol=atol, check_dtype=False)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_numpy_backend_applies_the_score_options(dtype):
    q, k, v = (draw(2, heads, rows, 16, dtype=dtype) for heads, rows in ((4, 30), (2, 600), (2, 600)))
    keys = distrattn_np.group_keys(k, q, rank=8, block_size=48)
    maps = reference.make_key_maps(k, q, scale=0.25, rank=8, block_size=48)
    mask, bias = draw(30, 600) > -1, draw(1, 4, 1, 600, dtype="float32")
    mask[3] = False
    given = {"window": (400, None), "softcap": 3.0, "mask": mask, "bias": bias}
    out, lse = distrattn_np.distr_attention(q, keys, v, causal=True, return_lse=True, **given)
    expected = reference.grouped_keys_attention(
        q, k, v, maps, scale=0.25, block_size=48, causal_offset=570, options=reference.ScoreOptions(**given)
    )
    atol = {"float32": 2e-6, "float16": 4e-3}[dtype]
    assert_agrees(out, expected[0], rtol=0, atol=atol, check_dtype=False)
    assert_agrees(lse, expected[1], rtol=2e-7, atol=atol, check_dtype=False)
    assert not out[:, :, 3].any()
    assert np.isneginf(lse[:, :, 3]).all()
