"""What the approximations share."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import numpy as np

from ...arrays import kind_of


def array_module(array: Any) -> Any:
    """Return the module of a NumPy or CuPy array."""
    return np if kind_of(array) == "numpy" else import_module("cupy")


def for_query_heads(array: Any, heads: int) -> Any:
    """Return (B, H_kv, M, width) as (B, H, M, width): neighbouring query heads share a key/value head."""
    repeats = heads // array.shape[1]
    return array if repeats == 1 else array.repeat(repeats, axis=1)


def softmax(xp: Any, scores: Any) -> Any:
    """Return the softmax over the last axis."""
    weights = xp.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def even_edges(rows: int, parts: int) -> list[int]:
    """Return the edges of ``parts`` runs of rows, as equal in length as can be."""
    return [rows * part // parts for part in range(parts + 1)]
