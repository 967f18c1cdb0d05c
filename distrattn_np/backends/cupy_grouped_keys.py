"""`GroupedKeys` on a CUDA device: what is kept of finished blocks lies in arrays that decode.cu reads."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, ClassVar

import cupy
import numpy as np

from ..arrays import Kind, on_stream, sum_type
from ..grouped_keys import QueryStatistics
from ..problem import Problem, Subspace
from ..tiles import ALL, ELEMENTS, expected_gram_defines, pad
from . import NO_TABLES, ScoreTables
from .cupy_backend import (
    BACKEND,
    WORKSPACE_BYTES,
    _channel_sums,
    _DenseMaps,
    _element,
    _Forward,
    _has_tensor_cores,
    _launch,
    _MapRows,
    _Segments,
    _sum_segments,
    _vector,
)
from .cupy_decode import FinishedKeys
from .cupy_kept_keys import KeptKeys
from .device_grouped_keys import DeviceGroupedKeys, OnDevice


class OnCupy(OnDevice):
    """With CuPy arrays."""

    @staticmethod
    def _padded(size: int) -> int:
        return pad(size)

    @staticmethod
    def _on_device(array: Any) -> Any:
        return cupy.asarray(array)

    @staticmethod
    def _on_host(array: Any) -> np.ndarray:
        host: np.ndarray = cupy.asnumpy(array)
        return host

    @staticmethod
    def _zeros(shape: tuple[int, ...], dtype: Any, like: Any) -> Any:  # noqa: ARG004
        return cupy.zeros(shape, dtype)

    @staticmethod
    def _with_strides(array: Any, shape: tuple[int, ...], strides: tuple[int, ...]) -> Any:
        return cupy.ndarray(shape, array.dtype, memptr=array.data, strides=strides)

    @staticmethod
    def _blocks_at_once(heads: int, width: int, dtype: Any) -> int:
        """Return how many blocks a workspace holds two Gram matrices of, of every head."""
        gram_bytes: int = 2 * heads * pad(width) ** 2 * np.dtype(sum_type(dtype)).itemsize
        return max(1, WORKSPACE_BYTES // max(gram_bytes, 1))

    @staticmethod
    def _reduce(X: Any, queries: QueryStatistics | None, grouping: Subspace, scale: float, kept: Sequence[Any]) -> None:
        """Do as `OnDevice` says: a block is a head of one block here, with a mean of its own."""
        kept_sampled, kept_maps, kept_ranks, kept_score_errors = kept
        heads, blocks, L, width = X.shape
        whole = _WholeBlocks(1, L, 0, 0, L, ALL)
        sums = _channel_sums(X, whole, power=1)
        mean = _sum_segments(sums, whole, factor=1 / L, element=_element(X)).reshape(heads, blocks, width)
        x_grams, y_grams = BACKEND.grams(X, mean, whole), BACKEND.grams(X, None, whole, memory_matters=False)
        y_rows = L
        if queries is not None:
            y_rows = queries.rows
            defines = expected_gram_defines(ELEMENTS[y_grams.dtype.name], width)
            _launch("expected_gram", defines, heads * blocks, None, y_grams, queries.gram, blocks)
        narrows = _has_tensor_cores(X.dtype)
        rows = _MapRows(L, L, y_rows, 1, ALL, 0)
        maps = BACKEND.solve_maps(x_grams, y_grams, grouping, rows, mean, X, scale=scale, narrows=narrows)
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

        fusion = dense.fusion[:, :, 0]
        rank = fusion.shape[2]  # padded for tensor cores; kernels on CUDA cores leave the padding unwritten
        kept_sampled[:, :, :, :rank] = sampled[..., :rank]
        kept_maps[:, :, :rank, : fusion.shape[3]] = fusion
        kept_maps[:, :, -1, :width] = mean
        kept_ranks[...] = maps.ranks
        kept_score_errors[...] = maps.score_errors


class CupyGroupedKeys(OnCupy, DeviceGroupedKeys):
    """Keys on the device of the first of them; docs/caches.md says which calls are read by which kernels.

    All work is queued on the current stream. R and D are padded as decode.cu reads them.
    """

    kind: ClassVar[Kind] = "cupy"

    @staticmethod
    def query_statistics(q: Any, kv_heads: int) -> QueryStatistics:
        """Return what the maps need of known queries (B, H, rows, D)."""
        batch, heads, rows, width = q.shape
        shared = heads // kv_heads if kv_heads else 1
        grams = BACKEND.grams(q, None, _Segments(1, rows, 0, 0, rows, ALL), shared, memory_matters=False)
        return QueryStatistics(grams.reshape(batch, kv_heads, pad(width), pad(width)), shared * rows)

    @property
    def device(self) -> int:
        """Number of the device that holds them."""
        return int(self._buffer.device.id)

    def attend(self, problem: Problem, Q: Any, V: Any, O: Any, lse: Any, tables: ScoreTables) -> None:
        """Write attention to these keys into O and lse, as `Backend.attend` does."""
        self.kept().attend(problem, Q, V, O, lse, tables)

    def _rows_of_blocks(self, new: Any, taken: int) -> Any:
        """Return what `DeviceGroupedKeys` says, without a copy where the rows lie in one array that is aligned."""
        if self._tail_rows and taken:
            return super()._rows_of_blocks(new, taken)
        rows = new[:, :, :taken] if taken else self.tail
        batch, heads, count, width = rows.shape
        X = rows.reshape(batch * heads, count // self.block_size, self.block_size, width)
        # sums run in another order over memory that is aligned otherwise
        return X if _vector(X) > 1 else X.copy()

    def kept(self) -> KeptKeys:
        """Return what a call reads."""
        if self.grouping is None or not self._finished:
            return KeptKeys(self.tail, None)
        rank, sampled = self.grouping.rank or self._buffer.shape[3], self._sampled.array
        heads, blocks, L, columns = sampled.shape
        sampled = sampled.reshape(heads, blocks * L, columns)
        return KeptKeys(self.tail, FinishedKeys(self.exact_from, L, rank, sampled, self._maps.array))

    # ---- arrays ----

    @staticmethod
    def empty(shape: tuple[int, ...], like: Any) -> Any:
        """Return a new contiguous array of the dtype of ``like``."""
        return cupy.empty(shape, like.dtype)

    @staticmethod
    def on_stream(handle: int | None) -> AbstractContextManager[Any]:
        """Return a context in which CuPy's current stream is the one with this handle; None: it stays."""
        return on_stream(handle)

    @staticmethod
    def on_device_of(array: Any) -> AbstractContextManager[Any]:
        """Return a context in which the device that holds ``array`` is current."""
        device: AbstractContextManager[Any] = array.device
        return device


class _WholeBlocks(_Segments):
    """Segments that are never split, so that sums do not depend on how many of them a launch makes."""

    def split(self, sums: int, **room: int) -> _Segments:  # noqa: ARG002
        return self


GROUPED_KEYS = CupyGroupedKeys
