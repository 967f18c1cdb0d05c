"""Do calls to Numba's kernels stay in the memory that they are lent? On a GPU, or in the simulator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from kit.backends import options_to_kind, to_kind
from kit.compare import assert_same_bits, to_host
from kit.grouped_pages import draw
from kit.pages import in_pages

from distrattn_np import distr_attention, exact_attention, group_keys, workspace_size
from distrattn_np.arrays import address

cuda = pytest.importorskip("numba.cuda")


def inputs(rows: int = 21, keys: int = 26, dtype: str = "float32") -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = ((2, 4, rows, 8), (2, 2, keys, 8), (2, 2, keys, 6))
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


Call = tuple[list[Any], dict[str, Any]]
"""q, k and v, and options."""


def dense(dtype: str = "float32", **options: Any) -> Callable[[], Call]:
    return lambda: (inputs(dtype=dtype), options)


def packed() -> Call:
    q, k, v = (np.ascontiguousarray(x[0].swapaxes(0, 1)) for x in inputs())
    edges = {"cu_seqlens_q": np.array([0, 9, 9, 21], np.int32), "cu_seqlens_k": np.array([0, 12, 14, 26], np.int32)}
    return [q, k, v], edges | {"rank": 3, "block_size": 8}


def paged() -> Call:
    q, k, v = inputs(3, 48)
    pages = in_pages(k, v, [40, 19], 16, order=np.random.default_rng(0))
    return [q, pages.k, pages.v], pages.tables | {"group_size": 2, "method": "lsh", "block_size": 16}


def grouped() -> Call:
    q, k, v = inputs(2, 40)
    return [q, group_keys(to_kind(k, "numba"), rank=3, block_size=16), v], {"causal": True}


def grouped_pages() -> Call:
    q, sequences = draw(((2, 1), 2, 16, 5, 4, 3, "float32", "bhnd", [48, 17], 1), "numba")
    arrays, tables = sequences.given(q, "numba")
    return arrays, tables


CALLS: dict[str, Callable[[], Call]] = {
    "exact": dense(group_size=1),
    "exact-float64": dense("float64", group_size=1, causal=True),
    "lsh": dense(method="lsh", block_size=8),
    "lsh-lstsq": dense("float16", method="lsh", fusion="lstsq", group_by="keys", block_size=8, causal=True),
    "subspace": dense(rank=3, block_size=8, causal=True),
    "subspace-queries": dense("float16", rank=3, block_size=8, group_by="queries", softcap=2.0),
    "tolerance": dense(score_tol=0.3, block_size=16),
    "mask": dense(rank=3, block_size=16, mask=np.arange(26) % 3 > 0),
    "packed": packed,
    "paged": paged,
    "grouped": grouped,
    "grouped-pages": grouped_pages,
}


def given(name: str) -> Call:
    arrays, options = CALLS[name]()
    arrays = [to_kind(x, "numba") if isinstance(x, np.ndarray) else x for x in arrays]
    return arrays, options_to_kind(options, "numba")


def lend(size: int) -> tuple[Any, Any]:
    """Return ``size`` bytes, and the array that they are the start of; 0xFF is NaN wherever it is read."""
    memory = to_kind(np.full(size + 1024, 0xFF, np.uint8), "numba")
    memory = memory[-address(memory) % 256 :]
    return memory[:size], memory


@pytest.mark.parametrize("name", CALLS)
def test_a_call_allocates_nothing_and_stays_inside(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    arrays, options = given(name)
    expected, expected_lse = distr_attention(*arrays, **options, return_lse=True)
    out, lse = (to_kind(np.full(x.shape, np.nan, x.dtype), "numba") for x in (expected, expected_lse))
    size = workspace_size(*arrays, **options, out=out, lse=lse, return_lse=True)
    workspace, memory = lend(size)

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("memory is taken")

    with monkeypatch.context() as patched:
        for function in ("device_array", "to_device"):
            patched.setattr(cuda, function, refuse)
        distr_attention(*arrays, **options, out=out, lse=lse, return_lse=True, workspace=workspace)
    assert_same_bits(to_host(out), to_host(expected))
    assert_same_bits(to_host(lse), to_host(expected_lse))
    rest = memory.copy_to_host()[size:]
    assert (rest == 0xFF).all()


@pytest.mark.parametrize("name", CALLS)
def test_one_that_is_too_small_is_refused_before_anything_is_written(name: str) -> None:
    arrays, options = given(name)
    expected = distr_attention(*arrays, **options)
    out = to_kind(np.full(expected.shape, np.nan, expected.dtype), "numba")
    size = workspace_size(*arrays, **options, out=out)  # with room for lse
    workspace, memory = lend(size - 1)
    message = rf"^workspace: must have at least {size} bytes, got numba array of shape \({size - 1},\) and dtype uint8$"
    with pytest.raises(ValueError, match=message):
        distr_attention(*arrays, **options, out=out, workspace=workspace)
    assert np.isnan(to_host(out)).all()
    assert (memory.copy_to_host() == 0xFF).all()


def test_results_that_are_not_given_outlive_the_workspace() -> None:
    arrays, options = given("subspace")
    workspace, memory = lend(workspace_size(*arrays, **options))
    results = distr_attention(*arrays, **options, return_lse=True, workspace=workspace)
    memory.copy_to_device(np.zeros(memory.shape, np.uint8))
    for found, expected in zip(results, distr_attention(*arrays, **options, return_lse=True), strict=True):
        assert_same_bits(to_host(found), to_host(expected))


def test_exact_attention_needs_room_for_lse_alone() -> None:
    arrays, _ = given("exact")
    rows = 2 * 4 * 21 * 4
    assert workspace_size(*arrays, group_size=1) == -(-rows // 256) * 256
    assert workspace_size(*arrays, group_size=1, return_lse=True) == 0
    out = exact_attention(*arrays, workspace=lend(1024)[0])
    assert_same_bits(to_host(out), to_host(exact_attention(*arrays)))


def test_size_is_that_of_arrays_on_a_host() -> None:
    for name in ("lsh", "subspace", "mask", "packed"):
        arrays, options = given(name)
        on_host, named = CALLS[name]()
        assert workspace_size(*on_host, **named, backend="numba") == workspace_size(*arrays, **options)
