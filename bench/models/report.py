"""What was measured, as plain values, as tables and as pictures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .comparison import OWN, best_within, nearer_in, ranges, split

Report = dict[str, Any]
"""``environment``: of the run; ``rows``: one for each task and method."""
NEAR_ONE = 0.9995
"""From here on, four digits of a cosine no longer tell rows apart."""


def load(paths: Sequence[Path]) -> Report:
    """Return the report in a file, or those of several files as one, with the environment of the first."""
    reports: list[Report] = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    return {"environment": reports[0]["environment"], "rows": [row for report in reports for row in report["rows"]]}


def save(report: Report, path: Path) -> None:
    """Write the report."""
    path.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def by_task(report: Report) -> list[tuple[str, list[dict[str, Any]]]]:
    """Return the title of each task with its rows, in the order in which they were measured."""
    tasks: dict[str, list[dict[str, Any]]] = {}
    for row in report["rows"]:
        tasks.setdefault(f"{row['title']}, {row['input']}", []).append(row)
    return list(tasks.items())


def table(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Return headings and lines of one task; times are of the whole forward pass, and of attention within it."""
    measures = list(rows[0]["columns"])
    headings = ["method", "FLOP of exact", "mean R", *measures, "seconds", "of which attention"]
    exact = next((row for row in rows if row["method"] == "exact"), None)
    lines = [headings]
    for row in rows:
        if row["status"] != "ok":
            lines.append([row["label"], row["status"], *[""] * (len(headings) - 2)])
            continue
        qualities = (
            _number(name, row["quality"][name], None if exact is None else exact["quality"][name]) for name in measures
        )
        rank = "" if row["mean_rank"] is None else f"{row['mean_rank']:.1f}"
        times = (f"{row[name]:.3g}" for name in ("seconds", "attention_seconds"))
        lines.append([row["label"], f"{row['flop_ratio']:.2f}", rank, *qualities, *times])
    return lines


def _number(name: str, value: float, exact: float | None) -> str:
    if name == "divergence":
        return f"{value:.2g}"
    if name != "perplexity":
        return f"{value:.4f}" if value < NEAR_ONE or value == exact else f"{value:.6f}"
    text = f"{value:.2f}" if value < 1000 else f"{value:.0f}"
    if exact is None or value == exact:
        return text
    change = 100 * (value / exact - 1)
    return f"{text} ({change:+.0f} %)" if change >= 10 else f"{text} ({change:+.2f} %)"


def markdown(report: Report) -> str:
    """Return all tables as Markdown."""
    parts = []
    for title, rows in by_task(report):
        headings, *lines = table(rows)
        parts += [f"**{title}**", "", *_markdown_table(headings, lines, left=headings[:1]), ""]
    return "\n".join(parts).rstrip()


def comparison(report: Report) -> str:
    """Return as Markdown, for each task with peers, every peer beside the best own row of no more FLOP."""
    parts = []
    for title, rows in by_task(report):
        exact, own, peers = split(rows)
        if not peers:
            continue
        first, *_ = measures = list(exact["columns"])
        headings = ["peer", "FLOP", *measures, "own", "FLOP", *measures, "own is nearer in"]
        lines = []
        for peer in sorted(peers, key=lambda row: row["flop_ratio"]):
            best = best_within(own, peer["flop_ratio"], exact, first)
            nearer = [] if best is None else nearer_in(best, peer, exact)
            best_cells = ["none", *[""] * (1 + len(measures))] if best is None else _cells(best, exact)
            lines.append([*_cells(peer, exact), *best_cells, ", ".join(nearer) or "none"])
        spans = ", ".join(f"{low:.3f} to {high:.3f}" for low, high in ranges(own, peers, exact, first))
        parts += [f"**{title}**", "", *_markdown_table(headings, lines, left=("peer", "own", headings[-1])), ""]
        parts += [f"Own rows are nearer than every peer in {first} at a FLOP of: {spans or 'none'}.", ""]
    return "\n".join(parts).rstrip()


