"""What is installed here, what can run, and which kernels would be used: ``distrattn info``."""

from __future__ import annotations

import ctypes
import json
import os
import platform
import sys
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np

from . import __version__, backends

TENSOR_CORES_FROM = (8, 0)
"""First compute capability whose tensor cores the CuPy backend uses (mma.sync on float16 and bfloat16)."""


@dataclass(frozen=True, slots=True)
class Device:
    """One CUDA device."""

    index: int
    name: str
    compute_capability: tuple[int, int]


@dataclass(frozen=True, slots=True)
class BackendState:
    """One backend on this machine."""

    name: str
    version: str | None
    """Of its package; None where that is not installed."""
    problem: str | None
    """Why it cannot run; None where it can."""
    runs_on: str | None
    devices: tuple[Device, ...] = ()

    @property
    def is_usable(self) -> bool:
        """Whether calls to this backend can work."""
        return self.problem is None


def cpu_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def probe(name: str) -> BackendState:
    """Return the state of one backend; imports its package."""
    if name == "numpy":
        return BackendState(name, np.__version__, None, f"{cpu_cores()} CPU cores")
    if find_spec(name) is None:
        return BackendState(name, None, "not installed", None)
    try:
        return _probe_cupy() if name == "cupy" else _probe_numba()
    except (ImportError, OSError, RuntimeError) as error:  # no driver, no NVRTC, a package that does not fit
        # one paragraph is enough: what follows is a package's own advice for its developers
        return BackendState(name, version_of(name), " ".join(str(error).partition("\n\n")[0].split()), None)


def probe_all() -> tuple[BackendState, ...]:
    """Return the state of every backend."""
    return tuple(probe(name) for name in backends.NAMES)


def best_backend() -> BackendState:
    """Return the fastest backend that can run: CuPy, then Numba where either has a device, else NumPy."""
    return next((state for state in map(probe, ("cupy", "numba")) if state.devices), probe("numpy"))


def version_of(package: str) -> str | None:
    """Return the version of an installed package; None where it is not installed or does not say."""
    if find_spec(package) is None:
        return None
    try:
        return str(import_module(package).__version__)
    except (ImportError, AttributeError):
        return None


def driver_version() -> tuple[int, int] | None:
    """Return the newest CUDA version that the installed driver supports; None without a driver."""
    try:
        library = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
        number = ctypes.c_int()
        if library.cuDriverGetVersion(ctypes.byref(number)) != 0:
            return None
    except (OSError, AttributeError):
        return None
    return number.value // 1000, number.value % 1000 // 10


def kernels(name: str, dtype: str, compute_capability: tuple[int, int] | None) -> str:
    """Return in words what computes a call with arrays of ``dtype``; no capability: Numba's simulator, or NumPy."""
    is_narrow = dtype in ("float16", "bfloat16")
    if name == "numpy":
        return "BLAS products over tiles of queries and keys" + (", in float32" if is_narrow else "")
    if name == "numba":
        where = "CUDA cores" if compute_capability else "simulated"
        return "not supported" if dtype == "bfloat16" else f"numba_kernels/forward.py ({where})"
    if is_narrow and compute_capability is not None and compute_capability >= TENSOR_CORES_FROM:
        portable = "raw_kernels/forward_mma.cu (tensor cores, float32 sums)"
        if compute_capability != (9, 0):
            return portable
        return f"raw_kernels/forward_sm90.cu (wgmma) where sizes and strides suit it, else {portable}"
    return "raw_kernels/forward_simt.cu (CUDA cores" + (", float32 sums)" if is_narrow else ")")


