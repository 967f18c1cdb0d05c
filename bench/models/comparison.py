"""Which peers the package's methods are nearer to exact attention than, at equal or fewer FLOP: from measured rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

OWN = ("lsh", "subspace", "window")
"""Methods of this package; exact attention of all keys is neither one of them nor a peer."""

Row = dict[str, Any]


def split(rows: Sequence[Row]) -> tuple[Row, list[Row], list[Row]]:
    """Return exact attention's row of a task, the own rows and those of the peers, as far as they were measured."""
    measured = [row for row in rows if row["status"] == "ok"]
    exact = next(row for row in measured if row["method"] == "exact")
    own = [row for row in measured if row["method"] in OWN]
    return exact, own, [row for row in measured if row["method"] not in ("exact", *OWN)]


def loss(row: Row, exact: Row, measure: str) -> float:
    """Return how far ``measure`` is from exact attention's, to either side."""
    return abs(float(row["quality"][measure] - exact["quality"][measure]))


def best_within(rows: Sequence[Row], flop_ratio: float, exact: Row, measure: str) -> Row | None:
    """Return the row nearest to exact attention of those that take at most ``flop_ratio``; None where none does."""
    affordable = (row for row in rows if row["flop_ratio"] <= flop_ratio)
    return min(affordable, key=lambda row: loss(row, exact, measure), default=None)


def nearer_in(row: Row, other: Row, exact: Row) -> list[str]:
    """Return the measures in which ``row`` is nearer to exact attention than ``other``."""
    return [name for name in exact["columns"] if loss(row, exact, name) < loss(other, exact, name)]


def ranges(own: Sequence[Row], peers: Sequence[Row], exact: Row, measure: str) -> list[tuple[float, float]]:
    """Return the ranges of FLOP, over exact attention's, in which the own rows are nearer than every peer.

    At each FLOP both sides have their best row of no more. A range ends where a peer becomes as near, or at the largest
    FLOP of all rows.
    """
    edges = sorted({row["flop_ratio"] for row in (*own, *peers)})
    found: list[tuple[float, float]] = []
    start = None
    for edge in edges:
        ours, theirs = (best_within(rows, edge, exact, measure) for rows in (own, peers))
        is_nearer = ours is not None and (theirs is None or loss(ours, exact, measure) < loss(theirs, exact, measure))
        if is_nearer and start is None:
            start = edge
        elif not is_nearer and start is not None:
            found.append((start, edge))
            start = None
    return found if start is None else [*found, (start, edges[-1])]
