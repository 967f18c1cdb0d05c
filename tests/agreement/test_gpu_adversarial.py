"""Do softmax shortcuts survive scores that are made to break them? Run on a GPU with CuPy.

The Hopper forward seldom looks for the maximum of a row. For every finite input it must stay within twice the error of
the forward that always does, and give no inf or NaN. Not checked here: speed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from kit.backends import to_kind
from kit.compare import relative_error, to_host

from distrattn_np import exact_attention, reference

pytestmark = pytest.mark.gpu

N, M, D, E = 300, 1000, 128, 128


def growing(factor: float, *, towards: str) -> Callable[[np.ndarray, np.ndarray], None]:
    """Make scores grow along the keys; kernels may visit them from either end."""

    def change(q: np.ndarray, k: np.ndarray) -> None:  # noqa: ARG001
        ramp = np.linspace(1, factor, M)
        k *= (ramp if towards == "end" else ramp[::-1])[:, None]

    return change


def huge_key(position: int, factor: float) -> Callable[[np.ndarray, np.ndarray], None]:
    """Make one key's scores dwarf the others: positive for half of the rows, negative for the rest."""

    def change(q: np.ndarray, k: np.ndarray) -> None:  # noqa: ARG001
        k[..., position, :] *= factor

    return change


def equal_keys(q: np.ndarray, k: np.ndarray) -> None:  # noqa: ARG001
    """All scores of a row are equal, and large."""
    k[...] = 50 * k[..., :1, :]


def largest_numbers(q: np.ndarray, k: np.ndarray) -> None:
    """Numbers near the end of float16."""
    q[...] = np.where(q > 0, 60000.0, -60000.0)
    k[...] = np.where(k > 0, 60000.0, -60000.0)


def shrinking_rows(q: np.ndarray, k: np.ndarray) -> None:  # noqa: ARG001
    """Rows of very different scale in one tile."""
    q *= np.logspace(-3, 3, N)[:, None]


CHANGES: dict[str, Callable[[np.ndarray, np.ndarray], None]] = {
    **{f"grows {factor:g}x to the {towards}": growing(factor, towards=towards)
       for factor in (7.0, 100.0, 1000.0) for towards in ("start", "end")},
    **{f"key {position} x{factor:g}": huge_key(position, factor)
       for position in (0, 63, 500, 871, 999) for factor in (30.0, 3000.0)},
    "equal keys": equal_keys,
    "largest numbers": largest_numbers,
    "shrinking rows": shrinking_rows,
}  # fmt: skip


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", CHANGES)
def test_hopper_forward_is_as_exact_as_the_portable_one(
    name: str, causal: bool, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers = pytest.importorskip("ml_dtypes").bfloat16 if dtype == "bfloat16" else np.float16
    rng = np.random.default_rng(3)
    q, k, v = (rng.standard_normal((1, 2, rows, width)) for rows, width in ((N, D), (M, D), (M, E)))
    CHANGES[name](q, k)
    q, k, v = (x.astype(numbers) for x in (q, k, v))
    assert np.isfinite(q.astype(np.float64)).all()
    assert np.isfinite(k.astype(np.float64)).all()
    truth, true_lse = reference.exact_attention(q, k, v, scale=D**-0.5, causal_offset=M - N if causal else None)
    given = [to_kind(x, "cupy") for x in (q, k, v)]

    def run() -> tuple[Any, Any]:
        out, lse = exact_attention(*given, causal=causal, return_lse=True)
        return to_host(out).astype(np.float64), to_host(lse).astype(np.float64)

    out, lse = run()
    monkeypatch.setattr("distrattn_np.backends.cupy_backend.hopper_is_usable", lambda: False)
    portable, portable_lse = run()
    assert np.isfinite(out).all()
    assert np.isfinite(lse).all()
    assert relative_error(out, truth) <= 2 * relative_error(portable, truth) + 1e-6
    lse_atol = 1e-5 * (1 + np.abs(true_lse).max())
    assert np.abs(lse - true_lse).max() <= 2 * np.abs(portable_lse - true_lse).max() + lse_atol
