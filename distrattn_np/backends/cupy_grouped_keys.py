"""`GroupedKeys` on a CUDA device: what is kept of finished blocks lies in arrays that decode.cu reads."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import cupy
import numpy as np

from ..arrays import Kind, kind_of
from ..grouped_keys import GroupedKeys, KeyBlock, QueryStatistics
from ..problem import Layout, Problem, Subspace, ceil_div
from ..tiles import ALL, ELEMENTS, REBUILD_TILE, SIMT_THREADS, expected_gram_defines, pad, rebuild_defines
from . import NO_TABLES, ScoreTables, cupy_decode
from .cupy_backend import (
    BACKEND,
    WORKSPACE_BYTES,
    _channel_sums,
    _DenseMaps,
    _element,
    _empty,
    _Forward,
    _has_tensor_cores,
    _launch,
    _MapRows,
    _Segments,
    _strides,
    _sum_segments,
    _sum_type,
    _vector,
)


class CupyGroupedKeys(GroupedKeys):
    """Keys on the device of the first of them; docs/caches.md says which calls are read by which kernels.

    All work is queued on the current stream; nothing waits for it.
    """

    kind: ClassVar[Kind] = "cupy"

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
        tail = cupy.asarray(tail)
        super().__init__(tail, [], grouping=grouping, queries=queries, scale=scale, layout=layout)
        heads, width = tail.shape[0] * tail.shape[1], tail.shape[3]
        self._finished = 0
        if grouping is None:
            return
        rank, real = pad(grouping.rank or width), _sum_type(tail.dtype)
        self._sampled = _Room((heads, grouping.block_size, rank), tail.dtype)
        self._maps = _Room((heads, rank + 1, pad(width)), tail.dtype)
        self._ranks = _Room((heads,), np.int32)
        self._score_errors = _Room((heads,), real)
        if queries is not None and kind_of(queries.gram) == "numpy":  # from a file
            gram = cupy.zeros((*queries.gram.shape[:2], pad(width), pad(width)), real)
            gram[..., :width, :width] = cupy.asarray(queries.gram, real)
            self.queries = replace(queries, gram=gram)
        for block in blocks:
            self._take_over(block)

    @staticmethod
    def query_statistics(q: Any, kv_heads: int) -> QueryStatistics:
        """Return what the maps need of known queries (B, H, rows, D)."""
        batch, heads, rows, width = q.shape
        shared = heads // kv_heads if kv_heads else 1
        with q.device:
            grams = BACKEND.grams(q, None, _Segments(1, rows, 0, 0, rows, ALL), shared, memory_matters=False)
            return QueryStatistics(grams.reshape(batch, kv_heads, pad(width), pad(width)), shared * rows)

    def __repr__(self) -> str:
        """Return what error messages say of it."""
        return f"GroupedKeys of shape {self.shape} and dtype {self.dtype} on a CUDA device"

    @property
    def device(self) -> int:
        """Number of the device that holds them."""
        return int(self._buffer.device.id)

    @property
    def exact_from(self) -> int:
        """The first key that is kept as it is."""
        return self._finished * self.block_size if self._finished else 0

    @property
    def blocks(self) -> list[KeyBlock]:
        """The finished blocks, as views."""
        if self.grouping is None:
            return []
        rank, width = self.grouping.rank or self.shape[3], self.shape[3]
        sampled, maps, ranks, score_errors = (
            room.used(self._finished).reshape(*self._buffer.shape[:2], self._finished, *room.used(0).shape[2:])
            for room in (self._sampled, self._maps, self._ranks, self._score_errors)
        )
        return [
            KeyBlock(
                sampled[:, :, c, :, :rank],
                maps[:, :, c, :rank, :width].swapaxes(-1, -2),
                maps[:, :, c, -1, :width],
                ranks[:, :, c],
                score_errors[:, :, c],
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
        return self._numbers("_score_errors", _sum_type(self.dtype))

    @property
    def nbytes(self) -> int:
        """Memory that the keys and what belongs to them take, the room for more blocks included."""
        arrays = [self._buffer]
        if self.grouping is not None:
            arrays += [room.array for room in (self._sampled, self._maps, self._ranks, self._score_errors)]
        if self.queries is not None:
            arrays.append(self.queries.gram)
        return sum(array.nbytes for array in arrays)

    def attend(self, problem: Problem, Q: Any, V: Any, O: Any, lse: Any, tables: ScoreTables) -> None:
        """Write attention to these keys into O and lse, as `Backend.attend` does."""
        if not self._finished:
            BACKEND.attend(problem, Q, self.tail, V, O, lse, None, tables)
        elif cupy_decode.suits(problem, tables):
            cupy_decode.decode(problem, Q, self.tail, V, O, lse, self._finished_keys())
        else:
            BACKEND.attend(problem, Q, self._rebuilt(), V, O, lse, None, tables)

    def _append(self, new: Any) -> None:
        """Append checked keys (B, H_kv, rows, D); all blocks that they finish are made together."""
        with new.device:
            rows = self._tail_rows + new.shape[2]
            finished = max(ceil_div(rows, self.block_size) - 1, 0)
            taken = finished * self.block_size - self._tail_rows if finished else 0
            if finished and self.grouping is not None:
                self._finish_blocks(self.grouping, self._rows_of_blocks(new[:, :, :taken], finished))
                self._tail_rows = 0
            self._extend_tail(new[:, :, taken:])

    def _rows_of_blocks(self, new: Any, blocks: int) -> Any:
        """Return the tail and new keys (B, H_kv, rows, D), which fill ``blocks``, as (B * H_kv, blocks, L, D)."""
        batch, heads, _, width = self._buffer.shape
        rows = blocks * self.block_size
        shape = (batch * heads, blocks, self.block_size, width)
        if not self._tail_rows or not new.shape[2]:
            X = (new if new.shape[2] else self.tail).reshape(shape)
            # sums run in another order over memory that is aligned otherwise
            return X if _vector(X) > 1 else X.copy()
        X = cupy.empty((batch, heads, rows, width), self.dtype)
        X[:, :, : self._tail_rows] = self.tail
        X[:, :, self._tail_rows :] = new
        return X.reshape(shape)

    def _finish_blocks(self, grouping: Subspace, X: Any) -> None:
        """Make blocks of rows (B * H_kv, blocks, L, D), as many at a time as a workspace holds Gram matrices of."""
        heads, blocks, _, width = X.shape
        for room in (self._sampled, self._maps, self._ranks, self._score_errors):
            room.grow(self._finished + blocks)
        gram_bytes = 2 * heads * pad(width) ** 2 * np.dtype(_sum_type(X.dtype)).itemsize
        at_once = max(1, WORKSPACE_BYTES // max(gram_bytes, 1))
        for first in range(0, blocks, at_once):
            if heads:
                self._reduce_blocks(grouping, X[:, first : first + at_once])
            self._finished += len(range(first, min(first + at_once, blocks)))

    def _reduce_blocks(self, grouping: Subspace, X: Any) -> None:
        """Write what is kept of blocks (B * H_kv, blocks, L, D) behind the finished ones (eq. 27 and 28).

        A block is a head of one block here, so that it has a mean of its own. No sum depends on how many there are.
        """
        heads, blocks, L, width = X.shape
        whole = _WholeBlocks(1, L, 0, 0, L, ALL)
        sums = _channel_sums(X, whole, power=1)
        mean = _sum_segments(sums, whole, factor=1 / L, element=_element(X)).reshape(heads, blocks, width)
        x_grams, y_grams = BACKEND.grams(X, mean, whole), BACKEND.grams(X, None, whole, memory_matters=False)
        y_rows = L
        if self.queries is not None:
            y_rows = self.queries.rows
            defines = expected_gram_defines(ELEMENTS[y_grams.dtype.name], width)
            _launch("expected_gram", defines, heads * blocks, None, y_grams, self.queries.gram, blocks)
        narrows = _has_tensor_cores(X.dtype)
        rows = _MapRows(L, L, y_rows, 1, ALL, 0)
        maps = BACKEND.solve_maps(x_grams, y_grams, grouping, rows, mean, X, scale=self.scale, narrows=narrows)
        dense = _DenseMaps.narrowed(maps, X) if narrows else _DenseMaps.widened(maps, X)
        problem = Problem(
            batch=heads,
            heads=blocks,
            kv_heads=blocks,
            queries=1,
            keys=L,
            width=width,
            value_width=1,
            dtype=X.dtype,
            scale=1.0,  # its sign chooses kernels of the forward alone
            causal_offset=None,
            layout="bhnd",
            grouping=replace(grouping, block_size=L),
        )
        sampled = _Forward(problem, X, X, X, None, None, dense, NO_TABLES).sample_keys()

        new = slice(self._finished, self._finished + blocks)
        fusion = dense.fusion[:, :, 0]
        rank = fusion.shape[2]  # padded for tensor cores; kernels on CUDA cores leave the padding unwritten
        self._sampled.array[:, new, :, :rank] = sampled[..., :rank]
        self._maps.array[:, new, :rank, : fusion.shape[3]] = fusion
        self._maps.array[:, new, -1, :width] = mean
        self._ranks.array[:, new] = maps.ranks[:, :, 0]
        self._score_errors.array[:, new] = maps.score_errors[:, :, 0]

    def _finished_keys(self) -> cupy_decode.FinishedKeys:
        assert self.grouping is not None
        rank = self.grouping.rank or self._buffer.shape[3]
        sampled = self._sampled.array
        return cupy_decode.FinishedKeys(
            self.exact_from,
            self.block_size,
            rank,
            sampled.reshape(len(sampled), -1, sampled.shape[3]),
            self._maps.array,
        )

    def _rebuilt(self) -> Any:
        """Return all keys (B, H_kv, M, D) as they are or, of finished blocks, as they count (eq. 27)."""
        batch, heads, _, width = self._buffer.shape
        keys = _empty((batch, heads, self.exact_from + self._tail_rows, width), self.dtype)
        finished = self._finished_keys()
        _launch(
            "rebuild_keys",
            rebuild_defines(_element(keys), width, finished.rank),
            batch * heads * self._finished * ceil_div(self.block_size, REBUILD_TILE),
            SIMT_THREADS,
            *(finished.sampled, finished.maps, keys, self._finished, self.block_size),
            *(_strides(x)[0] for x in (finished.sampled, finished.maps)),
            _strides(keys)[1],
        )
        keys[:, :, self.exact_from :] = self.tail
        return keys

    def _take_over(self, block: KeyBlock) -> None:
        """Append a finished block that was saved."""
        width = self._buffer.shape[3]
        for room in (self._sampled, self._maps, self._ranks, self._score_errors):
            room.grow(self._finished + 1)
        rank, c = block.sampled.shape[3], self._finished
        heads = len(self._ranks.array)
        self._sampled.array[:, c, :, :rank] = cupy.asarray(block.sampled).reshape(heads, -1, rank)
        fusion = cupy.asarray(block.fusion).reshape(heads, width, rank)
        self._maps.array[:, c, :rank, :width] = fusion.swapaxes(-1, -2)
        self._maps.array[:, c, -1, :width] = cupy.asarray(block.mean).reshape(heads, width)
        self._ranks.array[:, c] = cupy.asarray(block.ranks).reshape(heads)
        self._score_errors.array[:, c] = cupy.asarray(block.score_errors).reshape(heads)
        self._finished += 1

    def _numbers(self, name: str, dtype: Any) -> Any:
        """Return (B, H_kv, F) numbers of the finished blocks."""
        shape = (*self._buffer.shape[:2], self._finished)
        if not self._finished:
            return cupy.empty(shape, dtype)
        return cupy.ascontiguousarray(getattr(self, name).used(self._finished)).reshape(shape)

    def _on_host(self) -> tuple[np.ndarray, list[KeyBlock], QueryStatistics | None]:
        """Return what a file holds; a block is as wide there as the highest rank of its heads."""
        blocks = []
        for block in self.blocks:
            sampled, fusion, mean, ranks, score_errors = (
                cupy.asnumpy(getattr(block, name)) for name in KeyBlock.__slots__
            )
            width = sampled.shape[3] if self.grouping is None or self.grouping.rank else ranks.max(initial=0)
            blocks.append(
                KeyBlock(sampled[..., :width], fusion[..., :width], mean, ranks, score_errors.astype(np.float64))
            )
        queries = self.queries
        if queries is not None:
            width = self._buffer.shape[3]
            queries = replace(queries, gram=cupy.asnumpy(queries.gram)[..., :width, :width].astype(np.float64))
        return cupy.asnumpy(self.tail), blocks, queries

    @staticmethod
    def _empty(shape: tuple[int, ...], like: Any) -> Any:
        """Return a new contiguous array of the dtype of ``like``."""
        return cupy.empty(shape, like.dtype)


class _Room:
    """An array (heads, blocks, ...) that grows; what is not in use yet is zero."""

    def __init__(self, shape: tuple[int, ...], dtype: Any) -> None:
        """``shape`` is that of one block of every head."""
        self._block_shape, self._dtype = shape, dtype
        self.array = self._zeros(0)

    def _zeros(self, blocks: int) -> Any:
        heads, *rest = self._block_shape
        return cupy.zeros((heads, blocks, *rest), self._dtype)

    def used(self, blocks: int) -> Any:
        """Return a view of the first blocks."""
        return self.array[:, :blocks]

    def grow(self, blocks: int) -> None:
        """Have room for so many blocks, and then for an eighth more: growing must not copy all of them every time."""
        room = self.array.shape[1]
        if blocks > room:
            grown = self._zeros(max(blocks, room + ceil_div(room, 8)))
            grown[:, :room] = self.array
            self.array = grown


class _WholeBlocks(_Segments):
    """Segments that are never split, so that sums do not depend on how many of them a launch makes."""

    def split(self, sums: int, **room: int) -> _Segments:  # noqa: ARG002
        return self