def _cells(row: dict[str, Any], exact: dict[str, Any]) -> list[str]:
    qualities = (_number(name, row["quality"][name], exact["quality"][name]) for name in exact["columns"])
    return [f"`{row['label']}`", f"{row['flop_ratio']:.2f}", *qualities]


def _markdown_table(headings: Sequence[str], lines: Sequence[Sequence[str]], left: Sequence[str]) -> list[str]:
    """Return the lines of a table whose columns are aligned to the right but for those of ``left``."""
    rule = ["---" if heading in left else "---:" for heading in headings]
    return [f"| {' | '.join(line)} |" for line in (headings, rule, *lines)]


def fill(text: str, report: Report) -> str:
    """Return a document with its tables written anew; ValueError where a part's marks are not there once each."""
    for name, body in (("models", markdown(report)), ("comparison", comparison(report))):
        begin, end = marks(name)
        if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
            raise ValueError(f"--document: must hold {begin.strip()} and then {end} once each")
        before, _, rest = text.partition(begin)
        text = f"{before}{begin}\n{body}\n\n{end}{rest.partition(end)[2]}"
    return text


def marks(name: str) -> tuple[str, str]:
    """Return what a written part of a document stands between."""
    return f"<!-- {name}:begin -->\n", f"<!-- {name}:end -->"


def show(report: Report) -> None:
    """Print all tables: with ``rich`` where that is installed, else as Markdown."""
    if find_spec("rich") is None:
        print(markdown(report))
        return
    from rich.console import Console
    from rich.table import Table

    for title, rows in by_task(report):
        headings, *lines = table(rows)
        drawn = Table(title=title)
        for heading in headings:
            drawn.add_column(heading, justify="left" if heading == headings[0] else "right")
        for line in lines:
            drawn.add_row(*line)
        Console().print(drawn)


def draw(report: Report, folder: Path) -> list[Path]:
    """Draw one picture for each task into ``folder``: what is lost, against R, attention FLOP and time."""
    from matplotlib.figure import Figure

    paths = []
    for i, (title, rows) in enumerate(by_task(report)):
        measured = [row for row in rows if row["status"] == "ok"]
        if len(measured) < 2:
            continue
        measure = next(iter(measured[0]["columns"]))
        figure = Figure(figsize=(12, 4), layout="constrained")
        panels = figure.subplots(1, 3, sharey=True)
        exact = next(row for row in measured if row["method"] == "exact")
        axes = {
            "mean R": "mean_rank",
            "attention FLOP of exact": "flop_ratio",
            "seconds of the forward pass": "seconds",
        }
        colours = {name: f"C{n}" for n, name in enumerate(dict.fromkeys(row["method"] for row in measured[1:]))}
        for panel, (label, key) in zip(panels, axes.items(), strict=True):
            for method, points in _points(measured, exact, measure, key).items():
                marker = "o" if method in OWN else "x"
                panel.plot(*zip(*points, strict=True), marker=marker, ls="", color=colours[method], label=method)
            if exact[key] is not None:
                panel.axvline(exact[key], color="black", lw=0.8)
            panel.set(xlabel=label, yscale="log")
        panels[0].set_ylabel(_loss_label(measure))
        panels[1].legend(fontsize="small")
        figure.suptitle(title, fontsize="medium")
        path = folder / f"models_{rows[0]['model']}_{i}.png"
        figure.savefig(path, dpi=80)
        paths.append(path)
    return paths


def _points(
    rows: Sequence[dict[str, Any]], exact: dict[str, Any], measure: str, key: str
) -> dict[str, list[tuple[float, float]]]:
    """Return the points of each method: ``key``, and what of ``measure`` is lost."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if row["method"] != "exact" and row[key] is not None:
            point = (row[key], _loss(row["quality"][measure], exact["quality"][measure], measure))
            lines.setdefault(row["method"], []).append(point)
    return lines


def _loss(value: float, exact: float, measure: str) -> float:
    if measure == "divergence":
        return value
    return value / exact - 1 if measure == "perplexity" else 1 - value


def _loss_label(measure: str) -> str:
    return {"divergence": "divergence, nats", "perplexity": "perplexity / exact - 1"}.get(measure, f"1 - {measure}")
