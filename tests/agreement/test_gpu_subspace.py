"""Do the subspace kernels make the maps of the reference, and compute what they say? Run on a GPU with CuPy.

Maps: ranks are equal, predicted errors close, and scores through them no further from exact ones than through the
reference's; their numbers may differ, as only products of the two maps count. Given the maps, 16 bits: no worse than
twice the error of plain NumPy in the same precision, against float64. float32: 1e-5 relative. Not checked here: that
the approximation is near exact attention, and speed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from distrattn_np.reference.distr_attention import rows_that_meet
from kit.agreement import assert_computes, poison, to_bhnd
from kit.backends import options_to_kind, to_kind
from kit.cases import Case, Inputs, dense_maps, in_memory, make_inputs, reference_maps
from kit.compare import assert_agrees, assert_same_bits, to_host
from kit.lists import (
    SUBSPACE,
    SUBSPACE_FEATURES,
    SUBSPACE_HEADS,
    SUBSPACE_OPTIONS,
    SUBSPACE_SCORE_OPTIONS,
    SUBSPACE_SMALL,
    SUBSPACE_WIDTHS,
)
from kit.strategies import SPACING, largest

from distrattn_np import backends, distr_attention
from distrattn_np.problem import Problem, SubspaceMaps, block_edges

pytestmark = pytest.mark.gpu

PREDICTION = {"float16": 4e-3, "bfloat16": 1.6e-2, "float32": 4e-3, "float64": 1e-6}
"""Of the root mean square of all scores: an error is the root of a difference of their squares.

Those are of the precision of the maps; with 16 bits, centred keys are rounded too.
"""


def on_device(case: Case, array: np.ndarray) -> Any:
    """Return an array in the memory of the case, as backends see it."""
    return to_bhnd(case, to_kind(in_memory(array, case), "cupy"))


def on_host(maps: SubspaceMaps | None) -> SubspaceMaps | None:
    return None if maps is None else SubspaceMaps(*(to_host(getattr(maps, name)) for name in SubspaceMaps.__slots__))


def own_maps(case: Case, inputs: Inputs) -> SubspaceMaps | None:
    """Return the maps that the backend makes for the arrays of the case."""
    problem = case.native_problem(inputs)
    return backends.load_by_name("cupy").group_maps(problem, on_device(case, inputs.q), on_device(case, inputs.k))


def without_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distrattn_np.backends.cupy_backend.hopper_is_usable", lambda: False)


def assert_call_computes_its_maps(case: Case) -> None:
    inputs = make_inputs(case)
    given = [to_kind(in_memory(x, case), "cupy") for x in inputs]
    options = options_to_kind(case.options, "cupy")
    results = []
    for _ in range(2):
        out = to_kind(poison(case), "cupy")
        result, lse, info = distr_attention(
            *given, **options, backend="cupy", out=out, return_lse=True, return_info=True
        )
        assert result is out
        results.append((to_host(out), to_host(lse)))
    for first, second in zip(*results, strict=True):
        assert_same_bits(second, first, context=f"second call of {case}")
    for after, before in zip(given, inputs, strict=True):
        assert_same_bits(np.ascontiguousarray(to_bhnd(case, to_host(after))), before, context=f"inputs of {case}")
    maps = on_host(own_maps(case, inputs))
    if maps is not None:
        assert_same_bits(to_host(info.ranks), maps.ranks, context=f"ranks of {case}")
        assert_same_bits(to_host(info.score_errors), maps.score_errors, context=f"score errors of {case}")
    out, lse = results[0]
    assert_computes(case, inputs, maps, to_bhnd(case, out), lse)


@pytest.mark.parametrize("case", [*SUBSPACE, *SUBSPACE_SCORE_OPTIONS], ids=str)
def test_call_computes_its_maps(case: Case) -> None:
    assert_call_computes_its_maps(case)


@pytest.mark.parametrize("case", [case for case in SUBSPACE if case.dtype in ("float16", "bfloat16")], ids=str)
def test_portable_forward_computes_its_maps(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """On Hopper too: the forward that all other tensor cores run."""
    without_hopper(monkeypatch)
    assert_call_computes_its_maps(case)


@pytest.mark.parametrize("case", [case for case in SUBSPACE_FEATURES if case.dtype in ("float16", "bfloat16")], ids=str)
def test_call_without_tensor_cores_computes_its_maps(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on devices before sm_80."""
    monkeypatch.setattr("distrattn_np.backends.cupy_backend.capability", lambda: 75)
    assert_call_computes_its_maps(case)


