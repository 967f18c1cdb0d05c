"""Whether reference/ treats windows, caps, masks and biases as the equations say, on every path through the scores."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from distrattn_np.reference import ScoreOptions
from kit.compare import assert_agrees, assert_same_bits
from oracle import definition
from oracle.test_definition import TIGHT, draw, offset_of

from distrattn_np import reference

B, H, H_kv, N, M, D, E = SHAPE = (2, 4, 2, 6, 9, 6, 3)
RNG = np.random.default_rng(7)
MASK = RNG.random((B, H, N, M)) < 0.6
MASK[:, 1, 2] = False  # a row that sees nothing
BIAS = RNG.normal(scale=2, size=(B, H, N, M))
BIAS[RNG.random(BIAS.shape) < 0.2] = -np.inf
BIAS[:, 0, 3] = -np.inf

OPTIONS = {
    "nothing": {},
    "window-2-1": {"window": (2, 1)},
    "window-0-0": {"window": (0, 0)},
    "window-left": {"window": (3, None)},
    "window-right": {"window": (None, 0)},
    "softcap": {"softcap": 0.7},
    "mask": {"mask": MASK},
    "mask-of-keys": {"mask": MASK[0, 0, 0]},
    "bias": {"bias": BIAS},
    "bias-of-heads": {"bias": BIAS[0, :, :1, :1]},
    "all": {"window": (4, 2), "softcap": 1.5, "mask": MASK[:, :1], "bias": BIAS[:1]},
}
LSH = {"block_size": 4, "seed": 5, "scale": 0.4}


def exact(inputs: tuple[np.ndarray, ...], offset: int | None, options: ScoreOptions) -> tuple[Any, Any]:
    q, k, v = inputs
    result = reference.exact_attention(q, k, v, scale=0.4, causal_offset=offset, options=options)
    return result, definition.exact_scores(q, k, scale=0.4)


def lsh(inputs: tuple[np.ndarray, ...], offset: int | None, options: ScoreOptions) -> tuple[Any, Any]:
    q, k, v = inputs
    how = {"group_by": "keys", "fusion": "lstsq"}
    result = reference.distr_attention(q, k, v, group_size=2, causal_offset=offset, options=options, **LSH, **how)
    return result, definition.scores(q, k, offset=offset, G=2, L=4, by="keys", fusion="lstsq", seed=5, scale=0.4)


def subspace(inputs: tuple[np.ndarray, ...], offset: int | None, options: ScoreOptions) -> tuple[Any, Any]:
    q, k, v = inputs
    how = {"causal_offset": offset, "group_by": "keys", "block_size": 4}
    maps = reference.make_maps(q, k, scale=0.4, rank=3, score_tol=None, refine=1, **how)
    result = reference.subspace_attention(q, k, v, maps, scale=0.4, options=options, **how)
    return result, definition.subspace_scores(q, k, scale=0.4, offset=offset, rank=3, refine=1, L=4, by="keys")


@pytest.mark.parametrize("method", [exact, lsh, subspace])
@pytest.mark.parametrize("causal", ["none", "bottom-right", "top-left"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options_are_equations_21_to_24(options: dict[str, Any], causal: str, method: Any) -> None:
    inputs = draw(*SHAPE)
    offset = offset_of(causal, N, M)
    (out, lse), S = method(inputs, offset, ScoreOptions(**options))
    expected_out, expected_lse = definition.attend(S, inputs[2], offset=offset, **options)
    # the subspace is found in two ways, which differ by more than the last digits
    tolerance = TIGHT if method is not subspace else {"rtol": 1e-9, "atol": 1e-10}
    assert_agrees(out, expected_out, **tolerance)
    assert_agrees(lse, expected_lse, **tolerance)
    if options and causal == "none":
        plain_out, _ = definition.attend(S, inputs[2], offset=offset)
        assert np.abs(expected_out - plain_out).max() > 1e-2, "the options changed nothing"


def test_window_by_hand() -> None:
    """The tables of docs/layouts.md."""
    seen = reference.visible_keys(3, 5, None, (1, 0))
    assert_same_bits(seen, np.array([[0, 1, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 1, 1]], bool))
    seen = reference.visible_keys(3, 5, None, (1, None))
    assert_same_bits(seen, np.array([[0, 1, 1, 1, 1], [0, 0, 1, 1, 1], [0, 0, 0, 1, 1]], bool))
    seen = reference.visible_keys(3, 5, 0, (1, 0))
    assert_same_bits(seen, np.array([[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 1, 1, 0, 0]], bool))
    assert_same_bits(reference.visible_keys(3, 5, 0, (1, 2)), seen)  # the causal limit holds in a window too


def test_cap_bias_and_mask_by_hand() -> None:
    S = np.array([[1.0, -3.0, 50.0]])
    options = ScoreOptions(softcap=2.0, bias=np.array([0.5, -np.inf, 0.0]), mask=np.array([[True, True, False]]))
    assert_agrees(options.apply(S, 0, 0), np.array([[2 * np.tanh(0.5) + 0.5, -np.inf, -np.inf]]), rtol=1e-15, atol=0)
    assert_same_bits(reference.cap_scores(S, 0.0), S)
