"""Is every misuse named? One broken argument a test, the whole message, and nothing written."""

from __future__ import annotations

import importlib
import re
import sys
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from kit.compare import assert_same_bits

import distrattn_np
from distrattn_np import backends

DTYPES = "float16, bfloat16, float32, float64"
RNG = np.random.default_rng(0)


def normal(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    return RNG.standard_normal(shape).astype(dtype)


def arguments(**changed: Any) -> dict[str, Any]:
    """Return a good call with some arguments replaced."""
    good = {
        "q": normal(2, 4, 5, 6),
        "k": normal(2, 2, 7, 6),
        "v": normal(2, 2, 7, 3),
        "out": np.full((2, 4, 5, 3), 7, "f4"),
    }
    return good | changed


def misaligned(*shape: int) -> np.ndarray:
    """Return an array whose address is one byte off."""
    raw = np.zeros(int(np.prod(shape)) * 4 + 1, np.uint8)
    return np.ndarray(shape, np.float32, buffer=raw, offset=1)


def field(*shape: int) -> np.ndarray:
    """Return a view whose rows are not a whole number of elements apart."""
    return np.zeros(shape[:3], np.dtype([("row", np.float32, shape[3]), ("tail", np.uint8)]))["row"]


NUMPY = "numpy array of shape"
Q, K, V, OUT = (f"{NUMPY} {shape} and dtype" for shape in ((2, 4, 5, 6), (2, 2, 7, 6), (2, 2, 7, 3), (2, 4, 5, 3)))

WRONG_ARRAYS = {
    "q-list": ({"q": [[1.0]]}, TypeError, "q: must be a NumPy, CuPy or Numba device array, got list"),
    "k-none": ({"k": None}, TypeError, "k: must be a NumPy, CuPy or Numba device array, got NoneType"),
    "v-list": ({"v": [[1.0]]}, TypeError, "v: must be a NumPy, CuPy or Numba device array, got list"),
    "out-list": ({"out": [[1.0]]}, TypeError, "out: must be a NumPy, CuPy or Numba device array, got list"),
    "q-scalar": ({"q": np.float32(1)}, TypeError, "q: must be a NumPy, CuPy or Numba device array, got float32"),
    "k-masked": (
        {"k": np.ma.masked_less(normal(2, 2, 7, 6), 0)},
        TypeError,
        "k: must be a NumPy, CuPy or Numba device array, got MaskedArray",
    ),
    "q-0d": ({"q": np.array(1, "f4")}, ValueError, f"q: must have 4 axes, got {NUMPY} () and dtype float32"),
    "k-3d": ({"k": normal(2, 7, 6)}, ValueError, f"k: must have 4 axes, got {NUMPY} (2, 7, 6) and dtype float32"),
    "v-5d": (
        {"v": normal(1, 2, 2, 7, 3)},
        ValueError,
        f"v: must have 4 axes, got {NUMPY} (1, 2, 2, 7, 3) and dtype float32",
    ),
    "out-3d": ({"out": normal(4, 5, 3)}, ValueError, f"out: must have 4 axes, got {NUMPY} (4, 5, 3) and dtype float32"),
    "q-int": ({"q": np.ones((2, 4, 5, 6), int)}, TypeError, f"q: the dtype must be one of {DTYPES}, got {Q} int64"),
    "k-bool": ({"k": np.ones((2, 2, 7, 6), bool)}, TypeError, f"k: the dtype must be one of {DTYPES}, got {K} bool"),
    "v-complex": (
        {"v": np.ones((2, 2, 7, 3), np.complex64)},
        TypeError,
        f"v: the dtype must be one of {DTYPES}, got {V} complex64",
    ),
    "q-object": (
        {"q": np.ones((2, 4, 5, 6), object)},
        TypeError,
        f"q: the dtype must be one of {DTYPES}, got {Q} object",
    ),
    "q-big-endian": (
        {"q": normal(2, 4, 5, 6, dtype=">f4")},
        TypeError,
        f"q: the dtype must be one of {DTYPES}, got {Q} >f4",
    ),
    "q-float8": (
        {"q": normal(2, 4, 5, 6, dtype=ml_dtypes.float8_e4m3fn)},
        TypeError,
        f"q: the dtype must be one of {DTYPES}, got {Q} float8_e4m3fn",
    ),
    "k-other-dtype": (
        {"k": normal(2, 2, 7, 6, dtype="f8")},
        TypeError,
        f"k: must have q's dtype float32, got {K} float64",
    ),
    "v-other-dtype": (
        {"v": normal(2, 2, 7, 3, dtype="f2")},
        TypeError,
        f"v: must have q's dtype float32, got {V} float16",
    ),
    "v-bfloat16": (
        {"v": normal(2, 2, 7, 3, dtype=ml_dtypes.bfloat16)},
        TypeError,
        f"v: must have q's dtype float32, got {V} bfloat16",
    ),
    "out-other-dtype": (
        {"out": np.zeros((2, 4, 5, 3), "f8")},
        TypeError,
        f"out: must have q's dtype float32, got {OUT} float64",
    ),
    "q-transposed": (
        {"q": normal(2, 4, 6, 5).swapaxes(2, 3)},
        ValueError,
        f"q: the last axis must be contiguous, got {Q} float32 with strides (480, 120, 4, 20) bytes",
    ),
    "k-reversed": (
        {"k": normal(2, 2, 7, 6)[..., ::-1]},
        ValueError,
        f"k: the last axis must be contiguous, got {K} float32 with strides (336, 168, 24, -4) bytes",
    ),
    "v-every-second": (
        {"v": normal(2, 2, 7, 6)[..., ::2]},
        ValueError,
        f"v: the last axis must be contiguous, got {V} float32 with strides (336, 168, 24, 8) bytes",
    ),
    "out-broadcast-width": (
        {"out": np.lib.stride_tricks.as_strided(np.zeros((2, 4, 5, 1), "f4"), (2, 4, 5, 3), (80, 20, 4, 0))},
        ValueError,
        f"out: the last axis must be contiguous, got {OUT} float32 with strides (80, 20, 4, 0) bytes",
    ),
    "k-odd-strides": (
        {"k": field(2, 2, 7, 6)},
        ValueError,
        f"k: strides must be multiples of the element size, got {K} float32 with strides (350, 175, 25, 4) bytes",
    ),
    "q-no-width": (
        {"q": normal(2, 4, 5, 0)},
        ValueError,
        f"q: the last axis must have 1 to 256 elements, got {NUMPY} (2, 4, 5, 0) and dtype float32",
    ),
    "q-too-wide": (
        {"q": normal(2, 4, 5, 258)},
        ValueError,
        f"q: the last axis must have 1 to 256 elements, got {NUMPY} (2, 4, 5, 258) and dtype float32",
    ),
    "v-no-width": (
        {"v": normal(2, 2, 7, 0)},
        ValueError,
        f"v: the last axis must have 1 to 256 elements, got {NUMPY} (2, 2, 7, 0) and dtype float32",
    ),
    "v-too-wide": (
        {"v": normal(2, 2, 7, 257)},
        ValueError,
        f"v: the last axis must have 1 to 256 elements, got {NUMPY} (2, 2, 7, 257) and dtype float32",
    ),
    "k-batch": (
        {"k": normal(1, 2, 7, 6)},
        ValueError,
        f"k: must have q's batch size 2, got {NUMPY} (1, 2, 7, 6) and dtype float32",
    ),
    "v-batch": (
        {"v": normal(3, 2, 7, 3)},
        ValueError,
        f"v: must have q's batch size 2, got {NUMPY} (3, 2, 7, 3) and dtype float32",
    ),
    "k-width": (
        {"k": normal(2, 2, 7, 8)},
        ValueError,
        f"k: must have q's width 6, got {NUMPY} (2, 2, 7, 8) and dtype float32",
    ),
    "k-heads": (
        {"k": normal(2, 3, 7, 6)},
        ValueError,
        f"k: the number of heads must divide q's 4, got {NUMPY} (2, 3, 7, 6) and dtype float32",
    ),
    "k-more-heads": (
        {"k": normal(2, 8, 7, 6)},
        ValueError,
        f"k: the number of heads must divide q's 4, got {NUMPY} (2, 8, 7, 6) and dtype float32",
    ),
    "k-no-heads": (
        {"k": normal(2, 0, 7, 6)},
        ValueError,
        f"k: the number of heads must divide q's 4, got {NUMPY} (2, 0, 7, 6) and dtype float32",
    ),
    "v-heads": (
        {"v": normal(2, 4, 7, 3)},
        ValueError,
        f"v: must have k's 2 heads, got {NUMPY} (2, 4, 7, 3) and dtype float32",
    ),
    "v-rows": (
        {"v": normal(2, 2, 8, 3)},
        ValueError,
        f"v: must have k's 7 rows, got {NUMPY} (2, 2, 8, 3) and dtype float32",
    ),
    "out-shape": (
        {"out": np.zeros((2, 4, 5, 6), "f4")},
        ValueError,
        f"out: must have shape (2, 4, 5, 3), got {NUMPY} (2, 4, 5, 6) and dtype float32",
    ),
    "out-other-layout": (
        {"out": np.zeros((2, 5, 4, 3), "f4")},
        ValueError,
        f"out: must have shape (2, 4, 5, 3), got {NUMPY} (2, 5, 4, 3) and dtype float32",
    ),
    "out-broadcast": (
        {"out": np.lib.stride_tricks.as_strided(np.zeros((2, 1, 5, 3), "f4"), (2, 4, 5, 3), (60, 0, 12, 4))},
        ValueError,
        f"out: elements must not share memory, got {OUT} float32 with strides (60, 0, 12, 4) bytes",
    ),
    "out-sliding": (
        {"out": np.lib.stride_tricks.as_strided(np.zeros(200, "f4"), (2, 4, 5, 3), (240, 60, 4, 4))},
        ValueError,
        f"out: elements must not share memory, got {OUT} float32 with strides (240, 60, 4, 4) bytes",
    ),
}

SCORES = "(B, H, N, M) = (2, 4, 5, 7)"
WRONG_SCORE_ARRAYS = {
    **{
        f"{name}-{kind}": (
            {name: value},
            TypeError,
            f"{name}: must be a NumPy, CuPy or Numba device array, got {type(value).__name__}",
        )
        for name in ("mask", "bias")
        for kind, value in (("list", [[True]]), ("bool", True), ("number", 1.0), ("name", "causal"))
    },
    "mask-float": (
        {"mask": normal(5, 7)},
        TypeError,
        f"mask: the dtype must be bool, got {NUMPY} (5, 7) and dtype float32",
    ),
    "mask-uint8": (
        {"mask": np.ones((5, 7), np.uint8)},
        TypeError,
        f"mask: the dtype must be bool, got {NUMPY} (5, 7) and dtype uint8",
    ),
    "mask-masked": (
        {"mask": np.ma.masked_all((5, 7), bool)},
        TypeError,
        "mask: must be a NumPy, CuPy or Numba device array, got MaskedArray",
    ),
    "bias-bool": (
        {"bias": np.ones((5, 7), bool)},
        TypeError,
        f"bias: the dtype must be float32, got {NUMPY} (5, 7) and dtype bool",
    ),
    "bias-double": (
        {"bias": normal(5, 7, dtype="f8")},
        TypeError,
        f"bias: the dtype must be float32, got {NUMPY} (5, 7) and dtype float64",
    ),
    "bias-half": (
        {"bias": normal(5, 7, dtype="f2")},
        TypeError,
        f"bias: the dtype must be float32, got {NUMPY} (5, 7) and dtype float16",
    ),
    "bias-big-endian": (
        {"bias": normal(5, 7, dtype=">f4")},
        TypeError,
        f"bias: the dtype must be float32, got {NUMPY} (5, 7) and dtype >f4",
    ),
    "bias-double-for-half": (
        {name: normal(*shape, dtype="f2") for name, shape in (("q", (2, 4, 5, 6)), ("k", (2, 2, 7, 6)))}
        | {"v": normal(2, 2, 7, 3, dtype="f2"), "out": np.zeros((2, 4, 5, 3), "f2"), "bias": normal(7, dtype="f8")},
        TypeError,
        f"bias: the dtype must be float16 or float32, got {NUMPY} (7,) and dtype float64",
    ),
    **{
        f"mask-{'x'.join(map(str, shape))}": (
            {"mask": np.ones(shape, bool)},
            ValueError,
            f"mask: must broadcast to {SCORES}, got {NUMPY} {shape} and dtype bool",
        )
        for shape in ((5,), (7, 5), (4, 7), (2, 5, 7), (2, 2, 5, 7), (0, 1), (1, 2, 4, 5, 7), (2, 5, 4, 7))
    },
    "bias-kv-heads": (
        {"bias": normal(2, 2, 5, 7)},
        ValueError,
        f"bias: must broadcast to {SCORES}, got {NUMPY} (2, 2, 5, 7) and dtype float32",
    ),
    "bias-odd-strides": (
        {"bias": field(2, 4, 5, 7)},
        ValueError,
        f"bias: strides must be multiples of the element size, got {NUMPY} (2, 4, 5, 7) and dtype float32 "
        "with strides (580, 145, 29, 4) bytes",
    ),
}

SCALE = "scale: must be a finite number in the range of float32, got"
SCALES = [float("nan"), float("inf"), -float("inf"), 1e39, 10**400, True, "0.5", 1j]
SOFTCAP = "softcap: must be 0 or a positive finite number in the range of float32, got"
WINDOW = "window: must be None or (left, right), each None or an integer of at least 0, got"
CAUSAL = "causal: must be True, False, 'bottom-right' or 'top-left', got"

WRONG_OPTIONS = {
    **{f"scale-{str(x)[:5]}": ({"scale": x}, f"{SCALE} {x!r}") for x in SCALES},
    "scale-array": (
        {"scale": np.ones(2)},
        f"{SCALE} numpy array of shape (2,) and dtype float64",
    ),
    "causal-none": ({"causal": None}, f"{CAUSAL} None"),
    "causal-one": ({"causal": 1}, f"{CAUSAL} 1"),
    "causal-name": ({"causal": "lower"}, f"{CAUSAL} 'lower'"),
    "causal-array": ({"causal": np.ones(2, bool)}, f"{CAUSAL} numpy array of shape (2,) and dtype bool"),
    **{
        f"softcap-{str(x)[:5]}": ({"softcap": x}, f"{SOFTCAP} {x!r}")
        for x in (-1.0, float("nan"), float("inf"), 1e39, 1e-39, True, None, "0.5", 1j)
    },
    "softcap-array": ({"softcap": np.ones(2)}, f"{SOFTCAP} numpy array of shape (2,) and dtype float64"),
    **{
        f"window-{str(x)[:9]}": ({"window": x}, f"{WINDOW} {x!r}")
        for x in (3, (3,), (1, 2, 3), (-1, 0), (0, -1), (1.0, 0), (True, 0), ("1", 0), {1, 2}, "ab", (None, 2.5))
    },
    "window-array": ({"window": np.ones(2, int)}, f"{WINDOW} numpy array of shape (2,) and dtype int64"),
    **{
        f"return_lse-{str(x)[:4]}": ({"return_lse": x}, f"return_lse: must be True or False, got {x!r}")
        for x in (None, 1, "yes")
    },
    "return_lse-array": (
        {"return_lse": np.ones(0)},
        "return_lse: must be True or False, got numpy array of shape (0,) and dtype float64",
    ),
    "layout-name": ({"layout": "nbhd"}, "layout: must be 'bhnd' or 'bnhd', got 'nbhd'"),
    "layout-none": ({"layout": None}, "layout: must be 'bhnd' or 'bnhd', got None"),
    "backend-name": ({"backend": "torch"}, "backend: must be 'numpy', 'cupy' or 'numba', got 'torch'"),
    "backend-module": ({"backend": 3}, "backend: must be 'numpy', 'cupy' or 'numba', got 3"),
}

SCORE_TOL = "score_tol: must be a positive finite number in the range of float32, got"
SCORE_TOLS = [0, -0.5, float("nan"), float("inf"), 1e39, True, "0.1", 1j]

WRONG_GROUPING = {
    "method": ({"method": "subspace!"}, "method: must be 'subspace' or 'lsh', got 'subspace!'"),
    "method-none": ({"method": None}, "method: must be 'subspace' or 'lsh', got None"),
    "fusion": ({"method": "lsh", "fusion": "mean"}, "fusion: must be 'sum' or 'lstsq', got 'mean'"),
    "fusion-of-subspace": ({"fusion": "sum"}, "fusion: must be None with method='subspace', got 'sum'"),
    "rank-of-lsh": ({"method": "lsh", "rank": 3}, "rank: must be None with method='lsh', got 3"),
    "score_tol-of-lsh": ({"method": "lsh", "score_tol": 0.1}, "score_tol: must be None with method='lsh', got 0.1"),
    "rank-and-group_size": ({"group_size": 2, "rank": 3}, "rank: must be None with group_size, got 3"),
    "score_tol-and-group_size": (
        {"group_size": 2, "score_tol": 0.1},
        "score_tol: must be None with group_size, got 0.1",
    ),
    "score_tol-and-rank": ({"rank": 3, "score_tol": 0.1}, "score_tol: must be None with rank, got 0.1"),
    "rank-too-large": ({"rank": 7}, "rank: must be at most the width 6, got 7"),
    **{f"score_tol-{str(x)[:5]}": ({"score_tol": x}, f"{SCORE_TOL} {x!r}") for x in SCORE_TOLS},
    "score_tol-array": (
        {"score_tol": np.ones(2)},
        f"{SCORE_TOL} numpy array of shape (2,) and dtype float64",
    ),
    "group_by": ({"group_by": "values"}, "group_by: must be 'queries' or 'keys', got 'values'"),
    "group_size-not-a-divisor": ({"group_size": 4}, "group_size: must divide the width 6, got 4"),
    "group_size-too-large": ({"group_size": 12}, "group_size: must divide the width 6, got 12"),
    "group_size-of-lsh": ({"method": "lsh", "group_size": 4}, "group_size: must divide the width 6, got 4"),
    "group_size-default": (
        {"q": normal(2, 4, 5, 7), "k": normal(2, 2, 7, 7)},
        "group_size: must divide the width 7, got 2",
    ),
    **{
        f"{name}-{value}": ({name: value}, f"{name}: must be an integer of at least {least}, got {value!r}")
        for name, least in (("group_size", 1), ("rank", 1), ("refine", 0), ("block_size", 1), ("seed", 0))
        for value in (least - 1, True, 2.0, "2", np.True_)
    },
    "return_info": ({"return_info": 1}, "return_info: must be True or False, got 1"),
    "refine-none": ({"refine": None}, "refine: must be an integer of at least 0, got None"),
    "seed-none": ({"seed": None}, "seed: must be an integer of at least 0, got None"),
}


def assert_refused(function: Any, changed: dict[str, Any], error: type[Exception], message: str) -> None:
    """Assert that the call fails with exactly this message and leaves every array as it was."""
    call = arguments(**changed)
    arrays = {name: x for name, x in call.items() if isinstance(x, np.ndarray) and x.dtype != object}
    before = {name: x.copy() for name, x in arrays.items()}
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        function(**call)
    for name, array in arrays.items():
        assert_same_bits(array, before[name], context=name)


@pytest.mark.parametrize("function", [distrattn_np.distr_attention, distrattn_np.exact_attention])
@pytest.mark.parametrize(("changed", "error", "message"), WRONG_ARRAYS.values(), ids=WRONG_ARRAYS)
def test_wrong_array_is_named(function: Any, changed: dict[str, Any], error: type[Exception], message: str) -> None:
    assert_refused(function, changed, error, message)


@pytest.mark.parametrize("function", [distrattn_np.distr_attention, distrattn_np.exact_attention])
@pytest.mark.parametrize(("changed", "error", "message"), WRONG_SCORE_ARRAYS.values(), ids=WRONG_SCORE_ARRAYS)
def test_wrong_mask_or_bias_is_named(
    function: Any, changed: dict[str, Any], error: type[Exception], message: str
) -> None:
    assert_refused(function, changed, error, message)


@pytest.mark.parametrize("function", [distrattn_np.distr_attention, distrattn_np.exact_attention])
@pytest.mark.parametrize(("changed", "message"), WRONG_OPTIONS.values(), ids=WRONG_OPTIONS)
def test_wrong_option_is_named(function: Any, changed: dict[str, Any], message: str) -> None:
    assert_refused(function, changed, ValueError, message)


@pytest.mark.parametrize(("changed", "message"), WRONG_GROUPING.values(), ids=WRONG_GROUPING)
def test_wrong_grouping_is_named(changed: dict[str, Any], message: str) -> None:
    assert_refused(distrattn_np.distr_attention, {"method": "subspace"} | changed, ValueError, message)


def test_misaligned_array_is_named() -> None:
    q = misaligned(2, 4, 5, 6)
    address = q.__array_interface__["data"][0]
    message = f"q: the address must be a multiple of the element size, got {Q} float32 at address {address:#x}"
    assert_refused(distrattn_np.exact_attention, {"q": q}, ValueError, message)


def test_read_only_out_is_named() -> None:
    out = np.zeros((2, 4, 5, 3), np.float32)
    out.flags.writeable = False
    message = f"out: must be writeable, got read-only {OUT} float32"
    assert_refused(distrattn_np.exact_attention, {"out": out}, ValueError, message)


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_out_over_an_input_is_named(name: str) -> None:
    call = {"q": normal(2, 2, 5, 6), "k": normal(2, 2, 5, 6), "v": normal(2, 2, 5, 6)}
    message = f"out: must not share memory with {name}, got {NUMPY} (2, 2, 5, 6) and dtype float32"
    assert_refused(distrattn_np.exact_attention, call | {"out": call[name]}, ValueError, message)


@pytest.mark.parametrize("name", ["mask", "bias"])
def test_out_over_a_mask_or_bias_is_named(name: str) -> None:
    out = np.zeros((2, 4, 5, 3), np.float32)
    over = out[0, 0, 0, :1].view(bool)[:1] if name == "mask" else out[0, 0, 0, :1]
    message = f"out: must not share memory with {name}, got {OUT} float32"
    assert_refused(distrattn_np.exact_attention, {"out": out, name: over}, ValueError, message)


def test_misaligned_bias_is_named() -> None:
    bias = misaligned(1, 1, 5, 7)
    address = bias.__array_interface__["data"][0]
    shown = f"{NUMPY} (1, 1, 5, 7) and dtype float32 at address {address:#x}"
    message = f"bias: the address must be a multiple of the element size, got {shown}"
    assert_refused(distrattn_np.exact_attention, {"bias": bias}, ValueError, message)


def test_options_that_change_nothing_are_taken_by_every_backend() -> None:
    pytest.importorskip("numba.cuda")
    call = arguments(out=None)
    expected = distrattn_np.exact_attention(**call, backend="numba")
    got = distrattn_np.exact_attention(**call, backend="numba", window=(None, None), softcap=0, mask=None, bias=None)
    assert_same_bits(got, expected)


def test_out_over_the_end_of_an_input_is_named() -> None:
    buffer = normal(3, 2, 5, 6)
    message = f"out: must not share memory with v, got {NUMPY} (2, 2, 5, 6) and dtype float32"
    call = {"q": normal(2, 2, 5, 6), "k": normal(2, 2, 5, 6), "v": buffer[:2], "out": buffer[1:]}
    assert_refused(distrattn_np.exact_attention, call, ValueError, message)


def test_out_between_the_inputs_of_one_buffer_is_accepted() -> None:
    """Interleaved views of one buffer have overlapping address ranges but no element in common."""
    buffer = normal(2, 5, 4, 3, 8)
    q, k, v, out = (buffer[:, :, i] for i in range(4))
    expected = distrattn_np.distr_attention(q.copy(), k.copy(), v.copy(), layout="bnhd")
    assert distrattn_np.distr_attention(q, k, v, layout="bnhd", out=out) is out
    assert_same_bits(np.ascontiguousarray(out), expected)


@pytest.mark.parametrize("causal", [True, False])
def test_numpy_bool_is_a_bool(causal: bool) -> None:
    q, k, v = (normal(1, 1, 4, 4) for _ in range(3))
    got = distrattn_np.distr_attention(q, k, v, causal=np.bool_(causal))
    assert_same_bits(got, distrattn_np.distr_attention(q, k, v, causal=causal))


def test_numpy_numbers_are_numbers() -> None:
    q, k, v = (normal(1, 1, 4, 4) for _ in range(3))
    for method, options in (
        ("lsh", {"group_size": 2, "block_size": 3, "seed": 5}),
        ("subspace", {"rank": 3, "refine": 2}),
    ):
        given = {name: np.uint8(value) for name, value in options.items()}
        got = distrattn_np.distr_attention(q, k, v, method=method, scale=np.float32(0.5), **given)
        assert_same_bits(got, distrattn_np.distr_attention(q, k, v, method=method, scale=0.5, **options))
    got = distrattn_np.distr_attention(q, k, v, method="subspace", score_tol=np.float32(0.5))
    assert_same_bits(got, distrattn_np.distr_attention(q, k, v, method="subspace", score_tol=0.5))


def test_backend_that_does_not_build_the_method_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends.load_by_name("numpy"), "builds_subspace", False)
    message = f"method: 'subspace' is not built for the numpy backend yet, got {Q} float32"
    assert_refused(distrattn_np.distr_attention, {"method": "subspace"}, NotImplementedError, message)


