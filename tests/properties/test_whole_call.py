"""The whole option space of the call on the NumPy backend: what is legal is the definition, what is not is refused.

Legal calls combine everything: both functions, batches, packed sequences and grouped keys, every option given or left
out, views in either layout, results with or without lse and info, in new memory or in ``out=`` and ``lse=``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import assume, event, given
from hypothesis import strategies as st
from kit.backends import LIMITS
from kit.cases import Case, Inputs, in_memory, problem_of, reference_maps, truth, unsafe_channels
from kit.compare import assert_same_bits
from kit.strategies import Draw, assert_same_result, calls, rounding
from properties.test_ragged import ragged_calls

from distrattn_np import distr_attention, exact_attention, group_keys, reference
from distrattn_np.grouped_keys import GroupedKeys
from distrattn_np.problem import AttentionInfo

SMALL = replace(
    LIMITS["numpy"],
    batches=(0, 1, 2),
    heads=((1, 1), (2, 1), (6, 2), (0, 0)),
    rows=(0, 1, 2, 5, 16, 33, 65),
    widths=(1, 2, 3, 8, 16, 33),
)
L = st.sampled_from([1, 2, 5, 16, 33, 1024])

Results = tuple[np.ndarray, np.ndarray]


class Call(NamedTuple):
    """A legal call."""

    function: Callable[..., Any]
    arguments: dict[str, Any]
    case: Case
    expected: Callable[[], Results]
    """Result and lse in the layout of the call, in float64."""
    shape: tuple[int, ...]
    """Of the result."""
    slack: float
    """What rounding may do to the scores, in nats."""

    @property
    def lse_shape(self) -> tuple[int, ...]:
        """Of the log-sum-exp: (B, H, N), or (H, N) of packed sequences."""
        rows = self.arguments["q"].shape[:-1]
        is_bhnd = len(rows) == 3 and self.case.layout == "bhnd"
        return rows if is_bhnd else (*rows[:-2], rows[-1], rows[-2])

    def __repr__(self) -> str:
        shown = {name: x for name, x in self.arguments.items() if not isinstance(x, np.ndarray)}
        return f"{self.function.__name__} of {self.case}: {shown}"


def slack_of(case: Case, inputs: Inputs, *, is_grouped: bool) -> float:
    # maps and least-squares gains are rounded to float32 for the definition
    return rounding(case, inputs) + (rounding(replace(case, dtype="float32"), inputs) if is_grouped else 0)


def to_layout(case: Case, results: Results) -> Results:
    out, lse = results
    return (out.swapaxes(1, 2) if case.layout == "bnhd" else out), lse


@st.composite
def plain_calls(draw: Draw) -> Call:
    case, inputs = draw(calls(SMALL, score_options=True, hostile=False, L=L))
    memory = draw(st.sampled_from(["contiguous", "strided", "unaligned"]))
    case = replace(case, layout=draw(st.sampled_from(["bhnd", "bnhd"])), memory=memory)
    function = draw(st.sampled_from([distr_attention, exact_attention]))
    options = case.options if function is distr_attention else case.attention_options
    native = {"grouping": None} if function is exact_attention else {}
    problem = problem_of(*inputs, **case.options | {"layout": "bhnd"})
    problem = replace(problem, **native)
    assume(not unsafe_channels(problem, inputs.q, inputs.k))

    def expected() -> Results:
        maps = reference_maps(problem, inputs.q, inputs.k)
        return to_layout(case, truth(problem, *inputs, maps, case.score_options))

    arrays = dict(zip("qkv", (in_memory(x, case) for x in inputs), strict=True))
    shape = (case.B, case.N, case.H, case.E) if case.layout == "bnhd" else (case.B, case.H, case.N, case.E)
    slack = slack_of(case, inputs, is_grouped=problem.grouping is not None)
    return Call(function, arrays | options, case, expected, shape, slack)


@st.composite
def packed_calls(draw: Draw) -> Call:
    call = draw(ragged_calls(SMALL, hostile=False, L=L))
    case = call.case
    function = draw(st.sampled_from([distr_attention, exact_attention]))
    options = call.options
    if function is exact_attention:
        lengths = {name: options[name] for name in ("cu_seqlens_q", "cu_seqlens_k")}
        options = case.attention_options | lengths

    def attend(*one: np.ndarray) -> Results:
        problem = case.native_problem(Inputs(*one))
        if function is exact_attention:
            problem = replace(problem, grouping=None)
        assume(not unsafe_channels(problem, *one[:2]))
        return truth(problem, *one, reference_maps(problem, *one[:2]), case.score_options)

    def expected() -> Results:
        return reference.ragged_attention(*call.inputs, call.edges_q, call.edges_k, attend)

    shape = (len(call.q), case.H, case.E)
    slack = slack_of(case, call.inputs, is_grouped=function is distr_attention)
    return Call(function, dict(zip("qkv", call.inputs, strict=True)) | options, case, expected, shape, slack)


@st.composite
def grouped_keys_calls(draw: Draw) -> Call:
    # ranks that each block chooses may hang on rounding
    fixed = {"method": "subspace", "by": "keys", "score_tol": None, "L": L}
    case, inputs = draw(calls(SMALL, score_options=True, hostile=False, **fixed))
    case = replace(case, layout=draw(st.sampled_from(["bhnd", "bnhd"])))
    rank = case.rank or case.D // case.G
    known = inputs.q if case.N and case.H and draw(st.booleans()) else None
    options = {"rank": rank, "block_size": case.L, "refine": case.refine, "scale": case.scale}
    cut = draw(st.integers(0, case.M))
    first, rest = (in_memory(x, case) for x in (inputs.k[:, :, :cut], inputs.k[:, :, cut:]))
    keys = group_keys(first, None if known is None else in_memory(known, case), layout=case.layout, **options)
    keys.append(rest)

    def expected() -> Results:
        made = {"scale": keys.scale, "block_size": case.L if rank < case.D else case.M + 1}
        maps = reference.make_key_maps(inputs.k, known, rank=rank, refine=case.refine, **made)
        offset = {False: None, True: case.M - case.N, "top-left": 0}[case.causal]
        options = {"causal_offset": offset, "options": case.score_options}
        return to_layout(case, reference.grouped_keys_attention(*inputs, maps, **made, **options))

    arguments = case.attention_options | {"q": in_memory(inputs.q, case), "k": keys, "v": in_memory(inputs.v, case)}
    shape = (case.B, case.N, case.H, case.E) if case.layout == "bnhd" else (case.B, case.H, case.N, case.E)
    # blocks keep maps, means and sampled keys in the dtype of the keys
    return Call(distr_attention, arguments, case, expected, shape, 4 * rounding(case, inputs))


DEFAULTS = {
    "method": "subspace",
    "refine": 1,
    "fusion": "sum",
    "seed": 0,
    "causal": False,
    "scale": None,
    "layout": "bhnd",
}
whole_calls = st.one_of(plain_calls(), packed_calls(), grouped_keys_calls())


@st.composite
def with_results(draw: Draw) -> Call:
    """Draw a call that leaves out some of what is the default, and says where the results go and which it wants."""
    call = draw(whole_calls)
    arguments = dict(call.arguments)
    for name, value in DEFAULTS.items():
        if name in arguments and arguments[name] == value and draw(st.booleans()):
            del arguments[name]
    # a default block is longer, and so is all of one block
    if arguments.get("block_size", 0) > max(SMALL.rows) and draw(st.booleans()):
        del arguments["block_size"]
    if draw(st.booleans()):
        arguments["backend"] = draw(st.sampled_from([None, "numpy"]))
    if draw(st.booleans()):
        memory = np.full((*call.shape[:-1], call.shape[-1] + 3), np.nan).astype(call.case.numpy_dtype)
        arguments["out"] = memory[..., 1:-2] if draw(st.booleans()) else np.ascontiguousarray(memory[..., :-3])
    if draw(st.booleans()):
        arguments["lse"] = np.full(call.lse_shape, np.nan, np.float32)
    flags = ["return_lse", "return_info"] if call.function is distr_attention else ["return_lse"]
    arguments |= {name: draw(st.booleans()) for name in flags}
    return call._replace(arguments=arguments)


def snapshot(arguments: dict[str, Any]) -> dict[str, np.ndarray]:
    """Return copies of all arrays but those of objects, those inside grouped keys too."""
    arrays = {name: x.copy() for name, x in arguments.items() if isinstance(x, np.ndarray) and x.dtype != object}
    keys = arguments.get("k")
    return arrays | ({"tail": keys.tail.copy()} if isinstance(keys, GroupedKeys) else {})


def assert_left_alone(before: dict[str, np.ndarray], arguments: dict[str, Any], *, but: tuple[str, ...] = ()) -> None:
    after = snapshot(arguments)
    for name in before.keys() - set(but):
        assert_same_bits(after[name], before[name], context=name)


@given(with_results())
def test_every_legal_call_is_the_definition(call: Call) -> None:
    arguments = call.arguments
    form = "grouped keys" if isinstance(arguments["k"], GroupedKeys) else f"{arguments['q'].ndim} axes"
    event(f"{call.function.__name__} of {form}")
    expected = call.expected()
    before = snapshot(arguments)
    results = call.function(**arguments)
    assert_left_alone(before, arguments, but=("out", "lse"))
    wanted = [arguments.get("return_lse", False), arguments.get("return_info", False)]
    assert isinstance(results, tuple) == any(wanted)
    out, *others = results if any(wanted) else (results,)
    assert out.dtype == arguments["q"].dtype
    if "out" in arguments:
        assert out is arguments["out"]
    if arguments.get("return_info"):
        assert isinstance(others.pop(), AttentionInfo)
    lse = others.pop() if wanted[0] else arguments.get("lse", expected[1].astype(np.float32))
    if "lse" in arguments:
        assert lse is arguments["lse"]
    assert lse.dtype == np.float32
    assert_same_result((out, lse), expected, call.case, call.slack)


def wrong_arrays(draw: Draw, name: str, array: np.ndarray) -> Any:
    """Return something that cannot stand in the place of an array of the call."""
    other = np.float32 if array.dtype == np.float64 else np.float64
    wrong = [
        None if name in "qkv" else 1.5,
        array.tolist() or [1.0],
        array[..., 0],
        array[None],
        *(np.zeros(array.shape, dtype) for dtype in (np.int16, np.complex64, np.bool_, "S1", object, ">f4", other)),
        np.ma.masked_array(np.zeros(array.shape, np.float32)),
    ]
    if name in ("k", "out"):
        wrong.append(np.repeat(array, 2, axis=-1))
    return wrong[draw(st.integers(0, len(wrong) - 1))]


no_count = st.sampled_from([-1, 1.5, "1", True, np.True_, (1,), 1j])
no_number = st.sampled_from([float("nan"), float("inf"), -float("inf"), 10**400, "1", True, (1.0,), 1j])
no_name = st.sampled_from(["", "Keys", "sum ", 0, True, ("bhnd",), b"lsh", 1.0])
WRONG = {
    "scale": no_number,
    "softcap": st.one_of(no_number, st.sampled_from([-1.0, None, 1e-39])),
    "causal": st.sampled_from([None, 1, 0, "lower", 1.0, ("top-left",)]),
    "window": st.sampled_from([3, (3,), (1, 2, 3), (-1, None), (1.0, 1), "11", {1, 2}, (None, True)]),
    "layout": st.one_of(no_name, st.sampled_from([None, "nhd", "bnhD"])),
    "backend": no_name,
    "mask": st.sampled_from([True, "causal", np.ones(1), np.ones((1, 1, 1, 1, 1), bool), [[True]]]),
    "bias": st.sampled_from([0.0, np.ones(1, bool), np.ones((1, 1, 1, 1, 1), np.float32), np.ones(1, np.int32)]),
    "cu_seqlens_q": st.sampled_from([0, [0, 1], np.zeros((1, 1), np.int32), np.zeros(2), np.array([0, 2, 1])]),
    "cu_seqlens_k": st.sampled_from([True, (0, 1), np.zeros(0, np.int32), np.zeros(2, np.uint64), np.array([1, 1])]),
}
WRONG |= {
    "page_table": st.sampled_from([0, [[0]], np.zeros((1, 1)), np.zeros((1, 1), np.int32)]),  # without lengths, all
    "seqlens_k": st.sampled_from([1, (1,), np.zeros(1, np.int64), np.zeros(1, np.int32)]),
    "lse": st.sampled_from([1.0, [0.0], np.zeros(1, np.float32), np.zeros((1, 1, 1)), np.zeros((1,) * 4, np.float32)]),
    "workspace": st.sampled_from([1 << 20, b"", np.zeros(1 << 20, np.uint8)]),  # the host has none
    "stream": st.sampled_from([0, 7, -1, 1.5, "7", True, np.zeros(1)]),
}
WRONG_GROUPING = {
    "method": st.one_of(no_name, st.none()),
    "group_size": st.one_of(no_count, st.sampled_from([0, 1000, 10**30])),
    "rank": st.one_of(no_count, st.sampled_from([0, 34, 10**30])),
    "score_tol": st.one_of(no_number, st.sampled_from([0, -1e-3])),
    "refine": st.one_of(no_count, st.none()),
    "fusion": no_name,
    "group_by": no_name,
    "block_size": st.one_of(no_count, st.just(0)),
    "seed": st.one_of(no_count, st.none()),
}


@given(with_results(), st.data())
def test_every_call_with_an_illegal_argument_is_refused(call: Call, data: st.DataObject) -> None:
    arguments = dict(call.arguments)
    pool = WRONG | (WRONG_GROUPING if call.function is distr_attention else {})
    named = [name for name in ("q", "k", "v", "out") if isinstance(arguments.get(name), np.ndarray)]
    if isinstance(arguments["k"], GroupedKeys):
        pool = {name: values for name, values in pool.items() if name != "seed"}  # has no part in such a call
    name = data.draw(st.sampled_from([*named, *pool]))
    if name in named:
        arguments[name] = wrong_arrays(data.draw, name, arguments[name])
    else:
        arguments[name] = data.draw(pool[name])
    event(f"{name} of {call.function.__name__}")
    before = snapshot(arguments)
    names = "|".join({*arguments, "q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "page_table", "seqlens_k"})
    with pytest.raises((TypeError, ValueError), match=rf"(?s)^({names}): .+, got .+$"):
        call.function(**arguments)
    assert_left_alone(before, arguments)
