"""``distrattn bench``: run, list, table, roofline, compare, plot."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from .. import checks, info
from ..export import ExportError
from . import report, roofline, table
from .axes import METHODS, PRESETS, Axes, Preset, multiply_out
from .device import BACKENDS, Kind, open_device
from .environment import describe_environment, gpu_state
from .peers import PEERS, load_peers
from .runner import Plan, profile, run
from .timing import SUSTAINED_SECONDS

DOCUMENTS = [Path("README.md"), Path("docs", "performance.md")]
"""Those with tables of results."""
THREAD_VARIABLES = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")
"""Read once, when the libraries load: a run with ``--threads`` therefore starts in a new process."""


def main(argv: list[str]) -> int:
    """Run ``distrattn bench`` with these arguments; return its exit code."""
    arguments = _parser().parse_args(argv)
    try:
        code: int = arguments.command(arguments, argv)
    except (ValueError, ImportError, OSError, ExportError) as error:
        print(f"distrattn bench: {error}", file=sys.stderr)
        return 2
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="distrattn bench", description="Speed beside error, against peers.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="check and time every point of the axes", epilog="LIST: values with commas.")
    run.set_defaults(command=_run)
    run.add_argument("--preset", type=_list_of(_choice(*PRESETS)), default=[], metavar="LIST", help=", ".join(PRESETS))
    sizes = {
        "-N": "queries",
        "-M": "keys (default: as many as queries)",
        "-B": "batch",
        "-H": "query heads",
        "--kv-heads": "key/value heads (default: one for each query head)",
        "-D": "query/key width",
        "-E": "value width (default: D)",
        "-G": "channels per group; 1 is exact",
        "-R": "ranks of subspace, beside those that follow from G",
    }
    for flag, meaning in sizes.items():
        run.add_argument(flag, type=_list_of(_size), metavar="LIST", help=f"{meaning}; 8k is 8192")
    run.add_argument("-L", type=_list_of(_block_size), metavar="LIST", help='rows per block, or "default"')
    words: dict[str, tuple[str, ...]] = {
        "--dtype": checks.DTYPES,
        "--method": METHODS,
        "--fusion": ("sum", "lstsq"),
        "--group-by": ("queries", "keys"),
    }
    for flag, choices in words.items():
        run.add_argument(flag, type=_list_of(_choice(*choices)), metavar="LIST", help=", ".join(choices))
    run.add_argument("--causal", action="append_const", dest="causal", const=True, help="with --full: both")
    run.add_argument(
        "--cached", action="append_const", dest="cached", const=True, help="keys are grouped before the call: subspace"
    )
    run.add_argument("--full", action="append_const", dest="causal", const=False)
    run.add_argument(
        "--backend",
        type=_list_of(_choice(*BACKENDS)),
        metavar="LIST",
        help=f"{', '.join(BACKENDS)} (default: cupy where it has a device, else numpy)",
    )
    run.add_argument(
        "--peers",
        type=_list_of(_choice("all", "none", *PEERS)),
        default=["all"],
        metavar="LIST",
        help=f"all (default), none, or of {', '.join(PEERS)}",
    )
    run.add_argument("--repeat", type=_size, metavar="ROUNDS", help="cold runs of each contender")
    run.add_argument(
        "--sustained",
        type=_seconds,
        default=SUSTAINED_SECONDS,
        metavar="SECONDS",
        help="how long a contender is called without a pause (default: %(default)g)",
    )
    run.add_argument("--threads", type=_size, metavar="T", help="CPU threads of NumPy and PyTorch")
    run.add_argument("--json", type=Path, metavar="FILE", help="write the report")
    run.add_argument("--resume", action="store_true", help="keep the shapes that the file has, run the others")
    run.add_argument("--profile", action="store_true", help="call everything once, unchecked and without timers")

    commands.add_parser("list", help="show the presets").set_defaults(command=_list)

    tables = commands.add_parser("table", help="write the tables of the documentation from the committed results")
    tables.set_defaults(command=_table)
    tables.add_argument("documents", nargs="*", type=Path, default=DOCUMENTS, metavar="FILE")
    tables.add_argument("--results", type=Path, default=Path(__file__).parent / "results", metavar="FOLDER")
    tables.add_argument("--check", action="store_true", help="write nothing; exit code 1 where a table is not current")

    limits = commands.add_parser("roofline", help="how near the calls of a report came to what the machine can do")
    limits.set_defaults(command=_roofline)
    limits.add_argument("report", type=Path)
    limits.add_argument("--kernels", action="store_true", help="compile the kernels again and add them to the report")

    compare = commands.add_parser("compare", help="two reports side by side")
    compare.set_defaults(command=_compare)
    compare.add_argument("before", type=Path)
    compare.add_argument("after", type=Path)

    plot = commands.add_parser("plot", help="speed-up over the number of queries, as a picture")
    plot.set_defaults(command=_plot)
    plot.add_argument("report", type=Path)
    plot.add_argument("picture", type=Path, nargs="?", help="default: beside the report")
    return parser


def _run(arguments: argparse.Namespace, argv: list[str]) -> int:
    presets = [PRESETS[name] for name in arguments.preset] or [Preset((Axes(),))]
    threads = arguments.threads or next((preset.threads for preset in presets if preset.threads is not None), None)
    if threads is not None:
        if any(os.environ.get(name) != str(threads) for name in THREAD_VARIABLES):
            return _run_with_threads(threads, argv)
        _limit_cpus(threads)
    kind, backend_names = _choose_backends(arguments.backend)
    device = open_device(kind)
    axes = [replace(some, **_overrides(arguments)) for preset in presets for some in preset.axes]
    points = multiply_out(axes, device.default_dtype)  # a mistake in the axes ends the run before it begins
    wanted = list(PEERS) if "all" in arguments.peers else [name for name in arguments.peers if name != "none"]
    peers, missing = load_peers(wanted, kind, info.cpu_cores())
    for name, reason in missing.items():
        _say(f"peer {name} is missing: {reason}")
    measured: report.Report = {
        "schema": report.SCHEMA,
        "kind": kind,
        "environment": describe_environment(kind, argv),
        "missing_peers": missing,
        "sustained_seconds": arguments.sustained,
        "peaks": {},
        "rows": [],
    }
    if arguments.resume:
        measured = _resumed(measured, arguments.json)
        done = {row["shape_label"] for row in measured["rows"]}
        points = [(shape, variants) for shape, variants in points if shape.label not in done]
    plan = Plan(device, points, backend_names, peers, arguments.repeat or device.default_rounds, arguments.sustained)
    if arguments.profile:
        profile(plan, _say)
        return 0

    def save() -> None:
        if arguments.json is not None:
            report.save(measured, arguments.json)

    save()  # a path that cannot be written ends the run before it begins
    for rows in run(plan, _say, measured["peaks"]):
        measured["rows"] += rows
        if kind == "gpu":  # right after the load: the clocks of an idle GPU say nothing
            measured["environment"]["gpu_state"] = gpu_state()
        roofline.add_exponentials(measured)
        report.print_rows(rows)
        save()  # after every shape: a long run may be cut off
    ours = [row for row in measured["rows"] if row["contender"] in BACKENDS]
    return 1 if any(row["status"] in ("wrong", "failed") for row in ours) else 0


def _resumed(measured: report.Report, path: Path | None) -> report.Report:
    """Return the report that ``path`` holds, to go on with; a new one where there is none yet."""
    if path is None:
        raise ValueError("--resume: needs --json FILE")
    if not path.exists():
        return measured
    begun = report.load(path)
    for key in ("kind", "missing_peers", "sustained_seconds"):
        if begun.get(key) != measured[key]:
            raise ValueError(f"--resume: {key} of {path} is {begun.get(key)}, here it is {measured[key]}")
    before, now = begun["environment"], measured["environment"]
    for key in sorted(now.keys() - {"date", "argv", "platform"}):
        if before.get(key) != now[key]:
            raise ValueError(f"--resume: {key} of {path} is {before.get(key)}, here it is {now[key]}")
    before.setdefault("resumed", []).append({key: now[key] for key in ("date", "argv")})
    return begun


def _overrides(arguments: argparse.Namespace) -> dict[str, tuple[Any, ...]]:
    """Return the axes that the command line names; they replace those of a preset."""
    given = {field.name: getattr(arguments, field.name) for field in fields(Axes)}
    return {name: tuple(values) for name, values in given.items() if values is not None}


def _choose_backends(names: list[str] | None) -> tuple[Kind, list[str]]:
    """Return the backends to run and the one kind of device that all of them are timed on."""
    chosen = names or ["cupy" if info.probe("cupy").devices else "numpy"]
    kinds = {BACKENDS[name] for name in chosen}
    if len(kinds) > 1:
        raise ValueError(f"--backend: one run times one device, got {', '.join(chosen)}")
    if "gpu" in kinds:
        for name in dict.fromkeys(["cupy", *chosen]):  # inputs and clock are CuPy's, whatever the backend
            state = info.probe(name)
            if not state.devices:
                raise ValueError(f"--backend: {', '.join(chosen)} cannot run here: {name}: {state.problem or 'no GPU'}")
    return kinds.pop(), chosen


def _run_with_threads(threads: int, argv: list[str]) -> int:
    environment = os.environ | dict.fromkeys(THREAD_VARIABLES, str(threads))
    return subprocess.run([sys.executable, "-m", __package__, *argv], env=environment, check=False).returncode


def _limit_cpus(threads: int) -> None:
    """Keep this process on as many CPUs: the NumPy backend starts a worker for each."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])


