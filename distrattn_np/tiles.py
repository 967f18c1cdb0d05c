"""Tile sizes of the CUDA kernels, the -D options that carry them, and the sets that the compile tests build."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import Literal

from .problem import ceil_div

Defines = dict[str, int]

ELEMENTS = {"float16": 1, "bfloat16": 2, "float32": 3, "float64": 4}
"""Values of -DELEMENT, as in raw_kernels/element.cuh."""

NO_MAP, SAMPLE, FUSE, DENSE = 0, 1, 2, 3
"""Values of -DQUERY_MAP of forward_mma.cu."""

OWN, ALL, UP_TO, FROM = 0, 1, 2, 3
"""Values of -DDIRECTION of sum_segments.cu."""


@dataclass(frozen=True, slots=True)
class ScoreSwitches:
    """Which score options a forward is built with (docs/math.md, eq. 21 to 24)."""

    window: bool = False
    """Whether there are keys that come too early for a query."""
    softcap: bool = False
    bias: Literal[0, 1, 2] = 0
    """1: a bias of the dtype of the elements, 2: one in float32."""
    mask: bool = False

    @property
    def changes_scores(self) -> bool:
        """Whether scores pass through more than the limits of rows."""
        return self.softcap or self.bias != 0 or self.mask

    @property
    def defines(self) -> Defines:
        """The -D options of score_options.cuh."""
        return {
            "WINDOW": int(self.window),
            "SOFTCAP": int(self.softcap),
            "BIAS": self.bias,
            "MASK": int(self.mask),
        }


NO_SWITCHES = ScoreSwitches()


def pad(width: int) -> int:
    """Return ``width`` rounded up to the depth of a 16-bit tensor-core product."""
    return ceil_div(width, 16) * 16


@dataclass(frozen=True, slots=True)
class MmaTiles:
    """Tiles of forward_mma.cu."""

    block_q: int
    block_kv: int
    num_warps: int

    def __post_init__(self) -> None:
        """Refuse what the kernel's static_asserts would refuse."""
        if self.block_q % (16 * self.num_warps) or self.block_kv % 16:
            msg = f"a warp takes whole 16-row tiles of queries and of keys, got {self}"
            raise ValueError(msg)

    def shared_bytes(self, width: int, rank: int, value_width: int, query_map: int, *, own_block: bool) -> int:
        """Return the dynamic shared memory of a block: Q, Q before its map, and two stages of K and V."""
        key_width = max(pad(rank), pad(width)) if own_block else pad(rank)
        raw_width = pad(width) if query_map == DENSE else ceil_div(width, 8) * 8
        raw = 0 if query_map == NO_MAP else self.block_q * (raw_width + 8)
        stage = self.block_kv * (key_width + 8 + pad(value_width) + 8)
        return 2 * (raw + self.block_q * (pad(rank) + 8) + 2 * stage)

    def accumulators(self, value_width: int) -> int:
        """Return the registers of a thread that hold its part of O and S."""
        return self.block_q // self.num_warps * (pad(value_width) + self.block_kv) // 32


# From the fastest to the smallest. 32 rows a warp halve the shared-memory reads of K and V for each product; wide
# values leave registers for 16. E = 128 is as fast with 48 keys as with 64, which takes the last register.
_MMA_TILES = (
    MmaTiles(128, 64, 4),
    MmaTiles(128, 48, 4),
    MmaTiles(128, 32, 4),
    MmaTiles(128, 64, 8),
    MmaTiles(64, 64, 4),
    MmaTiles(64, 32, 4),
    MmaTiles(32, 32, 2),
)
_MAX_ACCUMULATORS = 176
_FEWER_ACCUMULATORS = 160, 144
"""Where a block has less than 100 KB of shared memory, and there with own blocks: what sm_120 has registers for."""
_OPTION_TILES = {MmaTiles(128, 64, 8): 192, MmaTiles(64, 32, 4): 288, MmaTiles(64, 16, 4): 512}
"""Where scores pass through a cap, a bias or a mask; and how wide a key and a value may be together, for registers."""


def mma_tiles(
    width: int,
    rank: int,
    value_width: int,
    query_map: int,
    shared_limit: int,
    *,
    own_block: bool = False,
    changes_scores: bool = False,
) -> MmaTiles:
    """Return the first tiles that fit the registers and the ``shared_limit`` bytes of a block."""
    if changes_scores:
        key_width = max(pad(rank), pad(width)) if own_block else pad(rank)
        candidates = [tiles for tiles, widest in _OPTION_TILES.items() if key_width + pad(value_width) <= widest]
    else:
        most = _FEWER_ACCUMULATORS[own_block] if shared_limit < 100 << 10 else _MAX_ACCUMULATORS
        candidates = [tiles for tiles in _MMA_TILES if tiles.accumulators(value_width) <= most]
    for tiles in candidates:
        if tiles.shared_bytes(width, rank, value_width, query_map, own_block=own_block) <= shared_limit:
            return tiles
    msg = f"no tiles for D={width}, R={rank}, E={value_width} in {shared_limit} bytes of shared memory"
    raise NotImplementedError(msg)


