"""The two cheap products of eq. 4: X W is a choice of columns, Y Z a weighted sum of columns (docs/math.md, eq. 8)."""

from __future__ import annotations

import numpy as np


def sample_channels(X: np.ndarray, channels: np.ndarray, group_size: int) -> np.ndarray:
    """Return X W, shape (rows, R): the first channel of each group."""
    return X[:, channels[::group_size]]


def fuse_channels(Y: np.ndarray, channels: np.ndarray, gains: np.ndarray | None, group_size: int) -> np.ndarray:
    """Return Y Z, shape (rows, R): the members of each group added up, each times its gain (eq. 8)."""
    fused = Y[:, channels[::group_size]]
    for member in range(1, group_size):
        column = Y[:, channels[member::group_size]]
        if gains is not None:
            column *= gains[member::group_size].astype(Y.dtype)
        fused += column
    return fused
