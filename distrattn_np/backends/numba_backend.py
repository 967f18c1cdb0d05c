"""Numba CUDA: the kernels of `distrattn_np.numba_kernels`, one after another, on a GPU or in Numba's simulator.

Native arrays are those of numba_device.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numba import cuda

from .. import checks
from ..arrays import Kind, describe, kind_of, on_stream, sum_type
from ..grouped_keys import GroupedKeys
from ..numba_kernels.channel_norms import make_channel_norms
from ..numba_kernels.forward import Tiles, choose_tiles, make_forward
from ..numba_kernels.fusion_gains import make_fusion_gains
from ..numba_kernels.gram import ProductTiles, make_gram
from ..numba_kernels.group_channels import make_group_channels
from ..numba_kernels.hash_channels import make_hash_channels
from ..numba_kernels.key_mean import make_key_mean
from ..numba_kernels.merge_results import make_merge_results
from ..numba_kernels.reduce_rows import make_reduce_rows
from ..numba_kernels.sequences import (
    BLOCK_FIELDS,
    BLOCKS,
    KEYS,
    MET_STOP,
    NEW_START,
    NEW_STOP,
    QUERIES,
    SEQUENCE_FIELDS,
    START,
    STOP,
    make_sequence_tables,
    most_tiles,
)
from ..numba_kernels.subspace_maps import SQUARE_BUFFERS, WIDE_BUFFERS, make_subspace_maps
from ..numba_kernels.sum_segments import make_sum_segments
from ..problem import (
    Grouping,
    GroupMaps,
    Layout,
    PagedProblem,
    Problem,
    RaggedProblem,
    Subspace,
    SubspaceMaps,
    ceil_div,
)
from ..reference import hyperplanes
from ..tiles import ScoreSwitches
from . import (
    NO_TABLES,
    NOTHING_LENT,
    Backend,
    KeysInPages,
    Lent,
    Maps,
    ScoreTables,
    host_copy_back,
    keys_brought_in,
)
from .device_work import Placed, hyperplane_rows
from .numba_device import (
    SIMULATED,
    MeasuredArray,
    as_batch,
    bound,
    broadcast,
    constant,
    copy_in,
    empty,
    from_cupy,
    launch,
    lending,
    new,
    on_device_of,
    swap_rows_and_heads,
    to_cupy,
    with_batch_axis,
    without_batch_axis,
)

WORKSPACE_BYTES = 256 << 20
"""What the maps of the blocks that are solved together may take: where they need more, fewer are solved together."""


class Threads(NamedTuple):
    """Threads of the blocks of all kernels but the forward one, which `choose_tiles` knows."""

    hash_channels: int
    hash_bits: int
    group: int
    reduction_rows: int
    reduction_columns: int
    product: ProductTiles


GPU_THREADS = Threads(
    hash_channels=32,
    hash_bits=4,
    group=256,
    reduction_rows=8,
    reduction_columns=32,
    product=ProductTiles(size=32, depth=16, thread_rows=16, thread_columns=16),
)
SIMULATOR_THREADS = Threads(
    hash_channels=8,
    hash_bits=2,
    group=8,
    reduction_rows=2,
    reduction_columns=8,
    product=ProductTiles(size=8, depth=8, thread_rows=2, thread_columns=2),
)
THREADS = SIMULATOR_THREADS if SIMULATED else GPU_THREADS


@dataclass(frozen=True, slots=True)
class Sequences:
    """The sequences of a call as kernels see them."""

    table: Any
    """[SEQUENCE_FIELDS, S + 1] int64, numba_kernels/sequences.py."""
    blocks: Any
    """[BLOCK_FIELDS, C] int64, in the same place."""
    diagonal: int
    """What is taken from an offset of the packed problem to count it from the diagonal of a sequence."""

    @property
    def count(self) -> int:
        """How many there are."""
        return int(self.table.shape[1]) - 1


class NumbaBackend(Backend):
    """float16, float32 and float64; sums are float32, float64 for float64."""

    name = "numba"
    kinds = frozenset(("numba", "numpy", "cupy"))
    builds_subspace: ClassVar[bool] = True
    kinds_of_grouped_keys: ClassVar[frozenset[Kind]] = frozenset({"numba"})
    kinds_of_grouped_pages: ClassVar[frozenset[Kind]] = frozenset({"numba"})

    def attention(
        self,
        problem: Problem,
        q: Any,
        k: Any,
        v: Any,
        out: Any,
        tables: ScoreTables = NO_TABLES,
        lent: Lent = NOTHING_LENT,
    ) -> tuple[Any, Any, Maps]:
        """Compute one checked call on the device of its arrays."""
        _refuse_dtype(problem, q)
        with self._where_it_runs(problem, q, k, v, out, tables, lent):
            return super().attention(problem, bound(q, lent.stream), k, v, out, tables, lent)

    @contextmanager
    def _where_it_runs(
        self, problem: Problem | RaggedProblem, q: Any, k: Any, v: Any, out: Any, tables: ScoreTables, lent: Lent
    ) -> Iterator[None]:
        """Make the device of ``q`` current, the caller's workspace and, for CuPy arrays, its stream."""
        with ExitStack() as stack:
            stack.enter_context(on_device_of(q))
            stack.enter_context(on_stream(lent.stream if kind_of(q) == "cupy" else None))
            if lent.workspace is not None:
                needed = self.workspace_bytes(problem, q, k, v, out, tables, lent)
                checks.check_workspace_size(lent.workspace, needed)
                stack.enter_context(lending(self.bring_in(lent.workspace, "bhnd")))
            yield

    def ragged_attention(
        self,
        problem: RaggedProblem,
        q: Any,
        k: Any,
        v: Any,
        out: Any,
        cu_seqlens_q: Any,
        cu_seqlens_k: Any,
        lent: Lent = NOTHING_LENT,
    ) -> tuple[Any, Any, tuple[Any, Any] | None]:
        """Compute one checked call with packed sequences as a batch of one, whose lengths stay on the device."""
        packed = problem.packed
        _refuse_dtype(packed, q)
        self.refuse(problem, q)
        with self._where_it_runs(problem, q, k, v, out, NO_TABLES, lent):
            rows, keys, values, *edges = (
                self.bring_in(x, "bhnd") for x in (bound(q, lent.stream), k, v, cu_seqlens_q, cu_seqlens_k)
            )
            if out is not None and self.shares_memory(out):
                result = self.bring_in(out, "bhnd")
            else:
                result = new((packed.queries, packed.heads, packed.value_width), rows.dtype, rows)
            if lent.lse is not None and self.shares_memory(lent.lse):
                lse = self.bring_in(lent.lse, "bhnd")
            else:
                lse = (new if lent.wants_lse else empty)(problem.lse_shape, np.float32, rows)
            maps = None
            if 0 not in result.shape:
                Q, K, V, O = (as_batch(x) for x in (rows, keys, values, result))
                maps = self.compute_ragged(problem, edges[0], edges[1], Q, K, V, O, with_batch_axis(lse))
            told = self._ranks_and_errors(problem, maps, rows)
            result = self.hand_back(result, None, like=q, out=out)
            lse = self.hand_back(lse, None, like=q, out=lent.lse)
            return result, lse, told and tuple(self.hand_back(x, None, like=q, out=None) for x in told)

    def compute_ragged(
        self, problem: RaggedProblem, edges_q: Any, edges_k: Any, Q: Any, K: Any, V: Any, O: Any, lse: Any
    ) -> Maps:
        """Write attention of packed sequences, native arrays of batch 1, into O and lse; return the maps of blocks."""
        sequences = self.sequences(problem.packed, Q, problem, edges_q, edges_k)
        maps = self.group_maps(problem.packed, Q, K, sequences)
        self.attend(problem.packed, Q, K, V, O, lse, maps, sequences=sequences)
        return maps

    def paged_attention(
        self,
        problem: PagedProblem,
        q: Any,
        k: Any,
        v: Any,
        out: Any,
        page_table: Any,
        seqlens_k: Any,
        lent: Lent = NOTHING_LENT,
    ) -> tuple[Any, Any]:
        """Compute one checked call on copies of the rows that the sequences have, packed."""
        from .numba_paged_keys import PagedKeys  # which launches through this module

        keys = PagedKeys.of(k, page_table, seqlens_k, problem.is_top_left)
        result, lse, _ = self.attention(problem.longest, q, keys, v, out, NO_TABLES, lent)
        return result, lse

    def _ranks_and_errors(self, problem: RaggedProblem, maps: Maps, like: Any) -> tuple[Any, Any] | None:
        """Return ranks and score errors, each (H_x, C); zeros where nothing was computed."""
        packed = problem.packed
        if isinstance(maps, SubspaceMaps):
            return without_batch_axis(maps.ranks), without_batch_axis(maps.score_errors)
        if not isinstance(packed.grouping, Subspace):
            return None
        shape = packed.grouped_heads, problem.most_blocks
        return tuple(copy_in(np.zeros(shape, dtype), like) for dtype in (np.int32, sum_type(packed.dtype)))

    def workspace_bytes(
        self,
        problem: Problem | RaggedProblem | PagedProblem,
        q: Any,
        k: Any,
        v: Any,
        out: Any,  # noqa: ARG002
        tables: ScoreTables = NO_TABLES,
        lent: Lent = NOTHING_LENT,
        page_table: Any = None,
        seqlens_k: Any = None,
    ) -> int:
        """Return what the call takes where nothing is launched."""
        self.refuse(problem, q)
        if isinstance(problem, PagedProblem):
            from .numba_paged_keys import PagedKeys  # which launches through this module

            k = PagedKeys.of(k, page_table, seqlens_k, problem.is_top_left)
            problem = problem.longest
        packed = problem.packed if isinstance(problem, RaggedProblem) else problem
        _refuse_dtype(packed, q)
        with lending(None) as places:
            Q, V = (_measured(x, packed.layout) for x in (q, v))
            K = keys_brought_in(k, _measured, packed.layout)
            O = MeasuredArray.of((packed.batch, packed.heads, packed.queries, packed.value_width), packed.dtype)
            lse_shape = packed.batch, packed.heads, packed.queries
            keeps_lse = lent.lse is not None or lent.wants_lse
            lse = MeasuredArray.of(lse_shape, np.float32) if keeps_lse else empty(lse_shape, np.float32, Q)
            if isinstance(problem, RaggedProblem) and 0 not in O.shape:
                edges = MeasuredArray.of((problem.sequences + 1,), np.int32)
                self.compute_ragged(problem, edges, edges, Q, K, V, O, lse)
            elif not isinstance(problem, RaggedProblem):
                self.compute(problem, Q, K, V, O, lse, tables.map(lambda table: _measured(table, "bhnd")))
        return places.bytes

    def group_maps(self, problem: Problem, Q: Any, K: Any, sequences: Sequences | None = None) -> Maps:
        """Return the maps of every block as native arrays; all floats have the type of the sums."""
        K = K.bind(Q.stream)  # arrays may be bound to different streams; every launch of a call goes to that of Q
        match problem.grouping:
            case Grouping() as grouping:
                return self._lsh_maps(problem, grouping, Q, K, sequences)
            case Subspace() as grouping:
                return self._subspace_maps(problem, grouping, Q, K, sequences or self.sequences(problem, Q))
            case _:
                return None

    def _lsh_maps(self, problem: Problem, grouping: Grouping, Q: Any, K: Any, sequences: Sequences | None) -> GroupMaps:
        X = K if grouping.by == "keys" else Q
        rows = hyperplane_rows(grouping.block_size)
        planes = constant(("hyperplanes", grouping.seed, rows), lambda: hyperplanes(grouping.seed, rows), X)
        channels = self.group_channels(self.hash_channels(X, planes, grouping.block_size, sequences))
        if grouping.fusion == "sum":
            return GroupMaps(channels, None)
        norms = self.channel_norms(problem, Q, K, sequences)
        gains = self.fusion_gains(X, channels, norms, grouping.group_size, grouping.block_size, sequences)
        return GroupMaps(channels, gains)

    def _subspace_maps(
        self, problem: Problem, grouping: Subspace, Q: Any, K: Any, sequences: Sequences
    ) -> SubspaceMaps:
        accumulator, tiles, D, R = sum_type(problem.dtype), THREADS.product, problem.width, problem.rank
        blocks = (problem.batch, problem.grouped_heads, sequences.blocks.shape[1])
        maps = SubspaceMaps(
            sampling=empty((*blocks, D, R), accumulator, Q),
            fusion=empty((*blocks, D, R), accumulator, Q),
            key_mean=self.key_mean(K, sequences),
            ranks=empty(blocks, np.int32, Q),
            score_errors=empty(blocks, accumulator, Q),
        )

        by_keys, causal = grouping.by == "keys", problem.causal_offset is not None
        if by_keys:
            x_grams = self.grams(K, maps.key_mean, sequences, START, problem.kv_heads)
            y_grams = self.grams(Q, None, sequences, NEW_START, problem.kv_heads)
        else:
            x_grams = self.grams(Q, None, sequences, START, problem.heads)
            y_grams = self.grams(K, maps.key_mean, sequences, NEW_START, problem.kv_heads)
        # over queries a block meets what those before it meet, over keys what those behind it do
        kernel = make_sum_segments(causal and not by_keys, tiles.size)
        grid = problem.batch * sequences.count * problem.kv_heads * ceil_div(D, tiles.size)
        launch(kernel, grid, THREADS.group, y_grams, sequences.table)

        self.solve_maps(
            maps,
            x_grams,
            y_grams,
            sequences,
            problem.heads_per_kv_head if by_keys else 1,
            grouping,
            problem.scale,
            y_changes=causal,
        )
        return maps

    def solve_maps(
        self,
        maps: SubspaceMaps,
        x_grams: Any,
        y_grams: Any,
        sequences: Sequences,
        heads_that_meet: int,
        grouping: Subspace,
        scale: float,
        *,
        y_changes: bool,
    ) -> None:
        """Write all of ``maps`` but the mean from Gram matrices of `grams`.

        ``y_changes``: each block has a B of its own. ``heads_that_meet``: those whose rows B is a sum over.
        """
        *blocks, D, R = maps.sampling.shape
        accumulator, tiles = maps.sampling.dtype.type, THREADS.product
        kernel = make_subspace_maps(accumulator, D, R, grouping.rank is None, y_changes, tiles)
        numbers = WIDE_BUFFERS * R * D + SQUARE_BUFFERS * R * R
        most = WORKSPACE_BYTES // (numbers * np.dtype(accumulator).itemsize)
        grid = min(math.prod(blocks), max(most, 1))
        launch(
            kernel,
            grid,
            (tiles.thread_columns, tiles.thread_rows),
            x_grams,
            y_grams,
            sequences.blocks,
            heads_that_meet,
            maps.sampling,
            maps.fusion,
            maps.ranks,
            maps.score_errors,
            empty((grid, WIDE_BUFFERS, R, D), accumulator, x_grams),
            empty((grid, SQUARE_BUFFERS, R, R), accumulator, x_grams),
            grouping.refine,
            accumulator(scale),
            accumulator(grouping.score_tol or 0),
        )

    def sequences(
        self,
        problem: Problem,
        like: Any,
        ragged: RaggedProblem | None = None,
        cu_seqlens_q: Any = None,
        cu_seqlens_k: Any = None,
    ) -> Sequences:
        """Return where sequences and their blocks are; without a ragged problem, all rows of a batch are one."""
        count, blocks, diagonal = 1, problem.blocks, 0
        if ragged is not None:
            count, blocks = ragged.sequences, ragged.most_blocks
            diagonal = 0 if ragged.is_top_left else problem.keys - problem.queries
        table = empty((SEQUENCE_FIELDS, count + 1), np.int64, like)
        found = Sequences(table, empty((BLOCK_FIELDS, blocks), np.int64, like), diagonal)
        by_keys = problem.grouping is not None and problem.grouping.by == "keys"
        kernel = make_sequence_tables(
            ragged is not None,
            ragged is not None and not ragged.is_top_left,
            by_keys,
            problem.causal_offset is not None,
            THREADS.group,
        )
        query_block, key_block = _row_blocks(problem)
        launch(
            kernel,
            1,
            THREADS.group,
            table,
            found.blocks,
            # Numba passes no None to a GPU: any array does where the kernel reads none
            table if cu_seqlens_q is None else cu_seqlens_q,
            table if cu_seqlens_k is None else cu_seqlens_k,
            problem.queries,
            problem.keys,
            query_block,
            _forward_tiles(problem).block_q,
            key_block if by_keys else query_block,
            THREADS.product.size,
            0 if problem.meeting_offset is None else problem.meeting_offset - diagonal,
        )
        return found

    @staticmethod
    def one_block(rows: int, rows_that_meet: int, like: Any) -> Sequences:
        """Return one block of so many rows, all that there are."""
        table = np.zeros((SEQUENCE_FIELDS, 2), np.int64)
        table[[QUERIES, KEYS], 1] = rows
        table[BLOCKS, 1] = 1
        blocks = np.zeros((BLOCK_FIELDS, 1), np.int64)
        blocks[[STOP, NEW_STOP]] = rows
        blocks[MET_STOP] = rows_that_meet
        return Sequences(copy_in(table, like), copy_in(blocks, like), 0)

    def key_mean(self, K: Any, sequences: Sequences, *, of_all: bool = False) -> Any:
        """Return the mean of the keys of every head, (B or sequences, H_kv, D) (eq. 12), or ``of_all`` rows of K."""
        batch, heads, _, width = K.shape
        mean = empty((batch * sequences.count, heads, width), sum_type(K.dtype), K)
        kernel = make_key_mean(mean.dtype.type, of_all, THREADS.reduction_rows, THREADS.reduction_columns)
        grid = batch * sequences.count * heads * ceil_div(width, THREADS.reduction_columns)
        threads = (THREADS.reduction_columns, THREADS.reduction_rows)
        launch(kernel, grid, threads, K, mean, sequences.table)
        return mean

    def grams(self, X: Any, mean: Any | None, sequences: Sequences, edge: int, heads: int) -> Any:
        """Return the Gram matrices of the segments of X, less the mean, (B, ``heads``, C, D, D) (eq. 11).

        ``edge``: where the table of blocks has the first row of each.
        """
        batch, _, _, width = X.shape
        accumulator, tiles = sum_type(X.dtype), THREADS.product
        grams = empty((batch, heads, sequences.blocks.shape[1], width, width), accumulator, X)
        grid = batch * heads * grams.shape[2] * ceil_div(width, tiles.size) ** 2
        kernel = make_gram(accumulator, mean is not None, tiles)
        # Numba passes no None to a GPU: any array does where the kernel reads none
        threads = (tiles.thread_columns, tiles.thread_rows)
        launch(kernel, grid, threads, X, grams if mean is None else mean, sequences.blocks, edge, grams)
        return grams

    def reduce_rows(
        self,
        X: Any,
        maps: SubspaceMaps,
        block_size: int,
        sequences: Sequences | None,
        *,
        is_centred: bool,
        out: Any = None,
    ) -> Any:
        """Return the rows of X, less their mean where centred, times W of their block, (B, H_x, rows, R) (eq. 4).

        In ``out``, rounded to its dtype, where that is given. Columns from the rank of a block on are left as they are.
        """
        batch, heads, rows, width = X.shape
        accumulator, tiles = sum_type(X.dtype), THREADS.product
        sampled = empty((batch, heads, rows, maps.sampling.shape[4]), accumulator, X) if out is None else out
        kernel = make_reduce_rows(accumulator, width, is_centred, sequences is not None, tiles)
        grid = batch * heads * _most_tiles(rows, block_size, tiles.size, sequences)
        threads = (tiles.thread_columns, tiles.thread_rows)
        arrays = (maps.key_mean, maps.sampling, maps.ranks, sampled, *_tables(sequences, sampled))
        launch(kernel, grid, threads, X, *arrays, block_size)
        return sampled

    def hash_channels(self, X: Any, planes: Any, block_size: int, sequences: Sequences | None = None) -> Any:
        """Return one word per channel and block, (B, H, C, D) uint16 (eq. 5). ``planes``: those of a block, or more."""
        batch, heads, rows, width = X.shape
        blocks = ceil_div(rows, block_size) if sequences is None else sequences.blocks.shape[1]
        words = empty((batch, heads, blocks, width), np.uint16, X)
        kernel = make_hash_channels(sum_type(X.dtype), THREADS.hash_channels, THREADS.hash_bits, sequences is not None)
        grid = batch * heads * blocks * ceil_div(width, THREADS.hash_channels)
        threads = (THREADS.hash_bits, THREADS.hash_channels)
        launch(kernel, grid, threads, X, planes, words, _tables(sequences, words)[1], block_size)
        return words

    def group_channels(self, words: Any) -> Any:
        """Return the channels of every block in the order of their Gray ranks, (B, H, C, D) int32 (eq. 6 and 7)."""
        batch, heads, blocks, width = words.shape
        channels = empty(tuple(words.shape), np.int32, words)
        launch(make_group_channels(width), batch * heads * blocks, THREADS.group, words, channels)
        return channels

    def channel_norms(self, problem: Problem, Q: Any, K: Any, sequences: Sequences | None) -> Any:
        """Return the squared channel lengths of the rows that meet each block, (B, H_x, C, D) (eq. 9)."""
        grouping = problem.grouping
        assert grouping is not None
        Y = Q if grouping.by == "keys" else K
        accumulator = sum_type(problem.dtype)
        blocks = problem.blocks if sequences is None else sequences.blocks.shape[1]
        norms = empty((problem.batch, problem.grouped_heads, blocks, problem.width), accumulator, Y)
        kernel = make_channel_norms(
            accumulator,
            grouping.by == "keys",
            problem.causal_offset is not None,
            sequences is not None,
            THREADS.reduction_rows,
            THREADS.reduction_columns,
        )
        grid = problem.batch * problem.grouped_heads * blocks * ceil_div(problem.width, THREADS.reduction_columns)
        numbers = (grouping.block_size, problem.grouped_rows, problem.causal_offset or 0)
        threads = (THREADS.reduction_columns, THREADS.reduction_rows)
        launch(kernel, grid, threads, Y, norms, _tables(sequences, norms)[1], *numbers)
        return norms

    def fusion_gains(
        self, X: Any, channels: Any, norms: Any, group_size: int, block_size: int, sequences: Sequences | None
    ) -> Any:
        """Put the sampled member of each group first in ``channels`` and return the gains, (B, H_x, C, D) (eq. 9)."""
        batch, heads, blocks, width = channels.shape
        accumulator = sum_type(X.dtype)
        gains = empty((batch, heads, blocks, width), accumulator, X)
        threads = (THREADS.reduction_columns, THREADS.reduction_rows)
        kernel = make_fusion_gains(accumulator, width, group_size, sequences is not None, *reversed(threads))
        arrays = (X, norms, channels, gains, _tables(sequences, gains)[1])
        launch(kernel, batch * heads * blocks, threads, *arrays, block_size)
        return gains

    def attend(
        self,
        problem: Problem,
        Q: Any,
        K: Any,
        V: Any,
        O: Any,
        lse: Any,
        maps: Maps,
        tables: ScoreTables = NO_TABLES,
        sequences: Sequences | None = None,
    ) -> None:
        """Write attention into O and its log-sum-exp into lse; ``sequences``: where the rows are of several."""
        attends_itself = isinstance(K, GroupedKeys | KeysInPages)
        if attends_itself:
            K.attend(problem, Q, V, O, lse, tables)
            return
        grouping = problem.grouping
        accumulator = sum_type(problem.dtype)
        low, high = problem.key_limits
        switches = ScoreSwitches(
            window=low is not None,
            softcap=problem.softcap > 0,
            bias=0 if tables.bias is None else 1,
            mask=tables.mask is not None,
        )
        shape = (problem.batch, problem.heads, problem.queries, problem.keys)
        tables = tables.map(lambda table: broadcast(table, shape))
        tiles = _forward_tiles(problem)
        kernel = make_forward(
            accumulator,
            problem.width,
            problem.value_width,
            problem.rank,
            None if grouping is None else grouping.by,
            isinstance(maps, GroupMaps) and maps.gains is not None,
            isinstance(maps, SubspaceMaps),
            problem.own_block_is_exact and maps is not None,
            high is not None,
            sequences is not None,
            switches,
            tiles,
        )
        query_block, key_block = _row_blocks(problem)
        diagonal = 0 if sequences is None else sequences.diagonal
        launch(
            kernel,
            problem.batch * problem.heads * _most_tiles(problem.queries, query_block, tiles.block_q, sequences),
            (tiles.thread_columns, tiles.thread_rows),
            Q,
            K,
            V,
            *self._map_arrays(problem, Q, K, maps, sequences, lse),
            _tables(sequences, lse)[0],
            O,
            lse,
            query_block,
            key_block,
            0 if low is None else low - diagonal,
            0 if high is None else high - diagonal,
            accumulator(problem.scale),
            accumulator(problem.softcap),
            *(lse if table is None else table for table in (tables.bias, tables.mask)),
        )

    def _map_arrays(
        self, problem: Problem, Q: Any, K: Any, maps: Maps, sequences: Sequences | None, absent: Any
    ) -> tuple[Any, ...]:
        """Return what the forward kernel reads the maps from; ``absent``, any array, stands for what it does not read.

        Numba passes no None to a GPU.
        """
        match maps:
            case GroupMaps(channels, gains):
                return channels, absent if gains is None else gains, absent, absent, absent, absent
            case SubspaceMaps():
                assert problem.grouping is not None
                by_keys = problem.grouping.by == "keys"
                X = K.bind(Q.stream) if by_keys else Q
                sampled = self.reduce_rows(X, maps, _row_blocks(problem)[by_keys], sequences, is_centred=by_keys)
                return absent, absent, sampled, maps.fusion, maps.ranks, maps.key_mean
            case _:
                return (absent,) * 6

    def merge_results(
        self, out_a: Any, lse_a: Any, out_b: Any, lse_b: Any, layout: Layout, stream: int | None = None
    ) -> tuple[Any, Any]:
        """Merge two results over disjoint keys and their lse, Numba arrays in ``layout`` (eq. 25)."""
        with on_device_of(out_a):
            O_a, O_b = (self.bring_in(x, layout) for x in (bound(out_a, stream), out_b))
            O, lse = self.empty(tuple(O_a.shape), O_a, layout), self.empty_lse(tuple(O_a.shape[:3]), O_a)
            kernel = make_merge_results(sum_type(O.dtype))
            launch(kernel, ceil_div(math.prod(O.shape), THREADS.group), THREADS.group, O_a, lse_a, O_b, lse_b, O, lse)
            return self.hand_back(O, layout, like=out_a, out=None), lse

    def bring_in(self, array: Any, layout: Layout) -> Any:
        """Return ``array`` as a native view; a NumPy array as a device copy."""
        kind = kind_of(array)
        if kind == "numba":
            return swap_rows_and_heads(array) if layout == "bnhd" else array
        native = array.transpose(0, 2, 1, 3) if layout == "bnhd" else array
        return from_cupy(native) if kind == "cupy" else cuda.to_device(np.ascontiguousarray(native))

    def shares_memory(self, array: Any) -> bool:
        """Whether ``array`` is on the device already."""
        return kind_of(array) != "numpy"

    def empty(self, shape: tuple[int, int, int, int], like: Any, layout: Layout) -> Any:
        """Return a new native array of ``like``'s dtype, stream and allocator whose memory is ordered as ``layout``."""
        if layout == "bhnd":
            return new(shape, like.dtype, like)
        b, h, n, d = shape
        return swap_rows_and_heads(new((b, n, h, d), like.dtype, like))

    def empty_lse(self, shape: tuple[int, int, int], like: Any, *, is_kept: bool = True) -> Any:
        """Return a new float32 native array; not ``is_kept``: for the length of the call."""
        return (new if is_kept else empty)(shape, np.float32, like)

    def hand_back(self, array: Any, layout: Layout | None, *, like: Any, out: Any) -> Any:
        """Return a native array as the caller's kind and layout; NumPy arrays are copied from the device."""
        if kind_of(like) == "numpy":
            return host_copy_back(array.copy_to_host(), layout, out)
        if out is not None:
            return out
        result = swap_rows_and_heads(array) if layout == "bnhd" else array
        return to_cupy(result) if kind_of(like) == "cupy" else result


