"""Few queries over many keys on tensor cores: decode.cu and merge_splits.cu, and which calls go to them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..checks import FLOAT32_MAX, FLOAT32_TINY
from ..problem import Problem, ceil_div
from ..tiles import (
    DECODE_BLOCKS_PER_PROCESSOR,
    decode_defines,
    decode_splits,
    decode_tiles,
)
from . import NO_TABLES, ScoreTables
from .cupy_backend import (
    _NULL,
    SplitResults,
    _element,
    _launch,
    _strides,
    _vector,
    capability,
)
from .device_work import work

MOST_QUERIES = 8
LEAST_KEYS = 1024
"""Plain keys below which one thread block for each query head is as fast as several."""


@dataclass(frozen=True, slots=True)
class FinishedKeys:
    """What a cache keeps of its finished blocks, as decode.cu reads it; the last axes are contiguous.

    In pages P * H_kv stands for B * H_kv, and each has one block; how many keys are finished is known to the device.
    """

    keys: int
    """How many there are: whole blocks."""
    block_size: int
    rank: int
    sampled: Any
    """(B * H_kv, room, R padded)"""
    maps: Any
    """(B * H_kv, room in blocks, R padded + 1, D padded): Z transposed, then the mean of the block."""


@dataclass(frozen=True, slots=True)
class Pages:
    """Which pages (H_kv, S, width) hold the keys and values of each sequence, as decode.cu reads it."""

    table: Any
    """(B, pages of a sequence) int32"""
    lengths: Any
    """(B,) int32"""
    size: int
    """S, a power of two."""
    is_top_left: bool
    """Whether a causal limit counts from the first key of a sequence, not from its last."""
    tail_of: Any = None
    """(P,) int32, of grouped keys: the place of an unfinished page among the tails, -1 of a finished one."""


def suits(problem: Problem, tables: ScoreTables) -> bool:
    """Whether decode.cu takes a call over grouped keys: few queries, no score options, 16 bits, sm_80 and up."""
    return (
        problem.queries <= MOST_QUERIES
        and problem.dtype.itemsize == 2
        and problem.window == (None, None)
        and problem.softcap == 0
        and tables.mask is None
        and tables.bias is None
        and capability() >= 80
    )


def suits_plain_keys(problem: Problem, tables: ScoreTables) -> bool:
    """Whether decode.cu takes a call over plain keys: an exact one over many, besides."""
    return problem.grouping is None and problem.keys >= LEAST_KEYS and suits(problem, tables)


def suits_pages(problem: Problem) -> bool:
    """Whether decode.cu takes a call over keys in pages: an exact one, or one over grouped keys."""
    return problem.grouping is None and suits(problem, NO_TABLES)


def decode(
    problem: Problem,
    Q: Any,
    K: Any,
    V: Any,
    O: Any,
    lse: Any,
    finished: FinishedKeys | None = None,
    pages: Pages | None = None,
) -> None:
    """Launch decode.cu, and merge_splits.cu where keys are split; K (B, H_kv, rows, D) are those after ``finished``.

    With ``pages`` K and V are (P, H_kv, S, width), and the problem is that of sequences which fill all their pages.
    With both K are the tails (places, H_kv, S, D).
    """
    device = work().device
    element, width, value_width = _element(Q), problem.width, problem.value_width
    rank = None if finished is None else finished.rank
    rows_of_a_tile = problem.queries * problem.heads_per_kv_head
    block_size = None if finished is None else finished.block_size
    tiles = decode_tiles(width, rank, value_width, rows_of_a_tile, device.shared_limit, block_size)
    defines = decode_defines(
        tiles,
        element=element,
        width=width,
        rank=rank,
        value_width=value_width,
        aligned=all(_vector(x) == 8 for x in (Q, K, V)),
        paged=pages is not None,
    )
    row_tiles = ceil_div(rows_of_a_tile, tiles.rows)
    items = problem.batch * problem.kv_heads * row_tiles
    splits, keys_per_split = decode_splits(
        problem.keys, tiles.block_kv, items, DECODE_BLOCKS_PER_PROCESSOR * device.multiprocessors
    )
    rows = problem.batch * problem.heads * problem.queries
    parts = SplitResults.of(splits, rows, value_width)
    kept = (_NULL, _NULL) if finished is None else (finished.sampled, finished.maps)
    sign, scale_log2 = _sign_and_size(problem.scale)
    causal_offset = problem.keys if problem.causal_offset is None else problem.causal_offset
    in_pages: tuple[Any, ...] = ()
    if pages is not None:
        counts_from_end = problem.causal_offset is not None and not pages.is_top_left
        if counts_from_end:
            causal_offset = -problem.queries
        shift = pages.size.bit_length() - 1
        in_pages = (pages.table, pages.lengths, _strides(pages.table)[0], shift, int(counts_from_end))
        if finished is not None:
            in_pages += (pages.tail_of,)
    _launch(
        "decode",
        defines,
        items * splits,
        32 * tiles.num_warps,
        *(Q, *kept, K, V, O, lse),
        *(parts.O, parts.stats, problem.heads, problem.heads_per_kv_head, problem.queries, problem.keys),
        *((0, 1) if finished is None else (finished.keys, finished.block_size)),
        *(splits, keys_per_split, causal_offset),
        *(sign, scale_log2),
        *((np.int64(0), np.int64(0)) if finished is None else (_strides(x)[0] for x in kept)),
        *(stride for x in (Q, K, V, O) for stride in _strides(x)),
        *in_pages,
        shared=defines["LAUNCH_SHARED_BYTES"],
    )
    parts.merge(O, lse, scale_log2)


def _sign_and_size(scale: float) -> tuple[np.float32, np.float32]:
    """Return the sign of the scale and its size for powers of two; the kernels flush what is as good as zero."""
    size = abs(scale) * math.log2(math.e)
    if size < FLOAT32_TINY:
        return np.float32(0), np.float32(1)
    return np.float32(np.sign(scale)), np.float32(min(size, FLOAT32_MAX))
