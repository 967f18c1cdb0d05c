"""Before any test: the kit on the path, Numba in its simulator where there is no GPU, the Hypothesis profile."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

sys.path.insert(0, str(Path(__file__).parent))

from kit.backends import reason_for_no_gpu

NO_GPU = reason_for_no_gpu()
if NO_GPU is not None:
    os.environ["NUMBA_ENABLE_CUDASIM"] = "1"  # read when Numba is imported
    if importlib.util.find_spec("numba") is not None:
        from kit.simulator import hasten

        hasten()

# JAX would take most of a device's memory, which CuPy and PyTorch use in the same process
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

# a first call compiles its kernels, and the simulator is slow: time says nothing about an example
common = {"deadline": None, "print_blob": True, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("dev", max_examples=20, **common)
settings.register_profile("ci", max_examples=30, derandomize=True, **common)
settings.register_profile("nightly", max_examples=1000, **common)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE") or ("ci" if os.environ.get("CI") else "dev"))


def pytest_configure(config: pytest.Config) -> None:
    """Let Numba launch the small grids of the tests without calling them wasteful."""
    config.addinivalue_line("filterwarnings", r"ignore:Grid size \d+ will likely result in GPU under-utilization")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the GPU tests where they cannot run."""
    if NO_GPU is None:
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=NO_GPU))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say how many GPU tests did not run: a green run without a GPU says nothing about them."""
    skipped = sum("gpu" in getattr(report, "keywords", ()) for report in terminalreporter.stats.get("skipped", []))
    if skipped:
        terminalreporter.write_line(f"{skipped} GPU tests skipped: {NO_GPU or 'see above'}", yellow=True)
