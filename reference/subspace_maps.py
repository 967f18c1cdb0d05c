"""The maps of blocks from their Gram matrices: which R directions a block keeps (docs/math.md, eq. 13 to 19).

Every array may have leading axes, over blocks: small matrices are quick only in stacks.
"""

from __future__ import annotations

from contextlib import suppress

import numpy as np

RANK_STEP = 16
"""Ranks that ``score_tol`` chooses from are multiples of this, the depth of one tensor-core product; and D."""


def subspace_maps(
    A: np.ndarray,
    B: np.ndarray,
    *,
    x_rows: np.ndarray,
    y_rows: np.ndarray,
    scale: float,
    rank: int | None,
    score_tol: float | None,
    refine: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return W and Z (..., D, R), the blocks' ranks (...) and their predicted score errors (...).

    Parameters
    ----------
    A, B : array, shape (..., D, D)
        Gram matrices of each block and of the rows that meet it.
    x_rows, y_rows : array, shape (...)
        How many rows A and B are sums over.
    scale : float
        Multiplies the scores.
    rank : int or None
        R, less than D. None: each block's own, the smallest that keeps the predicted error within ``score_tol``; W and
        Z have D columns then, zero from the block's rank on.
    score_tol : float or None
        In nats. Only without ``rank``.
    refine : int
        How many refinements.
    """
    D = A.shape[-1]
    channels = choose_channels(A, B, D if rank is None else rank)
    W = (np.arange(D)[:, np.newaxis] == channels[..., np.newaxis, :]).astype(A.dtype)
    W, Z = half_step(W, A)
    for _ in range(refine):
        Z, W = half_step(Z, B)
        W, Z = half_step(W, A)
    W, Z = balance_columns(W, Z, A, B, x_rows, y_rows)
    per_score = abs(scale) / np.sqrt(np.maximum(x_rows * y_rows, 1))
    errors = score_errors(W, Z, A, B) * per_score[..., np.newaxis]
    if score_tol is None:
        return W, Z, np.full(errors.shape[:-1], rank), errors[..., -1]
    ranks = choose_ranks(errors, score_tol)
    is_kept = np.arange(D) < ranks[..., np.newaxis, np.newaxis]
    is_exact = (ranks == D)[..., np.newaxis, np.newaxis]
    W, Z = (np.where(is_exact, np.eye(D), np.where(is_kept, x, 0)) for x in (W, Z))
    own = np.take_along_axis(errors, ranks[..., np.newaxis] - 1, axis=-1)[..., 0]
    return W, Z, ranks, np.where(ranks == D, 0, own)


def choose_channels(A: np.ndarray, B: np.ndarray, rank: int) -> np.ndarray:
    """Return R channels (..., R), each the one of most weight outside the span of those before it (eq. 15)."""
    weights = np.diagonal(B, axis1=-2, axis2=-1)
    lengths = np.diagonal(A, axis1=-2, axis2=-1)
    outside = lengths.copy()
    is_free = np.ones(A.shape[:-1], dtype=bool)
    F = np.zeros((*A.shape[:-1], rank), A.dtype)
    channels = np.zeros((*A.shape[:-2], rank), np.intp)
    for r in range(rank):
        j = np.where(is_free, outside * weights, -1).argmax(axis=-1)[..., np.newaxis]
        channels[..., r] = j[..., 0]
        np.put_along_axis(is_free, j, False, axis=-1)
        column = np.take_along_axis(A, j[..., np.newaxis], axis=-1)
        row = np.take_along_axis(F, j[..., np.newaxis], axis=-2)
        left = column - F @ row.swapaxes(-1, -2)
        pivot = np.take_along_axis(outside, j, axis=-1)
        F[..., r] = np.divide(left[..., 0], np.sqrt(pivot), out=F[..., r], where=pivot > 0)
        outside = outside - F[..., r] ** 2
        outside[outside <= rounding(A) * lengths] = 0
    return channels


def half_step(W: np.ndarray, A: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return eq. 16: W in the basis where X W has orthonormal columns, and the best Z for it, ``A W``.

    With Z and B in their places it returns Z in such a basis and the best W for it.
    """
    T = A @ W
    products = W.swapaxes(-1, -2) @ T
    squares = np.diagonal(products, axis1=-2, axis2=-1)[..., np.newaxis, :]
    uncancelled = (np.diagonal(A, axis1=-2, axis2=-1)[..., np.newaxis] * W**2).sum(axis=-2, keepdims=True)
    unit = np.zeros_like(squares)
    np.power(squares, -0.5, out=unit, where=squares > rounding(A) * uncancelled)
    C, is_kept = cholesky(products * unit * unit.swapaxes(-1, -2))
    W, Z = (np.linalg.solve(C, (x * unit).swapaxes(-1, -2)).swapaxes(-1, -2) * is_kept for x in (W, T))
    return W, Z


def cholesky(M: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return C (..., R, R) of M whose diagonal is 1 or 0, and which rows were kept (..., 1, R).

    A row within rounding of the span of those before it is left out: its column of C is that of the identity.
    """
    with suppress(np.linalg.LinAlgError):  # where every row is kept, LAPACK gives the same, and sooner
        C = np.linalg.cholesky(M)
        if (np.diagonal(C, axis1=-2, axis2=-1) ** 2 > rounding(M)).all():
            return C, np.ones((*M.shape[:-2], 1, M.shape[-1]), dtype=bool)
    C = np.zeros_like(M)
    is_kept = np.zeros((*M.shape[:-2], 1, M.shape[-1]), dtype=bool)
    for r in range(M.shape[-1]):
        column = M[..., r:, r] - (C[..., r:, :r] @ C[..., r, :r, np.newaxis])[..., 0]
        pivot = column[..., 0]
        kept = pivot > rounding(M)
        C[..., r, r] = 1
        np.divide(
            column, np.sqrt(np.where(kept, pivot, 1))[..., np.newaxis], out=C[..., r:, r], where=kept[..., np.newaxis]
        )
        is_kept[..., 0, r] = kept
    return C, is_kept


def rounding(A: np.ndarray) -> float:
    """Return the part of a squared length that is as good as nothing in the precision of A."""
    return 16 * float(np.finfo(A.dtype).eps)


def balance_columns(
    W: np.ndarray, Z: np.ndarray, A: np.ndarray, B: np.ndarray, x_rows: np.ndarray, y_rows: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return W and Z with equal mean squares in the columns of X W and Y Z (eq. 17); zero where a product is zero."""
    x_count, y_count = (np.maximum(rows, 1)[..., np.newaxis, np.newaxis].astype(W.dtype) for rows in (x_rows, y_rows))
    x_squares = (W * (A @ W)).sum(axis=-2, keepdims=True) / x_count
    y_squares = (Z * (B @ Z)).sum(axis=-2, keepdims=True) / y_count
    # so written that NaN is kept
    is_zero = (x_squares <= 0) | (y_squares <= 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        s = np.sqrt(np.sqrt(y_squares)) / np.sqrt(np.sqrt(x_squares))
        return np.where(is_zero, 0, W * s), np.where(is_zero, 0, Z / s)


def score_errors(W: np.ndarray, Z: np.ndarray, A: np.ndarray, B: np.ndarray) -> np.ndarray:
    """Return the length of ``X Y^T - (X W)(Y Z)^T`` with the first 1, 2, ..., R columns, shape (..., R) (eq. 18)."""
    BZ, AW = B @ Z, A @ W
    cross = (BZ * AW).sum(axis=-2).cumsum(axis=-1)
    squares = (Z.swapaxes(-1, -2) @ BZ) * (W.swapaxes(-1, -2) @ AW)
    leading = np.diagonal(squares.cumsum(axis=-1).cumsum(axis=-2), axis1=-2, axis2=-1)
    whole = (A * B).sum(axis=(-2, -1))[..., np.newaxis]
    lengths: np.ndarray = np.sqrt(np.maximum(whole - 2 * cross + leading, 0))
    return lengths


def choose_ranks(errors: np.ndarray, score_tol: float) -> np.ndarray:
    """Return the smallest multiples of 16 below D whose errors (..., D) are within ``score_tol``, or D (eq. 19)."""
    D = errors.shape[-1]
    ranks = np.append(np.arange(RANK_STEP, D, RANK_STEP), D)
    is_enough = errors[..., ranks - 1] <= score_tol
    is_enough[..., -1] = True
    chosen: np.ndarray = ranks[is_enough.argmax(axis=-1)]
    return chosen
