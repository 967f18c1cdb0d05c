"""``python -m distrattn_np.bench.soak``: random legal calls for as long as wanted, each against the definition.

Looks for what a test of seconds cannot see: rare wrong results, races, memory that grows. Call number ``i`` of a seed
is always the same call, so a run can be continued, and a call that failed be repeated alone, with ``--start-at``.

``--launches COUNT`` makes as many calls of random sizes that few kernels serve, so that thousands take minutes. Each is
made twice and must give the same bits; one in a hundred is compared with the definition.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import mmap
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from .. import backends
from ..attention import distr_attention, exact_attention
from ..backends import Backend, Maps
from ..problem import Problem
from . import definition
from .axes import dtype_named
from .definition import Results
from .device import BACKENDS, to_host
from .environment import describe_environment
from .oracle import TOLERANCE

FEW = 16
"""Elements of a head from which on its relative error is looked at: the mean of few may come out near zero."""
SAMPLE_SECONDS = 5.0
GROWTH = {"host": 256 << 20, "pool": 16 << 20, "reserve": 256 << 20}
"""Bytes that may be taken in the second half of a run: kernels that are compiled late, and fragments."""
WIDTHS = ((64, 64), (128, 128), (128, 64), (80, 80), (33, 7), (256, 256))
"""(D, E). Every pair is a set of kernels to compile, which takes seconds once on a GPU."""
FEW_KERNELS: tuple[tuple[str, int, int, dict[str, Any]], ...] = (
    ("float16", 128, 128, {}),
    ("float16", 128, 128, {"method": "subspace", "group_size": 2, "block_size": 256}),
    ("float16", 128, 128, {"method": "lsh", "group_size": 2, "block_size": 256}),
    ("bfloat16", 64, 64, {}),
    ("bfloat16", 64, 64, {"method": "subspace", "rank": 14, "block_size": 128}),
    ("float32", 40, 24, {"method": "subspace", "rank": 20, "group_by": "queries", "block_size": 128}),
)
"""(dtype, D, E, options) of the calls of ``--launches``; without options they are exact."""
SHARED_ELEMENTS = 1 << 24
"""Random elements that the arrays of ``--launches`` are parts of."""
COMPARED_EVERY, COMPARED_ROWS = 100, 300
"""Of the calls of ``--launches`` one in so many goes to the definition, and has at most so many rows."""
HANG_SECONDS = 120.0
"""A call that takes longer, the compilation of its kernels included, ends the run."""


class WrongCall(Exception):  # noqa: N818
    """What a call gave is not what the definition says."""


@dataclass(frozen=True, slots=True)
class Call:
    """A legal call: host arrays as drawn, and options."""

    is_exact: bool
    arrays: dict[str, np.ndarray]
    """q, k and v as (B, H, rows, width), or packed; mask and bias."""
    padding: int
    """Elements between rows in memory."""
    options: dict[str, Any]
    gives_out: bool

    def __str__(self) -> str:
        shapes = {name: "x".join(map(str, x.shape)) for name, x in self.arrays.items()}
        told = {"dtype": self.arrays["q"].dtype, **shapes, **self.options}
        words = " ".join(f"{name}={value}" for name, value in told.items())
        return f"{'exact' if self.is_exact else 'distr'} {words} padding={self.padding} out={self.gives_out}"


def draw_call(seed: int, index: int, most_rows: int) -> Call:
    """Return call number ``index`` of a seed."""
    rng = np.random.default_rng([seed, index])

    def one_of(*choices: Any) -> Any:
        return choices[rng.integers(len(choices))]

    dtypes = ["float16", "float32", "float64", *(["bfloat16"] if find_spec("ml_dtypes") else [])]
    dtype = dtype_named(one_of(*dtypes))
    D, E = one_of(*WIDTHS)
    B, (H, H_kv) = one_of(1, 2, 3), one_of((1, 1), (4, 2), (6, 1), (4, 4))
    is_packed, is_exact = bool(rng.random() < 0.25), bool(rng.random() < 0.25)

    def rows() -> int:
        return int(one_of(0, 1, 63, 64, 65, rng.integers(1, most_rows + 1), rng.integers(1, most_rows + 1)))

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, dtype=np.float32).astype(dtype)

    options: dict[str, Any] = {"causal": one_of(False, True, "top-left"), "scale": one_of(None, None, 0.05, -0.1)}
    if rng.random() < 0.2:
        options["window"] = (one_of(None, 0, 40), one_of(None, 0, 10))
    if rng.random() < 0.2:
        options["softcap"] = one_of(1.0, 20.0)
    if is_packed:
        lengths = {name: [rows() for _ in range(B)] for name in "qk"}
        options |= {f"cu_seqlens_{name}": np.cumsum([0, *x], dtype=np.int32) for name, x in lengths.items()}
        N, M = (sum(x) for x in lengths.values())
        arrays = {"q": normal(N, H, D), "k": normal(M, H_kv, D), "v": normal(M, H_kv, E)}
    else:
        N, M = rows(), rows()
        arrays = {"q": normal(B, H, N, D), "k": normal(B, H_kv, M, D), "v": normal(B, H_kv, M, E)}
        options["layout"] = one_of("bhnd", "bnhd")
        for name in ("mask", "bias"):
            if rng.random() < 0.15:
                shape = tuple(one_of(1, size) for size in (B, H, N, M))
                arrays[name] = rng.random(shape) < 0.7 if name == "mask" else normal(*shape)
    if not is_exact:
        options |= {"method": one_of("lsh", "subspace"), "group_by": one_of(None, "queries", "keys")}
        options["block_size"] = one_of(None, 64, 100, 256)
        if options["method"] == "lsh":
            options |= {"group_size": 3 if D % 2 else one_of(2, 4), "fusion": one_of("sum", "lstsq")}
        else:
            options |= {"refine": one_of(0, 1, 2)} | one_of({"rank": D // 2}, {"rank": D // 4}, {"score_tol": 0.3})
    return Call(is_exact, arrays, one_of(0, 8), options, gives_out=bool(rng.random() < 0.3))


def draw_launch(seed: int, index: int, most_rows: int) -> Call:
    """Return call number ``index`` of a seed, of those that few kernels serve; its arrays are parts of one."""
    rng = np.random.default_rng([seed, index])
    few = [build for build in FEW_KERNELS if build[0] != "bfloat16" or find_spec("ml_dtypes")]
    dtype, D, E, grouping = few[rng.integers(len(few))]
    B, H_kv, heads_a_group = (int(rng.integers(1, most + 1)) for most in (3, 3, 4))
    H = H_kv * heads_a_group
    if index % COMPARED_EVERY == 0:
        most_rows = min(most_rows, COMPARED_ROWS)
    shared = _shared_elements(dtype)
    most_rows = min(most_rows, len(shared) // (B * H * max(D, E)) - 1)
    # as many short ones as long ones
    N, M = (int(rows) for rows in np.exp(rng.uniform(0, np.log(most_rows + 1), 2)))
    arrays = {}
    for name, shape in {"q": (B, H, N, D), "k": (B, H_kv, M, D), "v": (B, H_kv, M, E)}.items():
        size = math.prod(shape)
        # kernels load 16 bytes at a time where they can
        start = int(rng.integers(len(shared) - size)) // 8 * 8 + int(rng.random() < 0.1)
        arrays[name] = shared[start : start + size].reshape(shape)
    options = {"causal": bool(rng.random() < 0.5), "scale": None, **grouping}
    return Call(not grouping, arrays, 0, options, gives_out=False)


@cache
def _shared_elements(dtype: str) -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.standard_normal(SHARED_ELEMENTS, dtype=np.float32).astype(dtype_named(dtype))


class Kind:
    """How arrays get to a backend, and what its memory is."""

    def __init__(self, name: str) -> None:
        """Import what the backend needs."""
        self.backend: Backend = backends.load_by_name(name)
        self._module = {"cupy": "cupy", "numba": "numba.cuda"}.get(name)
        self._give: Callable[[np.ndarray], Any] = np.asarray
        self._shared: dict[str, Any] = {}
        if self._module is not None:
            module = import_module(self._module)
            self._give = module.asarray if name == "cupy" else partial(_give_numba, module)

    def give(self, array: np.ndarray, padding: int = 0, *, swap: bool = False) -> Any:
        """Return a copy as the backend's kind: rows ``padding`` elements apart, the middle axes swapped if asked."""
        width = array.shape[-1]
        if padding:
            array = np.concatenate([array, np.zeros((*array.shape[:-1], padding), array.dtype)], axis=-1)
        given = self._give(np.ascontiguousarray(array.swapaxes(1, 2) if swap else array))
        return given[..., :width] if padding else given

    def make_maps(self, problem: Problem, q: np.ndarray, k: np.ndarray) -> Maps:
        """Return the maps that the backend makes: where rounding turns a hash bit, the definition has to follow."""
        return self.backend.group_maps(problem, *(self.backend.bring_in(self.give(x), "bhnd") for x in (q, k)))

    def give_part(self, array: np.ndarray) -> Any:
        """Return the same part of the shared elements, which stay on the device; an array of ``draw_launch``."""
        shared = _shared_elements(array.dtype.name)
        given = self._shared.get(array.dtype.name)
        if given is None:
            given = self._shared[array.dtype.name] = self._give(shared)
        start = (array.ctypes.data - shared.ctypes.data) // array.itemsize
        return given[start : start + array.size].reshape(array.shape)

    def fault(self, first: Any, second: Any, *, is_lse: bool) -> str | None:
        """Return what is wrong with a result and the same once more; the lse of a row without keys is -inf."""
        xp: Any = np
        if self._module == "cupy":
            xp = import_module("cupy")  # compares on the device
        elif self._module is not None:
            first, second = first.copy_to_host(), second.copy_to_host()
        bits = f"u{first.dtype.itemsize}"
        if not bool((first.view(bits) == second.view(bits)).all()):
            return "the same call gave other bits"
        values = first.astype(xp.float32)
        allowed = xp.isfinite(values) | xp.isneginf(values) if is_lse else xp.isfinite(values)
        return None if bool(allowed.all()) else "an element is not finite"

    def memory(self) -> dict[str, int]:
        """Return the bytes that this process holds, by where; of a device, what CuPy's pool does.

        What else is in use on the device may be another process's.
        """
        gc.collect()
        held = {"host": _resident_bytes()}
        if self._module == "cupy":
            import cupy

            pool = cupy.get_default_memory_pool()
            held |= {"pool": pool.used_bytes(), "reserve": pool.total_bytes() - pool.used_bytes()}
        return held


