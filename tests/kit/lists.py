"""The calls that the implementations are compared on, by what each list is there to break."""

from __future__ import annotations

from itertools import product
from typing import Any

from .cases import Case

BY = ("queries", "keys")


def grouping(width: int) -> int:
    """Return a group size that divides the width, 1 only for width 1."""
    return next((g for g in (2, 3, 5, 7) if width % g == 0), width)


# what models call: equal lengths, whole tiles, real widths
REGULAR = [
    Case(B=2, H=4, H_kv=4, N=256, M=256, D=128, E=128, dtype=dtype, causal=causal, by=by)
    for dtype in ("float16", "bfloat16")
    for causal in (False, True)
    for by in ("queries", "keys")
]

# rows around the edges of 64- and 128-row tiles; M < N leaves queries without a key; each pair with and without a limit
TAILS = [
    Case(N=N, M=M, causal=causal, by="keys" if (i + j + bool(causal)) % 2 else "queries")
    for i, N in enumerate((1, 63, 64, 65, 127, 128, 129, 1000))
    for j, M in enumerate((0, 1, 63, 64, 65, 127, 128, 129, 1000))
    for causal in (False, "bottom-right" if (i + j) % 3 else "top-left")
]

# widths that are whole 16-element steps, that are not, that are odd, and E apart from D
WIDTHS = [
    *(
        Case(N=130, M=150, D=width, E=width, G=grouping(width), by="keys" if i % 2 else "queries")
        for i, width in enumerate((16, 32, 40, 64, 72, 80, 96, 128, 160, 192, 256, 33, 7, 1))
    ),
    *(
        Case(N=70, M=150, D=D, E=E, G=grouping(D), causal=True)
        for D, E in ((64, 128), (128, 64), (192, 128), (40, 33), (256, 1), (8, 256))
    ),
    # float32 and float64 take other kernels
    *(Case(N=70, M=90, D=D, E=E, G=grouping(D), dtype="float32") for D, E in ((33, 33), (128, 40), (7, 1), (256, 256))),
    Case(N=70, M=90, D=192, E=256, G=2, dtype="float64", fusion="lstsq"),
]

# every dtype with every way of grouping
FEATURES = [
    Case(N=200, M=333, dtype=dtype, by=by, fusion=fusion, causal=causal, L=64)
    for dtype in ("float16", "bfloat16", "float32", "float64")
    for by in ("queries", "keys")
    for fusion in ("sum", "lstsq")
    for causal in (False, True)
]

BLOCKS = [
    # one row a block; blocks that cut tiles; whole tiles; one block longer than everything
    *(
        Case(N=200, M=230, H=2, H_kv=2, L=L, by=by, causal=causal)
        for L in (1, 100, 128, 1024)
        for by in ("queries", "keys")
        for causal in (False, True)
    ),
    # many groups of one block, and one group of all channels
    *(Case(N=200, M=230, G=G, by=by, fusion="lstsq") for G in (1, 4, 8, 64) for by in ("queries", "keys")),
]

# query heads that share key heads, and with them maps and norms
HEADS = [
    Case(B=2, H=6, H_kv=H_kv, N=100, M=140, by=by, fusion=fusion, causal=True)
    for H_kv in (1, 2, 3, 6)
    for by in ("queries", "keys")
    for fusion in ("sum", "lstsq")
]

# strides and addresses that 16-byte loads cannot take, and that they can; the value width alone unaligned
MEMORY = [
    *(
        Case(N=100, M=140, layout=layout, memory=memory, by=by)
        for layout in ("bhnd", "bnhd")
        for memory in ("contiguous", "strided", "unaligned")
        for by in ("queries", "keys")
        if (layout, memory) != ("bhnd", "contiguous")
    ),
    Case(N=100, M=140, layout="bnhd", memory="unaligned", G=1),
    Case(N=100, M=140, layout="bnhd", memory="strided", dtype="float32"),
    Case(N=100, M=140, memory="unaligned", dtype="float32"),
    Case(N=100, M=140, E=36),
]

