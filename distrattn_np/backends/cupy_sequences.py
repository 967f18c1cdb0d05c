"""Packed sequences on a device: the pieces that kernels work on, cut there, without the host knowing a length.

raw_kernels/sequences.cuh says what a piece is.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..problem import GroupBy, RaggedProblem, ceil_div
from ..tiles import cut_defines

PIECE_NUMBERS = 8
"""32-bit integers of a piece."""


class Sequences:
    """The sequences of one call. Each way to cut them is launched once, when it is first asked for."""

    def __init__(self, problem: RaggedProblem, edges_q: Any, edges_k: Any) -> None:
        """Take the edges (B + 1,) of both sides, on the device."""
        self.problem = problem
        self._edges = {"queries": edges_q, "keys": edges_k}
        self._rows = {"queries": problem.packed.queries, "keys": problem.packed.keys}
        self._cut: dict[tuple[GroupBy, int, int], Any] = {}

    @property
    def count(self) -> int:
        """Number of sequences B."""
        return self.problem.sequences

    @property
    def average_queries(self) -> int:
        """Queries of a sequence, on average."""
        return self._rows["queries"] // max(self.count, 1)

    def blocks(self, side: GroupBy, step: int) -> Any:
        """Return the pieces of ``step`` rows, where nothing is asked of pieces of the other side."""
        return self.pieces(side, step, step)

    def pieces(self, side: GroupBy, step: int, other_step: int) -> Any:
        """Return the pieces (`most_pieces`, PIECE_NUMBERS) int32; ``other_step``: how the other side is cut."""
        from .cupy_backend import _empty, _launch

        key = side, step, other_step
        if key not in self._cut:
            other: GroupBy = "keys" if side == "queries" else "queries"
            sign = 0 if self.problem.is_top_left else 1 if side == "queries" else -1
            pieces = _empty((self.problem.most_pieces(side, step), PIECE_NUMBERS), np.int32)
            defines = cut_defines(self._edges[side].dtype.itemsize)
            _launch(
                "cut_sequences",
                defines,
                ceil_div(len(pieces), defines["THREADS"]),
                None,
                *(self._edges[side], self._edges[other], pieces, len(pieces), self.count),
                *(self._rows[side], self._rows[other], step, other_step, sign),
            )
            self._cut[key] = pieces
        return self._cut[key]
