"""Speed-up over the number of queries, one panel for every kind of heads, from a report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..problem import ceil_div
from .axes import EXACT
from .peers import PEERS
from .report import Report

Row = dict[str, Any]


PANELS_IN_A_ROW = 3


def plot(measured: Report, path: Path) -> None:
    """Draw the speed-up of every contender over the fastest peer of each shape (without one, over our exact attention).

    Each width, number of heads, mask and element type that was timed at two or more sizes N = M has a panel.
    """
    from matplotlib.figure import Figure

    rows = [row for row in measured["rows"] if row["status"] == "ok"]
    base = base_times(rows)
    sweeps = sweeps_of([row for row in rows if row["shape_label"] in base])
    if not sweeps:
        raise ValueError("nothing to draw: no shape beside exact attention was timed at two or more sizes N = M")
    colors: dict[str, str] = {}
    rows_of_panels = ceil_div(len(sweeps), PANELS_IN_A_ROW)
    columns = ceil_div(len(sweeps), rows_of_panels)
    figure = Figure(figsize=(2.2 + 3.8 * columns, 0.6 + 3.8 * rows_of_panels), layout="constrained")
    places = figure.subplots(rows_of_panels, columns, sharey=True, squeeze=False).ravel()
    panels = places[: len(sweeps)]
    for place in places[len(sweeps) :]:
        place.remove()
    for panel, sweep in zip(panels, sweeps, strict=True):
        lines: dict[str, list[tuple[int, float]]] = {}
        for row in sweep:
            speedup = base[row["shape_label"]] / row["cold_us"]["median"]
            lines.setdefault(_series(row), []).append((row["shape"]["N"], speedup))
        for name, points in lines.items():
            if len(points) < 2:
                continue
            color = colors.setdefault(name, f"C{len(colors)}")
            _draw(panel, name, sorted(points), color)
        sizes = sorted({row["shape"]["N"] for row in sweep})
        panel.axhline(1, color="black", lw=0.8)
        panel.set_xscale("log", base=2)
        panel.set_xticks(sizes, [f"{N // 1024}k" if N % 1024 == 0 else str(N) for N in sizes], minor=False)
        panel.set_xlabel("queries and keys")
        panel.set_title(_common(sweep[0]), fontsize="medium")
    has_peers = any(row["label"] in PEERS for row in rows)
    for panel in panels[::columns]:
        panel.set_ylabel(f"speed-up over {'the fastest peer' if has_peers else 'exact attention'}")
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


def sweeps_of(rows: list[Row]) -> list[list[Row]]:
    """Return, for each shape but for its sizes that has two or more of them, rows of the largest batch at each N."""
    groups: dict[tuple[Any, ...], dict[int, list[Row]]] = {}
    for row in rows:
        shape = row["shape"]
        if shape["N"] != shape["M"]:
            continue
        rest = tuple((name, size) for name, size in shape.items() if name not in ("B", "N", "M"))
        known = groups.setdefault(rest, {}).setdefault(shape["N"], [])
        if known and known[0]["shape"]["B"] < shape["B"]:
            known.clear()
        if not known or known[0]["shape"]["B"] == shape["B"]:
            known.append(row)
    return [[row for same in sizes.values() for row in same] for sizes in groups.values() if len(sizes) > 1]


def _common(row: Row) -> str:
    """Return what the shapes of a panel have in common."""
    words = row["shape_label"].split()
    return " ".join(word for word in words if not word.startswith(("B=", "N=", "M=")))


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
