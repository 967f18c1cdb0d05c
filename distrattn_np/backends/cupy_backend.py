"""CuPy: what the CUDA C++ kernels compute, on the device that holds the arrays.

Memory and launches go through `device_work`: for real, or into a plan, which needs no CuPy. Every launch goes through
`_launch`, with explicit 4- and 8-byte scalars and strides in elements.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import Any, ClassVar

import numpy as np

try:
    import cupy
except ImportError:  # `load_by_name` says so before a call; plans do without
    cupy = None

from .. import checks
from ..arrays import Kind, kind_of, on_stream, sum_type
from ..grouped_keys import GroupedKeys
from ..problem import (
    GroupBy,
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
from ..reference import hyperplanes, keys_of_mean
from ..reference.score_options import key_limits
from ..tiles import (
    ALL,
    DENSE,
    ELEMENTS,
    FROM,
    FUSE,
    GRAM_SM90_ROW_TILE,
    GRAM_SM90_WIDTHS,
    NO_MAP,
    NO_SWITCHES,
    OWN,
    REDUCE_ROW_TILE,
    REDUCE_SIMT_ROW_TILE,
    REDUCE_THREADS,
    SAMPLE,
    SIMT_THREADS,
    SM90_WIDTHS,
    UP_TO,
    Defines,
    ScoreSwitches,
    Sm90Tiles,
    fuse_defines,
    gains_defines,
    gram_blocks,
    gram_defines,
    gram_simt_blocks,
    gram_simt_defines,
    gram_sm90_defines,
    gram_sm90_threads,
    gram_threads,
    hash_defines,
    maps_defines,
    maps_pitch,
    mean_scores_defines,
    merge_splits_defines,
    mma_defines,
    mma_tiles,
    narrow_defines,
    norms_defines,
    pad,
    reduce_defines,
    reduce_simt_defines,
    simt_defines,
    sm90_defines,
    sm90_grid,
    sm90_key_map_tiles,
    sm90_splits_keys,
    sm90_tiles,
    sum_defines,
)
from . import NO_TABLES, NOTHING_LENT, Backend, KeysInPages, Lent, Maps, ScoreTables, host_copy_back
from .cupy_sequences import Sequences
from .device_work import DeviceFacts, Placed, Plan, PlannedArray, Work, doing, hyperplane_rows, work
from .tensor_map import Box, can_be_mapped, forward_sm90_launch, panel_columns

WORKSPACE_BYTES = 256 << 20
"""Most that the fused keys of one launch take; longer calls go through (head, block) pairs in several launches."""

_MEAN_STEP = 1024
"""Keys of a packed sequence for which there is a partial sum of its mean."""
_NO_LIMIT = np.iinfo(np.int32).max
_LEAST_SEGMENT_ROWS = 64
"""Rows of a segment below which its partial sums cost more than another thread block brings."""


class CupyBackend(Backend):
    """CUDA C++ through CuPy."""

    name: ClassVar[str] = "cupy"
    kinds: ClassVar[frozenset[Kind]] = frozenset({"cupy", "numba", "numpy"})
    builds_subspace: ClassVar[bool] = True
    kinds_of_grouped_keys: ClassVar[frozenset[Kind]] = frozenset({"cupy"})
    kinds_of_grouped_pages: ClassVar[frozenset[Kind]] = frozenset({"cupy"})

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
        """Compute one call on the device that holds ``q`` (the current one for NumPy arrays)."""
        with self._where_it_runs(problem, q, k, v, out, tables, lent):
            return super().attention(problem, q, k, v, out, tables, lent)

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
        self.refuse(problem, q)
        packed = problem.packed
        with self._where_it_runs(problem, q, k, v, out, NO_TABLES, lent):
            edges_q, edges_k, *native = (cupy.asarray(x) for x in (cu_seqlens_q, cu_seqlens_k, q, k, v))
            Q, K, V = (_as_batch(x) for x in native)
            if out is not None and self.shares_memory(out):
                O = _as_batch(cupy.asarray(out))
            else:
                O = self.empty((1, packed.heads, packed.queries, packed.value_width), Q, packed.layout)
            if lent.lse is not None and self.shares_memory(lent.lse):
                lse = cupy.asarray(lent.lse)[np.newaxis]
            else:
                lse = self.empty_lse((1, packed.heads, packed.queries), Q, is_kept=lent.wants_lse)
            maps = self.compute_ragged(problem, edges_q, edges_k, Q, K, V, O, lse)
            result = self.hand_back(O[0].swapaxes(0, 1), None, like=q, out=out)
            blocks = None
            if isinstance(packed.grouping, Subspace) and lent.workspace is None:
                told = self._told_of_blocks(problem, maps)
                ranks, score_errors = (self.hand_back(x, None, like=q, out=None) for x in told)
                blocks = ranks, score_errors
            return result, self.hand_back(lse[0], None, like=q, out=lent.lse), blocks

    def _told_of_blocks(self, problem: RaggedProblem, maps: Maps) -> tuple[Any, Any]:
        """Return ranks and score errors (H_x, C), C the most blocks that there can be."""
        if isinstance(maps, SubspaceMaps):
            return maps.ranks[0], maps.score_errors[0]
        packed = problem.packed
        shape = (packed.grouped_heads, problem.most_blocks)
        ranks, score_errors = (cupy.asarray(np.zeros(shape, x)) for x in (np.int32, sum_type(packed.dtype)))
        return ranks, score_errors

    @contextmanager
    def _where_it_runs(
        self, problem: Problem | RaggedProblem, q: Any, k: Any, v: Any, out: Any, tables: ScoreTables, lent: Lent
    ) -> Iterator[None]:
        """Make the device of ``q``, the caller's stream and its workspace current."""
        with ExitStack() as stack:
            if kind_of(q) == "cupy":
                stack.enter_context(q.device)
            stack.enter_context(on_stream(lent.stream))
            if lent.workspace is not None:
                needed = self.workspace_bytes(problem, q, k, v, out, tables, lent)
                checks.check_workspace_size(lent.workspace, needed)
                stack.enter_context(doing(_in_workspace(lent.workspace)))
            yield

    def workspace_bytes(
        self,
        problem: Problem | RaggedProblem | PagedProblem,
        q: Any,
        k: Any,
        v: Any,
        out: Any,
        tables: ScoreTables = NO_TABLES,
        lent: Lent = NOTHING_LENT,
        page_table: Any = None,
        seqlens_k: Any = None,
    ) -> int:
        self.refuse(problem, q)
        if isinstance(problem, PagedProblem):
            from .cupy_paged_keys import PagedKeys  # which launches through this module

            k = PagedKeys.of(problem, k, page_table, seqlens_k)
            problem = problem.longest
        with q.device if kind_of(q) == "cupy" else nullcontext():
            device = replace(work().device, capability=capability(), runs_sm90a=hopper_is_usable())
        packed = problem.packed if isinstance(problem, RaggedProblem) else problem
        batch, heads, queries = packed.batch, packed.heads, packed.queries
        O = Placed.contiguous((batch, heads, queries, packed.value_width), packed.dtype, packed.layout)
        lse = Placed.contiguous((batch, heads, queries), np.dtype(np.float32))
        keeps_lse = lent.lse is not None or lent.wants_lse
        placed = tables.map(lambda table: Placed.of(table, "bhnd"))
        return _planned_bytes(
            problem,
            device,
            Placed.of(q, packed.layout),
            _placed_keys(k, packed.layout),
            Placed.of(v, packed.layout),
            O if out is None else Placed.of(out, packed.layout),
            lse if keeps_lse else None,
            placed.mask,
            placed.bias,
        )

    def plan(
        self,
        problem: Problem | RaggedProblem,
        device: DeviceFacts,
        Q: Any,
        K: Any,
        V: Any,
        O: Any,
        lse: Any = None,
        mask: Any = None,
        bias: Any = None,
    ) -> Plan:
        """Return what a call with these planned arrays, in native order, would do on ``device``.

        K may be `KeptKeys` or `PagedKeys`. Without ``lse`` it takes a place in the workspace. The edges of packed
        sequences are planned as 32-bit integers.
        """
        plan = Plan(device)
        with doing(plan):
            if lse is None:
                lse = self.empty_lse(O.shape[:3], Q, is_kept=False)
            if isinstance(problem, RaggedProblem):
                edges = Placed.contiguous((problem.sequences + 1,), np.dtype(np.int32))
                edges_q, edges_k = (edges.planned(place) for place in _EDGE_PLACES)
                self.compute_ragged(problem, edges_q, edges_k, Q, K, V, O, lse)
            else:
                self.compute(problem, Q, K, V, O, lse, ScoreTables(mask, bias))
        return plan

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
        from .cupy_paged_keys import PagedKeys  # which launches through this module

        keys = PagedKeys.of(problem, k, page_table, seqlens_k)
        result, lse, _ = self.attention(problem.longest, q, keys, v, out, NO_TABLES, lent)
        return result, lse

    # ---- arrays ----

    def bring_in(self, array: Any, layout: Layout) -> Any:
        native = cupy.asarray(array)
        return native.transpose(0, 2, 1, 3) if layout == "bnhd" else native

    def shares_memory(self, array: Any) -> bool:
        return kind_of(array) != "numpy"

    def empty(self, shape: tuple[int, int, int, int], like: Any, layout: Layout) -> Any:
        b, h, n, d = shape
        if layout == "bnhd":
            return work().new((b, n, h, d), like.dtype).transpose(0, 2, 1, 3)
        return work().new(shape, like.dtype)

    def empty_lse(self, shape: tuple[int, int, int], like: Any, *, is_kept: bool = True) -> Any:  # noqa: ARG002
        return work().new(shape, np.float32) if is_kept else _empty(shape, np.float32)

    def hand_back(self, array: Any, layout: Layout | None, *, like: Any, out: Any) -> Any:
        if kind_of(like) == "numpy":
            return host_copy_back(cupy.asnumpy(array), layout, out)
        if out is not None:
            return out
        result = array.transpose(0, 2, 1, 3) if layout == "bnhd" else array
        if kind_of(like) == "numba":
            from numba import cuda  # only where a Numba array came in

            return cuda.as_cuda_array(result)
        return result

    # ---- maps ----

    def hash_channels(self, x: Any, planes: Any, block_size: int, pieces: Any | None = None) -> Any:
        """Return the words (B, H, C, D) uint16 of eq. 5 for x (B, H, rows, D) and planes (L, 16) float32.

        ``pieces``: the blocks of packed sequences.
        """
        batch, heads, rows, width = x.shape
        blocks = ceil_div(rows, block_size) if pieces is None else len(pieces)
        words = _empty((batch, heads, blocks, width), np.uint16)
        defines = hash_defines(_element(x), _vector(x), ragged=pieces is not None)
        _launch(
            "hash_channels",
            defines,
            words.size // width,
            None,
            *(x, planes, words, heads, rows, width, block_size),
            *_strides(x),
            *(() if pieces is None else (pieces, blocks)),
        )
        return words

    def group_channels(self, words: Any) -> Any:
        """Return the channels (B, H, C, D) int32 in the order of eq. 7."""
        channels = _empty(words.shape, np.int32)
        _launch("group_channels", {}, words.size // words.shape[3], 256, words, channels, words.shape[3])
        return channels

    def group_maps(self, problem: Problem, Q: Any, K: Any, sequences: Sequences | None = None) -> Maps:
        if problem.blocks == 0 or problem.keys == 0:
            return None
        match problem.grouping:
            case Subspace() as subspace:
                return self._subspace_maps(problem, subspace, Q, K, sequences)
            case Grouping() as grouping:
                return self._lsh_maps(problem, grouping, Q, K, sequences)
            case _:
                return None

    def _lsh_maps(self, problem: Problem, grouping: Grouping, Q: Any, K: Any, sequences: Sequences | None) -> GroupMaps:
        X, Y = (Q, K) if grouping.by == "queries" else (K, Q)
        rows = min(grouping.block_size, problem.grouped_rows)
        planes = _planes(grouping.seed, rows)
        block_size = grouping.block_size if sequences else rows
        pieces = sequences.blocks(grouping.by, block_size) if sequences else None
        channels = self.group_channels(self.hash_channels(X, planes, block_size, pieces))
        if grouping.fusion == "sum":
            return GroupMaps(channels, None)
        segments = _segments_that_meet(problem, Y.shape[2], sequences)
        norms = _channel_sums(Y, segments, power=2)
        gains = _empty(channels.shape, np.float32)
        rows, width = X.shape[2:]
        _launch(
            "fusion_gains",
            gains_defines(_element(X), grouping.group_size, ragged=sequences is not None),
            channels.size // width,
            None,
            *(X, norms, channels, gains, rows, width, block_size, X.shape[1], Y.shape[1]),
            *(segments.count, _SIGNS[segments.direction]),
            *_strides(X),
            *(() if pieces is None else (pieces,)),
        )
        return GroupMaps(channels, gains)

    def key_mean(self, K: Any, sequences: Sequences | None = None) -> Any:
        """Return the mean of the keys (B, H_kv, M, D) as (B, H_kv, D) in the type of its sums, rounded to K's dtype.

        Rounded, so that what is subtracted from a key is one of its own numbers. B counts ``sequences``, where K packs
        them; the mean of none is not written.
        """
        batch, heads, rows, width = K.shape
        if sequences:
            batch, segments = sequences.count, _segments_of(sequences, "keys", _MEAN_STEP, ALL)
            factor = 1.0  # the kernel knows how many
        else:
            K = keys_of_mean(K)
            rows = K.shape[2]
            segments, factor = _equal_segments(rows, batch * heads, per_processor=4), 1 / rows
        sums = _channel_sums(K, segments, power=1)
        return _sum_segments(sums, segments, factor=factor, element=_element(K)).reshape(batch, heads, width)

    def grams(
        self,
        X: Any,
        mean: Any | None,
        segments: _Segments,
        heads_per_gram: int = 1,
        *,
        memory_matters: bool = True,
    ) -> Any:
        """Return the Gram matrices of X less ``mean`` as (B, H / heads_per_gram, C, D, D), D padded (eq. 11).

        In the type of the sums. C counts the blocks of ``segments``, 1 where all rows meet all blocks. Without
        ``memory_matters`` the bits do not depend on how X lies in memory.
        """
        batch, heads, _, width = X.shape
        count = batch * heads // heads_per_gram
        on_hopper = memory_matters and mean is None and width in GRAM_SM90_WIDTHS and _copy_engine_reads(X)
        room = {"per_processor": 1, "row_tile": GRAM_SM90_ROW_TILE} if on_hopper else {}
        parts = segments.split(count, **room)
        shape = (batch, heads // heads_per_gram, parts.count, pad(width), pad(width))
        sums = _empty(shape, sum_type(X.dtype))
        sizes = (heads // heads_per_gram, heads_per_gram, parts.count, min(parts.rows, _NO_LIMIT))
        edges, ragged = parts.edges, parts.sequences is not None
        if on_hopper:
            defines = gram_sm90_defines(_element(X), width, ragged=ragged)
            box = Box(GRAM_SM90_ROW_TILE, panel_columns(width))
            _launch(
                "gram_sm90",
                defines,
                count * parts.count,
                gram_sm90_threads(width),
                *(work().tensor_map(X, box), sums, *sizes, *edges),
                shared=defines["LAUNCH_SHARED_BYTES"],
            )
            return _sum_segments(sums, parts)
        common = {"element": _element(X), "width": width, "centred": mean is not None, "ragged": ragged}
        if _has_tensor_cores(X.dtype):
            stem, blocks, threads = "gram", gram_blocks(width), gram_threads(width)
            defines = gram_defines(**common, aligned=_vector(X) == 8)
        else:
            stem, blocks, threads = "gram_simt", gram_simt_blocks(width), SIMT_THREADS
            defines = gram_simt_defines(**common)
        _launch(
            stem,
            defines,
            count * parts.count * blocks,
            threads,
            *(X, _NULL if mean is None else mean, sums, *sizes, *edges),
            *_strides(X),
        )
        return _sum_segments(sums, parts)

    def _subspace_maps(
        self, problem: Problem, grouping: Subspace, Q: Any, K: Any, sequences: Sequences | None
    ) -> SubspaceMaps:
        by_keys = grouping.by == "keys"
        X, Y = (K, Q) if by_keys else (Q, K)
        heads_per_gram = problem.heads_per_kv_head if by_keys else 1
        meeting = _segments_that_meet(problem, Y.shape[2], sequences)
        if sequences:
            block_size, offset = grouping.block_size, meeting.shift
            own = _segments_of(sequences, grouping.by, block_size, OWN)
        else:
            block_size, offset = min(grouping.block_size, problem.grouped_rows), problem.meeting_offset or 0
            own = _Segments(problem.blocks, block_size, 0, 0, X.shape[2], OWN)
        with work().beside() as beside:  # queries are not centred, so they do not wait for the mean
            q_grams = self.grams(Q, None, *((meeting, heads_per_gram) if by_keys else (own,)))
        mean = self.key_mean(K, sequences)
        k_grams = self.grams(K, mean, own if by_keys else meeting)
        beside.join()
        x_grams, y_grams = (k_grams, q_grams) if by_keys else (q_grams, k_grams)

        rows = _MapRows(X.shape[2], block_size, Y.shape[2], heads_per_gram, meeting.direction, offset, own.pieces)
        narrows = uses_tensor_cores(problem, capability())
        return self.solve_maps(x_grams, y_grams, grouping, rows, mean, X, scale=problem.scale, narrows=narrows)

    def solve_maps(
        self,
        x_grams: Any,
        y_grams: Any,
        grouping: Subspace,
        rows: _MapRows,
        mean: Any,
        like: Any,
        *,
        scale: float,
        narrows: bool,
    ) -> _OwnSubspaceMaps:
        """Return the maps of the blocks of ``like`` from Gram matrices of `grams`; ``narrows``: in 16 bits too."""
        width, real = like.shape[3], sum_type(like.dtype)
        columns = grouping.rank or width
        narrow_type = like.dtype if narrows else None
        element = _element(like) if narrow_type else ELEMENTS[real.__name__]
        shape = (*x_grams.shape[:3], pad(columns), pad(width))
        device = work().device
        crowded = math.prod(shape[:3]) > device.multiprocessors
        ragged = rows.pieces is not None
        defines = maps_defines(element, width, columns, device.shared_limit, crowded=crowded, ragged=ragged)
        sampling, fusion = (_empty(shape, real) for _ in range(2))
        narrow = _DenseMaps(_empty(shape, narrow_type), _empty(shape, narrow_type), mean) if narrow_type else None
        ranks = _empty(shape[:3], np.int32)
        score_errors = _empty(ranks.shape, real)
        workspace_size = 0 if defines["IN_SHARED"] else ranks.size * pad(columns) * maps_pitch(width, columns)
        _launch(
            "subspace_maps",
            defines,
            ranks.size,
            None,
            *(x_grams, y_grams, sampling, fusion),
            *((narrow.sampling, narrow.fusion) if narrow else (_NULL, _NULL)),
            *(ranks, score_errors, _empty((workspace_size,), real)),
            *(grouping.refine, real(-1 if grouping.score_tol is None else grouping.score_tol)),
            *(real(scale), shape[1], y_grams.shape[1], shape[2], rows.x_rows, rows.block_size),
            *(rows.y_rows, rows.heads_per_gram, _SIGNS[rows.direction], rows.offset),
            *(() if rows.pieces is None else (rows.pieces, int(grouping.by == "keys"))),
            shared=defines["LAUNCH_SHARED_BYTES"],
        )
        sampling, fusion = (x[..., :columns, :width].swapaxes(-1, -2) for x in (sampling, fusion))
        return _OwnSubspaceMaps(sampling, fusion, mean, ranks, score_errors, narrow)

    # ---- attention ----

    def compute_ragged(
        self, problem: RaggedProblem, edges_q: Any, edges_k: Any, Q: Any, K: Any, V: Any, O: Any, lse: Any
    ) -> Maps:
        """Write attention of packed sequences into O and lse, and return the maps of their blocks.

        Native arrays of batch 1 and, on the device, edges.
        """
        if 0 in O.shape:
            return None
        sequences = Sequences(problem, edges_q, edges_k)
        maps = self.group_maps(problem.packed, Q, K, sequences)
        self._attend_with(maps, problem.packed, Q, K, V, O, lse, NO_TABLES, sequences)
        return maps

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
    ) -> None:
        from . import cupy_decode, cupy_kept_keys  # which launch through this module

        attends_itself = isinstance(K, GroupedKeys | cupy_kept_keys.KeptKeys | KeysInPages)
        if attends_itself:
            K.attend(problem, Q, V, O, lse, tables)
            return
        if cupy_decode.suits_plain_keys(problem, tables):
            cupy_decode.decode(problem, Q, K, V, O, lse)
            return
        self._attend_with(maps, problem, Q, K, V, O, lse, tables)

    def _attend_with(
        self,
        maps: Maps,
        problem: Problem,
        Q: Any,
        K: Any,
        V: Any,
        O: Any,
        lse: Any,
        tables: ScoreTables,
        sequences: Sequences | None = None,
    ) -> None:
        """Launch the forward that suits a problem."""
        on_tensor_cores = uses_tensor_cores(problem, capability())
        ready: GroupMaps | _DenseMaps | None = None
        if isinstance(maps, GroupMaps):
            ready = GroupMaps(_contiguous(maps.channels), None if maps.gains is None else _contiguous(maps.gains))
        elif isinstance(maps, SubspaceMaps):
            ready = _DenseMaps.narrowed(maps, K) if on_tensor_cores else _DenseMaps.widened(maps, K)
        forward = _Forward(problem, Q, K, V, O, lse, ready, tables, sequences)
        if on_tensor_cores:
            forward.on_tensor_cores()
        else:
            forward.on_cuda_cores()


def uses_tensor_cores(problem: Problem, compute_capability: int) -> bool:
    """Whether a problem goes to the tensor-core forward: 16-bit elements, sm_80 and up, scores that grow with q k."""
    return problem.dtype.itemsize == 2 and compute_capability >= 80 and problem.scale > 0


def _has_tensor_cores(dtype: Any) -> bool:
    """Whether the current device multiplies elements of this type on the tensor cores that the kernels know."""
    return dtype.itemsize == 2 and capability() >= 80


def _copy_engine_reads(x: Any) -> bool:
    """Whether Hopper's copy engine is there and can read an array (B, H, rows, width)."""
    return x.dtype.itemsize == 2 and hopper_is_usable() and can_be_mapped(x.data.ptr, x.shape, x.strides)


def hopper_is_usable() -> bool:
    """Whether the current device runs sm_90a code and NVRTC, from 12.9 on, accepts that target beside CuPy's own."""
    return work().device.runs_sm90a


def capability() -> int:
    """Return the compute capability of the current device: 90 for an H100."""
    return work().device.capability


@dataclass(frozen=True, slots=True)
class _Segments:
    """Rows cut into segments that are summed apart, ``count`` of them; their edges are those of channel_norms.cu."""

    count: int
    rows: int
    """Of a segment."""
    shift: int
    lower: int
    upper: int
    direction: int
    """Which of them meet a block, as in sum_segments.cu."""
    per_block: int = 1
    sequences: Sequences | None = None
    """Those that are cut: into a segment for every piece, ``shift`` from the diagonal; the other edges mean nothing."""
    pieces: Any = None

    @property
    def edges(self) -> tuple[Any, ...]:
        """What kernels take behind ``rows``."""
        if self.sequences:
            return self.pieces, self.shift, self.direction
        return self.shift, self.lower, self.upper

    def split(self, sums: int, **room: int) -> _Segments:
        """Return smaller segments, where the device has more room than for ``sums`` times as many thread blocks.

        ``room`` as in `_equal_segments`.
        """
        if self.sequences:
            return self
        if self.direction == ALL:
            return _equal_segments(self.upper, sums, **room)
        parts = 1
        while sums * self.count * parts < _thread_blocks() // 2 and self.rows % (2 * parts) == 0:
            if self.rows // (2 * parts) < _LEAST_SEGMENT_ROWS:
                break
            parts *= 2
        return replace(self, count=self.count * parts, rows=self.rows // parts, per_block=parts)


def _equal_segments(rows: int, sums: int, per_processor: int = 2, row_tile: int = 1) -> _Segments:
    """Return segments of rows that are all wanted in one sum, whole tiles each.

    ``sums`` says how many such sums a launch makes, ``per_processor`` how many thread blocks a multiprocessor runs.
    """
    wanted = max(per_processor * work().device.multiprocessors // max(sums, 1), 1)
    size = max(ceil_div(ceil_div(rows, wanted), row_tile) * row_tile, _LEAST_SEGMENT_ROWS)
    return _Segments(ceil_div(rows, size), size, 0, 0, rows, ALL)


def _segments_of(sequences: Sequences, side: GroupBy, step: int, direction: int, shift: int = 0) -> _Segments:
    """Return the segments of packed sequences, for pieces of ``step`` rows of this side."""
    pieces = sequences.blocks(side, step)
    return _Segments(len(pieces), step, shift, 0, 0, direction, sequences=sequences, pieces=pieces)


def _segments_that_meet(problem: Problem, rows: int, sequences: Sequences | None = None) -> _Segments:
    """Return which of ``rows`` rows of the side that is not cut into blocks meet the blocks of the other.

    Without a causal limit all of them. With one, segment c holds the keys that block c sees and block c - 1 does not
    (block c meets the segments up to c), or the queries that see block c and not block c + 1 (from c on); where own
    blocks are exact, they see a block through its maps from the end of it on.
    """
    assert problem.grouping is not None
    offset, step = problem.meeting_offset, problem.grouping.block_size
    if sequences:
        side = problem.grouping.by
        if offset is None:
            return _segments_of(sequences, side, step, ALL)
        direction = UP_TO if side == "queries" else FROM
        return _segments_of(sequences, side, step, direction, -step if problem.own_block_is_exact else 0)
    if offset is None:
        return _Segments(1, rows, 0, 0, rows, ALL)
    if problem.grouping.by == "queries":
        # block c sees up to min((c + 1) L, N) + offset keys
        upper = min(max(problem.queries + offset, 0), rows)
        return _Segments(problem.blocks, step, offset, 0, upper, UP_TO)
    lower = min(max(-offset, 0), rows)
    return _Segments(problem.blocks, step, -offset, lower, rows, FROM)


_SIGNS = {ALL: 0, UP_TO: 1, FROM: -1}
"""How fusion_gains.cu and subspace_maps.cu name the directions."""


def _channel_sums(Y: Any, segments: _Segments, power: int) -> Any:
    """Return sums of powers of Y's channels by segments, (B, H_y, S, D)."""
    batch, heads, rows, width = Y.shape
    sums = _empty((batch, heads, segments.count, width), sum_type(Y.dtype))
    _launch(
        "channel_norms",
        norms_defines(_element(Y), _vector(Y), power, ragged=segments.sequences is not None),
        segments.count * heads * batch,
        None,
        *(Y, sums, heads, segments.count, rows, width),
        *(min(segments.rows, _NO_LIMIT), *segments.edges),
        *_strides(Y),
    )
    return sums


def _sum_segments(sums: Any, segments: _Segments, factor: float = 1, element: int | None = None) -> Any:
    """Return (B, H, C, ...) for sums by segments (B, H, S, ...); rounded to ``element`` where that is named."""
    blocks = 1 if segments.direction == ALL else segments.count // segments.per_block
    sequences = segments.sequences
    is_alone = segments.count == 1 and not sequences
    is_summed = is_alone or (segments.direction == OWN and segments.per_block == 1)
    if is_summed and factor == 1 and element is None:
        return sums
    batch, heads = sums.shape[:2]
    width = math.prod(sums.shape[3:])
    results = sequences.count if sequences and segments.direction == ALL else batch
    out = _empty((results, heads, blocks, *sums.shape[3:]), sums.dtype)
    to_element = element is not None
    defines = sum_defines(
        element or _element(sums), segments.direction, to_element=to_element, ragged=sequences is not None
    )
    _launch(
        "sum_segments",
        defines,
        batch * heads * (segments.count if sequences else 1) * ceil_div(width, defines["THREADS"]),
        None,
        *(sums, out, segments.count, width, segments.per_block, sum_type(sums.dtype)(factor)),
        *((segments.pieces, segments.rows, heads) if sequences else ()),
    )
    return out


@dataclass(frozen=True, slots=True)
class _DenseMaps:
    """Subspace maps as the kernels read them: transposed."""

    sampling: Any
    """(B, H_x, C, R, D): for tensor cores in K's dtype, R and D padded; for CUDA cores in the type of the sums."""
    fusion: Any
    mean: Any
    """(B, H_kv, D) in the type of the sums; for tensor cores of K's precision."""

    @classmethod
    def narrowed(cls, maps: SubspaceMaps, K: Any) -> _DenseMaps:
        """Return ``maps`` for tensor cores."""
        if isinstance(maps, _OwnSubspaceMaps) and maps.narrow:
            return maps.narrow
        mean = _contiguous(maps.key_mean).astype(np.float32, copy=False)
        whole = _Segments(1, 1, 0, 0, 1, ALL)
        rounded = _sum_segments(mean[:, :, None], whole, element=_element(K)).reshape(mean.shape)
        return cls(cls._narrow(maps.sampling, K), cls._narrow(maps.fusion, K), rounded)

    @classmethod
    def widened(cls, maps: SubspaceMaps, K: Any) -> _DenseMaps:
        """Return ``maps`` for CUDA cores."""
        real = sum_type(K.dtype)
        if isinstance(maps, _OwnSubspaceMaps):
            sampling, fusion = (cls._packed(x, real, *x.shape[:-3:-1]) for x in (maps.sampling, maps.fusion))
            return cls(sampling, fusion, maps.key_mean)
        transposed = (cupy.asarray(x).swapaxes(-1, -2) for x in (maps.sampling, maps.fusion))
        return cls(*(_contiguous(x).astype(real, copy=False) for x in (*transposed, maps.key_mean)))

    @classmethod
    def _narrow(cls, maps: Any, like: Any) -> Any:
        width, rank = maps.shape[3:]
        return cls._packed(cupy.asarray(maps).astype(np.float32, copy=False), like.dtype, pad(rank), pad(width))

    @staticmethod
    def _packed(maps: Any, dtype: Any, rows: int, columns: int) -> Any:
        """Return maps (B, H, C, D, R) as contiguous (B, H, C, rows, columns) of ``dtype``, zero beyond R and D."""
        *blocks, width, rank = maps.shape
        if maps.dtype == dtype and maps.swapaxes(-1, -2).flags.c_contiguous and (rows, columns) == (rank, width):
            return maps.swapaxes(-1, -2)
        flat = maps.reshape(-1, width, rank)
        packed = _empty((*blocks, rows, columns), dtype)
        defines = narrow_defines(_element(packed))
        _launch(
            "narrow_maps",
            defines,
            len(flat) * ceil_div(rows * columns, defines["THREADS"]),
            None,
            *(flat, packed, width, rank, rows, columns),
            *_strides(flat),
        )
        return packed


@dataclass(frozen=True, slots=True)
class _OwnSubspaceMaps(SubspaceMaps):
    """Maps that were made here, with what subspace_maps.cu wrote for tensor cores at once."""

    narrow: _DenseMaps | None


@dataclass(frozen=True, slots=True)
class SplitResults:
    """What splits of the keys write for rows of queries, not divided yet: merge_splits.cu makes one result of it."""

    splits: int
    rows: int
    value_width: int
    O: Any
    """(splits, rows, E padded) float32; null where one split writes its result at once."""
    stats: Any
    """(splits, rows, 2) float32: maxima before scale_log2, or what stands for them, and sums."""

    @classmethod
    def of(cls, splits: int, rows: int, value_width: int) -> SplitResults:
        if splits == 1:
            return cls(splits, rows, value_width, _NULL, _NULL)
        O, stats = (_empty((splits, rows, width), np.float32) for width in (pad(value_width), 2))
        return cls(splits, rows, value_width, O, stats)

    def merge(self, O: Any, lse: Any, scale_log2: np.float32, first_row: int = 0) -> None:
        """Write the rows of O (B, H, N, E) and lse (B, H, N) from ``first_row`` on."""
        if self.splits == 1:
            return
        defines = merge_splits_defines(_element(O), self.value_width)
        heads, queries = lse.shape[1:]
        _launch(
            "merge_splits",
            defines,
            ceil_div(self.rows * ceil_div(pad(self.value_width), 128), defines["THREADS"] // 32),
            None,
            *(self.O, self.stats, O, lse, self.rows, heads, queries, self.splits),
            *(np.int64(first_row), scale_log2, *_strides(O)),
        )


@dataclass(frozen=True, slots=True)
class _MapRows:
    """How many rows maps are made for, as subspace_maps.cu takes it."""

    x_rows: int
    """Of a head of the side that is cut into blocks."""
    block_size: int
    y_rows: int
    """Of a head of the other side."""
    heads_per_gram: int
    direction: int
    """Which of them meet a block, as in sum_segments.cu."""
    offset: int
    pieces: Any = None
    """The blocks of packed sequences, which know their rows themselves."""


@dataclass(frozen=True, slots=True)
class _Forward:
    """One forward on one device: how its arrays reach the kernels."""

    problem: Problem
    Q: Any
    K: Any
    V: Any
    O: Any
    lse: Any
    maps: GroupMaps | _DenseMaps | None
    tables: ScoreTables
    sequences: Sequences | None = None
    """Those that are packed in the arrays, which are of batch 1 then."""

    @property
    def key_limits(self) -> tuple[int | None, int | None]:
        """Those of the problem that hide a key from a query, and any causal one, which says what own blocks are.

        With packed sequences they count from the diagonal of each.
        """
        problem = self.problem
        if self.sequences:
            rows = problem.queries + problem.keys  # a window of more hides nothing
            left, right = (None if side is None else min(side, rows) for side in problem.window)
            return key_limits(0, 0, None if problem.causal_offset is None else 0, (left, right))
        low, high = problem.key_limits
        if low is not None and low <= 1 - self.problem.queries:
            low = None
        if self.problem.causal_offset is None and high is not None and high >= self.problem.keys - 1:
            high = None
        return low, high

    @property
    def switches(self) -> ScoreSwitches:
        """What the portable forwards are built with."""
        bias = self.tables.bias
        return ScoreSwitches(
            window=self.key_limits[0] is not None,
            softcap=self.problem.softcap > 0,
            bias=0 if bias is None else 1 if bias.dtype == self.problem.dtype else 2,
            mask=self.tables.mask is not None,
        )

    @property
    def by(self) -> str | None:
        """The side that is cut into blocks; None for exact attention."""
        return None if self.maps is None or self.problem.grouping is None else self.problem.grouping.by

    @property
    def group_size(self) -> int:
        grouping = self.problem.grouping
        return 1 if self.maps is None or not isinstance(grouping, Grouping) else grouping.group_size

    @property
    def dense_maps(self) -> _DenseMaps | None:
        """The maps, where they are of the subspace method."""
        return self.maps if isinstance(self.maps, _DenseMaps) else None

    @property
    def gains(self) -> Any | None:
        """Factors of the members of groups, where there are any."""
        return self.maps.gains if isinstance(self.maps, GroupMaps) else None

    @property
    def block_size(self) -> int:
        """Rows of a grouping block, never more than make a difference."""
        problem = self.problem
        assert problem.grouping is not None
        if self.sequences:
            return problem.grouping.block_size
        rows = problem.grouped_rows
        if problem.own_block_is_exact:
            rows = max(rows, problem.queries + (problem.causal_offset or 0))
        if self.by == "keys":
            rows = ceil_div(rows, 128) * 128  # whole tiles of keys
        return min(problem.grouping.block_size, rows)

    @property
    def blocks(self) -> int:
        """Number of grouping blocks of a head; of packed sequences the most that there can be."""
        if self.sequences and self.problem.grouping:
            return self.sequences.problem.most_blocks
        return self.problem.blocks

    @property
    def block_pieces(self) -> tuple[Any, ...]:
        """The blocks of packed sequences, as an argument of kernels; nothing else has them."""
        grouping = self.problem.grouping
        return (self.sequences.blocks(grouping.by, grouping.block_size),) if self.sequences and grouping else ()

    @property
    def query_block_size(self) -> int:
        """Queries that tiles are cut from; of packed sequences on average."""
        if self.by == "queries":
            return self.block_size
        return self.sequences.average_queries if self.sequences else self.problem.queries

    @property
    def rank(self) -> int:
        return self.problem.rank if self.dense_maps else self.problem.width // self.group_size

    def sizes(self, first_item: int, block_q: int) -> tuple[int, ...]:
        """Return H to causal_offset of the forwards' arguments; ``block_q``: queries of a tile."""
        problem = self.problem
        by_queries, by_keys = self.by == "queries", self.by == "keys"
        query_blocks, query_block_size = 1, problem.queries
        if by_queries:
            query_blocks, query_block_size = self.blocks, self.block_size
        elif self.sequences:  # tiles begin with the first row of each
            query_blocks, query_block_size = self.sequences.problem.most_pieces("queries", block_q), block_q
        return (
            problem.heads,
            problem.heads_per_kv_head,
            problem.queries,
            problem.keys,
            query_blocks,
            query_block_size,
            self.block_size if by_keys else max(problem.keys, 1),
            first_item,
            self.key_limits[1] or 0,
        )

    def tiles_per_item(self, sizes: tuple[int, ...], block_q: int) -> int:
        """Return the tiles of queries of one item: a block of queries, or all queries of a head."""
        query_blocks, query_block_size = sizes[4:6]
        return (1 if self.by == "queries" else query_blocks) * ceil_div(query_block_size, block_q)

    def ragged_arguments(self, sizes: tuple[int, ...]) -> tuple[Any, ...]:
        """Return the forwards' arguments with packed sequences, for these `sizes`."""
        if not self.sequences:
            return ()
        query_block_size, key_block_size = sizes[5:7]
        if self.by != "keys":
            return self.sequences.blocks("queries", query_block_size), 0
        pieces = self.sequences.pieces("queries", query_block_size, key_block_size)
        return pieces, self.blocks

    def option_arguments(self) -> tuple[Any, ...]:
        """Return window_offset to bias of the portable forwards' arguments."""
        # tanh(x) is x where it is this small, and quotients do not leave the range of float32
        softcap = min(self.problem.softcap, 2.0**60)
        tables = (_table(table, self.problem) for table in (self.tables.mask, self.tables.bias))
        return (self.key_limits[0] or 0, sum_type(self.problem.dtype)(softcap), *tables)

    @property
    def folds_reference(self) -> bool:
        """Whether forward_sm90.cu, mapping queries, finds room for the softmax's reference: two columns of padding."""
        return self.dense_maps is not None and self.by == "keys" and pad(self.rank) - self.rank >= 2

    @property
    def scores_own_blocks(self) -> bool:
        """Whether a query and the keys of its own block are multiplied as they are (eq. 20)."""
        return self.dense_maps is not None and self.problem.own_block_is_exact

    def on_cuda_cores(self) -> None:
        """Launch forward_simt.cu, which applies maps of groups itself; dense ones beforehand but for Q Z, by keys."""
        problem, maps = self.problem, self.dense_maps
        heads = problem.batch * problem.heads
        if maps is None:
            self._launch_simt(_NULL, _NULL, 0, heads * (self.blocks if self.by == "queries" else 1))
            return
        if self.by == "queries":
            Q = self._sample(self.Q)
            for first, count, K in self._fused_keys(on_hopper=False):
                self._launch_simt(Q, K, first, count)
        else:
            room = _empty((*self.Q.shape[:3], pad(self.rank)), maps.fusion.dtype)
            self._launch_simt(room, self._sample(self.K), 0, heads)
        if not self.switches.changes_scores:  # otherwise the forward did
            self._add_mean_scores(maps.mean, self.lse)

    def on_tensor_cores(self) -> None:
        """Launch forward_sm90.cu or forward_mma.cu; for blocks over queries in turns with the fusion of their keys."""
        heads = self.problem.batch * self.problem.heads
        on_hopper, is_dense = self._runs_on_hopper(), self.dense_maps is not None
        changes_scores, mean_scores = self.switches.changes_scores, _NULL
        if self.dense_maps is not None and changes_scores:
            mean_scores = _empty(self.lse.shape, np.float32)
            self._add_mean_scores(self.dense_maps.mean, mean_scores, is_new=True)
        if self.by == "queries":
            is_sampled = on_hopper or is_dense
            Q = self._sample(self.Q) if is_sampled else self.Q
            for first, count, K in self._fused_keys(on_hopper=on_hopper):
                if on_hopper:
                    self._launch_sm90(Q, K[None], first, count)
                else:
                    self._launch_mma(Q, K, NO_MAP if is_sampled else SAMPLE, first, count, mean_scores)
        elif self.by == "keys":
            K = self._sample(self.K, with_ones=on_hopper and self.folds_reference)
            if on_hopper:
                self._launch_sm90(self.Q, K, 0, heads)
            else:
                self._launch_mma(self.Q, K, DENSE if is_dense else FUSE, 0, heads, mean_scores)
        elif on_hopper:
            self._launch_sm90(self.Q, self.K, 0, heads)
        else:
            self._launch_mma(self.Q, self.K, NO_MAP, 0, heads, mean_scores)
        # where queries are mapped on Hopper or meet keys as they are, the forward knows the mean of the keys
        adds_mean_scores = changes_scores or self.scores_own_blocks or (on_hopper and self.by == "keys")
        if self.dense_maps is not None and not adds_mean_scores:
            self._add_mean_scores(self.dense_maps.mean, self.lse)

    def _fused_keys(self, *, on_hopper: bool) -> Iterator[tuple[int, int, Any]]:
        """Yield (first item, items, fused keys (items, M, R padded)) in turns with the launches that read them."""
        items = self.problem.batch * self.problem.heads * self.blocks
        launch_items = self._items_per_launch(items, on_hopper)
        workspace = _empty((launch_items, self.problem.keys, pad(self.rank)), self._reduced_type)
        for first in range(0, items, launch_items):
            count = min(launch_items, items - first)
            self._fuse(self.K, workspace, first, count)
            yield first, count, workspace

    def sample_keys(self) -> Any:
        """Return K W of blocks over keys."""
        return self._sample(self.K)

    @property
    def _reduced_type(self) -> Any:
        """Type of sampled and fused rows: that of the maps, where they are dense."""
        return self.dense_maps.sampling.dtype if self.dense_maps else self.K.dtype

    def _items_per_launch(self, items: int, on_hopper: bool) -> int:
        """Return how many query blocks one launch takes: what fits the workspace, in whole waves of the device."""
        item_bytes: int = self.problem.keys * pad(self.rank) * self._reduced_type.itemsize
        fitting = max(1, WORKSPACE_BYTES // max(item_bytes, 1))
        if fitting >= items:
            return items
        blocks_at_once = work().device.multiprocessors * (1 if on_hopper else 2)
        blocks_per_item = ceil_div(self.block_size, 128)
        waves = fitting * blocks_per_item // blocks_at_once
        return max(1, waves * blocks_at_once // blocks_per_item) if waves else fitting

    def _runs_on_hopper(self) -> bool:
        """Whether forward_sm90.cu takes this problem: what it multiplies must suit wgmma and the copy engine."""
        read_by_copies = (self.V,) if self.by == "queries" else (self.Q, self.K, self.V)
        return (
            hopper_is_usable()
            and self.switches == NO_SWITCHES
            and (self.key_limits[1] is None or self.problem.causal_offset is not None)
            and (self.by != "keys" or self._maps_queries_on_hopper())
            and self.problem.keys > 0
            and pad(self.rank) in SM90_WIDTHS
            and self.problem.value_width in SM90_WIDTHS
            and (self.by == "queries" or self.problem.width in SM90_WIDTHS)
            and all(map(_copy_engine_reads, read_by_copies))
            and _vector(self.O) == 8
        )

    def _maps_queries_on_hopper(self) -> bool:
        """Whether forward_sm90.cu takes these blocks over keys: dense maps, and whole tiles of keys in a block."""
        return self.dense_maps is not None and self.block_size % self._key_map_tiles().block_kv == 0

    def _key_map_tiles(self) -> Sm90Tiles:
        return sm90_key_map_tiles(pad(self.rank), self.problem.width, self.problem.value_width, self.block_size)

    def _launch_sm90(self, Q: Any, K: Any, first_item: int, items: int) -> None:
        """Launch forward_sm90.cu; K is (B, H_kv, M, R), or (1, items of this launch, M, R) where fused for items."""
        problem = self.problem
        rank = K.shape[3]
        # the queries of blocks over keys come as they are, and the kernel maps them for each block
        by_keys = self.dense_maps if self.by == "keys" else None
        ragged = self.sequences is not None
        on_average = ragged and self.by != "queries"
        tiles = (
            self._key_map_tiles()
            if by_keys
            else sm90_tiles(rank, problem.value_width, self.query_block_size, ragged=on_average)
        )
        sizes = self.sizes(first_item, tiles.block_q)
        mapped_width = problem.width if by_keys else None
        defines = sm90_defines(
            tiles,
            element=_element(self.Q),
            rank=rank,
            value_width=problem.value_width,
            keys_per_item=self.by == "queries",
            causal=problem.causal_offset is not None,
            mapped_width=mapped_width,
            folds_reference=self.folds_reference,
            ragged=ragged,
        )
        launch = forward_sm90_launch(
            rank,
            problem.value_width,
            mapped_width=mapped_width,
            own_block=problem.own_block_is_exact,
            ragged=ragged,
            block_q=tiles.block_q,
            block_kv=tiles.block_kv,
            stages=tiles.stages,
        )
        heads, heads_per_kv_head, N, M, query_blocks, query_block_size, key_block_size, first, offset = sizes
        shown = [(Q, launch.q_box), (K, launch.k_box), (self.V, launch.v_box)]
        if by_keys and launch.z_box:
            batch, kv_heads, blocks = by_keys.fusion.shape[:3]
            shown.append((by_keys.fusion.reshape(batch, kv_heads, blocks * rank, problem.width), launch.z_box))
        if launch.own_box:
            shown.append((self.K, launch.own_box))
        maps = [work().tensor_map(x, box) for x, box in shown]
        query_tiles = self.tiles_per_item(sizes, launch.block_q)
        grid = sm90_grid(
            defines,
            items=items,
            query_tiles=query_tiles,
            keys=M,
            heads_per_kv_head=heads_per_kv_head,
            multiprocessors=work().device.multiprocessors,
        )
        scale_log2 = np.float32(problem.scale * math.log2(math.e))
        splits: tuple[Any, ...] = ()
        if sm90_splits_keys(defines):
            item, tile = divmod(grid.whole_tiles, query_tiles)
            first_row = item * N + tile * launch.block_q
            parts = SplitResults.of(grid.splits, self.lse.size - first_row, problem.value_width)
            splits = grid.whole_tiles, grid.splits, grid.keys_per_split
            splits += parts.O, parts.stats, parts.rows, np.int64(first_row)
        _launch(
            "forward_sm90",
            defines,
            grid.blocks,
            launch.threads,
            *(*maps, self.O, self.lse, heads, heads_per_kv_head, N, M, query_blocks, query_block_size, first),
            *(grid.positions, grid.items_dealt, grid.blocks_at_once, *splits, offset, scale_log2),
            *_strides(self.O),
            *((by_keys.mean, key_block_size) if by_keys else ()),
            *self.ragged_arguments(sizes)[:1],
            shared=launch.shared_bytes,
        )
        if splits:
            parts.merge(self.O, self.lse, scale_log2, first_row=first_row)

    def _sample(self, X: Any, *, with_ones: bool = False) -> Any:
        """Return X W (B, H_x, rows, R padded), X the side that is cut into blocks.

        ``with_ones``, of dense maps: the last two columns are ones.
        """
        sampled = _empty((*X.shape[:3], pad(self.rank)), self._reduced_type)
        items = X.shape[0] * X.shape[1] * self.blocks
        if self.dense_maps is None:
            self._launch_fuse(X, sampled, 0, items, sample=True)
        else:
            self._launch_reduce(self.dense_maps, X, sampled, 0, items, sample=True, with_ones=with_ones)
        return sampled

    def _fuse(self, Y: Any, out: Any, first_item: int, items: int) -> None:
        """Write Y Z for ``items`` query blocks from the first one on."""
        if self.dense_maps is None:
            self._launch_fuse(Y, out, first_item, items, sample=False)
        else:
            self._launch_reduce(self.dense_maps, Y, out, first_item, items, sample=False)

    def _launch_reduce(
        self,
        maps: _DenseMaps,
        Y: Any,
        out: Any,
        first_item: int,
        items: int,
        *,
        sample: bool,
        with_ones: bool = False,
    ) -> None:
        """Launch reduce_rows.cu, or reduce_rows_simt.cu for wide maps; the side that holds keys is centred."""
        problem = self.problem
        rows, width = Y.shape[2:]
        common = {
            "element": _element(Y),
            "width": width,
            "rank": self.rank,
            "centred": sample == (self.by == "keys"),
            "rows_from_block": sample,
            "ragged": self.sequences is not None,
        }
        if uses_tensor_cores(problem, capability()):
            stem, row_tile, threads = "reduce_rows", REDUCE_ROW_TILE, REDUCE_THREADS
            defines = reduce_defines(**common, aligned=_vector(Y) == 8, with_ones=with_ones)
        else:
            stem, row_tile, threads = "reduce_rows_simt", REDUCE_SIMT_ROW_TILE, SIMT_THREADS
            defines = reduce_simt_defines(**common)
        row_tiles = ceil_div(self.block_size if sample else rows, row_tile)
        _launch(
            stem,
            defines,
            row_tiles * ceil_div(items, defines.get("ITEMS_PER_BLOCK", 1)),
            threads,
            *(Y, maps.mean, maps.sampling if sample else maps.fusion, out),
            *(rows, problem.grouped_heads, Y.shape[1], self.blocks, first_item, items),
            *(self.block_size, problem.grouped_rows, self.seen_offset(rows)),
            *_strides(Y),
            *self.block_pieces,
            shared=defines.get("LAUNCH_SHARED_BYTES", 0),
        )

    def _add_mean_scores(self, mean: Any, sums: Any, *, is_new: bool = False) -> None:
        """Add what centring the keys took from the scores of a query to sums (B, H, N) float32 (eq. 12).

        ``is_new``: nothing is in them yet.
        """
        problem = self.problem
        ragged = self.sequences is not None
        defines = mean_scores_defines(_element(self.Q), problem.width, _vector(self.Q), adds=not is_new, ragged=ragged)
        rows = defines["THREADS"] // defines["LANES"]
        pieces = self.sequences.blocks("queries", rows) if self.sequences else None
        tiles = ceil_div(problem.queries, rows) if pieces is None else len(pieces)
        _launch(
            "add_mean_scores",
            defines,
            problem.batch * problem.heads * tiles,
            None,
            *(self.Q, mean, sums, problem.heads, problem.kv_heads, problem.queries, problem.width),
            sum_type(problem.dtype)(problem.scale),
            *_strides(self.Q),
            *(() if pieces is None else (pieces, tiles)),
        )

    def seen_offset(self, rows: int) -> int:
        """Return how much further than itself a row sees ``rows`` of the other side; not causally, all of them."""
        problem = self.problem
        if self.sequences:
            return rows + problem.queries if problem.causal_offset is None else 0
        return rows if problem.causal_offset is None else problem.causal_offset

    def _launch_fuse(self, Y: Any, out: Any, first_item: int, items: int, *, sample: bool) -> None:
        """Launch fuse_channels.cu."""
        problem = self.problem
        rows, width = Y.shape[2:]
        defines = fuse_defines(
            element=_element(Y),
            group_size=self.group_size,
            rank=self.rank,
            with_gains=self.gains is not None and not sample,
            sample=sample,
            vector=_vector(Y),
            ragged=self.sequences is not None,
        )
        row_tile = 128 // Y.itemsize
        _launch(
            "fuse_channels",
            defines,
            ceil_div(self.block_size if sample else rows, row_tile) * ceil_div(items, defines["ITEMS_PER_BLOCK"]),
            None,
            *(Y, *self._map_arrays(), out),
            *(rows, width, self.rank, problem.grouped_heads, Y.shape[1], self.blocks, first_item, items),
            *(self.block_size, problem.grouped_rows, self.seen_offset(rows)),
            *_strides(Y),
            *self.block_pieces,
        )

    def _launch_simt(self, reduced_Q: Any, reduced_K: Any, first_item: int, items: int) -> None:
        """Launch forward_simt.cu; what is reduced is read only with dense maps."""
        problem, maps = self.problem, self.dense_maps
        defines = simt_defines(
            element=_element(self.Q),
            width=problem.width,
            rank=self.rank,
            value_width=problem.value_width,
            group_size=self.group_size,
            group_by=self.by,
            with_gains=self.gains is not None,
            dense=maps is not None,
            own_block=self.scores_own_blocks,
            causal=self.key_limits[1] is not None,
            switches=self.switches,
            ragged=self.sequences is not None,
        )
        sizes = self.sizes(first_item, defines["BLOCK_Q"])
        _launch(
            "forward_simt",
            defines,
            items * self.tiles_per_item(sizes, defines["BLOCK_Q"]),
            SIMT_THREADS,
            *(self.Q, self.K, self.V, *((_NULL, _NULL) if maps else self._map_arrays())),
            *((maps.fusion, maps.mean) if maps else (_NULL, _NULL)),
            *(reduced_Q, reduced_K, self.O, self.lse),
            *sizes,
            sum_type(problem.dtype)(problem.scale),
            *(stride for x in (self.Q, self.K, self.V, self.O) for stride in _strides(x)),
            *self.option_arguments(),
            *self.ragged_arguments(sizes),
        )

    def _launch_mma(self, Q: Any, K: Any, query_map: int, first_item: int, items: int, mean_scores: Any) -> None:
        """Launch forward_mma.cu; without a query map, Q is as wide as what stands for the keys."""
        problem = self.problem
        limit = work().device.shared_limit
        width = Q.shape[3]
        rank = width if query_map == NO_MAP else self.rank
        own_block = self.scores_own_blocks
        tiles = mma_tiles(
            width,
            rank,
            problem.value_width,
            query_map,
            limit,
            own_block=own_block,
            changes_scores=self.switches.changes_scores,
        )
        user_arrays = (Q, self.V, self.O) if self.by and not own_block else (Q, self.K, self.V, self.O)
        defines = mma_defines(
            tiles,
            element=_element(self.Q),
            width=width,
            rank=rank,
            value_width=problem.value_width,
            query_map=query_map,
            group_size=self.group_size,
            with_gains=self.gains is not None,
            keys_per_item=self.by == "queries",
            causal=self.key_limits[1] is not None,
            own_block=own_block,
            switches=self.switches,
            centred=self.dense_maps is not None,
            aligned=all(_vector(x) == 8 for x in user_arrays),
            ragged=self.sequences is not None,
        )
        sizes = self.sizes(first_item, tiles.block_q)
        _launch(
            "forward_mma",
            defines,
            items * self.tiles_per_item(sizes, tiles.block_q),
            32 * tiles.num_warps,
            *(Q, K, self.V, self.K, self.dense_maps.mean if self.dense_maps else _NULL),
            *(*self._map_arrays(), self.O, self.lse),
            *sizes,
            np.float32(problem.scale * math.log2(math.e)),
            # K's strides mean nothing where it is a workspace
            *(stride for x in (Q, K if K.ndim == 4 else self.K, self.K, self.V, self.O) for stride in _strides(x)),
            *self.option_arguments(),
            mean_scores,
            *self.ragged_arguments(sizes),
            shared=defines["LAUNCH_SHARED_BYTES"],
        )

    def _map_arrays(self) -> tuple[Any, Any]:
        """Return channels, or maps of queries, and gains as kernel arguments; null pointers where there are none."""
        match self.maps:
            case GroupMaps(channels, gains):
                return channels, _NULL if gains is None else gains
            case _DenseMaps(fusion=fusion):
                return fusion, _NULL
            case _:
                return _NULL, _NULL


_NULL = np.uint64(0)
_EDGE_PLACES = 7, 8
"""Where a plan has cu_seqlens_q and cu_seqlens_k, behind what `CupyBackend.plan` takes."""


def _as_batch(array: Any) -> Any:
    """Return packed rows (rows, heads, width) as (1, heads, rows, width)."""
    return array[np.newaxis].swapaxes(1, 2)


def _thread_blocks() -> int:
    """Return how many thread blocks keep the current device busy with reading memory: two a multiprocessor."""
    return 2 * work().device.multiprocessors


def _contiguous(array: Any) -> Any:
    """Return maps, which a caller of `attend` may have made, as the kernels read them."""
    return array if isinstance(array, PlannedArray) else cupy.ascontiguousarray(cupy.asarray(array))


def _strides(array: Any) -> tuple[np.int64, ...]:
    """Return the strides of the first three axes in elements, as the 64-bit integers that the kernels take."""
    return tuple(np.int64(stride // array.itemsize) for stride in array.strides[:3])


def _table(array: Any | None, problem: Problem) -> np.ndarray:
    """Return what broadcasts to (B, H, N, M) as a Table of score_options.cuh: one element of five 64-bit numbers."""
    shape = (problem.batch, problem.heads, problem.queries, problem.keys)
    numbers = [0] * 5
    if array is not None:
        steps = [stride if size > 1 else 0 for stride, size in zip(array.strides, array.shape, strict=True)]
        numbers = [array.data.ptr, *[0] * (len(shape) - len(steps)), *(step // array.itemsize for step in steps)]
    return np.array(numbers, np.int64).view("V40")


def _vector(array: Any) -> int:
    """Return how many elements one 16-byte load takes, or 1 where pointer, width or a stride is not made of such."""
    steps = [stride for stride, size in zip(array.strides[:3], array.shape[:3], strict=True) if size > 1]
    starts = [array.data.ptr, array.shape[3] * array.itemsize, *steps]
    return 16 // array.itemsize if all(start % 16 == 0 for start in starts) else 1


def _element(array: Any) -> int:
    return _element_of_type(array.dtype)


@cache
def _element_of_type(dtype: Any) -> int:
    return ELEMENTS[dtype.name]


def _planes(seed: int, block_size: int) -> Any:
    """Return the hyperplanes of one block, drawn once: that takes longer than hashing with them."""
    rows = hyperplane_rows(block_size)
    planes = work().constant(("hyperplanes", seed, rows), lambda: hyperplanes(seed, rows))
    return planes[:block_size]


def _empty(shape: tuple[int, ...], dtype: Any) -> Any:
    """Return memory for the length of a call. All of it is taken here, so that a workspace can hold it."""
    return work().empty(shape, dtype)


def _placed_keys(k: Any, layout: Layout) -> Any:
    """Return all of a call's keys that a plan depends on."""
    from .cupy_paged_keys import PagedKeys

    if isinstance(k, PagedKeys):
        return k.placed(layout)
    are_grouped = isinstance(k, GroupedKeys)
    return k.kept().placed() if are_grouped else Placed.of(k, layout)


def _in_workspace(workspace: Any) -> Work:
    from .cupy_device import WorkspaceWork

    return WorkspaceWork(cupy.asarray(workspace))


@lru_cache(maxsize=256)
def _planned_bytes(problem: Problem | RaggedProblem, device: DeviceFacts, *arrays: Any) -> int:
    """Return what a call takes of a workspace; ``arrays`` as in `CupyBackend.plan`."""
    planned = (None if x is None else x.planned(place) for place, x in enumerate(arrays))
    return BACKEND.plan(problem, device, *planned).memory.bytes


def _launch(stem: str, defines: Defines, blocks: int, threads: int | None, *arguments: Any, shared: int = 0) -> None:
    """Launch one kernel; ``threads`` defaults to -DTHREADS. Python integers are passed as 32-bit ones.

    Grids have one axis: the others end at 65535, which batch times heads may pass.
    """
    if blocks == 0:
        return
    typed = tuple(np.int32(x) if isinstance(x, int) else x for x in arguments)
    work().launch(stem, defines, blocks, threads or defines["THREADS"], typed, shared)


BACKEND = CupyBackend()