def _list(_arguments: argparse.Namespace, _argv: list[str]) -> int:
    for name, preset in PRESETS.items():
        for axes in preset.axes:
            told = [name + ":"]
            for field in fields(Axes):
                values = getattr(axes, field.name)
                if values is not None:
                    told.append(f"{field.name}={','.join('default' if x is None else str(x) for x in values)}")
            print(*told, *([] if preset.threads is None else [f"threads={preset.threads}"]))
    return 0


def _table(arguments: argparse.Namespace, _argv: list[str]) -> int:
    stale = []
    for path in arguments.documents:
        old = path.read_text(encoding="utf-8")
        new = table.fill(old, arguments.results)
        if new != old:
            stale.append(path)
            if not arguments.check:
                path.write_text(new, encoding="utf-8")
    for path in stale:
        print(f"{path}: {'not current: run distrattn bench table' if arguments.check else 'written'}")
    return 1 if stale and arguments.check else 0


def _roofline(arguments: argparse.Namespace, _argv: list[str]) -> int:
    measured = report.load(arguments.report)
    if arguments.kernels:
        roofline.add_kernels(measured)
        report.save(measured, arguments.report)
    print(roofline.markdown(measured))
    return 0


def _compare(arguments: argparse.Namespace, _argv: list[str]) -> int:
    report.compare(report.load(arguments.before), report.load(arguments.after))
    return 0


def _plot(arguments: argparse.Namespace, _argv: list[str]) -> int:
    from .plot import plot

    picture = arguments.picture or arguments.report.with_suffix(".png")
    plot(report.load(arguments.report), picture)
    print(f"{picture}: written")
    return 0


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _list_of(item: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    def parse(text: str) -> list[Any]:
        return list(dict.fromkeys(item(part.strip()) for part in text.split(",")))

    return parse


def _size(text: str) -> int:
    """Return a positive number; "8k" is 8192."""
    digits, kilo = (text[:-1], 1024) if text.endswith("k") else (text, 1)
    if not digits.isdecimal() or int(digits) == 0:
        raise argparse.ArgumentTypeError(f"must be a positive number, got {text!r}")
    return int(digits) * kilo


def _seconds(text: str) -> float:
    """Return a positive number of seconds."""
    seconds = float(text)
    if not 0 < seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a positive number, got {text!r}")
    return seconds


def _block_size(text: str) -> int | None:
    return None if text == "default" else _size(text)


def _choice(*choices: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in choices:
            raise argparse.ArgumentTypeError(f"must be of {', '.join(choices)}, got {text!r}")
        return text

    return parse
