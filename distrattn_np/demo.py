"""``distrattn demo``: exact and approximate attention on real queries, keys and values, time beside error."""

from __future__ import annotations

import json
import statistics
import sys
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from . import __version__, checks, info, reference
from .attention import distr_attention
from .problem import Grouping, Problem, Subspace

REPEATS = 5
"""Timed calls of each case, after one that compiles and warms up."""
COMPARED_ROWS = 256
"""Rows of P per head that are compared; evenly spaced."""
CHUNK_SCORES = 1 << 22
"""Scores held at once while rows of P are compared: 16 MiB of float32."""
IMAGE_COLUMNS = 256
"""Columns of an attention map as drawn; neighbouring keys are added up."""

PICTURES = (".png", ".svg", ".pdf")

Step = Callable[[str], None]
"""Reports that the work of this description begins."""
Maps = tuple[np.ndarray, np.ndarray | None] | reference.Maps
"""Of every block of every head, as ``reference.group_maps`` or ``reference.make_maps`` gives them."""


@dataclass(frozen=True, slots=True)
class Case:
    """One line of the table."""

    label: str
    group_size: int
    method: str = "subspace"
    fusion: str | None = None


CASES = (
    Case("exact", 1),
    Case("subspace G=2", 2),
    Case("subspace G=4", 4),
    Case("lsh G=2", 2, "lsh"),
    Case("lsh G=4", 4, "lsh"),
    Case("lsh G=2 lstsq", 2, "lsh", "lstsq"),
)


@dataclass(frozen=True, slots=True)
class Inputs:
    """What attention is computed of."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    scale: float | None
    causal: bool | str
    origin: str


@dataclass(frozen=True, slots=True)
class Plan:
    """Checked inputs, the problem of each case, and where it runs."""

    inputs: Inputs
    problems: tuple[Problem, ...]
    """One for each of `CASES`."""
    backend: info.BackendState
    plot: Path | None


@dataclass(frozen=True, slots=True)
class Result:
    """One case, measured. Arrays are (B, H)."""

    case: Case
    seconds: float
    relative_error: np.ndarray
    total_variation: np.ndarray


def prepare(path: Path | None, backend: str | None, plot: Path | None) -> Plan:
    """Return a plan in which nothing can be wrong any more, or raise an error that names what is."""
    if plot is not None and (plot.suffix not in PICTURES or not plot.parent.is_dir()):
        rule = f"must end in {', '.join(PICTURES)} and lie in a folder that exists"
        raise ValueError(f"--plot: {rule}, got {plot}")
    inputs = load_sample() if path is None else load_file(path)
    state = info.best_backend() if backend is None else info.probe(backend)
    if not state.is_usable:
        raise ValueError(f"--backend: {state.name} cannot run here: {state.problem} (see distrattn info)")
    problems = tuple(
        checks.check_attention(
            inputs.q,
            inputs.k,
            inputs.v,
            causal=inputs.causal,
            scale=inputs.scale,
            layout="bhnd",
            out=None,
            grouping=checks.check_grouping(
                inputs.q, method=case.method, fusion=case.fusion, group_size=case.group_size
            ),
        )
        for case in CASES
    )
    if 0 in (*inputs.q.shape, *inputs.k.shape):
        raise ValueError(f"--input: nothing to compare, q is {inputs.q.shape} and k {inputs.k.shape}")
    return Plan(inputs, problems, state, plot)


def load_sample() -> Inputs:
    """Return the packaged sample."""
    folder = resources.files("distrattn_np.data")
    origin = json.loads(folder.joinpath("smollm2_sample.json").read_text(encoding="utf-8"))
    with folder.joinpath("smollm2_sample.npz").open("rb") as file, np.load(file) as arrays:
        q, k, v = (arrays[name] for name in "qkv")
    layers = " and ".join(str(layer) for layer in origin["layers"])
    model = origin["model"].partition(" ")[0]
    return Inputs(q, k, v, origin["scale"], origin["causal"], f"{model}, layers {layers} (packaged sample)")


def load_file(path: Path) -> Inputs:
    """Return the arrays of a caller's .npz file; 3-axis arrays get a batch axis."""
    if not path.is_file():
        raise ValueError(f"--input: no such file, got {path}")
    if not zipfile.is_zipfile(path):
        raise ValueError(f"--input: must be an .npz file as numpy.savez writes it, got {path}")
    with np.load(path) as file:
        missing = [name for name in "qkv" if name not in file]
        if missing:
            raise ValueError(f"--input: must hold arrays q, k and v, got {', '.join(file.files) or 'none'} in {path}")
        q, k, v = (_with_batch_axis(name, file[name]) for name in "qkv")
        settings: dict[str, Any] = {"scale": None, "causal": False}
        for name in settings.keys() & set(file.files):
            if file[name].ndim != 0:
                raise ValueError(f"--input: {name} must be a single value, got shape {file[name].shape}")
            settings[name] = file[name].item()
    return Inputs(q, k, v, settings["scale"], settings["causal"], str(path))


