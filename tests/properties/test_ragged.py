"""Laws of packed sequences: each is a call of its own, wherever it lies."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from hypothesis import assume
from hypothesis import strategies as st
from kit.backends import Limits, Runner
from kit.cases import Case, Inputs, reference_maps, truth, unsafe_channels
from kit.compare import assert_agrees, assert_same_bits, to_host
from kit.strategies import Draw, arrays, assert_same_result, calls, law, rounding

import distrattn_np
from distrattn_np import reference


class Ragged(NamedTuple):
    """A call with packed sequences; ``case`` has their options and the sizes of the longest."""

    case: Case
    q: np.ndarray  # (N, H, D)
    k: np.ndarray  # (M, H_kv, D)
    v: np.ndarray  # (M, H_kv, E)
    edges_q: np.ndarray
    edges_k: np.ndarray

    @property
    def options(self) -> dict[str, Any]:
        return self.case.options | {"cu_seqlens_q": self.edges_q, "cu_seqlens_k": self.edges_k}

    @property
    def inputs(self) -> Inputs:
        return Inputs(self.q, self.k, self.v)

    def sequences(self) -> list[tuple[slice, slice]]:
        """Return the queries and the keys of every sequence."""
        return [(slice(*n), slice(*m)) for n, m in zip(pairwise(self.edges_q), pairwise(self.edges_k), strict=True)]

    def alone(self, rows: slice, keys: slice) -> Inputs:
        """Return one sequence in the "bnhd" layout, as views."""
        return Inputs(self.q[None, rows], self.k[None, keys], self.v[None, keys])

    def of(self, order: list[int]) -> Ragged:
        """Return the call with these of its sequences, in this order."""
        chosen = [self.sequences()[b] for b in order]
        rows, keys = ([np.arange(len(x))[own[side]] for own in chosen] for side, x in enumerate((self.q, self.k)))
        edges = (np.cumsum([0, *map(len, side)], dtype=self.edges_q.dtype) for side in (rows, keys))
        n, m = (np.concatenate([np.zeros(0, int), *side]) for side in (rows, keys))
        return Ragged(self.case, self.q[n], self.k[m], self.v[m], *edges)


@st.composite
def ragged_calls(draw: Draw, limits: Limits, *, hostile: bool = True, **fixed: Any) -> Ragged:
    """Draw a call; ``fixed`` pins fields of `Case`."""
    sides = st.sampled_from([None, (3, None), (None, 0), (0, 0), (30, 2)])
    options = {"window": sides, "softcap": st.sampled_from([0.0, 5.0])}
    case, _ = draw(calls(limits, **options | {"N": 1, "M": 1} | fixed))
    length = st.sampled_from([0, *limits.rows])
    lengths = draw(st.lists(st.tuples(length, length), max_size=4))
    integer = draw(st.sampled_from([np.int32, np.int64]))
    edges_q, edges_k = (np.cumsum([0, *(pair[side] for pair in lengths)], dtype=integer) for side in (0, 1))
    case = replace(case, N=int(np.diff(edges_q).max(initial=1)), M=int(np.diff(edges_k).max(initial=1)))
    N, M = int(edges_q[-1]), int(edges_k[-1])
    shapes = ((N, case.H, case.D), (M, case.H_kv, case.D), (M, case.H_kv, case.E))
    q, k, v = (draw(arrays(shape, case.numpy_dtype, hostile=hostile)) for shape in shapes)
    return Ragged(case, q, k, v, edges_q, edges_k)


def ragged_law(body: Any) -> Any:
    return law(body, ragged=True)


TOLD = ("ranks", "score_errors")


def assert_same_blocks(backend: Runner, actual: list[Any], expected: list[Any], call: Ragged) -> None:
    """Compare ranks and score errors of blocks; sums over rows may run in another order than in a call of its own."""
    actual, expected = ([np.ascontiguousarray(to_host(x)) for x in told] for told in (actual, expected))
    if backend.kind == "numpy":
        for name, one, other in zip(TOLD, actual, expected, strict=True):
            assert_same_bits(one, other, context=name)
    elif call.case.score_tol is None:  # else an error next to the bound decides about a rank
        assert_same_bits(actual[0], expected[0], context=TOLD[0])
        slack = rounding(call.case, call.inputs)
        assert_agrees(actual[1], expected[1], rtol=0.01, atol=slack, context=TOLD[1], constant_ok=True)


def assert_same(backend: Runner, actual: Any, expected: Any, call: Ragged) -> None:
    """Compare two ways to the same result: bit for bit where the tiles are the same, as on the NumPy backend."""
    if backend.kind == "numpy":
        for one, other in zip(actual, expected, strict=True):
            assert_same_bits(one, other, context=str(call.case))
    else:
        assert_same_result(actual, expected, call.case, 2 * rounding(call.case, call.inputs))


@ragged_law
def test_every_sequence_is_a_call_of_its_own(backend: Runner, draw: Draw) -> None:
    call = draw(ragged_calls(backend.limits))
    out, lse = backend.distr(*call.inputs, **call.options)
    assert out.shape == (*call.q.shape[:2], call.v.shape[2])
    assert lse.shape == call.q.shape[1::-1]
    for rows, keys in call.sequences():
        alone, lse_alone = backend.distr(*call.alone(rows, keys), **call.case.options | {"layout": "bnhd"})
        assert_same(backend, (out[rows], np.ascontiguousarray(lse[:, rows])), (alone[0], lse_alone[0]), call)


@ragged_law
def test_call_agrees_with_the_definition(backend: Runner, draw: Draw) -> None:
    call = draw(ragged_calls(backend.limits, hostile=False))
    grouped = []

    def attend(*one: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        problem = call.case.native_problem(Inputs(*one))
        grouped.append(problem.grouping)
        assume(not unsafe_channels(problem, *one[:2]))
        return truth(problem, *one, reference_maps(problem, *one[:2]), call.case.score_options)

    expected = reference.ragged_attention(*call.inputs, call.edges_q, call.edges_k, attend)
    # maps and least-squares gains are rounded to float32 for the definition
    in_float32 = replace(call.case, dtype="float32")
    slack = rounding(call.case, call.inputs) + (rounding(in_float32, call.inputs) if any(grouped) else 0)
    assert_same_result(backend.distr(*call.inputs, **call.options), expected, call.case, slack)


@ragged_law
def test_order_of_sequences_changes_their_places_alone(backend: Runner, draw: Draw) -> None:
    call = draw(ragged_calls(backend.limits))
    order = draw(st.permutations(range(len(call.edges_q) - 1)))
    moved = call.of(list(order))
    out, lse = backend.distr(*call.inputs, **call.options)
    out_moved, lse_moved = backend.distr(*moved.inputs, **moved.options)
    for place, b in enumerate(order):
        (rows, _), (new, _) = call.sequences()[b], moved.sequences()[place]
        same = (np.ascontiguousarray(x[own]) for x, own in ((out_moved, new), (lse_moved.T, new)))
        assert_same(backend, tuple(same), (out[rows], np.ascontiguousarray(lse.T[rows])), call)


@ragged_law
def test_empty_sequences_change_nothing(backend: Runner, draw: Draw) -> None:
    call = draw(ragged_calls(backend.limits))
    filled = call.of(
        [b for b, (rows, keys) in enumerate(call.sequences()) if rows.stop > rows.start or keys.stop > keys.start]
    )
    assert_same(
        backend, backend.distr(*call.inputs, **call.options), backend.distr(*filled.inputs, **filled.options), call
    )


@ragged_law
def test_other_sequences_are_never_read(backend: Runner, draw: Draw) -> None:
    call = draw(ragged_calls(backend.limits))
    assume(len(call.edges_q) > 2)
    b = draw(st.integers(0, len(call.edges_q) - 2))
    rows, keys = call.sequences()[b]
    changed = [np.full_like(x, np.nan) for x in call.inputs]
    for new, old, own in zip(changed, call.inputs, (rows, keys, keys), strict=True):
        new[own] = old[own]
    out, lse = backend.distr(*call.inputs, **call.options)
    out_alone, lse_alone = backend.distr(*changed, **call.options)
    actual, expected = ((x[rows], np.ascontiguousarray(y[:, rows])) for x, y in ((out_alone, lse_alone), (out, lse)))
    assert_same(backend, actual, expected, call)


@ragged_law
def test_equal_lengths_are_a_batch(backend: Runner, draw: Draw) -> None:
    case, inputs = draw(calls(backend.limits))
    packed = (x.swapaxes(1, 2).reshape(-1, x.shape[1], x.shape[3]) for x in inputs)
    edges = {f"cu_seqlens_{side}": np.arange(case.B + 1) * rows for side, rows in (("q", case.N), ("k", case.M))}
    out, lse = backend.distr(*packed, **case.options, **edges)
    expected, expected_lse = backend.distr(*inputs, **case.options)
    unpacked = out.reshape(case.B, case.N, case.H, -1).swapaxes(1, 2)
    lse = lse.reshape(case.H, case.B, case.N).swapaxes(0, 1)
    # rows lie further apart: a matrix product may add them up in another order
    assert_same_result((unpacked, lse), (expected, expected_lse), case, 2 * rounding(case, inputs))


@ragged_law
def test_full_rank_is_exact_attention(backend: Runner, draw: Draw) -> None:
    call = draw(ragged_calls(backend.limits, rank=None, score_tol=None, G=1))
    lengths = {"cu_seqlens_q": call.edges_q, "cu_seqlens_k": call.edges_k}
    exact = backend.exact(*call.inputs, **call.case.attention_options, **lengths)
    for one, other in zip(backend.distr(*call.inputs, **call.options), exact, strict=True):
        assert_same_bits(one, other, context=str(call.case))


@ragged_law
def test_strided_arrays_and_out_are_used_in_place(backend: Runner, draw: Draw) -> None:
    call = draw(ragged_calls(backend.limits))
    expected, _ = backend.distr(*call.inputs, **call.options)
    views = [np.repeat(x, 2, axis=1)[:, ::2] for x in call.inputs]
    poison = np.full((2, *expected.shape), np.nan, expected.dtype)[1]
    out = poison if backend.kind == "numpy" else backend.give(poison)
    given, options = (
        [backend.give(x) for x in views],
        {name: backend.give(x) if isinstance(x, np.ndarray) else x for name, x in call.options.items()},
    )
    assert distrattn_np.distr_attention(*given, **options, out=out, backend=backend.backend) is out
    slack = 2 * rounding(call.case, call.inputs)
    lse = np.zeros(1, np.float32)
    assert_same_result((to_host(out), lse), (expected, lse), call.case, slack)


@ragged_law
def test_info_has_the_blocks_of_all_sequences_side_by_side(backend: Runner, draw: Draw) -> None:
    call = draw(ragged_calls(backend.limits, method="subspace", hostile=backend.kind == "numpy"))
    options = {name: backend.give(x) if isinstance(x, np.ndarray) else x for name, x in call.options.items()}
    given = [backend.give(x) for x in call.inputs]
    _, info = distrattn_np.distr_attention(*given, **options, return_info=True, backend=backend.backend)
    if info.method == "exact":
        return
    told = {name: to_host(getattr(info, name)) for name in ("ranks", "score_errors")}
    first = 0
    for rows, keys in call.sequences():
        if rows.start == rows.stop:
            blocks = -(-(keys.stop - keys.start) // call.case.L) if call.case.by == "keys" else 0
            assert not told["ranks"][:, first : first + blocks].any()
        else:
            alone = [backend.give(x) for x in call.alone(rows, keys)]
            _, of_one = distrattn_np.distr_attention(
                *alone, **call.case.options | {"layout": "bnhd"}, return_info=True, backend=backend.backend
            )
            if of_one.ranks is None:  # a GPU makes no maps for a call without keys
                blocks = -(-(rows.stop - rows.start) // call.case.L) if call.case.by == "queries" else 0
            else:
                blocks = of_one.ranks.shape[2]
                parts = [getattr(info, name)[:, first : first + blocks] for name in TOLD]
                assert_same_blocks(backend, parts, [getattr(of_one, name)[0] for name in TOLD], call)
        first += blocks
    blocks = first
    if backend.kind != "numpy":  # who does not know the lengths has room for as many as there may be
        blocks = len(call.k if call.case.by == "keys" else call.q) // call.case.L + len(call.edges_q) - 1
        assert not any(to_host(getattr(info, name))[:, first:].any() for name in TOLD)
    heads = call.case.H_kv if call.case.by == "keys" else call.case.H
    assert info.ranks.shape == info.score_errors.shape == (heads, blocks)
