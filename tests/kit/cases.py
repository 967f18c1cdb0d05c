"""One attention call as plain data, its inputs, its truth in float64, and what plain arithmetic makes of it."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, fields
from typing import Any

import ml_dtypes
import numpy as np
from distrattn_np.reference.distr_attention import rows_that_meet
from distrattn_np.reference.score_options import NO_OPTIONS

from distrattn_np import checks, reference
from distrattn_np.backends import Maps
from distrattn_np.problem import Grouping, GroupMaps, Problem, Subspace, SubspaceMaps, block_edges

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)

HASH_MARGIN = 1e-6
"""A dot product below this part of |x| |g| may fall on either side of zero: 16 x the rounding of a float32 sum."""
WEIGHT_MARGIN = 1e-4
"""Two |x_j| |y_j| closer than this may be ordered either way; float32 sums over 1000 rows are good to about 1e-5."""


@dataclass(frozen=True)
class Case:
    """Sizes and options of one call; letters as in docs/math.md. ``str(case)`` is its id: what is not the default."""

    B: int = 1
    H: int = 2
    H_kv: int = 2
    N: int = 200
    M: int = 200
    D: int = 64
    E: int = 64
    dtype: str = "float16"
    G: int = 2
    L: int = 128
    by: str = "queries"
    fusion: str = "sum"
    method: str = "lsh"
    rank: int | None = None
    """Instead of G."""
    score_tol: float | None = None
    """Instead of G and rank."""
    refine: int = 1
    causal: bool | str = False
    scale: float | None = None
    window: tuple[int | None, int | None] | None = None
    softcap: float = 0.0
    mask: str | None = None
    """Those axes of "bhnm" that are not one in the mask; None: no mask."""
    bias: str | None = None
    """The same of the bias."""
    bias_dtype: str | None = None
    """None: the dtype of the case."""
    layout: str = "bhnd"
    memory: str = "contiguous"
    """"strided": every second row of a wider buffer. "unaligned": rows start at odd elements."""
    seed: int = 0

    def __str__(self) -> str:
        shown = [f"{f.name}={getattr(self, f.name)}" for f in fields(self) if f.name in "NMDE"]
        shown += [
            f"{f.name}={getattr(self, f.name)}"
            for f in fields(self)
            if f.name not in "NMDE" and getattr(self, f.name) != f.default
        ]
        return "-".join(shown)

    @property
    def numpy_dtype(self) -> np.dtype:
        """The dtype that the name stands for."""
        return BFLOAT16 if self.dtype == "bfloat16" else np.dtype(self.dtype)

    @property
    def attention_options(self) -> dict[str, Any]:
        """Keywords of `exact_attention`."""
        given = {
            "window": self.window,
            "softcap": self.softcap or None,
            "mask": self.mask_array,
            "bias": self.bias_array,
        }
        used = {name: value for name, value in given.items() if value is not None}
        return {"causal": self.causal, "scale": self.scale, "layout": self.layout} | used

    @property
    def mask_array(self) -> np.ndarray | None:
        """A mask that shows three keys in four, except to the first query and, from 300 keys on, those 20 to 219."""
        if self.mask is None:
            return None
        mask = np.random.default_rng([self.seed, 1]).random(self._score_axes(self.mask)) < 0.75
        if "n" in self.mask:
            mask[..., :1, :] = False
        if "m" in self.mask and self.M >= 300:
            mask[..., 20:220] = False
        return mask

    @property
    def bias_array(self) -> np.ndarray | None:
        """A bias of a few nats that hides one key in ten."""
        if self.bias is None:
            return None
        rng = np.random.default_rng([self.seed, 2])
        bias = rng.normal(scale=2, size=self._score_axes(self.bias))
        bias[rng.random(bias.shape) < 0.1] = -np.inf
        return bias.astype(BFLOAT16 if (self.bias_dtype or self.dtype) == "bfloat16" else self.bias_dtype or self.dtype)

    @property
    def score_options(self) -> reference.ScoreOptions:
        """What the reference takes."""
        return reference.ScoreOptions(self.window or (None, None), self.softcap, self.mask_array, self.bias_array)

    def _score_axes(self, letters: str) -> tuple[int, ...]:
        sizes = {"b": self.B, "h": self.H, "n": self.N, "m": self.M}
        return tuple(size if letter in letters else 1 for letter, size in sizes.items())

    @property
    def options(self) -> dict[str, Any]:
        """Keywords of `distr_attention`."""
        common = self.attention_options | {"method": self.method, "block_size": self.L, "group_by": self.by}
        if self.method == "lsh":
            return common | {"group_size": self.G, "fusion": self.fusion, "seed": self.seed}
        if self.score_tol is not None:
            return common | {"score_tol": self.score_tol, "refine": self.refine}
        if self.rank is not None:
            return common | {"rank": self.rank, "refine": self.refine}
        return common | {"group_size": self.G, "refine": self.refine}

    def problem(self, q: Any, k: Any, v: Any) -> Problem:
        """Return the checked problem for arrays in this case's layout."""
        return problem_of(q, k, v, **self.options)

    def native_problem(self, inputs: Inputs) -> Problem:
        """Return the checked problem for `make_inputs`, as backends see it."""
        return problem_of(*inputs, **(self.options | {"layout": "bhnd"}))


