"""Properties of the call itself: options that only say where or how a result is written, and what is left alone."""

from __future__ import annotations

import dataclasses

import numpy as np
from hypothesis import strategies as st
from kit.backends import Runner
from kit.cases import in_memory
from kit.compare import assert_agrees, assert_same_bits, to_host
from kit.strategies import MAX_ENTRY, Draw, calls, law, rounding

import distrattn_np


@law
def test_two_calls_are_equal_bit_for_bit(backend: Runner, draw: Draw) -> None:
    case, inputs = draw(calls(backend.limits))
    first, second = (backend.distr(*inputs, **case.options) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert_same_bits(one, other, context=str(case))


@law
def test_out_and_return_lse_change_nothing(backend: Runner, draw: Draw) -> None:
    case, inputs = draw(calls(backend.limits, causal=st.sampled_from([False, True])))
    q, k, v = (backend.give(x) for x in inputs)
    options = case.options | {"backend": backend.backend}
    plain = distrattn_np.distr_attention(q, k, v, **options)
    with_lse, _ = distrattn_np.distr_attention(q, k, v, **options, return_lse=True)
    assert_same_bits(with_lse, plain, context=str(case))
    poison = np.full(plain.shape, np.nan, dtype=case.numpy_dtype)
    out = poison if backend.kind == "numpy" else backend.give(poison)
    assert distrattn_np.distr_attention(q, k, v, **options, out=out) is out
    assert_same_bits(out, plain, context=str(case))


@law
def test_inputs_are_left_as_they_were(backend: Runner, draw: Draw) -> None:
    case, inputs = draw(calls(backend.limits))
    given = [backend.give(x) for x in inputs]  # read-only for NumPy
    distrattn_np.distr_attention(*given, **case.options, backend=backend.backend)
    for after, before in zip(given, inputs, strict=True):
        assert_same_bits(to_host(after), before, context=str(case))


@law
def test_views_equal_contiguous_arrays_in_either_layout(backend: Runner, draw: Draw) -> None:
    case, inputs = draw(calls(backend.limits))
    straight = backend.distr(*inputs, **case.options)
    for layout in ("bhnd", "bnhd"):
        for memory in ("contiguous", "strided", "unaligned"):
            view = dataclasses.replace(case, layout=layout, memory=memory)
            out, lse = backend.distr(*(in_memory(x, view) for x in inputs), **view.options)
            out = out.transpose(0, 2, 1, 3) if layout == "bnhd" else out
            slack = rounding(case, inputs)  # a matrix product may add up strided rows in another order
            for got, want in zip((out, lse), straight, strict=True):
                assert_agrees(got, want, rtol=2**-21, atol=2 * slack * MAX_ENTRY, context=str(view), constant_ok=True)


@law
def test_out_may_be_a_view(backend: Runner, draw: Draw) -> None:
    case, inputs = draw(calls(backend.limits))
    expected, _ = backend.distr(*inputs, **case.options)
    for layout in ("bhnd", "bnhd"):
        view = dataclasses.replace(case, layout=layout, memory="strided")
        poison = in_memory(np.full_like(expected, np.nan), view)
        out = poison if backend.kind == "numpy" else backend.give(poison)
        given = [backend.give(in_memory(x, view)) for x in inputs]
        result = distrattn_np.distr_attention(*given, **view.options, backend=backend.backend, out=out)
        assert result is out
        host = to_host(out).transpose(0, 2, 1, 3) if layout == "bnhd" else to_host(out)
        slack = 2 * rounding(case, inputs) * MAX_ENTRY
        assert_agrees(host, expected, rtol=0, atol=slack, context=str(view), constant_ok=True)