# so few tiles of queries that the Hopper forward splits their keys, into whole tiles and what is left
FEW_QUERIES = [
    Case(N=N, M=M, D=D, E=E, H=H, G=1, dtype=dtype)
    for N, M, D, E, H, dtype in (
        (9, 6000, 64, 64, 2, "float16"),
        (130, 8192, 128, 128, 2, "bfloat16"),
        (300, 6001, 128, 128, 2, "float16"),
        (200, 5000, 128, 64, 4, "float16"),
        (64, 7000, 48, 96, 2, "float16"),
        (1400, 4999, 64, 64, 14, "float16"),
    )
]

# scales for which the largest score is not the largest product; seeds
NUMBERS = [
    *(
        Case(N=100, M=140, scale=scale, causal=True, dtype=dtype)
        for scale in (0.0, -0.2, 1.0)
        for dtype in ("float16", "float32")
    ),
    *(Case(N=100, M=140, seed=seed) for seed in (1, 2, 2**40)),
]

ALL = [*REGULAR, *TAILS, *WIDTHS, *FEATURES, *BLOCKS, *HEADS, *MEMORY, *NUMBERS]

# each kernel once, ragged, for the compute-sanitizer, under which a case takes seconds
SMALL: list[Case] = [
    *(
        Case(N=70, M=150, D=64, E=64, L=32, dtype=dtype, by=by, fusion=fusion, causal=causal)
        for dtype, by, fusion, causal in (
            ("float16", "queries", "sum", True),
            ("float16", "keys", "lstsq", False),
            ("bfloat16", "queries", "lstsq", False),
            ("float32", "queries", "sum", True),
            ("float64", "keys", "lstsq", False),
        )
    ),
    Case(N=130, M=150, D=128, E=128, G=1, causal=True),
    Case(N=70, M=90, D=33, E=7, G=3),
]

# for a backend that takes seconds to compile a kernel: few widths, each feature once
FEW: list[Case] = [
    *(
        Case(N=70, M=90, D=32, E=32, H=2, H_kv=1, L=64, dtype=dtype, by=by, fusion=fusion, causal=causal)
        for dtype, by, fusion, causal in (
            ("float16", "queries", "sum", False),
            ("float16", "keys", "lstsq", True),
            ("float32", "queries", "lstsq", True),
            ("float32", "keys", "sum", False),
            ("float64", "queries", "lstsq", False),
            ("float64", "keys", "lstsq", True),
        )
    ),
    *(
        Case(N=N, M=M, D=32, E=32, H=2, H_kv=1, L=64, dtype="float32", by="keys")
        for N, M in ((1, 129), (129, 1), (33, 0))
    ),
    Case(N=70, M=90, D=33, E=7, G=3, dtype="float32"),
    Case(N=70, M=90, D=128, E=128, G=4, dtype="float16"),
    Case(N=70, M=90, D=32, E=32, H=2, H_kv=1, G=1, dtype="float32", causal=True),
    Case(N=70, M=90, D=32, E=32, H=2, H_kv=1, L=64, dtype="float32", layout="bnhd", memory="strided"),
]


def subspace(**fields: Any) -> Case:
    """Return a case of the subspace method; ``**fields`` are those of `Case`."""
    return Case(**({"method": "subspace", "N": 150, "M": 180, "L": 64} | fields))


# every dtype with every way of cutting blocks; a query's own block lies elsewhere with each alignment
SUBSPACE_FEATURES = [
    subspace(H=4, dtype=dtype, by=by, causal=causal)
    for dtype in ("float16", "bfloat16", "float32", "float64")
    for by in ("queries", "keys")
    for causal in (False, "bottom-right", "top-left")
]

SUBSPACE_OPTIONS = [
    # no refinement and several; ranks that are no multiple of a tensor-core step, and of one column
    *(
        subspace(dtype=dtype, by=by, refine=refine)
        for dtype in ("float16", "float32")
        for by in BY
        for refine in (0, 3)
    ),
    *(subspace(by=by, rank=rank, causal=True) for by in BY for rank in (1, 11, 48, 63)),
    # ranks that differ between blocks, some of them all of the width
    *(
        subspace(dtype=dtype, by=by, score_tol=0.3, causal=by == "keys")
        for dtype in ("float16", "float64")
        for by in BY
    ),
    *(subspace(by=by, score_tol=tol, D=40) for by in BY for tol in (1e-6, 100.0)),
    # scales that tensor cores do not take
    *(
        subspace(dtype=dtype, by=by, scale=-0.2, causal=True)
        for dtype in ("float16", "bfloat16", "float32")
        for by in BY
    ),
]

