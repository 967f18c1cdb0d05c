"""`GroupedKeys` of Numba device arrays: the steps of a plain call for each block, and rebuilt keys for the forward."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import numpy as np
from numba import cuda

from ..arrays import Kind, kind_of, sum_type
from ..grouped_keys import QueryStatistics
from ..numba_kernels.copy_rows import make_copy_rows
from ..numba_kernels.expected_gram import make_expected_gram
from ..numba_kernels.rebuild_keys import make_rebuild_keys
from ..numba_kernels.sequences import START
from ..problem import Layout, Problem, Subspace, SubspaceMaps, ceil_div
from . import ScoreTables
from .device_grouped_keys import DeviceGroupedKeys, OnDevice
from .numba_backend import BACKEND, THREADS, WORKSPACE_BYTES
from .numba_device import (
    SIMULATED,
    bound,
    broadcast,
    copy_in,
    empty,
    launch,
    on_device_of,
    swap_rows_and_heads,
    view,
)

COPY_BLOCKS = 1 if SIMULATED else 1024
"""Most thread blocks of a copy: enough to keep any GPU busy."""


class OnNumba(OnDevice):
    """With Numba arrays."""

    @staticmethod
    def _put(target: Any, source: Any) -> None:
        if 0 in target.shape:
            return
        shape = (*target.shape, *[1] * (4 - len(target.shape)))
        target, source = (
            view(x, shape, (*x.strides, *[x.dtype.itemsize] * (4 - len(x.strides)))) for x in (target, source)
        )
        _copy(target, source, int(np.prod(shape)))

    @staticmethod
    def _padded(size: int) -> int:
        return size

    @staticmethod
    def _on_device(array: Any) -> Any:
        return array if kind_of(array) == "numba" else cuda.to_device(np.ascontiguousarray(array))

    @staticmethod
    def _on_host(array: Any) -> np.ndarray:
        host: np.ndarray = array.copy_to_host()
        return host

    @staticmethod
    def _zeros(shape: tuple[int, ...], dtype: Any, like: Any) -> Any:
        zeros = empty(shape, dtype, like)
        OnNumba._put(zeros, broadcast(copy_in(np.zeros(1, dtype), like), shape))
        return zeros

    @staticmethod
    def _with_strides(array: Any, shape: tuple[int, ...], strides: tuple[int, ...]) -> Any:
        return view(array, shape, strides)

    @staticmethod
    def _blocks_at_once(heads: int, width: int, dtype: Any) -> int:
        """Return how many blocks a workspace holds two Gram matrices and a map of, of every head."""
        bytes_of_block: int = 3 * heads * width**2 * np.dtype(sum_type(dtype)).itemsize
        return max(1, WORKSPACE_BYTES // max(bytes_of_block, 1))

    @staticmethod
    def _reduce(X: Any, queries: QueryStatistics | None, grouping: Subspace, scale: float, kept: Sequence[Any]) -> None:
        """Do as `OnDevice` says: a block is a head of one block here, with a mean of its own."""
        heads, blocks, L, width = X.shape
        rank, accumulator = grouping.rank or width, sum_type(X.dtype)
        sampled, maps, ranks, score_errors = kept

        block = BACKEND.one_block(L, L if queries is None else queries.rows, X)
        mean = BACKEND.key_mean(X, block, of_all=True)
        # rounded first, so that what is added to the scores is what was subtracted
        OnNumba._put(maps[:, :, rank], mean)
        OnNumba._put(mean, maps[:, :, rank])
        x_grams, y_grams = (BACKEND.grams(X, shift, block, START, blocks) for shift in (mean, None))
        if queries is not None:
            launch(make_expected_gram(accumulator), heads * blocks, THREADS.group, y_grams, queries.gram)

        of_head, of_block, of_row, of_number = maps.strides
        made = SubspaceMaps(
            sampling=empty((heads, blocks, 1, width, rank), accumulator, X),
            fusion=view(maps, (heads, blocks, 1, width, rank), (of_head, of_block, of_block, of_number, of_row)),
            key_mean=mean,
            ranks=ranks,
            score_errors=score_errors,
        )
        BACKEND.solve_maps(made, x_grams, y_grams, block, 1, grouping, scale, y_changes=True)
        BACKEND.reduce_rows(X, made, L, None, is_centred=True, out=sampled)


class NumbaGroupedKeys(OnNumba, DeviceGroupedKeys):
    """Keys on the device of the first of them. Work goes to the stream of what is appended, or of the queries."""

    kind: ClassVar[Kind] = "numba"

    @staticmethod
    def query_statistics(q: Any, kv_heads: int) -> QueryStatistics:
        """Return what the maps need of known queries (B, H, rows, D)."""
        batch, heads, rows, width = q.shape
        shared = heads // kv_heads if kv_heads else 1
        grams = BACKEND.grams(q, None, BACKEND.one_block(rows, rows, q), START, kv_heads)
        step = grams.strides
        shape = (batch, kv_heads, width, width)
        return QueryStatistics(view(grams, shape, (*step[:2], *step[3:])), shared * rows)

    def attend(self, problem: Problem, Q: Any, V: Any, O: Any, lse: Any, tables: ScoreTables) -> None:
        """Write attention to these keys into O and lse, as `Backend.attend` does."""
        K = self._rebuilt(Q) if self._finished else self.tail
        BACKEND.attend(problem, Q, K, V, O, lse, None, tables)

    @property
    def tail(self) -> Any:
        """The keys that are kept as they are, a view (B, H_kv, rows, D)."""
        is_full = self._tail_rows == self._buffer.shape[2]  # or has neither rows nor memory to be a view of
        return self._buffer if is_full else self._buffer[:, :, : self._tail_rows]

    def _append(self, new: Any) -> None:
        """Append checked keys (B, H_kv, rows, D) on their stream."""
        self._buffer = self._buffer.bind(new.stream)
        if self.grouping is not None:
            for room in self._rooms:
                room.array = room.array.bind(new.stream)
        super()._append(new)

    def _rebuilt(self, like: Any) -> Any:
        """Return all keys (B, H_kv, M, D), those of finished blocks as they count, on the stream of ``like``."""
        batch, heads, _, width = self._buffer.shape
        keys = empty((batch, heads, self.exact_from + self._tail_rows, width), self.dtype, like)
        sampled, maps = (self._by_heads(room.array) for room in (self._sampled, self._maps))
        rebuild_keys(keys, sampled, maps, self.tail, self.exact_from)
        return keys

    # ---- arrays ----

    @staticmethod
    def empty(shape: tuple[int, ...], like: Any) -> Any:
        """Return a new contiguous array of the dtype, stream and allocator of ``like``."""
        return empty(shape, like.dtype, like)

    @staticmethod
    def bhnd(array: Any, layout: Layout) -> Any:
        """Return a view of an array of the caller's with the axes (B, H, rows, D)."""
        return swap_rows_and_heads(array) if layout == "bnhd" else array

    @staticmethod
    def bound(array: Any, handle: int | None) -> Any:
        """Return a view that carries the stream with this handle; None: its own."""
        return bound(array, handle)

    @staticmethod
    def on_device_of(array: Any) -> AbstractContextManager[Any]:
        """Return a context in which the device that holds ``array`` is current."""
        return on_device_of(array)


