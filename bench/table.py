"""The Markdown tables between ``<!-- bench:begin KIND -->`` and ``<!-- bench:end KIND -->``, from committed results."""

from __future__ import annotations

import re
from itertools import groupby
from pathlib import Path
from typing import Any

from . import report, roofline
from .axes import EXACT
from .peers import PEERS
from .report import Report, markdown_table, milliseconds, number, title_of

RESULTS = {"gpu": "h100.json", "paper": "paper_h100.json", "cpu": "cpu.json", "roofline": "h100.json"}
"""The one file that fills each kind of block."""
MISSING = "not measured yet"
BLOCK = re.compile(
    r"(?P<begin><!-- bench:begin (?P<kind>\w+) -->\n).*?(?P<end><!-- bench:end (?P=kind) -->)", re.DOTALL
)


def fill(text: str, results: Path) -> str:
    """Return ``text`` with every marked block written anew from the files in ``results``; ValueError for a bad mark."""
    marks = re.findall(r"<!-- bench:(begin|end) (\w+) -->", text)
    blocks = list(BLOCK.finditer(text))
    if len(marks) != 2 * len(blocks):
        raise ValueError(f"bench marks must come in pairs, got {marks}")
    unknown = {block["kind"] for block in blocks} - set(RESULTS)
    if unknown:
        raise ValueError(f"bench marks must be one of {', '.join(RESULTS)}, got {', '.join(sorted(unknown))}")

    def written(block: re.Match[str]) -> str:
        path = results / RESULTS[block["kind"]]
        measured = report.load(path) if path.exists() else {"rows": []}
        write = roofline.markdown if block["kind"] == "roofline" else markdown
        content = write(measured) if measured["rows"] else MISSING
        return f"{block['begin']}{content}\n{block['end']}"

    return BLOCK.sub(written, text)


def markdown(measured: Report) -> str:
    """Return the tables of one report: its first shape in full, the others one line each, by who took part."""
    first, *others = [list(group) for _, group in groupby(measured["rows"], key=lambda row: row["shape_label"])]
    parts = [_provenance(measured), "", f"**{first[0]['shape_label']}**", "", _full_table(first)]
    alike: dict[tuple[str, ...], list[list[dict[str, Any]]]] = {}
    for rows in others:
        alike.setdefault(tuple(row["label"] for row in rows), []).append(rows)
    for shapes in alike.values():
        parts += ["", _short_table(shapes)]
    return "\n".join(parts)


def _provenance(measured: Report) -> str:
    environment = measured["environment"]
    versions = [f"NumPy {environment['numpy']}"]
    if environment.get("cupy"):
        versions = [f"CuPy {environment['cupy']}", f"NVRTC {environment['nvrtc']}"]
    if environment["packages"]["torch"]:
        versions.append(f"PyTorch {environment['packages']['torch']}")
    machine = environment.get("gpu") or f"{environment['cpu']}, {environment['threads']} threads"
    peaks = [f"{peak['product']}: {peak['burst_tflops']:.3g} TFLOP/s" for peak in measured["peaks"].values()]
    revision = environment["git"]
    commit = (
        "" if revision is None else f", commit {revision['commit'][:10]}{' (modified)' if revision['dirty'] else ''}"
    )
    return f"{machine}; {', '.join(versions)}; {environment['date'][:10]}{commit}. Peak: {'; '.join(peaks)}."


def _full_table(rows: list[dict[str, Any]]) -> str:
    bases = _bases(rows)
    headings = ["", "time ms (p20 to p80)", "exact-equivalent TFLOP/s", "% of peak", "grouping ms"]
    headings += [f"x {title_of(base)}" for base in bases]
    lines = []
    for row in rows:
        if row["status"] != "ok":
            lines.append([title_of(row["label"]), row["status"], *[""] * (len(headings) - 1)])
            continue
        cold, grouping = row["cold_us"], row["grouping_us"]
        lines.append(
            [
                title_of(row["label"]),
                f"{milliseconds(cold['median'])} ({milliseconds(cold['p20'])} to {milliseconds(cold['p80'])})",
                number(row["exact_tflops"], ".3g"),
                number(row["peak_percent"], ".0f"),
                "-" if grouping is None else milliseconds(grouping["median"]),
                *(number(row["speedup"].get(base), ".2f") for base in bases),
                number(row["error_sample"], ".3f"),
            ]
        )
    return markdown_table([*headings, "error on real sample"], lines)


def _short_table(shapes: list[list[dict[str, Any]]]) -> str:
    """One line a shape, one column a contender: milliseconds, and the speed-up over the first peer."""
    base = next(iter(_bases([row for rows in shapes for row in rows])), None)
    lines = []
    for rows in shapes:
        cells = []
        for row in rows:
            if row["status"] != "ok":
                cells.append(row["status"])
                continue
            speedup = row["speedup"].get(base)
            cells.append(milliseconds(row["cold_us"]["median"]) + ("" if speedup is None else f" (x {speedup:.2f})"))
        lines.append([rows[0]["shape_label"], *cells])
    note = "Milliseconds" if base is None else f"Milliseconds (x: speed-up over {title_of(base)})"
    return f"{note}:\n\n{markdown_table(['', *(title_of(row['label']) for row in shapes[0])], lines)}"


def _bases(rows: list[dict[str, Any]]) -> list[str]:
    """Return what the speed-up is told over: the peers that were timed; without any, our own exact attention."""
    exact = [row["label"] for row in rows if row["status"] == "ok" and row["options"] == EXACT]
    return list(dict.fromkeys([label for label in exact if label in PEERS] or exact))
