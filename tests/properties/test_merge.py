"""Laws of merging: the parts make the whole, in any order, and a part that saw nothing changes nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st
from kit.backends import Runner
from kit.cases import Inputs
from kit.compare import assert_agrees, assert_same_bits, to_host
from kit.strategies import LSE_ROUNDING, MAX_ENTRY, SPACING, Draw, assert_same_result, calls, largest, law, rounding

import distrattn_np
from distrattn_np.arrays import kind_of

Result = tuple[np.ndarray, np.ndarray]


def merged(backend: Runner, a: Result, b: Result, **options: Any) -> Result:
    given = [backend.give(x) for x in (*a, *b)]  # read-only for NumPy
    results = distrattn_np.merge(*given, **options)
    assert [kind_of(result) for result in results] == [backend.kind] * 2
    out, lse = (to_host(result) for result in results)
    return out, lse


def results(draw: Draw, backend: Runner, count: int) -> list[Result]:
    """Draw results as calls give them: a row without a key is zero, and several may be."""
    limits = backend.limits
    dtype = np.dtype(draw(st.sampled_from([name for name in limits.dtypes if name != "bfloat16"])))
    shape = (
        draw(st.sampled_from(limits.batches)),
        2,
        draw(st.sampled_from(limits.rows)),
        draw(st.sampled_from([1, 5])),
    )
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    found = []
    for _ in range(count):
        lse = rng.normal(scale=draw(st.sampled_from([1, 100])), size=shape[:3]).astype(np.float32)
        lse[rng.random(lse.shape) < 0.3] = -np.inf
        out = np.where(lse[..., None] == -np.inf, 0, rng.uniform(-MAX_ENTRY, MAX_ENTRY, shape)).astype(dtype)
        found.append((out, lse))
    return found


def assert_close(actual: Result, expected: Result, times: int) -> None:
    """Allow for so many roundings to the dtype of the results, and to float32 of the lse."""
    dtype = expected[0].dtype.name
    atol = times * MAX_ENTRY * (SPACING[dtype] + 512 * SPACING["float32"])  # lse of a few hundred, whose exp is taken
    assert_agrees(actual[0], expected[0], rtol=0, atol=atol, constant_ok=True)
    assert_agrees(actual[1], expected[1], rtol=times * SPACING["float32"], atol=times * 1e-6, constant_ok=True)


@law
def test_parts_of_the_keys_make_the_whole(backend: Runner, draw: Draw) -> None:
    case, (q, k, v) = draw(calls(backend.limits, causal=False))
    first, second = sorted(draw(st.integers(0, case.M)) for _ in range(2))
    parts = [
        backend.exact(q, k[:, :, keys], v[:, :, keys], **case.attention_options)
        for keys in (slice(first), slice(first, second), slice(second, None))
    ]
    whole = backend.exact(q, k, v, **case.attention_options)
    one_by_one = merged(backend, merged(backend, parts[0], parts[1]), parts[2])
    # the weights of the parts come from lse, which is float32 whatever the results are
    of_lse = 4 * LSE_ROUNDING * max(1, *(largest(lse[lse > -np.inf]) for _, lse in parts))
    assert_same_result(one_by_one, whole, case, 4 * rounding(case, Inputs(q, k, v)) + of_lse)


@law
def test_merging_is_associative(backend: Runner, draw: Draw) -> None:
    a, b, c = results(draw, backend, 3)
    left = merged(backend, merged(backend, a, b), c)
    right = merged(backend, a, merged(backend, b, c))
    assert_close(left, right, 4)


@law
def test_merging_is_commutative_bit_for_bit(backend: Runner, draw: Draw) -> None:
    a, b = results(draw, backend, 2)
    for one, other in zip(merged(backend, a, b), merged(backend, b, a), strict=True):
        assert_same_bits(one, other)


@law
def test_a_part_that_saw_nothing_changes_no_bit(backend: Runner, draw: Draw) -> None:
    (a,) = results(draw, backend, 1)
    nothing = np.zeros_like(a[0]), np.full_like(a[1], -np.inf)
    for one, other in zip(merged(backend, a, nothing), a, strict=True):
        assert_same_bits(one, other)


@law
def test_a_part_twice_changes_nothing_but_lse(backend: Runner, draw: Draw) -> None:
    (a,) = results(draw, backend, 1)
    assert_close(merged(backend, a, a), (a[0], a[1] + np.float32(np.log(2))), 2)


@law
def test_layouts_are_the_same_merge(backend: Runner, draw: Draw) -> None:
    a, b = results(draw, backend, 2)
    swapped = [(out.transpose(0, 2, 1, 3), lse) for out, lse in (a, b)]
    out, lse = merged(backend, *swapped, layout="bnhd")
    expected = merged(backend, a, b)
    assert_same_bits(np.ascontiguousarray(out.transpose(0, 2, 1, 3)), np.ascontiguousarray(expected[0]))
    assert_same_bits(lse, expected[1])
