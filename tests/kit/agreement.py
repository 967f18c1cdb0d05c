"""What the GPU agreement tests assert of a call: no worse than plain arithmetic of its precision."""

from __future__ import annotations

from typing import Any

import numpy as np

from distrattn_np.backends import Maps

from .cases import Case, Inputs, in_memory, plain, truth
from .compare import assert_agrees, assert_no_worse_than_plain, relative_error
from .strategies import SPACING

RELATIVE = {"float32": 1e-5, "float64": 1e-12}
FLOAT32_GAINS = 1e-6
"""A public call makes its own gains, in float32 for every dtype: another rounding than the reference's."""


def assert_computes(
    case: Case, inputs: Inputs, maps: Maps, out: np.ndarray, lse: np.ndarray, *, own_gains: bool = False
) -> None:
    """Assert that (out, lse), in bhnd, are the truth for these inputs and maps as nearly as the dtype allows."""
    problem = case.native_problem(inputs)
    expected, expected_lse = truth(problem, *inputs, maps, case.score_options)
    constant_ok = case.M <= 1 or case.D == 1 or out.size <= 1
    largest_lse = float(np.abs(expected_lse, where=np.isfinite(expected_lse), out=np.zeros_like(expected_lse)).max())
    if case.dtype in SPACING and SPACING[case.dtype] > SPACING["float32"]:
        usual, usual_lse = plain(problem, *inputs, maps, case.score_options)
        # half a unit in the last place of the largest element: the rounding of the result itself
        atol = SPACING[case.dtype] / 2 * float(np.abs(expected).max())
        assert_no_worse_than_plain(out, usual, expected, atol=atol, context=str(case), constant_ok=constant_ok)
        atol = 1e-5 * (1 + largest_lse)
        assert_no_worse_than_plain(
            lse, usual_lse, expected_lse, atol=atol, context=f"lse of {case}", constant_ok=constant_ok
        )
        return
    rtol = max(RELATIVE[case.dtype], FLOAT32_GAINS if own_gains else 0)
    if expected.any():
        assert relative_error(out, expected) <= rtol
    scale = float(np.abs(expected).max())
    common: dict[str, Any] = {"context": str(case), "check_dtype": False, "constant_ok": constant_ok}
    assert_agrees(out, expected, rtol=0, atol=10 * rtol * scale, **common)
    assert_agrees(lse, expected_lse, rtol=0, atol=1e-5 * (1 + largest_lse), **common)


def poison(case: Case) -> np.ndarray:
    """Return an output array in the memory of the case, full of NaN."""
    return in_memory(np.full((case.B, case.H, case.N, case.E), np.nan, case.numpy_dtype), case)


def to_bhnd(case: Case, array: np.ndarray) -> np.ndarray:
    return array.transpose(0, 2, 1, 3) if case.layout == "bnhd" else array