def run_call(call: Call, kind: Kind) -> dict[str, float]:
    """Run one call; return its errors relative to what is allowed, or raise `WrongCall`."""
    swap = call.options.get("layout") == "bnhd"
    given = {name: kind.give(call.arrays[name], call.padding, swap=swap) for name in "qkv"}
    given |= {name: kind.give(x) for name, x in call.arrays.items() if name in ("mask", "bias")}
    options = {name: kind.give(x) if isinstance(x, np.ndarray) else x for name, x in call.options.items()}
    if call.gives_out:
        shape = (*call.arrays["q"].shape[:-1], call.arrays["v"].shape[-1])
        poison = np.full(shape, np.nan, np.float32).astype(call.arrays["q"].dtype)
        options["out"] = kind.give(poison, call.padding, swap=swap)
    function = exact_attention if call.is_exact else distr_attention
    out, lse = function(**given, **options, return_lse=True, backend=kind.backend.name)
    actual = to_host(out), to_host(lse)
    told: dict[str, Any] = {name: x for name, x in call.options.items() if name != "layout"} | call.arrays
    expected = definition.attention(**told, is_exact=call.is_exact, make_maps=kind.make_maps)
    return judge(call, (actual[0].swapaxes(1, 2), actual[1]) if swap else actual, expected)


