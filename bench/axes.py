"""What is run: the axes, their named presets, and the shapes and options that they multiply out to."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from importlib import import_module
from itertools import product
from typing import Any

import numpy as np

from .. import checks
from ..problem import Problem

METHODS = ("lsh", "subspace")
EXACT: dict[str, Any] = {"group_size": 1}
"""Exact attention, whatever the method."""


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes, element type and mask of one call; letters as in docs/math.md."""

    B: int
    H: int
    kv_heads: int
    N: int
    M: int
    D: int
    E: int
    dtype: str
    causal: bool

    @property
    def label(self) -> str:
        """One line that names the shape; what follows from the rest is left out."""
        sizes = [f"B={self.B} H={self.H}"]
        if self.kv_heads != self.H:
            sizes.append(f"kv_heads={self.kv_heads}")
        sizes.append(f"N={self.N}" if self.M == self.N else f"N={self.N} M={self.M}")
        sizes.append(f"D={self.D}" if self.E == self.D else f"D={self.D} E={self.E}")
        return " ".join([*sizes, self.dtype, "causal" if self.causal else "full"])

    @property
    def array_shapes(self) -> tuple[tuple[int, int, int, int], ...]:
        """Shapes of q, k and v."""
        return (
            (self.B, self.H, self.N, self.D),
            (self.B, self.kv_heads, self.M, self.D),
            (self.B, self.kv_heads, self.M, self.E),
        )

    def problem(self, options: dict[str, Any]) -> Problem:
        """Return the problem of a call with these grouping options; ValueError as the call itself would raise it."""
        q, k, v = (np.empty(shape, dtype_named(self.dtype)) for shape in self.array_shapes)
        return checks.check_attention(
            q,
            k,
            v,
            causal=self.causal,
            scale=None,
            layout="bhnd",
            out=None,
            grouping=checks.check_grouping(q, **({"method": "lsh"} | without_cache(options))),
        )


@dataclass(frozen=True, slots=True)
class Axes:
    """Values of every axis; the run is their product. None follows another axis, the method or the device."""

    N: tuple[int, ...] = (4096,)
    M: tuple[int, ...] | None = None
    B: tuple[int, ...] = (1,)
    H: tuple[int, ...] = (8,)
    kv_heads: tuple[int, ...] | None = None
    D: tuple[int, ...] = (128,)
    E: tuple[int, ...] | None = None
    G: tuple[int, ...] = (1, 2, 4)
    R: tuple[int, ...] = ()
    """Ranks of "subspace", beside those of G."""
    L: tuple[int | None, ...] = (None,)
    dtype: tuple[str, ...] | None = None
    causal: tuple[bool, ...] = (False,)
    method: tuple[str, ...] = METHODS
    fusion: tuple[str, ...] = ("sum",)
    group_by: tuple[str, ...] | None = None
    cached: tuple[bool, ...] = (False,)
    """Whether keys are grouped before the call, which "subspace" can."""

    def shapes(self, default_dtype: str) -> Iterator[Shape]:
        """Yield every shape, longest-running axes last."""
        dtypes = self.dtype or (default_dtype,)
        for dtype, causal, B, H, D, N in product(dtypes, self.causal, self.B, self.H, self.D, self.N):
            for kv_heads, M, E in product(self.kv_heads or (H,), self.M or (N,), self.E or (D,)):
                yield Shape(B=B, H=H, kv_heads=kv_heads, N=N, M=M, D=D, E=E, dtype=dtype, causal=causal)

    def options(self) -> list[dict[str, Any]]:
        """Return the grouping options of every variant; exact attention (G = 1) comes once, as nothing else matters."""
        variants = [EXACT] if 1 in self.G else []
        for method, G in product(self.method, [G for G in self.G if G != 1]):
            own: list[dict[str, Any]] = [{"fusion": fusion} for fusion in self.fusion] if method == "lsh" else [{}]
            cached = [{"cached": True} if x else {} for x in self.cached if not x or method == "subspace"]
            for options, group_by, L, kept in product(own, self.group_by or (None,), self.L, cached):
                grouping = {"group_size": G, "group_by": group_by, "block_size": L}
                variants.append({"method": method, **options, **grouping, **kept})
        ranks = self.R if "subspace" in self.method else ()
        for rank, group_by, L in product(ranks, self.group_by or (None,), self.L):
            variants.append({"method": "subspace", "rank": rank, "group_by": group_by, "block_size": L})
        return variants


