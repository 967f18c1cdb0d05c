"""The parts that the models share, written once over an array module ``xp``: NumPy or CuPy."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import numpy as np

Attention = Callable[..., Any]
"""``attention(q, k, v, causal=...)``: q (B, H, N, D), k (B, H_kv, N, D), v (B, H_kv, N, E) to (B, H, N, E)."""
Weights = dict[str, Any]
"""Arrays of the module that the model runs on, under the names of the file that they come from."""


def array_module(backend: str) -> Any:
    """Return NumPy, or CuPy for the backend "cupy"."""
    return np if backend == "numpy" else import_module("cupy")


def to_host(array: Any) -> np.ndarray:
    """Return a NumPy or CuPy array as a NumPy array."""
    host: np.ndarray = array.get() if hasattr(array, "get") else array
    return host


def on_device(weights: Weights, xp: Any) -> Weights:
    """Return the weights as float32 arrays of ``xp``."""
    return {name: xp.asarray(array, dtype=xp.float32) for name, array in weights.items()}


def rms_norm(xp: Any, x: Any, weight: Any, epsilon: float) -> Any:
    """Return the rows of x over their root mean square, times ``weight``."""
    return x / xp.sqrt(xp.mean(x * x, axis=-1, keepdims=True) + epsilon) * weight


def layer_norm(xp: Any, x: Any, weight: Any, bias: Any, epsilon: float) -> Any:
    """Return the rows of x less their mean, over their standard deviation, times ``weight`` plus ``bias``."""
    centred = x - xp.mean(x, axis=-1, keepdims=True)
    return centred / xp.sqrt(xp.mean(centred * centred, axis=-1, keepdims=True) + epsilon) * weight + bias


def silu(xp: Any, x: Any) -> Any:
    """Return ``x sigmoid(x)``; tanh does not overflow where exp would."""
    return 0.5 * x * (1 + xp.tanh(0.5 * x))


def gelu(xp: Any, x: Any) -> Any:
    """Return ``x Phi(x)`` with the normal distribution's Phi, not its tanh approximation."""
    special = import_module("scipy.special" if xp is np else "cupyx.scipy.special")
    return 0.5 * x * (1 + special.erf(x / np.sqrt(2).astype(np.float32)))


def split_heads(x: Any, heads: int) -> Any:
    """Return (B, N, heads * D) as a (B, heads, N, D) view, which attention reads where it lies."""
    batch, rows, width = x.shape
    return x.reshape(batch, rows, heads, width // heads).transpose(0, 2, 1, 3)


def join_heads(x: Any) -> Any:
    """Return (B, heads, N, D) as (B, N, heads * D)."""
    batch, heads, rows, width = x.shape
    return x.transpose(0, 2, 1, 3).reshape(batch, rows, heads * width)


def rotary_angles(xp: Any, rows: int, width: int, base: float) -> tuple[Any, Any]:
    """Return cosine and sine of ``n base^(-2i/D)``, (rows, D / 2) float32, from angles in float64."""
    angles = np.arange(rows)[:, np.newaxis] * base ** (-np.arange(0, width, 2) / width)
    return xp.asarray(np.cos(angles), dtype=xp.float32), xp.asarray(np.sin(angles), dtype=xp.float32)


def rotate(xp: Any, x: Any, cosine: Any, sine: Any) -> Any:
    """Return x (B, H, N, D) with the pairs of channels (2i, 2i + 1) turned by their row's angle i."""
    even, odd = x[..., 0::2], x[..., 1::2]
    turned = xp.empty_like(x)
    turned[..., 0::2] = even * cosine - odd * sine
    turned[..., 1::2] = even * sine + odd * cosine
    return turned
