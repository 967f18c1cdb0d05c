"""Whether reference/ and the NumPy backend treat packed sequences as equation 29 says, one row at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from kit.compare import assert_agrees
from oracle import definition
from oracle.test_definition import TIGHT, offset_of

from distrattn_np import distr_attention, exact_attention, reference

H, H_kv, D, E = 4, 2, 6, 3
EDGES_Q, EDGES_K = (np.cumsum([0, *lengths]) for lengths in ((5, 0, 3, 4, 1), (7, 3, 0, 4, 1)))
CAUSAL = {"none": False, "bottom-right": True, "top-left": "top-left"}
LSH: dict[str, Any] = {"group_size": 2, "fusion": "lstsq", "seed": 5}
SUBSPACE: dict[str, Any] = {"rank": 3, "refine": 1}


@pytest.fixture
def packed() -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(29)
    return tuple(
        rng.standard_normal(shape) for shape in ((EDGES_Q[-1], H, D), (EDGES_K[-1], H_kv, D), (EDGES_K[-1], H_kv, E))
    )


def by_rows(q: np.ndarray, k: np.ndarray, v: np.ndarray, attend: reference.Attend) -> tuple[np.ndarray, np.ndarray]:
    """Return what `attend` gives for the rows that eq. 29 says belong together."""
    out, lse = np.zeros((len(q), H, E)), np.full((H, len(q)), -np.inf)
    for s in range(len(EDGES_Q) - 1):
        rows, keys = (
            [n for n in range(len(x)) if definition.sequence_of(n, edges) == s]
            for x, edges in ((q, EDGES_Q), (k, EDGES_K))
        )
        if rows and keys:
            one, lse_of_one = attend(*(x.transpose(1, 0, 2)[None] for x in (q[rows], k[keys], v[keys])))
            out[rows], lse[:, rows] = one[0].transpose(1, 0, 2), lse_of_one[0]
    return out, lse


@pytest.mark.parametrize("causal", CAUSAL)
@pytest.mark.parametrize("options", [{}, {"window": (1, 1), "softcap": 0.7}], ids=["plain", "window and cap"])
def test_exact_attention_is_equation_29(packed: Any, causal: str, options: dict[str, Any]) -> None:
    expected = definition.ragged_exact(*packed, EDGES_Q, EDGES_K, scale=0.4, causal=CAUSAL[causal], **options)

    def attend(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        offset = offset_of(causal, q.shape[2], k.shape[2])
        how = reference.ScoreOptions(**options)
        return reference.exact_attention(q, k, v, scale=0.4, causal_offset=offset, options=how)

    own = reference.ragged_attention(*packed, EDGES_Q, EDGES_K, attend)
    lengths = {"cu_seqlens_q": EDGES_Q, "cu_seqlens_k": EDGES_K}
    called = exact_attention(*packed, **lengths, scale=0.4, causal=CAUSAL[causal], **options, return_lse=True)
    for result, rtol in ((own, 1e-12), (called, 1e-6)):  # a call's lse is float32
        assert_agrees(result[0], expected[0], **TIGHT)
        assert_agrees(result[1], expected[1], rtol=rtol, atol=rtol, check_dtype=False)


@pytest.mark.parametrize("causal", CAUSAL)
@pytest.mark.parametrize("by", ["queries", "keys"])
@pytest.mark.parametrize("method", ["lsh", "subspace"])
def test_blocks_and_means_are_those_of_a_sequence(packed: Any, method: str, by: str, causal: str) -> None:
    common: dict[str, Any] = {"group_by": by, "block_size": 2}

    def loops(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        offset = offset_of(causal, q.shape[2], k.shape[2])
        if method == "lsh":
            S = definition.scores(q, k, scale=0.4, offset=offset, G=2, L=2, by=by, fusion="lstsq", seed=5)
        else:
            S = definition.subspace_scores(q, k, scale=0.4, offset=offset, rank=3, refine=1, L=2, by=by)
        return definition.attend(S, v, offset=offset)

    def attend(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        how = common | {"scale": 0.4, "causal_offset": offset_of(causal, q.shape[2], k.shape[2])}
        if method == "lsh":
            return reference.distr_attention(q, k, v, **how, **LSH)
        maps = reference.make_maps(q, k, **how, **SUBSPACE, score_tol=None)
        return reference.subspace_attention(q, k, v, maps, **how)

    expected = by_rows(*packed, loops)
    own = reference.ragged_attention(*packed, EDGES_Q, EDGES_K, attend)
    options = common | (LSH if method == "lsh" else SUBSPACE) | {"scale": 0.4, "causal": CAUSAL[causal]}
    lengths = {"cu_seqlens_q": EDGES_Q, "cu_seqlens_k": EDGES_K}
    called = distr_attention(*packed, **lengths, method=method, **options, return_lse=True)
    # singular blocks of two rows: least squares and factors round apart
    for result, rtol in ((own, 1e-8), (called, 1e-6)):
        assert_agrees(result[0], expected[0], rtol=1e-8, atol=1e-8)
        assert_agrees(result[1], expected[1], rtol=rtol, atol=rtol, check_dtype=False)