def test_read_only_inputs_are_accepted() -> None:
    arrays = [normal(1, 2, 5, 4) for _ in range(3)]
    expected = distrattn_np.distr_attention(*arrays)
    for array in arrays:
        array.flags.writeable = False
    assert_same_bits(distrattn_np.distr_attention(*arrays), expected)


def test_broadcast_inputs_are_accepted() -> None:
    q, k, v = normal(2, 2, 5, 4), normal(1, 1, 7, 4), normal(1, 1, 7, 4)
    wide = [np.broadcast_to(x, (2, 2, 7, 4)) for x in (k, v)]
    expected = distrattn_np.distr_attention(q, *(x.copy() for x in wide))
    assert_same_bits(distrattn_np.distr_attention(q, *wide), expected)


@pytest.mark.parametrize(("name", "array"), [("mask", np.ones((5, 7), bool)), ("bias", np.ones((5, 7), np.float32))])
def test_mask_or_bias_of_another_kind_is_named(name: str, array: np.ndarray) -> None:
    cuda = pytest.importorskip("numba.cuda")
    message = f"{name}: must be a numpy array, as q is, got numba array of shape (5, 7) and dtype {array.dtype}"
    assert_refused(distrattn_np.exact_attention, {name: cuda.to_device(array)}, TypeError, message)


