"""Reports as text: the table of a run, two runs side by side, the file that keeps one."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from typing import Any

from .axes import EXACT
from .peers import PEERS

Report = dict[str, Any]
Cell = Callable[[dict[str, Any]], str]
"""Text of one column for a row."""
SCHEMA = 1


def save(report: Report, path: Path) -> None:
    """Write a report; a half-written file never replaces an older one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = ",\n".join(json.dumps(row) for row in report["rows"])  # a line each: small, and differences can be read
    head = json.dumps({key: value for key, value in report.items() if key != "rows"}, indent=1)
    partial = path.with_suffix(path.suffix + ".part")
    partial.write_text(f'{head.removesuffix("}").rstrip()},\n "rows": [\n{rows}\n]}}\n', encoding="utf-8")
    partial.replace(path)


def load(path: Path) -> Report:
    """Read a report, or raise ValueError where the file is none."""
    report = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(report, dict) or report.get("schema") != SCHEMA:
        raise ValueError(f"{path}: not a bench report of schema {SCHEMA}")
    return report


def print_rows(rows: Sequence[dict[str, Any]]) -> None:
    """Print the rows of each shape as a table, and below it what has no time, with its reason."""
    for shape_label, group in groupby(rows, key=lambda row: row["shape_label"]):
        shape_rows = list(group)
        bases = [row["label"] for row in shape_rows if row["options"] == EXACT and row["status"] == "ok"]
        columns = [*COLUMNS, *((f"x {base}", _speedup_over(base)) for base in bases)]
        lines = []
        for row in shape_rows:
            if row["status"] == "ok":
                lines.append([cell(row) for _, cell in columns])
            else:
                lines.append([row["label"], row["status"], *["-"] * (len(columns) - 2)])
        used = [i for i in range(len(columns)) if any(line[i] != "-" for line in lines)]
        print_table(shape_label, [columns[i][0] for i in used], [[line[i] for i in used] for line in lines])
        for row in shape_rows:
            if row["reason"] is not None:
                print(f"  {row['label']}: {row['status']}: {row['reason']}")
        print()


def compare(before: Report, after: Report) -> None:
    """Print the cold medians of two reports beside each other, line by line, and how the machines differ."""
    rows = {(row["shape_label"], row["label"]): row for row in before["rows"]}
    lines = []
    for row in after["rows"]:
        old = rows.pop((row["shape_label"], row["label"]), None)
        lines.append(_compared_line(row["shape_label"], row["label"], old, row))
    lines += [_compared_line(shape, label, old, None) for (shape, label), old in rows.items()]
    print_table("", ("shape", "contender", "before us", "after us", "before / after", "error before", "after"), lines)
    for key in ("gpu", "cpu", "threads", "cuda_driver", "cuda_runtime", "numpy", "cupy", "packages", "git"):
        old_value, new_value = (report["environment"].get(key) for report in (before, after))
        if old_value != new_value:
            print(f"{key}: {old_value} -> {new_value}")


def _compared_line(shape: str, label: str, old: dict[str, Any] | None, new: dict[str, Any] | None) -> tuple[str, ...]:
    def told(row: dict[str, Any] | None) -> tuple[float | None, str, str]:
        if row is None:
            return None, "", ""
        if row["status"] != "ok":
            return None, row["status"], ""
        median = row["cold_us"]["median"]
        return median, number(median, ",.0f"), number(row["error_random"], ".1e")

    (old_us, old_text, old_error), (new_us, new_text, new_error) = told(old), told(new)
    ratio = None if old_us is None or new_us is None else old_us / new_us
    return shape, label, old_text, new_text, number(ratio, ".3f"), old_error, new_error


def print_table(title: str, headings: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    """Print a table, the first column to the left, the others to the right; `rich` draws it where that is installed."""
    if find_spec("rich") is None:
        widths = [max(map(len, column)) for column in zip(headings, *lines, strict=True)]
        print(title)
        for line in (headings, ["-" * width for width in widths], *lines):
            cells = [cell.rjust(width) for cell, width in zip(line, widths, strict=True)]
            print("  ".join([line[0].ljust(widths[0]), *cells[1:]]))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="right" if i else "left", no_wrap=i == 0)
    for line in lines:
        table.add_row(*line)
    console = Console()
    if not console.is_terminal:  # a file has no width: give every column what it needs
        console.width = 240
    console.print(table)


def number(value: float | None, form: str) -> str:
    """Return a formatted number, a dash for none."""
    return "-" if value is None else format(value, form)


def title_of(label: str) -> str:
    """Return what a contender is called in documents."""
    return PEERS[label].title if label in PEERS else label


def milliseconds(microseconds: float) -> str:
    """Return a time in milliseconds with three digits."""
    return f"{microseconds / 1e3:.3g}" if microseconds < 1e6 else f"{microseconds / 1e3:.0f}"


def markdown_table(headings: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Return a table as Markdown, the first column to the left, the others to the right."""
    rule = ["---", *["---:"] * (len(headings) - 1)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (headings, rule, *lines))


def _median(key: str) -> Cell:
    def cell(row: dict[str, Any]) -> str:
        times = row[key]
        return number(times["median"] if isinstance(times, dict) else times, ",.1f")

    return cell


def _speedup_over(base: str) -> Cell:
    return lambda row: number(row["speedup"].get(base), ".2f")


COLUMNS: tuple[tuple[str, Cell], ...] = (
    ("contender", lambda row: str(row["label"])),
    ("cold us", _median("cold_us")),
    ("p20", lambda row: number(row["cold_us"]["p20"], ",.1f")),
    ("p80", lambda row: number(row["cold_us"]["p80"], ",.1f")),
    ("burst us", _median("burst_us")),
    ("sustained us", _median("sustained_us")),
    ("grouping us", _median("grouping_us")),
    ("forward us", _median("forward_us")),
    ("exact-eq. TFLOP/s", lambda row: number(row["exact_tflops"], ".3g")),
    ("executed TFLOP/s", lambda row: number(row["executed_tflops"], ".3g")),
    ("% of peak", lambda row: number(row["peak_percent"], ".0f")),
    ("10^12 exp/s", lambda row: number(row.get("tera_exponentials_per_s"), ".3g")),
    ("% of exp", lambda row: number(row.get("exponentials_percent"), ".0f")),
    ("GB/s", lambda row: number(row["gb_per_s"], ",.0f")),
    ("% of copy", lambda row: number(row["copy_percent"], ".0f")),
    ("error random", lambda row: number(row["error_random"], ".1e")),
    ("error real", lambda row: number(row["error_sample"], ".3f")),
)