def rebuild_keys(
    keys: Any, sampled: Any, maps: Any, tail: Any, exact_from: int = 0, *, of_pages: tuple[Any, ...] | None = None
) -> None:
    """Write all keys; arrays as numba_kernels/rebuild_keys.py has them. ``of_pages``: table, edges, places of tails."""
    batch, heads, most, _ = keys.shape
    if of_pages is not None:
        batch, pages = of_pages[0].shape
        most = pages * sampled.shape[3]
    rows, columns = THREADS.reduction_rows, THREADS.reduction_columns
    kernel = make_rebuild_keys(sum_type(keys.dtype), maps.shape[3] - 1, of_pages is not None, rows, columns)
    # Numba passes no None to a GPU: any array does where the kernel reads none
    others = (tail, exact_from, *(of_pages or (keys,) * 3))
    launch(kernel, batch * heads * ceil_div(most, rows), (columns, rows), keys, sampled, maps, *others)


def put_listed(target: Any, source: Any, rows: np.ndarray) -> None:
    """Write rows of (B, H, rows, D) into another such array: [4, count], b and n there and then in the source."""
    numbers = rows.shape[1] * target.shape[1] * target.shape[3]
    _copy(target, source, numbers, copy_in(rows, target))


def _copy(target: Any, source: Any, numbers: int, rows: Any = None) -> None:
    number = np.int32 if target.dtype == np.int32 else sum_type(target.dtype)
    blocks = min(ceil_div(numbers, THREADS.group), COPY_BLOCKS)
    kernel = make_copy_rows(number, rows is not None)
    # Numba passes no None to a GPU: any array does where the kernel reads none
    launch(kernel, blocks, THREADS.group, target, source, target if rows is None else rows)


GROUPED_KEYS = NumbaGroupedKeys
