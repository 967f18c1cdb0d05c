"""Laws of windows, caps, masks and biases, in any combination, on the exact and the approximate paths."""

from __future__ import annotations

import dataclasses

import numpy as np
from hypothesis import assume
from hypothesis import strategies as st
from kit.backends import Runner
from kit.cases import Case, Inputs, reference_maps, truth, unsafe_channels
from kit.compare import assert_agrees, assert_same_bits
from kit.strategies import Draw, assert_same_result, calls, law, rounding

from distrattn_np import reference

WIDE = {"mask": "bhnm", "bias": "bhnm"}


def shown_pairs(case: Case) -> np.ndarray:
    """Return which pairs the softmax sees, (B, H, N, M)."""
    offset = {False: None, True: case.M - case.N, "top-left": 0}[case.causal]
    shown = np.broadcast_to(
        reference.visible_keys(case.N, case.M, offset, case.window or (None, None)), (case.B, case.H, case.N, case.M)
    ).copy()
    if case.mask is not None:
        shown &= case.mask_array
    if case.bias is not None:
        shown &= case.bias_array > -np.inf
    return shown


@law
def test_call_agrees_with_the_definition(backend: Runner, draw: Draw) -> None:
    case, inputs = draw(calls(backend.limits, score_options=True, hostile=False))
    problem = case.native_problem(inputs)
    assume(not unsafe_channels(problem, inputs.q, inputs.k))
    expected = truth(problem, *inputs, reference_maps(problem, inputs.q, inputs.k), case.score_options)
    # maps and least-squares gains are rounded to float32 for the definition
    in_float32 = dataclasses.replace(case, dtype="float32")
    slack = rounding(case, inputs) + (0 if problem.grouping is None else rounding(in_float32, inputs))
    assert_same_result(backend.distr(*inputs, **case.options), expected, case, slack)


@law
def test_full_rank_is_exact_attention(backend: Runner, draw: Draw) -> None:
    case, inputs = draw(calls(backend.limits, score_options=True, rank=None, score_tol=None, G=1))
    exact = backend.exact(*inputs, **case.attention_options)
    for one, other in zip(backend.distr(*inputs, **case.options), exact, strict=True):
        assert_same_bits(one, other, context=str(case))


@law
def test_query_that_sees_nothing_gives_zero_and_minus_infinity(backend: Runner, draw: Draw) -> None:
    case, inputs = draw(calls(backend.limits, score_options=True))
    blind = ~shown_pairs(case).any(axis=3)
    out, lse = backend.distr(*inputs, **case.options)
    assert (out[blind] == 0).all()
    assert (lse[blind] == -np.inf).all()
    assert np.isfinite(out[~blind]).all()
    assert np.isfinite(lse[~blind]).all()


@law
def test_options_that_hide_nothing_change_no_bit(backend: Runner, draw: Draw) -> None:
    case, inputs = draw(calls(backend.limits))
    plain = backend.distr(*inputs, **case.options)
    open_options = {
        "window": (case.N + case.M, case.N + case.M),
        "mask": np.ones((1, case.H, 1, case.M), bool),
        "bias": np.zeros((case.N, 1), np.float32),
    }
    opened = backend.distr(*inputs, **case.options, **open_options)
    # with options tensor cores take other tiles and units, and centred scores get their mean back before the softmax
    if backend.name == "cupy" and (case.dtype == "float16" or case.method == "subspace"):
        assert_same_result(opened, plain, case, rounding(case, inputs))
        return
    for one, other in zip(opened, plain, strict=True):
        assert_same_bits(one, other, context=str(case))


@law
def test_mask_is_a_bias_of_minus_infinity(backend: Runner, draw: Draw) -> None:
    case, inputs = draw(
        calls(backend.limits, score_options=True, bias=None, mask=st.sampled_from(["nm", "bm", "bhnm"]))
    )
    masked = backend.distr(*inputs, **case.options)
    options = case.options
    bias = np.where(options.pop("mask"), np.float32(0), np.float32(-np.inf))
    for one, other in zip(backend.distr(*inputs, **options, bias=bias), masked, strict=True):
        assert_agrees(one, other, rtol=0, atol=0, context=str(case), constant_ok=True)