def _with_batch_axis(name: str, array: np.ndarray) -> np.ndarray:
    if array.ndim not in (3, 4):
        raise ValueError(f"--input: {name} must have 3 or 4 axes, got shape {array.shape}")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise ValueError(f"--input: {name} must be finite, got NaN or infinity")
    return np.ascontiguousarray(array if array.ndim == 4 else array[np.newaxis])


def run(plan: Plan, *, as_json: bool) -> int:
    """Measure every case, print the table or the JSON, draw the picture; return the exit status."""
    plot = plan.plot
    if plot is not None and find_spec("matplotlib") is None:
        print("No picture: it needs matplotlib, pip install 'distrattn_np[demo]'", file=sys.stderr)
        plot = None
    B, H = plan.inputs.q.shape[:2]
    with progress(2 * len(CASES) + B * H + (plot is not None)) as step:
        seconds, outputs = run_cases(plan, step)
        maps = [head_maps(plan.inputs, problem) for problem in plan.problems]
        total_variation = compare_rows(plan, maps, step)
        errors = [relative_error(output, outputs[0]) for output in outputs]
        results = [Result(*row) for row in zip(CASES, seconds, errors, total_variation, strict=True)]
        if plot is not None:
            step("picture")
            draw(plan, maps, results, plot)
    report = describe(plan, results, plot)
    if as_json:
        print(json.dumps(report, indent=1, allow_nan=False))
    else:
        print_report(report)
    return 0


def run_cases(plan: Plan, step: Step) -> tuple[list[float], list[np.ndarray]]:
    """Return the median seconds of a call and the result of each case."""
    to_device, synchronize, to_host = array_functions(plan.backend.name)
    q, k, v = (to_device(array) for array in (plan.inputs.q, plan.inputs.k, plan.inputs.v))
    seconds, outputs = [], []
    for case in CASES:
        step(f"{case.label}: first call")
        times = []
        for repeat in range(REPEATS + 1):
            if repeat == 1:
                step(f"{case.label}: timing")
            synchronize()
            start = time.perf_counter()
            out = distr_attention(
                q,
                k,
                v,
                method=case.method,
                group_size=case.group_size,
                fusion=case.fusion,
                causal=plan.inputs.causal,
                scale=plan.inputs.scale,
                backend=plan.backend.name,
            )
            synchronize()
            times.append(time.perf_counter() - start)
        seconds.append(statistics.median(times[1:]))
        outputs.append(to_host(out))
    return seconds, outputs


def array_functions(backend: str) -> tuple[Callable[[Any], Any], Callable[[], None], Callable[[Any], np.ndarray]]:
    """Return how a backend's arrays come from the host, are waited for, and go back."""
    if backend == "cupy":
        import cupy

        return cupy.asarray, cupy.cuda.get_current_stream().synchronize, cupy.asnumpy
    if backend == "numba":
        from numba import cuda

        return cuda.to_device, cuda.synchronize, lambda array: array.copy_to_host()
    return np.asarray, lambda: None, np.asarray


