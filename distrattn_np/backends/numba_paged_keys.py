"""Keys and values in pages for Numba CUDA: their rows are copied, and are packed sequences from there on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..arrays import sum_type
from ..grouped_pages import GroupedPages
from ..numba_kernels.pack_rows import make_pack_rows
from ..problem import Layout, PagedProblem, Problem, ceil_div
from . import KeysInPages, ScoreTables
from .numba_backend import BACKEND, THREADS
from .numba_device import as_batch, empty, launch, swap_rows_and_heads, view, with_batch_axis
from .numba_grouped_keys import OnNumba, rebuild_keys


@dataclass(frozen=True, slots=True)
class PagedKeys(KeysInPages):
    """Pages of keys (P, H_kv, S, D), and which of them a sequence has; its values lie in pages of the same numbers.

    Of grouped keys, ``rows`` are the tails, always in this order of axes.
    """

    rows: Any
    page_table: Any
    lengths: Any
    is_top_left: bool
    finished: GroupedPages | None = None

    @classmethod
    def of(cls, k: Any, page_table: Any, lengths: Any, is_top_left: bool) -> PagedKeys:
        """Return the keys of a call."""
        are_grouped = isinstance(k, GroupedPages)
        return cls(k.tails if are_grouped else k, page_table, lengths, is_top_left, k if are_grouped else None)

    def brought_in(self, bring_in: Callable[[Any, Layout], Any], layout: Layout) -> PagedKeys:
        """Return the same with native arrays."""
        table, lengths = (bring_in(x, "bhnd") for x in (self.page_table, self.lengths))
        rows = bring_in(self.rows, layout if self.finished is None else "bhnd")
        return replace(self, rows=rows, page_table=table, lengths=lengths)

    def attend(self, problem: Problem, Q: Any, V: Any, O: Any, lse: Any, _tables: ScoreTables) -> None:
        """Write attention to these keys into O and lse, as `Backend.attend` does."""
        ragged = PagedProblem(problem, self.rows.shape[2], self.is_top_left).packed
        edges = [empty((problem.batch + 1,), np.int32, Q) for _ in range(2)]
        V_packed = self._rows_of_pages(V, problem, edges, Q)
        if self.finished is None:
            K_packed = self._rows_of_pages(self.rows, problem, edges, Q)
        else:
            K_packed = self._rebuilt(self.finished, problem, edges[1], Q)
        Q_rows, O_rows = (empty((x.shape[0], x.shape[2], x.shape[1], x.shape[3]), x.dtype, Q) for x in (Q, O))
        lse_rows = empty((problem.heads, problem.batch, problem.queries), lse.dtype, Q)
        of_head, of_sequence, of_query = lse_rows.strides

        OnNumba._put(swap_rows_and_heads(Q_rows), Q)
        lse_packed = with_batch_axis(view(lse_rows, ragged.lse_shape, (of_head, of_query)))
        packed = (_as_packed(Q_rows), K_packed, V_packed, _as_packed(O_rows), lse_packed)
        BACKEND.compute_ragged(ragged, edges[0], edges[1], *packed)
        # a copy goes to the stream of its target
        OnNumba._put(O.bind(Q.stream), swap_rows_and_heads(O_rows))
        OnNumba._put(lse.bind(Q.stream), view(lse_rows, problem.lse_shape, (of_sequence, of_head, of_query)))

    def _rows_of_pages(self, rows: Any, problem: Problem, edges: list[Any], like: Any) -> Any:
        """Return the rows of all sequences (1, H_kv, as many as fill all pages, width), on the stream of ``like``.

        Where each sequence begins is written into ``edges``, of queries and of keys.
        """
        _, heads, _, width = rows.shape
        packed = as_batch(empty((problem.batch * problem.keys, heads, width), rows.dtype, like))
        threads = THREADS.reduction_columns, THREADS.reduction_rows
        kernel = make_pack_rows(sum_type(rows.dtype), *reversed(threads))
        grid = problem.batch * heads * max(ceil_div(problem.keys, THREADS.reduction_rows), 1)
        launch(kernel, grid, threads, packed, rows, self.page_table, self.lengths, *edges, problem.queries)
        return packed

    def _rebuilt(self, finished: GroupedPages, problem: Problem, edges_k: Any, like: Any) -> Any:
        """Return the keys of all sequences as they are or, of finished pages, as they count (eq. 27), as above."""
        _, heads, _, width = self.rows.shape
        packed = as_batch(empty((problem.batch * problem.keys, heads, width), self.rows.dtype, like))
        sampled, maps = (with_batch_axis(_heads_first(x)) for x in (finished.sampled, finished.maps))
        rebuild_keys(packed, sampled, maps, self.rows, of_pages=(self.page_table, edges_k, finished.tail_of))
        return packed


def _heads_first(pool: Any) -> Any:
    """Return a view of (P, H_kv, ...) as (H_kv, P, ...)."""
    (pages, heads, *shape), (of_page, of_head, *strides) = pool.shape, pool.strides
    return view(pool, (heads, pages, *shape), (of_head, of_page, *strides))


def _as_packed(rows: Any) -> Any:
    """Return a view of rows (B, N, H, width), one sequence after another, as (1, H, B * N, width)."""
    batch, count, heads, width = rows.shape
    return as_batch(view(rows, (batch * count, heads, width), rows.strides[1:]))
