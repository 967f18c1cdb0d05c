"""Properties that tie the approximation to exact attention and both to their definition."""

from __future__ import annotations

import numpy as np
from hypothesis import assume, target
from hypothesis import strategies as st
from kit.backends import Runner
from kit.cases import Case, Inputs, reference_maps, truth, unsafe_channels
from kit.compare import assert_same_bits
from kit.strategies import Draw, assert_same_result, calls, law, rounding


@law
def test_call_agrees_with_the_definition(backend: Runner, draw: Draw) -> None:
    case, inputs = draw(calls(backend.limits, method="lsh"))
    problem = case.native_problem(inputs)
    assume(problem.grouping is None or not unsafe_channels(problem, inputs.q, inputs.k))
    actual = backend.distr(*inputs, **case.options)
    maps = reference_maps(problem, inputs.q, inputs.k)
    expected = truth(problem, *inputs, maps)
    gains_rounding = 0 if maps is None or maps.gains is None else rounding_of_gains(case, inputs)
    if np.isfinite(expected[1]).any():
        target(float(np.abs(actual[0].astype(np.float64) - expected[0]).max()), label="error of the output")
    assert_same_result(actual, expected, case, rounding(case, inputs) + gains_rounding)


def rounding_of_gains(case: Case, inputs: Inputs) -> float:
    """Return what float32 gains do to float64 scores."""
    as_float32 = Case(**{name: getattr(case, name) for name in case.__dataclass_fields__} | {"dtype": "float32"})
    return rounding(as_float32, inputs)


@law
def test_group_size_one_is_exact_attention(backend: Runner, draw: Draw) -> None:
    case, inputs = draw(calls(backend.limits, G=1, rank=None, score_tol=None))
    grouped = backend.distr(*inputs, **case.options)
    exact = backend.exact(*inputs, **case.attention_options)
    for one, other in zip(grouped, exact, strict=True):
        assert_same_bits(one, other, context=str(case))


@law
def test_equal_channels_inside_every_group_make_it_exact(backend: Runner, draw: Draw) -> None:
    """Copies side by side have equal words, so every run of equal words holds whole groups of copies."""
    G = draw(st.sampled_from([2, 3]))
    D = G * draw(st.sampled_from([1, 2, 5]))
    case, (q, k, v) = draw(calls(backend.limits, method="lsh", G=G, D=D))
    grouped = q if case.by == "queries" else k
    grouped[...] = np.repeat(grouped[..., ::G], G, axis=-1)
    inputs = Inputs(q, k, v)
    slack = rounding(case, inputs)
    assert_same_result(
        backend.distr(*inputs, **case.options), backend.exact(*inputs, **case.attention_options), case, slack
    )


@law
def test_one_vector_added_to_every_key_changes_nothing_but_lse(backend: Runner, draw: Draw) -> None:
    """Exact attention only: the groups of the approximation, and their errors, do change."""
    case, (q, k, v) = draw(calls(backend.limits, dtype=st.sampled_from(["float32", "float64"])))
    shift = np.linspace(-1, 1, case.D).astype(k.dtype)
    shifted = Inputs(q, k + shift, v)
    out, _ = backend.exact(q, k, v, **case.attention_options)
    # not the backend's float32 lse: near -4, to which 4 is added, it is rounded by more than the slack
    problem = case.native_problem(Inputs(q, k, v))
    _, lse = truth(problem, q, k, v, None)
    expected = out, (lse + problem.scale * (q.astype(np.float64) @ shift)).astype(np.float32)
    slack = 2 * rounding(case, shifted) + 2 * rounding(case, Inputs(q, k, v))
    assert_same_result(backend.exact(*shifted, **case.attention_options), expected, case, slack)


@law
def test_order_of_channels_does_not_matter_to_exact_attention(backend: Runner, draw: Draw) -> None:
    case, inputs = draw(calls(backend.limits))
    q, k, v = inputs
    order = draw(st.permutations(range(case.D)))
    straight = backend.exact(q, k, v, **case.attention_options)
    shuffled = backend.exact(np.take(q, order, axis=3), np.take(k, order, axis=3), v, **case.attention_options)
    assert_same_result(shuffled, straight, case, 2 * rounding(case, inputs))
