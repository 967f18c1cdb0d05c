"""What a result was measured on: machine, versions, source revision."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from .. import info
from .device import Kind

PACKAGES = (
    "distrattn_np",
    "numba",
    "numba-cuda",
    "torch",
    "triton",
    "flash-attn-4",
    "nvidia-cutlass-dsl",
    "nvidia-cudnn-frontend",
    "ml_dtypes",
)
SMI_FIELDS = (
    "name",
    "driver_version",
    "clocks.sm",
    "clocks.mem",
    "clocks.max.sm",
    "power.draw",
    "power.limit",
    "temperature.gpu",
)


def describe_environment(kind: Kind, argv: list[str]) -> dict[str, Any]:
    """Return plain values for the head of a report; what cannot be read is None."""
    environment: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "argv": argv,
        "git": _git_revision(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "threads": info.cpu_cores(),
        "numpy": np.__version__,
        "packages": {name: _version(name) for name in PACKAGES},
    }
    if kind == "gpu":
        environment |= _cuda_environment()
    return environment


def gpu_state() -> dict[str, str] | None:
    """Return what nvidia-smi says of the current device's clocks, power and temperature; None where it cannot."""
    import cupy

    bus = cupy.cuda.runtime.deviceGetPCIBusId(cupy.cuda.Device().id)
    answer = _output("nvidia-smi", f"--id={bus}", f"--query-gpu={','.join(SMI_FIELDS)}", "--format=csv,noheader")
    return None if answer is None else dict(zip(SMI_FIELDS, answer.split(", "), strict=True))


def _cuda_environment() -> dict[str, Any]:
    import cupy

    properties = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)
    torch = sys.modules.get("torch")  # only a peer that was loaded is worth asking
    return {
        "gpu": properties["name"].decode(),
        "compute_capability": cupy.cuda.Device().compute_capability,
        "multiprocessors": properties["multiProcessorCount"],
        "cuda_driver": cupy.cuda.runtime.driverGetVersion(),
        "cuda_runtime": cupy.cuda.runtime.runtimeGetVersion(),
        "nvrtc": ".".join(str(part) for part in cupy.cuda.nvrtc.getVersion()),
        "cupy": cupy.__version__,
        "torch_cuda": None if torch is None else torch.version.cuda,
        "cudnn": None if torch is None else torch.backends.cudnn.version(),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_revision() -> dict[str, Any] | None:
    """Return the commit that this file is in, and whether tracked files differ from it."""
    here = str(Path(__file__).resolve().parent)
    tracked = _output("git", "-C", here, "ls-files", "--error-unmatch", Path(__file__).name)
    commit = _output("git", "-C", here, "rev-parse", "HEAD")
    if tracked is None or commit is None:
        return None
    return {"commit": commit, "dirty": bool(_output("git", "-C", here, "status", "--porcelain", "-uno"))}


def _cpu_name() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None)


def _output(*command: str) -> str | None:
    """Return what a program prints; None where it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
