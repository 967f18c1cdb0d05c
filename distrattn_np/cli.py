"""The ``distrattn`` command: demo, info, export, bench, models."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from . import __version__, backends

_GROUPING_NUMBERS = ("group_size", "rank", "refine", "block_size", "seed")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of every sub-command but ``bench`` and ``models``, which have their own."""
    parser = argparse.ArgumentParser(prog="distrattn", description="Approximate attention that keeps the full context.")
    parser.add_argument("--version", action="version", version=f"distrattn_np {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)

    demo = commands.add_parser("demo", help="run on a real sample: time and error beside exact attention")
    demo.add_argument("--backend", choices=backends.NAMES, help="default: the fastest that can run here")
    demo.add_argument(
        "--input",
        type=Path,
        metavar="FILE.npz",
        help="your own q, k, v: (heads, rows, width) or (batch, heads, rows, width); optional scale and causal",
    )
    demo.add_argument("--json", action="store_true", help="print the results as JSON")
    picture = demo.add_mutually_exclusive_group()
    picture.add_argument("--plot", type=Path, metavar="FILE", default=Path("distrattn_demo.png"), help="%(default)s")
    picture.add_argument("--no-plot", dest="plot", action="store_const", const=None, help="draw no picture")

    info = commands.add_parser("info", help="backends, devices and kernels on this machine; what to install for more")
    info.add_argument("--json", action="store_true", help="print it as JSON")

    _add_export(commands.add_parser("export", help="compiled kernels of one call and their launches, without a GPU"))

    commands.add_parser("bench", help="speed beside error, against peers; see distrattn bench --help", add_help=False)
    commands.add_parser("models", help="whole models with it; see distrattn models --help", add_help=False)
    return parser


def _add_export(parser: argparse.ArgumentParser) -> None:
    from . import checks, export

    parser.add_argument("--arch", required=True, choices=export.ARCHITECTURES)
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="cubins, constants, launches.json")
    parser.add_argument("--dtype", choices=checks.DTYPES, default="float16")
    parser.add_argument("--layout", choices=("bhnd", "bnhd"), default="bhnd")
    sizes = parser.add_argument_group("sizes")
    for name, default in (("batch", 1), ("heads", 8), ("queries", 4096), ("width", 128)):
        sizes.add_argument(f"--{name}", type=int, default=default, help="%(default)s")
    for name, other in (("kv-heads", "heads"), ("keys", "queries"), ("value-width", "width")):
        sizes.add_argument(f"--{name}", type=int, help=f"as --{other}")
    call = parser.add_argument_group("options of the call")
    call.add_argument("--exact", action="store_true", help="exact_attention; no option of grouping then")
    call.add_argument("--method", choices=("subspace", "lsh"))
    call.add_argument("--fusion", choices=("sum", "lstsq"))
    call.add_argument("--group-by", choices=("queries", "keys"))
    for name in _GROUPING_NUMBERS:
        call.add_argument(f"--{name.replace('_', '-')}", type=int)
    call.add_argument("--score-tol", type=float)
    call.add_argument("--scale", type=float)
    call.add_argument("--causal", nargs="?", const="bottom-right", default=False, choices=("bottom-right", "top-left"))
    call.add_argument("--lse", action="store_true", help="the log-sum-exp is a result")
    parser.add_argument("--multiprocessors", type=_count, help="of the device, for the grids; default: a large one's")


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def _export(options: argparse.Namespace) -> int:
    from . import export

    grouping = {
        name: getattr(options, name)
        for name in ("method", "fusion", "group_by", "score_tol", *_GROUPING_NUMBERS)
        if getattr(options, name) is not None
    }
    try:
        if options.exact and grouping:
            raise ValueError(f"--exact: takes no option of grouping, got {', '.join(grouping)}")
        call = export.Call(
            batch=options.batch,
            heads=options.heads,
            kv_heads=options.heads if options.kv_heads is None else options.kv_heads,
            queries=options.queries,
            keys=options.queries if options.keys is None else options.keys,
            width=options.width,
            value_width=options.width if options.value_width is None else options.value_width,
            dtype=options.dtype,
            layout=options.layout,
            causal=options.causal,
            scale=options.scale,
            grouping={} if options.exact else {"method": "subspace"} | grouping,
        )
        report = export.export(
            call, options.arch, options.out, returns_lse=options.lse, multiprocessors=options.multiprocessors
        )
    except (ImportError, NotImplementedError, OSError, RuntimeError, TypeError, ValueError) as error:
        print(f"distrattn export: error: {error}", file=sys.stderr)
        return 2
    for kernel in report["kernels"]:
        print(options.out / kernel["file"])
    count, size = len(report["launches"]), report["workspace_bytes"]
    print(f"{options.out / 'launches.json'}: {count} launches, {size} bytes of workspace")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status: 0, or 2 for an argument or input that is wrong."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["bench"]:  # the rest is the bench's own
        from .bench import main as bench

        return bench(arguments[1:])
    if arguments[:1] == ["models"]:
        from .bench.models import main as models

        return models(arguments[1:])
    options = build_parser().parse_args(arguments)
    if options.command == "info":
        from . import info

        return info.run(as_json=options.json)
    if options.command == "export":
        return _export(options)
    from . import demo

    try:
        plan = demo.prepare(options.input, options.backend, options.plot)
    except (OSError, ValueError, TypeError) as error:
        print(f"distrattn demo: error: {error}", file=sys.stderr)
        return 2
    return demo.run(plan, as_json=options.json)
