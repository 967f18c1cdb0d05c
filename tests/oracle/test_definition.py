"""Whether reference/ computes the numbered equations, as loops over single numbers written only from them do."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from kit.compare import assert_agrees
from oracle import definition

from distrattn_np import reference

TIGHT = {"rtol": 1e-12, "atol": 1e-13}
"""Both sides are float64; sums of at most 20 terms differ by a few units of 2e-16."""

SHAPES = [
    # B, H, H_kv, N, M, D, E
    (1, 1, 1, 7, 9, 4, 3),  # more keys than queries
    (2, 4, 2, 9, 6, 6, 5),  # a batch, shared key heads, more queries than keys (rows that see nothing)
    (1, 3, 1, 5, 5, 6, 1),  # one key head for all, a value of one column
    (1, 2, 2, 1, 8, 6, 4),  # one query, as in decoding
    (1, 2, 2, 8, 1, 6, 4),  # one key
]


def draw(B: int, H: int, H_kv: int, N: int, M: int, D: int, E: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng([B, H, N, M, D])
    return tuple(rng.standard_normal(s) for s in ((B, H, N, D), (B, H_kv, M, D), (B, H_kv, M, E)))


def offset_of(causal: str, N: int, M: int) -> int | None:
    return {"none": None, "bottom-right": M - N, "top-left": 0}[causal]


@pytest.mark.parametrize("causal", ["none", "bottom-right", "top-left"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_exact_attention_is_equations_1_to_3(shape: tuple[int, ...], causal: str) -> None:
    q, k, v = draw(*shape)
    offset = offset_of(causal, *shape[3:5])
    out, lse = reference.exact_attention(q, k, v, scale=0.4, causal_offset=offset)
    expected_out, expected_lse = definition.attend(definition.exact_scores(q, k, scale=0.4), v, offset=offset)
    assert_agrees(out, expected_out, **TIGHT)
    assert_agrees(lse, expected_lse, **TIGHT)


@pytest.mark.parametrize("causal", ["none", "bottom-right", "top-left"])
@pytest.mark.parametrize(("by", "fusion"), list(itertools.product(["queries", "keys"], ["sum", "lstsq"])))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("G", "L"), [(2, 4), (2, 100)], ids=["short last block", "one block"])
def test_distr_attention_is_equations_2_to_9(
    shape: tuple[int, ...], G: int, L: int, by: str, fusion: str, causal: str
) -> None:
    q, k, v = draw(*shape)
    offset = offset_of(causal, *shape[3:5])
    options: dict[str, Any] = {"scale": 0.4, "seed": 5}
    out, lse = reference.distr_attention(
        q, k, v, group_size=G, block_size=L, group_by=by, fusion=fusion, causal_offset=offset, **options
    )
    S = definition.scores(q, k, offset=offset, G=G, L=L, by=by, fusion=fusion, **options)
    expected_out, expected_lse = definition.attend(S, v, offset=offset)
    assert_agrees(out, expected_out, **TIGHT)
    assert_agrees(lse, expected_lse, **TIGHT)
    if min(shape[3:5]) > 1:  # one key has all the weight whatever its score; lstsq is exact for one query
        exact_out, _ = reference.exact_attention(q, k, v, scale=0.4, causal_offset=offset)
        assert np.abs(expected_out - exact_out).max() > 1e-2, "the grouping changed nothing: this proves little"


@pytest.mark.parametrize(("by", "fusion"), list(itertools.product(["queries", "keys"], ["sum", "lstsq"])))
def test_groups_of_one_are_exact_attention(by: str, fusion: str) -> None:
    q, k, v = draw(2, 4, 2, 9, 6, 6, 5)
    out, lse = reference.distr_attention(
        q, k, v, scale=0.4, group_size=1, block_size=4, group_by=by, fusion=fusion, seed=0, causal_offset=1
    )
    expected_out, expected_lse = reference.exact_attention(q, k, v, scale=0.4, causal_offset=1)
    assert_agrees(out, expected_out, **TIGHT)
    assert_agrees(lse, expected_lse, **TIGHT)


@pytest.mark.parametrize(("N", "M"), [(0, 3), (3, 0), (0, 0)])
@pytest.mark.parametrize("by", ["queries", "keys"])
def test_without_rows_there_is_nothing_and_without_keys_zero(N: int, M: int, by: str) -> None:
    q, k, v = np.ones((1, 2, N, 4)), np.ones((1, 2, M, 4)), np.ones((1, 2, M, 5))
    out, lse = reference.distr_attention(
        q, k, v, scale=1.0, group_size=2, block_size=2, group_by=by, fusion="lstsq", seed=0
    )
    assert out.shape == (1, 2, N, 5)
    assert lse.shape == (1, 2, N)
    assert not out.any()
    assert (lse == -np.inf).all()
