"""Speed-up over the number of queries, one panel a width, from a report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .axes import EXACT
from .peers import PEERS
from .report import Report

Row = dict[str, Any]


def plot(measured: Report, path: Path) -> None:
    """Draw the speed-up of every contender over the fastest peer of each shape (without one, over our exact attention).

    A width is drawn at the heads, mask and element type that were timed at the most sizes N = M.
    """
    from matplotlib.figure import Figure

    rows = [row for row in measured["rows"] if row["status"] == "ok"]
    base = base_times(rows)
    sweeps = sweeps_of([row for row in rows if row["shape_label"] in base])
    if not sweeps:
        raise ValueError("nothing to draw: no shape beside exact attention was timed at two or more sizes N = M")
    colors: dict[str, str] = {}
    figure = Figure(figsize=(1 + 4.2 * len(sweeps), 4.4), layout="constrained")
    panels = figure.subplots(1, len(sweeps), sharey=True, squeeze=False)[0]
    for panel, (D, sweep) in zip(panels, sorted(sweeps.items()), strict=True):
        lines: dict[str, list[tuple[int, float]]] = {}
        for row in sweep:
            speedup = base[row["shape_label"]] / row["cold_us"]["median"]
            lines.setdefault(_series(row), []).append((row["shape"]["N"], speedup))
        for name, points in lines.items():
            color = colors.setdefault(name, f"C{len(colors)}")
            _draw(panel, name, sorted(points), color)
        sizes = sorted({row["shape"]["N"] for row in sweep})
        panel.axhline(1, color="black", lw=0.8)
        panel.set_xscale("log", base=2)
        panel.set_xticks(sizes, [f"{N // 1024}k" if N % 1024 == 0 else str(N) for N in sizes], minor=False)
        panel.set(title=f"D = {D}: {_common(sweep[0])}", xlabel="queries and keys")
    has_peers = any(row["label"] in PEERS for row in rows)
    panels[0].set_ylabel(f"speed-up over {'the fastest peer' if has_peers else 'exact attention'}")
    handles = {line.get_label(): line for panel in panels for line in panel.lines if line.get_label() in colors}
    figure.legend(handles.values(), handles, loc="outside right center", fontsize="small")
    environment = measured["environment"]
    figure.suptitle(f"{environment.get('gpu') or environment['cpu']}, {environment['date'][:10]}", fontsize="medium")
    figure.savefig(path, dpi=110)


def base_times(rows: list[Row]) -> dict[str, float]:
    """Return, by shape, the microseconds of the fastest peer; where none was timed at all, of our exact attention."""
    exact = [row for row in rows if row["options"] == EXACT]
    found: dict[str, float] = {}
    for row in [row for row in exact if row["label"] in PEERS] or exact:
        time = row["cold_us"]["median"]
        found[row["shape_label"]] = min(time, found.get(row["shape_label"], time))
    return found


def sweeps_of(rows: list[Row]) -> dict[int, list[Row]]:
    """Return, by width, the rows of the shape without its size that has the most sizes; of equals the first."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        rest = tuple((name, size) for name, size in row["shape"].items() if name not in ("N", "M"))
        if row["shape"]["N"] == row["shape"]["M"]:
            groups.setdefault(rest, []).append(row)
    found: dict[int, list[Row]] = {}
    for group in groups.values():
        D = group[0]["shape"]["D"]
        if _sizes(group) > max(1, _sizes(found.get(D, []))):
            found[D] = group
    return found


def _sizes(rows: list[Row]) -> int:
    return len({row["shape"]["N"] for row in rows})


def _common(row: Row) -> str:
    """Return what the shapes of a panel have in common beside the width."""
    words = row["shape_label"].split()
    return " ".join(word for word in words if not word.startswith(("N=", "M=", "D=")))


def _series(row: Row) -> str:
    """Return what a line is called: block sizes that follow from the width are no part of it."""
    options = row["options"]
    if row["label"] in PEERS:
        return PEERS[row["label"]].title
    if options == EXACT:
        return f"{row['contender']} exact"
    reduced = f"R={options['rank']}" if "rank" in options else f"G={options['group_size']}"
    fusion = "" if options.get("fusion", "sum") == "sum" else f" {options['fusion']}"
    others = [f"{name}={options[key]}" for name, key in (("by", "group_by"), ("L", "block_size")) if options.get(key)]
    cached = ["cached"] if options.get("cached") else []
    return " ".join([row["contender"], f"{options['method']}{fusion}", reduced, *others, *cached])


def _draw(panel: Any, name: str, points: list[tuple[int, float]], color: str) -> None:
    is_peer = name in {peer.title for peer in PEERS.values()}
    panel.plot(*zip(*points, strict=True), marker="o", ms=4, ls=":" if is_peer else "-", color=color, label=name)
