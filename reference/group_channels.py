"""From hash words to groups of channels (docs/math.md, eq. 6 and 7)."""

from __future__ import annotations

from typing import Any

import numpy as np

Words = np.ndarray[Any, np.dtype[np.uint16]]


def gray_rank(words: Words) -> Words:
    """Return each 16-bit word's position in the Gray code (eq. 6): words of neighbouring ranks differ in one bit."""
    rank = words.copy()
    for shift in (1, 2, 4, 8):
        rank ^= rank >> np.uint16(shift)
    return rank


def group_channels(words: Words) -> np.ndarray[Any, np.dtype[np.int32]]:
    """Return the channels sorted stably by Gray rank, shape (D,), int32: every G neighbours form a group (eq. 7)."""
    return np.argsort(gray_rank(words), kind="stable").astype(np.int32)
