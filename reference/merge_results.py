"""One result from two over disjoint keys (docs/math.md, eq. 25)."""

from __future__ import annotations

from typing import Any

import numpy as np


def merge_results(out_a: Any, lse_a: Any, out_b: Any, lse_b: Any) -> tuple[Any, Any]:
    """Return attention over two disjoint sets of keys, (B, H, N, E), and its lse (B, H, N), from that over each.

    A row that saw nothing in one set has an lse of minus infinity there, and no weight. NumPy's functions hand CuPy
    arrays on to CuPy.
    """
    largest = np.maximum(lse_a, lse_b)
    shift = np.where(largest == -np.inf, np.zeros_like(largest), largest)
    weight_a, weight_b = np.exp(lse_a - shift), np.exp(lse_b - shift)
    total = weight_a + weight_b
    with np.errstate(divide="ignore"):
        lse = np.log(total) + shift
    divisor = np.where(total == 0, np.ones_like(total), total)
    return (weight_a[..., np.newaxis] * out_a + weight_b[..., np.newaxis] * out_b) / divisor[..., np.newaxis], lse
