"""Gram matrices (docs/math.md, eq. 11)."""

from __future__ import annotations

import numpy as np


def gram(X: np.ndarray) -> np.ndarray:
    """Return ``X^T X``, shape (D, D), of X (rows, D): all inner products of its channels."""
    product: np.ndarray = X.T @ X
    return product
