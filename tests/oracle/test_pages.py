"""Whether the reference and the NumPy backend read pages as docs/caches.md says, key by key."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from kit.compare import assert_agrees, assert_same_bits
from oracle import definition
from oracle.test_definition import TIGHT, offset_of

from distrattn_np import distr_attention, exact_attention, group_pages, reference

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


@pytest.mark.parametrize("causal", [False, True])
def test_grouped_keys_are_those_of_each_sequence(paged: Any, causal: bool) -> None:
    """Pages that are appended to, beside the reference's maps of plain rows (eq. 26 to 28, 30)."""
    q, k, v = paged
    made = {"scale": 0.4, "block_size": S}
    known = np.random.default_rng(31).standard_normal((1, 4, 9, 6))
    table = np.array([[5, 2, -7], [99, 99, 99], [5, 0, 3], [5, 4, 8]], np.int32)
    tables = {"page_table": table, "seqlens_k": np.array([21, 0, 48, 17], np.int32)}

    def attend(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        maps = reference.make_key_maps(k, known, rank=2, **made)
        offset = k.shape[2] - q.shape[2] if causal else None
        return reference.grouped_keys_attention(q, k, v, maps, **made, causal_offset=offset)

    keys = group_pages(k[:1], known, pages=6, tails=3, rank=2, **made)
    for b, first in ((0, 0), (2, S), (3, S)):  # these two begin with a page of the first
        rows = reference.rows_of_pages(k, table[b], tables["seqlens_k"][b])[np.newaxis, :, first:]
        keys.append(rows, table[b : b + 1], np.array([first], np.int32))
    expected = reference.paged_attention(q, k, v, **tables, attend=attend)
    out, lse = distr_attention(q, keys, v, **tables, causal=causal, return_lse=True)
    assert_agrees(out, expected[0], **TIGHT)
    assert_agrees(lse, expected[1], rtol=1e-6, atol=1e-6, check_dtype=False)
