"""What is to be computed, as plain numbers: sizes, scale, limits, grouping. No arrays, no backend."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from .reference.score_options import Window, key_limits

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
class Subspace:
    """How many dimensions a block keeps, and how they are found (docs/math.md, eq. 11 to 19).

    Either ``rank`` is given, less than the width, or ``score_tol``, the root-mean-square error of the scores, in nats,
    that every block must stay under by its own choice of rank.
    """

    rank: int | None
    score_tol: float | None
    refine: int
    block_size: int
    by: GroupBy


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
    grouping: Grouping | Subspace | None
    """None is exact attention."""
    window: Window = (None, None)
    """Keys that a query sees before and after its own (eq. 23); None: all on that side."""
    softcap: float = 0.0
    """The scores stay within plus and minus this (eq. 21); zero: no cap."""

    @property
    def key_limits(self) -> tuple[int | None, int | None]:
        """(low, high): query n sees keys n + low <= m <= n + high, causal limit and window together; None: no limit."""
        return key_limits(self.queries, self.keys, self.causal_offset, self.window)

    @property
    def lse_shape(self) -> tuple[int, ...]:
        """Of the log-sum-exp: (B, H, N)."""
        return self.batch, self.heads, self.queries

    @property
    def heads_per_kv_head(self) -> int:
        """Query heads that share one key/value head."""
        return self.heads // self.kv_heads if self.kv_heads else 1

    @property
    def rank(self) -> int:
        """Inner width R of the score product; the most that a block may have where each chooses its own."""
        match self.grouping:
            case Grouping(group_size=group_size):
                return self.width // group_size
            case Subspace(rank=int(rank)):
                return rank
            case _:
                return self.width

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

    @property
    def map_options(self) -> dict[str, Any]:
        """Keyword arguments of ``reference.group_maps`` or ``reference.make_maps``, beside the queries and keys."""
        match self.grouping:
            case Grouping() as g:
                own: dict[str, Any] = {"group_size": g.group_size, "fusion": g.fusion, "seed": g.seed}
            case Subspace() as g:
                own = {"scale": self.scale, "rank": g.rank, "score_tol": g.score_tol, "refine": g.refine}
            case None:
                raise ValueError("exact attention has no maps")
        return own | {"block_size": g.block_size, "group_by": g.by, "causal_offset": self.causal_offset}

    @property
    def own_block_is_exact(self) -> bool:
        """Whether a query scores the keys of its own block exactly (docs/math.md, eq. 20)."""
        return isinstance(self.grouping, Subspace) and self.grouping.by == "keys" and self.causal_offset is not None

    @property
    def meeting_offset(self) -> int | None:
        """`causal_offset` as it says which rows meet a block through its maps: own blocks do not."""
        if self.causal_offset is None or self.grouping is None or not self.own_block_is_exact:
            return self.causal_offset
        # from here on, longer blocks make no difference
        return self.causal_offset - min(self.grouping.block_size, max(self.keys, self.queries + self.causal_offset))


@dataclass(frozen=True, slots=True)
class RaggedProblem:
    """Sequences of lengths of their own, packed one after another; each is a problem of its own (docs/math.md, eq. 29).

    The lengths themselves are not here: on a GPU the host does not know them.
    """

    packed: Problem
    """All rows as if they were one sequence."""
    sequences: int
    is_top_left: bool
    """Which corner of each sequence a causal limit and a window are aligned to."""

    @property
    def lse_shape(self) -> tuple[int, ...]:
        """Of the log-sum-exp: (H, N)."""
        return self.packed.heads, self.packed.queries

    @property
    def most_blocks(self) -> int:
        """The most grouping blocks that a head can have; without a grouping every sequence is one."""
        grouping = self.packed.grouping
        return self.sequences if grouping is None else self.most_pieces(grouping.by, grouping.block_size)

    def most_pieces(self, side: GroupBy, step: int) -> int:
        """Return the most pieces of ``step`` rows that sequences with so many rows in all can have."""
        rows = self.packed.queries if side == "queries" else self.packed.keys
        return rows // step + self.sequences

    def sequence(self, queries: int, keys: int) -> Problem:
        """Return the problem of one sequence of these lengths."""
        offset = None
        if self.packed.causal_offset is not None:
            offset = 0 if self.is_top_left else keys - queries
        return replace(self.packed, queries=queries, keys=keys, causal_offset=offset)


@dataclass(frozen=True, slots=True)
class PagedProblem:
    """Sequences of lengths of their own, as many queries each, whose keys and values lie in pages.

    Query n of a sequence of M keys sees what it sees of M plain keys. The lengths are not here: on a GPU the host does
    not know them.
    """

    longest: Problem
    """As if every sequence filled its pages."""
    page_size: int
    is_top_left: bool
    """Which corner of each sequence a causal limit and a window are aligned to."""

    @property
    def lse_shape(self) -> tuple[int, ...]:
        """Of the log-sum-exp: (B, H, N)."""
        return self.longest.lse_shape

    @property
    def packed(self) -> RaggedProblem:
        """The same sequences, their rows packed one after another into as many as fill all pages."""
        longest = self.longest
        queries, keys = longest.batch * longest.queries, longest.batch * longest.keys
        offset = None
        if longest.causal_offset is not None:
            offset = 0 if self.is_top_left else keys - queries
        rows = replace(longest, batch=1, queries=queries, keys=keys, causal_offset=offset)
        return RaggedProblem(rows, longest.batch, self.is_top_left)

    def sequence(self, keys: int) -> Problem:
        """Return the problem of one sequence of this length."""
        offset = None
        if self.longest.causal_offset is not None:
            offset = 0 if self.is_top_left else keys - self.longest.queries
        return replace(self.longest, batch=1, keys=keys, causal_offset=offset)


@dataclass(frozen=True, slots=True)
class GroupMaps:
    """The sampling and fusion maps of every (batch, head, block), in the array kind of the backend that made them.

    ``channels``: (B, H_x, C, D) int32, a permutation of the channels; members of group r are entries r*G to r*G+G-1 and
    the first of them is the sampled one. ``gains``: (B, H_x, C, D), their factors in the fusion, float32 (or float64
    where the arrays are); None where all are one (``fusion="sum"``).
    """

    channels: Any
    gains: Any | None


@dataclass(frozen=True, slots=True)
class SubspaceMaps:
    """The maps of every (batch, head, block) in dense form, in the array kind of the backend that made them.

    Scores are ``scale (X W)(Y Z)^T`` with ``key_mean`` subtracted from every key, and lse gets ``scale q . key_mean``
    back. H_x is H_kv for blocks over keys (the query heads of a key head share its maps) and H for blocks over queries.
    Floats are float32, or float64 for float64 arrays where the backend computes in it.

    ``sampling``, ``fusion``: (B, H_x, C, D, R), W and Z; columns from a block's own rank on are zero, and a block of
    rank D has the identity in both. ``key_mean``: (B, H_kv, D). ``ranks``: (B, H_x, C) int32. ``score_errors``:
    (B, H_x, C), the predicted root-mean-square error of the block's scores (eq. 18), in nats; zero at rank D.
    """

    sampling: Any
    fusion: Any
    key_mean: Any
    ranks: Any
    score_errors: Any


@dataclass(frozen=True, slots=True)
class AttentionInfo:
    """What ``return_info=True`` tells of a call."""

    method: str
    """"subspace" or "lsh"; "exact" where no channel is saved, for then nothing is grouped."""
    block_size: int | None
    """L, rows per block; None where nothing is grouped."""
    reason: str
    """Why this block size."""
    ranks: Any
    """(B, H_x, C) int32, of the kind of q: the rank of every block; None unless the method is "subspace".

    With packed sequences (H_x, C), the blocks of all sequences one after another; 0 in a sequence without queries. On a
    GPU, whose host does not know the lengths, C is the most that there can be, rows // L + B, and the rest is 0.
    """
    score_errors: Any
    """(B, H_x, C), of the kind of q: the predicted root-mean-square error of its scores, in nats; None as above."""


def ceil_div(a: int, b: int) -> int:
    """Smallest integer not below a / b."""
    return -(-a // b)


def block_edges(rows: int, block_size: int) -> list[tuple[int, int]]:
    """First and past-the-last row of every grouping block; the last block may be short."""
    return [(start, min(start + block_size, rows)) for start in range(0, rows, block_size)]
