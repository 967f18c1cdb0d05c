"""Is every misuse of grouped keys named? One broken argument a test, and the whole message."""

from __future__ import annotations

import importlib.util
import io
import re
from typing import Any

import numpy as np
import pytest
from kit.backends import SIMULATED
from kit.compare import assert_same_bits

from distrattn_np import GroupedKeys, backends, distr_attention, exact_attention, group_keys

DTYPES = "float16, bfloat16, float32, float64"


def normal(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    return np.random.default_rng([0, *shape]).standard_normal(shape).astype(dtype)


def refused(error: type[Exception], message: str) -> Any:
    return pytest.raises(error, match=f"^{re.escape(message)}$")


NUMPY = "numpy array of shape"
K, Q, V = (f"{NUMPY} {shape} and dtype" for shape in ((2, 2, 7, 6), (2, 4, 5, 6), (2, 2, 7, 3)))
GROUPED = "GroupedKeys of shape (2, 2, 7, 6) and dtype float32"

WRONG_GROUPINGS = {
    "k-list": ({"k": [1.0]}, TypeError, "k: must be a NumPy, CuPy or Numba device array, got list"),
    "k-3d": ({"k": normal(2, 7, 6)}, ValueError, f"k: must have 4 axes, got {NUMPY} (2, 7, 6) and dtype float32"),
    "k-int": ({"k": np.ones((2, 2, 7, 6), int)}, TypeError, f"k: the dtype must be one of {DTYPES}, got {K} int64"),
    "k-wide": (
        {"k": normal(1, 1, 2, 257), "q": None},
        ValueError,
        f"k: the last axis must have 1 to 256 elements, got {NUMPY} (1, 1, 2, 257) and dtype float32",
    ),
    "k-reversed": (
        {"k": normal(2, 2, 7, 6)[..., ::-1]},
        ValueError,
        f"k: the last axis must be contiguous, got {K} float32 with strides (336, 168, 24, -4) bytes",
    ),
    "q-list": ({"q": [1.0]}, TypeError, "q: must be a NumPy, CuPy or Numba device array, got list"),
    "q-dtype": ({"q": normal(2, 4, 5, 6, dtype="f8")}, TypeError, f"q: must have k's dtype float32, got {Q} float64"),
    "q-batch": (
        {"q": normal(3, 4, 5, 6)},
        ValueError,
        f"q: must have k's batch size 2, got {NUMPY} (3, 4, 5, 6) and dtype float32",
    ),
    "q-width": (
        {"q": normal(2, 4, 5, 7)},
        ValueError,
        f"q: must have k's width 6, got {NUMPY} (2, 4, 5, 7) and dtype float32",
    ),
    "q-heads": (
        {"q": normal(2, 3, 5, 6)},
        ValueError,
        f"q: the number of heads must be a multiple of k's 2, got {NUMPY} (2, 3, 5, 6) and dtype float32",
    ),
    "q-no-heads": (
        {"q": normal(2, 0, 5, 6)},
        ValueError,
        f"q: the number of heads must be a multiple of k's 2, got {NUMPY} (2, 0, 5, 6) and dtype float32",
    ),
    "q-empty": (
        {"q": normal(2, 4, 0, 6)},
        ValueError,
        f"q: must have a row, got {NUMPY} (2, 4, 0, 6) and dtype float32",
    ),
    "q-missing": ({"q": None, "score_tol": 0.1}, ValueError, "q: must be given with score_tol, got None"),
    "layout": ({"layout": "thd"}, ValueError, "layout: must be 'bhnd' or 'bnhd', got 'thd'"),
    "layout-of-q": (
        {"layout": "bnhd"},
        ValueError,
        f"q: the number of heads must be a multiple of k's 7, got {Q} float32",
    ),
    "rank": ({"rank": 7}, ValueError, "rank: must be at most the width 6, got 7"),
    "rank-and-group-size": ({"rank": 3, "group_size": 2}, ValueError, "rank: must be None with group_size, got 3"),
    "group-size": ({"group_size": 4}, ValueError, "group_size: must divide the width 6, got 4"),
    "score-tol": (
        {"score_tol": -1},
        ValueError,
        "score_tol: must be a positive finite number in the range of float32, got -1",
    ),
    "refine": ({"refine": -1}, ValueError, "refine: must be an integer of at least 0, got -1"),
    "block-size": ({"block_size": 0}, ValueError, "block_size: must be an integer of at least 1, got 0"),
    "scale": ({"scale": "1"}, ValueError, "scale: must be a finite number in the range of float32, got '1'"),
    "stream": ({"stream": 7}, ValueError, "stream: must be None with NumPy arrays, got 7"),
    "stream-name": (
        {"stream": "x"},
        TypeError,
        "stream: must be None, an integer handle or a stream with __cuda_stream__, got 'x'",
    ),
}


@pytest.mark.parametrize(("changed", "error", "message"), WRONG_GROUPINGS.values(), ids=WRONG_GROUPINGS)
def test_wrong_argument_of_group_keys_is_named(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    with refused(error, message):
        group_keys(**{"k": normal(2, 2, 7, 6), "q": normal(2, 4, 5, 6)} | changed)


SHAPE = "k: must have shape (2, 2, any, 6), got"
WRONG_KEYS = {
    "list": ([1.0], TypeError, "k: must be a NumPy, CuPy or Numba device array, got list"),
    "3d": (normal(2, 7, 6), ValueError, f"k: must have 4 axes, got {NUMPY} (2, 7, 6) and dtype float32"),
    "int": (np.ones((2, 2, 7, 6), int), TypeError, f"k: the dtype must be one of {DTYPES}, got {K} int64"),
    "dtype": (
        normal(2, 2, 7, 6, dtype="f2"),
        TypeError,
        f"k: must have the dtype float32 of the keys so far, got {K} float16",
    ),
    "batch": (normal(1, 2, 7, 6), ValueError, f"{SHAPE} {NUMPY} (1, 2, 7, 6) and dtype float32"),
    "heads": (normal(2, 4, 7, 6), ValueError, f"{SHAPE} {NUMPY} (2, 4, 7, 6) and dtype float32"),
    "width": (normal(2, 2, 7, 5), ValueError, f"{SHAPE} {NUMPY} (2, 2, 7, 5) and dtype float32"),
    "layout": (normal(2, 9, 2, 6), ValueError, f"{SHAPE} {NUMPY} (2, 9, 2, 6) and dtype float32"),
}


@pytest.mark.parametrize(("k", "error", "message"), WRONG_KEYS.values(), ids=WRONG_KEYS)
def test_wrong_appended_keys_are_named_and_not_appended(k: Any, error: type[Exception], message: str) -> None:
    keys = group_keys(normal(2, 2, 7, 6), rank=2, block_size=4)
    before = keys.tail.copy()
    with refused(error, message):
        keys.append(k)
    assert keys.shape == (2, 2, 7, 6)
    assert_same_bits(keys.tail, before)


def test_a_stream_of_appended_keys_is_named() -> None:
    keys = group_keys(normal(2, 2, 7, 6), rank=2, block_size=4)
    for stream, error, message in (
        (0, ValueError, "stream: must be None with NumPy arrays, got 0"),
        (-1, ValueError, "stream: a handle must be at least 0, got -1"),
    ):
        with refused(error, message):
            keys.append(normal(2, 2, 7, 6), stream=stream)
    assert keys.shape == (2, 2, 7, 6)


def test_appended_keys_of_another_layout_are_named() -> None:
    keys = group_keys(normal(2, 7, 2, 6), layout="bnhd")
    message = f"k: must have shape (2, any, 2, 6), got {NUMPY} (2, 2, 9, 6) and dtype float32"
    with refused(ValueError, message):
        keys.append(normal(2, 2, 9, 6))


WRONG_CALLS = {
    "method": ({"method": "lsh"}, "method: must be 'subspace' with GroupedKeys, got 'lsh'"),
    "group_size": ({"group_size": 2}, "group_size: must be None with GroupedKeys, got 2"),
    "rank": ({"rank": 2}, "rank: must be None with GroupedKeys, got 2"),
    "score_tol": ({"score_tol": 0.1}, "score_tol: must be None with GroupedKeys, got 0.1"),
    "fusion": ({"fusion": "sum"}, "fusion: must be None with GroupedKeys, got 'sum'"),
    "group_by": ({"group_by": "keys"}, "group_by: must be None with GroupedKeys, got 'keys'"),
    "block_size": ({"block_size": 4}, "block_size: must be None with GroupedKeys, got 4"),
    "refine": ({"refine": 2}, "refine: must be 1, the default, with GroupedKeys, got 2"),
    "scale": ({"scale": 0.25}, "scale: must be None or the 0.5 of the keys, got 0.25"),
    "layout": ({"layout": "bnhd"}, "layout: must be 'bhnd', as of the keys, got 'bnhd'"),
    "q-batch": (
        {"q": normal(1, 4, 5, 6), "v": normal(2, 2, 7, 3)},
        f"k: must have q's batch size 1, got {GROUPED}",
    ),
    "q-width": ({"q": normal(2, 4, 5, 8)}, f"k: must have q's width 8, got {GROUPED}"),
    "q-heads": ({"q": normal(2, 3, 5, 6)}, f"k: the number of heads must divide q's 3, got {GROUPED}"),
    "v-rows": (
        {"v": normal(2, 2, 8, 3)},
        f"v: must have k's 7 rows, got {NUMPY} (2, 2, 8, 3) and dtype float32",
    ),
    "v-heads": (
        {"v": normal(2, 4, 7, 3)},
        f"v: must have k's 2 heads, got {NUMPY} (2, 4, 7, 3) and dtype float32",
    ),
}


def call(**changed: Any) -> dict[str, Any]:
    keys = group_keys(normal(2, 2, 7, 6), rank=2, block_size=4, scale=0.5)
    return {"q": normal(2, 4, 5, 6), "k": keys, "v": normal(2, 2, 7, 3)} | changed


@pytest.mark.parametrize(("changed", "message"), WRONG_CALLS.values(), ids=WRONG_CALLS)
def test_wrong_call_with_grouped_keys_is_named(changed: dict[str, Any], message: str) -> None:
    with refused(ValueError, message):
        distr_attention(**call(**changed))


def test_what_grouped_keys_were_made_with_may_be_repeated() -> None:
    assert_same_bits(distr_attention(**call(scale=0.5)), distr_attention(**call()))


def test_another_dtype_than_that_of_grouped_keys_is_named() -> None:
    changed = {"q": normal(2, 4, 5, 6, dtype="f2"), "v": normal(2, 2, 7, 3, dtype="f2")}
    with refused(TypeError, f"k: must have q's dtype float16, got {GROUPED}"):
        distr_attention(**call(**changed))


def test_exact_attention_takes_no_grouped_keys() -> None:
    with refused(TypeError, "k: must be a NumPy, CuPy or Numba device array, got GroupedKeys"):
        exact_attention(**call())


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("cupy", "the cupy backend takes GroupedKeys of cupy arrays"),
        ("numba", "the numba backend takes GroupedKeys of numba arrays"),
    ],
)
def test_gpu_backends_refuse_grouped_keys_on_the_host(name: str, rule: str) -> None:
    pytest.importorskip(name)
    assert "numpy" not in backends.load_by_name(name).kinds_of_grouped_keys
    with refused(NotImplementedError, f"k: {rule}, got {GROUPED}"):
        distr_attention(**call(backend=name))


