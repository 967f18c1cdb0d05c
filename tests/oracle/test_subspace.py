"""Whether the subspace method of reference/ is its equations, is as good as they promise, and never breaks down."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from kit.compare import assert_agrees
from oracle import definition

from distrattn_np import reference

SHAPES = [
    # B, H, H_kv, N, M, D, E
    (1, 1, 1, 11, 13, 4, 3),  # more keys than queries
    (2, 4, 2, 13, 11, 5, 4),  # a batch, shared key heads, more queries than keys (rows that see nothing)
    (1, 3, 1, 12, 12, 6, 1),  # one key head for all
]


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape)


def block_maps(X: np.ndarray, Y: np.ndarray, **options: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    return reference.subspace_maps(
        reference.gram(X),
        reference.gram(Y),
        x_rows=np.array(len(X)),
        y_rows=np.array(len(Y)),
        **({"scale": 1.0, "rank": None, "score_tol": None, "refine": 1} | options),
    )


def approximation(X: np.ndarray, Y: np.ndarray, **options: Any) -> np.ndarray:
    W, Z, _, _ = block_maps(X, Y, **options)
    return (X @ W) @ (Y @ Z).T


def error(X: np.ndarray, Y: np.ndarray, **options: Any) -> float:
    """Return the relative error of a block's scores."""
    return float(np.linalg.norm(approximation(X, Y, **options) - X @ Y.T) / np.linalg.norm(X @ Y.T))


def decaying(rows: int, D: int, decay: float, seed: int) -> np.ndarray:
    """Return rows whose singular values fall by a factor, in a random basis."""
    rotation, _ = np.linalg.qr(draw(D, D, seed=seed))
    return draw(rows, D, seed=seed) * decay ** np.arange(D) @ rotation


def best_error(X: np.ndarray, Y: np.ndarray, rank: int) -> float:
    singular = np.linalg.svd(X @ Y.T, compute_uv=False)
    return float(np.linalg.norm(singular[rank:]) / np.linalg.norm(singular))


