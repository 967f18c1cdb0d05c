"""Whether the reference and the NumPy backend read pages as docs/caches.md says, key by key."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from kit.compare import assert_agrees, assert_same_bits
from oracle import definition
from oracle.test_definition import TIGHT, offset_of

from distrattn_np import exact_attention, reference

S, LENGTHS = 16, [21, 0, 48, 16]
TABLE = np.array([[5, 2, -7], [99, 99, 99], [0, 5, 3], [2, 8, 8]], np.int32)
CAUSAL = {"none": False, "bottom-right": True, "top-left": "top-left"}


@pytest.fixture
def paged() -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(30)
    return tuple(rng.standard_normal(shape) for shape in ((4, 4, 5, 6), (6, 2, S, 6), (6, 2, S, 3)))


def rows_of(pages: np.ndarray, b: int) -> np.ndarray:
    """Return the rows (1, H_kv, length, width) of one sequence, one key at a time."""
    rows = np.zeros((1, pages.shape[1], LENGTHS[b], pages.shape[3]))
    for m in range(LENGTHS[b]):
        rows[0, :, m] = pages[TABLE[b, m // S], :, m % S]
    return rows


def test_rows_are_those_of_the_pages(paged: Any) -> None:
    for b in range(4):
        assert_same_bits(reference.rows_of_pages(paged[1], TABLE[b], LENGTHS[b]), rows_of(paged[1], b)[0])


@pytest.mark.parametrize("causal", CAUSAL)
@pytest.mark.parametrize("options", [{}, {"window": (7, 1), "softcap": 0.7}], ids=["plain", "window and cap"])
def test_attention_is_that_of_each_sequence(paged: Any, causal: str, options: dict[str, Any]) -> None:
    q, k, v = paged

    def attend(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        offset = offset_of(causal, q.shape[2], k.shape[2])
        return reference.exact_attention(
            q, k, v, scale=0.4, causal_offset=offset, options=reference.ScoreOptions(**options)
        )

    lengths = np.array(LENGTHS, np.int32)
    own = reference.paged_attention(q, k, v, TABLE, lengths, attend)
    called = exact_attention(
        *paged, page_table=TABLE, seqlens_k=lengths, scale=0.4, causal=CAUSAL[causal], **options, return_lse=True
    )
    for b in range(4):
        S = definition.exact_scores(q[b : b + 1], rows_of(k, b), scale=0.4)
        expected = definition.attend(S, rows_of(v, b), offset=offset_of(causal, 5, LENGTHS[b]), **options)
        for result, rtol in ((own, 1e-12), (called, 1e-6)):  # a call's lse is float32
            assert_agrees(result[0][b : b + 1], expected[0], **TIGHT, constant_ok=not LENGTHS[b])
            assert_agrees(
                result[1][b : b + 1], expected[1], rtol=rtol, atol=rtol, check_dtype=False, constant_ok=not LENGTHS[b]
            )
