"""Are pages read as the reference reads them, by decode.cu and packed, in a workspace and in a graph? With CuPy."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
from kit.backends import options_to_kind, to_kind
from kit.cases import BFLOAT16
from kit.compare import assert_agrees, assert_same_bits, relative_error, to_host
from kit.device import Captured, assert_stays_in_workspace, poisoned_like, write_late
from kit.pages import Paged, in_pages, unpacked

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
EXACT: dict[str, Any] = {"group_size": 1, "causal": True}
PACKED: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
    ((3, (8, 2), 20, 16, 512, 128, 128, "float16"), EXACT),
    ((2, (4, 4), 3, 128, 512, 80, 80, "float16"), {"group_size": 1, "window": (100, 3), "softcap": 5.0}),
    ((3, (4, 2), 2, 64, 256, 33, 7, "float32"), EXACT),
    ((2, (4, 2), 130, 32, 256, 64, 64, "bfloat16"), {"rank": 30, "block_size": 128, "causal": "top-left"}),
    ((3, (2, 1), 17, 256, 512, 64, 64, "float16"), {"method": "lsh", "group_size": 2, "block_size": 128}),
    ((2, (2, 2), 5, 16, 128, 40, 24, "float64"), {"rank": 8, "block_size": 32, "group_by": "queries", "causal": True}),
]
"""What decode.cu does not take, with options."""
TOLERANCE = {"float16": 2e-3, "bfloat16": 1.6e-2, "float32": 1e-6, "float64": 1e-13}
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


@pytest.mark.parametrize(("case", "options"), PACKED, ids=str)
def test_other_calls_give_the_bits_of_packed_sequences(
    case: tuple[Any, ...], options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from distrattn_np.backends import cupy_device

    launched: list[str] = []
    launch = cupy_device.CupyWork.launch

    def noting(self: Any, stem: str, *others: Any) -> None:
        launched.append(stem)
        launch(self, stem, *others)

    monkeypatch.setattr(cupy_device.CupyWork, "launch", noting)
    options = options | {"return_lse": True}
    q, pages = paged(case)
    arrays, edges = pages.packed(q)
    given = [to_kind(x, "cupy") for x in arrays]
    packed = distr_attention(*given, **options_to_kind(edges, "cupy"), **options)
    expected = unpacked(*map(to_host, packed), case[0])
    for layout in ("bhnd", "bnhd"):
        arrays, tables = pages.given(q, "cupy", layout)
        launched.clear()
        out, lse = distr_attention(*arrays, **tables, **options)
        assert_same_bits(host(out, layout), expected[0])
        assert_same_bits(to_host(lse), expected[1])
        assert "decode" not in launched
        # keys and values; queries, results and their lse where these do not follow one another
        assert launched.count("pack_rows") == 2 + (3 if layout == "bhnd" else 1)
    if options.get("group_size") == 1 and "method" not in options:
        wide = [np.nan_to_num(x.astype(np.float64)) for x in (q, pages.k, pages.v)]
        truth, true_lse = distr_attention(*wide, **pages.tables, **options)
        assert relative_error(expected[0], truth) <= TOLERANCE[case[-1]]
        assert_agrees(expected[1], true_lse, rtol=0, atol=1e-4, context=str(case))


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


@pytest.mark.parametrize("layout", ["bhnd", "bnhd"])
@pytest.mark.parametrize(("case", "options"), [(CASES[0], EXACT), (CASES[1], EXACT), *PACKED[:4]], ids=str)
def test_a_call_in_a_workspace_allocates_nothing(case: tuple[Any, ...], options: dict[str, Any], layout: str) -> None:

    q, pages = paged(case)
    arrays, tables = pages.given(q, "cupy", layout)
    expected, expected_lse = distr_attention(*arrays, **tables, **options, return_lse=True)
    out, lse = poisoned_like(expected), poisoned_like(expected_lse)
    size = workspace_size(*arrays, **tables, **options, out=out, lse=lse)
    call = partial(distr_attention, *arrays, **tables, **options)
    assert_stays_in_workspace(call, out, lse, size, (expected, expected_lse))


@pytest.mark.parametrize(("case", "options"), [(CASES[0], EXACT), PACKED[0], PACKED[3]], ids=str)
def test_one_graph_for_all_lengths(case: tuple[Any, ...], options: dict[str, Any]) -> None:
    """Lengths and table are read on the device: what was captured once serves a cache that grows."""
    import cupy

    q, pages = paged(case)
    arrays, tables = pages.given(q, "cupy")
    out, lse = (poisoned_like(x) for x in distr_attention(*arrays, **tables, **options, return_lse=True))
    memory = cupy.empty(workspace_size(*arrays, **tables, **options, out=out, lse=lse), np.uint8)
    graph = Captured(partial(distr_attention, *arrays, **tables, **options), out, lse, memory)
    for seed in (1, 2):
        q, pages = paged(case, seed)
        others, other_tables = pages.given(q, "cupy")
        expected = distr_attention(*others, **other_tables, **options, return_lse=True)
        for mine, theirs in zip(arrays, others, strict=True):
            mine[...] = theirs
        for name in ("page_table", "seqlens_k"):
            tables[name][...] = other_tables[name]
        graph.assert_gives(expected)


@pytest.mark.parametrize(("case", "options"), [(CASES[0], EXACT), PACKED[3]], ids=str)
def test_arrays_of_other_kinds_reach_the_kernel(case: tuple[Any, ...], options: dict[str, Any]) -> None:
    q, pages = paged(case)
    arrays, tables = pages.given(q, "cupy")
    expected = to_host(distr_attention(*arrays, **tables, **options))
    kinds = ("numpy",) if case[-1] == "bfloat16" else ("numpy", "numba")
    for kind in kinds:
        given, of_kind = pages.given(q, kind)
        assert_same_bits(to_host(distr_attention(*given, **of_kind, **options, backend="cupy")), expected)


def test_lengths_out_of_range_stay_in_the_pages() -> None:
    """Nobody checks them on a device: they count as none, or as all that the pages of a sequence hold."""
    case = PACKED[0][0]
    q, k, v, _ = draw(case)
    pages = in_pages(k, v, [case[4]] * case[0], case[3], order=np.random.default_rng(3))
    arrays, tables = pages.given(q, "cupy")
    results = []
    for lengths in ([-5, case[4], 2**31 - 1], [0, case[4], case[4]]):
        tables["seqlens_k"][...] = to_kind(np.array(lengths, np.int32), "cupy")
        results.append(exact_attention(*arrays, **tables, causal=True, return_lse=True))
    for one, other in zip(*results, strict=True):
        assert_same_bits(one, other)


def test_numba_works_on_the_stream_that_is_named() -> None:
    """All that is read is written there late, and the results belong to another stream."""
    import cupy
    from numba import cuda

    q, pages = paged(PACKED[2][0])
    arrays, tables = pages.given(q, "cupy")
    good = [*arrays, tables["page_table"], tables["seqlens_k"]]
    late = [poisoned_like(x) for x in good]  # no sequence has a key

    def attend(given: list[Any], **options: Any) -> Any:
        *rows, table, lengths = (cuda.as_cuda_array(x) for x in given)
        named = {"page_table": table, "seqlens_k": lengths, "causal": True, "return_lse": True}
        return exact_attention(*rows, **named, **options)

    expected = [to_host(x) for x in attend(good)]
    results = [poisoned_like(x) for x in expected]
    stream = cupy.cuda.Stream(non_blocking=True)
    out, lse = (cuda.as_cuda_array(x) for x in results)
    write_late(stream, late, good)
    attend(late, stream=stream, out=out, lse=lse)
    stream.synchronize()
    for one, other in zip(results, expected, strict=True):
        assert_same_bits(to_host(one), other)
