"""Fused tiled attention with a running softmax: exact, on grouped channels, or in a subspace.

    S = scale * (X W) (Y Z)^T,   O = softmax(S) V,   lse = log sum exp S        docs/math.md (eq. 1 to 4, 10, 12, 20)

with S capped, plus a bias, and minus infinity where a window or a mask hides it (eq. 21 to 24). Tiles of keys that
those hide from the whole tile of queries are left out.

Reference : reference/distr_attention.py, reference/exact_attention.py, reference/subspace_attention.py,
            reference/score_options.py
CUDA C++  : raw_kernels/forward_simt.cu
Launcher  : distrattn_np/backends/numba_backend.py

Grid      : B * H * query tiles; a query tile does not reach over the edge of a grouping block or a sequence
Block     : (thread_columns, thread_rows); thread (tx, ty) owns the queries ty, ty + thread_rows, ... of the tile
            and, of these, the keys (of S) and the columns (of O) tx, tx + thread_columns, ...
Shared    : query tile [block_q, R], key tile [block_kv, R] and then value tile [block_kv, E] in one place (D instead
            of R where own blocks are exact), P [block_q, block_kv], the row maxima of each thread, the groups of one
            grouping block
Assumes   : tiles from `choose_tiles`; no axis of O is empty. A query that sees nothing gives 0 and lse = -inf
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numba import cuda

from ..problem import GroupBy, ceil_div
from ..tiles import ScoreSwitches
from .fuse_channels import make_fuse_channels, make_sample_channels
from .reduce_rows import make_load_rows, make_reduce_tile
from .sequences import BLOCKS, DIAGONALS, KEYS, QUERIES, QUERY_TILES, find_sequence

MAX_SHARED_BYTES = 48 * 1024
"""What a static shared array may take on every GPU; Numba cannot ask for more."""


@dataclass(frozen=True, slots=True)
class Tiles:
    """Queries and keys of one step, and the threads that share them."""

    block_q: int
    block_kv: int
    thread_rows: int
    thread_columns: int

    def shared_bytes(self, width: int, rank: int, value_width: int, itemsize: int) -> int:
        """Shared memory of the forward kernel, in bytes."""
        numbers = (
            self.block_q * odd(rank)
            + self.block_kv * self.key_value_stride(rank, value_width)
            + self.block_q * odd(self.block_kv)
            + self.block_q * self.thread_columns
            + width
        )
        return numbers * itemsize + width * np.dtype(np.int32).itemsize

    def key_value_stride(self, rank: int, value_width: int) -> int:
        """Row length of the array that holds key tiles, then value tiles with all columns that a thread row owns."""
        return odd(max(rank, ceil_div(value_width, self.thread_columns) * self.thread_columns))


def odd(stride: int) -> int:
    """Smallest odd row length that holds ``stride`` numbers: neighbouring rows then start in different banks."""
    return stride | 1


def choose_tiles(width: int, rank: int, value_width: int, accumulator: Any, simulated: bool) -> Tiles:
    """Return the largest tiles that fit; in the simulator, where each thread costs an OS thread, small ones."""
    if simulated:
        return Tiles(block_q=16, block_kv=16, thread_rows=2, thread_columns=4)
    itemsize = np.dtype(accumulator).itemsize
    for block_q, block_kv in ((64, 64), (64, 32), (32, 32), (16, 16)):
        tiles = Tiles(block_q, block_kv, thread_rows=16, thread_columns=16)
        if tiles.shared_bytes(width, rank, value_width, itemsize) <= MAX_SHARED_BYTES:
            return tiles
    return Tiles(block_q=8, block_kv=8, thread_rows=8, thread_columns=8)


@cache
def make_forward(
    accumulator: Any,
    width: int,
    value_width: int,
    rank: int,
    group_by: GroupBy | None,
    has_gains: bool,
    in_subspace: bool,
    own_block_is_exact: bool,
    has_last: bool,
    is_ragged: bool,
    switches: ScoreSwitches,
    tiles: Tiles,
) -> Any:
    """Return the kernel for one choice of widths, method and tiles; ``group_by=None`` is exact attention.

    In a subspace the side that is cut into blocks comes sampled, and tiles of the other are fused here for every block
    that they meet; own blocks are taken as they are, in their full width, which ``tiles`` must have room for.
    ``has_last`` says whether there are keys that come too late for a query (eq. 3 and 23).
    """
    BLOCK_Q, BLOCK_KV = tiles.block_q, tiles.block_kv
    THREAD_ROWS, THREAD_COLUMNS = tiles.thread_rows, tiles.thread_columns
    THREADS = THREAD_ROWS * THREAD_COLUMNS
    ROWS_PER_THREAD = BLOCK_Q // THREAD_ROWS
    KEYS_PER_THREAD = BLOCK_KV // THREAD_COLUMNS
    VALUES_PER_THREAD = ceil_div(value_width, THREAD_COLUMNS)
    VALUE_COLUMNS = VALUES_PER_THREAD * THREAD_COLUMNS
    is_grouped = group_by is not None and not in_subspace
    by_keys = group_by == "keys"
    HAS_FIRST, HAS_LAST = switches.window, has_last
    SOFTCAP, BIAS, MASK = switches.softcap, switches.bias != 0, switches.mask
    INNER_WIDTH = width if own_block_is_exact else rank
    Q_SHAPE = (BLOCK_Q, odd(INNER_WIDTH))
    KV_SHAPE = (BLOCK_KV, tiles.key_value_stride(INNER_WIDTH, value_width))
    P_SHAPE = (BLOCK_Q, odd(BLOCK_KV))
    MAXIMA_SHAPE = (BLOCK_Q, THREAD_COLUMNS)
    S_SHAPE = (ROWS_PER_THREAD, KEYS_PER_THREAD)
    O_SHAPE = (ROWS_PER_THREAD, VALUES_PER_THREAD)
    ZERO = accumulator(0)
    MINUS_INFINITY = accumulator(-np.inf)
    group_size = width // rank
    sample = make_sample_channels(accumulator, rank, group_size, THREAD_ROWS, THREAD_COLUMNS)
    fuse = make_fuse_channels(accumulator, rank, group_size, has_gains, THREAD_ROWS, THREAD_COLUMNS)
    load_queries, load_keys = (fuse, sample) if by_keys else (sample, fuse)
    load_rows = make_load_rows(accumulator, False, THREAD_ROWS, THREAD_COLUMNS)
    load_centred_rows = make_load_rows(accumulator, True, THREAD_ROWS, THREAD_COLUMNS)
    reduce_queries = make_reduce_tile(accumulator, width, False, THREAD_ROWS, THREAD_COLUMNS)
    reduce_keys = make_reduce_tile(accumulator, width, True, THREAD_ROWS, THREAD_COLUMNS)

    def forward(
        Q: Any,  # [B, H, N, D]
        K: Any,  # [B, H_kv, M, D]
        V: Any,  # [B, H_kv, M, E]
        channels: Any,  # [B, H_x, C, D]; read only where channels are grouped
        gains: Any,  # [B, H_x, C, D]; read only with gains
        sampled: Any,  # [B, H_x, rows, R], X W; this and the next three are read only in a subspace
        fusion: Any,  # [B, H_x, C, D, R], Z
        ranks: Any,  # [B, H_x, C]
        key_mean: Any,  # [B or sequences, H_kv, D]
        sequences: Any,  # [SEQUENCE_FIELDS, S + 1], sequences.py; read only where ragged
        O: Any,  # [B, H, N, E]
        lse: Any,  # [B, H, N]
        query_block: int,  # rows per grouping block, or N
        key_block: int,  # rows per grouping block, or M (1 where there are no keys)
        first_offset: int,  # query n sees keys n + first_offset to n + last_offset; each where there is one,
        last_offset: int,  # and counted from the diagonal of its sequence where ragged
        scale: Any,
        softcap: Any,
        bias: Any,  # [B, H, N, M]; read only with a bias
        mask: Any,  # [B, H, N, M]; read only with a mask
    ) -> None:
        Q_smem = cuda.shared.array(Q_SHAPE, accumulator)
        KV_smem = cuda.shared.array(KV_SHAPE, accumulator)
        P_smem = cuda.shared.array(P_SHAPE, accumulator)
        maxima_smem = cuda.shared.array(MAXIMA_SHAPE, accumulator)
        channels_smem = cuda.shared.array(width, np.int32)
        gains_smem = cuda.shared.array(width, accumulator)
        S_rmem = cuda.local.array(S_SHAPE, accumulator)
        O_rmem = cuda.local.array(O_SHAPE, accumulator)
        row_max = cuda.local.array(ROWS_PER_THREAD, accumulator)
        row_sum = cuda.local.array(ROWS_PER_THREAD, accumulator)
        mean_scores = cuda.local.array(ROWS_PER_THREAD, accumulator)
        tx = cuda.threadIdx.x
        ty = cuda.threadIdx.y

        # ---- which queries this block owns ----
        heads, kv_heads = Q.shape[1], K.shape[1]
        tiles_per_block = (query_block + BLOCK_Q - 1) // BLOCK_Q
        query_tiles = cuda.gridDim.x // (Q.shape[0] * heads)
        tile = cuda.blockIdx.x % query_tiles
        h = cuda.blockIdx.x // query_tiles % heads
        b = cuda.blockIdx.x // query_tiles // heads
        h_kv = h * kv_heads // heads
        h_x = h_kv if by_keys else h
        mean_b = b

        # ---- its sequence: from here on there is no other ----
        if is_ragged:
            s, tile = find_sequence(sequences[QUERY_TILES], tile)
            if s < 0:
                return
            mean_b = s
            first_query, stop_query = sequences[QUERIES, s], sequences[QUERIES, s + 1]
            first_key, stop_key = sequences[KEYS, s], sequences[KEYS, s + 1]
            first_block, stop_block = sequences[BLOCKS, s], sequences[BLOCKS, s + 1]
            Q = Q[:, :, first_query:stop_query]
            O = O[:, :, first_query:stop_query]
            lse = lse[:, :, first_query:stop_query]
            K = K[:, :, first_key:stop_key]
            V = V[:, :, first_key:stop_key]
            if is_grouped:
                channels = channels[:, :, first_block:stop_block]
            if has_gains:
                gains = gains[:, :, first_block:stop_block]
            if in_subspace:
                fusion = fusion[:, :, first_block:stop_block]
                ranks = ranks[:, :, first_block:stop_block]
                sampled = sampled[:, :, first_key:stop_key] if by_keys else sampled[:, :, first_query:stop_query]
            first_offset += sequences[DIAGONALS, s]
            last_offset += sequences[DIAGONALS, s]

        N, M = Q.shape[2], K.shape[2]
        query_c = tile // tiles_per_block
        query_start = query_c * query_block + tile % tiles_per_block * BLOCK_Q
        query_stop = min(query_start + BLOCK_Q, (query_c + 1) * query_block, N)
        if query_start >= query_stop:
            return  # beyond the end of a short last block
        key_begin = 0
        if HAS_FIRST:
            key_begin = max(query_start + first_offset, 0)
        key_stop = M
        if HAS_LAST:
            key_stop = min(max(query_stop + last_offset, 0), M)

        # ---- which keys go through maps, block by block, and which are in own blocks (eq. 20) ----
        mapped_stop = key_stop
        own_start = key_stop
        if own_block_is_exact:
            own_start = min(max((query_start + last_offset) // key_block * key_block, 0), M)
            mapped_stop = min(max((query_stop - 1 + last_offset) // key_block * key_block, 0), M)
        mapped_blocks = (mapped_stop + key_block - 1) // key_block

        for i in range(ROWS_PER_THREAD):
            row_max[i] = MINUS_INFINITY
            row_sum[i] = ZERO
            for e in range(VALUES_PER_THREAD):
                O_rmem[i, e] = ZERO
            # what centring the keys takes from every score of the row (eq. 12)
            mean_scores[i] = ZERO
            n = query_start + ty + i * THREAD_ROWS
            if in_subspace and n < query_stop:
                for d in range(width):
                    mean_scores[i] += accumulator(Q[b, h, n, d]) * key_mean[mean_b, h_kv, d]
                mean_scores[i] *= scale

        for step in range(min(key_begin // key_block, mapped_blocks), mapped_blocks + (1 if own_block_is_exact else 0)):
            # ---- the keys of this step and the queries as they meet them, [BLOCK_Q, depth] ----
            is_own = step == mapped_blocks
            block_start = max(own_start if is_own else step * key_block, key_begin)
            block_stop = key_stop if is_own else min((step + 1) * key_block, mapped_stop)
            c = query_c + step  # only one side has more than one block, the other's index is 0
            depth = rank
            if in_subspace:
                mean = key_mean[mean_b, h_kv]
                if own_block_is_exact and is_own:
                    depth = width
                    load_rows(Q, b, h, query_start, query_stop, depth, mean, Q_smem, ty, tx)
                else:
                    depth = ranks[b, h_x, c]
                    Z = fusion[b, h_x, c]
                    if by_keys:
                        reduce_queries(Q, b, h, query_start, query_stop, Z, depth, mean, Q_smem, ty, tx)
                    else:
                        load_rows(sampled, b, h, query_start, query_stop, depth, mean, Q_smem, ty, tx)
            else:
                for j in range(ty * THREAD_COLUMNS + tx, width, THREADS):
                    channels_smem[j] = j
                    if is_grouped:
                        channels_smem[j] = channels[b, h_x, c, j]
                    if has_gains:
                        gains_smem[j] = gains[b, h_x, c, j]
                cuda.syncthreads()  # the maps are there
                load_queries(Q, b, h, query_start, query_stop, channels_smem, gains_smem, Q_smem, ty, tx)

            for key_start in range(block_start, block_stop, BLOCK_KV):
                if MASK:
                    shows_any = 0
                    for i in range(ROWS_PER_THREAD):
                        n = query_start + ty + i * THREAD_ROWS
                        for j in range(KEYS_PER_THREAD):
                            m = key_start + tx + j * THREAD_COLUMNS
                            if n < query_stop and m < block_stop and mask[b, h, n, m]:
                                shows_any = 1
                    if not cuda.syncthreads_or(shows_any):
                        continue

                # ---- keys [BLOCK_KV, depth] ----
                if in_subspace:
                    if own_block_is_exact and is_own:
                        load_centred_rows(K, b, h_kv, key_start, block_stop, depth, mean, KV_smem, ty, tx)
                    elif by_keys:
                        load_rows(sampled, b, h_kv, key_start, block_stop, depth, mean, KV_smem, ty, tx)
                    else:
                        reduce_keys(K, b, h_kv, key_start, block_stop, Z, depth, mean, KV_smem, ty, tx)
                else:
                    load_keys(K, b, h_kv, key_start, block_stop, channels_smem, gains_smem, KV_smem, ty, tx)
                cuda.syncthreads()  # queries and keys are there

                # ---- S = scale * Q K^T [BLOCK_Q, BLOCK_KV] ----
                for i in range(ROWS_PER_THREAD):
                    for j in range(KEYS_PER_THREAD):
                        S_rmem[i, j] = ZERO
                for r in range(depth):
                    for i in range(ROWS_PER_THREAD):
                        q = Q_smem[ty + i * THREAD_ROWS, r]
                        for j in range(KEYS_PER_THREAD):
                            S_rmem[i, j] += q * KV_smem[tx + j * THREAD_COLUMNS, r]

                # ---- scores as the softmax sees them, and this thread's share of the row maxima ----
                for i in range(ROWS_PER_THREAD):
                    row = ty + i * THREAD_ROWS
                    n = query_start + row
                    row_start = 0
                    row_stop = block_stop
                    if HAS_FIRST:
                        row_start = n + first_offset
                    if HAS_LAST:
                        row_stop = min(block_stop, n + last_offset + 1)
                        if own_block_is_exact:
                            own_begin = (n + last_offset) // key_block * key_block
                            if is_own:
                                row_start = max(row_start, own_begin)
                            else:
                                row_stop = min(block_stop, own_begin)
                    if n >= query_stop:
                        row_stop = 0
                    largest = MINUS_INFINITY
                    for j in range(KEYS_PER_THREAD):
                        score = MINUS_INFINITY
                        m = key_start + tx + j * THREAD_COLUMNS
                        is_seen = row_start <= m < row_stop
                        if MASK and is_seen:
                            is_seen = mask[b, h, n, m]
                        if is_seen:
                            score = scale * S_rmem[i, j]
                            if SOFTCAP:
                                score = softcap * math.tanh((score + mean_scores[i]) / softcap)
                            if BIAS:
                                score += accumulator(bias[b, h, n, m])
                        S_rmem[i, j] = score
                        if score > largest:
                            largest = score
                    maxima_smem[row, tx] = largest
                cuda.syncthreads()  # all maxima are there, the keys are used up

                # ---- value tile [BLOCK_KV, E] ----
                keys = min(block_stop - key_start, BLOCK_KV)
                for m in range(ty, keys, THREAD_ROWS):
                    for e in range(tx, VALUE_COLUMNS, THREAD_COLUMNS):
                        KV_smem[m, e] = accumulator(V[b, h_kv, key_start + m, e]) if e < value_width else ZERO

                # ---- running softmax: P = exp(S - row_max), and the rescaling of what was summed so far ----
                for i in range(ROWS_PER_THREAD):
                    row = ty + i * THREAD_ROWS
                    new_max = row_max[i]
                    for t in range(THREAD_COLUMNS):
                        if maxima_smem[row, t] > new_max:
                            new_max = maxima_smem[row, t]
                    # a row that has seen no key yet: -inf - 0, not -inf - -inf
                    shift = ZERO if new_max == MINUS_INFINITY else new_max
                    rescale = math.exp(row_max[i] - shift)
                    row_max[i] = new_max
                    row_sum[i] *= rescale
                    for e in range(VALUES_PER_THREAD):
                        O_rmem[i, e] *= rescale
                    for j in range(KEYS_PER_THREAD):
                        P_smem[row, tx + j * THREAD_COLUMNS] = math.exp(S_rmem[i, j] - shift)
                cuda.syncthreads()  # P and the values are there

                # ---- O += P V [BLOCK_Q, E] ----
                for m in range(keys):
                    for i in range(ROWS_PER_THREAD):
                        p = P_smem[ty + i * THREAD_ROWS, m]
                        row_sum[i] += p
                        for e in range(VALUES_PER_THREAD):
                            O_rmem[i, e] += p * KV_smem[m, tx + e * THREAD_COLUMNS]
                cuda.syncthreads()  # P, the values and, at the end of a block, its queries and maps are used up

        # ---- write rows query_start to query_stop - 1 ----
        for i in range(ROWS_PER_THREAD):
            n = query_start + ty + i * THREAD_ROWS
            if n < query_stop:
                total = row_sum[i]
                has_seen = total != ZERO
                for e in range(VALUES_PER_THREAD):
                    column = tx + e * THREAD_COLUMNS
                    if column < value_width:
                        O[b, h, n, column] = O_rmem[i, e] / total if has_seen else ZERO
                if tx == 0:
                    # a cap has them back already
                    mean_score = ZERO if SOFTCAP else mean_scores[i]
                    lse[b, h, n] = row_max[i] + math.log(total) + mean_score if has_seen else MINUS_INFINITY

    return cuda.jit(forward)