@pytest.mark.parametrize("name", ["k", "v", "out"])
def test_mixed_kinds_are_named(name: str) -> None:
    cuda = pytest.importorskip("numba.cuda")
    call = arguments()
    call[name] = cuda.to_device(call[name])
    shape = {"k": K, "v": V, "out": OUT}[name].replace("numpy", "numba")
    with pytest.raises(
        TypeError, match=f"^{re.escape(f'{name}: must be a numpy array, as q is, got {shape} float32')}$"
    ):
        distrattn_np.exact_attention(**call)


def test_backend_that_does_not_take_the_kind_is_named() -> None:
    cuda = pytest.importorskip("numba.cuda")
    q, k, v = (cuda.to_device(normal(1, 1, 4, 4)) for _ in range(3))
    message = "q: the numpy backend takes numpy arrays, got numba array of shape (1, 1, 4, 4) and dtype float32"
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        distrattn_np.distr_attention(q, k, v, backend="numpy")


@pytest.mark.parametrize("name", ["cupy", "numba"])
def test_missing_package_says_what_to_install(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)  # importing it fails now
    monkeypatch.delitem(sys.modules, f"distrattn_np.backends.{name}_backend", raising=False)
    for module in [module for module in sys.modules if module.startswith("distrattn_np.numba_kernels")]:
        monkeypatch.delitem(sys.modules, module)
    load = importlib.import_module("distrattn_np.backends").load_by_name.__wrapped__  # past the cache
    message = f"backend: {name!r} needs a package that is not installed: {backends.INSTALL[name]}"
    with pytest.raises(ImportError, match=f"^{re.escape(message)}$"):
        load(name)


