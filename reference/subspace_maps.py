"""The maps of one block from its two Gram matrices: which R directions it keeps (docs/math.md, eq. 13 to 18)."""

from __future__ import annotations

import numpy as np

RIDGE = 1e-6
"""Added to the squared unit length of every column before the Cholesky factor is taken (eq. 15)."""
RANK_STEP = 16
"""Ranks that ``score_tol`` chooses from are multiples of this, the depth of one tensor-core product; and D."""


def subspace_maps(
    A: np.ndarray,
    B: np.ndarray,
    *,
    x_rows: int,
    y_rows: int,
    scale: float,
    rank: int | None,
    score_tol: float | None,
    refine: int,
) -> tuple[np.ndarray, np.ndarray, int, float]:
    """Return W and Z (D, R), the block's rank and its predicted score error.

    Parameters
    ----------
    A, B : array, shape (D, D)
        Gram matrices of the block and of the rows that meet it.
    x_rows, y_rows : int
        Rows that A and B are sums over.
    scale : float
        Multiplies the scores.
    rank : int or None
        R; None: the smallest that keeps the predicted error within ``score_tol``, and W and Z have D columns, zero from
        the rank on.
    score_tol : float or None
        In nats. Only without ``rank``.
    refine : int
        Refinements.
    """
    D = len(A)
    if rank == D:
        return np.eye(D), np.eye(D), D, 0.0
    W = np.eye(D)[:, choose_channels(A, B, D if rank is None else rank)]
    W, Z = half_step(W, A)
    for _ in range(refine):
        Z, W = half_step(Z, B)
        W, Z = half_step(W, A)
    W, Z = balance_columns(W, Z, A, B, x_rows, y_rows)
    errors = score_errors(W, Z, A, B) * abs(scale) / np.sqrt(max(x_rows * y_rows, 1))
    if rank is None:
        assert score_tol is not None
        rank = choose_rank(errors, score_tol)
        if rank == D:
            return np.eye(D), np.eye(D), D, 0.0
        W[:, rank:] = Z[:, rank:] = 0
    return W, Z, rank, float(errors[rank - 1])


def choose_channels(A: np.ndarray, B: np.ndarray, rank: int) -> np.ndarray:
    """Return the channels of largest ``|x_j| |y_j|``, the largest first and the earliest of equals."""
    weights = np.sqrt(A.diagonal()) * np.sqrt(B.diagonal())
    return np.argsort(-weights, kind="stable")[:rank]


def half_step(W: np.ndarray, A: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return eq. 15: W in the basis where X W has orthonormal columns, and the best Z for it, ``A W``.

    With Z and B in their places it returns Z in such a basis and the best W for it.
    """
    T = A @ W
    products = W.T @ T
    lengths = np.sqrt(np.maximum(products.diagonal(), 0))
    unit = np.divide(1, lengths, out=np.zeros_like(lengths), where=lengths > 0)
    cosines = products * unit * unit[:, np.newaxis]
    if not np.isfinite(cosines).all():  # NaN or infinity in the block: no factor exists
        return np.full_like(W, np.nan), np.full_like(W, np.nan)
    C = np.linalg.cholesky(cosines + RIDGE * np.eye(len(cosines)))
    return np.linalg.solve(C, (W * unit).T).T, np.linalg.solve(C, (T * unit).T).T


def balance_columns(
    W: np.ndarray, Z: np.ndarray, A: np.ndarray, B: np.ndarray, x_rows: int, y_rows: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return W and Z with equal mean squares in the columns of X W and Y Z (eq. 16); zero where a product is zero."""
    x_squares = np.einsum("dr,dr->r", W, A @ W) / max(x_rows, 1)
    y_squares = np.einsum("dr,dr->r", Z, B @ Z) / max(y_rows, 1)
    # written so that NaN is kept
    is_zero = (x_squares <= 0) | (y_squares <= 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        s = np.sqrt(np.sqrt(y_squares)) / np.sqrt(np.sqrt(x_squares))
        return np.where(is_zero, 0, W * s), np.where(is_zero, 0, Z / s)


def score_errors(W: np.ndarray, Z: np.ndarray, A: np.ndarray, B: np.ndarray) -> np.ndarray:
    """Return the Frobenius norm of ``X Y^T - (X W)(Y Z)^T`` with the first 1, 2, ..., R columns, (R,) (eq. 17)."""
    cross = np.einsum("dr,dr->r", B @ Z, A @ W)
    squares = (Z.T @ B @ Z) * (W.T @ A @ W)
    leading = squares.cumsum(axis=0).cumsum(axis=1).diagonal()
    norms: np.ndarray = np.sqrt(np.maximum(np.vdot(A, B) - 2 * cross.cumsum() + leading, 0))
    return norms


def choose_rank(errors: np.ndarray, score_tol: float) -> int:
    """Return the smallest multiple of 16 below D whose error is within ``score_tol``, or D (eq. 18)."""
    D = len(errors)
    for rank in range(RANK_STEP, D, RANK_STEP):
        if errors[rank - 1] <= score_tol:
            return rank
    return D
