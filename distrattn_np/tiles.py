"""Tile sizes of the CUDA kernels, the -D options that carry them, and the sets that the compile tests build."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .problem import ceil_div

Defines = dict[str, int]

ELEMENTS = {"float16": 1, "bfloat16": 2, "float32": 3, "float64": 4}
"""Values of -DELEMENT, as in raw_kernels/element.cuh."""

NO_MAP, SAMPLE, FUSE = 0, 1, 2
"""Values of -DQUERY_MAP of forward_mma.cu."""


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

    def shared_bytes(self, width: int, rank: int, value_width: int, query_map: int) -> int:
        """Return the dynamic shared memory of a block: Q, Q before its map, and two stages of K and V."""
        raw = 0 if query_map == NO_MAP else self.block_q * (ceil_div(width, 8) * 8 + 8)
        stage = self.block_kv * (pad(rank) + 8 + pad(value_width) + 8)
        return 2 * (raw + self.block_q * (pad(rank) + 8) + 2 * stage)

    def accumulators(self, value_width: int) -> int:
        """Return the registers of a thread that hold its part of O and S."""
        return self.block_q // self.num_warps * (pad(value_width) + self.block_kv) // 32


# From the fastest to the smallest. 32 rows a warp halve the shared-memory reads of K and V for each product; wide
# values leave registers for 16.
_MMA_TILES = (MmaTiles(128, 64, 4), MmaTiles(128, 64, 8), MmaTiles(64, 64, 4), MmaTiles(64, 32, 4), MmaTiles(32, 32, 2))
_MAX_ACCUMULATORS = 192


def mma_tiles(width: int, rank: int, value_width: int, query_map: int, shared_limit: int) -> MmaTiles:
    """Return the first tiles that fit the registers and the ``shared_limit`` bytes of a block."""
    for tiles in _MMA_TILES:
        fits_shared = tiles.shared_bytes(width, rank, value_width, query_map) <= shared_limit
        if fits_shared and tiles.accumulators(value_width) <= _MAX_ACCUMULATORS:
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
    aligned: bool,
) -> Defines:
    """Return the -D options of forward_mma.cu."""
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
        "ALIGNED": int(aligned),
        "BLOCK_Q": tiles.block_q,
        "BLOCK_KV": tiles.block_kv,
        "NUM_WARPS": tiles.num_warps,
        "LAUNCH_SHARED_BYTES": tiles.shared_bytes(width, rank, value_width, query_map),
    }


def compile_cases(stem: str) -> list[Defines]:
    """Return -D sets that together reach every branch and tile of a kernel, for the tests that compile without a GPU."""
    cases = {"forward_mma": _forward_mma_cases}
    return list(cases[stem]()) if stem in cases else []


def _forward_mma_cases() -> Iterator[Defines]:
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
    ]
    for number, (width, group_size, value_width, query_map) in enumerate(shapes):
        for shared_limit in (99 << 10, 227 << 10):
            tiles = mma_tiles(width, width // group_size, value_width, query_map, shared_limit)
            yield mma_defines(
                tiles,
                element=ELEMENTS["bfloat16" if number % 3 == 1 else "float16"],
                width=width,
                rank=width // group_size,
                value_width=value_width,
                query_map=query_map,
                group_size=group_size,
                with_gains=number % 2 == 1,
                keys_per_item=query_map == SAMPLE,
                causal=shared_limit == 99 << 10,
                aligned=width % 8 == 0 and value_width % 8 == 0,
            )
