"""`GroupedKeys` on a CUDA device: what is kept of finished blocks lies in arrays with room for more."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ..arrays import kind_of, sum_type
from ..grouped_keys import GroupedKeys, KeyBlock, QueryStatistics
from ..problem import Layout, Problem, Subspace, ceil_div
from . import ScoreTables


class OnDevice(ABC):
    """What keys on a device, their own or in pages, ask of their kind of arrays."""

    @staticmethod
    @abstractmethod
    def _padded(size: int) -> int:
        """Return how many columns are kept for a rank or a width."""

    @staticmethod
    def _sum_type(dtype: Any) -> Any:
        """Return the type of predicted errors."""
        return sum_type(dtype)

    @staticmethod
    @abstractmethod
    def _on_device(array: Any) -> Any:
        """Return an array of this kind as it is, a NumPy array as a copy on the current device."""

    @staticmethod
    @abstractmethod
    def _on_host(array: Any) -> np.ndarray:
        """Return a copy as a NumPy array."""

    @staticmethod
    @abstractmethod
    def _zeros(shape: tuple[int, ...], dtype: Any, like: Any) -> Any:
        """Return a new array of zeros on the device, and for the stream, of ``like``."""

    @staticmethod
    @abstractmethod
    def _with_strides(array: Any, shape: tuple[int, ...], strides: tuple[int, ...]) -> Any:
        """Return a view with this shape and these strides, in bytes."""

    @staticmethod
    @abstractmethod
    def _blocks_at_once(heads: int, width: int, dtype: Any) -> int:
        """Return how many blocks `_reduce` takes at a time."""

    @staticmethod
    @abstractmethod
    def _reduce(X: Any, queries: QueryStatistics | None, grouping: Subspace, scale: float, kept: Sequence[Any]) -> None:
        """Write what is kept of blocks (heads, blocks, L, D) (eq. 27 and 28).

        ``kept``: arrays as the rooms of `DeviceGroupedKeys`, of these blocks alone, zero so far. No sum depends on how
        many blocks there are, so that it does not matter how keys came.
        """


class DeviceGroupedKeys(OnDevice, GroupedKeys):
    """Keys on one device. All work is queued on a stream; nothing waits for it.

    The rooms, with heads = B * H_kv and blocks as they come: ``_sampled`` (heads, blocks, L, R), ``_maps`` (heads,
    blocks, R + 1, D), which is Z transposed and then the mean, ``_ranks`` and ``_score_errors`` (heads, blocks, 1). A
    kind may pad R and D.
    """

    def __init__(
        self,
        tail: Any,
        blocks: list[KeyBlock],
        *,
        grouping: Subspace | None,
        queries: QueryStatistics | None,
        scale: float,
        layout: Layout,
    ) -> None:
        """Take over what `GroupedKeys` says, on the host or the current device."""
        tail = self._on_device(tail)
        super().__init__(tail, [], grouping=grouping, queries=queries, scale=scale, layout=layout)
        width = tail.shape[3]
        self._finished = 0
        if grouping is None:
            return
        rank, real = self._padded(grouping.rank or width), self._sum_type(tail.dtype)
        self._sampled = self._room((grouping.block_size, rank), tail.dtype)
        self._maps = self._room((rank + 1, self._padded(width)), tail.dtype)
        self._ranks = self._room((1,), np.int32)
        self._score_errors = self._room((1,), real)
        if queries is not None and kind_of(queries.gram) == "numpy":  # from a file
            queries = queries.padded(self._padded(width), real)
            self.queries = replace(queries, gram=self._on_device(queries.gram))
        for block in blocks:
            self._take_over(block)

    @abstractmethod
    def attend(self, problem: Problem, Q: Any, V: Any, O: Any, lse: Any, tables: ScoreTables) -> None:
        """Write attention to these keys into O and lse, as `Backend.attend` does."""

    # ---- what they share ----

    def __repr__(self) -> str:
        """Return what error messages say of it."""
        return f"GroupedKeys of shape {self.shape} and dtype {self.dtype} on a CUDA device"

    @property
    def exact_from(self) -> int:
        """The first key that is kept as it is."""
        return self._finished * self.block_size if self._finished else 0

    @property
    def blocks(self) -> list[KeyBlock]:
        """The finished blocks, as views."""
        if self.grouping is None or not self._finished:
            return []
        width = self._buffer.shape[3]
        rank = self.grouping.rank or width
        sampled, maps, ranks, score_errors = (
            self._by_heads(room.array) for room in (self._sampled, self._maps, self._ranks, self._score_errors)
        )
        mean = maps.shape[3] - 1
        return [
            KeyBlock(
                sampled[:, :, c, :, :rank],
                self._swapped(maps[:, :, c, :rank, :width]),
                maps[:, :, c, mean, :width],
                ranks[:, :, c, 0],
                score_errors[:, :, c, 0],
            )
            for c in range(self._finished)
        ]

    @property
    def ranks(self) -> Any:
        """Rank of every finished block, (B, H_kv, F) int32."""
        return self._numbers("_ranks", np.int32)

    @property
    def score_errors(self) -> Any:
        """As of `GroupedKeys`, in the type of the sums."""
        return self._numbers("_score_errors", self._sum_type(self.dtype))

    @property
    def nbytes(self) -> int:
        """Memory that the keys and what belongs to them take, the room for more blocks included."""
        arrays = [self._buffer]
        if self.grouping is not None:
            arrays += [room.array for room in self._rooms]
        if self.queries is not None:
            arrays.append(self.queries.gram)
        return sum(array.nbytes for array in arrays)

    @property
    def _rooms(self) -> tuple[_Room, ...]:
        return self._sampled, self._maps, self._ranks, self._score_errors

    def _room(self, of_block: tuple[int, ...], dtype: Any) -> _Room:
        batch, heads = self._buffer.shape[:2]
        return _Room(self, (batch * heads, *of_block), dtype)

    def _append(self, new: Any) -> None:
        """Append checked keys (B, H_kv, rows, D); all blocks that they finish are made together."""
        rows = self._tail_rows + new.shape[2]
        finished = max(ceil_div(rows, self.block_size) - 1, 0)
        taken = finished * self.block_size - self._tail_rows if finished else 0
        if finished and self.grouping is not None:
            self._finish_blocks(self.grouping, self._rows_of_blocks(new, taken))
            self._tail_rows = 0
        if taken < new.shape[2]:
            self._extend_tail(new[:, :, taken:])

    def _rows_of_blocks(self, new: Any, taken: int) -> Any:
        """Return the tail and ``taken`` of new keys (B, H_kv, rows, D), whole blocks, as (B * H_kv, blocks, L, D)."""
        batch, heads, _, width = self._buffer.shape
        X = self.empty((batch, heads, self._tail_rows + taken, width), self._buffer)
        if self._tail_rows:
            self._put(X[:, :, : self._tail_rows], self.tail)
        if taken:
            self._put(X[:, :, self._tail_rows :], new[:, :, :taken])
        return self._in_blocks(X)

    def _in_blocks(self, X: Any) -> Any:
        """Return a view of contiguous rows (B, H_kv, whole blocks, D) as (B * H_kv, blocks, L, D)."""
        batch, heads, rows, width = X.shape
        _, of_head, of_row, of_number = X.strides
        L = self.block_size
        shape = (batch * heads, rows // L, L, width)
        return self._with_strides(X, shape, (of_head, L * of_row, of_row, of_number))

    def _finish_blocks(self, grouping: Subspace, X: Any) -> None:
        """Make blocks of rows (B * H_kv, blocks, L, D)."""
        heads, blocks, _, width = X.shape
        for room in self._rooms:
            room.grow(self._finished + blocks)
        at_once = self._blocks_at_once(heads, width, self.dtype)
        for first in range(0, blocks, at_once):
            last = min(first + at_once, blocks)
            finished = self._finished + last - first
            if heads:
                kept = [room.array[:, self._finished : finished] for room in self._rooms]
                self._reduce(X[:, first:last], self.queries, grouping, self.scale, kept)
            self._finished = finished

    def _take_over(self, block: KeyBlock) -> None:
        """Append a finished block that was saved."""
        width = self._buffer.shape[3]
        c, rank = self._finished, block.sampled.shape[3]
        for room in self._rooms:
            room.grow(c + 1)
        sampled, maps, ranks, score_errors = (self._by_heads(room.array) for room in self._rooms)
        mean = maps.shape[3] - 1
        for place, kept in (
            (sampled[:, :, c, :, :rank], block.sampled),
            (maps[:, :, c, :rank, :width], block.fusion.swapaxes(-1, -2)),
            (maps[:, :, c, mean, :width], block.mean),
            (ranks[:, :, c, 0], block.ranks),
            (score_errors[:, :, c, 0], block.score_errors.astype(score_errors.dtype)),
        ):
            if kept.size:
                self._put(place, self._on_device(np.ascontiguousarray(kept)))
        self._finished += 1

    def _by_heads(self, array: Any) -> Any:
        """Return a view of a room (B * H_kv, blocks, ...) as (B, H_kv, blocks, ...)."""
        batch, heads = self._buffer.shape[:2]
        step = array.strides[0]
        # Numba takes an axis of stride 0 for one of size 1
        strides = (max(heads, 1) * step, step, *array.strides[1:])
        return self._with_strides(array, (batch, heads, *array.shape[1:]), strides)

    def _swapped(self, array: Any) -> Any:
        """Return a view of (B, H_kv, R, D) as (B, H_kv, D, R)."""
        (*shape, rank, width), (*strides, row, column) = array.shape, array.strides
        return self._with_strides(array, (*shape, width, rank), (*strides, column, row))

    def _numbers(self, name: str, dtype: Any) -> Any:
        """Return (B, H_kv, F) numbers of the finished blocks."""
        shape = (*self._buffer.shape[:2], self._finished)
        numbers = self._zeros(shape, dtype, self._buffer)
        if self._finished and numbers.size:
            self._put(numbers, self._by_heads(getattr(self, name).array)[:, :, : self._finished, 0])
        return numbers

    def _copy_on_host(self) -> tuple[np.ndarray, list[KeyBlock], QueryStatistics | None]:
        """Return what a file holds; a block is as wide there as the highest rank of its heads."""
        blocks = []
        for block in self.blocks:
            sampled, fusion, mean, ranks, score_errors = (
                self._on_host(getattr(block, name)) for name in KeyBlock.__slots__
            )
            width = sampled.shape[3] if self.grouping is None or self.grouping.rank else ranks.max(initial=0)
            blocks.append(
                KeyBlock(sampled[..., :width], fusion[..., :width], mean, ranks, score_errors.astype(np.float64))
            )
        queries = self.queries
        if queries is not None:
            width = self._buffer.shape[3]
            queries = replace(queries, gram=self._on_host(queries.gram)[..., :width, :width].astype(np.float64))
        return self._on_host(self.tail), blocks, queries


class _Room:
    """An array (heads, blocks, ...) that grows; what is not in use yet is zero."""

    def __init__(self, keys: DeviceGroupedKeys, shape: tuple[int, ...], dtype: Any) -> None:
        """``shape`` is that of one block of every head."""
        self._keys, self._shape, self._dtype = keys, shape, dtype
        self.array = self._zeros(0)

    def _zeros(self, blocks: int) -> Any:
        heads, *rest = self._shape
        return self._keys._zeros((heads, blocks, *rest), self._dtype, self._keys._buffer)

    def grow(self, blocks: int) -> None:
        """Have room for so many blocks, and then for an eighth more: growing must not copy all of them every time."""
        room = self.array.shape[1]
        if blocks > room:
            grown = self._zeros(max(blocks, room + ceil_div(room, 8)))
            if room and grown.size:
                self._keys._put(grown[:, :room], self.array)
            self.array = grown
