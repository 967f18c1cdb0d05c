"""Do the CUDA kernels compute what the reference computes? Run on a GPU with CuPy.

16 bits: no worse than twice the error of plain NumPy in the same precision, against float64. float32: 1e-5 relative.
Not checked here: that the approximation is near exact attention, and speed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from kit.agreement import assert_computes, poison, to_bhnd
from kit.backends import options_to_kind, to_kind
from kit.cases import Case, in_memory, make_inputs, reference_maps
from kit.compare import assert_same_bits, to_host
from kit.device import told_of_launches
from kit.lists import ALL, FEATURES, FEW, FEW_QUERIES, FEW_SCORE_OPTIONS, SCORE_OPTIONS, SMALL

from distrattn_np import backends, distr_attention
from distrattn_np.problem import GroupMaps

pytestmark = pytest.mark.gpu


def assert_call_computes(case: Case, kind: Any, backend: str) -> None:
    inputs = make_inputs(case)
    given = [to_kind(in_memory(x, case), kind) for x in inputs]
    options = options_to_kind(case.options, kind)
    results = []
    for _ in range(2):
        out = to_kind(poison(case), kind)
        result, lse = distr_attention(*given, **options, backend=backend, out=out, return_lse=True)
        assert result is out
        results.append((to_host(out), to_host(lse)))
    for first, second in zip(*results, strict=True):
        assert_same_bits(second, first, context=f"second call of {case}")
    for after, before in zip(given, inputs, strict=True):
        assert_same_bits(np.ascontiguousarray(to_bhnd(case, to_host(after))), before, context=f"inputs of {case}")
    out, lse = results[0]
    maps = reference_maps(case.native_problem(inputs), inputs.q, inputs.k)
    assert_computes(case, inputs, maps, to_bhnd(case, out), lse, own_gains=maps is not None and maps.gains is not None)


@pytest.mark.parametrize("case", [*ALL, *SCORE_OPTIONS], ids=str)
def test_cupy_call_computes_the_reference(case: Case) -> None:
    assert_call_computes(case, "cupy", "cupy")


@pytest.mark.parametrize("case", FEW_QUERIES, ids=str)
def test_keys_of_few_queries_are_split_on_hopper(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    from distrattn_np.backends.cupy_backend import hopper_is_usable

    launched = told_of_launches(monkeypatch)
    assert_call_computes(case, "cupy", "cupy")
    assert set(launched) == ({"forward_sm90", "merge_splits"} if hopper_is_usable() else {"forward_mma"})


@pytest.mark.parametrize("case", [case for case in ALL if case.dtype in ("float16", "bfloat16")], ids=str)
def test_portable_forward_computes_the_reference(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """On Hopper too: the forward that all other tensor cores run."""
    monkeypatch.setattr("distrattn_np.backends.cupy_backend.hopper_is_usable", lambda: False)
    assert_call_computes(case, "cupy", "cupy")


@pytest.mark.parametrize("on_hopper", [True, False])
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_small_case(case: Case, on_hopper: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the compute-sanitizer is run over (CONTRIBUTING.md)."""
    if not on_hopper:
        monkeypatch.setattr("distrattn_np.backends.cupy_backend.hopper_is_usable", lambda: False)
    assert_call_computes(case, "cupy", "cupy")


@pytest.mark.parametrize("case", [*FEW, *FEW_SCORE_OPTIONS], ids=str)
def test_numba_call_computes_the_reference(case: Case) -> None:
    assert_call_computes(case, "numba", "numba")


@pytest.mark.parametrize(
    ("name", "case"),
    [*(("cupy", case) for case in FEATURES), *(("numba", case) for case in FEW if case.M)],
    ids=lambda value: str(value),
)
def test_same_maps_give_the_same_attention(name: str, case: Case) -> None:
    """The arithmetic alone: the reference's maps go into every backend, and into the truth."""
    inputs = make_inputs(case)
    problem = case.native_problem(inputs)
    backend = backends.load_by_name(name)
    Q, K, V = (to_kind(x, name) for x in inputs)
    maps = reference_maps(problem, inputs.q, inputs.k)
    given = None
    if maps is not None:
        own = backend.group_maps(problem, Q, K)
        gains = None if maps.gains is None else to_kind(maps.gains.astype(own.gains.dtype), name)
        given = GroupMaps(to_kind(maps.channels, name), gains)
    O = to_kind(np.full((case.B, case.H, case.N, case.E), np.nan, case.numpy_dtype), name)
    lse = to_kind(np.full((case.B, case.H, case.N), np.nan, np.float32), name)
    backend.attend(problem, Q, K, V, O, lse, given)
    assert_computes(case, inputs, maps, to_host(O), to_host(lse))


@pytest.mark.parametrize("options", [{"group_size": 1}, {"rank": 30, "block_size": 64}], ids=["exact", "subspace"])
def test_heads_that_are_dealt_to_several_thread_blocks_do_not_differ(options: dict[str, Any]) -> None:
    """Causal, 5120 heads of two tiles: more than each multiprocessor's thread block has rounds for."""
    import cupy

    one = cupy.random.default_rng(0).standard_normal((3, 1, 1, 200, 64), dtype="f4").astype("f2")
    expected = distr_attention(*one, causal=True, **options)
    many = [cupy.ascontiguousarray(cupy.broadcast_to(x, (64, 80, 200, 64))) for x in one]
    out = distr_attention(*many, causal=True, **options, out=cupy.full_like(many[0], cupy.nan))
    assert bool((out == expected).all())
