"""Squared lengths of channels (docs/math.md, eq. 9)."""

from __future__ import annotations

import numpy as np


def channel_norms(Y: np.ndarray) -> np.ndarray:
    """Return the squared Euclidean length of every column of Y (rows, D), shape (D,)."""
    norms: np.ndarray = np.einsum("nd,nd->d", Y, Y)
    return norms