LSE = f"{NUMPY} (2, 4, 5) and dtype"
WRONG_MERGES = {
    "out_a-list": ({"out_a": [1.0]}, TypeError, "out_a: must be a NumPy, CuPy or Numba device array, got list"),
    "out_b-none": ({"out_b": None}, TypeError, "out_b: must be a NumPy, CuPy or Numba device array, got NoneType"),
    "lse_b-none": ({"lse_b": None}, TypeError, "lse_b: must be a NumPy, CuPy or Numba device array, got NoneType"),
    "out_a-3d": (
        {"out_a": normal(4, 5, 3)},
        ValueError,
        f"out_a: must have 4 axes, got {NUMPY} (4, 5, 3) and dtype float32",
    ),
    "out_a-no-width": (
        {"out_a": normal(2, 4, 5, 0), "out_b": normal(2, 4, 5, 0)},
        ValueError,
        f"out_a: the last axis must not be empty, got {NUMPY} (2, 4, 5, 0) and dtype float32",
    ),
    "out_b-dtype": (
        {"out_b": normal(2, 4, 5, 3, dtype="f8")},
        TypeError,
        f"out_b: must have out_a's dtype float32, got {OUT} float64",
    ),
    "out_b-shape": (
        {"out_b": normal(2, 4, 6, 3)},
        ValueError,
        f"out_b: must have out_a's shape (2, 4, 5, 3), got {NUMPY} (2, 4, 6, 3) and dtype float32",
    ),
    "lse_a-dtype": (
        {"lse_a": normal(2, 4, 5, dtype="f8")},
        TypeError,
        f"lse_a: the dtype must be float32, got {LSE} float64",
    ),
    "lse_b-shape": (
        {"lse_b": normal(2, 5, 4)},
        ValueError,
        f"lse_b: must have shape (B, H, N) = (2, 4, 5), got {NUMPY} (2, 5, 4) and dtype float32",
    ),
    "lse_a-layout": (
        {"layout": "bnhd"},
        ValueError,
        f"lse_a: must have shape (B, H, N) = (2, 5, 4), got {LSE} float32",
    ),
    "layout": ({"layout": "thd"}, ValueError, "layout: must be 'bhnd' or 'bnhd', got 'thd'"),
}