def mma_defines(
    tiles: MmaTiles,
    *,
    element: int,
    width: int,
    rank: int,
    value_width: int,
    query_map: int,
    group_size: int,
    with_gains: bool,
    keys_per_item: bool,
    causal: bool,
    own_block: bool,
    aligned: bool,
    switches: ScoreSwitches = NO_SWITCHES,
    centred: bool = False,
    ragged: bool = False,
) -> Defines:
    """Return the -D options of forward_mma.cu; ``centred`` matters with switches: whether the keys are."""
    mapped = query_map != NO_MAP
    return {
        "ELEMENT": element,
        "D": width,
        "K_COLUMNS": pad(rank) if mapped else width,
        "R": rank,
        "E": value_width,
        "QUERY_MAP": query_map,
        "GROUP_SIZE": group_size,
        "WITH_GAINS": int(with_gains and query_map == FUSE),
        "KEYS_PER_ITEM": int(keys_per_item),
        "CAUSAL": int(causal),
        "OWN_BLOCK": int(own_block),
        "CENTRED": int(centred and switches.changes_scores),
        "ALIGNED": int(aligned),
        "BLOCK_Q": tiles.block_q,
        "BLOCK_KV": tiles.block_kv,
        "NUM_WARPS": tiles.num_warps,
        "LAUNCH_SHARED_BYTES": tiles.shared_bytes(width, rank, value_width, query_map, own_block=own_block),
        "RAGGED": int(ragged),
    } | switches.defines


SIMT_THREADS = 256
"""Threads of a block of forward_simt.cu."""


def simt_block_q(element: int) -> int:
    """Return the query rows of a block of forward_simt.cu: what fits 48 KB."""
    return 32 if element == ELEMENTS["float64"] else 64


GROUP_BY = {None: 0, "queries": 1, "keys": 2}
"""Values of -DGROUP_BY of forward_simt.cu."""


def simt_defines(
    *,
    element: int,
    width: int,
    rank: int,
    value_width: int,
    group_size: int,
    group_by: str | None,
    with_gains: bool,
    dense: bool,
    own_block: bool,
    causal: bool,
    switches: ScoreSwitches = NO_SWITCHES,
    ragged: bool = False,
) -> Defines:
    """Return the -D options of forward_simt.cu; ``dense`` maps have no groups."""
    return {
        "ELEMENT": element,
        "D": width,
        "R": rank,
        "E": value_width,
        "GROUP_SIZE": group_size,
        "GROUP_BY": GROUP_BY[group_by],
        "WITH_GAINS": int(with_gains),
        "DENSE": int(dense),
        "OWN_BLOCK": int(own_block),
        "CAUSAL": int(causal),
        "BLOCK_Q": simt_block_q(element),
        "RAGGED": int(ragged),
    } | switches.defines


SM90_WIDTHS = (16, 32, 48, 64, 96, 128)
"""Inner and value widths of forward_sm90.cu: those that hopper.cuh has products for."""
SM90_MAX_ROUNDS = 31
"""Query tiles that a thread block of forward_sm90.cu takes one after the other."""
_ROUNDS_TO_EVEN_OUT = 8
"""Rounds in which causal tiles are dealt out, so that what the last of them leaves uneven is little."""
_KEPT_IN_L2 = 32 << 20
"""Bytes of keys and values that stay in the L2 cache while the tiles of their queries are dealt out."""
_LEAST_HEADS_DEALT = 8
_KEYS_TO_BEGIN = 640
"""A tile of queries takes as long beside its keys as so many of these (docs/performance.md)."""
_KEYS_TO_MERGE = 2048
"""As many take another launch."""
_KEYS_TO_MERGE_A_SPLIT = 6
"""As many take what one thread block writes for it."""


@dataclass(frozen=True, slots=True)
class Sm90Tiles:
    """Tiles of forward_sm90.cu."""

    block_q: int
    block_kv: int
    stages: int
    map_ahead: bool = True
    """Whether the queries' map for the next key block is computed beside a softmax; takes registers."""


def sm90_tiles(rank: int, value_width: int, query_block_size: int, *, ragged: bool = False) -> Sm90Tiles:
    """Return what measured fastest on an H100 (docs/performance.md) for inner width ``rank`` (padded).

    Tiles of 192 queries are faster, unless they leave too many rows of the last tile of a query block empty.
    ``ragged``: the blocks have that size on average, and half of a last tile is empty.
    """
    empty = 192 // 2 if ragged else -query_block_size % 192
    fills_wide_tiles = query_block_size >= 0.95 * (query_block_size + empty)
    if fills_wide_tiles and value_width <= 64:
        return Sm90Tiles(192, 128, 3)
    if fills_wide_tiles and rank > 64:
        return Sm90Tiles(192, 64, 2)
    return Sm90Tiles(128, 128, 2)


def sm90_key_map_tiles(rank: int, width: int, value_width: int, block_size: int) -> Sm90Tiles:
    """Return the tiles where forward_sm90.cu maps the queries itself, for blocks over keys; ``rank`` is padded.

    It takes them where they are whole tiles of keys.
    """
    if max(width, value_width) <= 64:  # the exponentials set the pace: more rows, of which some are always in a product
        if rank <= 16:
            return Sm90Tiles(256, 64, 4, map_ahead=False)
        return Sm90Tiles(192, 96, 3, map_ahead=rank <= 32) if block_size % 96 == 0 else Sm90Tiles(192, 64, 4)
    if rank > 96:  # more than the registers hold beside 128 keys
        return Sm90Tiles(128, 64, 3)
    return Sm90Tiles(128, 128, 2, map_ahead=rank < 96)