def relative_error(out: np.ndarray, exact: np.ndarray) -> np.ndarray:
    """Return ``||out - exact|| / ||exact||`` of each head, (B, H); zero where both are zero."""
    result = np.zeros(out.shape[:2])
    for head in np.ndindex(result.shape):
        wanted = exact[head].astype(np.float64)
        difference = np.linalg.norm(out[head] - wanted)
        result[head] = difference / np.linalg.norm(wanted) if difference > 0 else 0
    return result


def compare_rows(plan: Plan, maps: Sequence[Maps | None], step: Step, compared: int = COMPARED_ROWS) -> np.ndarray:
    """Return the total variation between rows of P and of exact P, the mean over compared rows: (cases, B, H)."""
    B, H, N, _ = plan.inputs.q.shape
    rows = spread(N, compared)
    result = np.zeros((len(CASES), B, H))
    for b, h in np.ndindex(B, H):
        step(f"attention rows of head {b * H + h + 1} of {B * H}")
        for chunk in chunks(rows, plan.inputs.k.shape[2]):
            exact, *others = (
                attention_rows(plan.inputs, *one, b, h, chunk) for one in zip(plan.problems, maps, strict=True)
            )
            for case, P in enumerate(others, start=1):
                result[case, b, h] += 0.5 * np.abs(P - exact).sum(dtype=np.float64) / len(rows)
    return result


def head_maps(inputs: Inputs, problem: Problem) -> Maps | None:
    """Return the maps of every block; None for exact attention."""
    match problem.grouping:
        case Grouping():
            return reference.group_maps(inputs.q, inputs.k, **problem.map_options)
        case Subspace():
            return reference.make_maps(inputs.q, inputs.k, **problem.map_options)
        case _:
            return None


def attention_rows(inputs: Inputs, problem: Problem, maps: Maps | None, b: int, h: int, rows: np.ndarray) -> np.ndarray:
    """Return these rows of P of one head, (rows, M) float32; the blocks are those that `CASES` have by default."""
    h_kv = h // problem.heads_per_kv_head
    Q = inputs.q[b, h, rows].astype(np.float32)
    K = inputs.k[b, h_kv].astype(np.float32)
    match problem.grouping, maps:
        case Subspace(block_size=L, by="keys"), reference.Maps(W, Z, key_mean):
            mean = key_mean[b, h_kv].astype(np.float32)
            offset = problem.causal_offset
            own = None if offset is None else reference.own_block_begin(rows, block_size=L, causal_offset=offset)
            S = reference.subspace_scores(
                Q, K - mean, W[b, h_kv], Z[b, h_kv], block_size=L, group_by="keys", exact_from=own
            )
        case Grouping(group_size=group_size, block_size=L, by="queries"), (channels, gains):
            S = np.empty((len(rows), len(K)), dtype=np.float32)
            block_of_row = rows // L
            for c in np.unique(block_of_row):
                S[block_of_row == c] = reference.fused_scores(
                    Q[block_of_row == c],
                    K,
                    channels[b, h, c : c + 1],
                    None if gains is None else gains[b, h, c : c + 1],
                    group_size=group_size,
                    block_size=L,
                    group_by="queries",
                )
        case _:
            S = Q @ K.T
    S *= problem.scale
    if problem.causal_offset is not None:
        S[np.arange(len(K)) > rows[:, np.newaxis] + problem.causal_offset] = -np.inf
    row_max = S.max(axis=1, keepdims=True)
    P: np.ndarray = np.exp(S - np.where(row_max == -np.inf, 0, row_max))
    row_sum = P.sum(axis=1, keepdims=True)
    np.divide(P, row_sum, out=P, where=row_sum > 0)
    return P


