"""Does decode.cu read pages as the reference does, in a workspace and in a graph whose sequences grow? With CuPy."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
from kit.cases import BFLOAT16
from kit.compare import assert_agrees, assert_same_bits, relative_error, to_host
from kit.device import Allocations, Captured, poisoned_like
from kit.pages import Paged, in_pages

from distrattn_np import distr_attention, exact_attention, workspace_size

pytestmark = pytest.mark.gpu

# B, (H, H_kv), N, S, capacity, D, E, dtype
CASES = [
    (3, (8, 2), 1, 16, 4096, 128, 128, "float16"),
    (2, (4, 4), 8, 64, 1024, 128, 128, "float16"),
    (4, (12, 1), 3, 32, 512, 64, 64, "bfloat16"),
    (2, (4, 2), 2, 256, 2048, 256, 256, "float16"),
    (2, (4, 2), 5, 128, 768, 33, 7, "float16"),
]
TOLERANCE = {"float16": 2e-3, "bfloat16": 1.6e-2}
"""Of the length of a result: weights and results are rounded to the dtype."""


def draw(case: tuple[Any, ...], seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[int]]:
    B, (H, H_kv), N, S, capacity, D, E, name = case
    dtype = BFLOAT16 if name == "bfloat16" else np.dtype(name)
    rng = np.random.default_rng([seed, B, S, D])
    lengths = [capacity, 0, 1, capacity - S + 1][:B] if seed == 0 else rng.integers(0, capacity + 1, B).tolist()
    shapes = ((B, H, N, D), (B, H_kv, capacity, D), (B, H_kv, capacity, E))
    return *(rng.standard_normal(shape).astype(dtype) for shape in shapes), lengths


def paged(case: tuple[Any, ...], seed: int = 0) -> tuple[np.ndarray, Paged]:
    q, k, v, lengths = draw(case, seed)
    return q, in_pages(k, v, lengths, case[3], order=np.random.default_rng(seed))


def host(array: Any, layout: str) -> np.ndarray:
    found = to_host(array)
    return np.ascontiguousarray(found.swapaxes(1, 2) if layout == "bnhd" else found)


@pytest.mark.parametrize("layout", ["bhnd", "bnhd"])
@pytest.mark.parametrize("causal", [False, True, "top-left"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_call_agrees_with_the_definition(case: tuple[Any, ...], causal: Any, layout: str) -> None:
    for seed in (0, 1):
        q, pages = paged(case, seed)
        arrays, tables = pages.given(q, "cupy", layout)
        out, lse = exact_attention(*arrays, **tables, causal=causal, return_lse=True)
        wide = [np.nan_to_num(x.astype(np.float64)) for x in (q, pages.k, pages.v)]
        expected, expected_lse = exact_attention(*wide, **pages.tables, causal=causal, return_lse=True)
        assert relative_error(host(out, layout), expected) <= TOLERANCE[case[-1]]
        assert_agrees(to_host(lse), expected_lse, rtol=0, atol=1e-4, context=str(case))


def test_whole_pages_give_the_bits_of_plain_keys() -> None:
    """As many plain keys, which are cut into the same splits."""
    import cupy

    case = CASES[0]
    q, k, v, _ = draw(case)
    pages = in_pages(k, v, [case[4]] * case[0], case[3], order=np.random.default_rng(3))
    arrays, tables = pages.given(q, "cupy")
    expected = exact_attention(cupy.asarray(q), cupy.asarray(k), cupy.asarray(v), causal=True, return_lse=True)
    for one, other in zip(exact_attention(*arrays, **tables, causal=True, return_lse=True), expected, strict=True):
        assert_same_bits(one, other)


@pytest.mark.parametrize("case", CASES[:2], ids=str)
def test_a_step_in_a_workspace_allocates_nothing(case: tuple[Any, ...]) -> None:
    import cupy

    q, pages = paged(case)
    arrays, tables = pages.given(q, "cupy")
    expected, expected_lse = exact_attention(*arrays, **tables, causal=True, return_lse=True)
    out, lse = poisoned_like(expected), poisoned_like(expected_lse)
    size = workspace_size(*arrays, **tables, group_size=1, causal=True, out=out, lse=lse)
    memory = cupy.full(size + 4096, 0xFF, np.uint8)
    cupy.cuda.Device().synchronize()
    with Allocations() as allocations:
        exact_attention(*arrays, **tables, causal=True, out=out, lse=lse, workspace=memory[:size])
    assert allocations.sizes == []
    assert_same_bits(out, expected)
    assert_same_bits(lse, expected_lse)
    assert bool((memory[size:] == 0xFF).all())


def test_one_graph_for_all_lengths() -> None:
    """Lengths and table are read on the device: what was captured once serves a cache that grows."""
    import cupy

    case = CASES[0]
    q, pages = paged(case)
    arrays, tables = pages.given(q, "cupy")
    out, lse = (poisoned_like(x) for x in exact_attention(*arrays, **tables, causal=True, return_lse=True))
    memory = cupy.empty(workspace_size(*arrays, **tables, group_size=1, causal=True, out=out, lse=lse), np.uint8)
    graph = Captured(partial(exact_attention, *arrays, **tables, causal=True), out, lse, memory)
    for seed in (1, 2):
        q, pages = paged(case, seed)
        others, other_tables = pages.given(q, "cupy")
        expected = exact_attention(*others, **other_tables, causal=True, return_lse=True)
        for mine, theirs in zip(arrays, others, strict=True):
            mine[...] = theirs
        for name in ("page_table", "seqlens_k"):
            tables[name][...] = other_tables[name]
        graph.assert_gives(expected)


def test_arrays_of_other_kinds_reach_the_kernel() -> None:
    q, pages = paged(CASES[0])
    arrays, tables = pages.given(q, "cupy")
    expected = to_host(exact_attention(*arrays, **tables))
    for kind in ("numpy", "numba"):
        given, of_kind = pages.given(q, kind)
        assert_same_bits(to_host(exact_attention(*given, **of_kind, backend="cupy")), expected)


@pytest.mark.parametrize(
    ("changed", "options"),
    [
        ((1, (2, 1), 9, 16, 64, 16, 16, "float16"), {}),
        ((1, (2, 1), 1, 16, 64, 16, 16, "float32"), {}),
        ((1, (2, 1), 1, 16, 64, 16, 16, "float16"), {"window": (3, None)}),
        ((1, (2, 1), 1, 16, 64, 16, 16, "float16"), {"softcap": 2.0}),
        ((1, (2, 1), 1, 16, 64, 16, 16, "float16"), {"rank": 8}),
    ],
    ids=["queries", "float32", "window", "cap", "grouping"],
)
def test_what_no_kernel_covers_is_refused_by_name(changed: tuple[Any, ...], options: dict[str, Any]) -> None:
    q, pages = paged(changed)
    arrays, tables = pages.given(q, "cupy")
    rule = "page_table: the cupy backend takes at most 8 queries, exact or of GroupedPages, of float16 or bfloat16"
    function = distr_attention if "rank" in options else exact_attention
    with pytest.raises(
        NotImplementedError,
        match=f"^{rule}, without window and softcap, from compute capability 8.0 on, got cupy array",
    ):
        function(*arrays, **tables, **options)
