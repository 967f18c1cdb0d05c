"""Where sequences lie and what their blocks are, for kernels whose host does not know (docs/math.md, eq. 29).

    sequence s: queries a_s <= n < a_(s+1) and keys c_s <= m < c_(s+1), cut into blocks and tiles from its own first row

Reference : reference/ragged_attention.py, which has them as slices
Launcher  : distrattn_np/backends/numba_backend.py, before all kernels that read the tables

Grid      : one block
Block     : any number of threads; each takes a run of sequences, then every so many of the blocks
Shared    : a number a thread
Assumes   : nothing of the lengths: those that fall or pass the end of an array are cut off

S sequences have at most S short tiles, so as many items are launched as `most_tiles` says, and each finds its sequence;
surplus ones find none. A call without lengths is one sequence, of which every batch has its own: either S or B is 1,
and what is kept for each sequence of each batch is at b + s.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numba import cuda

SEQUENCE_FIELDS = 6
QUERIES, KEYS, BLOCKS, QUERY_TILES, SAMPLE_TILES, DIAGONALS = range(SEQUENCE_FIELDS)
"""Rows of the table of sequences, [SEQUENCE_FIELDS, S + 1].

The first rows of each in q and in k; how many blocks, tiles of the forward kernel and tiles of `reduce_rows` the
sequences before it have; and the key that its first query is aligned to, less its first key.
"""

BLOCK_FIELDS = 8
SEQUENCE, FIRST_BLOCK, START, STOP, MET_START, MET_STOP, NEW_START, NEW_STOP = range(BLOCK_FIELDS)
"""Rows of the table of blocks, [BLOCK_FIELDS, C].

