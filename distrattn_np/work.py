"""What one call costs: floating-point operations and bytes, counted from the problem alone (docs/math.md)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .problem import Problem, Subspace, block_edges
from .reference import HASH_BITS
from .reference.distr_attention import rows_that_meet
from .reference.grouped_keys import finished_blocks


@dataclass(frozen=True, slots=True)
class Work:
    """Counts of one call; a multiply-add is two FLOP."""

    pairs: int
    """Visible (query, key) pairs over all heads."""
    exact_flop: int
    """FLOP of exact attention on the same shape, ``2 pairs (D + E)``: divided by a time it compares methods."""
    executed_flop: int
    """FLOP of the two products as computed, ``2 pairs (R + E)`` (D + E in own blocks), and of hashing and fusion."""
    minimum_bytes: int
    """q, k and v read once, the result written once; for grouped keys what is kept of them."""


def work_of(problem: Problem) -> Work:
    """Return what ``problem`` costs. Exponentials, sorting, and masked parts of a kernel's tiles are not counted."""
    D, E, R = problem.width, problem.value_width, problem.rank
    pairs = problem.batch * problem.heads * visible_pairs(problem.queries, problem.keys, problem.causal_offset)
    return Work(
        pairs=pairs,
        exact_flop=2 * pairs * (D + E),
        executed_flop=2 * pairs * (R + E)
        + 2 * own_pairs(problem) * (D - R)
        + grouping_flop(problem)
        + fusion_flop(problem),
        minimum_bytes=_elements(problem) * np.dtype(problem.dtype).itemsize,
    )


def work_of_cache(problem: Problem) -> Work:
    """Return what a call costs whose keys were grouped before: all blocks but the last have their maps (eq. 26, 27)."""
    if not isinstance(problem.grouping, Subspace):
        return work_of(problem)
    D, E, R, L = problem.width, problem.value_width, problem.rank, problem.grouping.block_size
    blocks = finished_blocks(problem.keys, L)
    heads, kv_heads = problem.batch * problem.heads, problem.batch * problem.kv_heads
    pairs, through_maps = (
        heads * visible_pairs(problem.queries, keys, problem.causal_offset) for keys in (problem.keys, blocks * L)
    )
    fused = 2 * heads * problem.queries * blocks * D * (R + 1)
    kept = blocks * (L * R + (R + 1) * D) + (problem.keys - blocks * L) * D
    elements = heads * problem.queries * (D + E) + kv_heads * (kept + problem.keys * E)
    return Work(
        pairs=pairs,
        exact_flop=2 * pairs * (D + E),
        executed_flop=2 * through_maps * (R + E) + 2 * (pairs - through_maps) * (D + E) + fused,
        minimum_bytes=elements * np.dtype(problem.dtype).itemsize,
    )


def visible_pairs(N: int, M: int, causal_offset: int | None) -> int:
    """Return how many pairs of eq. 3 one head has: the sum over n of ``n + causal_offset + 1``, kept within 0 and M."""
    if causal_offset is None:
        return N * M

    def keys_up_to(last: int) -> int:  # sum of min(count, M) over count = 1 ... last
        growing = min(max(last, 0), M)
        return growing * (growing + 1) // 2 + max(last - M, 0) * M

    return keys_up_to(N + causal_offset) - keys_up_to(causal_offset)


def own_pairs(problem: Problem) -> int:
    """Return the visible pairs over all heads whose scores are exact while others are not (eq. 20)."""
    if not problem.own_block_is_exact or problem.grouping is None:
        return 0
    pairs = visible_pairs(problem.queries, problem.keys, problem.causal_offset)
    for start, stop in block_edges(problem.keys, problem.grouping.block_size):
        first, last = rows_that_meet(
            start, stop, group_by="keys", N=problem.queries, M=problem.keys, causal_offset=problem.meeting_offset
        )
        pairs -= (stop - start) * (last - first)  # who meets a block through its maps sees all of it
    return problem.batch * problem.heads * pairs


def grouping_flop(problem: Problem) -> int:
    """Return the FLOP of the maps: hash, lengths and gains (eq. 5, 9), or Gram matrices and solves (eq. 11 to 17)."""
    grouping = problem.grouping
    if grouping is None:
        return 0
    D, R = problem.width, problem.rank
    x_rows = problem.batch * problem.grouped_heads * problem.grouped_rows
    if grouping.by == "queries":
        y_rows = problem.batch * problem.kv_heads * problem.keys
    else:
        y_rows = problem.batch * problem.heads * problem.queries
    if isinstance(grouping, Subspace):
        # a half-step: A W, W^T (A W), the factor, two triangular solves
        half_step = 2 * D * R * (D + R) + R**3 // 3 + 2 * D * R**2
        blocks = problem.batch * problem.grouped_heads * problem.blocks
        # a Gram matrix is symmetric: one half and the diagonal
        return D * (D + 1) * (x_rows + y_rows) + blocks * (1 + 2 * grouping.refine) * half_step
    flop = 2 * x_rows * D * HASH_BITS
    if grouping.fusion == "lstsq":
        flop += 2 * D * (x_rows + y_rows) + 2 * (D - R) * x_rows
    return flop


def fusion_flop(problem: Problem) -> int:
    """Return the FLOP of Y Z (eq. 8): every row of the other side once per block and query head that meets it."""
    grouping = problem.grouping
    if grouping is None:
        return 0
    fused_rows = 0
    for start, stop in block_edges(problem.grouped_rows, grouping.block_size):
        first, last = rows_that_meet(
            start,
            stop,
            group_by=grouping.by,
            N=problem.queries,
            M=problem.keys,
            causal_offset=problem.meeting_offset,
        )
        fused_rows += last - first
    if isinstance(grouping, Subspace):
        x_rows = problem.batch * problem.grouped_heads * problem.grouped_rows
        return 2 * problem.width * problem.rank * (problem.batch * problem.heads * fused_rows + x_rows)
    per_row = (problem.width - problem.rank) * (2 if grouping.fusion == "lstsq" else 1)
    return problem.batch * problem.heads * fused_rows * per_row


def _elements(problem: Problem) -> int:
    row = problem.width + problem.value_width
    return problem.batch * row * (problem.heads * problem.queries + problem.kv_heads * problem.keys)
