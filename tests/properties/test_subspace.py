"""Laws of the subspace method: where it is exact, what it does not see, and that nothing finite breaks it."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from hypothesis import strategies as st
from kit.backends import Runner
from kit.cases import Case, Inputs, reference_maps, truth
from kit.compare import assert_same_bits
from kit.strategies import LSE_ROUNDING, Draw, assert_same_result, calls, largest, law, rounding

LOST_DIRECTIONS = 1e-4
"""Part of the largest score that maps made in float32 may lose: directions whose square they cannot see (eq. 16)."""


def subspace_law(body: Any) -> Any:
    return law(body, method="subspace")


def subspace_calls(backend: Runner, **fixed: Any) -> st.SearchStrategy[tuple[Case, Inputs]]:
    return calls(backend.limits, method="subspace", **fixed)


def ranked(case: Case, rank: int) -> Case:
    return dataclasses.replace(case, rank=rank, score_tol=None)


def slack_of_exact(case: Case, inputs: Inputs) -> float:
    """Return, in nats, what rounding may do to scores and maps that should be exact."""
    scale = 1 / np.sqrt(case.D) if case.scale is None else abs(case.scale)
    scores = scale * largest(inputs.q) * largest(inputs.k) * case.D
    return rounding(case, inputs) + LOST_DIRECTIONS * scores


@subspace_law
def test_call_agrees_with_the_definition(backend: Runner, draw: Draw) -> None:
    case, inputs = draw(subspace_calls(backend, hostile=False))
    problem = case.problem(*inputs)
    maps = reference_maps(problem, inputs.q, inputs.k)
    in_float32 = dataclasses.replace(case, dtype="float32")
    slack = rounding(case, inputs) + rounding(in_float32, inputs)
    assert_same_result(backend.distr(*inputs, **case.options), truth(problem, *inputs, maps), case, slack)


@subspace_law
def test_full_rank_is_exact_attention(backend: Runner, draw: Draw) -> None:
    case, inputs = draw(subspace_calls(backend))
    exact = backend.exact(*inputs, **case.attention_options)
    for one, other in zip(backend.distr(*inputs, **ranked(case, case.D).options), exact, strict=True):
        assert_same_bits(one, other, context=str(case))


@subspace_law
def test_a_tolerance_that_nothing_meets_is_exact_attention(backend: Runner, draw: Draw) -> None:
    case, inputs = draw(subspace_calls(backend, score_tol=1e-30, scale=0.5))
    exact = backend.exact(*inputs, **case.attention_options)
    # keys are centred and rounded once more
    assert_same_result(backend.distr(*inputs, **case.options), exact, case, 4 * rounding(case, inputs))


@subspace_law
def test_block_or_other_side_of_low_rank_is_exact(backend: Runner, draw: Draw) -> None:
    """Blocks from the rows of a random subspace, which stays one after centring."""
    rank = draw(st.integers(1, 4))
    D = draw(st.sampled_from([width for width in backend.limits.widths if width > rank]))
    case, (q, k, v) = draw(
        subspace_calls(
            backend, hostile=False, D=D, dtype=st.sampled_from(["float32"]), refine=st.integers(1, 3), scale=None
        )
    )
    case = ranked(case, rank)
    low = "qk"[draw(st.integers(0, 1))]
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    basis, _ = np.linalg.qr(rng.standard_normal((D, rank)))
    if low == "q":
        q = ((q @ basis) @ basis.T).astype(q.dtype)
    else:
        k = ((k @ basis) @ basis.T).astype(k.dtype)
    inputs = Inputs(q, k, v)
    exact = backend.exact(*inputs, **case.attention_options)
    assert_same_result(backend.distr(*inputs, **case.options), exact, case, slack_of_exact(case, inputs))


@subspace_law
def test_equal_channels_are_exact(backend: Runner, draw: Draw) -> None:
    copies = draw(st.sampled_from([2, 3]))
    rank = draw(st.sampled_from([1, 2, 5]))
    D = copies * rank
    case, (q, k, v) = draw(subspace_calls(backend, D=D, dtype="float32"))
    case = ranked(case, rank)
    grouped = q if case.by == "queries" else k
    grouped[...] = np.repeat(grouped[..., ::copies], copies, axis=-1)
    inputs = Inputs(q, k, v)
    exact = backend.exact(*inputs, **case.attention_options)
    assert_same_result(backend.distr(*inputs, **case.options), exact, case, slack_of_exact(case, inputs))


@subspace_law
def test_one_vector_added_to_every_key_changes_nothing_but_lse(backend: Runner, draw: Draw) -> None:
    case, (q, k, v) = draw(subspace_calls(backend, hostile=False, dtype=st.sampled_from(["float64"])))
    shift = np.linspace(-50, 50, case.D)
    out, lse = backend.distr(q, k, v, **case.options)
    scale = 1 / np.sqrt(case.D) if case.scale is None else case.scale
    expected = out, lse + scale * (q @ shift)
    shifted = Inputs(q, k + shift, v)
    # the lse that the shift is added to is float32
    slack = 1e-6 + rounding(case, shifted) + LSE_ROUNDING * float(np.abs(lse[lse > -np.inf]).max(initial=0))
    assert_same_result(backend.distr(*shifted, **case.options), expected, case, slack)


@subspace_law
def test_one_block_of_all_keys_is_exact_causal_attention(backend: Runner, draw: Draw) -> None:
    case, inputs = draw(subspace_calls(backend, by="keys", causal=True, L=1024))
    exact = backend.exact(*inputs, **case.attention_options)
    # keys are centred and rounded once more
    assert_same_result(backend.distr(*inputs, **case.options), exact, case, 4 * rounding(case, inputs))


@subspace_law
def test_later_keys_have_no_part_in_a_row_but_for_the_mean(backend: Runner, draw: Draw) -> None:
    """The keys after a query change places, which keeps the mean, and get other values."""
    case, (q, k, v) = draw(
        subspace_calls(
            backend,
            hostile=False,
            dtype=st.sampled_from(["float64"]),
            by="keys",
            causal=st.sampled_from([True, "top-left"]),
        )
    )
    n = draw(st.integers(0, case.N - 1))
    after = max(n + 1 + (0 if case.causal == "top-left" else case.M - case.N), 0)
    other = Inputs(q, k.copy(), v.copy())
    other.k[:, :, after:] = k[:, :, after:][:, :, ::-1]
    other.v[:, :, after:] = -v[:, :, after:]
    expected, actual = (backend.distr(*inputs, **case.options) for inputs in (Inputs(q, k, v), other))
    rows_of = [(out[:, :, : n + 1], lse[:, :, : n + 1]) for out, lse in (actual, expected)]
    assert_same_result(*rows_of, case, 1e-6 + rounding(case, other))


@subspace_law
def test_finite_inputs_give_finite_results(backend: Runner, draw: Draw) -> None:
    """Offsets of 400, channels of scales far apart, constant and zero channels, equal rows; no score overflows."""
    case, (q, k, v) = draw(subspace_calls(backend))
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    dtype = case.numpy_dtype
    q, k = q.astype(np.float64), k.astype(np.float64)
    if draw(st.booleans()):
        k += rng.uniform(-400, 400, case.D)
    if draw(st.booleans()):
        scales = 10.0 ** rng.integers(-3, 3, case.D)
        q, k = q * scales, k / scales
    if draw(st.booleans()):
        constant = rng.integers(0, 2, case.D).astype(bool)
        k[..., constant] = k[:, :, :1, constant]
    if draw(st.booleans()):
        q[..., rng.integers(0, 2, case.D).astype(bool)] = 0
    q, k = (np.clip(x, -60000, 60000).astype(dtype) for x in (q, k))
    out, lse = backend.distr(q, k, v, **case.options)
    assert np.isfinite(out).all(), str(case)
    seen = lse > -np.inf
    exact_out, exact_lse = backend.exact(q, k, v, **case.attention_options)
    assert_same_bits(seen, exact_lse > -np.inf)
    assert np.isfinite(lse[seen]).all(), str(case)
    assert np.isfinite(exact_out).all()
