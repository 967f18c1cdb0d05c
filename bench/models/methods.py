"""What attention is replaced by: the package's methods, and the training-free peers of ``bench/approximations``."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import product
from typing import Any

import numpy as np

from ... import checks
from ...attention import distr_attention, exact_attention
from ...problem import Problem, Subspace, block_edges, ceil_div
from ...reference.distr_attention import rows_that_meet
from ...shrink import pool_keys, project_values
from ...work import visible_pairs, work_of
from .. import approximations
from .layers import array_module, to_host

PEERS: dict[str, tuple[Callable[..., Any], Callable[..., int]]] = {
    "hyper": (approximations.hyper_attention, approximations.hyper_flop),
    "nystrom": (approximations.nystrom_attention, approximations.nystrom_flop),
    "performer": (approximations.performer_attention, approximations.performer_flop),
    "hydra": (approximations.hydra_attention, approximations.hydra_flop),
    "int8": (approximations.int8_attention, approximations.int8_flop),
}
NAMES = ("exact", "lsh", "subspace", "window", *PEERS)
NOT_CAUSAL = frozenset({"nystrom"})
SHRINKING = ("pool", "value_rank")
"""Options of every method but peers: keys of a cluster (`pool_keys`), and channels of values (`project_values`)."""


@dataclass(frozen=True, slots=True)
class Method:
    """A name of `NAMES` and the options of its call."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """The name and the options, as `parse` takes them."""
        options = ",".join(f"{name}={value}" for name, value in self.options.items())
        return f"{self.name}:{options}" if options else self.name


EXACT = Method("exact")


def parse(text: str) -> list[Method]:
    """Return the methods of one argument: ``name``, or ``name:option=value,option=value/value``; / gives one each."""
    name, _, rest = text.partition(":")
    if name not in NAMES:
        raise ValueError(f"--methods: must be one of {', '.join(NAMES)}, got {name!r}")
    options: dict[str, list[Any]] = {}
    for part in filter(None, rest.split(",")):
        option, equals, values = part.partition("=")
        if not (option and equals and values):
            raise ValueError(f"--methods: options are written name=value, got {part!r} in {text!r}")
        options[option] = [_value(value) for value in values.split("/")]
    return [Method(name, dict(zip(options, values, strict=True))) for values in product(*options.values())]


@dataclass(frozen=True, slots=True)
class _Call:
    """What one call was asked for, and what it did."""

    asked: Problem
    done: Problem
    """The same with the keys and values that were left."""
    ranks: Any = None
    """(B, H_x, C) of the subspace method."""


class Meter:
    """A method as the callable that a model takes; adds up time, floating-point operations and ranks over its calls."""

    def __init__(self, method: Method, *, backend: str, dtype: str) -> None:
        self.method = method
        self.seconds = 0.0
        self._backend, self._dtype = backend, dtype
        self._calls: list[_Call] = []

    def __call__(self, q: Any, k: Any, v: Any, *, causal: bool) -> Any:
        """Return attention in float32, computed from ``dtype``."""
        q, k, v = (x.astype(self._dtype, copy=False) for x in (q, k, v))
        self.wait()
        start = time.perf_counter()
        out, call = self._attend(q, k, v, causal)
        self.wait()
        self.seconds += time.perf_counter() - start
        self._calls.append(call)  # counted later: the model's own time must not hold it
        return out.astype(np.float32, copy=False)

    def _attend(self, q: Any, k: Any, v: Any, causal: bool) -> tuple[Any, _Call]:
        name, options = self.method.name, dict(self.method.options)
        asked = _problem(q, k, v, causal)
        if name in PEERS:
            return PEERS[name][0](q, k, v, causal=causal, **options), _Call(asked, asked)
        pool, value_rank = (options.pop(option, None) for option in SHRINKING)
        scores: dict[str, Any] = {}
        projected = None if value_rank is None else project_values(v, value_rank)
        if projected is not None:
            v = projected.values
        if pool is not None:
            if causal:
                raise ValueError("pool: pooled keys have no order, and no causal form")
            k, v, bias = pool_keys(k, v, pool)
            if asked.keys % pool:
                scores["bias"] = bias
        out, done, ranks = self._attend_to_what_is_left(q, k, v, causal, options, scores)
        return out if projected is None else projected.restore(out), _Call(asked, done, ranks)

    def _attend_to_what_is_left(
        self, q: Any, k: Any, v: Any, causal: bool, options: dict[str, Any], scores: dict[str, Any]
    ) -> tuple[Any, Problem, Any]:
        """Return the result, what was computed, and the ranks of the subspace method."""
        name, ranks, grouping = self.method.name, None, None
        if name == "subspace":
            grouping = checks.check_grouping(q, method=name, **options)
            out, info = distr_attention(q, k, v, method=name, causal=causal, return_info=True, **options, **scores)
            ranks = info.ranks
        elif name == "lsh":
            grouping = checks.check_grouping(q, method=name, **options)
            out = distr_attention(q, k, v, method=name, causal=causal, **options, **scores)
        elif name == "window":
            mask = array_module(self._backend).asarray(_window_and_sinks(_problem(q, k, v, causal), **options))
            out = exact_attention(q, k, v, causal=causal, mask=mask, **scores)
        else:
            out = exact_attention(q, k, v, causal=causal, **options, **scores)
        return out, _problem(q, k, v, causal, grouping), ranks

    @property
    def exact_flop(self) -> int:
        """FLOP that exact attention takes for the same calls."""
        return sum(
            2 * p.batch * p.heads * visible_pairs(p.queries, p.keys, p.causal_offset) * (p.width + p.value_width)
            for p in (call.asked for call in self._calls)
        )

    @property
    def flop(self) -> int:
        """FLOP of the calls."""
        return sum(self._count(call) + self._count_shrinking(call) for call in self._calls)

    @property
    def mean_rank(self) -> float | None:
        """R, averaged over the blocks that some row meets, heads and layers; None where there is none."""
        if self.method.name in PEERS:
            return None
        ranks = [
            np.array([call.done.rank])
            if call.ranks is None
            else to_host(call.ranks)[:, :, np.array(rows_met(call.done)) > 0].ravel()
            for call in self._calls
        ]
        found = np.concatenate(ranks)
        return float(found.mean()) if found.size else None

    def _count(self, call: _Call) -> int:
        problem = call.done
        if self.method.name in PEERS:
            count = PEERS[self.method.name][1]
            sizes = (problem.queries, problem.keys, problem.width, problem.value_width)
            causal = problem.causal_offset is not None
            return problem.batch * problem.heads * count(*sizes, causal=causal, **self.method.options)
        if self.method.name == "window":
            options = {name: value for name, value in self.method.options.items() if name not in SHRINKING}
            pairs = int(_window_and_sinks(problem, **options).sum())
            return 2 * problem.batch * problem.heads * pairs * (problem.width + problem.value_width)
        return work_of(problem).executed_flop if call.ranks is None else subspace_flop(problem, to_host(call.ranks))

    def _count_shrinking(self, call: _Call) -> int:
        pool, value_rank = (self.method.options.get(option) for option in SHRINKING)
        flop = 0 if value_rank is None else projection_flop(call.asked, value_rank)
        if pool is not None:
            flop += pooling_flop(replace(call.asked, value_width=call.done.value_width), pool)
        return flop

    def wait(self) -> None:
        """Wait until the device has done what was asked of it."""
        if self._backend != "numpy":
            import cupy

            cupy.cuda.get_current_stream().synchronize()


def _problem(q: Any, k: Any, v: Any, causal: bool, grouping: Any = None) -> Problem:
    return checks.check_attention(q, k, v, causal=causal, scale=None, layout="bhnd", out=None, grouping=grouping)


@lru_cache(maxsize=1)
def _window_and_sinks(problem: Problem, *, keys: int, sinks: int = 0) -> np.ndarray:
    """Return the mask (N, M) of ``keys`` up to a query, not causally of as many after it, and the first ``sinks``."""
    N, M = problem.queries, problem.keys
    distance = np.arange(N)[:, np.newaxis] + M - N - np.arange(M)
    shown: np.ndarray = (np.abs(distance) < keys) | (np.arange(M) < sinks)
    return shown if problem.causal_offset is None else shown & (distance >= 0)


def projection_flop(problem: Problem, rank: int) -> int:
    """Return the FLOP of `project_values` and of turning results back (docs/math.md, eq. 33).

    The covariance, half of it; its eigenvectors, 9 E^3; coordinates of all values, and channels of all results.
    """
    E = problem.value_width
    values = E * (E + 1) * problem.keys + 9 * E**3 + 2 * problem.keys * E * rank
    return problem.batch * (problem.kv_heads * values + problem.heads * 2 * problem.queries * E * rank)


def pooling_flop(problem: Problem, size: int) -> int:
    """Return the FLOP of `pool_keys` (eq. 31, 32): six products with a vector for each level of the tree, and means."""
    levels = (ceil_div(problem.keys, size) - 1).bit_length()
    width = problem.width + problem.value_width
    return problem.batch * problem.kv_heads * problem.keys * width * (12 * levels + 1)


def subspace_flop(problem: Problem, ranks: np.ndarray) -> int:
    """Return the FLOP of a call whose blocks have these ranks (B, H_x, C).

    Counted are the two products, that of the scores over D channels in own blocks (docs/math.md, eq. 20); X W, and Y Z
    for every row that meets the block (4); the Gram matrices (11), one half of each, a row once for a head that it is
    pooled in; and the small matrices of every block: the choice of channels (15), the half-steps (16), column scaling
    and predicted error (17, 18). A block of rank D needs no X W and no Y Z, one that nobody meets nothing at all.
    """
    grouping = problem.grouping
    if not isinstance(grouping, Subspace):
        raise TypeError(f"problem: must be one of the subspace method, got {grouping}")
    D, E = problem.width, problem.value_width
    batch, map_heads, _ = ranks.shape
    shared = problem.heads // map_heads  # query heads that share a map
    met = rows_met(problem)
    edges = block_edges(problem.grouped_rows, grouping.block_size)
    own_rows = sum(stop - start for (start, stop), rows in zip(edges, met, strict=True) if rows)
    flop: int = batch * map_heads * (own_rows + shared * max(met, default=0)) * (D * (D + 1) + D)
    for c, (start, stop) in enumerate(edges):
        mapped_rows = stop - start + shared * met[c] if met[c] else 0
        pairs = shared * _block_pairs(problem, grouping.by, start, stop)
        # whoever meets a block through its maps and does not own it sees all of it
        own_pairs = pairs - shared * met[c] * (stop - start) if problem.own_block_is_exact else 0
        for R in map(int, ranks[:, :, c].ravel()):
            columns = D if grouping.rank is None else R  # ranks are chosen among the columns made for R = D
            flop += _map_flop(D, columns, grouping.refine) if met[c] else 0
            flop += 2 * pairs * (R + E) + 2 * own_pairs * (D - R) + (2 * mapped_rows * D * R if R < D else 0)
    return flop


def rows_met(problem: Problem) -> list[int]:
    """Return how many rows of the other side, of one head, meet each block through its maps."""
    grouping = problem.grouping
    if grouping is None:
        return []
    N, M, offset = problem.queries, problem.keys, problem.meeting_offset
    ranges = (
        rows_that_meet(start, stop, group_by=grouping.by, N=N, M=M, causal_offset=offset)
        for start, stop in block_edges(problem.grouped_rows, grouping.block_size)
    )
    return [last - first for first, last in ranges]


def _map_flop(D: int, R: int, refine: int) -> int:
    """Return the FLOP of a block's maps from its Gram matrices; a triangular solve is half a product."""
    half_step = 2 * D * D * R + 2 * D * R**2 + R**3 // 3 + 2 * D * R**2
    choice, scaling_and_error = D * R**2, 2 * (2 * D * D * R + 2 * D * R**2)
    return choice + (1 + 2 * refine) * half_step + scaling_and_error


def _block_pairs(problem: Problem, by: str, start: int, stop: int) -> int:
    """Return the visible pairs of one head that lie in a block."""
    offset = problem.causal_offset
    if by == "queries":
        return visible_pairs(stop - start, problem.keys, None if offset is None else start + offset)
    return visible_pairs(problem.queries, stop, offset) - visible_pairs(problem.queries, start, offset)


def expand(texts: Sequence[str]) -> Iterator[Method]:
    """Yield exact attention, which all others are compared with, and then the other methods of these arguments."""
    yield EXACT
    for text in texts:
        yield from (method for method in parse(text) if method != EXACT)


def _value(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