def _measured(array: Any, layout: Layout) -> MeasuredArray:
    """Return an array of the caller's as a native one of a call that is only measured."""
    place = Placed.of(array, layout)
    return MeasuredArray.of(place.shape, place.dtype, place.strides)


def _refuse_dtype(problem: Problem, q: Any) -> None:
    if problem.dtype not in (np.float16, np.float32, np.float64):
        rule = "the numba backend takes float16, float32 and float64"
        raise NotImplementedError(f"q: {rule}, got {describe(q)}")


def _row_blocks(problem: Problem) -> tuple[int, int]:
    """Return the rows per grouping block of queries and of keys, all of them on the side that is not cut."""
    query_block, key_block = problem.queries, max(problem.keys, 1)
    if problem.grouping is not None and problem.grouping.by == "queries":
        query_block = min(problem.grouping.block_size, query_block)
    elif problem.grouping is not None:
        # queries behind the last key have their own blocks too (eq. 20)
        key_block = min(problem.grouping.block_size, max(key_block, problem.queries + (problem.causal_offset or 0)))
    return query_block, key_block


def _forward_tiles(problem: Problem) -> Tiles:
    # the keys of an own block are met in their full width
    inner_width = problem.width if problem.own_block_is_exact else problem.rank
    return choose_tiles(problem.width, inner_width, problem.value_width, sum_type(problem.dtype), SIMULATED)


def _most_tiles(rows: int, block: int, tile: int, sequences: Sequences | None) -> int:
    """Return the most tiles that rows can have if none reaches over the edge of a block or a sequence."""
    if sequences is None:
        return ceil_div(rows, block) * ceil_div(block, tile)
    return most_tiles(rows, sequences.count, block, tile)


def _tables(sequences: Sequences | None, absent: Any) -> tuple[Any, Any]:
    """Return those of sequences and blocks; ``absent``, any array, stands for them where no kernel reads them."""
    return (absent, absent) if sequences is None else (sequences.table, sequences.blocks)


BACKEND = NumbaBackend()
