"""Is a result right? The definition in float64, on a few rows of two heads of the very inputs that are timed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np

from .. import reference
from ..backends import Backend
from ..grouped_keys import GroupedKeys, KeyBlock
from ..problem import Grouping, GroupMaps, Problem, Subspace, SubspaceMaps, block_edges
from ..reference.distr_attention import rows_that_meet
from .device import to_host

Rows = np.ndarray[Any, np.dtype[np.float64]]

TOLERANCE = {"float16": 4e-3, "bfloat16": 3e-2, "float32": 1e-5, "float64": 1e-12}
"""Largest error of a checked row, relative to its length: 4 units in the last place of the 16-bit types."""
WINDOW = 64
ROWS_PER_WINDOW = 8
DIFFERING_BLOCKS = 0.1
"""Share of blocks whose groups may differ from the reference's: a hash sum within rounding of zero falls either way."""
SCORE_TOLERANCE = {"float16": 1e-2, "bfloat16": 2e-2, "float32": 1e-2, "float64": 1e-5}
"""How far the score error of a block's maps may be from the reference's, relative to the scores.

It is the root of a difference of squares, of sums that are float32 for all but float64. Unrefined maps are further off.
"""


class WrongResult(Exception):  # noqa: N818
    """The result of a contender is not what it should be; no time is reported for it."""