def test_numba_arrays_do_not_mix_with_others() -> None:
    cuda = pytest.importorskip("numba.cuda")
    k = normal(2, 2, 7, 6)
    shown = f"{K.replace('numpy', 'numba')} float32"
    with refused(TypeError, f"k: must be a numpy array, as the keys so far, got {shown}"):
        group_keys(k).append(cuda.to_device(k))
    with refused(TypeError, f"k: must be a numba array, as the keys so far, got {K} float32"):
        group_keys(cuda.to_device(k)).append(k)
    with refused(TypeError, f"q: must be a numpy array, as k is, got {Q.replace('numpy', 'numba')} float32"):
        group_keys(k, cuda.to_device(normal(2, 4, 5, 6)))
    q, v = (cuda.to_device(normal(*shape)) for shape in ((2, 4, 5, 6), (2, 2, 7, 3)))
    with refused(TypeError, f"k: must hold numba arrays, as q is, got {GROUPED}"):
        distr_attention(**call(q=q, v=v))
    message = f"k: the cupy backend takes GroupedKeys of cupy arrays, got {GROUPED} on a CUDA device"
    if importlib.util.find_spec("cupy"):
        with refused(NotImplementedError, message):
            distr_attention(q, group_keys(cuda.to_device(k)), v, backend="cupy")