def sm90_defines(
    tiles: Sm90Tiles,
    *,
    element: int,
    rank: int,
    value_width: int,
    keys_per_item: bool,
    causal: bool,
    mapped_width: int | None = None,
    folds_reference: bool = False,
    ragged: bool = False,
) -> Defines:
    """Return the -D options of forward_sm90.cu for inner width ``rank`` (padded).

    ``mapped_width`` is the width of queries that the kernel maps itself, for blocks over keys; with
    ``folds_reference`` the last two columns of the padded rank are free, and K has ones there.
    """
    key_maps = {}
    if mapped_width is not None:
        key_maps = {
            "KEY_MAPS": 1,
            "D": mapped_width,
            "MAP_AHEAD": int(tiles.map_ahead),
            "FOLD_REFERENCE": int(folds_reference),
        }
    return key_maps | {
        "ELEMENT": element,
        "R": rank,
        "E": value_width,
        "KEYS_PER_ITEM": int(keys_per_item),
        "CAUSAL": int(causal),
        "BLOCK_Q": tiles.block_q,
        "BLOCK_KV": tiles.block_kv,
        "STAGES": tiles.stages,
        # through maps causal calls were slower with several tiles a thread block (docs/performance.md)
        "MAX_ROUNDS": 1 if (causal and (keys_per_item or key_maps)) or ragged else SM90_MAX_ROUNDS,
        "RAGGED": int(ragged),
    }


@dataclass(frozen=True, slots=True)
class Sm90Grid:
    """How many thread blocks forward_sm90.cu is launched with, and who does what (work_item.cuh)."""

    blocks: int
    positions: int
    items_dealt: int = 0
    blocks_at_once: int = 0
    whole_tiles: int = 0
    """Tiles of full calls before those whose keys are split."""
    splits: int = 1
    keys_per_split: int = 0


def sm90_splits_keys(defines: Defines) -> bool:
    """Whether forward_sm90.cu, built with these, can cut tiles of queries along their keys: in exact full calls."""
    return not any(defines.get(name) for name in ("CAUSAL", "KEYS_PER_ITEM", "KEY_MAPS", "RAGGED"))


def sm90_splits(tiles: int, keys: int, block_kv: int, multiprocessors: int) -> tuple[int, int, int]:
    """Return how many of equal tiles of queries stay whole, and into how many splits of how many keys the others go.

    Whole tiles fill all multiprocessors; taken is what is done first with the others.
    """
    others, steps = tiles % multiprocessors, ceil_div(keys, block_kv)

    def duration(splits: int) -> int:
        """In keys."""
        pieces = others * splits
        merge = 0 if splits == 1 else _KEYS_TO_MERGE + _KEYS_TO_MERGE_A_SPLIT * pieces
        rounds = ceil_div(pieces, multiprocessors)
        return rounds * (ceil_div(steps, splits) * block_kv + _KEYS_TO_BEGIN) + merge

    most = min(steps, 4 * ceil_div(multiprocessors, max(others, 1)))
    keys_per_split = ceil_div(steps, min(range(1, most + 1), key=duration, default=1)) * block_kv
    splits = ceil_div(keys, keys_per_split)
    return tiles if splits == 1 else tiles - others, splits, keys_per_split


