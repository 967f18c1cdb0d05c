"""Do masks, biases, caps and windows hold at their extremes? Run on a GPU with CuPy; the NumPy backend is the measure.

Both compute in float32, so they agree on what a huge bias leaves of a score, and on where inf and NaN come out. Not
checked here: usual numbers, which the other agreement tests and the properties hold to the definition, and speed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from kit.backends import options_to_kind, to_kind
from kit.compare import assert_agrees, to_host

from distrattn_np import distr_attention

pytestmark = pytest.mark.gpu

H, H_kv, N, M, D = 4, 2, 150, 300, 32
FLOAT32 = np.finfo(np.float32)


def hidden_keys(keys: slice) -> np.ndarray:
    mask = np.ones((N, M), bool)
    mask[:, keys] = False
    return mask


def hidden_rows(*rows: Any) -> np.ndarray:
    mask = np.ones((H, N, M), bool)
    for part in rows:
        mask[1:, part] = False
    return mask


def bias_with(*entries: tuple[Any, float]) -> np.ndarray:
    bias = np.random.default_rng(0).normal(size=(N, M)).astype(np.float32)
    for place, number in entries:
        bias[place] = number
    return bias


EXTREMES: dict[str, dict[str, Any]] = {
    "first tiles hidden": {"mask": hidden_keys(slice(0, 200))},
    "last tiles hidden": {"mask": hidden_keys(slice(140, M))},
    "all but one key hidden": {"mask": np.arange(M) == 137},
    "rows that see nothing": {"mask": hidden_rows(0, slice(60, 70), slice(128, N))},
    "nothing shown": {"mask": np.zeros((1, 1), bool)},
    "a head that sees nothing": {"mask": np.array([True, False, True, True])[:, None, None]},
    "rows of minus infinity": {"bias": bias_with((slice(3, 80), -np.inf))},
    "first tiles of minus infinity": {"bias": bias_with((np.s_[:, :200], -np.inf))},
    "one huge bias": {"bias": bias_with((np.s_[:, 170], 1e30))},
    "huge biases": {"bias": np.random.default_rng(1).normal(size=(N, M)).astype(np.float32) * 1e30},
    "the lowest number for what is hidden": {"bias": bias_with((np.s_[:, 40:], FLOAT32.min))},
    "rows of the lowest number": {"bias": bias_with((np.s_[10:90], FLOAT32.min))},
    "the largest number": {"bias": bias_with((np.s_[:, 5], FLOAT32.max), (np.s_[9, 250], FLOAT32.max))},
    "biases that grow": {"bias": np.linspace(-1e4, 1e4, M, dtype=np.float32)},
    "biases that shrink": {"bias": np.linspace(1e4, -1e4, M, dtype=np.float32)},
    "plus infinity": {"bias": bias_with((np.s_[7, 100], np.inf), (np.s_[8], np.inf))},
    "NaN": {"bias": bias_with((np.s_[7, 100], np.nan), (np.s_[8], np.nan))},
    "hidden NaN": {"bias": bias_with((np.s_[:, 70:140], np.nan)), "mask": hidden_keys(slice(70, 140))},
    "NaN out of the window": {"bias": bias_with((np.s_[:, :100], np.nan)), "window": (40, 40)},
    "a cap below rounding": {"softcap": 1e-37},
    "a cap beyond every score": {"softcap": float(FLOAT32.max)},
    "huge scores, capped": {"softcap": 30.0, "scale": 100.0},
    "a window of one key": {"window": (0, 0)},
    "a window of one key, causal": {"window": (0, 0), "causal": True},
    "a window beyond the keys": {"window": (0, 10**9), "causal": "top-left"},
    "a window before the keys": {"window": (None, 0), "causal": "top-left"},
}
# every query and key lies in 16 dimensions, so that a rank of 16 is exact but for rounding
WAYS: dict[str, dict[str, Any]] = {
    "exact": {"group_size": 1},
    "subspace-keys": {"rank": 16, "block_size": 64},
    "subspace-queries": {"rank": 16, "block_size": 64, "group_by": "queries"},
}
# of the values; and of scores, which 16-bit maps round
TOLERANCES = {
    ("float32", "exact"): 1e-5,
    ("float16", "exact"): 2e-3,
    ("float32", "maps"): 1e-3,
    ("float16", "maps"): 4e-2,
}


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", EXTREMES)
def test_extreme_agrees_with_numpy(name: str, way: str, dtype: str) -> None:
    rng = np.random.default_rng(2)
    basis = rng.standard_normal((16, D)) / 4
    q, k = (rng.standard_normal((1, heads, rows, 16)) @ basis for heads, rows in ((H, N), (H_kv, M)))
    q, k, v = (x.astype(dtype) for x in (q, k + 1, rng.standard_normal((1, H_kv, M, D))))
    options = WAYS[way] | EXTREMES[name]
    with np.errstate(all="ignore"):
        expected = distr_attention(q, k, v, **options, return_lse=True)
    given = [to_kind(x, "cupy") for x in (q, k, v)]
    got = [to_host(x) for x in distr_attention(*given, **options_to_kind(options, "cupy"), return_lse=True)]
    tolerance = TOLERANCES[dtype, "exact" if way == "exact" else "maps"]
    for one, other, rtol in zip(got, expected, (0, 1e-6), strict=True):
        # the lse of a huge bias is that bias, of a low cap log M
        assert_agrees(one, other, rtol=rtol, atol=tolerance, context=name, constant_ok=True)
    assert got[0].any() == (name != "nothing shown")
    blind = np.isneginf(expected[1])
    assert (got[0][blind] == 0).all()
