"""Whether the NumPy backend leaves out the tiles of scores that a mask, a window or the causal limit hides."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from distrattn_np import distr_attention, exact_attention
from distrattn_np.backends import numpy_backend
from distrattn_np.backends.numpy_backend import KEY_TILE, QUERY_TILE

N = 8192
METHODS = [{"method": "lsh", "group_by": by} for by in ("queries", "keys")] + [{"method": "subspace"}]


@pytest.fixture
def scores(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the tiles of scores that are computed from now on."""
    sizes: list[int] = []
    write = numpy_backend._Head._write_scores

    def count(self: Any, S: np.ndarray, *rest: Any) -> None:
        sizes.append(S.size)
        write(self, S, *rest)

    monkeypatch.setattr(numpy_backend._Head, "_write_scores", count)
    return sizes


@pytest.fixture(scope="module")
def inputs() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((3, 1, 1, N, 16), dtype=np.float32)


@pytest.mark.parametrize("options", METHODS, ids=str)
def test_a_window_costs_its_width(options: dict[str, Any], inputs: np.ndarray, scores: list[int]) -> None:
    distr_attention(*inputs, window=(1023, 0), **options)
    assert N * 1024 * 0.9 < sum(scores) < N * (1024 + QUERY_TILE)


def test_without_options_every_score_is_computed(inputs: np.ndarray, scores: list[int]) -> None:
    exact_attention(*inputs)
    assert sum(scores) == N * N


def test_the_causal_limit_halves_the_scores(inputs: np.ndarray, scores: list[int]) -> None:
    exact_attention(*inputs, causal=True)
    assert sum(scores) < N * (N + QUERY_TILE + KEY_TILE) / 2


def test_hidden_tiles_of_a_mask_are_skipped(inputs: np.ndarray, scores: list[int]) -> None:
    document = np.arange(N) // 1000
    mask = document[:, None] == document
    out = exact_attention(*inputs, mask=mask)
    assert sum(scores) < N * (1000 + 2 * KEY_TILE + QUERY_TILE)
    part = slice(3000, 4000)
    assert np.allclose(out[:, :, part], exact_attention(*(x[:, :, part] for x in inputs)), atol=1e-5)


def test_padding_is_skipped(inputs: np.ndarray, scores: list[int]) -> None:
    exact_attention(*inputs, mask=np.arange(N) < 700)
    assert sum(scores) == N * 2 * KEY_TILE


def test_nothing_is_computed_for_a_mask_that_hides_all(inputs: np.ndarray, scores: list[int]) -> None:
    out, lse = exact_attention(*inputs, mask=np.zeros((1, 1), bool), return_lse=True)
    assert not scores
    assert not out.any()
    assert (lse == -np.inf).all()
