"""Keys and values in pages on a CUDA device; planned without CuPy, as any call.

decode.cu reads pages where they lie. For all other calls their rows are copied, and are packed sequences from there on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..grouped_pages import GroupedPages
from ..problem import Layout, PagedProblem, Problem, ceil_div
from ..tiles import REBUILD_TILE, SIMT_THREADS, Defines, pack_defines, rebuild_defines
from . import KeysInPages, ScoreTables, cupy_decode
from .cupy_backend import BACKEND, _as_batch, _element, _empty, _launch, _strides, _vector
from .device_work import Placed

PLACES = (7, 8, 9, 10, 11)
"""Of the table, the lengths, and what is kept of grouped keys among the arguments of a plan, behind those of any."""


@dataclass(frozen=True, slots=True)
class PagedKeys(KeysInPages):
    """Pages of keys (P, H_kv, S, D), and which of them a sequence has; its values lie in pages of the same numbers.

    Of grouped keys, ``rows`` are the tails, always in this order of axes.
    """

    rows: Any
    pages: cupy_decode.Pages
    finished: cupy_decode.FinishedKeys | None = None

    @classmethod
    def of(cls, problem: PagedProblem, k: Any, page_table: Any, seqlens_k: Any) -> PagedKeys:
        """Return the keys of a call."""
        pages = cupy_decode.Pages(page_table, seqlens_k, problem.page_size, problem.is_top_left)
        if not isinstance(k, GroupedPages):
            return cls(k, pages)
        kept = (x.reshape(-1, *x.shape[2:]) for x in (k.sampled, k.maps))
        finished = cupy_decode.FinishedKeys(0, k.page_size, k.rank, *kept)
        return cls(k.tails, replace(pages, tail_of=k.tail_of), finished)

    def attend(self, problem: Problem, Q: Any, V: Any, O: Any, lse: Any, _tables: ScoreTables) -> None:
        """Write attention to these keys into O and lse, as `Backend.attend` does."""
        if cupy_decode.suits_pages(problem):
            cupy_decode.decode(problem, Q, self.rows, V, O, lse, self.finished, self.pages)
        else:
            self._attend_packed(problem, Q, V, O, lse)

    def _attend_packed(self, problem: Problem, Q: Any, V: Any, O: Any, lse: Any) -> None:
        """Write attention to copies of the rows of pages, packed one sequence after another."""
        ragged = PagedProblem(problem, self.pages.size, self.pages.is_top_left).packed
        edges_q, edges_k = (_empty((problem.batch + 1,), np.int32) for _ in range(2))
        V_rows = self._rows_of_pages(V, problem, edges_q, edges_k)
        if self.finished is None:
            K_rows = self._rows_of_pages(self.rows, problem, edges_q, edges_k)
        else:
            K_rows = self._rebuilt(self.finished, problem, edges_k)
        Q_rows, O_rows = (_evenly_spaced(x) for x in (Q, O))
        lse_rows = lse
        if problem.batch > 1 and problem.heads > 1:  # packed, heads come first
            lse_rows = _empty((problem.heads, problem.batch, problem.queries), lse.dtype).swapaxes(0, 1)
        if Q_rows is not Q:
            _copy_rows(Q, Q_rows)
        packed_lse = lse_rows.swapaxes(0, 1).reshape(ragged.lse_shape)[np.newaxis]
        packed = (_as_packed(Q_rows), K_rows, V_rows, _as_packed(O_rows), packed_lse)
        BACKEND.compute_ragged(ragged, edges_q, edges_k, *packed)
        if O_rows is not O:
            _copy_rows(O_rows, O)
        if lse_rows is not lse:
            _copy_rows(lse_rows[..., np.newaxis], lse[..., np.newaxis])

    def _rows_of_pages(self, rows: Any, problem: Problem, edges_q: Any, edges_k: Any) -> Any:
        """Return the rows of all sequences (1, H_kv, as many as fill all pages, width), from pages of them.

        Where each sequence begins is written into the edges (B + 1,) of queries and of keys.
        """
        _, heads, size, width = rows.shape
        packed = _as_batch(_empty((problem.batch * problem.keys, heads, width), rows.dtype))
        defines = _defines(rows, packed, paged=True)
        _launch(
            "pack_rows",
            defines,
            problem.batch * heads * max(ceil_div(problem.keys, defines["ROWS"]), 1),
            None,
            *(rows, packed, heads, problem.keys, width, *_strides(rows), *_strides(packed)[1:]),
            *(self.pages.table, self.pages.lengths, edges_q, edges_k, problem.batch, problem.queries),
            *(size.bit_length() - 1, _strides(self.pages.table)[0]),
        )
        return packed

    def _rebuilt(self, finished: cupy_decode.FinishedKeys, problem: Problem, edges_k: Any) -> Any:
        """Return the keys of all sequences as they are or, of finished pages, as they count (eq. 27), as above."""
        _, heads, size, width = self.rows.shape
        packed = _as_batch(_empty((problem.batch * problem.keys, heads, width), self.rows.dtype))
        pages = problem.keys // size
        _launch(
            "rebuild_keys",
            rebuild_defines(_element(packed), width, finished.rank, paged=True),
            problem.batch * heads * pages * ceil_div(size, REBUILD_TILE),
            SIMT_THREADS,
            *(finished.sampled, finished.maps, self.rows, packed, pages, size, heads),
            *(self.pages.table, edges_k, self.pages.tail_of, _strides(self.pages.table)[0]),
            *(_strides(x)[0] for x in (finished.sampled, finished.maps)),
            *(_strides(self.rows)[1], _strides(packed)[2]),
        )
        return packed

    def layout_of_rows(self, layout: Layout) -> Layout:
        """Return the layout of ``rows`` in a call of this layout."""
        return layout if self.finished is None else "bhnd"

    def placed(self, layout: Layout) -> PlacedPagedKeys:
        """Return all of it that a plan depends on."""
        pages, kept = self.pages, self.finished
        beside = [pages.table, pages.lengths]
        if kept is not None:
            beside += [kept.sampled, kept.maps, pages.tail_of]
        rows = Placed.of(self.rows, self.layout_of_rows(layout))
        rank = None if kept is None else kept.rank
        return PlacedPagedKeys(rows, tuple(Placed.of(x, "bhnd") for x in beside), pages.size, rank, pages.is_top_left)

    def brought_in(self, bring_in: Callable[[Any, Layout], Any], layout: Layout) -> PagedKeys:
        """Return the same with its arrays on the device, ``rows`` in native order."""
        table, lengths = (bring_in(x, "bhnd") for x in (self.pages.table, self.pages.lengths))
        rows = bring_in(self.rows, self.layout_of_rows(layout))
        return replace(self, rows=rows, pages=replace(self.pages, table=table, lengths=lengths))


@dataclass(frozen=True, slots=True)
class PlacedPagedKeys:
    """`PagedKeys` as a plan has them, in the place of `Placed` keys."""

    rows: Placed
    beside: tuple[Placed, ...]
    """Table and lengths; of grouped keys what is kept of finished pages, and ``tail_of``."""
    page_size: int
    rank: int | None
    is_top_left: bool

    def planned(self, place: int) -> PagedKeys:
        """Return them as the argument of a plan that comes at this place."""
        table, lengths, *kept = (x.planned(y) for x, y in zip(self.beside, PLACES, strict=False))
        pages = cupy_decode.Pages(table, lengths, self.page_size, self.is_top_left)
        if self.rank is None:
            return PagedKeys(self.rows.planned(place), pages)
        finished = cupy_decode.FinishedKeys(0, self.page_size, self.rank, *kept[:2])
        return PagedKeys(self.rows.planned(place), replace(pages, tail_of=kept[2]), finished)


def _evenly_spaced(array: Any) -> Any:
    """Return an array (B, H, N, width), or memory for one, whose rows are equally far apart over the whole batch."""
    batch, heads, rows, width = array.shape
    step_b, _, step_n, _ = array.strides
    if batch == 1 or rows == 1 or step_b == rows * step_n:
        return array
    return _empty((batch, rows, heads, width), array.dtype).swapaxes(1, 2)


def _as_packed(array: Any) -> Any:
    """Return a view of evenly spaced rows (B, H, N, width) as (1, H, B * N, width)."""
    batch, heads, rows, width = array.shape
    return _as_batch(array.swapaxes(1, 2).reshape(batch * rows, heads, width))


def _copy_rows(source: Any, target: Any) -> None:
    """Copy an array (B, H, N, width) into another."""
    batch, heads, rows, width = source.shape
    defines = _defines(source, target, paged=False)
    _launch(
        "pack_rows",
        defines,
        batch * heads * ceil_div(rows, defines["ROWS"]),
        None,
        *(source, target, heads, rows, width, *_strides(source), *_strides(target)[1:], _strides(target)[0]),
    )


def _defines(source: Any, target: Any, *, paged: bool) -> Defines:
    """Return the -D options of a copy."""
    vector = min(_vector(source), _vector(target))
    return pack_defines(_element(source), source.shape[3], vector, paged=paged)
