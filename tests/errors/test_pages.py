"""Is every misuse of pages named? One broken argument a test, the whole message, and nothing written."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from kit.cases import BFLOAT16
from kit.compare import assert_same_bits

from distrattn_np import distr_attention, exact_attention, group_keys

NUMPY = "numpy array of shape"
CALLS = (distr_attention, exact_attention)


def normal(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    return np.random.default_rng([0, *shape]).standard_normal(shape).astype(dtype)


def integers(*numbers: Any, dtype: Any = np.int32) -> np.ndarray:
    return np.array(numbers, dtype)


def arguments(**changed: Any) -> dict[str, Any]:
    """Return a good call of two sequences with some arguments replaced."""
    good = {
        "q": normal(2, 4, 5, 6),
        "k": normal(7, 2, 16, 6),
        "v": normal(7, 2, 16, 3),
        "page_table": integers([6, 2, 3], [0, -9, 99]),
        "seqlens_k": integers(48, 9),
        "out": np.full((2, 4, 5, 3), 7, "f4"),
    }
    return good | changed


def shown(*shape: int, dtype: str = "int32") -> str:
    return f"{NUMPY} {shape} and dtype {dtype}"


NO_ARRAY = "must be a NumPy, CuPy or Numba device array, got"
TOGETHER = "must be given with the other of page_table and seqlens_k, got None"
SIZES = "k: the page size must be one of 16, 32, 64, 128, 256, got"

WRONG_PAGES = {
    "table-alone": ({"seqlens_k": None}, ValueError, f"seqlens_k: {TOGETHER}"),
    "lengths-alone": ({"page_table": None}, ValueError, f"page_table: {TOGETHER}"),
    "table-list": ({"page_table": [[0]]}, TypeError, f"page_table: {NO_ARRAY} list"),
    "lengths-number": ({"seqlens_k": 8}, TypeError, f"seqlens_k: {NO_ARRAY} int"),
    "table-1d": ({"page_table": integers(0, 1)}, ValueError, f"page_table: must have 2 axes, got {shown(2)}"),
    "lengths-2d": ({"seqlens_k": integers([3, 4])}, ValueError, f"seqlens_k: must have 1 axis, got {shown(1, 2)}"),
    "table-int64": (
        {"page_table": integers([0], [1], dtype="i8")},
        TypeError,
        f"page_table: the dtype must be int32, got {shown(2, 1, dtype='int64')}",
    ),
    "lengths-float": (
        {"seqlens_k": np.ones(2, "f4")},
        TypeError,
        f"seqlens_k: the dtype must be int32, got {shown(2, dtype='float32')}",
    ),
    "table-transposed": (
        {"page_table": integers([0, 1], [1, 2], [3, 4]).T},
        ValueError,
        f"page_table: the last axis must be contiguous, got {shown(2, 3)} with strides (4, 8) bytes",
    ),
    "table-batch": (
        {"page_table": integers([0, 1])},
        ValueError,
        f"page_table: must have q's batch size 2, got {shown(1, 2)}",
    ),
    "lengths-batch": (
        {"seqlens_k": integers(1, 2, 3)},
        ValueError,
        f"seqlens_k: must have q's batch size 2, got {shown(3)}",
    ),
    "length-negative": (
        {"seqlens_k": integers(3, -1)},
        ValueError,
        "seqlens_k: must be 0 to 48, the keys that the pages of a sequence hold, got -1 for sequence 1",
    ),
    "length-large": (
        {"seqlens_k": integers(49, 0)},
        ValueError,
        "seqlens_k: must be 0 to 48, the keys that the pages of a sequence hold, got 49 for sequence 0",
    ),
    "page-negative": (
        {"seqlens_k": integers(48, 17)},
        ValueError,
        "page_table: pages must be 0 to 6, got -9 for sequence 1",
    ),
    "page-large": (
        {"page_table": integers([6, 7, 3], [0, 0, 0])},
        ValueError,
        "page_table: pages must be 0 to 6, got 7 for sequence 0",
    ),
    "page-size-odd": (
        {"k": normal(7, 2, 24, 6), "v": normal(7, 2, 24, 3)},
        ValueError,
        f"{SIZES} 24: {shown(7, 2, 24, 6, dtype='float32')}",
    ),
    "page-size-large": (
        {"k": normal(1, 2, 512, 6), "v": normal(1, 2, 512, 3)},
        ValueError,
        f"{SIZES} 512: {shown(1, 2, 512, 6, dtype='float32')}",
    ),
    "v-pages": (
        {"v": normal(6, 2, 16, 3)},
        ValueError,
        f"v: must have k's 7 pages, got {shown(6, 2, 16, 3, dtype='float32')}",
    ),
    "v-page-size": (
        {"v": normal(7, 2, 32, 3)},
        ValueError,
        f"v: must have k's page size 16, got {shown(7, 2, 32, 3, dtype='float32')}",
    ),
    "v-heads": (
        {"v": normal(7, 1, 16, 3)},
        ValueError,
        f"v: must have k's 2 heads, got {shown(7, 1, 16, 3, dtype='float32')}",
    ),
    "mask": (
        {"mask": np.ones((5, 48), bool)},
        ValueError,
        f"mask: must be None with page_table, got {shown(5, 48, dtype='bool')}",
    ),
    "bias": (
        {"bias": normal(1)},
        ValueError,
        f"bias: must be None with page_table, got {shown(1, dtype='float32')}",
    ),
    "cu-seqlens": (
        {"cu_seqlens_q": integers(0, 5)},
        ValueError,
        f"cu_seqlens_q: must be None with page_table, got {shown(2)}",
    ),
    "layout": ({"layout": "nhd"}, ValueError, "layout: must be 'bhnd' or 'bnhd', got 'nhd'"),
    "out-shape": (
        {"out": np.zeros((2, 4, 5, 6), "f4")},
        ValueError,
        f"out: must have shape (2, 4, 5, 3), got {shown(2, 4, 5, 6, dtype='float32')}",
    ),
}


@pytest.mark.parametrize("function", CALLS)
@pytest.mark.parametrize(("changed", "error", "message"), WRONG_PAGES.values(), ids=WRONG_PAGES)
def test_wrong_argument_is_named(function: Any, changed: dict[str, Any], error: type[Exception], message: str) -> None:
    call = arguments(**changed)
    before = call["out"].copy()
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        function(**call)
    assert_same_bits(call["out"], before)


def test_the_good_call_is_taken() -> None:
    for function in CALLS:
        assert function(**arguments()).shape == (2, 4, 5, 3)


def test_out_apart_from_the_table() -> None:
    memory = np.zeros(2 * 4 * 5 * 3, np.float32)
    call = arguments(out=memory.reshape(2, 4, 5, 3), seqlens_k=memory[:2].view(np.int32))
    with pytest.raises(ValueError, match=r"^out: must not share memory with seqlens_k, got "):
        exact_attention(**call)


def test_what_a_call_does_is_not_told_of_pages() -> None:
    with pytest.raises(ValueError, match=r"^return_info: must be False with page_table, got True$"):
        distr_attention(**arguments(), return_info=True)


def test_grouped_keys_lie_in_no_pages() -> None:
    keys = group_keys(normal(2, 2, 48, 6), rank=2, block_size=16)
    message = f"page_table: must be None with GroupedKeys, got {shown(2, 3)}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        distr_attention(**arguments(k=keys))


@pytest.mark.parametrize("function", CALLS)
def test_numba_refuses_bfloat16_pages_by_name(function: Any) -> None:
    pytest.importorskip("numba")
    q, k, v = (arguments()[name].astype(BFLOAT16) for name in ("q", "k", "v"))
    message = f"q: the numba backend takes float16, float32 and float64, got {shown(2, 4, 5, 6, dtype='bfloat16')}"
    with pytest.raises(NotImplementedError, match=f"^{re.escape(message)}$"):
        function(**arguments(q=q, k=k, v=v, out=None), backend="numba")