@pytest.mark.parametrize(("changed", "error", "message"), WRONG_MERGES.values(), ids=WRONG_MERGES)
def test_wrong_argument_of_merge_is_named(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    good = {
        "out_a": normal(2, 4, 5, 3),
        "lse_a": normal(2, 4, 5),
        "out_b": normal(2, 4, 5, 3),
        "lse_b": normal(2, 4, 5),
    }
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        distrattn_np.merge(**good | changed)


KEYS = f"{NUMPY} (2, 4, 6, 3) and dtype"
WRONG_POOLINGS = {
    "k-list": ({"k": [1.0]}, TypeError, "k: must be a NumPy or CuPy array, got list"),
    "k-3d": ({"k": normal(4, 6, 3)}, ValueError, f"k: must have 4 axes, got {NUMPY} (4, 6, 3) and dtype float32"),
    "k-integer": (
        {"k": normal(2, 4, 6, 3, dtype="i4")},
        TypeError,
        f"k: the dtype must be one of float16, bfloat16, float32, float64, got {KEYS} int32",
    ),
    "k-no-width": (
        {"k": normal(2, 4, 6, 0)},
        ValueError,
        f"k: the last axis must have 1 to 256 elements, got {NUMPY} (2, 4, 6, 0) and dtype float32",
    ),
    "v-none": ({"v": None}, TypeError, "v: must be a NumPy, CuPy or Numba device array, got NoneType"),
    "v-dtype": (
        {"v": normal(2, 4, 6, 3, dtype="f8")},
        TypeError,
        f"v: must have k's dtype float32, got {KEYS} float64",
    ),
    "v-batch": (
        {"v": normal(1, 4, 6, 5)},
        ValueError,
        f"v: must have k's batch size, 2, got {NUMPY} (1, 4, 6, 5) and dtype float32",
    ),
    "v-heads": (
        {"v": normal(2, 2, 6, 5)},
        ValueError,
        f"v: must have k's heads, 4, got {NUMPY} (2, 2, 6, 5) and dtype float32",
    ),
    "v-rows": (
        {"v": normal(2, 4, 7, 5)},
        ValueError,
        f"v: must have k's rows, 6, got {NUMPY} (2, 4, 7, 5) and dtype float32",
    ),
    "size-zero": ({"size": 0}, ValueError, "size: must be an integer of at least 1, got 0"),
    "size-real": ({"size": 2.0}, ValueError, "size: must be an integer of at least 1, got 2.0"),
    "layout": ({"layout": "nhd"}, ValueError, "layout: must be 'bhnd' or 'bnhd', got 'nhd'"),
}
WRONG_PROJECTIONS = {
    "v-list": ({"v": [1.0]}, TypeError, "v: must be a NumPy or CuPy array, got list"),
    "v-3d": ({"v": normal(4, 6, 3)}, ValueError, f"v: must have 4 axes, got {NUMPY} (4, 6, 3) and dtype float32"),
    "v-no-width": (
        {"v": normal(2, 4, 6, 0)},
        ValueError,
        f"v: the last axis must have 1 to 256 elements, got {NUMPY} (2, 4, 6, 0) and dtype float32",
    ),
    "rank-zero": ({"rank": 0}, ValueError, "rank: must be an integer of 1 to 3, got 0"),
    "rank-wide": ({"rank": 4}, ValueError, "rank: must be an integer of 1 to 3, got 4"),
    "rank-real": ({"rank": 2.0}, ValueError, "rank: must be an integer of 1 to 3, got 2.0"),
    "layout": ({"layout": "nhd"}, ValueError, "layout: must be 'bhnd' or 'bnhd', got 'nhd'"),
}
WRONG_RESTORINGS = {
    "out-none": ({"out": None}, TypeError, "out: must be a NumPy, CuPy or Numba device array, got NoneType"),
    "out-batch": (
        {"out": normal(1, 4, 5, 2)},
        ValueError,
        f"out: must have v's batch size 2, got {NUMPY} (1, 4, 5, 2) and dtype float32",
    ),
    "out-heads": (
        {"out": normal(2, 6, 5, 2)},
        ValueError,
        f"out: v's 4 heads must divide the number of heads, got {NUMPY} (2, 6, 5, 2) and dtype float32",
    ),
    "out-width": (
        {"out": normal(2, 8, 5, 3)},
        ValueError,
        f"out: must have the width of the projected values, 2, got {NUMPY} (2, 8, 5, 3) and dtype float32",
    ),
    "lse-list": ({"lse": [1.0]}, TypeError, "lse: must be a NumPy, CuPy or Numba device array, got list"),
    "lse-dtype": (
        {"lse": normal(2, 8, 5, dtype="f8")},
        TypeError,
        f"lse: the dtype must be float32, got {NUMPY} (2, 8, 5) and dtype float64",
    ),
    "lse-shape": (
        {"lse": normal(2, 5, 8)},
        ValueError,
        f"lse: must have shape (B, H, N) = (2, 8, 5), got {NUMPY} (2, 5, 8) and dtype float32",
    ),
}


@pytest.mark.parametrize(("changed", "error", "message"), WRONG_POOLINGS.values(), ids=WRONG_POOLINGS)
def test_wrong_argument_of_pool_keys_is_named(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    good = {"k": normal(2, 4, 6, 3), "v": normal(2, 4, 6, 5), "size": 2}
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        distrattn_np.pool_keys(**good | changed)


@pytest.mark.parametrize(("changed", "error", "message"), WRONG_PROJECTIONS.values(), ids=WRONG_PROJECTIONS)
def test_wrong_argument_of_project_values_is_named(
    changed: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        distrattn_np.project_values(**{"v": normal(2, 4, 6, 3), "rank": 2} | changed)


@pytest.mark.parametrize(("changed", "error", "message"), WRONG_RESTORINGS.values(), ids=WRONG_RESTORINGS)
def test_wrong_argument_of_restore_is_named(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    projected = distrattn_np.project_values(normal(2, 4, 6, 3), 2)
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        projected.restore(**{"out": normal(2, 8, 5, 2)} | changed)


@pytest.mark.parametrize("name", ["lse_a", "out_b", "lse_b"])
def test_mixed_kinds_of_merge_are_named(name: str) -> None:
    cuda = pytest.importorskip("numba.cuda")
    good = {name: normal(2, 4, 5, *([3] if "out" in name else [])) for name in ("out_a", "lse_a", "out_b", "lse_b")}
    shape = (OUT if "out" in name else LSE).replace("numpy", "numba")
    message = f"{name}: must be a numpy array, as out_a is, got {shape} float32"
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        distrattn_np.merge(**good | {name: cuda.to_device(good[name])})
