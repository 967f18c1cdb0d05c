"""The question: is the package light to import, and are its public names the ones promised."""

import json
import subprocess
import sys

import distrattn_np

PUBLIC = {"GroupedKeys", "GroupedPages", "__version__", "distr_attention", "exact_attention", "group_keys"} | {
    "group_pages",
    "merge",
    "pool_keys",
    "PooledKeys",
    "project_values",
    "ProjectedValues",
    "workspace_size",
}
OPTIONAL = {"cupy", "numba", "ml_dtypes", "rich", "matplotlib", "scipy", "torch"}
LIMIT_S = 0.5


def imported(statement):
    """Return the top-level modules that a fresh interpreter holds after ``statement``, and the CPU seconds it took."""
    code = (
        "import json, sys, time; start = time.process_time()\n"
        f"{statement}\n"
        "spent = time.process_time() - start\n"
        "print(json.dumps([sorted({name.partition('.')[0] for name in sys.modules}), spent]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    modules, seconds = json.loads(done.stdout)
    return set(modules), seconds


def test_public_names():
    assert set(distrattn_np.__all__) == PUBLIC
    assert len(distrattn_np.__all__) == len(PUBLIC)


def test_import_takes_numpy_only():
    modules, _ = imported("import distrattn_np")
    assert "numpy" in modules
    assert not modules & OPTIONAL


def test_a_numpy_call_takes_numpy_only():
    modules, _ = imported(
        "import numpy as np; from distrattn_np import distr_attention\n"
        "one = np.ones((1, 1, 4, 4), np.float32); distr_attention(one, one, one)"
    )
    assert not modules & (OPTIONAL - {"ml_dtypes"})


def test_import_is_quick():
    # the best of three, and against NumPy's own: a busy machine must not fail this, a heavy import must
    ours, numpys = (min(imported(f"import {name}")[1] for _ in range(3)) for name in ("distrattn_np", "numpy"))
    assert ours < max(LIMIT_S, 2 * numpys)
