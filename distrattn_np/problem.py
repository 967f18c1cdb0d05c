"""What is to be computed, as plain numbers: sizes, scale, causal limit, grouping. No arrays, no backend."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Layout = Literal["bhnd", "bnhd"]
GroupBy = Literal["queries", "keys"]
Fusion = Literal["sum", "lstsq"]


@dataclass(frozen=True, slots=True)
class Grouping:
    """How channels are grouped (docs/math.md, eq. 5 to 9). ``group_size`` is at least 2: one is exact attention."""

    group_size: int
    block_size: int
    by: GroupBy
    fusion: Fusion
    seed: int


@dataclass(frozen=True, slots=True)
class Problem:
    """One attention call. Letters as in docs/math.md: B, H, H_kv, N, M, D, E."""

    batch: int
    heads: int
    kv_heads: int
    queries: int
    keys: int
    width: int
    value_width: int
    dtype: Any
    scale: float
    causal_offset: int | None
    """Query n sees keys m <= n + causal_offset (eq. 3); None: every query sees every key."""
    layout: Layout
    grouping: Grouping | None
    """None is exact attention."""

    @property
    def heads_per_kv_head(self) -> int:
        """Query heads that share one key/value head."""
        return self.heads // self.kv_heads if self.kv_heads else 1

    @property
    def rank(self) -> int:
        """Inner width R of the score product."""
        return self.width if self.grouping is None else self.width // self.grouping.group_size

    @property
    def grouped_rows(self) -> int:
        """Rows of the side that is cut into blocks (X in eq. 4)."""
        return self.keys if self.grouping is not None and self.grouping.by == "keys" else self.queries

    @property
    def grouped_heads(self) -> int:
        """Heads of the side that is cut into blocks; grouped-query heads share the maps of their key head."""
        return self.kv_heads if self.grouping is not None and self.grouping.by == "keys" else self.heads

    @property
    def blocks(self) -> int:
        """Number of grouping blocks C per head."""
        return 0 if self.grouping is None else -(-self.grouped_rows // self.grouping.block_size)


@dataclass(frozen=True, slots=True)
class GroupMaps:
    """The sampling and fusion maps of every (batch, head, block), in the array kind of the backend that made them.

    ``channels``: (B, H_x, C, D) int32, a permutation of the channels; members of group r are entries r*G to r*G+G-1 and
    the first of them is the sampled one. ``gains``: (B, H_x, C, D), their factors in the fusion, float32 (or float64
    where the arrays are); None where all are one (``fusion="sum"``).
    """

    channels: Any
    gains: Any | None


def ceil_div(a: int, b: int) -> int:
    """Smallest integer not below a / b."""
    return -(-a // b)


def block_edges(rows: int, block_size: int) -> list[tuple[int, int]]:
    """First and past-the-last row of every grouping block; the last block may be short."""
    return [(start, min(start + block_size, rows)) for start in range(0, rows, block_size)]
