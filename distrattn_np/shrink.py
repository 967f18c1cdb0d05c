"""Fewer keys and narrower values: smaller inputs that any call can have in the place of its own.

Plain array operations of NumPy or CuPy, on the device that holds the arrays.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from . import checks
from .arrays import kind_of, sum_type
from .problem import ceil_div

_STEPS = 2
"""Of the power iteration for the direction of a segment. One gives poorer clusters, a third little more."""


class PooledKeys(NamedTuple):
    """Means of clusters of keys and values, in the place of k and v."""

    k: Any
    """(B, H_kv, C, D) in the layout of the keys, C = ceil(M / size)."""
    v: Any
    """(B, H_kv, C, E) in the same layout."""
    bias: Any
    """(1, 1, 1, C) float32: the logarithm of the number of keys of each cluster, for the call's ``bias``."""


def pool_keys(k: Any, v: Any, size: int, *, layout: str = "bhnd") -> PooledKeys:
    """Return ceil(M / size) keys and values that stand for all M, each the mean of a cluster.

    Every key keeps its part in the result, so nothing of the context is left out; a call takes 1 / size of the work,
    and finding the clusters log2(M / size) passes over the keys and values. It is exact where the keys of a cluster are
    equal, and near to exact where their scores are. Order is lost: a call with what comes back must not be causal and
    must have no window, nor a mask by position.

    Parameters
    ----------
    k : array, shape (B, H_kv, M, D) in ``layout``, float16 | bfloat16 | float32 | float64
        Keys: a NumPy or CuPy array. Every key head is clustered by itself.
    v : array, shape (B, H_kv, M, E) in ``layout``, kind, dtype and device of ``k``
    size : int
        Keys of a cluster, at least 1; the last one has those that are left.
    layout : {"bhnd", "bnhd"}
        Order of the axes; "bnhd" is (B, M, H_kv, D).

    Returns
    -------
    PooledKeys
        ``k``, ``v`` and ``bias``, new memory. Where ``size`` divides M, ``bias`` is the same for all: it changes the
        log-sum-exp and no output, and a call is faster without it.

    Raises
    ------
    TypeError, ValueError
        If an argument is none of these; the text names it.

    Notes
    -----
    Equations (31) and (32) of docs/math.md. Clusters are leaves of a tree: a segment of rows (k, v), each side with a
    root-mean-square of 1, is sorted along one direction and cut, until segments have ``size`` rows. The direction is
    two steps of a power iteration from the row farthest from the mean. Computed in float32, or float64 for float64.

    Examples
    --------
    >>> import numpy as np
    >>> from distrattn_np import exact_attention
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 1, 2, 8, 4))
    >>> twice = [x.repeat(2, axis=2) for x in (k, v)]
    >>> pooled = pool_keys(*twice, 2)
    >>> pooled.k.shape
    (1, 2, 8, 4)
    >>> np.allclose(exact_attention(q, pooled.k, pooled.v, bias=pooled.bias), exact_attention(q, *twice))
    True
    """
    size = checks.check_pooling(k, v, size=size, layout=layout)
    with _namespace_of(k) as xp:
        K, V = (_in_native_order(x, layout) for x in (k, v))
        rows = K.shape[2]
        size = min(size, max(rows, 1))
        real = sum_type(K.dtype)
        wide = [x.astype(real) for x in (K, V)]
        order = _order_of_clusters(xp, xp.concatenate([_of_unit_size(xp, x) for x in wide], axis=3), size)
        counts = np.minimum(size, rows - size * np.arange(ceil_div(rows, size)))
        means = (_means_of_clusters(xp, x, order, counts, size).astype(K.dtype) for x in wide)
        bias = xp.asarray(np.log(counts), np.float32).reshape(1, 1, 1, len(counts))
        pooled_k, pooled_v = (_in_native_order(x, layout) for x in means)
        return PooledKeys(pooled_k, pooled_v, bias)


