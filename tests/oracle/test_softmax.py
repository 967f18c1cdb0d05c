"""Whether the exact branch of reference/ agrees with SciPy's softmax and logsumexp and with a case worked by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from kit.compare import assert_agrees
from scipy.special import logsumexp, softmax

from distrattn_np import reference

TIGHT = {"rtol": 1e-13, "atol": 1e-14}


def draw(N: int, M: int, E: int, spread: float) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng([N, M, E])
    return spread * rng.standard_normal((N, M)), rng.standard_normal((M, E))


@pytest.mark.parametrize("spread", [1.0, 300.0], ids=["ordinary scores", "scores whose exp overflows"])
def test_softmax_attention_is_scipy_softmax(spread: float) -> None:
    S, V = draw(11, 13, 5, spread)
    O, lse = reference.softmax_attention(S, V)
    assert_agrees(O, softmax(S, axis=1) @ V, **TIGHT)
    assert_agrees(lse, logsumexp(S, axis=1), **TIGHT)


def test_hidden_keys_weigh_nothing() -> None:
    S, V = draw(6, 9, 4, 1.0)
    hidden = np.arange(9) % 3 == 1
    O, lse = reference.softmax_attention(np.where(hidden, -np.inf, S), V)
    assert_agrees(O, softmax(S[:, ~hidden], axis=1) @ V[~hidden], **TIGHT)
    assert_agrees(lse, logsumexp(S[:, ~hidden], axis=1), **TIGHT)
    assert np.abs(O - softmax(S, axis=1) @ V).max() > 1e-2, "the hidden keys had no weight to lose"


def test_a_row_without_a_key_is_zero_and_the_others_stay() -> None:
    S, V = draw(3, 4, 2, 1.0)
    expected, expected_lse = reference.softmax_attention(S, V)
    S[1] = -np.inf
    O, lse = reference.softmax_attention(S, V)
    assert not O[1].any()
    assert lse[1] == -np.inf
    assert_agrees(O[[0, 2]], expected[[0, 2]], rtol=0, atol=0)
    assert_agrees(lse[[0, 2]], expected_lse[[0, 2]], rtol=0, atol=0)


def test_exact_attention_is_scipy_softmax_of_scaled_products() -> None:
    rng = np.random.default_rng(3)
    q, k, v = rng.standard_normal((2, 4, 9, 6)), rng.standard_normal((2, 2, 12, 6)), rng.standard_normal((2, 2, 12, 5))
    out, lse = reference.exact_attention(q, k, v, scale=0.7, causal_offset=3)
    S = 0.7 * np.einsum("bhnd,bhmd->bhnm", q, k.repeat(2, axis=1))
    S[:, :, np.arange(12) > np.arange(9)[:, None] + 3] = -np.inf
    assert_agrees(out, np.einsum("bhnm,bhme->bhne", softmax(S, axis=3), v.repeat(2, axis=1)), rtol=1e-12, atol=1e-13)
    assert_agrees(lse, logsumexp(S, axis=3), rtol=1e-12, atol=1e-13)


def test_two_queries_two_keys_by_hand() -> None:
    q = np.array([[[[1.0, 0.0], [0.0, 2.0]]]])
    k = np.array([[[[math.log(4), 0.0], [math.log(2), math.log(2)]]]])
    v = np.array([[[[3.0, 0.0], [0.0, 6.0]]]])
    # half of q k^T: [[log 2, log 2 / 2], [0, log 2]], so the weights are [2, sqrt 2] and [1, 2] over their sums
    out, lse = reference.exact_attention(q, k, v, scale=0.5)
    r = math.sqrt(2)
    expected = np.array([[[[6 / (2 + r), 6 * r / (2 + r)], [1.0, 4.0]]]])
    assert_agrees(out, expected, **TIGHT)
    assert_agrees(lse, np.array([[[math.log(2 + r), math.log(3)]]]), **TIGHT)
    # top-left causal: the first query sees the first key alone
    out, lse = reference.exact_attention(q, k, v, scale=0.5, causal_offset=0)
    assert_agrees(out, np.array([[[[3.0, 0.0], [1.0, 4.0]]]]), **TIGHT)
    assert_agrees(lse, np.array([[[math.log(2), math.log(3)]]]), **TIGHT)
