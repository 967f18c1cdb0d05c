"""Attention with NumPy alone: tiles of scores that stay in cache, a worker thread per core, bounded memory.

A task is a tile of queries of one head. It visits the keys in tiles with the running softmax of docs/math.md (eq. 10).
NumPy releases the interpreter lock in matrix products and elementwise passes, so tasks run side by side. The tiles do
not depend on the number of threads, hence neither do the results. docs/cpu.md gives the reasons for the sizes.
"""

from __future__ import annotations

import ctypes
import importlib
import itertools
import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np

from .. import reference
from ..arrays import Kind, sum_type
from ..grouped_keys import GroupedKeys, KeyBlock
from ..grouped_pages import GroupedPages
from ..problem import (
    Grouping,
    GroupMaps,
    Layout,
    PagedProblem,
    Problem,
    RaggedProblem,
    Subspace,
    SubspaceMaps,
    block_edges,
    ceil_div,
)
from ..reference.distr_attention import rows_that_meet
from . import NO_TABLES, NOTHING_LENT, Backend, Lent, Maps, ScoreTables

QUERY_TILE = 512
KEY_TILE = 512
SCRATCH_BYTES = 56 << 20
"""What all workers together may hold: where their tiles need more, fewer workers run."""
STACK_BYTES = 1 << 20
"""What the Gram matrices of the blocks that are solved together take: small matrices are quick only in stacks."""
THREADED_WORK = 1 << 21
"""Multiply-adds of a task below which handing the interpreter lock over costs more than a second thread gives."""


