"""Speed-up over the number of queries, one panel a width, from a report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .axes import EXACT
from .peers import PEERS
from .report import Report


def plot(measured: Report, path: Path) -> None:
    """Draw the speed-up of every contender over the first peer (without one, over our exact attention)."""
    from matplotlib.figure import Figure

    rows = [row for row in measured["rows"] if row["status"] == "ok"]
    exact = [row["label"] for row in rows if row["options"] == EXACT]
    base = next((label for label in exact if label in PEERS), next(iter(exact), None))
    if base is None:
        raise ValueError("nothing to compare with: the report has no exact attention that was timed")
    widths = sorted({row["shape"]["D"] for row in rows})
    figure = Figure(figsize=(5 * len(widths), 4.2), layout="constrained")
    panels = figure.subplots(1, len(widths), sharey=True, squeeze=False)[0]
    for panel, D in zip(panels, widths, strict=True):
        lines: dict[str, list[tuple[int, float]]] = {}
        for row in rows:
            if row["shape"]["D"] == D and base in row["speedup"]:
                lines.setdefault(row["label"], []).append((row["shape"]["N"], row["speedup"][base]))
        for label, points in lines.items():
            _draw(panel, label, sorted(points))
        panel.axhline(1, color="black", lw=0.8)
        panel.set(title=f"D = {D}", xlabel="queries N", xscale="log")
        panel.set_xscale("log", base=2)
    panels[0].set_ylabel(f"speed-up over {PEERS[base].title if base in PEERS else base}")
    panels[-1].legend(fontsize="small")
    figure.savefig(path, dpi=130)


def _draw(panel: Any, label: str, points: list[tuple[int, float]]) -> None:
    panel.plot(*zip(*points, strict=True), marker="o", ls=":" if label in PEERS else "-", label=label)