# ranks that leave columns of padding free, in which the Hopper forward keeps what it subtracts
SUBSPACE_PADDED = [
    subspace(N=300, M=500, L=128, D=D, E=E, rank=rank, dtype=dtype, by="keys", causal=causal)
    for D, E, rank in ((64, 64, 30), (128, 128, 62), (128, 64, 94), (128, 128, 126))
    for dtype in ("float16", "bfloat16")
    for causal in (False, True)
]

# own blocks that begin inside a tile, that a tile holds several of, and that rows share with none or all
SUBSPACE_BLOCKS = [
    subspace(N=N, M=M, L=L, dtype=dtype, by="keys", causal=causal)
    for N, M in ((200, 230), (230, 200))
    for L in (1, 16, 100, 128, 1024)
    for dtype in ("float16", "float32")
    for causal in ("bottom-right", "top-left")
]

# rows around the edges of tiles; M < N leaves queries without a key, or behind all blocks
# tiles of 96 keys
SUBSPACE_WIDE_TILES = [
    subspace(N=300, M=500, L=L, dtype=dtype, by="keys", causal=causal, **of_rank)
    for L, of_rank in ((192, {"rank": 30}), (96, {}), (192, {"rank": 44}), (96, {"score_tol": 0.3}))
    for dtype in ("float16", "bfloat16")
    for causal in (False, True)
]
SUBSPACE_TAILS = [
    subspace(N=N, M=M, by="keys" if (i + j) % 3 else "queries", causal=causal, dtype="float32" if j % 2 else "float16")
    for i, N in enumerate((1, 63, 64, 65, 129))
    for j, M in enumerate((0, 1, 63, 64, 65, 129))
    for causal in ("bottom-right", "top-left")
]

# query heads that share key heads, and with them maps
SUBSPACE_HEADS = [
    subspace(B=2, H=6, H_kv=H_kv, N=70, M=90, L=32, by=by, dtype=dtype, causal=True)
    for H_kv in (1, 3, 6)
    for by in BY
    for dtype in ("float16", "float32")
]

SUBSPACE_MEMORY = [
    subspace(layout=layout, memory=memory, by=by, causal=by == "keys", dtype=dtype)
    for layout in ("bhnd", "bnhd")
    for memory in ("contiguous", "strided", "unaligned")
    for by in BY
    for dtype in ("float16", "float32")
    if (layout, memory) != ("bhnd", "contiguous")
]

