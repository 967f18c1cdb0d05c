"""Do softmax shortcuts survive scores that are made to break them? Run on a GPU with CuPy.

The Hopper forward seldom looks for the maximum of a row. For every finite input it must stay within twice the error of
the forward that always does, and give no inf or NaN; through maps too, its reference in columns of their own (rank
62) or not (64). Not checked here: speed, and maps of numbers near the end of float16, whose products with
rows both forwards limit to it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from kit.backends import to_kind
from kit.cases import problem_of, truth
from kit.compare import relative_error, to_host

from distrattn_np import backends, distr_attention, exact_attention, reference
from distrattn_np.problem import SubspaceMaps

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


def inputs(name: str, dtype: str) -> tuple[np.ndarray, ...]:
    numbers = pytest.importorskip("ml_dtypes").bfloat16 if dtype == "bfloat16" else np.float16
    rng = np.random.default_rng(3)
    q, k, v = (rng.standard_normal((1, 2, rows, width)) for rows, width in ((N, D), (M, D), (M, E)))
    CHANGES[name](q, k)
    q, k, v = (x.astype(numbers) for x in (q, k, v))
    assert np.isfinite(q.astype(np.float64)).all()
    assert np.isfinite(k.astype(np.float64)).all()
    return q, k, v


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", CHANGES)
def test_hopper_forward_is_as_exact_as_the_portable_one(
    name: str, causal: bool, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k, v = inputs(name, dtype)
    true, true_lse = reference.exact_attention(q, k, v, scale=D**-0.5, causal_offset=M - N if causal else None)
    given = [to_kind(x, "cupy") for x in (q, k, v)]

    def run() -> tuple[Any, Any]:
        out, lse = exact_attention(*given, causal=causal, return_lse=True)
        return to_host(out).astype(np.float64), to_host(lse).astype(np.float64)

    out, lse = run()
    monkeypatch.setattr("distrattn_np.backends.cupy_backend.hopper_is_usable", lambda: False)
    portable, portable_lse = run()
    assert np.isfinite(out).all()
    assert np.isfinite(lse).all()
    assert relative_error(out, true) <= 2 * relative_error(portable, true) + 1e-6
    lse_atol = 1e-5 * (1 + np.abs(true_lse).max())
    assert np.abs(lse - true_lse).max() <= 2 * np.abs(portable_lse - true_lse).max() + lse_atol


@pytest.mark.parametrize("rank", [62, 64])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", sorted(CHANGES.keys() - {"largest numbers"}))
def test_hopper_forward_through_maps_is_as_exact_as_the_portable_one(
    name: str, causal: bool, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrays = inputs(name, "float16")
    given = [to_kind(x, "cupy") for x in arrays]
    options: dict[str, Any] = {"method": "subspace", "rank": rank, "block_size": 128, "causal": causal}
    problem = problem_of(*arrays, **options)
    made = backends.load_by_name("cupy").group_maps(problem, *given[:2])
    assert isinstance(made, SubspaceMaps)
    maps = SubspaceMaps(*(to_host(getattr(made, field)) for field in SubspaceMaps.__slots__))
    true, true_lse = truth(problem, *arrays, maps)

    def errors() -> tuple[float, float]:
        out, lse = (to_host(x).astype(np.float64) for x in distr_attention(*given, **options, return_lse=True))
        assert np.isfinite(out).all()
        assert np.isfinite(lse).all()
        return relative_error(out, true), float(np.abs(lse - true_lse).max())

    error, lse_error = errors()
    backend = "distrattn_np.backends.cupy_backend"
    monkeypatch.setattr(
        f"{backend}.CupyBackend.group_maps", lambda *_: made
    )  # those of the other device differ in rounding
    monkeypatch.setattr(f"{backend}.hopper_is_usable", lambda: False)
    portable, portable_lse = errors()
    assert error <= 2 * portable + 1e-6
    assert lse_error <= 2 * portable_lse + 1e-5 * (1 + float(np.abs(true_lse).max()))