class NumpyBackend(Backend):
    """Host arrays. The arithmetic is float32; float64 for float64 arrays, and for hashes, gains and subspace maps."""

    name = "numpy"
    kinds = frozenset({"numpy"})
    builds_subspace: ClassVar[bool] = True
    kinds_of_grouped_keys: ClassVar[frozenset[Kind]] = frozenset({"numpy"})
    kinds_of_grouped_pages: ClassVar[frozenset[Kind]] = frozenset({"numpy"})

    def group_maps(self, problem: Problem, Q: np.ndarray, K: np.ndarray) -> Maps:
        """Return the maps of every block; what multiplies has the precision of the scores."""
        match problem.grouping:
            case Grouping() as grouping:
                return self._lsh_maps(problem, grouping, Q, K)
            case Subspace() as grouping:
                return self._subspace_maps(problem, grouping, Q, K)
            case _:
                return None

    def _lsh_maps(self, problem: Problem, grouping: Grouping, Q: np.ndarray, K: np.ndarray) -> GroupMaps:
        X, Y = (Q, K) if grouping.by == "queries" else (K, Q)
        block_rows = min(grouping.block_size, problem.grouped_rows)
        # a shorter draw has the same first rows, so no planes are drawn for rows that are not there
        planes = reference.hyperplanes(grouping.seed, block_rows)
        channels = self.group_channels(self.hash_channels(X, planes, grouping.block_size))
        if grouping.fusion == "sum":
            return GroupMaps(channels, None)
        gains = np.empty(channels.shape, dtype=_compute_dtype(problem))

        def weigh_head(b: int, h: int) -> None:
            _weigh_members(problem, grouping, X[b, h], Y[b, _heads_that_meet(problem, h)], channels[b, h], gains[b, h])

        # a block in float64, its columns in the order of their groups, and a tile of the other side
        memory = 8 * problem.width * (2 * block_rows + KEY_TILE)
        _run_tasks(weigh_head, channels.shape[:2], memory=memory, work=16 * problem.width * problem.grouped_rows)
        return GroupMaps(channels, gains)

    def _subspace_maps(self, problem: Problem, grouping: Subspace, Q: np.ndarray, K: np.ndarray) -> SubspaceMaps:
        X, Y = (Q, K) if grouping.by == "queries" else (K, Q)
        dtype, D = _compute_dtype(problem), problem.width
        blocks = (problem.batch, problem.grouped_heads, problem.blocks)
        key_mean = np.empty((problem.batch, problem.kv_heads, D), dtype)
        maps = SubspaceMaps(  # as they are for blocks that no row meets
            sampling=np.zeros((*blocks, D, problem.rank), dtype),
            fusion=np.zeros((*blocks, D, problem.rank), dtype),
            key_mean=key_mean,
            ranks=np.full(blocks, grouping.rank or min(reference.RANK_STEP, D), np.int32),
            score_errors=np.zeros(blocks, dtype),
        )

        averaged = reference.keys_of_mean(K)

        def average_head(b: int, h: int) -> None:
            key_mean[b, h] = _column_sums(averaged[b, h]) / max(averaged.shape[2], 1)

        def solve_head(b: int, h: int) -> None:
            meeting = _heads_that_meet(problem, h)
            if grouping.by == "queries":
                x_shift, y_shift = np.zeros(D), key_mean[b, meeting.start]
            else:
                x_shift, y_shift = key_mean[b, h], np.zeros(D)
            sums_of_y = partial(_gram_of_rows, Y[b, meeting], y_shift)
            heads = meeting.stop - meeting.start
            blocks_left = (
                (c, _gram_of_rows(X[b, h : h + 1], x_shift, start, stop), gram_of_y, stop - start, heads * y_rows)
                for c, start, stop, gram_of_y, y_rows in _blocks_with_sums(
                    problem, grouping, sums_of_y, np.zeros((D, D))
                )
                if y_rows > 0
            )
            while stack := list(itertools.islice(blocks_left, stacked)):
                c, A, B, x_rows, y_rows = (np.array(column) for column in zip(*stack, strict=True))
                maps.sampling[b, h, c], maps.fusion[b, h, c], maps.ranks[b, h, c], maps.score_errors[b, h, c] = (
                    reference.subspace_maps(
                        A,
                        B,
                        x_rows=x_rows,
                        y_rows=y_rows,
                        scale=problem.scale,
                        rank=grouping.rank,
                        score_tol=grouping.score_tol,
                        refine=grouping.refine,
                    )
                )

        stacked = min(max(STACK_BYTES // (8 * D * D), 1), problem.blocks)
        # a tile in float64, once more when its mean is subtracted; some twelve matrices a block
        memory = 8 * D * (2 * KEY_TILE + 12 * stacked * D)
        _run_tasks(average_head, key_mean.shape[:2], memory=memory, work=averaged.shape[2] * D)
        _run_tasks(solve_head, blocks[:2], memory=memory, work=problem.grouped_rows * D * D)
        return maps

    def hash_channels(self, x: np.ndarray, planes: np.ndarray, block_size: int) -> np.ndarray:
        """Return the words (B, H, C, D) uint16 of every block of ``x`` (B, H, rows, D), eq. 5."""
        B, H, rows, D = x.shape
        words = np.empty((B, H, ceil_div(rows, block_size), D), dtype=np.uint16)

        def hash_block(b: int, h: int, c: int) -> None:
            words[b, h, c] = reference.hash_channels(x[b, h, c * block_size : (c + 1) * block_size], planes)

        size = min(block_size, rows) * D
        # a block and its planes in float64
        memory = 8 * (size + min(block_size, rows) * reference.HASH_BITS)
        _run_tasks(hash_block, words.shape[:3], memory=memory, work=size * reference.HASH_BITS)
        return words

    def group_channels(self, words: np.ndarray) -> np.ndarray:
        """Return the channels (B, H, C, D) int32 of every block in the order of their groups, eq. 6 and 7."""
        channels = np.empty(words.shape, dtype=np.int32)
        for head in np.ndindex(words.shape[:2]):
            channels[head] = reference.group_channels(words[head])
        return channels

    def attend(
        self,
        problem: Problem,
        Q: np.ndarray,
        K: np.ndarray | GroupedKeys,
        V: np.ndarray,
        O: np.ndarray,
        lse: np.ndarray,
        maps: Maps,
        tables: ScoreTables = NO_TABLES,
    ) -> None:
        """Write attention into O (B, H, N, E) and its log-sum-exp into lse (B, H, N), a tile of queries at a time."""
        N, grouping = problem.queries, problem.grouping
        by_queries = grouping is not None and grouping.by == "queries"
        # no tile crosses from one block of queries into the next, for its rows share one map
        blocks = block_edges(N, grouping.block_size) if grouping is not None and by_queries else [(0, N)]
        tiles = [(n, min(n + QUERY_TILE, stop)) for start, stop in blocks for n in range(start, stop, QUERY_TILE)]

        def attend_tile(b: int, h: int, t: int) -> None:
            h_kv = h // problem.heads_per_kv_head
            _Head(
                problem,
                Q[b, h],
                _HeadOfGroupedKeys(K, b, h_kv) if isinstance(K, GroupedKeys) else K[b, h_kv],
                V[b, h_kv],
                O[b, h],
                lse[b, h],
                _maps_of_head(problem, maps, b, h, h_kv),
                tables.map(lambda table: reference.of_head(table, b, h)),
            ).attend(*tiles[t])

        rows = max(stop - start for start, stop in tiles)
        _run_tasks(
            attend_tile,
            (problem.batch, problem.heads, len(tiles)),
            memory=_tile_bytes(problem, rows),
            work=rows * problem.keys * (problem.rank + problem.value_width),
        )

    def ragged_attention(
        self,
        problem: RaggedProblem,
        q: np.ndarray,
        k: np.ndarray,
        v: np.ndarray,
        out: np.ndarray | None,
        cu_seqlens_q: np.ndarray,
        cu_seqlens_k: np.ndarray,
        lent: Lent = NOTHING_LENT,
    ) -> tuple[np.ndarray, np.ndarray, tuple[np.ndarray, np.ndarray] | None]:
        """Compute one checked call with packed sequences: each as a call of its own would, on views."""
        self.refuse(problem, q)
        packed = problem.packed
        result = np.empty((packed.queries, packed.heads, packed.value_width), q.dtype) if out is None else out
        lse = np.empty(problem.lse_shape, np.float32) if lent.lse is None else lent.lse
        ranks, score_errors = ([x] for x in _no_blocks(packed, 0))
        for queries, keys in zip(*map(_row_slices, (cu_seqlens_q, cu_seqlens_k)), strict=True):
            sequence = problem.sequence(queries.stop - queries.start, keys.stop - keys.start)
            Q, O = (_as_batch(x, queries) for x in (q, result))
            K, V = (_as_batch(x, keys) for x in (k, v))
            maps = None
            if 0 not in O.shape:
                maps = self.group_maps(sequence, Q, K)
                self.attend(sequence, Q, K, V, O, lse[np.newaxis, :, queries], maps)
            of_blocks = _no_blocks(packed, sequence.blocks)
            if isinstance(maps, SubspaceMaps):
                of_blocks = maps.ranks[0], maps.score_errors[0]
            for told, new in zip((ranks, score_errors), of_blocks, strict=True):
                told.append(new)
        blocks = (np.hstack(ranks), np.hstack(score_errors)) if isinstance(packed.grouping, Subspace) else None
        return result, lse, blocks

    def paged_attention(
        self,
        problem: PagedProblem,
        q: np.ndarray,
        k: np.ndarray | GroupedPages,
        v: np.ndarray,
        out: np.ndarray | None,
        page_table: np.ndarray,
        seqlens_k: np.ndarray,
        lent: Lent = NOTHING_LENT,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Compute one checked call: each sequence as a call of its own would, on a copy of its rows."""
        self.refuse(problem, q)
        longest = problem.longest
        Q, V = (self.bring_in(x, longest.layout) for x in (q, v))
        K = k if isinstance(k, GroupedPages) else self.bring_in(k, longest.layout)
        shape = (longest.batch, longest.heads, longest.queries, longest.value_width)
        O = self.empty(shape, q, longest.layout) if out is None else self.bring_in(out, longest.layout)
        lse = np.empty(problem.lse_shape, np.float32) if lent.lse is None else lent.lse
        for b, keys in enumerate(seqlens_k.tolist()):
            one = slice(b, b + 1)
            V_b = reference.rows_of_pages(V, page_table[b], keys)[np.newaxis]
            K_b: np.ndarray | GroupedKeys
            if isinstance(K, GroupedPages):
                K_b = _keys_in_pages(K, page_table[b], keys)
            else:
                K_b = reference.rows_of_pages(K, page_table[b], keys)[np.newaxis]
            self.compute(problem.sequence(keys), Q[one], K_b, V_b, O[one], lse[one])
        return self.hand_back(O, longest.layout, like=q, out=out), lse

    def bring_in(self, array: np.ndarray, layout: Layout) -> np.ndarray:
        """Return ``array`` as a (B, H, rows, width) view."""
        host = np.asarray(array)
        return host.transpose(0, 2, 1, 3) if layout == "bnhd" else host

    def shares_memory(self, array: np.ndarray) -> bool:  # noqa: ARG002
        """Return True: `bring_in` never copies."""
        return True

    def workspace_bytes(self, *_call: Any) -> int:
        """Return 0: host memory is not planned."""
        return 0

    def empty(self, shape: tuple[int, int, int, int], like: np.ndarray, layout: Layout) -> np.ndarray:
        """Return a new (B, H, rows, width) array of ``like``'s dtype whose memory is ordered as ``layout``."""
        B, H, rows, width = shape
        return self.bring_in(np.empty((B, rows, H, width) if layout == "bnhd" else shape, dtype=like.dtype), layout)

    def empty_lse(self, shape: tuple[int, int, int], like: np.ndarray, *, is_kept: bool = True) -> np.ndarray:  # noqa: ARG002
        """Return a new float32 (B, H, N) array."""
        return np.empty(shape, dtype=np.float32)

    def hand_back(self, array: np.ndarray, layout: Layout | None, *, like: Any, out: Any) -> Any:  # noqa: ARG002
        """Return a native array in the caller's layout, or ``out``, which it is a view of."""
        if out is not None:
            return out
        return array.transpose(0, 2, 1, 3) if layout == "bnhd" else array


def _keys_in_pages(pages: GroupedPages, page_table: np.ndarray, keys: int) -> GroupedKeys:
    """Return the keys of one sequence, whose pages are ``page_table`` (T,), as `GroupedKeys` of a batch of one."""
    size, heads = pages.page_size, pages.tails.shape[1]
    used = page_table[: ceil_div(keys, size)].tolist()
    tail = np.zeros((heads, 0, pages.tails.shape[3]), pages.dtype)
    if used and pages.tail_of[used[-1]] >= 0:
        tail = pages.tails[pages.tail_of[used.pop()], :, : keys - len(used) * size]
    blocks = []
    for page in used:
        fusion = np.ascontiguousarray(pages.maps[page, :, :-1].swapaxes(1, 2))
        kept = (pages.sampled[page], fusion, pages.maps[page, :, -1], pages.ranks[page], pages.score_errors[page])
        blocks.append(KeyBlock(*(x[np.newaxis] for x in kept)))
    return GroupedKeys(
        tail[np.newaxis],
        blocks,
        grouping=pages.grouping,
        queries=pages.queries,
        scale=pages.scale,
        layout=pages.layout,
    )


def _row_slices(cu_seqlens: np.ndarray) -> Iterator[slice]:
    """Yield the rows of every sequence."""
    yield from itertools.starmap(slice, itertools.pairwise(cu_seqlens.tolist()))


def _as_batch(packed: np.ndarray, rows: slice) -> np.ndarray:
    """Return some rows of (rows, H, width) as a batch of one sequence, (1, H, rows, width)."""
    return np.asarray(packed)[np.newaxis, rows].swapaxes(1, 2)


def _no_blocks(problem: Problem, blocks: int) -> tuple[np.ndarray, np.ndarray]:
    """Return ranks and score errors (H_x, C) of blocks that nobody made maps for."""
    shape = (problem.grouped_heads, blocks)
    return np.zeros(shape, np.int32), np.zeros(shape, _compute_dtype(problem))


@dataclass(frozen=True, slots=True)
class _LshHeadMaps:
    """The groups of one head of the side that is cut into blocks."""

    grouping: Grouping
    channels: np.ndarray  # (C, D)
    gains: np.ndarray | None  # (C, D)
    key_mean: None = None

    def sample(self, X: np.ndarray, block: int) -> np.ndarray:
        return reference.sample_channels(X, self.channels[block], self.grouping.group_size)

    def fuse(self, Y: np.ndarray, block: int) -> np.ndarray:
        gains = None if self.gains is None else self.gains[block]
        return reference.fuse_channels(Y, self.channels[block], gains, self.grouping.group_size)


@dataclass(frozen=True, slots=True)
class _SubspaceHeadMaps:
    """The maps of one head of the side that is cut into blocks, and the mean of its keys."""

    grouping: Subspace
    sampling: np.ndarray  # (C, D, R)
    fusion: np.ndarray  # (C, D, R)
    ranks: np.ndarray  # (C,)
    key_mean: np.ndarray  # (D,), subtracted from every key before it is sampled or fused

    def sample(self, X: np.ndarray, block: int) -> np.ndarray:
        sampled: np.ndarray = X @ self.sampling[block, :, : self.ranks[block]]
        return sampled

    def fuse(self, Y: np.ndarray, block: int) -> np.ndarray:
        fused: np.ndarray = Y @ self.fusion[block, :, : self.ranks[block]]
        return fused


_HeadMaps = _LshHeadMaps | _SubspaceHeadMaps


def _maps_of_head(problem: Problem, maps: Maps, b: int, h: int, h_kv: int) -> _HeadMaps | None:
    """Return what query head h and its key head are reduced with; None for exact attention."""
    grouping = problem.grouping
    h_x = h if grouping is not None and grouping.by == "queries" else h_kv
    if isinstance(grouping, Subspace) and isinstance(maps, SubspaceMaps):
        return _SubspaceHeadMaps(
            grouping, maps.sampling[b, h_x], maps.fusion[b, h_x], maps.ranks[b, h_x], maps.key_mean[b, h_kv]
        )
    if isinstance(grouping, Grouping) and isinstance(maps, GroupMaps):
        return _LshHeadMaps(grouping, maps.channels[b, h_x], None if maps.gains is None else maps.gains[b, h_x])
    return None


@dataclass(frozen=True, slots=True)
class _HeadOfGroupedKeys:
    """A key head of `GroupedKeys`."""

    keys: GroupedKeys
    b: int
    h: int

    def write_scores(self, S: np.ndarray, X: np.ndarray, m: int) -> None:
        """Write the scores S (eq. 27) of scaled queries X with the keys from m on."""
        L, exact_from, stop = self.keys.block_size, self.keys.exact_from, m + S.shape[1]
        for c in range(m // L, ceil_div(min(stop, exact_from), L)):
            block = self.keys.blocks[c]
            sampled, fusion, mean = (x[self.b, self.h] for x in (block.sampled, block.fusion, block.mean))
            first, last = max(c * L, m), min((c + 1) * L, stop)
            fused = X @ _tile(fusion, 0, len(fusion), X.dtype)
            scores = S[:, first - m : last - m]
            np.matmul(fused, _tile(sampled, first - c * L, last - c * L, X.dtype).T, out=scores)
            scores += (X @ mean.astype(X.dtype))[:, np.newaxis]
        if stop > exact_from:
            first = max(m, exact_from)
            tail = self.keys.tail[self.b, self.h]
            np.matmul(X, _tile(tail, first - exact_from, stop - exact_from, X.dtype).T, out=S[:, first - m :])


@dataclass(frozen=True, slots=True)
class _Head:
    """A query head and its key/value head."""

    problem: Problem
    Q: np.ndarray  # (N, D)
    K: np.ndarray | _HeadOfGroupedKeys  # (M, D)
    V: np.ndarray  # (M, E)
    O: np.ndarray  # (N, E)
    lse: np.ndarray  # (N,)
    maps: _HeadMaps | None  # None: exact
    tables: ScoreTables  # broadcast to (N, M)

    def attend(self, start: int, stop: int) -> None:
        """Write O and lse of the queries ``start`` to ``stop - 1``, all of one block."""
        problem, mask, bias = self.problem, self.tables.mask, self.tables.bias
        low, high = problem.key_limits
        dtype = _compute_dtype(problem)
        # from the first key that the first of these queries sees to the last that the last sees (eq. 3 and 23)
        m_first = 0 if low is None else max(start + low, 0)
        m_last = problem.keys if high is None else min(stop + high, problem.keys)

        X = _tile(self.Q, start, stop, dtype) * dtype.type(problem.scale)
        key_mean = None if self.maps is None else self.maps.key_mean
        row_shift = None if key_mean is None else X @ key_mean
        block = None
        if self.maps is not None and self.maps.grouping.by == "queries":
            block = start // self.maps.grouping.block_size
            X = self.maps.sample(X, block)
        softmax = _RunningSoftmax(stop - start, problem.value_width, dtype)
        buffer = np.empty((stop - start) * max(min(KEY_TILE, m_last - m_first), 0), dtype)
        for m in range(m_first, m_last, KEY_TILE):
            m_stop = min(m + KEY_TILE, m_last)
            # the queries that see a key of this tile
            n = start if high is None else max(start, m - high)
            n_stop = stop if low is None else min(stop, m_stop - low)
            shown = None if mask is None else _part(mask, n, n_stop, m, m_stop)
            if shown is not None and not shown.any():
                continue
            rows = slice(n - start, n_stop - start)
            S = buffer[: (n_stop - n) * (m_stop - m)].reshape(-1, m_stop - m)
            if isinstance(self.K, _HeadOfGroupedKeys):
                self.K.write_scores(S, X[rows], m)
            else:
                Y = _tile(self.K, m, m_stop, dtype)
                self._write_scores(S, X[rows], Y if key_mean is None else Y - key_mean, n, m, block)
            if problem.softcap:
                if row_shift is not None:
                    S += row_shift[rows, np.newaxis]
                _cap_scores(S, problem.softcap)
            if bias is not None:
                S += _part(bias, n, n_stop, m, m_stop)
            if shown is not None and not shown.all():
                np.copyto(S, -np.inf, where=~shown)
            _hide_beyond_limits(S, n, m, low, high)
            softmax.add(rows, S, _tile(self.V, m, m_stop, dtype))
        lse_shift = 0 if row_shift is None or problem.softcap else row_shift
        softmax.write(self.O[start:stop], self.lse[start:stop], lse_shift)

    def _write_scores(self, S: np.ndarray, X: np.ndarray, Y: np.ndarray, n: int, m: int, block: int | None) -> None:
        """Write the scores (eq. 4, 20) of scaled queries X from n on, sampled if of a ``block``, and keys Y from m on.

        A row's scores with blocks behind its causal limit may be left as they are.
        """
        if self.maps is None:
            np.matmul(X, Y.T, out=S)
        elif block is not None:
            np.matmul(X, self.maps.fuse(Y, block).T, out=S)
        else:
            L = self.maps.grouping.block_size
            for c in range(m // L, ceil_div(m + len(Y), L)):
                keys = slice(max(c * L - m, 0), (c + 1) * L - m)
                own, mapped = self._rows_of_block(c * L, (c + 1) * L, n, len(X))
                if own < mapped:
                    np.matmul(X[own:mapped], Y[keys].T, out=S[own:mapped, keys])
                if mapped < len(X):
                    np.matmul(self.maps.fuse(X[mapped:], c), self.maps.sample(Y[keys], c).T, out=S[mapped:, keys])

    def _rows_of_block(self, start: int, stop: int, n: int, rows: int) -> tuple[int, int]:
        """Return the first of ``rows`` queries from n on whose own block is this one, and the first to meet its maps.

        What comes before them does not see the block.
        """
        offset = self.problem.causal_offset
        if offset is None or not self.problem.own_block_is_exact:
            return 0, 0
        own, mapped = (min(max(key - offset - n, 0), rows) for key in (start, stop))
        return own, mapped


class _RunningSoftmax:
    """Softmax-weighted values of a tile of queries, over keys that come in tiles (eq. 10)."""

    def __init__(self, rows: int, value_width: int, dtype: np.dtype[Any]) -> None:
        self.O = np.zeros((rows, value_width), dtype)
        self.row_max = np.full((rows, 1), -np.inf, dtype)
        self.row_sum = np.zeros((rows, 1), dtype)
        self.product = np.empty_like(self.O)

    def add(self, rows: slice, S: np.ndarray, V: np.ndarray) -> None:
        """Take in the scores S (which become P) of some rows and the values V of one tile of keys."""
        O, row_max, row_sum, product = (x[rows] for x in (self.O, self.row_max, self.row_sum, self.product))
        new_max = np.maximum(row_max, S.max(axis=1, keepdims=True))
        shift = _finite_shift(new_max)
        S -= shift
        np.exp(S, out=S)
        rescale = np.exp(row_max - shift)
        row_max[...] = new_max
        row_sum *= rescale
        row_sum += S @ np.ones((S.shape[1], 1), S.dtype)  # BLAS adds rows up faster than sum does
        if (rescale != 1).any():
            O *= rescale
        O += np.matmul(S, V, out=product)

    def write(self, O: np.ndarray, lse: np.ndarray, lse_shift: np.ndarray | float) -> None:
        """Divide by the row sums; a row without weight gives zero and an lse of minus infinity.

        ``lse_shift`` (rows,) is what every score of a row was lowered by (eq. 12).
        """
        empty = self.row_sum == 0
        np.divide(self.O, self.row_sum, out=self.O, where=~empty)
        np.copyto(self.O, 0, where=empty)
        O[...] = self.O
        lse[...] = (np.log(self.row_sum) + _finite_shift(self.row_max))[:, 0] + lse_shift
        np.copyto(lse, -np.inf, where=empty[:, 0])  # whatever its query holds


def _finite_shift(row_max: np.ndarray) -> np.ndarray:
    # a row of scores that are all minus infinity has no weight; shifted by its maximum it would be NaN
    return np.where(row_max == -np.inf, row_max.dtype.type(0), row_max)


def _cap_scores(S: np.ndarray, softcap: float) -> None:
    """Put `reference.cap_scores` of the scores in their place (eq. 21)."""
    S /= softcap
    np.tanh(S, out=S)
    S *= softcap


def _hide_beyond_limits(S: np.ndarray, n: int, m: int, low: int | None, high: int | None) -> None:
    """Set the scores of queries from n on and keys from m on to minus infinity where no query may look (eq. 23)."""
    rows, columns = np.arange(n, n + len(S))[:, np.newaxis], np.arange(m, m + S.shape[1])
    if high is not None and n + high < columns[-1]:
        np.copyto(S, -np.inf, where=columns > rows + high)
    if low is not None and rows[-1, 0] + low > m:
        np.copyto(S, -np.inf, where=columns < rows + low)


def _part(table: np.ndarray, n: int, n_stop: int, m: int, m_stop: int) -> np.ndarray:
    """Return the rows n and columns m of what broadcasts to (N, M); one row or column stays one."""
    rows, columns = (
        slice(0, 1) if size == 1 else part
        for size, part in zip(table.shape, (slice(n, n_stop), slice(m, m_stop)), strict=True)
    )
    return table[rows, columns]


def _weigh_members(
    problem: Problem, grouping: Grouping, X: np.ndarray, Y: np.ndarray, channels: np.ndarray, gains: np.ndarray
) -> None:
    """Move the sampled member of every group of one head to its front and write all gains (eq. 9).

    X is (rows, D), channels and gains are (C, D), Y holds the heads that meet X: (heads, rows, D).
    """
    sums = _blocks_with_sums(problem, grouping, partial(_channel_norms, Y), np.zeros(problem.width))
    for c, start, stop, y_norms, _ in sums:
        channels[c], gains[c] = reference.fusion_gains(
            X[start:stop].astype(np.float64), channels[c], y_norms, grouping.group_size
        )


def _heads_that_meet(problem: Problem, h: int) -> slice:
    """Return the heads of the other side that meet head h of the side that is cut into blocks."""
    shared = problem.heads_per_kv_head
    grouping = problem.grouping
    if grouping is not None and grouping.by == "queries":
        return slice(h // shared, h // shared + 1)
    return slice(h * shared, (h + 1) * shared)


def _blocks_with_sums(
    problem: Problem, grouping: Grouping | Subspace, sum_rows: Callable[[int, int], np.ndarray], total: np.ndarray
) -> Iterator[tuple[int, int, int, np.ndarray, int]]:
    """Yield every block: number, first and past-the-last row, ``sum_rows`` over the rows that meet it, their count.

    In a causal call the rows that meet a block grow from block to block, over keys from the last block to the first; so
    the sum, which starts as ``total``, grows on the way, and no row is read twice.
    """
    edges = list(enumerate(block_edges(problem.grouped_rows, grouping.block_size)))
    first = last = 0 if grouping.by == "queries" else problem.queries
    for c, (start, stop) in edges if grouping.by == "queries" else reversed(edges):
        meet = rows_that_meet(
            start,
            stop,
            group_by=grouping.by,
            N=problem.queries,
            M=problem.keys,
            causal_offset=problem.meeting_offset,
        )
        for new_first, new_last in ((meet[0], first), (last, meet[1])):
            total = total + sum_rows(new_first, new_last)
        first, last = meet
        yield c, start, stop, total, last - first


def _tiles_of_rows(first: int, last: int) -> Iterator[slice]:
    for start in range(first, last, KEY_TILE):
        yield slice(start, min(start + KEY_TILE, last))


def _column_sums(X: np.ndarray) -> np.ndarray:
    """Return the sum of the rows of X (rows, D), in float64."""
    total = np.zeros(X.shape[1])
    for rows in _tiles_of_rows(0, len(X)):
        total += X[rows].sum(axis=0, dtype=np.float64)
    return total


def _channel_norms(Y: np.ndarray, first: int, last: int) -> np.ndarray:
    """Return |y_j|^2 over rows ``first`` to ``last - 1`` of all heads of Y (heads, rows, D), in float64."""
    norms = np.zeros(Y.shape[2])
    for head in Y:
        for rows in _tiles_of_rows(first, last):
            norms += reference.channel_norms(head[rows].astype(np.float64))
    return norms


def _gram_of_rows(Y: np.ndarray, shift: np.ndarray, first: int, last: int) -> np.ndarray:
    """Return the Gram matrix of Y - shift over rows ``first`` to ``last - 1`` of all heads of Y, in float64."""
    total = np.zeros((Y.shape[2], Y.shape[2]))
    for head in Y:
        for rows in _tiles_of_rows(first, last):
            total += reference.gram(head[rows].astype(np.float64) - shift)
    return total


def _compute_dtype(problem: Problem) -> np.dtype[Any]:
    dtype: np.dtype[Any] = np.dtype(sum_type(problem.dtype))
    return dtype


def _tile(rows: np.ndarray, start: int, stop: int, dtype: np.dtype[Any]) -> np.ndarray:
    """Return some rows in ``dtype``, as a view where BLAS can read them in place."""
    tile = rows[start:stop]
    width = tile.shape[1]
    in_place = tile.flags.aligned and tile.strides[1] == dtype.itemsize and tile.strides[0] >= width * dtype.itemsize
    return tile if tile.dtype == dtype and in_place else tile.astype(dtype, order="C")


def _tile_bytes(problem: Problem, rows: int) -> int:
    """Return an upper bound of what one worker holds for a tile of ``rows`` queries."""
    D, E, R = problem.width, problem.value_width, problem.rank
    itemsize = _compute_dtype(problem).itemsize
    keys = min(KEY_TILE, problem.keys)
    scores = rows * keys * (itemsize + 1)  # and which of them are hidden
    # X, O and the product; K and V converted, K centred; a sampled side, a fused side and what is being added to it
    return scores + itemsize * (rows * (D + 2 * E) + keys * (2 * D + E) + 3 * R * max(rows, keys))


class _BlasThreads:
    """The number of threads of NumPy's OpenBLAS, one setting for the whole process.

    Workers that each call a multithreaded BLAS get in one another's way, so it has one thread a call while they run.
    NumPy offers no function for that; the library's own is looked up. Another BLAS is left as it is.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self._get, self._set = _openblas_functions()

    @contextmanager
    def one_per_call(self) -> Iterator[int]:
        """Hold BLAS to one thread; yield how many it had, which also says how many the user allows us."""
        with self._lock:  # the first of several concurrent users saves the setting, the last restores it
            if self._users == 0 and self._get and self._set:
                self._threads = self._get()
                self._set(1)
            self._users += 1
        try:
            yield self._threads
        finally:
            with self._lock:
                self._users -= 1
                if self._users == 0 and self._set:
                    self._set(self._threads)


def _openblas_functions() -> tuple[Callable[[], int] | None, Callable[[int], None] | None]:
    # names differ between NumPy's wheels and system packages; a symbol is found through any library that links to it
    library = ctypes.CDLL(importlib.import_module("numpy.linalg._umath_linalg").__file__)
    for prefix, suffix in itertools.product(("scipy_", ""), ("64_", "")):
        try:
            return (
                getattr(library, f"{prefix}openblas_get_num_threads{suffix}"),
                getattr(library, f"{prefix}openblas_set_num_threads{suffix}"),
            )
        except AttributeError:
            continue
    return None, None


_BLAS_THREADS = _BlasThreads()


def _run_tasks(run: Callable[..., None], shape: tuple[int, ...], *, memory: int, work: int) -> None:
    """Call ``run`` with every index of ``shape``, on several threads where a task is worth it.

    ``memory`` is what one task holds, in bytes; ``work`` its multiply-adds.
    """
    tasks = itertools.product(*map(range, shape))
    with _BLAS_THREADS.one_per_call() as threads:
        workers = min(threads, math.prod(shape), SCRATCH_BYTES // max(1, memory)) if work >= THREADED_WORK else 1
        if workers <= 1:
            _drain(run, tasks)
            return
        shared = _Shared(tasks)
        with ThreadPoolExecutor(workers) as pool:
            try:
                for worker in [pool.submit(_drain, run, shared) for _ in range(workers)]:
                    worker.result()
            finally:
                shared.close()  # after an error or Ctrl-C the other workers stop at their next task


def _drain(run: Callable[..., None], tasks: Iterable[tuple[int, ...]]) -> None:
    # NumPy's error state belongs to a thread. NaN, inf and overflow pass through to the result without a warning
    with np.errstate(all="ignore"):
        for task in tasks:
            run(*task)


class _Shared:
    """An iterator that several threads may advance."""

    def __init__(self, items: Iterator[tuple[int, ...]]) -> None:
        self._items = items
        self._lock = threading.Lock()

    def __iter__(self) -> Iterator[tuple[int, ...]]:
        return self

    def __next__(self) -> tuple[int, ...]:
        with self._lock:
            return next(self._items)

    def close(self) -> None:
        """Leave nothing for the next call."""
        with self._lock:
            self._items = iter(())


BACKEND = NumpyBackend()
