"""What happens to scaled scores before the softmax: cap, bias, mask (docs/math.md, eq. 21 to 24)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

Window = tuple[int | None, int | None]


class ScoreOptions(NamedTuple):
    """The options of a call beside the causal limit."""

    window: Window = (None, None)
    """Keys that a query sees before and after its own; None: all on that side (eq. 23)."""
    softcap: float = 0.0
    """Zero leaves the scores as they are."""
    mask: np.ndarray | None = None
    """Broadcasts to (B, H, N, M), bool: True where a query may attend."""
    bias: np.ndarray | None = None
    """Broadcasts to (B, H, N, M): added to the scores."""

    def apply(self, S: np.ndarray, b: int, h: int) -> np.ndarray:
        """Return the scores (N, M) of one head, capped, with the bias, and minus infinity where the mask hides."""
        S = cap_scores(S, self.softcap)
        if self.bias is not None:
            S = S + of_head(self.bias, b, h).astype(S.dtype)
        if self.mask is not None:
            S = np.where(of_head(self.mask, b, h), S, -np.inf)
        return S


NO_OPTIONS = ScoreOptions()


def cap_scores(S: np.ndarray, softcap: float) -> np.ndarray:
    """Return the scores in the range of plus and minus ``softcap``; as they are where that is zero (eq. 21)."""
    return softcap * np.tanh(S / softcap) if softcap else S


def key_limits(N: int, M: int, causal_offset: int | None, window: Window) -> tuple[int | None, int | None]:
    """Return (low, high): query n sees keys ``n + low <= m <= n + high`` (eq. 3 and 23); None: no limit there."""
    left, right = window
    diagonal = M - N if causal_offset is None else causal_offset
    low = None if left is None else diagonal - left
    high = causal_offset if causal_offset is not None or right is None else diagonal + right
    return low, high


def visible_keys(N: int, M: int, causal_offset: int | None, window: Window = (None, None)) -> np.ndarray:
    """Return the (N, M) table of eq. 3 and 23: True where query n sees key m."""
    low, high = key_limits(N, M, causal_offset, window)
    distance = np.arange(M) - np.arange(N)[:, None]
    seen = np.ones((N, M), dtype=bool)
    if low is not None:
        seen &= distance >= low
    if high is not None:
        seen &= distance <= high
    return seen


def of_head(array: np.ndarray, b: int, h: int) -> np.ndarray:
    """Return what broadcasts to the (N, M) of one head from an array that broadcasts to (B, H, N, M)."""
    array = array[(np.newaxis,) * (4 - array.ndim)]
    head: np.ndarray = array[b % array.shape[0], h % array.shape[1]]
    return head