def problem_of(q: Any, k: Any, v: Any, **options: Any) -> Problem:
    """Return what `distr_attention` would hand to its backend."""
    of_grouping = set(inspect.signature(checks.check_grouping).parameters) & set(options)
    grouping = checks.check_grouping(q, **{name: options.pop(name) for name in of_grouping})
    defaults = {"causal": False, "scale": None, "layout": "bhnd", "out": None}
    return checks.check_attention(q, k, v, grouping=grouping, **(defaults | options))


@dataclass(frozen=True)
class Inputs:
    """q, k, v as (B, H, rows, width) NumPy arrays, whatever the layout of the case."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray

    def __iter__(self) -> Any:
        return iter((self.q, self.k, self.v))

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:  # noqa: ARG002
        """Keep Hypothesis's reports short."""
        printer.text(", ".join(str(x.tolist()) if x.size <= 16 else f"array of shape {x.shape}" for x in self))


def make_inputs(case: Case) -> Inputs:
    """Return normal random inputs on which no hash bit and no choice of a first member hangs on rounding."""
    rng = np.random.default_rng([case.seed, case.B, case.H, case.H_kv, case.N, case.M, case.D, case.E])

    def draw(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, dtype=np.float32).astype(case.numpy_dtype)

    q = draw(case.B, case.H, case.N, case.D)
    k = draw(case.B, case.H_kv, case.M, case.D)
    v = draw(case.B, case.H_kv, case.M, case.E)
    problem = case.native_problem(Inputs(q, k, v))
    for _ in range(100):
        unsafe = unsafe_channels(problem, q, k)
        if not unsafe:
            return Inputs(q, k, v)
        grouped = q if case.by == "queries" else k
        for b, h, rows, j in unsafe:
            grouped[b, h, rows, j] = draw(rows.stop - rows.start)
    raise AssertionError(f"{case}: no inputs whose groups are safe from rounding")


