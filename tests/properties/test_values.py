"""Properties of the numbers: between the values that a query sees, linear in them, nothing from beyond the limit."""

from __future__ import annotations

import numpy as np
from distrattn_np.reference import visible_keys
from hypothesis import strategies as st
from kit.backends import Runner
from kit.cases import Case, Inputs
from kit.compare import assert_agrees
from kit.strategies import Draw, calls, law, rounding, value_rounding


def seen_keys(case: Case) -> np.ndarray:
    offset = {False: None, True: case.M - case.N, "top-left": 0}[case.causal]
    return visible_keys(case.N, case.M, offset)


def of_query_heads(case: Case, x: np.ndarray) -> np.ndarray:
    """Repeat key or value heads, so that there is one for every query head."""
    return np.repeat(x, case.H // case.H_kv, axis=1)


@law
def test_output_lies_within_the_range_of_visible_values(backend: Runner, draw: Draw) -> None:
    case, (q, k, v) = draw(calls(backend.limits))
    out, _ = backend.distr(q, k, v, **case.options)
    values = of_query_heads(case, v.astype(np.float64))
    slack = value_rounding(case, v)
    for n, seen in enumerate(seen_keys(case)):
        if seen.any():
            visible = values[:, :, seen]
            row = out[:, :, n].astype(np.float64)
            assert (row >= visible.min(axis=2) - slack).all(), f"{case}: row {n} below every visible value"
            assert (row <= visible.max(axis=2) + slack).all(), f"{case}: row {n} above every visible value"


@law
def test_constant_values_come_back(backend: Runner, draw: Draw) -> None:
    case, (q, k, v) = draw(calls(backend.limits, causal=st.sampled_from([False, "top-left"])))
    v = np.broadcast_to(v[:, :, :1], v.shape).copy()
    out, _ = backend.distr(q, k, v, **case.options)
    expected = np.broadcast_to(of_query_heads(case, v)[:, :, :1], out.shape)
    slack = value_rounding(case, v)
    assert_agrees(out, expected, rtol=0, atol=slack, context=str(case), constant_ok=True)


@law
def test_output_is_linear_in_the_values(backend: Runner, draw: Draw) -> None:
    case, inputs = draw(calls(backend.limits))
    q, k, v = inputs
    w = np.flip(v, axis=(2, 3)).copy()
    factor = 0.25
    combined = (v + v.dtype.type(factor) * w).astype(v.dtype)
    (a, _), (b, _), (c, _) = (backend.distr(q, k, x, **case.options) for x in (v, w, combined))
    expected = a.astype(np.float64) + factor * b.astype(np.float64)
    # the scores are the same in all three: only products with values, and results, are rounded
    slack = 2 * value_rounding(case, v) + 2 * value_rounding(case, combined)
    assert_agrees(c, expected, rtol=0, atol=slack, context=str(case), check_dtype=False, constant_ok=True)


@law
def test_scale_zero_averages_the_visible_values(backend: Runner, draw: Draw) -> None:
    case, (q, k, v) = draw(calls(backend.limits, scale=0.0))
    out, lse = backend.distr(q, k, v, **case.options)
    seen = seen_keys(case)
    count = seen.sum(axis=1)
    weights = seen / np.maximum(count, 1)[:, None]
    expected = weights @ of_query_heads(case, v.astype(np.float64))
    slack = value_rounding(case, v)
    assert_agrees(out, expected, rtol=0, atol=slack, context=str(case), check_dtype=False, constant_ok=True)
    with np.errstate(divide="ignore"):
        expected = np.broadcast_to(np.log(count), lse.shape)
    assert_agrees(lse, expected, rtol=1e-6, atol=1e-6, context=str(case), check_dtype=False, constant_ok=True)


@law
def test_query_without_a_visible_key_gives_zero_and_minus_infinity(backend: Runner, draw: Draw) -> None:
    case, (q, k, v) = draw(calls(backend.limits, causal=True, N=max(backend.limits.rows)))
    blind = ~seen_keys(case).any(axis=1)
    out, lse = backend.distr(q, k, v, **case.options)
    assert (out[:, :, blind] == 0).all()
    assert (lse[:, :, blind] == -np.inf).all()
    assert np.isfinite(lse[:, :, ~blind]).all()


@law
def test_no_keys_at_all_give_zero_and_minus_infinity(backend: Runner, draw: Draw) -> None:
    case, (q, k, v) = draw(calls(backend.limits, M=0))
    out, lse = backend.distr(q, k, v, **case.options)
    assert out.shape == (case.B, case.H, case.N, case.E)
    assert (out == 0).all()
    assert (lse == -np.inf).all()


@law
def test_no_queries_give_an_empty_result(backend: Runner, draw: Draw) -> None:
    case, (q, k, v) = draw(calls(backend.limits, N=0))
    out, lse = backend.distr(q, k, v, **case.options)
    assert out.shape == (case.B, case.H, 0, case.E)
    assert lse.shape == (case.B, case.H, 0)


@law
def test_values_after_the_causal_limit_are_never_used(backend: Runner, draw: Draw) -> None:
    case, (q, k, v) = draw(calls(backend.limits, causal=st.sampled_from([True, "top-left"])))
    n = draw(st.integers(0, case.N - 1))
    changed = v.copy()
    changed[:, :, ~seen_keys(case)[n]] += 100
    before, after = (backend.distr(q, k, x, **case.options) for x in (v, changed))
    for one, other in zip(before, after, strict=True):
        assert_agrees(one[:, :, : n + 1], other[:, :, : n + 1], rtol=0, atol=0, context=str(case), constant_ok=True)


@law
def test_keys_after_the_causal_limit_are_never_used(backend: Runner, draw: Draw) -> None:
    """Blocks over queries, fusion "sum": there the groups do not depend on the keys either."""
    case, (q, k, v) = draw(
        calls(backend.limits, causal=st.sampled_from([True, "top-left"]), method="lsh", by="queries", fusion="sum")
    )
    n = draw(st.integers(0, case.N - 1))
    changed = k.copy()
    changed[:, :, ~seen_keys(case)[n]] -= 100
    before, after = (backend.distr(q, x, v, **case.options) for x in (k, changed))
    for one, other in zip(before, after, strict=True):
        assert_agrees(one[:, :, : n + 1], other[:, :, : n + 1], rtol=0, atol=0, context=str(case), constant_ok=True)


@law
def test_nan_and_inf_stay_in_their_head(backend: Runner, draw: Draw) -> None:
    case, inputs = draw(calls(backend.limits))
    b, h_kv = draw(st.integers(0, case.B - 1)), draw(st.integers(0, case.H_kv - 1))
    shared = case.H // case.H_kv
    spoilt = Inputs(*(x.copy() for x in inputs))
    which = draw(st.sampled_from("qkv"))
    array = getattr(spoilt, which)
    heads = slice(h_kv * shared, (h_kv + 1) * shared) if which == "q" else slice(h_kv, h_kv + 1)
    array[b, heads, draw(st.integers(0, array.shape[2] - 1))] = draw(st.sampled_from([np.nan, np.inf, -np.inf]))
    clean = np.ones((case.B, case.H), dtype=bool)
    clean[b, h_kv * shared : (h_kv + 1) * shared] = False
    before, after = (backend.distr(*arrays, **case.options) for arrays in (inputs, spoilt))
    for one, other in zip(before, after, strict=True):
        assert_agrees(one[clean], other[clean], rtol=0, atol=0, context=str(case), constant_ok=True)


@law
def test_nan_in_a_query_stays_in_its_row_of_exact_attention(backend: Runner, draw: Draw) -> None:
    case, (q, k, v) = draw(calls(backend.limits, causal=st.sampled_from([False, "top-left"])))
    n = draw(st.integers(0, case.N - 1))
    spoilt = q.copy()
    spoilt[:, :, n] = np.nan
    before, after = (backend.exact(x, k, v, **case.attention_options) for x in (q, spoilt))
    assert np.isnan(after[0][:, :, n]).all()
    assert np.isnan(after[1][:, :, n]).all()
    rest = np.arange(case.N) != n
    slack = rounding(case, Inputs(q, k, v))
    for one, other in zip(before, after, strict=True):
        assert_agrees(one[:, :, rest], other[:, :, rest], rtol=0, atol=slack * 8, context=str(case), constant_ok=True)