SUBSPACE_WIDTHS = [
    subspace(
        N=70, M=90, L=32, D=D, E=E, rank=max(D // 2, 1), by="keys" if i % 2 else "queries", causal=True, dtype=dtype
    )
    for dtype in ("float16", "float32", "float64")
    for i, (D, E) in enumerate(
        ((16, 16), (32, 32), (80, 80), (96, 64), (128, 128), (192, 128), (256, 256), (33, 7), (2, 3), (7, 256))
    )
]

SUBSPACE = [
    *SUBSPACE_FEATURES,
    *SUBSPACE_OPTIONS,
    *SUBSPACE_PADDED,
    *SUBSPACE_BLOCKS,
    *SUBSPACE_WIDE_TILES,
    *SUBSPACE_TAILS,
    *SUBSPACE_HEADS,
    *SUBSPACE_MEMORY,
    *SUBSPACE_WIDTHS,
]

# for the compute-sanitizer: each kernel once, ragged
SUBSPACE_SMALL = [
    *(
        subspace(N=70, M=90, L=32, dtype=dtype, by=by, causal=causal)
        for dtype in ("float16", "float32", "float64")
        for by in BY
        for causal in (False, True)
    ),
    # whole tiles, for the forward on Hopper
    *(
        subspace(N=70, M=200, L=L, D=D, E=D, rank=rank, by="keys", causal=causal)
        for L, D, rank in ((64, 64, 16), (96, 64, 32), (128, 128, 62))
        for causal in (False, True)
    ),
    subspace(N=70, M=90, L=32, D=33, E=7, rank=11, by="keys", causal="top-left"),
    subspace(N=70, M=90, L=32, score_tol=0.3, dtype="bfloat16", by="keys", causal=True),
    subspace(N=70, M=90, L=32, scale=-0.2, by="queries"),
]

# one option, each in another guise: windows of one key, of both sides and of one; caps that all scores reach, and few;
# tables that repeat along some axes, in either dtype
ONE_SCORE_OPTION: list[dict[str, Any]] = [
    {"window": (0, 0)},
    {"window": (70, 30)},
    {"window": (None, 20)},
    {"window": (90, None)},
    {"softcap": 0.5},
    {"softcap": 20.0},
    {"mask": "bhnm"},
    {"mask": "m"},
    {"bias": "hnm"},
    {"bias": "bm", "bias_dtype": "float32"},
]
ALL_SCORE_OPTIONS = {"window": (150, 60), "softcap": 3.0, "mask": "nm", "bias": "bhnm", "bias_dtype": "float32"}
CAUSAL = (False, "bottom-right", "top-left")


def with_score_options(dtypes: tuple[str, ...], ways: list[dict[str, Any]], sizes: dict[str, int]) -> list[Case]:
    """Return every dtype, way of grouping and causal limit with one option, and every way with all of them."""
    one = [
        Case(**sizes, **way, **ONE_SCORE_OPTION[number % len(ONE_SCORE_OPTION)], dtype=dtype, causal=causal)
        for number, (causal, way, dtype) in enumerate(product(CAUSAL, ways, dtypes))
    ]
    every = [
        Case(**sizes, **way, **ALL_SCORE_OPTIONS, dtype=dtype, causal=CAUSAL[number % 3])
        for number, (way, dtype) in enumerate(product(ways, dtypes))
    ]
    return one + every


DTYPES = ("float16", "bfloat16", "float32", "float64")
OPTION_SIZES = {"B": 2, "H": 2, "H_kv": 1, "N": 150, "M": 333, "L": 100}
LSH_WAYS = [{"G": 1}, {"by": "queries"}, {"by": "keys", "fusion": "lstsq"}]
SUBSPACE_WAYS = [{"method": "subspace", "by": by} for by in BY]
# rows around the edges of tiles, where windows and masks begin and end too; M < N leaves queries without a key
OPTION_TAILS = [
    Case(N=N, M=M, G=1, causal=CAUSAL[(i + j) % 3], dtype=dtype, **options)
    for dtype in ("float16", "float32")
    for i, N in enumerate((2, 64, 65, 129, 300))
    for j, M in enumerate((1, 63, 64, 129, 400))
    for options in ({"window": (64, 0), "mask": "hnm"}, ALL_SCORE_OPTIONS)
]
SCORE_OPTIONS = [
    *with_score_options(DTYPES, LSH_WAYS, OPTION_SIZES),
    *OPTION_TAILS,
    # wide and odd rows take smaller tiles
    *(
        Case(N=70, M=150, D=D, E=E, G=1, causal=True, **ALL_SCORE_OPTIONS, dtype=dtype)
        for D, E in ((33, 7), (128, 128), (64, 192), (256, 256))
        for dtype in ("float16", "float32")
    ),
    # one query, as in decoding: the masks of cases hide all from the first where they have rows
    *(Case(N=1, M=M, causal=True, window=(100, None), softcap=2.0, mask="hm", bias="m") for M in (64, 129, 400)),
    # a negative scale takes 16 bits to CUDA cores
    Case(N=70, M=150, scale=-0.2, **ALL_SCORE_OPTIONS),
    # options that a query's own key does not reach
    Case(N=100, M=40, causal="bottom-right", window=(0, None), mask="m"),
    Case(N=40, M=300, window=(10, 0), softcap=1.0, by="keys"),
]
SUBSPACE_SCORE_OPTIONS = with_score_options(DTYPES, SUBSPACE_WAYS, OPTION_SIZES)
FEW_SCORE_OPTIONS = [
    Case(N=70, M=90, D=32, E=32, H=2, H_kv=1, L=64, dtype=dtype, **way, **ALL_SCORE_OPTIONS, causal=causal)
    for dtype, way, causal in (
        ("float32", {"G": 1}, True),
        ("float32", {"by": "keys"}, False),
        ("float16", {"by": "queries"}, "top-left"),
    )
]
