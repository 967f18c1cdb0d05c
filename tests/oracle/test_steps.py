"""Whether every step in reference/ is right by itself: hash, Gray rank, groups, sampling, fusion, gains."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from distrattn_np.reference.distr_attention import rows_that_meet
from kit.compare import assert_same_bits
from oracle import definition

from distrattn_np import reference


@pytest.mark.parametrize("rows", [1, 5, 16], ids=["one row", "short block", "whole block"])
def test_hash_bit_by_bit(rows: int) -> None:
    X = np.random.default_rng(rows).standard_normal((rows, 12))
    planes = reference.hyperplanes(7, 16)
    words = reference.hash_channels(X, planes)
    assert_same_bits(words, np.array(definition.hash_words(X, planes), dtype=np.uint16))
    assert len(set(words.tolist())) > 1, "all channels fell into one word"


def test_hash_of_one_row_by_hand() -> None:
    # with one row the bit is the sign of x times the sign of the plane; zero and NaN never count as positive
    planes = reference.hyperplanes(0, 3)
    positive = sum(1 << p for p in range(16) if planes[0, p] > 0)
    words = reference.hash_channels(np.array([[2.0, -0.5, 0.0, np.nan]]), planes)
    assert words.tolist() == [positive, 0xFFFF ^ positive, 0, 0]
    assert positive not in (0, 0xFFFF)


def test_hash_sees_direction_only() -> None:
    X = np.random.default_rng(1).standard_normal((9, 8))
    planes = reference.hyperplanes(0, 9)
    words = reference.hash_channels(X, planes)
    assert_same_bits(reference.hash_channels(X * np.geomspace(1e-3, 1e3, 8), planes), words)
    assert_same_bits(reference.hash_channels(-X, planes), ~words)


def test_hyperplanes_are_the_documented_draw() -> None:
    expected = np.random.Generator(np.random.PCG64(11)).standard_normal((6, 16), dtype=np.float32)
    assert_same_bits(reference.hyperplanes(11, 6), expected)
    # backends rely on it: a shorter draw is the beginning of a longer one
    assert_same_bits(reference.hyperplanes(11, 600)[:6], expected)
    assert (reference.hyperplanes(12, 6) != expected).all()


def test_gray_rank_is_the_place_in_the_enumerated_code() -> None:
    code = definition.gray_code(16)
    assert sorted(code) == list(range(1 << 16))
    assert all((a ^ b).bit_count() == 1 for a, b in itertools.pairwise(code))
    ranks = reference.gray_rank(np.array(code, dtype=np.uint16))
    assert_same_bits(ranks, np.arange(1 << 16, dtype=np.uint16))


def test_groups_by_hand() -> None:
    # 2-bit Gray code: 00, 01, 11, 10, so the words 2, 3, 1, 0 have ranks 3, 2, 1, 0; equals stay in order
    words = np.array([2, 0, 3, 1, 0, 2], dtype=np.uint16)
    assert reference.group_channels(words).tolist() == [1, 4, 3, 2, 0, 5]
    assert reference.group_channels(words).dtype == np.int32


def test_groups_are_the_sort_of_the_definition() -> None:
    words = np.random.default_rng(2).integers(0, 40, 60).astype(np.uint16)  # few words: ties that must stay in order
    expected = [j for group in definition.groups_of(words.tolist(), 3) for j in group]
    assert reference.group_channels(words).tolist() == expected
    assert expected != list(range(60))


def test_sample_and_fuse_by_hand() -> None:
    X = np.array([[1.0, 10.0, 100.0, 1000.0], [2.0, 20.0, 200.0, 2000.0]])
    channels = np.array([2, 0, 3, 1])
    assert reference.sample_channels(X, channels, 2).tolist() == [[100, 1000], [200, 2000]]
    assert reference.fuse_channels(X, channels, None, 2).tolist() == [[101, 1010], [202, 2020]]
    gains = np.array([1.0, 3.0, 1.0, -2.0])
    assert reference.fuse_channels(X, channels, gains, 2).tolist() == [[103, 980], [206, 1960]]
    assert reference.fuse_channels(X, channels, gains, 4).tolist() == [[100 + 3 + 1000 - 20], [200 + 6 + 2000 - 40]]


def test_gains_are_least_squares() -> None:
    rng = np.random.default_rng(4)
    X, G = rng.standard_normal((10, 12)), 3
    channels = rng.permutation(12).astype(np.int32)
    order, gains = reference.fusion_gains(X, channels, rng.random(12), G)
    for group in range(4):
        first, *others = order[group * G : (group + 1) * G]
        assert gains[group * G] == 1
        for member, j in enumerate(others, start=group * G + 1):
            solution = np.linalg.lstsq(X[:, [first]], X[:, j], rcond=None)[0][0]
            np.testing.assert_allclose(gains[member], solution, rtol=1e-12, atol=1e-14)
    assert np.abs(gains[gains != 1]).max() > 0.1, "all gains are near zero"


def test_the_heaviest_member_comes_first() -> None:
    # |x_j|^2 = 1, 4, 4, 9, 1, 1 and |y_j|^2 as given: the weights of the groups are (4, 8, 8) and (9, 9, 1)
    X = np.diag([1.0, 2.0, 2.0, 3.0, 1.0, 1.0])
    y_norms = np.array([4.0, 2.0, 2.0, 1.0, 9.0, 1.0])
    order, gains = reference.fusion_gains(X, np.arange(6, dtype=np.int32), y_norms, 3)
    assert order.tolist() == [1, 0, 2, 3, 4, 5]  # of equals the earliest, the rest in order
    assert gains.tolist() == [1, 0, 0, 1, 0, 0]  # the columns are orthogonal
    assert order.dtype == np.int32


def test_a_channel_of_zeros_lends_no_gain() -> None:
    X = np.array([[0.0, 0.0, 1.0, 2.0]])
    order, gains = reference.fusion_gains(X, np.arange(4, dtype=np.int32), np.ones(4), 2)
    assert order.tolist() == [0, 1, 3, 2]
    assert gains.tolist() == [1, 0, 1, 0.5]


def test_channel_norms() -> None:
    Y = np.array([[1.0, 2.0], [3.0, -4.0]])
    assert reference.channel_norms(Y).tolist() == [10, 20]
    assert reference.channel_norms(Y[:0]).tolist() == [0, 0]


@pytest.mark.parametrize("offset", [None, -4, 0, 3, 50])
@pytest.mark.parametrize("by", ["queries", "keys"])
def test_rows_that_meet_a_block_are_those_that_some_row_sees(by: str, offset: int | None) -> None:
    N, M = 9, 7
    rows, others = (N, M) if by == "queries" else (M, N)
    found = set()
    for start in range(0, rows, 4):
        block = range(start, min(start + 4, rows))
        first, last = rows_that_meet(block.start, block.stop, group_by=by, N=N, M=M, causal_offset=offset)
        expected = [
            y
            for y in range(others)
            if any(definition.sees(x, y, offset) if by == "queries" else definition.sees(y, x, offset) for x in block)
        ]
        assert list(range(first, last)) == expected
        found.update(expected)
    assert found
