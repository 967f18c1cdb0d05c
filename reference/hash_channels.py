"""Locality-sensitive hashing of channels: which columns of a block point the same way (docs/math.md, eq. 5)."""

from __future__ import annotations

from typing import Any

import numpy as np

HASH_BITS = 16
"""P: signs, and bits, per channel."""


def hyperplanes(seed: int, block_size: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Return the hyperplane normals g, shape (L, P), float32: one draw per call, shared by every backend.

    A block shorter than ``block_size`` uses the first rows.
    """
    generator = np.random.Generator(np.random.PCG64(seed))
    return generator.standard_normal((block_size, HASH_BITS), dtype=np.float32)


def hash_channels(X: np.ndarray, planes: np.ndarray) -> np.ndarray[Any, np.dtype[np.uint16]]:
    """Return one 16-bit word per channel: bit p is set where ``x_j . g_p > 0`` (eq. 5).

    Parameters
    ----------
    X : array, shape (rows, D)
        One block, at most L rows.
    planes : array, shape (L, P)
        From `hyperplanes`.

    Returns
    -------
    array, shape (D,), uint16
        A NaN never counts as positive.
    """
    signs = X.T.astype(np.float64) @ planes[: len(X)].astype(np.float64) > 0
    bits = np.uint16(1) << np.arange(HASH_BITS, dtype=np.uint16)
    words: np.ndarray[Any, np.dtype[np.uint16]] = np.where(signs, bits, np.uint16(0)).sum(axis=1, dtype=np.uint16)
    return words