def test_bfloat16_of_numba_is_refused(tmp_path: Any) -> None:
    cuda, ml_dtypes = pytest.importorskip("numba.cuda"), pytest.importorskip("ml_dtypes")
    k = normal(2, 2, 7, 6, dtype=ml_dtypes.bfloat16)
    rule = "grouped keys of numba arrays are not built for bfloat16 yet"
    if SIMULATED:  # elsewhere Numba has no such arrays
        with refused(NotImplementedError, f"k: {rule}, got {K.replace('numpy', 'numba')} bfloat16"):
            group_keys(cuda.to_device(k))
    path = tmp_path / "keys.npz"
    group_keys(k).save(path)
    with refused(NotImplementedError, f"file: {rule}, got {path}"):
        GroupedKeys.load(path, kind="numba")


NAMES = "dtype, format, layout, scale, tail"
WRONG_FILES = {
    "tail-missing": ({"tail": None}, f"must be one that GroupedKeys.save wrote, with {NAMES}"),
    "format": ({"format": np.array(2)}, "must be of format 1"),
    "dtype": ({"dtype": np.array("int8")}, f"the dtype must be one of {DTYPES}"),
    "tail-dtype": ({"tail": normal(2, 2, 3, 6, dtype="f8")}, "tail must have dtype float32 and not float64"),
    "tail-3d": ({"tail": normal(2, 3, 6)}, "tail must have shape (B, H_kv, rows, D) and not (2, 3, 6)"),
    "tail-long": ({"tail": normal(2, 2, 5, 6)}, "the tail must be no longer than a block"),
    "refine-missing": ({"refine": None}, "must hold block_size, refine, score_tol with rank"),
    "fusion-missing": (
        {"fusion": None},
        "must hold block_size, fusion, mean, rank, ranks, refine, sampled, score_errors, score_tol with widths",
    ),
    "fusion-short": ({"fusion": normal(2, 2, 6, 1)}, "fusion must have shape (2, 2, 6, 2) and not (2, 2, 6, 1)"),
    "format-shape": ({"format": np.array([1])}, "format must be one integer"),
    "layout-number": ({"layout": np.array(0)}, "layout must be one name"),
    "score-tol-integer": ({"score_tol": np.array(0)}, "score_tol must be one number"),
    "layout": ({"layout": np.array("thd")}, "the layout must be 'bhnd' or 'bnhd'"),
    "scale": ({"scale": np.array(np.nan)}, "the scale must be a finite number in the range of float32"),
    "tail-wide": ({"tail": normal(2, 2, 3, 257)}, "tail must have 1 to 256 columns and not 257"),
    "query-rows": ({"query_rows": np.array(0)}, "query_rows must be at least 1"),
    "block-size": ({"block_size": np.array(0)}, "block_size must be at least 1"),
    "refine": ({"refine": np.array(-1)}, "refine must be at least 0"),
    "rank-of-all": (
        {"rank": np.array(6)},
        "must hold a rank less than the width or a score_tol, and 0 for the other",
    ),
    "widths-2d": ({"widths": np.ones((1, 1), int)}, "widths must be some integers"),
    "widths-large": ({"widths": np.array([7])}, "widths must be 0 to 6"),
    "ranks-dtype": ({"ranks": np.ones((2, 2, 1))}, "ranks must have dtype int32 and not float64"),
    "rows-missing": ({"query_rows": None}, "must hold query_rows with query_gram"),
}