# 5: the last queries own the last, short block of 13 keys; 9: the last of them own a block past it
@pytest.mark.parametrize("offset", [None, 0, 2, -2, 5, 9])
@pytest.mark.parametrize("by", ["queries", "keys"])
@pytest.mark.parametrize("refine", [0, 1, 3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention_is_equations_11_to_15_and_20(
    shape: tuple[int, ...], refine: int, by: str, offset: int | None
) -> None:
    B, H, H_kv, N, M, D, E = shape
    q, k, v = draw(B, H, N, D), draw(B, H_kv, M, D, seed=1) + 3, draw(B, H_kv, M, E, seed=2)
    options: dict[str, Any] = {"scale": 0.4, "block_size": 4, "group_by": by, "causal_offset": offset}
    maps = reference.make_maps(q, k, rank=2, score_tol=None, refine=refine, **options)
    out, lse = reference.subspace_attention(q, k, v, maps, **options)
    S = definition.subspace_scores(q, k, scale=0.4, offset=offset, rank=2, refine=refine, L=4, by=by)
    expected_out, expected_lse = definition.attend(S, v, offset=offset)
    assert_agrees(out, expected_out, rtol=0, atol=1e-9)
    assert_agrees(lse, expected_lse, rtol=0, atol=1e-9)
    exact_out, _ = reference.exact_attention(q, k, v, scale=0.4, causal_offset=offset)
    assert np.abs(expected_out - exact_out).max() > 1e-2, "the maps changed nothing: this proves little"


@pytest.mark.parametrize("rank", [1, 5, 11])
def test_score_error_is_the_brute_force_error(rank: int) -> None:
    X, Y = draw(20, 12), draw(30, 12, seed=1)
    W, Z, ranks, predicted = block_maps(X, Y, rank=rank, scale=-0.3)
    measured = np.sqrt(np.square(0.3 * ((X @ W) @ (Y @ Z).T - X @ Y.T)).mean())
    assert ranks == rank
    assert_agrees(predicted, measured, rtol=1e-9, atol=0, check_kind=False, constant_ok=True)
    assert measured > 0.01


def test_a_smaller_rank_is_the_beginning_of_a_larger_one() -> None:
    X, Y = draw(40, 24), draw(50, 24, seed=1)
    W, Z, _, _ = block_maps(X, Y, rank=20, refine=2)
    for rank in (1, 7, 19):
        for part, whole in zip(block_maps(X, Y, rank=rank, refine=2), (W, Z), strict=False):
            assert_agrees(part, whole[:, :rank], rtol=1e-9, atol=1e-12)


def test_channels_are_those_that_add_most() -> None:
    # |x_j|^2 = 4, 4, 9, 1: the first two are equal; |y_j|^2 as given
    X = np.array([[2.0, 2.0, 0.0, 0.0], [0.0, 0.0, 3.0, 0.0], [0.0, 0.0, 0.0, 1.0]])
    A, B = X.T @ X, np.diag([3.0, 3.0, 1.0, 5.0])
    assert reference.choose_channels(A, B, 4).tolist() == [0, 2, 3, 1]


@pytest.mark.parametrize("refine", [0, 1, 3])
@pytest.mark.parametrize("rank_of", ["X", "Y", "both"])
def test_low_rank_is_exact(rank_of: str, refine: int) -> None:
    X, Y = draw(40, 24), draw(60, 24, seed=1)
    if rank_of != "Y":
        X = draw(40, 8, seed=2) @ draw(8, 24, seed=3)
    if rank_of != "X":
        Y = draw(60, 8, seed=4) @ draw(8, 24, seed=5)
    if rank_of == "Y" and refine == 0:  # the channels are chosen and fused for X alone
        assert error(X, Y, rank=8, refine=0) > 0.1
        return
    for rank in (8, 9, 20):
        assert error(X, Y, rank=rank, refine=refine) < 1e-11
    assert error(X, Y, rank=7, refine=refine) > 1e-4


@pytest.mark.parametrize("refine", [0, 1])
def test_copies_of_channels_are_exact(refine: int) -> None:
    X, Y = np.repeat(draw(30, 6), 4, axis=1), np.repeat(draw(40, 6, seed=1), 4, axis=1)
    assert error(X, Y, rank=6, refine=refine) < 1e-11
    assert error(X, draw(40, 24, seed=2), rank=6, refine=refine) < 1e-11


@pytest.mark.parametrize("decay", [1.0, 0.97, 0.92])
@pytest.mark.parametrize("rank", [16, 32, 48])
def test_refinements_approach_the_best_linear_map(rank: int, decay: float) -> None:
    X, Y = decaying(128, 64, decay, 1), decaying(500, 64, decay, 2)
    errors = [error(X, Y, rank=rank, refine=refine) for refine in (0, 1, 3, 30)]
    best = best_error(X, Y, rank)
    assert best > 1e-5
    assert all(found >= best * (1 - 1e-9) for found in errors), "below the Eckart-Young bound"
    assert errors == sorted(errors, reverse=True)
    assert errors[1] < 1.3 * best
    assert errors[2] < 1.1 * best
    assert errors[3] < 1.01 * best


@pytest.mark.parametrize("score_tol", [1e-3, 0.01, 0.3, 1e9])
def test_rank_is_the_smallest_that_keeps_the_error(score_tol: float) -> None:
    X, Y = decaying(100, 40, 0.9, 1), decaying(300, 40, 0.9, 2)
    W, Z, rank, predicted = block_maps(X, Y, score_tol=score_tol)
    errors = [block_maps(X, Y, rank=smaller)[3] for smaller in (16, 32)]
    expected = next((r for r, found in zip((16, 32), errors, strict=True) if found <= score_tol), 40)
    assert rank == expected
    assert predicted <= score_tol
    measured = np.sqrt(np.square((X @ W) @ (Y @ Z).T - X @ Y.T).mean())
    assert_agrees(predicted, measured, rtol=1e-6, atol=1e-12, check_kind=False, constant_ok=True)
    assert not W[:, int(rank) :].any()
    assert not Z[:, int(rank) :].any()


def test_the_tolerances_above_choose_every_rank() -> None:
    X, Y = decaying(100, 40, 0.9, 1), decaying(300, 40, 0.9, 2)
    assert {int(block_maps(X, Y, score_tol=score_tol)[2]) for score_tol in (1e-3, 0.01, 0.3, 1e9)} == {16, 32, 40}


def test_both_sides_get_columns_of_equal_mean_square() -> None:
    X, Y = 1e-3 * draw(40, 16), 1e4 * draw(60, 16, seed=1)
    W, Z, _, _ = block_maps(X, Y, rank=9)
    assert_agrees(np.square(X @ W).mean(axis=0), np.square(Y @ Z).mean(axis=0), rtol=1e-6, atol=0)


@pytest.mark.parametrize("power", [-40, 3, 40])
def test_scale_of_a_channel_does_not_matter(power: int) -> None:
    X, Y = draw(40, 16), draw(60, 16, seed=1)
    expected = approximation(X, Y, rank=5)
    factor = np.ones(16)
    factor[3::4] = 2.0**power
    assert_agrees(approximation(X * factor, Y / factor, rank=5), expected, rtol=1e-9, atol=1e-9)


def hostile_blocks() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    X, Y = draw(40, 24), draw(60, 24, seed=1)
    offset = np.zeros(24)
    offset[5] = 400
    return {
        "zero block": (0 * X, Y),
        "nothing meets it": (X, Y[:0]),
        "zero queries": (X, 0 * Y),
        "one row": (X[:1], Y),
        "one row on each side": (X[:1], Y[:1]),
        "one row, met by two": (X[:1], Y[:2]),
        "three rows, met by five": (X[:3], Y[:5]),
        "equal rows": (np.repeat(X[:1], 40, axis=0), Y),
        "constant channels": (np.where(np.arange(24) % 3, 5.0, X), Y),
        "zero channels": (np.where(np.arange(24) % 3, 0.0, X), np.where(np.arange(24) % 5, 0.0, Y)),
        "one channel": (np.where(np.arange(24) == 7, X, 0.0), Y),
        "scales far apart": (X * np.geomspace(1e-12, 1e12, 24), Y),
        "scales far apart on both": (X * np.geomspace(1e-12, 1e12, 24), Y * np.geomspace(1e8, 1e-8, 24)),
        "an offset of 400": ((X + offset).astype(np.float16).astype(float), Y),
        "largest float16": (np.full_like(X, 65504.0), np.full_like(Y, -65504.0)),
        "largest float32": (np.sign(X) * 3e38, np.sign(Y) * 3e38),
        "smallest float32": (np.sign(X) * 1e-45, np.sign(Y) * 1e-45),
        "nearly equal channels": (np.repeat(X[:, :1], 24, axis=1) + 1e-9 * X, Y),
    }


@pytest.mark.parametrize("refine", [0, 1, 5])
@pytest.mark.parametrize("rank", [1, 16, 23, None])
@pytest.mark.parametrize("name", hostile_blocks())
def test_finite_rows_give_finite_maps_and_no_more_than_the_error_of_nothing(
    name: str, rank: int | None, refine: int
) -> None:
    X, Y = hostile_blocks()[name]
    W, Z, _, predicted = block_maps(X, Y, rank=rank, refine=refine, score_tol=1e-3 if rank is None else None)
    for x in (W, Z, predicted):
        assert np.isfinite(x).all()
    difference = np.linalg.norm((X @ W) @ (Y @ Z).T - X @ Y.T)
    assert np.isfinite(difference)
    assert difference <= 1.01 * np.linalg.norm(X @ Y.T)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("rows", [(1, 2), (3, 5), (5, 3)], ids=str)
def test_columns_beyond_the_rank_do_not_grow_with_the_refinements(rows: tuple[int, int], dtype: Any) -> None:
    X, Y = (draw(n, 33, seed=n).astype(dtype) for n in rows)
    for refine in (1, 2, 20):
        W, Z, _, _ = block_maps(X, Y, rank=16, refine=refine)
        assert W.dtype == Z.dtype == dtype
        assert np.abs((X @ W) @ (Y @ Z).T - X @ Y.T).max() < 1e3 * np.finfo(dtype).eps
        assert np.abs(W).max() < 1e4
        assert np.abs(Z).max() < 1e4


def test_a_block_that_is_not_a_number_spoils_no_other() -> None:
    A = np.stack([reference.gram(draw(20, 8, seed=s)) for s in range(3)])
    B = np.stack([reference.gram(draw(30, 8, seed=9 + s)) for s in range(3)])
    rows = {"x_rows": np.full(3, 20), "y_rows": np.full(3, 30)}
    options: dict[str, Any] = {"scale": 1.0, "rank": 4, "score_tol": None, "refine": 1}
    expected = reference.subspace_maps(A, B, **rows, **options)
    A[1, 2, 3] = np.nan
    for got, want in zip(reference.subspace_maps(A, B, **rows, **options), expected, strict=True):
        assert_agrees(got[[0, 2]], want[[0, 2]], rtol=1e-9, atol=1e-12, constant_ok=True)
        assert got.shape == want.shape


def test_adding_a_vector_to_every_key_changes_nothing_but_lse() -> None:
    q, k, v = draw(1, 2, 30, 8), draw(1, 1, 40, 8, seed=1), draw(1, 1, 40, 3, seed=2)
    shift = np.linspace(-400, 400, 8)
    options: dict[str, Any] = {"scale": 0.3, "block_size": 16, "group_by": "keys", "causal_offset": 10}
    results = []
    for keys in (k, k + shift):
        maps = reference.make_maps(q, keys, rank=4, score_tol=None, refine=1, **options)
        results.append(reference.subspace_attention(q, keys, v, maps, **options))
    assert_agrees(results[1][0], results[0][0], rtol=0, atol=1e-9)
    assert_agrees(results[1][1], results[0][1] + 0.3 * (q @ shift), rtol=1e-12, atol=1e-9)


@pytest.mark.parametrize("offset", [-9, -1, 0, 3, 8])
@pytest.mark.parametrize("L", [1, 3, 4, 50])
def test_own_block_begins_at_the_first_key_that_is_owned(L: int, offset: int) -> None:
    N, M = 12, 40
    begin = reference.own_block_begin(np.arange(N), block_size=L, causal_offset=offset)
    for n in range(N):
        owned = [m for m in range(M) if definition.owns(n, m, offset, L)]
        assert begin[n] == (owned[0] if owned else 0)


def causal_results(q: np.ndarray, k: np.ndarray, v: np.ndarray, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return `subspace_attention` of a call by keys, aligned bottom-right."""
    blocks = {"block_size": 8, "group_by": "keys", "causal_offset": k.shape[2] - q.shape[2], "scale": 0.4} | options
    maps = reference.make_maps(q, k, rank=2, score_tol=None, refine=1, **blocks)
    return reference.subspace_attention(q, k, v, maps, **blocks)


@pytest.mark.parametrize(("N", "M"), [(21, 21), (13, 30), (30, 13)])
def test_one_block_of_all_keys_is_exact_causal_attention(N: int, M: int) -> None:
    q, k, v = draw(1, 2, N, 6), draw(1, 1, M, 6, seed=1) + 3, draw(1, 1, M, 3, seed=2)
    expected = reference.exact_attention(q, k, v, scale=0.4, causal_offset=M - N)
    for got, want in zip(causal_results(q, k, v, block_size=M), expected, strict=True):
        assert_agrees(got, want, rtol=0, atol=1e-9)
    assert np.abs(causal_results(q, k, v, block_size=M // 3)[0] - expected[0]).max() > 1e-2


@pytest.mark.parametrize(("N", "M"), [(30, 30), (18, 37)])
def test_later_keys_have_no_part_in_a_row_but_for_the_mean(N: int, M: int) -> None:
    """The keys after a query change places, which keeps the mean, and get other values."""
    q, k, v = draw(1, 2, N, 6), draw(1, 1, M, 6, seed=1) + 3, draw(1, 1, M, 3, seed=2)
    out, lse = causal_results(q, k, v)
    for n in (0, 7, 8, 12, N - 2):
        after = n + M - N + 1
        other_k, other_v = k.copy(), v.copy()
        other_k[:, :, after:] = k[:, :, after:][:, :, ::-1]
        other_v[:, :, after:] += 9
        other_out, other_lse = causal_results(q, other_k, other_v)
        assert_agrees(other_out[:, :, : n + 1], out[:, :, : n + 1], rtol=0, atol=1e-11)
        assert_agrees(other_lse[:, :, : n + 1], lse[:, :, : n + 1], rtol=0, atol=1e-11)
        assert np.abs(other_out[:, :, n + 1 :] - out[:, :, n + 1 :]).max() > 0.1


@pytest.mark.parametrize(("options", "rank"), [({"rank": 5}, 5), ({"score_tol": 1e-3}, 16)])
@pytest.mark.parametrize("refine", [0, 1])
def test_blocks_that_nobody_meets_have_maps_of_zero(options: dict[str, Any], rank: int, refine: int) -> None:
    """13 keys in blocks of 4, met by queries of later blocks: the last two blocks by none, as nobody sees key 12."""
    q, k = draw(1, 2, 9, 24), draw(1, 1, 13, 24, seed=1)
    maps = reference.make_maps(
        q,
        k,
        scale=0.4,
        block_size=4,
        group_by="keys",
        causal_offset=3,
        **({"rank": None, "score_tol": None, "refine": refine} | options),
    )
    assert maps.sampling[0, 0, :2].any(axis=(1, 2)).all()
    assert not maps.sampling[0, 0, 2:].any()
    assert not maps.fusion[0, 0, 2:].any()
    assert (maps.ranks[0, 0, 2:] == rank).all()
    assert (maps.score_errors[0, 0, 2:] == 0).all()


@pytest.mark.parametrize(("N", "M"), [(0, 3), (3, 0), (0, 0)])
@pytest.mark.parametrize("by", ["queries", "keys"])
def test_without_rows_there_is_nothing_and_without_keys_zero(N: int, M: int, by: str) -> None:
    q, k, v = np.ones((1, 2, N, 4)), np.ones((1, 2, M, 4)), np.ones((1, 2, M, 5))
    options: dict[str, Any] = {"scale": 1.0, "block_size": 2, "group_by": by}
    maps = reference.make_maps(q, k, rank=2, score_tol=None, refine=1, **options)
    out, lse = reference.subspace_attention(q, k, v, maps, **options)
    assert out.shape == (1, 2, N, 5)
    assert not out.any()
    assert (lse == -np.inf).all()


def test_mean_of_many_keys_is_that_of_evenly_spread_ones() -> None:
    k = np.random.default_rng(0).standard_normal((1, 2, 8200, 3))
    assert_agrees(reference.key_mean(k), k[:, :, ::4].mean(axis=2), rtol=1e-12, atol=0)
    assert_agrees(reference.key_mean(k[:, :, :4000]), k[:, :, :4000].mean(axis=2), rtol=1e-12, atol=0)