def unsafe_channels(problem: Problem, q: np.ndarray, k: np.ndarray) -> list[tuple[int, int, slice, int]]:
    """Return (batch, head, rows of the block, channel) wherever rounding could change a group or its first member."""
    g = problem.grouping
    if not isinstance(g, Grouping):
        return []
    planes = reference.hyperplanes(g.seed, g.block_size).astype(np.float64)
    grouped = q if g.by == "queries" else k
    found = []
    for b, h in np.ndindex(grouped.shape[:2]):
        for start, stop in block_edges(grouped.shape[2], g.block_size):
            X = grouped[b, h, start:stop].astype(np.float64)
            found += [(b, h, slice(start, stop), int(j)) for j in unsafe_hashes(X, planes)]
            if g.fusion == "lstsq":
                first, last = rows_that_meet(
                    start, stop, group_by=g.by, N=problem.queries, M=problem.keys, causal_offset=problem.causal_offset
                )
                shared = problem.heads_per_kv_head
                others = (
                    k[b, [h // shared], first:last]
                    if g.by == "queries"
                    else q[b, h * shared : (h + 1) * shared, first:last]
                )
                order = reference.group_channels(reference.hash_channels(X, planes))
                found += [
                    (b, h, slice(start, stop), int(j))
                    for j in unsafe_firsts(X, others.reshape(-1, problem.width).astype(np.float64), order, g.group_size)
                ]
    return found


def unsafe_hashes(X: np.ndarray, planes: np.ndarray) -> np.ndarray:
    """Return the channels with a dot product within rounding of zero; one that is all zero is safe."""
    planes = planes[: len(X)]
    dots = np.abs(X.T @ planes)
    lengths = np.linalg.norm(X, axis=0)[:, None] * np.linalg.norm(planes, axis=0)
    return np.flatnonzero(((dots < HASH_MARGIN * lengths) & (lengths > 0)).any(axis=1))


def unsafe_firsts(X: np.ndarray, Y: np.ndarray, order: np.ndarray, group_size: int) -> np.ndarray:
    """Return the heaviest channel of every group in which two weights nearly tie; no weight at all is safe."""
    weights = (np.square(X).sum(axis=0) * np.square(Y).sum(axis=0))[order.reshape(-1, group_size)]
    ranked = np.sort(weights, axis=1)
    tied = (ranked[:, -1] > 0) & (ranked[:, -1] - ranked[:, -2] < WEIGHT_MARGIN * ranked[:, -1])
    groups = order.reshape(-1, group_size)[tied]
    return np.take_along_axis(groups, weights[tied].argmax(axis=1)[:, None], axis=1)[:, 0]


def reference_maps(problem: Problem, q: np.ndarray, k: np.ndarray, dtype: Any = None) -> Maps:
    """Return the reference's maps as every backend holds them; None for exact attention.

    Float32, but dense ones float64 for float64 arrays, unless ``dtype`` says otherwise.
    """
    g = problem.grouping
    if g is None:
        return None
    if isinstance(g, Subspace):
        maps = reference.make_maps(q, k, **problem.map_options)
        dtype = dtype or (np.float64 if q.dtype == np.float64 else np.float32)
        return SubspaceMaps(*(x if x.dtype == np.int32 else x.astype(dtype) for x in maps))
    channels, gains = reference.group_maps(q, k, **problem.map_options)
    return GroupMaps(channels, None if gains is None else gains.astype(dtype or np.float32))


def truth(
    problem: Problem,
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    maps: Maps,
    options: reference.ScoreOptions = NO_OPTIONS,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the reference's result and lse in float64 for these very inputs and maps."""
    g = problem.grouping
    if g is None or maps is None:
        return reference.exact_attention(
            q, k, v, scale=problem.scale, causal_offset=problem.causal_offset, options=options
        )
    if isinstance(maps, SubspaceMaps):
        return reference.subspace_attention(
            q,
            k,
            v,
            reference.Maps(maps.sampling, maps.fusion, maps.key_mean, maps.ranks, maps.score_errors),
            scale=problem.scale,
            block_size=g.block_size,
            group_by=g.by,
            causal_offset=problem.causal_offset,
            options=options,
        )
    return reference.distr_attention(
        q,
        k,
        v,
        scale=problem.scale,
        group_size=g.group_size,
        block_size=g.block_size,
        group_by=g.by,
        fusion=g.fusion,
        seed=g.seed,
        causal_offset=problem.causal_offset,
        options=options,
        maps=(maps.channels, maps.gains),
    )


def plain(
    problem: Problem,
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    maps: Maps,
    options: reference.ScoreOptions = NO_OPTIONS,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the same in plain NumPy of the inputs' precision: float32 sums, every step's result rounded to the dtype.

    The yardstick of the 16-bit rule: nobody would call this computation wrong, so twice its error is not wrong either.
    """
    dtype = q.dtype

    def rounded(x: np.ndarray) -> np.ndarray:
        return x.astype(dtype).astype(np.float32)

    q, k, v = (x.astype(np.float32) for x in (q, k, v))
    B, H, N, _ = q.shape
    out = np.zeros((B, H, N, v.shape[3]), np.float32)
    lse = np.full((B, H, N), -np.inf, np.float32)
    seen = reference.visible_keys(N, problem.keys, problem.causal_offset, options.window)
    g = problem.grouping
    for b, h in np.ndindex(B, H):
        h_kv = h // problem.heads_per_kv_head
        S = np.zeros((N, problem.keys), np.float32)
        if g is None or maps is None:
            S[...] = q[b, h] @ k[b, h_kv].T
        else:
            K = k[b, h_kv]
            if isinstance(maps, SubspaceMaps):
                K = rounded(K - maps.key_mean[b, h_kv])
            X, Y = (q[b, h], K) if g.by == "queries" else (K, q[b, h])
            for c, (start, stop) in enumerate(block_edges(problem.grouped_rows, g.block_size)):
                W, Z = dense_maps(problem, maps, b, h if g.by == "queries" else h_kv, c)
                if isinstance(maps, SubspaceMaps):  # operands of products, as the rows are
                    W, Z = rounded(W), rounded(Z)
                block = rounded(X[start:stop] @ W) @ rounded(Y @ Z).T
                S[(slice(start, stop), slice(None)) if g.by == "queries" else (slice(None), slice(start, stop))] = (
                    block if g.by == "queries" else block.T
                )
            if problem.own_block_is_exact:
                own = (
                    np.arange(problem.keys) // g.block_size
                    == (np.arange(N) + problem.causal_offset)[:, None] // g.block_size
                )
                S = np.where(own, q[b, h] @ K.T, S)
        S = rounded(np.float32(problem.scale) * S)
        shift = 0
        if isinstance(maps, SubspaceMaps):
            shift = np.float32(problem.scale) * (q[b, h] @ maps.key_mean[b, h_kv])
            if options.softcap:
                S, shift = S + shift[:, None], 0
        S = np.where(seen, rounded(options.apply(S, b, h)), -np.inf).astype(np.float32)
        row_max = S.max(axis=1, initial=-np.inf, keepdims=True)
        row_max = np.where(row_max == -np.inf, np.float32(0), row_max)
        P = np.exp(S - row_max)
        row_sum = P.sum(axis=1, keepdims=True)
        P = rounded(np.divide(P, row_sum, out=np.zeros_like(P), where=row_sum != 0))
        out[b, h] = P @ v[b, h_kv]
        with np.errstate(divide="ignore"):
            lse[b, h] = np.log(row_sum[:, 0]) + row_max[:, 0] + shift
    return out.astype(dtype), lse


def dense_maps(problem: Problem, maps: GroupMaps | SubspaceMaps, b: int, h: int, c: int) -> tuple[np.ndarray, ...]:
    """Return W and Z of one block as matrices (D, R), float32, whatever the method (eq. 4)."""
    if isinstance(maps, SubspaceMaps):
        return maps.sampling[b, h, c], maps.fusion[b, h, c]
    order, r = maps.channels[b, h, c], np.arange(problem.rank)
    G = problem.width // problem.rank
    W, Z = np.zeros((2, problem.width, problem.rank), np.float32)
    W[order[::G], r] = 1
    Z[order, np.repeat(r, G)] = 1 if maps.gains is None else maps.gains[b, h, c]
    return W, Z


def in_memory(array: np.ndarray, case: Case) -> np.ndarray:
    """Return a copy of a (B, H, rows, width) array as a view in the case's layout, laid out in memory as it says."""
    array = array.transpose(0, 2, 1, 3) if case.layout == "bnhd" else array
    b, x, y, width = array.shape
    if case.memory == "contiguous":
        view = np.empty_like(array, order="C")
    elif case.memory == "strided":
        view = np.empty((b, 2 * x, 2 * y, width + 8), array.dtype)[:, ::2, 1::2, :width]
    else:
        assert case.memory == "unaligned", case.memory
        view = np.empty((b, x, y, width + 3), array.dtype)[..., 1 : 1 + width]
    view[...] = array
    return view