def run_launch(call: Call, kind: Kind, *, is_compared: bool) -> dict[str, float]:
    """Make a call of ``draw_launch`` twice; return its errors where it is compared, as `run_call`."""
    given = {name: kind.give_part(x) for name, x in call.arrays.items()}
    function = exact_attention if call.is_exact else distr_attention
    results = [function(**given, **call.options, return_lse=True, backend=kind.backend.name) for _ in range(2)]
    for name, first, second in zip(("the result", "lse"), *results, strict=True):
        if fault := kind.fault(first, second, is_lse=name == "lse"):
            raise WrongCall(f"{name}: {fault}")
    if not is_compared:
        return {}
    out, lse = results[0]
    told: dict[str, Any] = call.options | call.arrays
    expected = definition.attention(**told, is_exact=call.is_exact, make_maps=kind.make_maps)
    return judge(call, (to_host(out), to_host(lse)), expected)


def judge(call: Call, actual: Results, expected: Results) -> dict[str, float]:
    """Return the errors relative to what is allowed; raise `WrongCall` where one is above it.

    Scores of ``spread`` nats are off by the rounding of the dtype times that, and so is lse. An element of the result
    is off by that times the values; all elements of a head together by that times their length.
    """
    (out, lse), (want, want_lse) = actual, expected
    unseen = np.isneginf(want_lse)
    if not np.isfinite(out).all() or (np.isneginf(lse) != unseen).any() or not np.isfinite(lse[~unseen]).all():
        raise WrongCall("the result is not finite where it should be")
    q, k, v = (call.arrays[name].astype(np.float64) for name in "qkv")
    scale = call.options["scale"] or 1 / np.sqrt(q.shape[-1])
    spread = 1 + abs(scale) * _length(q) * _length(k) / np.sqrt(q.shape[-1])
    allowed = TOLERANCE[call.arrays["q"].dtype.name] * spread
    heads = (1,) if "cu_seqlens_q" in call.options else (0, 1)
    axes = tuple(axis for axis in range(out.ndim) if axis not in heads)
    distance, length = (np.sqrt(np.square(x).sum(axis=axes)) for x in (out - want, want))
    many = out.size >= FEW * distance.size
    largest_lse = float(np.abs(want_lse[~unseen]).max(initial=1))
    errors = {
        "element": _largest(out - want) / (allowed * max(_largest(v), 1e-30)),
        "head": _largest(distance / np.where(length > 0, length, 1)) / allowed if many else 0.0,
        # lse is float32
        "lse": _largest((lse - want_lse)[~unseen]) / (allowed + 1e-6 * largest_lse),
    }
    for name, error in errors.items():
        if not error <= 1:
            raise WrongCall(f"the error of the {name} is {error:.2g} times what rounding may do")
    return errors


