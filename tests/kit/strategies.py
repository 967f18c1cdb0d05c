"""What Hypothesis draws: calls of hostile sizes and values; and `law`, one property stated for every backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from .backends import Limits, Runner, runners
from .cases import Case, Inputs
from .compare import assert_agrees

MAX_ENTRY = 8
"""Keeps scores in a range where float32 still resolves them: about 700 at D = 128."""
SPACING = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float32": 2.0**-23, "float64": 2.0**-52}
"""Of numbers at 1, by dtype."""
LSE_ROUNDING = SPACING["float32"]
"""lse is float32 whatever the inputs are."""

axes = st.one_of(st.none(), st.sets(st.sampled_from("bhnm")).map("".join))
side = st.sampled_from([None, 0, 1, 30, 100, 10**12])
SCORE_OPTIONS = {
    "window": st.one_of(st.none(), st.tuples(side, side)),
    "softcap": st.sampled_from([0.0, 0.3, 5.0, 50.0]),
    "mask": axes,
    "bias": axes,
    "bias_dtype": st.sampled_from([None, "float32"]),
}
"""Fields of `Case`."""

Draw = Callable[[st.SearchStrategy[Any]], Any]


def law(body: Callable[[Runner, Draw], None], *, method: str = "lsh", ragged: bool = False) -> Any:
    """Make a test of ``body(backend, draw)``: every backend that runs here, as many examples as it can afford.

    ``method`` is one that the law needs, ``ragged`` says whether it needs packed sequences; backends that do not build
    them are left out.
    """
    able = [runner for runner in runners() if method in runner.limits.methods and runner.limits.ragged >= ragged]

    @pytest.mark.parametrize("backend", able, ids=lambda runner: runner.name)
    def test(backend: Runner) -> None:
        def examples(data: st.DataObject) -> None:
            body(backend, data.draw)

        # Hypothesis files failures under this name
        examples.__name__ = f"{body.__name__}_{backend.name.replace('-', '_')}"
        most = backend.limits.examples
        profile = settings() if most is None else settings(max_examples=min(most, settings().max_examples))
        profile(given(data=st.data())(examples))()

    test.__name__ = test.__qualname__ = body.__name__
    test.__doc__ = body.__doc__
    test.__module__ = body.__module__
    return test


@st.composite
def calls(
    draw: Draw, limits: Limits, *, hostile: bool = True, score_options: bool = False, **fixed: Any
) -> tuple[Case, Inputs]:
    """Draw one call. ``fixed`` pins fields of `Case` (a value or a strategy); ``hostile=False`` leaves out ties.

    ``score_options`` draws windows, caps, masks and biases too.
    """

    def pick(name: str, strategy: st.SearchStrategy[Any]) -> Any:
        chosen = fixed.get(name, strategy)
        return draw(chosen) if isinstance(chosen, st.SearchStrategy) else chosen

    H, H_kv = draw(st.sampled_from(limits.heads))
    D = pick("D", st.sampled_from(limits.widths))
    N = pick("N", st.sampled_from(limits.rows))
    M = pick("M", st.sampled_from(limits.rows))
    case = Case(
        B=draw(st.sampled_from(limits.batches)),
        H=H,
        H_kv=H_kv,
        N=N,
        M=M,
        D=D,
        E=pick("E", st.sampled_from(limits.widths)),
        dtype=pick("dtype", st.sampled_from(limits.dtypes)),
        G=pick("G", st.sampled_from([g for g in (1, 2, 3, 4, 8, 33) if D % g == 0])),
        L=pick("L", st.sampled_from([*limits.rows, 1024])),
        by=pick("by", st.sampled_from(["queries", "keys"])),
        fusion=pick("fusion", st.sampled_from(["sum", "lstsq"])),
        method=pick("method", st.sampled_from(limits.methods)),
        rank=pick("rank", st.sampled_from([None, *(r for r in (1, 2, 7, 16, 31) if r <= D)])),
        score_tol=pick("score_tol", st.sampled_from([None, None, 0.1, 1.0])),
        refine=pick("refine", st.integers(0, 2)),
        causal=pick("causal", st.sampled_from([False, True, "top-left"])),
        scale=pick("scale", st.sampled_from([None, 0.5, -0.25])),
        seed=pick("seed", st.integers(0, 3)),
        **{name: pick(name, strategy) for name, strategy in SCORE_OPTIONS.items() if score_options or name in fixed},
    )
    shapes = ((case.B, H, N, D), (case.B, H_kv, M, D), (case.B, H_kv, M, case.E))
    return case, Inputs(*(draw(arrays(shape, case.numpy_dtype, hostile=hostile)) for shape in shapes))


@st.composite
def arrays(draw: Draw, shape: tuple[int, ...], dtype: np.dtype, *, hostile: bool = True) -> np.ndarray:
    """Draw an array: normal numbers; if ``hostile``, also constant or far from zero, with odd entries."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    array = rng.standard_normal(shape)
    if hostile:
        array = array * draw(st.sampled_from([1.0, 0.0, 2.0**-10])) + draw(st.sampled_from([0.0, -3.0, 1.0]))
        if array.size:
            entry = st.floats(-MAX_ENTRY, MAX_ENTRY, width=32, allow_subnormal=False)
            for place, value in draw(st.lists(st.tuples(st.integers(0, array.size - 1), entry), max_size=3)):
                array.flat[place] = value
    return np.clip(array, -MAX_ENTRY, MAX_ENTRY).astype(dtype)


def rounding(case: Case, inputs: Inputs) -> float:
    """Return a bound, in nats, of what rounding in the case's dtype does to the scores and the weights of values.

    A score is a sum of D products, each at most max|q| max|k|; least-squares gains and maps may add a factor
    sqrt(rows). An error of d nats in the scores moves a result by at most about 2 d max|v|, and lse by d.
    """
    scale = 1 / np.sqrt(case.D) if case.scale is None else abs(case.scale)
    is_fitted = case.method == "subspace" or (case.fusion == "lstsq" and case.G > 1)
    rows = max(case.N, case.M) if is_fitted else 1
    scores = scale * largest(inputs.q) * largest(inputs.k) * case.D * np.sqrt(rows)
    return 4 * SPACING[case.dtype] * (1 + scores) + sum_rounding(case)


def value_rounding(case: Case, v: np.ndarray) -> float:
    """Return a bound of what rounding does to a weighted mean of M values once the weights are given."""
    return (4 * SPACING[case.dtype] + 2 * sum_rounding(case)) * largest(v)


def sum_rounding(case: Case) -> float:
    """Return the relative rounding of a sum over the keys, float32 at least."""
    return case.M * min(SPACING[case.dtype], SPACING["float32"])


def largest(array: np.ndarray) -> float:
    """Return the largest absolute value."""
    return float(np.abs(array.astype(np.float64)).max(initial=0))


def assert_same_result(
    actual: tuple[np.ndarray, np.ndarray], expected: tuple[np.ndarray, np.ndarray], case: Case, slack: float
) -> None:
    """Compare (out, lse) of two computations; ``slack`` is the error of their scores in nats, as from `rounding`."""
    tolerances = ((0, 2 * slack * MAX_ENTRY), (4 * LSE_ROUNDING, slack + LSE_ROUNDING))
    for got, want, (rtol, atol) in zip(actual, expected, tolerances, strict=True):
        assert_agrees(got, want, rtol=rtol, atol=atol, context=str(case), check_dtype=False, constant_ok=True)
