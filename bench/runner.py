"""One run: every contender of a shape is checked, then all are timed in the same rounds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from itertools import product
from typing import Any

import numpy as np

from .. import backends, demo, distr_attention, group_keys
from ..grouped_keys import GroupedKeys
from ..problem import Grouping, Problem, Subspace
from ..work import work_of, work_of_cache
from .axes import EXACT, Shape, is_cached
from .device import Call, Device
from .oracle import Oracle, WrongResult
from .peers import Prepare
from .timing import time_burst, time_cold, time_sustained

Row = dict[str, Any]
"""One line of a report, plain values; README.md of this folder lists the keys."""
Say = Callable[[str], None]
"""Takes one line of progress."""
INPUT_SEED = 0
SAMPLE_QUERIES = 64
TIMES = ("cold_us", "burst_us", "sustained_us", "grouping_us", "forward_us")


@dataclass(slots=True)
class Contender:
    """Something that computes attention of one shape rightly, and the row that it fills."""

    row: Row
    call: Call
    parts: dict[str, Call] = field(default_factory=dict)
    """Steps of the call that are timed on their own."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What is run, and on what."""

    device: Device
    points: Sequence[tuple[Shape, Sequence[dict[str, Any]]]]
    """Shapes, each with the grouping options of its variants."""
    backends: Sequence[str]
    peers: dict[str, Prepare]
    rounds: int
    sustained_seconds: float
    """How long each contender is called without a pause."""


def run(plan: Plan, say: Say, peaks: dict[str, dict[str, Any]]) -> Iterator[list[Row]]:
    """Yield the rows of each shape; ``peaks`` gets those of the dtypes that it lacks."""
    for done, (shape, variants) in enumerate(plan.points):
        if shape.dtype not in peaks:
            say(f"largest matrix product in {shape.dtype}")
            peaks[shape.dtype] = measure_peak(plan.device, shape.dtype)
            plan.device.release()
        say(f"[{done + 1}/{len(plan.points)}] {shape.label}")
        yield run_shape(plan, shape, variants, peaks[shape.dtype], say)
        plan.device.release()


def profile(plan: Plan, say: Say) -> None:
    """Call every contender once, for a profiler to watch: nothing is checked or timed."""
    for shape, variants in plan.points:
        arrays = plan.device.inputs(shape, INPUT_SEED)
        for name, options in product(plan.backends, variants):
            say(f"{shape.label}: {label_of(name, shape.problem(options), cached=is_cached(options))}")
            plan.device.start(_own_call(plan.device, shape, name, options, arrays))()
        for name, prepare in plan.peers.items():
            say(f"{shape.label}: {name}")
            plan.device.start(prepare(shape.problem(EXACT), *arrays))()


def label_of(name: str, problem: Problem, *, cached: bool = False) -> str:
    """Return the name of one of our contenders; ``cached``: with keys that were grouped before."""
    match problem.grouping:
        case Subspace(block_size=L) if cached:
            return f"{name} cache G={problem.width // problem.rank} L={L}"
        case Grouping(group_size=G, block_size=L, by=by, fusion=fusion):
            return f"{name} lsh/{fusion} G={G} L={L} {by}"
        case Subspace(block_size=L, by=by):
            size = f"R={problem.rank}" if problem.width % problem.rank else f"G={problem.width // problem.rank}"
            return f"{name} subspace {size} L={L} {by}"
        case None:
            return f"{name} exact"


def run_shape(
    plan: Plan, shape: Shape, variants: Sequence[dict[str, Any]], peak: dict[str, Any], say: Say
) -> list[Row]:
    """Return the rows of one shape. A contender that is wrong or fails gets a status and no times."""
    device = plan.device
    exact = shape.problem(EXACT)
    own = [(name, options, shape.problem(options)) for name, options in product(plan.backends, variants)]
    rows = [
        _new_row(label_of(name, problem, cached=is_cached(options)), name, shape, problem, options)
        for name, options, problem in own
    ]
    peer_rows = [_new_row(name, name, shape, exact, EXACT) for name in plan.peers]
    contenders = []
    try:
        say("inputs and expected rows")
        arrays = device.inputs(shape, INPUT_SEED)
        oracle = Oracle(exact, *arrays)
    except Exception as error:  # another shape may be small enough
        for row in rows + peer_rows:
            row |= _failure(error)
        return rows + peer_rows
    checks: list[tuple[Row, Callable[[], Contender]]] = [
        (row, partial(_check_own, row, name, options, problem, shape, device, oracle, arrays))
        for row, (name, options, problem) in zip(rows, own, strict=True)
    ]
    checks += [
        (row, partial(_check_peer, row, plan.peers[row["contender"]], exact, oracle, arrays)) for row in peer_rows
    ]
    for row, check in checks:
        say(f"checking {row['label']}")
        try:
            contenders.append(check())
        except Exception as error:  # told in the row, and the run goes on
            row |= _failure(error)
        device.release()  # peers allocate from elsewhere
    say(f"timing {len(contenders)} contenders in {plan.rounds} rounds")
    try:
        _time(plan, contenders)
    except Exception as error:  # rounds are shared: a time without the others' is no comparison
        for contender in contenders:
            contender.row |= _failure(error) | dict.fromkeys(TIMES)
        contenders.clear()
    for contender in contenders:
        _add_rates(contender.row, peak)
    _add_speedups(rows + peer_rows)
    return rows + peer_rows