The sequence of each and the first block of that; its rows, from START to before STOP; the rows of the other side that
meet it, and those of them that do not meet its neighbour: of all its sequence's where all rows meet all blocks, one
part in as many as there are blocks. A block without rows: surplus, or of a sequence without queries.
"""


def most_tiles(rows: int, sequences: int, block: int, tile: int) -> int:
    """Return the most tiles that sequences of so many rows in all can have; see `count_tiles`."""
    return rows // block * -(-block // tile) + rows % block // tile + sequences


def _count_tiles(rows: int, block: int, tile: int) -> int:
    # tiles do not reach over the edges of blocks
    return rows // block * ((block + tile - 1) // tile) + (rows % block + tile - 1) // tile


def _find_sequence(counts: Any, item: int) -> tuple[int, int]:
    # counts: a row of the table of sequences. The sequence of an item and its number there; -1 for a surplus one
    low = 0
    high = counts.shape[0] - 1
    if item >= counts[high]:
        return -1, 0
    while high - low > 1:
        middle = (low + high) >> 1
        if counts[middle] <= item:
            low = middle
        else:
            high = middle
    return low, item - counts[low]


count_tiles = cuda.jit(device=True)(_count_tiles)
find_sequence = cuda.jit(device=True)(_find_sequence)


@cache
def make_rows_that_meet(by_keys: bool, causal: bool) -> Any:
    """Return the device function for the rows of the other side that meet rows of the side that is cut (eq. 3)."""

    def rows_that_meet(start: int, stop: int, rows: int, offset: int) -> tuple[int, int]:
        first = 0
        last = rows
        if causal and by_keys:
            first = min(max(start - offset, 0), rows)
        if causal and not by_keys:
            last = min(max(stop + offset, 0), rows)
        return first, last

    return cuda.jit(device=True)(rows_that_meet)


@cache
def make_block_rows(is_ragged: bool) -> Any:
    """Return the device function for the rows of block c: from the table, or worked out where there is none."""

    def block_rows(blocks: Any, c: int, block_size: int, rows: int) -> tuple[int, int]:
        if is_ragged:
            start = blocks[START, c]
            stop = blocks[STOP, c]
        else:
            start = c * block_size
            stop = min(start + block_size, rows)
        return start, stop

    return cuda.jit(device=True)(block_rows)


@cache
def make_scan(is_sum: bool, threads: int) -> Any:
    """Return the device function that puts running sums, or the largest so far and none below zero, into a row."""

    def combine(a: int, b: int) -> int:
        return a + b if is_sum else max(a, b)

    device_combine = cuda.jit(device=True)(combine)

    def scan(row: Any, runs_smem: Any, thread: int) -> None:
        # every thread has a run of the row; the whole block must call
        run = (row.shape[0] + threads - 1) // threads
        first = thread * run
        stop = min(first + run, row.shape[0])
        total = 0
        for i in range(first, stop):
            total = device_combine(total, row[i])
            row[i] = total
        runs_smem[thread] = total
        cuda.syncthreads()  # what each run comes to is there
        before = 0
        for i in range(min(thread, row.shape[0])):
            before = device_combine(before, runs_smem[i])
        for i in range(first, stop):
            row[i] = device_combine(before, row[i])
        cuda.syncthreads()  # the row is there, what runs come to is used up

    return cuda.jit(device=True)(scan)


@cache
def make_sequence_tables(is_ragged: bool, aligns_ends: bool, by_keys: bool, causal: bool, threads: int) -> Any:
    """Return the kernel; ``aligns_ends``: offsets count from the key that the last query is aligned to, the last."""
    running_max = make_scan(False, threads)
    running_sum = make_scan(True, threads)
    rows_that_meet = make_rows_that_meet(by_keys, causal)
    CUT, OTHER = (KEYS, QUERIES) if by_keys else (QUERIES, KEYS)

    def sequence_tables(
        sequences: Any,  # [SEQUENCE_FIELDS, S + 1]
        blocks: Any,  # [BLOCK_FIELDS, C]
        cu_seqlens_q: Any,  # [S + 1]; this and the next are read only where ragged
        cu_seqlens_k: Any,  # [S + 1]
        queries: int,  # of all sequences
        keys: int,
        query_block: int,  # what tiles of the forward kernel do not reach over the edges of, in rows
        query_tile: int,
        block_size: int,
        sample_tile: int,
        met_offset: int,  # query n goes through the maps of keys m <= n + met_offset
    ) -> None:
        runs_smem = cuda.shared.array(threads, np.int64)
        thread = cuda.threadIdx.x
        edges = sequences.shape[1]

        # ---- edges, which do not fall ----
        for s in range(thread, edges, threads):
            sequences[QUERIES, s] = min(cu_seqlens_q[s] if is_ragged else s * queries, queries)
            sequences[KEYS, s] = min(cu_seqlens_k[s] if is_ragged else s * keys, keys)
        cuda.syncthreads()  # all edges are there
        running_max(sequences[QUERIES], runs_smem, thread)
        running_max(sequences[KEYS], runs_smem, thread)

        # ---- how much comes before each sequence ----
        for s in range(thread, edges, threads):
            query_rows = 0
            cut_rows = 0
            sequences[DIAGONALS, s] = 0
            if s > 0:
                query_rows = sequences[QUERIES, s] - sequences[QUERIES, s - 1]
                cut_rows = sequences[CUT, s] - sequences[CUT, s - 1]
            sequences[BLOCKS, s] = count_tiles(cut_rows, block_size, block_size)
            sequences[QUERY_TILES, s] = count_tiles(query_rows, query_block, query_tile)
            sequences[SAMPLE_TILES, s] = count_tiles(cut_rows, block_size, sample_tile)
            if aligns_ends and s + 1 < edges:
                key_rows = sequences[KEYS, s + 1] - sequences[KEYS, s]
                sequences[DIAGONALS, s] = key_rows - (sequences[QUERIES, s + 1] - sequences[QUERIES, s])
        cuda.syncthreads()  # the counts of each sequence are there
        running_sum(sequences[BLOCKS], runs_smem, thread)
        running_sum(sequences[QUERY_TILES], runs_smem, thread)
        running_sum(sequences[SAMPLE_TILES], runs_smem, thread)

        # ---- blocks ----
        for c in range(thread, blocks.shape[1], threads):
            s, own = find_sequence(sequences[BLOCKS], c)
            for field in range(BLOCK_FIELDS):
                blocks[field, c] = 0
            if s >= 0 and sequences[QUERIES, s] < sequences[QUERIES, s + 1]:
                offset = met_offset + sequences[DIAGONALS, s]
                cut_start = sequences[CUT, s]
                cut_rows = sequences[CUT, s + 1] - cut_start
                other_start = sequences[OTHER, s]
                other_rows = sequences[OTHER, s + 1] - other_start
                start = own * block_size
                stop = min(start + block_size, cut_rows)
                met_start, met_stop = rows_that_meet(start, stop, other_rows, offset)
                # a neighbour meets less: the next block, over queries the one before
                new_start = met_start
                new_stop = met_stop
                if not causal:
                    count = sequences[BLOCKS, s + 1] - sequences[BLOCKS, s]
                    new_start = other_rows * own // count
                    new_stop = other_rows * (own + 1) // count
                elif by_keys and stop < cut_rows:
                    new_stop, _ = rows_that_meet(stop, stop, other_rows, offset)
                elif not by_keys and start > 0:
                    _, new_start = rows_that_meet(start, start, other_rows, offset)
                blocks[SEQUENCE, c] = s
                blocks[FIRST_BLOCK, c] = sequences[BLOCKS, s]
                blocks[START, c] = cut_start + start
                blocks[STOP, c] = cut_start + stop
                blocks[MET_START, c] = other_start + met_start
                blocks[MET_STOP, c] = other_start + met_stop
                blocks[NEW_START, c] = other_start + new_start
                blocks[NEW_STOP, c] = other_start + new_stop

    return cuda.jit(sequence_tables)