@pytest.mark.parametrize("on_hopper", [True, False])
@pytest.mark.parametrize("case", SUBSPACE_SMALL, ids=str)
def test_small_case(case: Case, on_hopper: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the compute-sanitizer is run over (CONTRIBUTING.md)."""
    if not on_hopper:
        without_hopper(monkeypatch)
    assert_call_computes_its_maps(case)


@pytest.mark.parametrize("on_hopper", [True, False])
@pytest.mark.parametrize("case", [*SUBSPACE_FEATURES, *SUBSPACE_HEADS], ids=str)
def test_maps_of_the_reference_give_the_same_attention(
    case: Case, on_hopper: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The arithmetic alone: the reference's maps go into the backend, and into the truth."""
    if not on_hopper:
        without_hopper(monkeypatch)
    inputs = make_inputs(case)
    problem = case.native_problem(inputs)
    maps = reference_maps(problem, inputs.q, inputs.k)
    given = SubspaceMaps(*(to_kind(getattr(maps, name), "cupy") for name in SubspaceMaps.__slots__))
    Q, K, V = (to_kind(x, "cupy") for x in inputs)
    O = to_kind(np.full((case.B, case.H, case.N, case.E), np.nan, case.numpy_dtype), "cupy")
    lse = to_kind(np.full((case.B, case.H, case.N), np.nan, np.float32), "cupy")
    backends.load_by_name("cupy").attend(problem, Q, K, V, O, lse, given)
    assert_computes(case, inputs, maps, to_host(O), to_host(lse))


@pytest.mark.parametrize("case", [*SUBSPACE_FEATURES, *SUBSPACE_OPTIONS, *SUBSPACE_HEADS, *SUBSPACE_WIDTHS], ids=str)
def test_maps_are_as_good_as_the_reference(case: Case) -> None:
    inputs = make_inputs(case)
    problem = case.native_problem(inputs)
    maps, expected = on_host(own_maps(case, inputs)), reference_maps(problem, inputs.q, inputs.k)
    for name in SubspaceMaps.__slots__:
        assert np.isfinite(getattr(maps, name)).all(), name
    assert_same_bits(maps.ranks, expected.ranks.astype(np.int32), context=str(case))
    sums = np.float64 if case.dtype == "float64" else np.float32
    for name in ("sampling", "fusion", "key_mean", "score_errors"):
        assert getattr(maps, name).dtype == sums, name
    # the rounding of the result, and of its sum
    atol = SPACING[case.dtype] * float(np.abs(expected.key_mean).max()) + SPACING[sums.__name__] * largest(inputs.k)
    assert_agrees(maps.key_mean, expected.key_mean, rtol=0, atol=atol, context=f"mean of {case}", check_dtype=False)

    scores, own, usual = ([], [], [])
    for exact, one, other in score_blocks(problem, inputs, maps, expected):
        scores.append(np.square(exact).mean())
        own.append(np.sqrt(np.square(one - exact).mean()))
        usual.append(np.sqrt(np.square(other - exact).mean()))
    atol = PREDICTION[case.dtype] * float(np.sqrt(np.mean(scores)))
    assert_agrees(
        maps.score_errors,
        expected.score_errors,
        rtol=1e-2 if case.dtype == "bfloat16" else 1e-3,
        atol=atol,
        context=f"predicted errors of {case}",
        check_dtype=False,
        constant_ok=True,
    )
    assert_agrees(
        np.maximum(own, usual),
        np.array(usual),
        rtol=1e-2,
        atol=atol,
        context=f"errors of the scores of {case}",
        constant_ok=True,
    )


def score_blocks(problem: Problem, inputs: Inputs, maps: SubspaceMaps, expected: SubspaceMaps) -> Iterator[list[Any]]:
    """Yield the scores of every block with the rows that meet it: exact, and through two sets of maps; float64."""
    q, k = (x.astype(np.float64) for x in (inputs.q, inputs.k))
    k = k - expected.key_mean[:, :, None]
    by_keys, shared = problem.grouping.by == "keys", problem.heads_per_kv_head
    for b, h in np.ndindex(problem.batch, problem.grouped_heads):
        grouped, others = (k[b, h], q[b, h * shared : (h + 1) * shared]) if by_keys else (q[b, h], k[b, [h // shared]])
        for c, (start, stop) in enumerate(block_edges(problem.grouped_rows, problem.grouping.block_size)):
            first, last = rows_that_meet(
                start,
                stop,
                group_by=problem.grouping.by,
                N=problem.queries,
                M=problem.keys,
                causal_offset=problem.meeting_offset,
            )
            if first == last:
                continue
            X, Y = grouped[start:stop], others[:, first:last].reshape(-1, problem.width)
            pairs = [dense_maps(problem, one, b, h, c) for one in (maps, expected)]
            yield [problem.scale * S for S in (X @ Y.T, *((X @ W) @ (Y @ Z).T for W, Z in pairs))]


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_more_blocks_than_multiprocessors_change_no_bit(dtype: str) -> None:
    """Then those of wide heads have half as many threads each."""
    import cupy

    heads = cupy.cuda.Device().attributes["MultiProcessorCount"]
    rng = np.random.default_rng(0)
    q, k, v = (to_kind(rng.standard_normal((1, heads, 32, 160)).astype(dtype), "cupy") for _ in range(3))
    options: dict[str, Any] = {"group_size": 2, "block_size": 16, "return_info": True}
    found, info = distr_attention(q, k, v, **options)
    alone, info_alone = distr_attention(*(x[:, :1] for x in (q, k, v)), **options)
    assert_same_bits(to_host(found[:, :1]), to_host(alone))
    assert_same_bits(to_host(info.score_errors[:, :1]), to_host(info_alone.score_errors))