@dataclass(frozen=True, slots=True)
class ProjectedValues:
    """Values in the coordinates in which they vary most, and how results come back from there."""

    values: Any
    """(B, H_kv, M, R) in the layout of the values, in the place of v."""
    basis: Any
    """(B, H_kv, E, R) float32, or float64 for float64 values: orthonormal columns."""
    mean: Any
    """(B, H_kv, 1, E), the same type: the mean of the values."""
    layout: str

    def restore(self, out: Any, lse: Any = None) -> Any:
        """Return a result over ``values``, (B, H, N, R) in the layout, as one over the values themselves, (B, H, N, E).

        Parameters
        ----------
        out : array, shape (B, H, N, R) in the layout, kind and device of the values
        lse : array, shape (B, H, N), float32, optional
            Of the same call. A query that saw no key, with a log-sum-exp of minus infinity, gets zeros; without ``lse``
            it gets the mean of the values.

        Returns
        -------
        array, shape (B, H, N, E) in the layout, dtype of ``out``

        Raises
        ------
        TypeError, ValueError
            If an argument is none of these; the text names it.
        """
        checks.check_restoring(out, lse, values=self.values, layout=self.layout)
        with _namespace_of(out) as xp:
            native = _in_native_order(out, self.layout)
            batch, heads, rows, rank = native.shape
            kv_heads, width = self.basis.shape[1:3]
            shared_rows = heads // max(kv_heads, 1) * rows  # of the query heads that share a key head
            shared = native.astype(self.basis.dtype).reshape(batch, kv_heads, shared_rows, rank)
            wide = (shared @ self.basis.swapaxes(2, 3) + self.mean).reshape(batch, heads, rows, width)
            if lse is not None:
                wide = xp.where(xp.isneginf(lse)[..., np.newaxis], 0, wide)
            return _in_native_order(wide.astype(out.dtype), self.layout)


def project_values(v: Any, rank: int, *, layout: str = "bhnd") -> ProjectedValues:
    """Return values of ``rank`` channels: their coordinates along the directions in which they vary most.

    The product of the weights with them takes rank / E of the work. ``restore`` turns a call's result back: weights add
    up to 1, so the mean of the values comes back as it is, and only what varies outside the chosen directions is lost,
    or nothing where the values vary in no more than ``rank``. Works with any call, causal or not.

    Parameters
    ----------
    v : array, shape (B, H_kv, M, E) in ``layout``, float16 | bfloat16 | float32 | float64
        Values: a NumPy or CuPy array. Every key head has directions of its own.
    rank : int
        Channels to keep, 1 to E.
    layout : {"bhnd", "bnhd"}
        Order of the axes; "bnhd" is (B, M, H_kv, E).

    Returns
    -------
    ProjectedValues
        New memory.

    Raises
    ------
    TypeError, ValueError
        If an argument is none of these; the text names it.

    Notes
    -----
    Equation (33) of docs/math.md: eigenvectors of the covariance, by ``linalg.eigh`` of the arrays' package, in
    float32, or float64 for float64 values. docs/models.md says for which models this is near to exact.

    Examples
    --------
    >>> import numpy as np
    >>> from distrattn_np import exact_attention
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 1, 2, 8, 4))
    >>> v[..., 2:] = v[..., :2] @ [[1, 2], [3, 4]] + 5  # varies in two directions
    >>> projected = project_values(v, 2)
    >>> out = projected.restore(exact_attention(q, k, projected.values))
    >>> np.allclose(out, exact_attention(q, k, v))
    True
    """
    rank = checks.check_projection(v, rank=rank, layout=layout)
    with _namespace_of(v) as xp:
        V = _in_native_order(v, layout)
        wide = V.astype(sum_type(V.dtype))
        mean = wide.sum(axis=2, keepdims=True) / max(wide.shape[2], 1)
        centred = wide - mean
        scaled = centred / _size_of_heads(xp, centred)  # squares of large values would not be finite
        covariance = scaled.swapaxes(2, 3) @ scaled
        covariance = xp.where(xp.isfinite(covariance), covariance, 0)  # of a head with a NaN: any basis will do
        basis = xp.ascontiguousarray(xp.linalg.eigh(covariance)[1][..., ::-1][..., :rank])
        return ProjectedValues(_in_native_order((centred @ basis).astype(V.dtype), layout), basis, mean, layout)


@contextmanager
def _namespace_of(array: Any) -> Iterator[ModuleType]:
    """Make the device of ``array`` current, and give the package that computes with it."""
    if kind_of(array) == "numpy":
        with np.errstate(invalid="ignore", over="ignore"):  # as on a device
            yield np
        return
    import cupy

    with array.device:
        yield cupy


def _in_native_order(array: Any, layout: str) -> Any:
    """Return a view as (B, H, rows, width), or one of these in the layout."""
    return array.swapaxes(1, 2) if layout == "bnhd" else array