class Oracle:
    """Expected rows of one problem size on its inputs."""

    def __init__(self, problem: Problem, q: Any, k: Any, v: Any) -> None:
        B, H = problem.batch, problem.heads
        self.heads = sorted({(0, 0), (B - 1, H - 1)})
        self.rows = _sample_rows(problem.queries)
        self._problem = problem
        self._q, self._k = q, k
        self._arrays = []
        for b, h in self.heads:
            h_kv = h // problem.heads_per_kv_head
            self._arrays.append((to_host(q[b, h])[self.rows], to_host(k[b, h_kv]), to_host(v[b, h_kv])))
        self.exact = self._attend([Q @ K.T for Q, K, _ in self._arrays])

    def expected(self, backend: Backend, problem: Problem, Q: Any, K: Any) -> Rows:
        """Return what ``backend`` should give: the definition with the maps that it makes, once these are checked.

        ``problem`` differs from the oracle's own in its grouping alone; Q and K are the inputs as the backend's arrays.
        """
        if problem.grouping is None:
            return self.exact
        match problem.grouping, backend.group_maps(problem, Q, K):
            case Grouping() as lsh, GroupMaps() as groups:
                return self._attend(self._lsh_scores(problem, lsh, groups))
            case Subspace() as subspace, SubspaceMaps() as maps:
                return self._attend(self._subspace_scores(problem, subspace, maps))
            case _, other:
                raise WrongResult(f"the maps are {type(other).__name__}, not those of the method")

    def expected_of_cache(self, problem: Problem, keys: GroupedKeys) -> Rows:
        """Return what a call to grouped keys should give: the definition with their blocks, once these are checked."""
        if not isinstance(problem.grouping, Subspace) or problem.rank == problem.width:
            return self.exact
        self._check_cache(problem, problem.grouping, keys)
        scores = []
        for (b, h), (Q, K, _) in zip(self.heads, self._arrays, strict=True):
            h_kv = h // problem.heads_per_kv_head
            scores.append(
                Q @ np.concatenate([*map(partial(rebuilt, b=b, h=h_kv), keys.blocks), K[keys.exact_from :]]).T
            )
        return self._attend(scores)

    def rows_of(self, out: Any) -> Rows:
        """Return the checked rows of a result (B, H, N, E)."""
        return np.stack([to_host(out[b, h])[self.rows] for b, h in self.heads])

    def check(self, actual: Rows, expected: Rows) -> float:
        """Return the largest relative error of a row; WrongResult where it is above the tolerance of the dtype."""
        distance = np.linalg.norm(actual - expected, axis=-1)
        length = np.linalg.norm(expected, axis=-1)
        error = float(np.max(distance / np.where(length > 0, length, 1)))
        tolerance = TOLERANCE[np.dtype(self._problem.dtype).name]
        if not error <= tolerance:  # a NaN is wrong too
            raise WrongResult(f"a row is off by {error:.1e} of its length, at most {tolerance:.0e} is rounding")
        return error

    def error_to_exact(self, actual: Rows) -> float:
        """Return ``||actual - exact|| / ||exact||`` over the checked rows."""
        return float(np.linalg.norm(actual - self.exact) / np.linalg.norm(self.exact))

    def _lsh_scores(self, problem: Problem, grouping: Grouping, maps: GroupMaps) -> list[Rows]:
        """Return the approximate scores of the checked rows of every checked head."""
        channels = to_host(maps.channels).astype(np.intp)
        gains = None if maps.gains is None else to_host(maps.gains)
        self._check_groups(problem, grouping, channels, gains)
        result = []
        for (b, h), (Q, K, _) in zip(self.heads, self._arrays, strict=True):
            h_x = h if grouping.by == "queries" else h // problem.heads_per_kv_head
            parts = [
                reference.fused_scores(
                    Q[rows],
                    K,
                    channels[b, h_x, blocks],
                    None if gains is None else gains[b, h_x, blocks],
                    group_size=grouping.group_size,
                    block_size=block_size,
                    group_by=grouping.by,
                )
                for rows, blocks, block_size in self._parts(grouping)
            ]
            result.append(np.concatenate(parts))
        return result

    def _subspace_scores(self, problem: Problem, grouping: Subspace, maps: SubspaceMaps) -> list[Rows]:
        """Return the approximate scores of the checked rows of every checked head, as centred keys give them."""
        self._check_subspaces(problem, grouping, maps)
        exact_from = None
        if problem.own_block_is_exact and problem.causal_offset is not None:
            exact_from = reference.own_block_begin(
                self.rows, block_size=grouping.block_size, causal_offset=problem.causal_offset
            )
        result = []
        for (b, h), (Q, K, _) in zip(self.heads, self._arrays, strict=True):
            h_kv = h // problem.heads_per_kv_head
            h_x = h if grouping.by == "queries" else h_kv
            W, Z, mean = (to_host(x) for x in (maps.sampling[b, h_x], maps.fusion[b, h_x], maps.key_mean[b, h_kv]))
            parts = [
                reference.subspace_scores(
                    Q[rows],
                    K - mean,
                    W[blocks],
                    Z[blocks],
                    block_size=block_size,
                    group_by=grouping.by,
                    exact_from=None if exact_from is None else exact_from[rows],
                )
                for rows, blocks, block_size in self._parts(grouping)
            ]
            result.append(np.concatenate(parts))
        return result

    def _parts(self, grouping: Grouping | Subspace) -> Iterator[tuple[slice, slice, int]]:
        """Yield which checked rows go together, the blocks whose maps they use, and how many rows a block has there."""
        if grouping.by == "keys":
            yield slice(None), slice(None), grouping.block_size
            return
        blocks, starts, counts = np.unique(self.rows // grouping.block_size, return_index=True, return_counts=True)
        for c, start, count in zip(blocks.tolist(), starts.tolist(), counts.tolist(), strict=True):
            yield slice(start, start + count), slice(c, c + 1), count

    def _attend(self, scores: Sequence[Rows]) -> Rows:
        """Return softmax(scale S) V of the checked rows (heads, rows, E)."""
        offset = self._problem.causal_offset
        seen = True if offset is None else np.arange(self._problem.keys) <= self.rows[:, np.newaxis] + offset
        result = []
        for S, (_, _, V) in zip(scores, self._arrays, strict=True):
            O, _ = reference.softmax_attention(np.where(seen, self._problem.scale * S, -np.inf), V)
            result.append(O)
        return np.stack(result)

    def _check_groups(self, problem: Problem, grouping: Grouping, channels: Any, gains: Any) -> None:
        """Compare the maps of the first head with the reference's."""
        q, k = self._first_head(problem, grouping)
        expected_channels, expected_gains = reference.group_maps(
            q[np.newaxis], k[np.newaxis, np.newaxis], **problem.map_options
        )
        equal = (channels[0, 0] == expected_channels[0, 0]).all(axis=-1)
        if gains is not None and expected_gains is not None:
            equal &= np.isclose(gains[0, 0], expected_gains[0, 0], rtol=1e-2, atol=1e-3).all(axis=-1)
        if np.count_nonzero(~equal) > DIFFERING_BLOCKS * len(equal):
            raise WrongResult(
                f"the maps of {np.count_nonzero(~equal)} of {len(equal)} blocks differ from the reference"
            )

    def _check_subspaces(self, problem: Problem, grouping: Subspace, maps: SubspaceMaps) -> None:
        """Check all ranks, and that two blocks of the first head lose as much as through the reference's maps.

        Errors are compared, not maps: only the product of W and Z counts, and rounding may choose another basis.
        """
        if not (to_host(maps.ranks) == problem.rank).all():
            raise WrongResult(f"the ranks are not all {problem.rank}")
        q, k = self._first_head(problem, grouping)
        k -= k.mean(axis=0)
        blocks = [rows_of_block(q, k, problem, grouping, c) for c in range(problem.blocks)]
        met = [c for c, (_, Y) in enumerate(blocks) if Y.size]
        for c in sorted({*met[:1], *met[-1:]}):
            X, Y = blocks[c][0], blocks[c][1].reshape(-1, problem.width)
            A, B = reference.gram(X), reference.gram(Y)
            per_score = abs(problem.scale) / np.sqrt(len(X) * len(Y))
            *_, expected = reference.subspace_maps(
                A,
                B,
                x_rows=np.array(len(X)),
                y_rows=np.array(len(Y)),
                scale=problem.scale,
                rank=problem.rank,
                score_tol=None,
                refine=grouping.refine,
            )
            W, Z = to_host(maps.sampling[0, 0, c]), to_host(maps.fusion[0, 0, c])
            errors = {
                "predicted": to_host(maps.score_errors)[0, 0, c],
                "actual": per_score * reference.score_errors(W, Z, A, B)[-1],
            }
            tolerance = SCORE_TOLERANCE[np.dtype(problem.dtype).name] * per_score * np.sqrt((A * B).sum())
            for name, error in errors.items():
                if not abs(error - expected) <= tolerance:  # a NaN is wrong too
                    rule = f"the reference's is {expected:.3g}"
                    raise WrongResult(f"the {name} score error of block {c} is {error:.3g}, {rule}")

    def _check_cache(self, problem: Problem, grouping: Subspace, keys: GroupedKeys) -> None:
        """Check all ranks, and that two blocks of the first head lose as much as the reference's do."""
        if not (to_host(keys.ranks) == problem.rank).all():
            raise WrongResult(f"the ranks are not all {problem.rank}")
        L, blocks = grouping.block_size, keys.blocks
        if len(blocks) != reference.finished_blocks(problem.keys, L):
            raise WrongResult(f"{len(blocks)} blocks are finished")
        k = to_host(self._k[0, 0])
        for c in sorted({0, len(blocks) - 1} & set(range(len(blocks)))):
            X = k[c * L : (c + 1) * L]
            mean = X.mean(axis=0)
            W, Z, _, errors = reference.group_block(
                X[np.newaxis, np.newaxis],
                mean[np.newaxis, np.newaxis],
                None,
                0,
                scale=problem.scale,
                rank=problem.rank,
                score_tol=None,
                refine=grouping.refine,
            )
            S = problem.scale * X @ X.T
            losses = [
                float(np.sqrt(np.square(problem.scale * X @ K.T - S).mean()))
                for K in (rebuilt(blocks[c], 0, 0), mean + ((X - mean) @ W[0, 0]) @ Z[0, 0].T)
            ]
            tolerance = SCORE_TOLERANCE[np.dtype(problem.dtype).name] * float(np.sqrt(np.square(S).mean()))
            predicted = float(to_host(blocks[c].score_errors)[0, 0])
            for name, error, wanted in (("predicted", predicted, errors[0, 0]), ("actual", losses[0], losses[1])):
                if not abs(error - wanted) <= tolerance:  # a NaN is wrong too
                    rule = f"the reference's is {wanted:.3g}"
                    raise WrongResult(f"the {name} score error of block {c} is {error:.3g}, {rule}")

    def _first_head(self, problem: Problem, grouping: Grouping | Subspace) -> tuple[Rows, Rows]:
        """Return the queries (heads, N, D) and the keys (M, D) that the maps of the first head come from."""
        shared = problem.heads_per_kv_head if grouping.by == "keys" else 1
        return np.stack([to_host(self._q[0, h]) for h in range(shared)]), to_host(self._k[0, 0])


def rebuilt(block: KeyBlock, b: int, h: int) -> Rows:
    """Return the keys (L, D) that a block of a head stands for (eq. 27)."""
    sampled, fusion, mean = (to_host(x[b, h]) for x in (block.sampled, block.fusion, block.mean))
    keys: Rows = mean + sampled @ fusion.T
    return keys


def rows_of_block(q: Rows, k: Rows, problem: Problem, grouping: Grouping | Subspace, c: int) -> tuple[Rows, Rows]:
    """Return views X (rows, D) and Y (heads, rows, D), block c and what meets it through its maps (eq. 11).

    They are rows of the queries q (heads, N, D) and the centred keys k (M, D) that the maps of one head come from.
    """
    start, stop = block_edges(problem.grouped_rows, grouping.block_size)[c]
    first, last = rows_that_meet(
        start, stop, group_by=grouping.by, N=problem.queries, M=problem.keys, causal_offset=problem.meeting_offset
    )
    if grouping.by == "keys":
        return k[start:stop], q[:, first:last]
    return q[0, start:stop], k[np.newaxis, first:last]


def _sample_rows(count: int) -> np.ndarray[Any, np.dtype[np.intp]]:
    """Return rows from the start, the middle and the end, the first and the last among them."""
    rng = np.random.default_rng(0)
    width = min(WINDOW, count)
    starts = (0, (count - width) // 2, count - width)
    picked = [start + rng.choice(width, min(ROWS_PER_WINDOW, width), replace=False) for start in starts]
    return np.unique(np.concatenate([*picked, [0, count - 1]])).astype(np.intp)