def spread(size: int, most: int) -> np.ndarray:
    """Return at most ``most`` indices below ``size``, evenly spaced, the last one among them."""
    return np.unique(np.linspace(size - 1, 0, min(size, most)).round().astype(np.intp))


def chunks(rows: np.ndarray, M: int) -> Iterator[np.ndarray]:
    """Yield rows, few enough at a time that their scores against M keys stay within `CHUNK_SCORES`."""
    length = max(1, CHUNK_SCORES // M)
    for start in range(0, len(rows), length):
        yield rows[start : start + length]


def draw(plan: Plan, maps: Sequence[Maps | None], results: Sequence[Result], path: Path) -> None:
    """Draw attention maps of one head, exact beside approximate, and its last row as lines."""
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    N, M = plan.inputs.q.shape[2], plan.inputs.k.shape[2]
    # the head whose attention the default changes as much as the middle one's: neither the best nor the worst
    changed = results[1].total_variation
    b, h = np.unravel_index(np.argsort(changed, axis=None)[changed.size // 2], changed.shape)
    rows = spread(N, COMPARED_ROWS)
    edges = np.unique(np.linspace(0, M, min(M, IMAGE_COLUMNS) + 1).astype(np.intp))
    images = []
    for problem, own in zip(plan.problems, maps, strict=True):
        parts = [attention_rows(plan.inputs, problem, own, int(b), int(h), chunk) for chunk in chunks(rows, M)]
        images.append(np.concatenate([np.add.reduceat(part, edges[:-1], axis=1) for part in parts]))
    # below a hundredth of the uniform row, colours would only tell rounding from zero
    norm = LogNorm(vmin=0.01 / (len(edges) - 1), vmax=1, clip=True)
    figure = Figure(figsize=(3 * len(images), 7.2), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=[3, 2], squeeze=False)[:, 0]
    panels = top.subplots(1, len(images), sharey=True)
    lines = bottom.subplots()
    for i, (panel, result, P) in enumerate(zip(panels, results, images, strict=True)):
        shown = np.where(P > 0, P, np.nan)  # keys that a query must not see stay white
        image = panel.imshow(shown, norm=norm, extent=(0, M, N, 0), aspect="auto", interpolation="nearest")
        note = f"\ntotal variation {result.total_variation[b, h]:.2f}" if i else ""
        panel.set(title=result.case.label + note, xlabel="key")
        lines.plot(
            edges[:-1], P[-1], label=result.case.label, color=f"C{i - 1}" if i else "black", lw=0.9 if i else 1.6
        )
    panels[0].set_ylabel("query")
    keys = f"weight of {edges[1]} keys" if edges[1] > 1 else "weight"
    top.colorbar(image, ax=panels, label=keys, pad=0.01)
    lines.set(yscale="log", xlim=(0, M), xlabel="key", ylabel=keys)
    lines.set_title(f"query {rows[-1]}", loc="left")
    lines.legend(ncols=len(images), loc="lower right", bbox_to_anchor=(1, 1), frameon=False)
    figure.suptitle(f"{plan.inputs.origin}: rows of softmax(scale Q K^T), batch {b}, head {h}")
    figure.savefig(path, dpi=110)


def describe(plan: Plan, results: Sequence[Result], plot: Path | None) -> dict[str, Any]:
    """Return the report as plain values."""
    inputs, problem = plan.inputs, plan.problems[1]
    names = [device.name for device in plan.backend.devices[:1]]  # calls run on device 0
    return {
        "distrattn_np": __version__,
        "backend": plan.backend.name,
        "runs_on": names[0] if names else plan.backend.runs_on,
        "input": {
            "origin": inputs.origin,
            "q": inputs.q.shape,
            "k": inputs.k.shape,
            "v": inputs.v.shape,
            "dtype": inputs.q.dtype.name,
            "scale": problem.scale,
            "causal": inputs.causal,
        },
        "timed_calls": REPEATS,
        "compared_rows_per_head": len(spread(problem.queries, COMPARED_ROWS)),
        "results": [
            {
                "case": result.case.label,
                "group_size": result.case.group_size,
                "method": "exact" if own.grouping is None else result.case.method,
                "fusion": result.case.fusion,
                "group_by": None if own.grouping is None else own.grouping.by,
                "block_size": None if own.grouping is None else own.grouping.block_size,
                "seconds": result.seconds,
                "speed_up": results[0].seconds / result.seconds,
                "relative_error": float(result.relative_error.mean()),
                "total_variation": float(result.total_variation.mean()),
                "relative_error_per_head": result.relative_error.tolist(),
                "total_variation_per_head": result.total_variation.tolist(),
            }
            for own, result in zip(plan.problems, results, strict=True)
        ],
        "plot": None if plot is None else str(plot),
    }


HEADINGS = ("method", "time", "speed-up", "output error", "total variation")


def print_report(report: dict[str, Any]) -> None:
    """Print the report as text: a `rich` table where that is installed, else a plain one."""
    given = report["input"]
    B, H, N, D = given["q"]
    M = given["k"][2]
    mask = "causal" if given["causal"] else "not causal"
    print(f"\n{given['origin']}: B={B} H={H} N={N} M={M} D={D}, {given['dtype']}, {mask}")
    blocks = {row["method"]: f"{row['block_size']} {row['group_by']}" for row in report["results"] if row["block_size"]}
    sizes = ", ".join(f"{size} for {method}" for method, size in blocks.items())
    print(f"backend {report['backend']} on {report['runs_on']}; blocks of {sizes}\n")
    lines = [
        (
            row["case"],
            f"{1000 * row['seconds']:.2f} ms",
            f"{row['speed_up']:.2f}x",
            f"{row['relative_error']:.3f}",
            f"{row['total_variation']:.3f}",
        )
        for row in report["results"]
    ]
    print_table(lines)
    print(
        "\noutput error: ||out - exact|| / ||exact||; total variation, between rows of the attention matrix: 0 is the"
        "\nsame row, 1 a disjoint one. Both are means over heads. Times are medians; for speed at chosen sizes run"
        "\ndistrattn bench."
        "\n\nsubspace is the default. lsh is the paper's grouping, and the paper fine-tunes models with it: one that"
        "\nwas not, such as that of the packaged sample, does not keep its quality (docs/accuracy.md)."
    )
    if report["plot"] is not None:
        print(f"\nPicture: {report['plot']}")


def print_table(lines: Sequence[Sequence[str]]) -> None:
    """Print lines of text under `HEADINGS`."""
    if find_spec("rich") is None:
        widths = [max(map(len, column)) for column in zip(HEADINGS, *lines, strict=True)]
        for line in (HEADINGS, tuple("-" * width for width in widths), *lines):
            name, *numbers = zip(line, widths, strict=True)
            print("  ".join((name[0].ljust(name[1]), *(cell.rjust(width) for cell, width in numbers))))
        print("\n(a nicer table and a picture: pip install 'distrattn_np[demo]')")
        return
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for heading in HEADINGS:
        table.add_column(heading, justify="left" if heading == HEADINGS[0] else "right")
    for line in lines:
        table.add_row(*line)
    Console().print(table)


@contextmanager
def progress(total: int) -> Iterator[Step]:
    """Give a function that reports each of ``total`` steps on standard error: a `rich` bar where that is installed."""
    if find_spec("rich") is None:
        done = 0

        def plain(description: str) -> None:
            nonlocal done
            done += 1
            print(f"[{done}/{total}] {description}", file=sys.stderr, flush=True)

        yield plain
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=total, completed=-1)

        def advance(description: str) -> None:
            bar.update(task, description=description, advance=1)

        yield advance
        bar.update(task, description="done", completed=total)