def sm90_grid(
    defines: Defines,
    *,
    items: int,
    query_tiles: int,
    keys: int,
    heads_per_kv_head: int,
    multiprocessors: int,
) -> Sm90Grid:
    """Return the grid for work items of so many query tiles; a multiprocessor runs one thread block at a time."""
    positions, most_rounds = items * query_tiles, defines["MAX_ROUNDS"]
    if not (defines["CAUSAL"] and most_rounds > 1):
        whole, splits, keys_per_split = positions, 1, keys
        if sm90_splits_keys(defines):
            whole, splits, keys_per_split = sm90_splits(positions, keys, defines["BLOCK_KV"], multiprocessors)
        positions = whole + (positions - whole) * splits
        blocks = min(positions, multiprocessors * ceil_div(positions, multiprocessors * most_rounds))
        return Sm90Grid(blocks, positions, whole_tiles=whole, splits=splits, keys_per_split=keys_per_split)
    bytes_of_a_head = 2 * max(keys, 1) * (defines["R"] + defines["E"])
    most_dealt = min(items, heads_per_kv_head * max(_KEPT_IN_L2 // bytes_of_a_head, _LEAST_HEADS_DEALT))
    sections = dealt = rounds = at_once = 0
    while not 0 < rounds <= most_rounds:
        at_once += multiprocessors
        sections = ceil_div(items, min(most_dealt, ceil_div(_ROUNDS_TO_EVEN_OUT * at_once, query_tiles)))
        dealt = ceil_div(items, sections)
        rounds = ceil_div(dealt * query_tiles, at_once)
    at_once = min(at_once, positions)
    return Sm90Grid(at_once * ceil_div(sections, most_rounds // rounds), positions, dealt, at_once)


@dataclass(frozen=True, slots=True)
class DecodeTiles:
    """Tiles of decode.cu."""

    row_warps: int
    num_warps: int
    block_kv: int
    stages: int

    def __post_init__(self) -> None:
        """Refuse what the kernel's static_asserts would refuse."""
        if self.num_warps % self.row_warps or self.block_kv % (16 * self.num_warps // self.row_warps):
            msg = f"a warp takes 16 rows and whole 16-key tiles, got {self}"
            raise ValueError(msg)

    @property
    def rows(self) -> int:
        """Rows of a tile: queries of all heads that share a key head."""
        return 16 * self.row_warps

    def shared_bytes(self, width: int, rank: int | None, value_width: int) -> int:
        """Return the dynamic shared memory of a block: Q, Q through a map, and the ring of buffers."""
        mapped_q = 0 if rank is None else self.rows * (pad(rank) + 8)
        ring = self.stages * _stage_bytes(self.block_kv, width, rank, value_width)
        return 2 * (self.rows * (pad(width) + 8) + mapped_q) + ring


def _stage_bytes(block_kv: int, width: int, rank: int | None, value_width: int) -> int:
    """Return the bytes of one buffer of decode.cu's ring."""
    plain_row = pad(width) + 8 + pad(value_width) + 8
    if rank is None:
        return 2 * block_kv * plain_row
    return 2 * max(block_kv * (pad(rank) + 8 + pad(value_width) + 8), 16 * plain_row)


_SHARED_BYTES_OF_A_BLOCK = 1 << 10
"""Shared memory that the system takes for a thread block, and that a multiprocessor has beyond the largest block's."""
DECODE_BLOCKS_PER_PROCESSOR = 2


_BYTES_ON_THEIR_WAY = 24 << 10
"""Bytes that a thread block has asked for while it computes, so that two cover what memory takes to answer."""


@lru_cache(maxsize=1024)
def decode_tiles(
    width: int, rank: int | None, value_width: int, rows: int, shared_limit: int, block_size: int | None = None
) -> DecodeTiles:
    """Return tiles for ``rows`` rows a key head in ``shared_limit`` bytes of a block; plain keys have no ``rank``.

    The first that let two blocks share a multiprocessor, one copying while the other computes; else the first that fit.
    Eight warps where registers hold their sums and blocks of ``block_size`` keys fill their tiles.
    """
    row_warps = min(1 << (ceil_div(rows, 16) - 1).bit_length(), 4)
    sizes = [(row_warps, 4), (min(row_warps, 2), 2), (1, 2)]
    if row_warps == 1 and value_width <= 128 and (block_size is None or block_size >= 128):
        sizes.insert(0, (1, 8))
    all_tiles = []
    for of_rows, warps in sizes:
        on_their_way = ceil_div(_BYTES_ON_THEIR_WAY, _stage_bytes(16 * warps, width, rank, value_width))
        all_tiles += [DecodeTiles(of_rows, warps, 16 * warps, n) for n in range(min(1 + on_their_way, 4), 1, -1)]
    two_blocks = (shared_limit + _SHARED_BYTES_OF_A_BLOCK) // DECODE_BLOCKS_PER_PROCESSOR - _SHARED_BYTES_OF_A_BLOCK
    # beside the dynamic shared memory, at most 1 KB for sums of rows
    for limit in (two_blocks - 1024, shared_limit - 1024):
        for tiles in all_tiles:
            if tiles.shared_bytes(width, rank, value_width) <= limit:
                return tiles
    msg = f"no tiles for D={width}, R={rank}, E={value_width} in {shared_limit} bytes of shared memory"
    raise NotImplementedError(msg)


_LEAST_KEYS = 256
"""Keys of a split below which its partial result costs more than another thread block brings."""
_KEYS_TO_START = 128
"""Keys that a thread block could read while it starts and ends."""


@lru_cache(maxsize=1024)
def decode_splits(keys: int, block_kv: int, items: int, blocks_at_once: int) -> tuple[int, int]:
    """Return into how many splits decode.cu cuts the keys of a head, and the keys of each.

    ``items`` thread blocks there are for each split, ``blocks_at_once`` run at a time. Taken is what is done first
    where every block of a round takes as long as its keys.
    """
    tiles = ceil_div(keys, block_kv)
    most = min(tiles * block_kv // _LEAST_KEYS, 4 * ceil_div(blocks_at_once, items))

    def duration(splits: int) -> int:
        return ceil_div(items * splits, blocks_at_once) * (ceil_div(tiles, splits) * block_kv + _KEYS_TO_START)

    keys_per_split = ceil_div(tiles, min(range(1, max(most, 1) + 1), key=duration)) * block_kv
    return ceil_div(keys, keys_per_split), keys_per_split


def decode_defines(
    tiles: DecodeTiles,
    *,
    element: int,
    width: int,
    rank: int | None,
    value_width: int,
    aligned: bool,
    paged: bool = False,
) -> Defines:
    """Return the -D options of decode.cu; ``rank`` is None where all keys are plain, which may lie in pages."""
    return {
        "ELEMENT": element,
        "D": width,
        "R": width if rank is None else rank,
        "E": value_width,
        "MAPPED": int(rank is not None),
        "PAGED": int(paged),
        "ALIGNED": int(aligned),
        "ROW_WARPS": tiles.row_warps,
        "NUM_WARPS": tiles.num_warps,
        "BLOCK_KV": tiles.block_kv,
        "STAGES": tiles.stages,
        "LAUNCH_SHARED_BYTES": tiles.shared_bytes(width, rank, value_width),
    }


def merge_splits_defines(element: int, value_width: int) -> Defines:
    """Return the -D options of merge_splits.cu."""
    return {"ELEMENT": element, "E": value_width, "THREADS": 128}


def expected_gram_defines(element: int, width: int) -> Defines:
    """Return the -D options of expected_gram.cu."""
    return {"ELEMENT": element, "WIDTH": pad(width), "THREADS": 256}


REBUILD_TILE = 64
"""Keys of a block of rebuild_keys.cu."""


def rebuild_defines(element: int, width: int, rank: int, *, paged: bool = False) -> Defines:
    """Return the -D options of rebuild_keys.cu."""
    return {"ELEMENT": element, "D": width, "R": rank, "PAGED": int(paged)}


def gram_defines(*, element: int, width: int, centred: bool, aligned: bool, ragged: bool = False) -> Defines:
    """Return the -D options of gram.cu."""
    return {"ELEMENT": element, "D": width, "CENTRED": int(centred), "ALIGNED": int(aligned), "RAGGED": int(ragged)}


def gram_blocks(width: int) -> int:
    """Return how many thread blocks of gram.cu share a segment."""
    return 2 if width > 176 else 1


def gram_threads(width: int) -> int:
    """Return the threads of a block of gram.cu: a warp for sixteen channels."""
    return 2 * pad(width)


GRAM_SM90_ROW_TILE = 64
"""Rows of a tile of gram_sm90.cu."""
GRAM_SM90_WIDTHS = (64, 128)
"""Widths that gram_sm90.cu takes."""


def gram_sm90_defines(element: int, width: int, *, ragged: bool = False) -> Defines:
    """Return the -D options of gram_sm90.cu."""
    stage_bytes = 2 * GRAM_SM90_ROW_TILE * width + 2 * 8  # a tile and two barriers
    return {"ELEMENT": element, "D": width, "RAGGED": int(ragged), "LAUNCH_SHARED_BYTES": 6 * stage_bytes + 1024}


def gram_sm90_threads(width: int) -> int:
    """Return the threads of a block of gram_sm90.cu: a warpgroup for 64 channels, and one that copies."""
    return 128 * (1 + width // 64)


GRAM_SIMT_STRIP = 64
"""Channels of each side of a product that a block of gram_simt.cu makes."""


def gram_simt_defines(*, element: int, width: int, centred: bool, ragged: bool = False) -> Defines:
    """Return the -D options of gram_simt.cu."""
    return {"ELEMENT": element, "D": width, "CENTRED": int(centred), "RAGGED": int(ragged)}


def gram_simt_blocks(width: int) -> int:
    """Return how many thread blocks of gram_simt.cu share a segment: the pairs of strips."""
    strips = ceil_div(width, GRAM_SIMT_STRIP)
    return strips * (strips + 1) // 2


def sum_defines(element: int, direction: int, *, to_element: bool = False, ragged: bool = False) -> Defines:
    """Return the -D options of sum_segments.cu."""
    return {
        "ELEMENT": element,
        "DIRECTION": direction,
        "TO_ELEMENT": int(to_element),
        "RAGGED": int(ragged),
        "THREADS": 128,
    }


def maps_pitch(width: int, columns: int) -> int:
    """Return the numbers of a row of subspace_maps.cu: inner products, W, Z, and what parts the banks of two rows."""
    return pad(columns) + 2 * pad(width) + 4


def maps_defines(
    element: int, width: int, columns: int, shared_limit: int, *, crowded: bool, ragged: bool = False
) -> Defines:
    """Return the -D options of subspace_maps.cu: its rows lie in shared memory where that is large enough.

    ``element`` is what the arrays hold: it computes in float64 for float64, else in float32, and writes the maps in 16
    bits as well where the arrays have those. ``crowded``: there are more blocks than multiprocessors, which two share;
    else wide ones have twice as many threads each, for the same results bit for bit.
    """
    size = 8 if element == ELEMENTS["float64"] else 4
    threads = 256 if crowded or size == 8 or width <= 128 else 512
    numbers = 2 * 64 // size * (pad(width) + 8) + 16 * 20 + 3 * pad(columns) + threads // 32
    fixed_bytes = ceil_div(size * numbers + 4 * (pad(columns) + 1), 16) * 16
    rows_bytes = size * pad(columns) * maps_pitch(width, columns)
    in_shared = fixed_bytes + rows_bytes <= shared_limit
    return {
        "ELEMENT": element,
        "D": width,
        "R": columns,
        "IN_SHARED": int(in_shared),
        "RAGGED": int(ragged),
        "THREADS": threads,
        "LAUNCH_SHARED_BYTES": fixed_bytes + in_shared * rows_bytes,
    }


REDUCE_THREADS = 256
"""Threads of a block of reduce_rows.cu."""
REDUCE_ROW_TILE = 128
"""Rows of a block of reduce_rows.cu."""


def reduce_defines(
    *,
    element: int,
    width: int,
    rank: int,
    centred: bool,
    rows_from_block: bool,
    aligned: bool,
    with_ones: bool = False,
    ragged: bool = False,
) -> Defines:
    """Return the -D options of reduce_rows.cu: rows times the map of their own block, or of every work item.

    ``with_ones``: the last two columns of the padded rank are ones.
    """
    map_rows = 16 if width > 128 else 64
    return {
        "ELEMENT": element,
        "D": width,
        "R": rank,
        "CENTRED": int(centred),
        "ROWS_FROM_BLOCK": int(rows_from_block),
        # neighbouring items mostly share rows; those of a block are its own
        "ITEMS_PER_BLOCK": 1 if rows_from_block else 8,
        "ALIGNED": int(aligned),
        "WITH_ONES": int(with_ones),
        "RAGGED": int(ragged),
        "LAUNCH_SHARED_BYTES": 2 * (REDUCE_ROW_TILE + 2 * map_rows) * (pad(width) + 8),
    }


REDUCE_SIMT_ROW_TILE = 64
"""Rows of a block of reduce_rows_simt.cu."""


def reduce_simt_defines(
    *, element: int, width: int, rank: int, centred: bool, rows_from_block: bool, ragged: bool = False
) -> Defines:
    """Return the -D options of reduce_rows_simt.cu, as of `reduce_defines`."""
    return {
        "ELEMENT": element,
        "D": width,
        "R": rank,
        "CENTRED": int(centred),
        "ROWS_FROM_BLOCK": int(rows_from_block),
        "RAGGED": int(ragged),
    }


def narrow_defines(element: int) -> Defines:
    """Return the -D options of narrow_maps.cu."""
    return {"ELEMENT": element, "THREADS": 256}


def mean_scores_defines(element: int, width: int, vector: int, *, adds: bool = True, ragged: bool = False) -> Defines:
    """Return the -D options of add_mean_scores.cu."""
    lanes = min(32, 1 << (ceil_div(width, vector) - 1).bit_length())
    return {
        "ELEMENT": element,
        "VECTOR": vector,
        "LANES": lanes,
        "THREADS": 256,
        "ADDS": int(adds),
        "RAGGED": int(ragged),
    }


def cut_defines(edge_bytes: int) -> Defines:
    """Return the -D options of cut_sequences.cu for edges of 4 or 8 bytes."""
    return {"LONG_EDGES": int(edge_bytes == 8), "THREADS": 256}


def pack_defines(element: int, width: int, vector: int, *, paged: bool) -> Defines:
    """Return the -D options of pack_rows.cu; ``paged``: it reads pages."""
    lanes = min(32, 1 << (ceil_div(width, vector) - 1).bit_length())
    return {
        "ELEMENT": element,
        "VECTOR": vector,
        "LANES": lanes,
        "PAGED": int(paged),
        # a few rows a thread, as a thread block with pages begins by adding up lengths
        "ROWS": 4 * 256 // lanes,
        "THREADS": 256,
    }


def hash_defines(element: int, vector: int, *, ragged: bool = False) -> Defines:
    """Return the -D options of hash_channels.cu."""
    return {"ELEMENT": element, "VECTOR": vector, "RAGGED": int(ragged), "THREADS": 512}


def norms_defines(element: int, vector: int, power: int = 2, *, ragged: bool = False) -> Defines:
    """Return the -D options of channel_norms.cu; sums of the elements themselves with ``power`` 1."""
    return {"ELEMENT": element, "VECTOR": vector, "POWER": power, "RAGGED": int(ragged), "THREADS": 256}


def gains_defines(element: int, group_size: int, *, ragged: bool = False) -> Defines:
    """Return the -D options of fusion_gains.cu."""
    return {"ELEMENT": element, "GROUP_SIZE": group_size, "RAGGED": int(ragged), "THREADS": 512}


def fuse_defines(
    *, element: int, group_size: int, rank: int, with_gains: bool, sample: bool, vector: int, ragged: bool = False
) -> Defines:
    """Return the -D options of fuse_channels.cu: Y Z for whole work items, or X W of every block's own rows."""
    return {
        "ELEMENT": element,
        "GROUP_SIZE": group_size,
        "MEMBERS": 1 if sample else group_size,
        "WITH_GAINS": int(with_gains),
        "R_PADDED": pad(rank),
        "ROWS_FROM_BLOCK": int(sample),
        # neighbouring items mostly share rows of Y; a sampled block has rows of its own
        "ITEMS_PER_BLOCK": 1 if sample else 8,
        "VECTOR": vector,
        "RAGGED": int(ragged),
        "THREADS": 128,
    }


def compile_cases(stem: str, shared_limit: int) -> list[Defines]:
    """Return -D sets that reach every branch and tile of a kernel, for the tests that compile without a GPU.

    They are those of a device that gives a block ``shared_limit`` bytes of shared memory.
    """
    return list(_CASES[stem](shared_limit))


_SWITCHES = (
    ScoreSwitches(window=True),
    ScoreSwitches(mask=True),
    ScoreSwitches(softcap=True, bias=1),
    ScoreSwitches(window=True, softcap=True, bias=2, mask=True),
)
"""Each score option, and all of them."""
_RAGGED_SWITCHES = ScoreSwitches(window=True, softcap=True)
"""Those that packed sequences may have."""


def _forward_mma_cases(shared_limit: int) -> Iterator[Defines]:
    # (D, G, E, query map): the widths of real models, then odd, tiny and largest ones
    shapes = [
        (128, 1, 128, NO_MAP),
        (128, 2, 128, SAMPLE),
        (128, 4, 128, SAMPLE),
        (128, 2, 128, FUSE),
        (64, 1, 64, NO_MAP),
        (64, 2, 64, SAMPLE),
        (64, 4, 64, FUSE),
        (32, 2, 32, SAMPLE),
        (80, 2, 80, FUSE),
        (33, 3, 7, SAMPLE),
        (1, 1, 1, NO_MAP),
        (256, 1, 256, NO_MAP),
        (256, 2, 256, FUSE),
        (96, 1, 192, NO_MAP),
        (128, 2, 128, DENSE),
        (64, 2, 64, DENSE),
        (80, 2, 80, DENSE),
        (33, 3, 7, DENSE),
        (256, 2, 256, DENSE),
    ]
    for number, (width, group_size, value_width, query_map) in enumerate(shapes):
        options = [
            (NO_SWITCHES, False, False),
            (NO_SWITCHES, True, False),
            (_SWITCHES[number % 3], number % 2 == 0, False),
            (_SWITCHES[3], number % 4 < 2, False),
            (NO_SWITCHES, False, True),
            (NO_SWITCHES, True, True),
            (_RAGGED_SWITCHES, number % 4 < 2, True),
        ]
        for switches, causal, ragged in options:
            rank, own_block = width // group_size, causal and query_map == DENSE
            changes = switches.changes_scores
            tiles = mma_tiles(
                width, rank, value_width, query_map, shared_limit, own_block=own_block, changes_scores=changes
            )
            yield mma_defines(
                tiles,
                element=ELEMENTS["bfloat16" if number % 3 == 1 else "float16"],
                width=width,
                rank=rank,
                value_width=value_width,
                query_map=query_map,
                group_size=group_size,
                with_gains=number % 2 == 1,
                keys_per_item=query_map == SAMPLE,
                causal=causal,
                own_block=own_block,
                aligned=width % 8 == 0 and value_width % 8 == 0,
                switches=switches,
                centred=query_map == DENSE or (query_map == NO_MAP and number % 2 == 1),
                ragged=ragged,
            )


def _forward_simt_cases() -> Iterator[Defines]:
    # (D, R, E, side that is cut into blocks, dense maps)
    shapes = [
        (64, 64, 64, None, False),
        (256, 128, 256, "keys", False),
        (128, 32, 128, "queries", False),
        (33, 11, 7, "queries", False),
        (1, 1, 1, None, False),
        (64, 32, 64, "queries", True),
        (64, 32, 64, "keys", True),
        (256, 255, 256, "keys", True),
        (128, 64, 128, "keys", True),
        (33, 11, 7, "keys", True),
        (2, 1, 1, "queries", True),
    ]
    for number, (element, shape) in enumerate(product(ELEMENTS.values(), shapes)):
        width, rank, value_width, group_by, dense = shape
        usual = (False, True) if dense and group_by == "keys" else (number % 3 == 0,)
        plain = [(causal, NO_SWITCHES, ragged) for causal in usual for ragged in (False, True)]
        for causal, switches, ragged in (
            *plain,
            (number % 8 < 4, _SWITCHES[number % 4], False),
            (number % 8 < 4, _RAGGED_SWITCHES, True),
        ):
            yield simt_defines(
                element=element,
                width=width,
                rank=rank,
                value_width=value_width,
                group_size=1 if dense else width // rank,
                group_by=group_by,
                with_gains=group_by is not None and not dense and number % 2 == 1,
                dense=dense,
                own_block=dense and group_by == "keys" and causal,
                causal=causal,
                switches=switches,
                ragged=ragged,
            )


def _fuse_cases() -> Iterator[Defines]:
    for number, (element, (group_size, rank)) in enumerate(
        product(ELEMENTS.values(), [(2, 64), (4, 32), (3, 11), (128, 2), (256, 1)])
    ):
        for sample, ragged in product((False, True), repeat=2):
            vector = _widest(element) if number % 2 and rank * group_size % 8 == 0 else 1
            yield fuse_defines(
                element=element,
                group_size=group_size,
                rank=rank,
                with_gains=number % 2 == 0 and not sample,
                sample=sample,
                vector=vector,
                ragged=ragged,
            )


def _widest(element: int) -> int:
    """Elements in 16 bytes."""
    return {ELEMENTS["float32"]: 4, ELEMENTS["float64"]: 2}.get(element, 8)


def _forward_sm90_cases() -> Iterator[Defines]:
    for rank, value_width in product(SM90_WIDTHS, SM90_WIDTHS):
        for keys_per_item, ragged in product((False, True), repeat=2):
            element = 1 + (rank + value_width) // 16 % 2
            yield sm90_defines(
                sm90_tiles(rank, value_width, 1024 if keys_per_item else 1920),
                element=element,
                rank=rank,
                value_width=value_width,
                keys_per_item=keys_per_item,
                causal=(rank // 32 + element) % 2 == keys_per_item,
                ragged=ragged,
            )
    for width, rank, value_width in product((64, 128), SM90_WIDTHS, (64, 128)):
        if rank <= width:
            usual = value_width == width  # so that both are built for every pair of width and rank
            ends = ((usual, False), (False, True), (True, True))
            sizes = (1024, 960) if width == value_width == 64 and rank > 16 else (1024,)
            for block_size, folds_reference, (causal, ragged) in product(sizes, (False, True), ends):
                yield sm90_defines(
                    sm90_key_map_tiles(rank, width, value_width, block_size),
                    element=1 + (rank // 16 + folds_reference) % 2,
                    rank=rank,
                    value_width=value_width,
                    keys_per_item=False,
                    causal=causal,
                    mapped_width=width,
                    folds_reference=folds_reference,
                    ragged=ragged,
                )


def _decode_cases(shared_limit: int) -> Iterator[Defines]:
    # (D, R, E): the widths of real models, then odd, tiny and largest ones
    shapes = [
        (128, 64, 128),
        (128, 32, 128),
        (128, None, 128),
        (64, 32, 64),
        (64, None, 64),
        (256, 128, 256),
        (256, 256, 256),
        (256, None, 256),
        (80, 40, 80),
        (33, 11, 7),
        (256, 16, 16),
        (96, 48, 192),
        (1, None, 1),
    ]
    for number, (shape, rows) in enumerate(product(shapes, (4, 32, 64))):
        width, rank, value_width = shape
        keys: list[tuple[bool, int | None]] = [(False, None)]  # in pages or not, and the block size
        if rank is None:
            keys.append((True, None))
        elif rows == 4:
            keys += [(False, 64), (True, 64)]
        for paged, block_size in keys:
            yield decode_defines(
                decode_tiles(width, rank, value_width, rows, shared_limit, block_size),
                element=1 + number % 2,
                width=width,
                rank=rank,
                value_width=value_width,
                aligned=width % 8 == 0 and value_width % 8 == 0 and number % 5 != 4,
                paged=paged,
            )


def _subspace_maps_cases(shared_limit: int) -> Iterator[Defines]:
    shapes = ((128, 64), (128, 128), (128, 96), (64, 32), (80, 40), (33, 11), (2, 1), (256, 128), (256, 256))
    for (width, columns), element, ragged in product(shapes, ELEMENTS.values(), (False, True)):
        for crowded in (True, False) if width > 128 else (True,):
            yield maps_defines(element, width, columns, shared_limit, crowded=crowded, ragged=ragged)


def _reduce_rows_cases() -> Iterator[Defines]:
    shapes = [(128, 64), (128, 96), (64, 32), (80, 40), (33, 11), (2, 1), (240, 120), (256, 128), (256, 255)]
    for number, (width, rank) in enumerate(shapes):
        for rows_from_block, ragged in product((False, True), repeat=2):
            yield reduce_defines(
                element=1 + number % 2,
                width=width,
                rank=rank,
                centred=(number + rows_from_block) % 2 == 0,
                rows_from_block=rows_from_block,
                aligned=width % 8 == 0 and number % 3 != 2,
                with_ones=rows_from_block and pad(rank) - rank >= 2,
                ragged=ragged,
            )


def _reduce_rows_simt_cases() -> Iterator[Defines]:
    shapes = [(128, 64), (64, 32), (33, 11), (2, 1), (256, 255)]
    for number, (element, (width, rank)) in enumerate(product(ELEMENTS.values(), shapes)):
        for rows_from_block, ragged in product((False, True), repeat=2):
            yield reduce_simt_defines(
                element=element,
                width=width,
                rank=rank,
                centred=(number + rows_from_block) % 2 == 0,
                rows_from_block=rows_from_block,
                ragged=ragged,
            )


_SIXTEEN_BITS = (ELEMENTS["float16"], ELEMENTS["bfloat16"])
_EITHER = (False, True)
_CASES: dict[str, Callable[[int], Iterable[Defines]]] = {
    "cut_sequences": lambda _: [cut_defines(size) for size in (4, 8)],
    "pack_rows": lambda _: [
        pack_defines(e, width, vector, paged=paged)
        for e in ELEMENTS.values()
        for width, vector in ((128, _widest(e)), (33, 1), (1, 1))
        for paged in _EITHER
    ],
    "hash_channels": lambda _: [
        hash_defines(e, v, ragged=ragged) for e in ELEMENTS.values() for v in (1, _widest(e)) for ragged in _EITHER
    ],
    "group_channels": lambda _: [{}],
    "channel_norms": lambda _: [
        norms_defines(e, v, power, ragged=ragged)
        for e in ELEMENTS.values()
        for v, power, ragged in product((1, _widest(e)), (1, 2), _EITHER)
    ],
    "fusion_gains": lambda _: [
        gains_defines(e, g, ragged=ragged) for e, g, ragged in product(ELEMENTS.values(), (2, 3, 4, 256), _EITHER)
    ],
    "fuse_channels": lambda _: _fuse_cases(),
    "gram": lambda _: [
        gram_defines(element=e, width=width, centred=centred, aligned=width % 8 == 0 and aligned, ragged=ragged)
        for e, width, centred, aligned, ragged in product(
            _SIXTEEN_BITS, (128, 64, 80, 33, 1, 176, 192, 256), _EITHER, _EITHER, _EITHER
        )
    ],
    "gram_sm90": lambda _: [
        gram_sm90_defines(e, width, ragged=ragged)
        for e, width, ragged in product(_SIXTEEN_BITS, GRAM_SM90_WIDTHS, _EITHER)
    ],
    "gram_simt": lambda _: [
        gram_simt_defines(element=e, width=width, centred=centred, ragged=ragged)
        for e, width, centred, ragged in product(ELEMENTS.values(), (128, 64, 33, 1, 256), _EITHER, _EITHER)
    ],
    "sum_segments": lambda _: [
        sum_defines(e, direction, to_element=direction == ALL, ragged=ragged)
        for e, direction, ragged in product(ELEMENTS.values(), (OWN, ALL, UP_TO, FROM), _EITHER)
        if not (ragged and direction == OWN)
    ],
    "subspace_maps": _subspace_maps_cases,
    "narrow_maps": lambda _: [narrow_defines(e) for e in ELEMENTS.values()],
    "reduce_rows": lambda _: _reduce_rows_cases(),
    "reduce_rows_simt": lambda _: _reduce_rows_simt_cases(),
    "add_mean_scores": lambda _: [
        mean_scores_defines(e, width, vector, adds=adds, ragged=ragged)
        for e in ELEMENTS.values()
        for width, vector, adds in ((128, _widest(e), True), (33, 1, False), (256, _widest(e), True))
        for ragged in _EITHER
    ],
    "decode": _decode_cases,
    "merge_splits": lambda _: [merge_splits_defines(e, width) for e in _SIXTEEN_BITS for width in (1, 64, 128, 256)],
    "expected_gram": lambda _: [
        expected_gram_defines(ELEMENTS[name], width) for name in ("float32", "float64") for width in (1, 128, 256)
    ],
    "rebuild_keys": lambda _: [
        rebuild_defines(e, width, rank, paged=paged)
        for e in ELEMENTS.values()
        for width, rank in ((128, 64), (64, 32), (33, 11), (2, 1), (256, 256))
        for paged in _EITHER
    ],
    "forward_simt": lambda _: _forward_simt_cases(),
    "forward_mma": _forward_mma_cases,
    "forward_sm90": lambda _: _forward_sm90_cases(),
}