def advice(states: tuple[BackendState, ...], driver: tuple[int, int] | None) -> list[str]:
    """Return what to install for more."""
    lines = []
    if driver is None:
        lines.append("GPU: no NVIDIA driver found, so only the NumPy backend can run here")
    elif any(state.version is None for state in states):
        extra = "cuda13" if driver >= (13, 0) else "cuda12"
        lines.append(f"GPU: pip install 'distrattn_np[{extra}]'  (CuPy and Numba for this driver)")
    for packages, purpose, extra in (
        (("ml_dtypes",), "bfloat16 arrays", "bf16"),
        (("rich", "matplotlib"), "the demo's table and picture", "demo"),
    ):
        if any(find_spec(package) is None for package in packages):
            lines.append(f"{purpose}: pip install 'distrattn_np[{extra}]'")
    return lines


def collect() -> dict[str, Any]:
    """Return everything that `distrattn info` tells, as plain values."""
    states = probe_all()
    driver = driver_version()
    dtypes = ["float16", "float32", "float64"]
    if find_spec("ml_dtypes") is not None:
        dtypes.insert(1, "bfloat16")
    entries = []
    for state in states:
        used = {}
        if state.is_usable:
            # one entry for each kind of device; a backend without devices has a single one
            capabilities: set[tuple[int, int] | None] = {device.compute_capability for device in state.devices}
            for capability in capabilities or {None}:
                where = "any" if capability is None else f"{capability[0]}.{capability[1]}"
                used[where] = {dtype: kernels(state.name, dtype, capability) for dtype in dtypes}
        entries.append({**asdict(state), "usable": state.is_usable, "kernels": used})
    return {
        "distrattn_np": __version__,
        "python": platform.python_version(),
        "driver": None if driver is None else f"{driver[0]}.{driver[1]}",
        "demo_runs_on": best_backend().name,
        "backends": entries,
        "advice": advice(states, driver),
    }


def run(*, as_json: bool) -> int:
    """Print the report; return the exit status."""
    facts = collect()
    if as_json:
        print(json.dumps(facts, indent=1))
        return 0
    driver = "none" if facts["driver"] is None else f"CUDA {facts['driver']}"
    print(f"distrattn_np {facts['distrattn_np']}, Python {facts['python']}, NVIDIA driver: {driver}\n")
    for entry in facts["backends"]:
        print(f"{entry['name']:7}{entry['version'] or '-':10}{entry['runs_on'] or 'cannot run: ' + entry['problem']}")
        for device in entry["devices"]:
            major, minor = device["compute_capability"]
            print(f"{'':7}device {device['index']}: {device['name']}, compute capability {major}.{minor}")
        for capability, used in entry["kernels"].items():
            where = "" if capability == "any" else f" on {capability}"
            for what in dict.fromkeys(used.values()):
                print(f"{'':7}{', '.join(dtype for dtype in used if used[dtype] == what)}{where}: {what}")
    print(f"\n`distrattn demo` uses: {facts['demo_runs_on']}")
    for line in facts["advice"]:
        print(f"For more - {line}")
    return 0


def _probe_cupy() -> BackendState:
    import cupy

    runtime = cupy.cuda.runtime
    devices = []
    for index in range(runtime.getDeviceCount()):
        properties = runtime.getDeviceProperties(index)
        capability = (int(properties["major"]), int(properties["minor"]))
        devices.append(Device(index, properties["name"].decode(), capability))
    cupy.cuda.nvrtc.getVersion()  # raises where the run-time compiler is missing: no kernel could be built
    return BackendState("cupy", cupy.__version__, None, "CUDA devices", tuple(devices))


def _probe_numba() -> BackendState:
    import numba
    from numba import cuda

    if numba.config.ENABLE_CUDASIM:
        return BackendState("numba", numba.__version__, None, "its simulator, for tests only: very slow")
    if not cuda.is_available():
        return BackendState("numba", numba.__version__, "no CUDA device found", None)
    devices = tuple(
        Device(gpu.id, gpu.name.decode() if isinstance(gpu.name, bytes) else gpu.name, tuple(gpu.compute_capability))
        for gpu in cuda.list_devices()
    )
    return BackendState("numba", numba.__version__, None, "CUDA devices", devices)
