"""What each timed call could reach at most, and the machine code that it ran: the roofline tables."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from dataclasses import replace
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from .. import export
from ..backends.device_work import DeviceFacts, PlannedLaunch
from ..kernel_sources import HOPPER_ONLY
from .axes import Shape, is_cached
from .report import Report, markdown_table, milliseconds, number, title_of

Row = dict[str, Any]
EXPONENTIALS_PER_CYCLE = 16
"""Of one multiprocessor, for ``ex2.approx``.

CUDA C++ Programming Guide, "Arithmetic Instructions", table of throughput: 16 results a cycle for the base-2
exponential of compute capabilities 7.5 to 9.0. FlashAttention-3 (arXiv:2407.08608) states 3.9 TFLOP/s of special
functions for the H100, which is the same number: 16 x 132 multiprocessors x 1830 MHz.
"""
CAPABILITIES = ("75", "80", "86", "89", "90")
"""Those that the number above holds for."""
INSTRUCTIONS = {
    "hgmma": r"\bHGMMA\b",
    "hmma": r"\bHMMA\b",
    "exponentials": r"\bMUFU\.EX2\b",
    "tile_loads": r"\bUTMALDG\b",
    "local_accesses": r"\b(?:LDL|STL)\b",
}
"""What is counted in the machine code; accesses of local memory are spills, or arrays that did not fit."""

KERNEL_COLUMNS = {
    "registers": "registers",
    "threads": "threads",
    "local_bytes": "local bytes",
    "local_accesses": "local accesses",
    "shared_bytes": "shared bytes",
    "hgmma": "HGMMA",
    "hmma": "HMMA",
    "exponentials": "MUFU.EX2",
}


def exponential_peak(environment: dict[str, Any]) -> float | None:
    """Return the exponentials a second, in 10^12, that the GPU of a report takes at its highest clock; None if unknown.

    Reports that do not say how many multiprocessors it has are taken to be of the largest device of its kind.
    """
    clock = (environment.get("gpu_state") or {}).get("clocks.max.sm")
    if environment.get("compute_capability") not in CAPABILITIES or clock is None:
        return None
    multiprocessors = environment.get("multiprocessors") or facts_of(environment).multiprocessors
    return float(EXPONENTIALS_PER_CYCLE * multiprocessors * float(clock.removesuffix(" MHz")) / 1e6)


def add_exponentials(measured: Report) -> None:
    """Fill in how many exponentials a second every timed row took, and their share of the unit's peak.

    Counted are the visible pairs, of exact calls and of others alike; what a kernel computes in masked parts of its
    tiles is not.
    """
    peak = exponential_peak(measured["environment"])
    for row in measured["rows"]:
        is_timed = row["status"] == "ok"
        rate = row["work"]["pairs"] / row["cold_us"]["median"] / 1e6 if is_timed else None
        row["tera_exponentials_per_s"] = rate
        row["exponentials_percent"] = None if rate is None or peak is None else 100 * rate / peak


# ---- machine code ----


def facts_of(environment: dict[str, Any]) -> DeviceFacts:
    """Return what the plan of a call needs of the GPU of a report."""
    capability = environment["compute_capability"]
    nvrtc = tuple(int(part) for part in environment["nvrtc"].split("."))
    runs_sm90a = capability == "90" and nvrtc >= (12, 9)
    facts = export.ARCHITECTURES[f"sm_{capability}{'a' if runs_sm90a else ''}"]
    return replace(facts, multiprocessors=environment.get("multiprocessors") or facts.multiprocessors)


def add_kernels(measured: Report) -> None:
    """Compile every kernel of our CuPy calls again and keep what its machine code says; ExportError without NVRTC.

    ``measured["kernels"]["builds"]`` lists them, ``row["launches"]`` the places there of those that a call launches.
    Needs cuobjdump and no GPU. Calls to grouped keys are left out: they are not planned.
    """
    if measured["kind"] != "gpu":
        raise ValueError("only a report of a GPU has kernels that can be compiled again")
    cuobjdump()  # without it there is nothing to compile for
    facts = facts_of(measured["environment"])
    places: dict[tuple[Any, ...], int] = {}
    builds: list[dict[str, Any]] = []
    for row in measured["rows"]:
        row["launches"] = None
        if row["contender"] != "cupy" or row["status"] != "ok" or is_cached(row["options"]):
            continue
        problem = Shape(**row["shape"]).problem(row["options"])
        plan, _ = export.plan_call(problem, facts, returns_lse=False)
        row["launches"] = []
        for launch in plan.launches:
            key = launch.stem, *launch.defines.items()
            if key not in places:
                places[key] = len(builds)
                builds.append(describe_kernel(launch, facts))
            if places[key] not in row["launches"]:
                row["launches"].append(places[key])
    measured["kernels"] = {"nvrtc": nvrtc_version(), "builds": builds}


def describe_kernel(launch: PlannedLaunch, facts: DeviceFacts) -> dict[str, Any]:
    """Return the registers a thread, bytes and counted instructions of one kernel as built for a device."""
    arch = "sm_90a" if launch.stem.endswith(HOPPER_ONLY) else f"sm_{facts.capability}"
    cubin = export.compile_cubin(launch.stem, launch.defines, arch)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        usage, code = (_output(cuobjdump(), option, path) for option in ("-res-usage", "-sass"))
    used = {name: int(value) for name, value in re.findall(r"\b([A-Z]+):(\d+)", usage.partition("Function")[2])}
    return {
        "stem": launch.stem,
        "defines": launch.defines,
        "arch": arch,
        "registers": used["REG"],
        "threads": launch.threads,
        "local_bytes": used["STACK"] + used["LOCAL"],
        "shared_bytes": used["SHARED"] + launch.shared,  # with the 1024 bytes that Hopper keeps to itself
        **{name: len(re.findall(pattern, code)) for name, pattern in INSTRUCTIONS.items()},
    }


@cache
def cuobjdump() -> str:
    """Return the path of cuobjdump, of the toolkit on PATH or of its wheel."""
    try:
        files = metadata.files("nvidia-cuda-cuobjdump") or []
    except metadata.PackageNotFoundError:
        files = []
    wheel = next((str(file.locate()) for file in files if file.stem == "cuobjdump"), None)
    found = shutil.which("cuobjdump") or wheel
    if found is None:
        raise FileNotFoundError("cuobjdump: neither on PATH nor installed as nvidia-cuda-cuobjdump")
    return found


def nvrtc_version() -> str:
    """Return the version of the compiler that is installed here."""
    from cuda.bindings import nvrtc

    return ".".join(map(str, nvrtc.nvrtcVersion()[1:]))


def _output(*command: Any) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


# ---- tables ----


def markdown(measured: Report) -> str:
    """Return how near every call came to each limit at the largest size of its kind of shape, and the kernels."""
    add_exponentials(measured)  # which older reports lack
    largest: dict[tuple[Any, ...], str] = {}
    sizes: dict[str, int] = {}
    for row in measured["rows"]:
        shape = row["shape"]
        kind = shape["N"] == shape["M"], *(size for name, size in shape.items() if name not in ("B", "N", "M"))
        label = row["shape_label"]
        sizes[label] = shape["B"] * shape["N"] * shape["M"]
        if sizes[label] > sizes.get(largest.get(kind, ""), -1):
            largest[kind] = label
    chosen = [row for row in measured["rows"] if row["shape_label"] in largest.values() and row["status"] == "ok"]
    parts = [_limits(measured), ""]
    for label in dict.fromkeys(row["shape_label"] for row in chosen):
        rows = [row for row in chosen if row["shape_label"] == label]
        parts += [f"**{label}**", "", _rates_table(rows), ""]
    if "kernels" in measured:
        parts += ["**Kernels of these calls**", "", _kernels_table(chosen, measured["kernels"]), ""]
    return "\n".join(parts[:-1])


def _limits(measured: Report) -> str:
    environment = measured["environment"]
    told = [environment.get("gpu") or environment["cpu"]]
    for peak in measured["peaks"].values():
        told.append(
            f"{peak['product']} {peak['burst_tflops']:.0f} TFLOP/s in a burst, {peak['sustained_tflops']:.0f} sustained"
        )
        told.append(f"{peak['copy']} {peak['copy_gb_per_s']:,.0f} GB/s")
    exponentials = exponential_peak(environment)
    if exponentials is not None:
        told.append(f"{exponentials:.2f} x 10^12 exponentials a second at the highest clock")
    return f"{'; '.join(told)}; {environment['date'][:10]}."


def _rates_table(rows: list[Row]) -> str:
    lines = []
    for row in rows:
        times = row["cold_us"]["median"], row["burst_us"], row["sustained_us"]
        shares = {
            "products": row["peak_percent"],
            "exponentials": row["exponentials_percent"],
            "memory": row["copy_percent"],
        }
        nearest = max(shares, key=lambda name: shares[name] or 0)
        lines.append(
            [
                title_of(row["label"]),
                *("-" if time is None else milliseconds(time) for time in times),
                number(row["executed_tflops"], ".0f"),
                number(shares["products"], ".0f"),
                number(row["tera_exponentials_per_s"], ".2f"),
                number(shares["exponentials"], ".0f"),
                number(row["gb_per_s"], ",.0f"),
                number(shares["memory"], ".0f"),
                nearest,
            ]
        )
    headings = ["", "cold ms", "burst ms", "sustained ms", "executed TFLOP/s", "% of products", "10^12 exp/s"]
    return markdown_table([*headings, "% of exp", "GB/s", "% of copy", "nearest limit"], lines)


def _kernels_table(rows: list[Row], kernels: dict[str, Any]) -> str:
    """Return a line for each kernel with products on tensor cores, and a sentence about the others."""
    used = [kernels["builds"][place] for place in dict.fromkeys(i for row in rows for i in row["launches"] or [])]
    multiply = [kernel for kernel in used if kernel["hgmma"] or kernel["hmma"]]
    others = [kernel for kernel in used if kernel not in multiply]
    lines = []
    for kernel in multiply:
        defines = [f"{name}={value}" for name, value in kernel["defines"].items() if name != "LAUNCH_SHARED_BYTES"]
        lines.append([" ".join([kernel["stem"], *defines]), *(str(kernel[name]) for name in KERNEL_COLUMNS)])
    text = markdown_table(["", *KERNEL_COLUMNS.values()], lines)
    if others:
        registers, accesses = (max(kernel[name] for kernel in others) for name in ("registers", "local_accesses"))
        stems = ", ".join(sorted({kernel["stem"] for kernel in others}))
        text += (
            f"\n\nThe {len(others)} without products ({stems}) take at most {registers} registers and have at most"
            f" {accesses} accesses of local memory. Compiled by NVRTC {kernels['nvrtc']}."
        )
    return text