def measure_peak(device: Device, dtype: str) -> dict[str, Any]:
    """Return the rates of a large matrix product in this dtype and of a large copy: what percentages refer to."""
    name, flop, call = device.matrix_product(dtype)
    device.start(call)()
    estimate = device.start(call)()
    copy_name, copied, copy = device.copy()
    device.start(copy)()
    return {
        "product": name,
        "burst_tflops": flop / time_burst(device, call, estimate) / 1e6,
        "sustained_tflops": flop / time_sustained(device, call, estimate) / 1e6,
        "copy": copy_name,
        "copy_gb_per_s": copied / time_burst(device, copy, device.start(copy)()) / 1e3,
    }


@cache
def sample_error(**options: Any) -> float | None:
    """Return the relative output error on the packaged real sample, the mean over its heads; NumPy, float32, D=64.

    None for a rank, which is another share of another width.
    """
    inputs = demo.load_sample()
    q, k, v = (x.astype(np.float32) for x in (inputs.q, inputs.k, inputs.v))
    if "rank" in options or q.shape[-1] % options["group_size"]:
        return None
    attend = partial(distr_attention, q, k, v, causal=inputs.causal, scale=inputs.scale, backend="numpy")
    return float(demo.relative_error(attend(**options), attend(**EXACT)).mean())


@cache
def sample_error_of_cache(group_size: int, block_size: int) -> float | None:
    """Return the error of the last queries of the packaged sample, asked through grouped keys; as `sample_error`."""
    inputs = demo.load_sample()
    q, k, v = (x.astype(np.float32) for x in (inputs.q, inputs.k, inputs.v))
    if q.shape[-1] % group_size:
        return None
    keys = group_keys(k, group_size=group_size, block_size=block_size, scale=inputs.scale)
    last = q[:, :, -min(SAMPLE_QUERIES, q.shape[2]) :]
    exact = distr_attention(last, k, v, causal=inputs.causal, scale=inputs.scale, **EXACT)
    return float(demo.relative_error(distr_attention(last, keys, v, causal=inputs.causal), exact).mean())


def _new_row(label: str, contender: str, shape: Shape, problem: Problem, options: dict[str, Any]) -> Row:
    return {
        "label": label,
        "contender": contender,
        "shape_label": shape.label,
        "shape": asdict(shape),
        "options": options,
        "status": "ok",
        "reason": None,
        "work": asdict(work_of_cache(problem) if is_cached(options) else work_of(problem)),
        "check_error": None,
        **dict.fromkeys(TIMES),
        "exact_tflops": None,
        "executed_tflops": None,
        "peak_percent": None,
        "tera_exponentials_per_s": None,
        "exponentials_percent": None,
        "gb_per_s": None,
        "copy_percent": None,
        "error_random": None,
        "error_sample": None if options is not EXACT else 0.0,
        "speedup": {},
    }


def _own_call(
    device: Device, shape: Shape, backend: str, options: dict[str, Any], arrays: tuple[Any, Any, Any]
) -> Callable[..., Any]:
    q, k, v = (device.native(x, backend) for x in arrays)
    if is_cached(options):
        return partial(distr_attention, q, _cache(k, shape.problem(options)), v, causal=shape.causal, backend=backend)
    return partial(distr_attention, q, k, v, causal=shape.causal, backend=backend, **options)


def _cache(k: Any, problem: Problem) -> GroupedKeys:
    """Return all keys grouped, by the keys alone: which maps they are makes no difference to the time."""
    if not isinstance(problem.grouping, Subspace):
        raise NotImplementedError("a cache of lsh groups")
    return group_keys(k, rank=problem.rank, block_size=problem.grouping.block_size)


