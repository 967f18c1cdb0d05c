"""Is every misuse of grouped keys in pages named? One broken argument a test, and nothing written."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kit.cases import BFLOAT16
from kit.compare import assert_same_bits

from distrattn_np import GroupedPages, distr_attention, exact_attention, group_pages

NUMPY = "numpy array of shape"
SIZES = "16, 32, 64, 128, 256"


def normal(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    return np.random.default_rng([0, *shape]).standard_normal(shape).astype(dtype)


def integers(*numbers: Any, dtype: Any = np.int32) -> np.ndarray:
    return np.array(numbers, dtype)


def refused(error: type[Exception], message: str) -> Any:
    return pytest.raises(error, match=f"^{re.escape(message)}$")


def made(**changed: Any) -> GroupedPages:
    good = {"k": normal(1, 2, 3, 6), "q": None, "pages": 8, "tails": 2, "block_size": 16, "rank": 3}
    return group_pages(**good | changed)


K = f"{NUMPY} (1, 2, 3, 6) and dtype float32"
WRONG_POOLS = {
    "k-list": ({"k": [1]}, TypeError, "k: must be a NumPy, CuPy or Numba device array, got list"),
    "k-batch": (
        {"k": normal(2, 2, 3, 6)},
        ValueError,
        f"k: must have a batch size of 1, got {NUMPY} (2, 2, 3, 6) and dtype float32",
    ),
    "k-heads": (
        {"k": normal(1, 0, 3, 6)},
        ValueError,
        f"k: must have a head, got {NUMPY} (1, 0, 3, 6) and dtype float32",
    ),
    "q-batch": (
        {"q": normal(2, 2, 3, 6)},
        ValueError,
        f"q: must have k's batch size 1, got {NUMPY} (2, 2, 3, 6) and dtype float32",
    ),
    "pages": ({"pages": 0}, ValueError, "pages: must be an integer of at least 1, got 0"),
    "tails": ({"tails": 1.5}, ValueError, "tails: must be an integer of at least 1, got 1.5"),
    "block-size": ({"block_size": 48}, ValueError, f"block_size: must be one of {SIZES}, got 48"),
    "rank-full": ({"rank": 6}, ValueError, "rank: must be less than the width 6, got 6"),
    "group-size-one": ({"rank": None, "group_size": 1}, ValueError, "rank: must be less than the width 6, got 6"),
    "layout": ({"layout": "hbnd"}, ValueError, "layout: must be 'bhnd' or 'bnhd', got 'hbnd'"),
}


@pytest.mark.parametrize(("changed", "error", "message"), WRONG_POOLS.values(), ids=WRONG_POOLS)
def test_wrong_pool_is_named(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    with refused(error, message):
        made(**changed)


HOST = "must be a NumPy array, for the host says which pages are finished, got"
WRONG_APPENDS = {
    "k-dtype": (
        {"k": normal(2, 2, 1, 6, dtype="f8")},
        TypeError,
        f"k: must have the dtype float32 of the keys so far, got {NUMPY} (2, 2, 1, 6) and dtype float64",
    ),
    "k-width": (
        {"k": normal(2, 2, 1, 5)},
        ValueError,
        f"k: must have shape (any, 2, any, 6), got {NUMPY} (2, 2, 1, 5) and dtype float32",
    ),
    "table-list": ({"page_table": [[0]]}, TypeError, f"page_table: {HOST} [[0]]"),
    "lengths-none": ({"seqlens_k": None}, TypeError, f"seqlens_k: {HOST} None"),
    "table-batch": (
        {"page_table": integers([0, 1])},
        ValueError,
        f"page_table: must have k's batch size 2, got {NUMPY} (1, 2) and dtype int32",
    ),
    "lengths-int64": (
        {"seqlens_k": integers(5, 0, dtype="i8")},
        TypeError,
        f"seqlens_k: the dtype must be int32, got {NUMPY} (2,) and dtype int64",
    ),
    "page": (
        {"page_table": integers([0, 1], [8, 8])},
        ValueError,
        "page_table: pages must be 0 to 7, got 8 for sequence 1",
    ),
    "length": (
        {"seqlens_k": integers(5, 32)},
        ValueError,
        "seqlens_k: must be 0 to 31, the keys that the pages of a sequence hold less the 1 to come, "
        "got 32 for sequence 1",
    ),
    "other-keys": ({"seqlens_k": integers(4, 0)}, ValueError, "seqlens_k: page 0 has 5 keys, got 4 for sequence 0"),
    "empty-page": ({"seqlens_k": integers(5, 2)}, ValueError, "seqlens_k: page 3 has 0 keys, got 2 for sequence 1"),
    "one-page-for-two": (
        {"page_table": integers([0, 1], [0, 4]), "seqlens_k": integers(5, 5)},
        ValueError,
        "seqlens_k: page 0 has 6 keys, got 5 for sequence 1",
    ),
    "tails": (
        {"k": normal(3, 2, 1, 6), "page_table": integers([0], [3], [4]), "seqlens_k": integers(5, 0, 0)},
        ValueError,
        "k: at most 2 pages can be unfinished, as tails says, got one more",
    ),
}


@pytest.mark.parametrize(("changed", "error", "message"), WRONG_APPENDS.values(), ids=WRONG_APPENDS)
def test_wrong_append_is_named(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    keys = made()
    keys.append(normal(1, 2, 5, 6), integers([0]), integers(0))
    before = io.BytesIO()
    keys.save(before)
    good = {"k": normal(2, 2, 1, 6), "page_table": integers([0, 1], [3, 4]), "seqlens_k": integers(5, 0)}
    with refused(error, message):
        keys.append(**good | changed)
    after = io.BytesIO()
    keys.save(after)
    assert before.getvalue() == after.getvalue()
    keys.append(**good)
    assert keys.filled.tolist() == [6, 0, 0, 1, 0, 0, 0, 0]


def arguments(**changed: Any) -> dict[str, Any]:
    keys = made()
    keys.append(normal(1, 2, 20, 6), integers([7, 2]), integers(0))
    good = {"q": normal(1, 4, 1, 6), "k": keys, "v": normal(8, 2, 16, 3)}
    return good | {"page_table": integers([7, 2]), "seqlens_k": integers(20)} | changed


SHOWN = "GroupedPages of shape (8, 2, 16, 6) and dtype float32"
WRONG_CALLS = {
    "no-table": ({"page_table": None}, ValueError, "page_table: must be given with GroupedPages, got None"),
    "no-lengths": ({"seqlens_k": None}, ValueError, "seqlens_k: must be given with GroupedPages, got None"),
    "method": ({"method": "lsh"}, ValueError, "method: must be 'subspace' with GroupedPages, got 'lsh'"),
    "rank": ({"rank": 2}, ValueError, "rank: must be None with GroupedPages, got 2"),
    "refine": ({"refine": 2}, ValueError, "refine: must be 1, the default, with GroupedPages, got 2"),
    "layout": ({"layout": "bnhd"}, ValueError, "layout: must be 'bhnd', as of the keys, got 'bnhd'"),
    "dtype": (
        {"q": normal(1, 4, 1, 6, dtype="f8"), "v": normal(8, 2, 16, 3, dtype="f8")},
        TypeError,
        f"k: must have q's dtype float64, got {SHOWN}",
    ),
    "v-pages": (
        {"v": normal(7, 2, 16, 3)},
        ValueError,
        f"v: must have k's 8 pages, got {NUMPY} (7, 2, 16, 3) and dtype float32",
    ),
    "length": ({"seqlens_k": integers(21)}, ValueError, "seqlens_k: page 2 has 4 keys, got 5 for sequence 0"),
    "info": ({"return_info": True}, ValueError, "return_info: must be False with page_table, got True"),
    "numba": (
        {"backend": "numba"},
        NotImplementedError,
        f"k: the numba backend takes GroupedPages of numba arrays, got {SHOWN}",
    ),
}


@pytest.mark.parametrize(("changed", "error", "message"), WRONG_CALLS.values(), ids=WRONG_CALLS)
def test_wrong_call_is_named(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    out = np.full((1, 4, 1, 3), 7, "f4")
    call = arguments(**changed)
    with refused(error, message):
        distr_attention(**call, **({} if "q" in changed or "layout" in changed else {"out": out}))
    assert_same_bits(out, np.full_like(out, 7))


def test_the_good_call_is_taken() -> None:
    assert distr_attention(**arguments()).shape == (1, 4, 1, 3)


def test_exact_attention_takes_no_grouped_pages() -> None:
    with refused(TypeError, "k: must be a NumPy, CuPy or Numba device array, got GroupedPages"):
        exact_attention(**arguments())


@pytest.mark.parametrize(
    ("pages", "error", "message"),
    [
        (3, TypeError, "pages: must be some integers, got 3"),
        ([8], ValueError, "pages: must be 0 to 7, got 8"),
        ([0, -1], ValueError, "pages: must be 0 to 7, got -1"),
    ],
)
def test_wrong_release_is_named(pages: Any, error: type[Exception], message: str) -> None:
    with refused(error, message):
        made().release(pages)


WRONG_FILES = {
    "missing": (("tails", None), "must be one that GroupedPages.save wrote, with "),
    "format": (("format", integers(2)[0]), "must be of format 1"),
    "rank": (("rank", np.array(6)), "must hold a rank less than the width"),
    "filled": (("filled", integers(*[17] * 8)), "filled must be 0 to 16"),
    "filled-dtype": (("filled", np.zeros(8, "i8")), "filled must have dtype int32 and not int64"),
    "tail-of": (("tail_of", integers(*[2] * 8)), "tail_of must be -1 to 1"),
    "tail-twice": (("tail_of", integers(0, 0, *[-1] * 6)), "no two pages may have one tail"),
    "tail-lost": (("tail_of", integers(*[-1] * 8)), "pages that are not full, and no empty ones, must have a tail"),
    "sampled": (("sampled", normal(8, 2, 16, 2)), "sampled must have shape (8, 2, 16, 3) and not (8, 2, 16, 2)"),
    "page-size": (("tails", normal(2, 2, 15, 6)), f"the page size must be one of {SIZES}"),
}


@pytest.mark.parametrize(("change", "message"), WRONG_FILES.values(), ids=WRONG_FILES)
def test_wrong_file_is_named(change: tuple[str, Any], message: str) -> None:
    file = io.BytesIO()
    arguments()["k"].save(file)
    file.seek(0)
    arrays = dict(np.load(file))
    assert GroupedPages.load(_written(arrays)).filled.sum() == 20
    name, value = change
    del arrays[name]
    if value is not None:
        arrays[name] = value
    with pytest.raises(ValueError, match=f"^file: {re.escape(message)}.*got "):
        GroupedPages.load(_written(arrays))


def _written(arrays: dict[str, Any]) -> io.BytesIO:
    file = io.BytesIO()
    np.savez(file, **arrays)
    file.seek(0)
    return file


def test_another_kind_to_load_is_named() -> None:
    with refused(ValueError, "kind: must be 'numpy', 'cupy' or 'numba', got 'torch'"):
        GroupedPages.load(io.BytesIO(), kind="torch")  # type: ignore[arg-type]


def test_bfloat16_of_numba_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("numba")
    path = tmp_path / "pages.npz"
    made(k=normal(1, 2, 3, 6, dtype=BFLOAT16)).save(path)
    with refused(NotImplementedError, f"file: grouped keys of numba arrays are not built for bfloat16 yet, got {path}"):
        GroupedPages.load(path, kind="numba")


def test_numba_arrays_do_not_mix_with_others() -> None:
    cuda = pytest.importorskip("numba.cuda")
    keys = made(k=cuda.to_device(normal(1, 2, 3, 6)))
    with refused(TypeError, f"k: must be a numba array, as the keys so far, got {K}"):
        keys.append(normal(1, 2, 3, 6), integers([0]), integers(0))
    keys.append(cuda.to_device(normal(1, 2, 20, 6)), integers([7, 2]), integers(0))
    with refused(TypeError, f"k: must hold numpy arrays, as q is, got {SHOWN} on a CUDA device"):
        distr_attention(**arguments(k=keys))
