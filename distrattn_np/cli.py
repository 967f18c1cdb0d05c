"""The ``distrattn`` command: demo, info, bench, models."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from . import __version__, backends


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

    commands.add_parser("bench", help="speed beside error, against peers; see distrattn bench --help", add_help=False)
    commands.add_parser("models", help="whole models with it; see distrattn models --help", add_help=False)
    return parser


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
    from . import demo

    try:
        plan = demo.prepare(options.input, options.backend, options.plot)
    except (OSError, ValueError, TypeError) as error:
        print(f"distrattn demo: error: {error}", file=sys.stderr)
        return 2
    return demo.run(plan, as_json=options.json)