def _check_own(
    row: Row,
    name: str,
    options: dict[str, Any],
    problem: Problem,
    shape: Shape,
    device: Device,
    oracle: Oracle,
    arrays: tuple[Any, Any, Any],
) -> Contender:
    """Check one of our backends and return it with its parts; what goes wrong comes as an exception."""
    backend = backends.load_by_name(name)
    if is_cached(options):
        return _check_cache(row, name, problem, shape, device, oracle, arrays)
    Q, K, V = (backend.bring_in(device.native(x, name), "bhnd") for x in arrays)
    expected = oracle.expected(backend, problem, Q, K)
    call = _own_call(device, shape, name, options, arrays)
    _judge_call(row, call, device, shape, name, oracle, expected)
    contender = Contender(row, call)
    if problem.grouping is not None:
        # blocks of the label's size: the default may be another for the sample's width
        row["error_sample"] = sample_error(**(options | {"block_size": problem.grouping.block_size}))
        O = backend.empty((shape.B, shape.H, shape.N, shape.E), Q, "bhnd")
        lse = backend.empty_lse((shape.B, shape.H, shape.N), Q)
        maps = backend.group_maps(problem, Q, K)
        contender.parts = {
            "grouping_us": partial(backend.group_maps, problem, Q, K),
            "forward_us": partial(backend.attend, problem, Q, K, V, O, lse, maps),
        }
    return contender


def _check_cache(
    row: Row, name: str, problem: Problem, shape: Shape, device: Device, oracle: Oracle, arrays: tuple[Any, Any, Any]
) -> Contender:
    """Check a call to keys that were grouped before; what its part "grouping_us" times is no part of it."""
    q, k, v = (device.native(x, name) for x in arrays)
    keys = _cache(k, problem)
    call = partial(distr_attention, q, keys, v, causal=shape.causal, backend=name)
    _judge_call(row, call, device, shape, name, oracle, oracle.expected_of_cache(problem, keys))
    row["error_sample"] = sample_error_of_cache(problem.width // problem.rank, keys.block_size)
    return Contender(row, call, {"grouping_us": partial(_cache, k, problem)})


def _judge_call(
    row: Row, call: Callable[..., Any], device: Device, shape: Shape, name: str, oracle: Oracle, expected: Any
) -> None:
    out = device.native(device.not_a_number(shape), name)
    call(out=out)
    if not device.all_finite(out):
        raise WrongResult("the result has elements that were not written, or are NaN or infinite")
    _judge(row, oracle, out, expected)


def _check_peer(
    row: Row, prepare: Prepare, problem: Problem, oracle: Oracle, arrays: tuple[Any, Any, Any]
) -> Contender:
    call = prepare(problem, *arrays)
    _judge(row, oracle, call(), oracle.exact)
    return Contender(row, call)


def _judge(row: Row, oracle: Oracle, out: Any, expected: Any) -> None:
    actual = oracle.rows_of(out)
    row["check_error"] = oracle.check(actual, expected)
    row["error_random"] = oracle.error_to_exact(actual)


def _time(plan: Plan, contenders: Sequence[Contender]) -> None:
    """Fill in the times of all contenders and their parts, measured side by side."""
    device = plan.device
    timed: list[tuple[Row, str, Call]] = []
    for contender in contenders:
        timed.append((contender.row, "cold_us", contender.call))
        timed += [(contender.row, part, call) for part, call in contender.parts.items()]
    for _, _, call in timed:  # the first call, which compiles, was the check
        device.start(call)()
    results = time_cold(device, [call for *_, call in timed], plan.rounds)
    for (row, part, _), times in zip(timed, results, strict=True):
        row[part] = asdict(times)
    if device.kind == "cpu":  # it has neither a boost to lose nor a launch queue to fill
        return
    sustained = partial(time_sustained, seconds=plan.sustained_seconds)
    for key, timer in (("burst_us", time_burst), ("sustained_us", sustained)):
        for contender in contenders:
            contender.row[key] = timer(device, contender.call, contender.row["cold_us"]["median"] / 1e6)


def _add_rates(row: Row, peak: dict[str, Any]) -> None:
    tflop_per_us = 1e-12 * 1e6 / row["cold_us"]["median"]
    row["exact_tflops"] = row["work"]["exact_flop"] * tflop_per_us
    row["executed_tflops"] = row["work"]["executed_flop"] * tflop_per_us
    row["peak_percent"] = 100 * row["executed_tflops"] / peak["burst_tflops"]
    row["gb_per_s"] = row["work"]["minimum_bytes"] / row["cold_us"]["median"] / 1e3
    row["copy_percent"] = 100 * row["gb_per_s"] / peak["copy_gb_per_s"]


def _add_speedups(rows: Sequence[Row]) -> None:
    """Fill in how many times faster each contender is than every exact one of the shape."""
    timed = [row for row in rows if row["status"] == "ok"]
    for row in timed:
        row["speedup"] = {
            exact["label"]: exact["cold_us"]["median"] / row["cold_us"]["median"]
            for exact in timed
            if exact["options"] == EXACT and exact is not row
        }


def _failure(error: Exception) -> Row:
    if isinstance(error, WrongResult):
        status = "wrong"
    elif isinstance(error, NotImplementedError):
        status = "not supported"
    elif isinstance(error, MemoryError) or "OutOfMemory" in type(error).__name__:
        status = "out of memory"
    else:
        status = "failed"
    return {"status": status, "reason": f"{type(error).__name__}: {error}"}