@law
def test_broadcast_axes_may_be_written_out(backend: Runner, draw: Draw) -> None:
    case, inputs = draw(
        calls(backend.limits, score_options=True, mask=st.sampled_from(["", "m", "n", "bh"]), bias="hm")
    )
    short = backend.distr(*inputs, **case.options)
    shape = (case.B, case.H, case.N, case.M)
    written_out = {name: np.ascontiguousarray(np.broadcast_to(case.options[name], shape)) for name in ("mask", "bias")}
    for one, other in zip(backend.distr(*inputs, **case.options | written_out), short, strict=True):
        assert_same_bits(one, other, context=str(case))


@law
def test_mask_and_bias_may_be_views_in_any_order(backend: Runner, draw: Draw) -> None:
    case, inputs = draw(calls(backend.limits, score_options=True, **WIDE))
    straight = backend.distr(*inputs, **case.options)
    views = {
        name: np.asfortranarray(case.options[name])[:, ::-1] for name in ("mask", "bias")
    }  # and the heads from the last to the first
    turned = Inputs(*(x[:, ::-1] for x in inputs))
    for one, other in zip(backend.distr(*turned, **case.options | views), straight, strict=True):
        slack = 4 * rounding(case, inputs)  # views may be multiplied in another order
        assert_agrees(one[:, ::-1], other, rtol=2**-20, atol=slack * 8, context=str(case), constant_ok=True)


@law
def test_window_and_limit_are_masks_to_exact_attention(backend: Runner, draw: Draw) -> None:
    case, inputs = draw(calls(backend.limits, score_options=True, mask=None))
    limited = backend.exact(*inputs, **case.attention_options)
    offset = {False: None, True: case.M - case.N, "top-left": 0}[case.causal]
    options = case.attention_options | {"causal": False, "window": None}
    options["mask"] = reference.visible_keys(case.N, case.M, offset, case.window or (None, None))
    assert_same_result(backend.exact(*inputs, **options), limited, case, 2 * rounding(case, inputs))


@law
def test_hidden_values_are_never_used(backend: Runner, draw: Draw) -> None:
    case, (q, k, v) = draw(calls(backend.limits, score_options=True, mask=st.sampled_from(["m", "bm", "nm"])))
    shared = case.H // case.H_kv
    unused = ~shown_pairs(case).any(axis=2).reshape(case.B, case.H_kv, shared, case.M).any(axis=2)
    changed = v.copy()
    changed[unused] += 100
    before, after = (backend.distr(q, k, x, **case.options) for x in (v, changed))
    for one, other in zip(before, after, strict=True):
        assert_agrees(one, other, rtol=0, atol=0, context=str(case), constant_ok=True)


@law
def test_a_row_of_one_bias_changes_nothing_but_lse(backend: Runner, draw: Draw) -> None:
    case, inputs = draw(
        calls(backend.limits, score_options=True, bias=None, dtype=st.sampled_from(["float32", "float64"]))
    )
    rows = np.linspace(-3, 3, case.N, dtype=np.float32)[:, None]
    out, lse = backend.distr(*inputs, **case.options)
    expected = out, (lse + rows[:, 0]).astype(np.float32)
    assert_same_result(
        backend.distr(*inputs, **case.options, bias=rows), expected, case, 2 * rounding(case, inputs) + 1e-5
    )


@law
def test_capped_scores_stay_within_the_cap(backend: Runner, draw: Draw) -> None:
    """Lse of one key is its score; of M keys it lies within the cap of log M."""
    case, inputs = draw(calls(backend.limits, causal=False, softcap=st.sampled_from([0.3, 5.0])))
    _, lse = backend.distr(*inputs, **case.options)
    assert (np.abs(lse - np.log(case.M)) <= case.softcap * (1 + 1e-5) + 1e-5).all()
