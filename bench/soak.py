"""``python -m distrattn_np.bench.soak``: random legal calls for as long as wanted, each against the definition.

Looks for what a test of seconds cannot see: rare wrong results, races, memory that grows. Call number ``i`` of a seed
is always the same call, so a run can be continued, and a call that failed be repeated alone, with ``--start-at``.
"""

from __future__ import annotations

import argparse
import gc
import json
import mmap
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
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
GROWTH = {"host": 256 << 20, "pool": 16 << 20, "device": 256 << 20}
"""Bytes that may be taken in the second half of a run: kernels that are compiled late, and fragments."""
WIDTHS = ((64, 64), (128, 128), (128, 64), (80, 80), (33, 7), (256, 256))
"""(D, E). Every pair is a set of kernels to compile, which takes seconds once on a GPU."""


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


class Kind:
    """How arrays get to a backend, and what its memory is."""

    def __init__(self, name: str) -> None:
        """Import what the backend needs."""
        self.backend: Backend = backends.load_by_name(name)
        self._module = {"cupy": "cupy", "numba": "numba.cuda"}.get(name)
        self._give: Callable[[np.ndarray], Any] = np.asarray
        if self._module is not None:
            module = import_module(self._module)
            self._give = module.asarray if name == "cupy" else partial(_give_numba, module)

    def give(self, array: np.ndarray, padding: int = 0, *, swap: bool = False) -> Any:
        """Return a copy as the backend's kind: rows ``padding`` elements apart, the middle axes swapped if asked."""
        if padding:
            array = np.concatenate([array, np.zeros((*array.shape[:-1], padding), array.dtype)], axis=-1)
        given = self._give(np.ascontiguousarray(array.swapaxes(1, 2) if swap else array))
        return given[..., : given.shape[-1] - padding] if padding else given

    def make_maps(self, problem: Problem, q: np.ndarray, k: np.ndarray) -> Maps:
        """Return the maps that the backend makes: where rounding turns a hash bit, the definition has to follow."""
        return self.backend.group_maps(problem, *(self.backend.bring_in(self.give(x), "bhnd") for x in (q, k)))

    def memory(self) -> dict[str, int]:
        """Return the bytes that this process holds, by where; of a device, what anyone does."""
        gc.collect()
        held = {"host": _resident_bytes()}
        if self._module == "cupy":
            import cupy

            free, total = cupy.cuda.runtime.memGetInfo()
            pool = cupy.get_default_memory_pool()
            in_reserve = pool.total_bytes() - pool.used_bytes()
            held |= {"pool": pool.used_bytes(), "device": total - free - in_reserve}
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
    refused: Counter[str] = field(default_factory=Counter)
    """Calls that the backend does not build, by what it says."""
    failures: list[dict[str, Any]] = field(default_factory=list)
    worst: dict[str, dict[str, float]] = field(default_factory=dict)
    """Largest error by dtype, relative to what is allowed."""
    memory: list[dict[str, Any]] = field(default_factory=list)

    def step(self, kind: Kind, most_rows: int) -> None:
        """Run the next call."""
        call = draw_call(self.seed, self.next, most_rows)
        try:
            errors = run_call(call, kind)
        except NotImplementedError as error:
            self.refused[str(error).partition(", got")[0]] += 1
        except Exception as error:  # whatever a backend raises for a legal call is a finding
            self.failures.append({"index": self.next, "call": str(call), "error": f"{type(error).__name__}: {error}"})
        else:
            worst = self.worst.setdefault(call.arrays["q"].dtype.name, errors)
            worst |= {name: max(worst[name], new) for name, new in errors.items()}
        self.next += 1

    def growth(self) -> dict[str, int]:
        """Return the bytes that were taken in the second half of the run."""
        if len(self.memory) < 4:
            return {}
        half, end = self.memory[len(self.memory) // 2], self.memory[-1]
        return {name: end[name] - half[name] for name in GROWTH if name in end}


def main(argv: list[str]) -> int:
    """Run with these arguments; return 0 where every call was right and no memory grew."""
    parser = argparse.ArgumentParser(prog="python -m distrattn_np.bench.soak", description=__doc__.partition("\n")[0])
    parser.add_argument("--backend", choices=backends.NAMES, default="numpy")
    parser.add_argument("--seconds", type=float, default=60.0, help="how long (default: %(default)g)")
    parser.add_argument("--calls", type=int, help="stop after so many calls")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start-at", type=int, default=0, metavar="INDEX", help="the first call (default: 0)")
    parser.add_argument("--rows", type=int, default=400, help="most queries or keys of a sequence (default: 400)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the summary")
    options = parser.parse_args(argv)
    kind = Kind(options.backend)
    soak = Soak(options.seed, options.start_at, options.start_at)
    begin = last = time.monotonic()
    soak.memory.append({"call": soak.next, "seconds": 0.0, **kind.memory()})
    with np.errstate(all="ignore"):
        while time.monotonic() - begin < options.seconds:
            if options.calls is not None and soak.next - soak.first >= options.calls:
                break
            known = len(soak.failures)
            soak.step(kind, options.rows)
            for failure in soak.failures[known:]:
                _say(f"call {failure['index']} failed: {failure['error']}\n  {failure['call']}")
                _say(f"  again: --seed {soak.seed} --start-at {failure['index']} --calls 1 --rows {options.rows}")
            if time.monotonic() - last >= min(SAMPLE_SECONDS, options.seconds / 8):
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
        "rows": options.rows,
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
    _say(f"{run} calls in {summary['seconds']} s on {options.backend}: {len(soak.failures)} failed, {refused} refused")
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


def _say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
