"""Properties of changed calls: what may be permuted, split, scaled or taken apart without changing the result."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st
from kit.backends import Runner
from kit.cases import Inputs
from kit.compare import assert_agrees
from kit.strategies import LSE_ROUNDING, Draw, assert_same_result, calls, law, rounding


@law
def test_keys_and_values_may_be_permuted_together(backend: Runner, draw: Draw) -> None:
    """Only where groups come from queries. Ties between weights would be broken differently: none are drawn."""
    case, (q, k, v) = draw(calls(backend.limits, hostile=False, by="queries", causal=False))
    order = np.random.default_rng(draw(st.integers(0, 99))).permutation(case.M)
    inputs = Inputs(q, k[:, :, order], v[:, :, order])
    straight, permuted = backend.distr(q, k, v, **case.options), backend.distr(*inputs, **case.options)
    assert_same_result(permuted, straight, case, 2 * rounding(case, inputs))


@law
def test_each_batch_and_key_head_is_a_call_of_its_own(backend: Runner, draw: Draw) -> None:
    case, inputs = draw(calls(backend.limits, hostile=False))
    b, h_kv = draw(st.integers(0, case.B - 1)), draw(st.integers(0, case.H_kv - 1))
    shared = case.H // case.H_kv
    heads = slice(h_kv * shared, (h_kv + 1) * shared)
    q, k, v = inputs
    together = tuple(x[b : b + 1, heads] for x in backend.distr(q, k, v, **case.options))
    alone = backend.distr(
        q[b : b + 1, heads], k[b : b + 1, h_kv : h_kv + 1], v[b : b + 1, h_kv : h_kv + 1], **case.options
    )
    assert_same_result(alone, together, case, 2 * rounding(case, inputs))


@law
def test_shared_key_heads_are_repeated_key_heads(backend: Runner, draw: Draw) -> None:
    """Not for least squares with blocks over keys: there the query heads of a key head weigh its channels together."""
    how = [
        ("lsh", "queries", "sum"),
        ("lsh", "queries", "lstsq"),
        ("lsh", "keys", "sum"),
        ("subspace", "queries", "sum"),
    ]
    method, by, fusion = draw(st.sampled_from([one for one in how if one[0] in backend.limits.methods]))
    case, inputs = draw(calls(backend.limits, hostile=False, method=method, by=by, fusion=fusion))
    q, k, v = inputs
    repeated = (np.repeat(x, case.H // case.H_kv, axis=1) for x in (k, v))
    assert_same_result(
        backend.distr(q, *repeated, **case.options),
        backend.distr(q, k, v, **case.options),
        case,
        2 * rounding(case, inputs),
    )


@law
def test_power_of_two_may_move_from_scale_to_queries(backend: Runner, draw: Draw) -> None:
    """Bit for bit: nothing is rounded by it. In 16 bits small products would leave the range.

    For the subspace method a power of 16, of which the maps hold the fourth root.
    """
    dtypes = st.sampled_from(["float32", "float64"])
    case, (q, k, v) = draw(calls(backend.limits, dtype=dtypes, scale=0.375))
    factor = draw(st.sampled_from([0.25, 2.0, 8.0] if case.method == "lsh" else [1 / 16, 16.0]))
    straight = backend.distr(q, k, v, **case.options)
    moved = backend.distr(q * q.dtype.type(factor), k, v, **(case.options | {"scale": 0.375 / factor}))
    for one, other in zip(moved, straight, strict=True):
        assert_agrees(one, other, rtol=0, atol=0, context=str(case), constant_ok=True)


@law
def test_two_ranges_of_keys_merge_by_lse(backend: Runner, draw: Draw) -> None:
    """Where both ranges have the blocks of the whole, and least squares does not weigh them by the other range."""
    by, fusion, G = draw(
        st.sampled_from([("queries", "sum", 1), ("queries", "sum", 2), ("keys", "sum", 2), ("keys", "lstsq", 2)])
    )
    case, inputs = draw(
        calls(
            backend.limits,
            hostile=False,
            causal=False,
            method="lsh",
            by=by,
            fusion=fusion,
            G=G,
            D=st.sampled_from([2, 6, 8]),
            L=st.sampled_from([1, 8, 32]),
            M=st.sampled_from([rows for rows in backend.limits.rows if rows > 1]),
        )
    )
    q, k, v = inputs
    cuts = range(case.L, case.M, case.L) if by == "keys" else range(1, case.M)
    cut = draw(st.sampled_from([*cuts, case.M]))
    out, lse = backend.distr(q, k, v, **case.options)
    head, tail = (
        backend.distr(q, k[:, :, rows], v[:, :, rows], **case.options) for rows in (slice(cut), slice(cut, None))
    )
    merged_lse = np.logaddexp(head[1].astype(np.float64), tail[1].astype(np.float64))
    merged = sum(o.astype(np.float64) * np.exp(part - merged_lse)[..., None] for o, part in (head, tail))
    # lse of the parts is float32: an error of its spacing is an error of as many nats
    slack = 2 * rounding(case, inputs) + 2 * LSE_ROUNDING * (1 + float(np.abs(lse).max()))
    assert_same_result((merged, merged_lse), (out, lse), case, slack)


@law
def test_block_longer_than_the_rows_is_one_block(backend: Runner, draw: Draw) -> None:
    case, inputs = draw(calls(backend.limits))
    rows = case.N if case.by == "queries" else case.M
    one = backend.distr(*inputs, **(case.options | {"block_size": rows}))
    for longer in (rows + 1, 1024, 10**12):
        other = backend.distr(*inputs, **(case.options | {"block_size": longer}))
        for got, want in zip(other, one, strict=True):
            assert_agrees(got, want, rtol=0, atol=rounding(case, inputs) * 16, context=str(case), constant_ok=True)
