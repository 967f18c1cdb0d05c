"""Is a result right? The definition in float64, on a few rows of two heads of the very inputs that are timed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .. import reference
from ..backends import Backend
from ..problem import Grouping, GroupMaps, Problem
from .device import to_host

Rows = np.ndarray[Any, np.dtype[np.float64]]

TOLERANCE = {"float16": 4e-3, "bfloat16": 3e-2, "float32": 1e-5, "float64": 1e-12}
"""Largest error of a checked row, relative to its length: 4 units in the last place of the 16-bit types."""
WINDOW = 64
ROWS_PER_WINDOW = 8
DIFFERING_BLOCKS = 0.1
"""Share of blocks whose groups may differ from the reference's: a hash sum within rounding of zero falls either way."""


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
        grouping = problem.grouping
        maps = backend.group_maps(problem, Q, K)
        if not isinstance(grouping, Grouping) or not isinstance(maps, GroupMaps):  # the axes know exact and lsh alone
            return self.exact
        channels = to_host(maps.channels).astype(np.intp)
        gains = None if maps.gains is None else to_host(maps.gains)
        self._check_maps(problem, grouping, channels, gains)
        scores = []
        for (b, h), (Q_rows, K_head, _) in zip(self.heads, self._arrays, strict=True):
            h_x = h if grouping.by == "queries" else h // problem.heads_per_kv_head
            scores.append(
                self._scores(grouping, Q_rows, K_head, channels[b, h_x], gains if gains is None else gains[b, h_x])
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

    def _scores(self, grouping: Grouping, Q_rows: Rows, K: Rows, channels: Any, gains: Any) -> Rows:
        """Return the approximate scores of the checked rows of one head; channels and gains are (C, D)."""
        sizes: dict[str, Any] = {"group_size": grouping.group_size, "group_by": grouping.by}
        if grouping.by == "keys":
            return reference.fused_scores(Q_rows, K, channels, gains, block_size=grouping.block_size, **sizes)
        scores = np.empty((len(Q_rows), len(K)))
        block_of_row = self.rows // grouping.block_size
        for c in np.unique(block_of_row):
            mine = block_of_row == c
            gain = None if gains is None else gains[c : c + 1]
            scores[mine] = reference.fused_scores(
                Q_rows[mine], K, channels[c : c + 1], gain, block_size=int(mine.sum()), **sizes
            )
        return scores

    def _attend(self, scores: Sequence[Rows]) -> Rows:
        """Return softmax(scale S) V of the checked rows (heads, rows, E)."""
        offset = self._problem.causal_offset
        seen = True if offset is None else np.arange(self._problem.keys) <= self.rows[:, np.newaxis] + offset
        result = []
        for S, (_, _, V) in zip(scores, self._arrays, strict=True):
            O, _ = reference.softmax_attention(np.where(seen, self._problem.scale * S, -np.inf), V)
            result.append(O)
        return np.stack(result)

    def _check_maps(self, problem: Problem, grouping: Grouping, channels: Any, gains: Any) -> None:
        """Compare the maps of the first head with the reference's."""
        shared = problem.heads_per_kv_head if grouping.by == "keys" else 1
        q = np.stack([to_host(self._q[0, h]) for h in range(shared)])
        expected_channels, expected_gains = reference.group_maps(
            q[np.newaxis],
            to_host(self._k[0, 0])[np.newaxis, np.newaxis],
            group_size=grouping.group_size,
            block_size=grouping.block_size,
            group_by=grouping.by,
            fusion=grouping.fusion,
            seed=grouping.seed,
            causal_offset=problem.causal_offset,
        )
        equal = (channels[0, 0] == expected_channels[0, 0]).all(axis=-1)
        if gains is not None and expected_gains is not None:
            equal &= np.isclose(gains[0, 0], expected_gains[0, 0], rtol=1e-2, atol=1e-3).all(axis=-1)
        if np.count_nonzero(~equal) > DIFFERING_BLOCKS * len(equal):
            raise WrongResult(
                f"the maps of {np.count_nonzero(~equal)} of {len(equal)} blocks differ from the reference"
            )


def _sample_rows(count: int) -> np.ndarray[Any, np.dtype[np.intp]]:
    """Return rows from the start, the middle and the end, the first and the last among them."""
    rng = np.random.default_rng(0)
    width = min(WINDOW, count)
    starts = (0, (count - width) // 2, count - width)
    picked = [start + rng.choice(width, min(ROWS_PER_WINDOW, width), replace=False) for start in starts]
    return np.unique(np.concatenate([*picked, [0, count - 1]])).astype(np.intp)
