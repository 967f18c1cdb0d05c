"""One result from two over disjoint keys: what splits keys over devices, passes or caches needs afterwards."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import numpy as np

from . import backends, checks
from .arrays import kind_of, on_stream, sum_type
from .reference import merge_results


def merge(
    out_a: Any, lse_a: Any, out_b: Any, lse_b: Any, *, layout: str = "bhnd", stream: Any = None
) -> tuple[Any, Any]:
    """Return attention over all keys from two results over disjoint parts of them.

    Associative and commutative up to rounding, so any number of parts can be merged in any order. A part in which a
    query saw no key (zero, lse minus infinity) changes nothing.

    Parameters
    ----------
    out_a, out_b : array, shape (B, H, N, E) in ``layout``, float16 | bfloat16 | float32 | float64
        Results for the same queries, of one dtype and kind: NumPy, CuPy or Numba device arrays.
    lse_a, lse_b : array, shape (B, H, N), float32, kind of ``out_a``
        Their log-sum-exp, as ``return_lse=True`` gives it.
    layout : {"bhnd", "bnhd"}
        Order of the axes of the results; "bnhd" is (B, N, H, E).
    stream : int or stream, optional
        What it runs on, with device arrays; as in `distr_attention`.

    Returns
    -------
    out : array, shape (B, H, N, E) in ``layout``, dtype, kind and device of ``out_a``
        New memory; the arguments are left as they are.
    lse : array, shape (B, H, N), float32

    Raises
    ------
    TypeError
        If an array is of another kind or dtype than ``out_a``, or of none that is supported.
    ValueError
        If shapes differ; the text names the argument.

    Notes
    -----
    Equation (25) of docs/math.md, in float32, or float64 for float64 results. lse is float32, so the weights of the
    parts are good to about 1e-7 times lse, whatever the dtype of the results.

    Examples
    --------
    >>> import numpy as np
    >>> from distrattn_np import exact_attention
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 1, 2, 8, 4))
    >>> parts = [exact_attention(q, k[:, :, keys], v[:, :, keys], return_lse=True) for keys in (slice(5), slice(5, 8))]
    >>> out, lse = merge(*parts[0], *parts[1])
    >>> np.allclose(out, exact_attention(q, k, v), atol=1e-6)
    True
    """
    handle = checks.check_stream(stream)
    checks.check_merge(out_a, lse_a, out_b, lse_b, layout=layout, stream=stream)
    if kind_of(out_a) == "numba":
        merge_on_numba = backends.load_by_name("numba").merge_results  # type: ignore[attr-defined]
        merged: tuple[Any, Any] = merge_on_numba(out_a, lse_a, out_b, lse_b, layout, handle)
        return merged
    with out_a.device if kind_of(out_a) == "cupy" else nullcontext(), on_stream(handle):
        return _merge(out_a, lse_a, out_b, lse_b, layout)


def _merge(out_a: Any, lse_a: Any, out_b: Any, lse_b: Any, layout: str) -> tuple[Any, Any]:
    """Merge NumPy or CuPy arrays."""
    dtype = sum_type(out_a.dtype)
    lse_a, lse_b = (x.astype(dtype).swapaxes(1, 2) if layout == "bnhd" else x.astype(dtype) for x in (lse_a, lse_b))
    out, lse = merge_results(out_a.astype(dtype), lse_a, out_b.astype(dtype), lse_b)
    return out.astype(out_a.dtype), (lse.swapaxes(1, 2) if layout == "bnhd" else lse).astype(np.float32)