@pytest.mark.parametrize(("changed", "rule"), WRONG_FILES.values(), ids=WRONG_FILES)
def test_wrong_file_is_named(changed: dict[str, Any], rule: str, tmp_path: Any) -> None:
    good = io.BytesIO()
    group_keys(normal(2, 2, 7, 6), normal(2, 4, 5, 6), rank=2, block_size=4).save(good)
    good.seek(0)
    with np.load(good) as npz:
        arrays = dict(npz) | changed
    path = tmp_path / "keys.npz"
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    with refused(ValueError, f"file: {rule}, got {path}"):
        GroupedKeys.load(path)


def test_another_kind_to_load_is_named(tmp_path: Any) -> None:
    with refused(ValueError, "kind: must be 'numpy', 'cupy' or 'numba', got 'torch'"):
        GroupedKeys.load(tmp_path / "keys.npz", kind="torch")  # type: ignore[arg-type]


def test_pickles_are_not_read(tmp_path: Any) -> None:
    path = tmp_path / "keys.npz"
    np.savez(path, format=np.array([{}], object))
    with pytest.raises(ValueError, match="allow_pickle=False"):
        GroupedKeys.load(path)


def test_file_that_is_something_else_is_named(tmp_path: Any) -> None:
    path = tmp_path / "keys.npz"
    good = io.BytesIO()
    group_keys(normal(2, 2, 7, 6)).save(good)
    one_array = io.BytesIO()
    np.save(one_array, normal(3))
    for content in (b"", b"keys", good.getvalue()[:-30], one_array.getvalue()):
        path.write_bytes(content)
        with pytest.raises(
            ValueError, match=f"^file: must be one that GroupedKeys.save wrote, got {re.escape(str(path))}: "
        ):
            GroupedKeys.load(path)
    with pytest.raises(FileNotFoundError):
        GroupedKeys.load(tmp_path / "none")