def _of_unit_size(xp: ModuleType, x: Any) -> Any:
    """Return the rows of each head around their mean, with a root-mean-square length of 1."""
    if x.shape[2] == 0:
        return x
    centred = x - x.mean(axis=2, keepdims=True)
    centred = centred / _size_of_heads(xp, centred)
    length = xp.sqrt((centred**2).sum(axis=3, keepdims=True).mean(axis=2, keepdims=True))
    return centred / xp.where(length > 0, length, 1)


def _size_of_heads(xp: ModuleType, x: Any) -> Any:
    """Return the largest absolute value of each head (B, H, 1, 1), 1 where that is zero."""
    if x.size == 0:
        return 1
    size = xp.abs(x).max(axis=(2, 3), keepdims=True)
    return xp.where(size > 0, size, 1)


def _means_of_clusters(xp: ModuleType, rows: Any, order: Any, counts: np.ndarray, size: int) -> Any:
    """Return the means (B, H, C, W) of rows (B, H, M, W), of which in this order ``counts`` (C,) follow each other."""
    batch, heads, count, width = rows.shape
    spare = xp.zeros((batch, heads, len(counts) * size - count, width), rows.dtype)  # fills up the last cluster
    in_order = xp.concatenate([_rows_at(xp, rows, order), spare], axis=2)
    sums = in_order.reshape(batch, heads, len(counts), size, width).sum(axis=3)
    return sums / xp.asarray(counts, rows.dtype)[:, np.newaxis]


def _order_of_clusters(xp: ModuleType, rows: Any, size: int) -> Any:
    """Return an order (B, H, M) of rows (B, H, M, W) in which clusters of ``size`` follow each other.

    All segments of a level are cut at once, each in the middle, but behind whole clusters: they differ by one cluster
    at most, and are filled up to the same length with places that do not count.
    """
    batch, heads, count, _ = rows.shape
    counts = np.array([count])  # rows of each segment
    order = xp.broadcast_to(xp.arange(count), (batch, heads, 1, count))
    while batch * heads and counts.max() > size:
        taken = np.arange(order.shape[3]) < counts[:, np.newaxis]
        order = xp.take_along_axis(order, _order_along_a_direction(xp, rows, order, xp.asarray(taken)), axis=3)
        firsts = np.minimum(counts, (counts - 1 + 2 * size) // (2 * size) * size)  # half of the clusters, or one more
        begins = order.shape[3] * np.arange(len(counts)) + np.stack([np.zeros_like(firsts), firsts])
        counts = np.stack([firsts, counts - firsts], axis=1).ravel()
        places = np.minimum(begins.T.reshape(-1, 1) + np.arange(counts.max()), order[0, 0].size - 1)
        order = order.reshape(batch, heads, -1)[..., xp.asarray(places)]
    places = np.flatnonzero(np.arange(order.shape[3]) < counts[:, np.newaxis])
    return order.reshape(batch, heads, order.shape[2] * order.shape[3])[..., xp.asarray(places)]


def _order_along_a_direction(xp: ModuleType, rows: Any, order: Any, taken: Any) -> Any:
    """Return how rows of each segment, order (B, H, S, length), are sorted; those not ``taken`` (S, length) last."""
    members = _rows_at(xp, rows, order)
    weights = taken[..., np.newaxis].astype(rows.dtype)
    mean = (members * weights).sum(axis=3, keepdims=True) / xp.maximum(weights.sum(axis=1, keepdims=True), 1)
    centred = (members - mean) * weights
    farthest = (centred**2).sum(axis=4).argmax(axis=3)
    direction = xp.take_along_axis(centred, farthest[..., np.newaxis, np.newaxis], axis=3).swapaxes(3, 4)
    for _ in range(_STEPS):
        direction = centred.swapaxes(3, 4) @ (centred @ direction)
        length = xp.abs(direction).max(axis=3, keepdims=True)
        direction = direction / xp.where(length > 0, length, 1)
    heights = (centred @ direction)[..., 0]
    return xp.where(taken & xp.isfinite(heights), heights, np.inf).argsort(axis=3, kind="stable")


def _rows_at(xp: ModuleType, rows: Any, places: Any) -> Any:
    """Return of rows (B, H, M, W) those at places (B, H, ...) of each head, as (B, H, ..., W)."""
    batch, heads, count, width = rows.shape
    first_of_head = xp.arange(batch * heads).reshape(batch, heads, *[1] * (places.ndim - 2)) * count
    return rows.reshape(batch * heads * count, width)[places + first_of_head]