def _give_numba(cuda: Any, array: np.ndarray) -> Any:
    """Return a device array; Numba copies no empty ones."""
    return cuda.to_device(array) if array.size else cuda.device_array(array.shape, array.dtype)


def _length(rows: np.ndarray) -> float:
    """Return the root mean square of the lengths of the rows."""
    return float(np.sqrt(np.square(rows).sum(axis=-1).mean())) if rows.size else 0.0


def _largest(array: np.ndarray) -> float:
    return float(np.abs(array).max(initial=0))


def _resident_bytes() -> int:
    """Return the resident memory of this process; 0 where the system does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:
        return 0
    return pages * mmap.PAGESIZE


@dataclass(slots=True)
class Soak:
    """A run so far."""

    seed: int
    first: int
    next: int
    most_rows: int
    is_of_launches: bool = False
    """Whether the calls are those that few kernels serve."""
    refused: Counter[str] = field(default_factory=Counter)
    """Calls that the backend does not build, by what it says."""
    failures: list[dict[str, Any]] = field(default_factory=list)
    worst: dict[str, dict[str, float]] = field(default_factory=dict)
    """Largest error by dtype, relative to what is allowed."""
    compared: int = 0
    """Calls that were compared with the definition."""
    memory: list[dict[str, Any]] = field(default_factory=list)

    def step(self, kind: Kind) -> None:
        """Run the next call."""
        draw = draw_launch if self.is_of_launches else draw_call
        call = draw(self.seed, self.next, self.most_rows)
        is_compared = not self.is_of_launches or self.next % COMPARED_EVERY == 0
        watchdog = threading.Timer(HANG_SECONDS, _give_up, (self.next, str(call), self.command(self.next)))
        watchdog.start()
        try:
            run = partial(run_launch, is_compared=is_compared) if self.is_of_launches else run_call
            errors = run(call, kind)
        except NotImplementedError as error:
            self.refused[str(error).partition(", got")[0]] += 1
        except Exception as error:  # whatever a backend raises for a legal call is a finding
            self.failures.append({"index": self.next, "call": str(call), "error": f"{type(error).__name__}: {error}"})
        else:
            if is_compared:
                self.compared += 1
                worst = self.worst.setdefault(call.arrays["q"].dtype.name, errors)
                worst |= {name: max(worst[name], new) for name, new in errors.items()}
        finally:
            watchdog.cancel()
        self.next += 1

    def command(self, index: int) -> str:
        """Return the options that repeat one call alone."""
        count = "--launches" if self.is_of_launches else "--calls"
        return f"--seed {self.seed} --start-at {index} {count} 1 --rows {self.most_rows}"

    def growth(self) -> dict[str, int]:
        """Return the bytes that were taken in the second half of the calls, whose first ones compile and are slow."""
        if len(self.memory) < 4:
            return {}
        half = [sample for sample in self.memory if 2 * sample["call"] <= self.first + self.next][-1]
        end = self.memory[-1]
        return {name: end[name] - half[name] for name in GROWTH if name in end}


def main(argv: list[str]) -> int:
    """Run with these arguments; return 0 where every call was right and no memory grew."""
    parser = argparse.ArgumentParser(prog="python -m distrattn_np.bench.soak", description=__doc__.partition("\n")[0])
    parser.add_argument("--backend", choices=backends.NAMES, default="numpy")
    parser.add_argument("--seconds", type=float, default=60.0, help="how long (default: %(default)g)")
    parser.add_argument("--calls", type=int, help="stop after so many calls")
    parser.add_argument(
        "--launches", type=int, metavar="COUNT", help="so many calls that few kernels serve, however long"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start-at", type=int, default=0, metavar="INDEX", help="the first call (default: 0)")
    parser.add_argument("--rows", type=int, help="most queries or keys of a sequence (default: 400; of launches: 2048)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the summary")
    options = parser.parse_args(argv)
    kind = Kind(options.backend)
    is_of_launches = options.launches is not None
    most_rows = options.rows or (2048 if is_of_launches else 400)
    calls, seconds = (options.launches, math.inf) if is_of_launches else (options.calls, options.seconds)
    soak = Soak(options.seed, options.start_at, options.start_at, most_rows, is_of_launches)
    begin = last = time.monotonic()
    soak.memory.append({"call": soak.next, "seconds": 0.0, **kind.memory()})
    with np.errstate(all="ignore"):
        while time.monotonic() - begin < seconds:
            if calls is not None and soak.next - soak.first >= calls:
                break
            known = len(soak.failures)
            soak.step(kind)
            for failure in soak.failures[known:]:
                _say(f"call {failure['index']} failed: {failure['error']}\n  {failure['call']}")
                _say(f"  again: {soak.command(failure['index'])}")
            if time.monotonic() - last >= min(SAMPLE_SECONDS, seconds / 8):
                last = time.monotonic()
                soak.memory.append({"call": soak.next, "seconds": round(last - begin, 1), **kind.memory()})
    growth = soak.growth()
    grown = {name: taken for name, taken in growth.items() if taken > GROWTH[name]}
    summary = {
        "backend": options.backend,
        "environment": describe_environment(BACKENDS[options.backend], argv),
        "seed": soak.seed,
        "first": soak.first,
        "next": soak.next,
        "rows": most_rows,
        "compared": soak.compared,
        "seconds": round(time.monotonic() - begin, 1),
        "refused": dict(soak.refused),
        "failures": soak.failures,
        "worst": soak.worst,
        "growth": growth,
        "memory": soak.memory,
    }
    if options.json is not None:
        options.json.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    run, refused = soak.next - soak.first, soak.refused.total()
    _say(
        f"{run} calls in {summary['seconds']} s on {options.backend}: {soak.compared} compared with the definition,"
        f" {len(soak.failures)} failed, {refused} refused"
    )
    for rule, count in soak.refused.most_common():
        _say(f"  {count} x {rule}")
    for dtype, errors in sorted(soak.worst.items()):
        _say(
            f"  {dtype}: " + ", ".join(f"{name} {error:.2f}" for name, error in errors.items()) + " of what is allowed"
        )
    for name, taken in growth.items():
        _say(f"  {name} memory in the second half: {taken / 2**20:+.1f} MiB{' GREW' if name in grown else ''}")
    _say(f"go on with --seed {soak.seed} --start-at {soak.next}")
    return 1 if soak.failures or grown else 0


def _give_up(index: int, call: str, again: str) -> None:
    """End a run whose call does not return."""
    _say(f"call {index} hangs: {call}\n  again: {again}")
    os._exit(1)  # a thread that waits for a device cannot be stopped otherwise


def _say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
