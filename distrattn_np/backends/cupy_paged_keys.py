"""Keys and values in pages on a CUDA device; planned without CuPy, as any call."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ..problem import Layout, Problem
from . import ScoreTables, cupy_decode
from .device_work import Placed

PLACES = (7, 8)
"""Of the table and the lengths among the arguments of a plan, behind those of a call to plain keys."""


@dataclass(frozen=True, slots=True)
class PagedKeys:
    """Pages of keys (P, H_kv, S, D), and which of them a sequence has; its values lie in pages of the same numbers."""

    rows: Any
    pages: cupy_decode.Pages

    def attend(self, problem: Problem, Q: Any, V: Any, O: Any, lse: Any, _tables: ScoreTables) -> None:
        """Write attention to these keys into O and lse, as `Backend.attend` does."""
        cupy_decode.decode(problem, Q, self.rows, V, O, lse, pages=self.pages)

    def placed(self, layout: Layout) -> PlacedPagedKeys:
        """Return all of it that a plan depends on; ``rows`` are in this layout."""
        table, lengths = (Placed.of(x, "bhnd") for x in (self.pages.table, self.pages.lengths))
        return PlacedPagedKeys(Placed.of(self.rows, layout), table, lengths, self.pages.size, self.pages.is_top_left)

    def brought_in(self, rows: Any, table: Any, lengths: Any) -> PagedKeys:
        """Return the same with its arrays on the device, ``rows`` in native order."""
        return PagedKeys(rows, replace(self.pages, table=table, lengths=lengths))


@dataclass(frozen=True, slots=True)
class PlacedPagedKeys:
    """`PagedKeys` as a plan has them, in the place of `Placed` keys."""

    rows: Placed
    table: Placed
    lengths: Placed
    page_size: int
    is_top_left: bool

    def planned(self, place: int) -> PagedKeys:
        """Return them as the argument of a plan that comes at this place."""
        table, lengths = (x.planned(y) for x, y in zip((self.table, self.lengths), PLACES, strict=True))
        return PagedKeys(self.rows.planned(place), cupy_decode.Pages(table, lengths, self.page_size, self.is_top_left))