@dataclass(frozen=True, slots=True)
class Preset:
    """Axes under one name."""

    axes: tuple[Axes, ...]
    threads: int | None = None
    """CPU threads; None: not fixed."""


# a rank of 62 leaves two of its 64 padded columns to the Hopper forward, 30 two of 32
_SERVING = Axes(H=(16, 32), kv_heads=(8,), G=(1, 2), R=(62, 30), L=(1024,), dtype=("float16",), causal=(False, True))
# what block sizes are chosen, in the middle of that grid
_CHOSEN_BLOCKS = replace(_SERVING, H=(32,), L=(None,))
_NARROW = replace(
    _SERVING, B=(1,), H=(32,), N=(16384,), D=(64,), G=(1,), R=(30, 14), L=(960, 1024), method=("subspace",)
)

PRESETS = {
    "main": Preset((Axes(B=(2,), H=(16,), N=(8192,), dtype=("float16",)),)),
    "paper": Preset(
        (
            Axes(
                H=(10,),
                N=tuple(1024 * n for n in (2, 4, 8, 10, 20, 40)),
                D=(32, 64, 128),
                dtype=("float16",),
            ),
        )
    ),
    # 16k and 32k tokens of prompts, as several short ones and as a long one
    "serving": Preset(
        (
            replace(_SERVING, B=(4, 8), N=(4096,)),
            replace(_SERVING, B=(1,), N=(16384, 32768)),
            replace(_CHOSEN_BLOCKS, B=(4,), N=(4096,)),
            replace(_CHOSEN_BLOCKS, B=(1,), N=(16384,)),
        )
    ),
    # narrow heads; blocks of 960 keys are whole tiles of 96
    "narrow": Preset((_NARROW,)),
    # a step of eight requests of 32k tokens each; blocks of 2040 leave 128 keys as they are, the others a whole block
    "decode": Preset(
        (
            Axes(
                B=(8,),
                H=(32,),
                kv_heads=(8,),
                N=(1,),
                M=(32768,),
                L=(128, 512, 1024, 2040),
                dtype=("float16",),
                method=("subspace",),
                cached=(True,),
            ),
        )
    ),
    "cpu": Preset((Axes(dtype=("float32",)),), threads=2),
}


def multiply_out(axes: Iterable[Axes], default_dtype: str) -> list[tuple[Shape, list[dict[str, Any]]]]:
    """Return every shape with the options of its variants, or raise the ValueError of the first that is no problem.

    Options that come to the same problem, such as a block size and the default, are one variant.
    """
    found: dict[Shape, dict[tuple[Problem, bool], dict[str, Any]]] = {}
    for some in axes:
        for shape in some.shapes(default_dtype):
            variants = found.setdefault(shape, {})
            for options in some.options():
                variants.setdefault((shape.problem(options), is_cached(options)), options)
    return [(shape, list(variants.values())) for shape, variants in found.items()]


def is_cached(options: dict[str, Any]) -> bool:
    """Whether a variant groups its keys before the call."""
    return bool(options.get("cached", False))


def without_cache(options: dict[str, Any]) -> dict[str, Any]:
    """Return the grouping options alone."""
    return {name: value for name, value in options.items() if name != "cached"}


def dtype_named(name: str) -> np.dtype[Any]:
    """Return the NumPy dtype; bfloat16 is the one of ml_dtypes."""
    scalar: Any = import_module("ml_dtypes").bfloat16 if name == "bfloat16" else name
    dtype: np.dtype[Any] = np.dtype(scalar)
    return dtype
