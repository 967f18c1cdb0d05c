"""Keys and values in pages on a CUDA device; planned without CuPy, as any call."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ..grouped_pages import GroupedPages
from ..problem import Layout, PagedProblem, Problem
from . import ScoreTables, cupy_decode
from .device_work import Placed

PLACES = (7, 8, 9, 10, 11)
"""Of the table, the lengths, and what is kept of grouped keys among the arguments of a plan, behind those of any."""


@dataclass(frozen=True, slots=True)
class PagedKeys:
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
        cupy_decode.decode(problem, Q, self.rows, V, O, lse, self.finished, self.pages)

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

    def brought_in(self, rows: Any, table: Any, lengths: Any) -> PagedKeys:
        """Return the same with its arrays on the device, ``rows`` in native order."""
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
