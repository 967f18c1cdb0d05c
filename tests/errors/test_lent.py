"""Is every misuse of stream, workspace and lse named? Device arrays are stand-ins: nothing here reads or launches."""

from __future__ import annotations

import math
import re
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from kit.compare import assert_same_bits

import distrattn_np
from distrattn_np import checks

CALLS = [distrattn_np.distr_attention, distrattn_np.exact_attention]
NUMPY = "numpy array of shape"
CUPY = "cupy array of shape"


class Device:
    """A CuPy array as far as checks look at it."""

    __module__ = "cupy"

    def __init__(self, shape: Any, dtype: Any = np.float32, start: int = 256, device: int = 0, strides: Any = None):
        self.shape, self.dtype = tuple(shape), np.dtype(dtype)
        steps = [math.prod(self.shape[axis + 1 :]) * self.dtype.itemsize for axis in range(len(self.shape))]
        self.strides = tuple(steps if strides is None else strides)
        self.data, self.device = SimpleNamespace(ptr=start), SimpleNamespace(id=device)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {"version": 3, "typestr": self.dtype.str, "data": (self.data.ptr, False), "shape": self.shape}


def on_device(**changed: Any) -> dict[str, Any]:
    """Return a good call with device arrays, some arguments replaced."""
    return {
        "q": Device((2, 4, 5, 6), start=1 << 20),
        "k": Device((2, 2, 7, 6), start=2 << 20),
        "v": Device((2, 2, 7, 3), start=3 << 20),
        "out": Device((2, 4, 5, 3), start=4 << 20),
    } | changed


def on_host(**changed: Any) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    shapes = {"q": (2, 4, 5, 6), "k": (2, 2, 7, 6), "v": (2, 2, 7, 3)}
    return {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()} | changed


def packed_on_host(**changed: Any) -> dict[str, Any]:
    """Return a good call with packed sequences, some arguments replaced."""
    rng = np.random.default_rng(0)
    shapes = {"q": (5, 4, 6), "k": (7, 2, 6), "v": (7, 2, 3)}
    lengths = {"cu_seqlens_q": np.array([0, 2, 5], np.int32), "cu_seqlens_k": np.array([0, 0, 7], np.int32)}
    arrays = {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}
    return arrays | lengths | changed


def packed_with_lse_over_lengths() -> dict[str, Any]:
    lse = np.zeros((4, 5), np.float32)
    lengths = lse.view(np.int32).reshape(-1)[:3]
    lengths[...] = 0, 2, 5
    return packed_on_host(lse=lse, cu_seqlens_q=lengths)


class OtherStream:
    """A package's stream."""

    def __init__(self, handle: Any) -> None:
        self.handle = handle

    def __cuda_stream__(self) -> tuple[int, Any]:
        return 0, self.handle


STREAM = "stream: must be None, an integer handle or a stream with __cuda_stream__, got"
WRONG = {
    "stream-name": (on_device(stream="side"), TypeError, f"{STREAM} 'side'"),
    "stream-bool": (on_device(stream=True), TypeError, f"{STREAM} True"),
    "stream-float": (on_device(stream=1.0), TypeError, f"{STREAM} 1.0"),
    "stream-array": (
        on_device(stream=np.zeros(2)),
        TypeError,
        f"{STREAM} {NUMPY} (2,) and dtype float64",
    ),
    "stream-negative": (on_device(stream=-1), ValueError, "stream: a handle must be at least 0, got -1"),
    "stream-host": (on_host(stream=0), ValueError, "stream: must be None with NumPy arrays, got 0"),
    "workspace-host": (
        on_host(workspace=np.zeros(9, np.uint8)),
        ValueError,
        f"workspace: must be None with NumPy arrays, got {NUMPY} (9,) and dtype uint8",
    ),
    "workspace-list": (
        on_device(workspace=[1]),
        TypeError,
        "workspace: must be a NumPy, CuPy or Numba device array, got list",
    ),
    "workspace-number": (
        on_device(workspace=1 << 20),
        TypeError,
        "workspace: must be a NumPy, CuPy or Numba device array, got int",
    ),
    "workspace-numpy": (
        on_device(workspace=np.zeros(9, np.uint8)),
        TypeError,
        f"workspace: must be a cupy array, as q is, got {NUMPY} (9,) and dtype uint8",
    ),
    "workspace-device": (
        on_device(workspace=Device((9,), np.uint8, device=1)),
        ValueError,
        f"workspace: must be on q's device 0, got {CUPY} (9,) and dtype uint8 on device 1",
    ),
    "workspace-dtype": (
        on_device(workspace=Device((9,), np.int8)),
        TypeError,
        f"workspace: the dtype must be uint8, got {CUPY} (9,) and dtype int8",
    ),
    "workspace-axes": (
        on_device(workspace=Device((9, 1), np.uint8)),
        ValueError,
        f"workspace: must have one axis, got {CUPY} (9, 1) and dtype uint8",
    ),
    "workspace-strided": (
        on_device(workspace=Device((9,), np.uint8, strides=(2,))),
        ValueError,
        f"workspace: must be contiguous, got {CUPY} (9,) and dtype uint8 with strides (2,) bytes",
    ),
    "workspace-address": (
        on_device(workspace=Device((9,), np.uint8, start=0x180)),
        ValueError,
        f"workspace: the address must be a multiple of 256, got {CUPY} (9,) and dtype uint8 at address 0x180",
    ),
    **{
        f"workspace-over-{name}": (
            on_device(workspace=Device((2 << 20,), np.uint8, start=start << 20), lse=Device((2, 4, 5), start=9 << 20)),
            ValueError,
            f"workspace: must not share memory with {name}, got {CUPY} (2097152,) and dtype uint8",
        )
        for name, start in {"q": 1, "v": 3, "out": 4, "lse": 8}.items()
    },
    "lse-list": (on_host(lse=[1.0]), TypeError, "lse: must be a NumPy, CuPy or Numba device array, got list"),
    "lse-kind": (
        on_host(lse=Device((2, 4, 5))),
        TypeError,
        f"lse: must be a numpy array, as q is, got {CUPY} (2, 4, 5) and dtype float32",
    ),
    "lse-dtype": (
        on_host(lse=np.zeros((2, 4, 5))),
        TypeError,
        f"lse: the dtype must be float32, got {NUMPY} (2, 4, 5) and dtype float64",
    ),
    "lse-shape": (
        on_host(lse=np.zeros((2, 5, 4), np.float32)),
        ValueError,
        f"lse: must have shape (B, H, N) = (2, 4, 5), got {NUMPY} (2, 5, 4) and dtype float32",
    ),
    "lse-strided": (
        on_host(lse=np.zeros((2, 5, 4), np.float32).swapaxes(1, 2)),
        ValueError,
        f"lse: must be contiguous, got {NUMPY} (2, 4, 5) and dtype float32 with strides (80, 4, 16) bytes",
    ),
    "packed-stream": (packed_on_host(stream=0), ValueError, "stream: must be None with NumPy arrays, got 0"),
    "packed-workspace": (
        packed_on_host(workspace=np.zeros(9, np.uint8)),
        ValueError,
        f"workspace: must be None with NumPy arrays, got {NUMPY} (9,) and dtype uint8",
    ),
    "packed-lse-shape": (
        packed_on_host(lse=np.zeros((1, 4, 5), np.float32)),
        ValueError,
        f"lse: must have shape (H, N) = (4, 5), got {NUMPY} (1, 4, 5) and dtype float32",
    ),
    "packed-lse-over-lengths": (
        packed_with_lse_over_lengths(),
        ValueError,
        f"lse: must not share memory with cu_seqlens_q, got {NUMPY} (4, 5) and dtype float32",
    ),
    "lse-over-out": (
        on_device(lse=Device((2, 4, 5), start=4 << 20)),
        ValueError,
        f"lse: must not share memory with out, got {CUPY} (2, 4, 5) and dtype float32",
    ),
}


@pytest.mark.parametrize("function", CALLS)
@pytest.mark.parametrize(("call", "error", "message"), WRONG.values(), ids=WRONG)
def test_wrong_stream_workspace_or_lse_is_named(function: Any, call: dict[str, Any], error: Any, message: str) -> None:
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        function(**call)


@pytest.mark.parametrize("shape", [(0, 4, 5), (2, 0, 5), (2, 4, 0)])
def test_empty_lse_is_taken(shape: tuple[int, int, int]) -> None:
    q, k, v = (np.zeros((*shape, width), np.float32) for width in (6, 6, 3))
    lse = np.zeros(shape, np.float32)
    assert distrattn_np.exact_attention(q, k, v, lse=lse, return_lse=True)[1] is lse


def test_read_only_lse_is_named() -> None:
    lse = np.zeros((2, 4, 5), np.float32)
    lse.flags.writeable = False
    message = f"lse: must be writeable, got read-only {NUMPY} (2, 4, 5) and dtype float32"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        distrattn_np.exact_attention(**on_host(lse=lse))


def test_info_does_not_come_out_of_a_workspace() -> None:
    message = "return_info: must be False with workspace, which has no room for it, got True"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        distrattn_np.distr_attention(**on_device(workspace=Device((9,), np.uint8)), return_info=True)


@pytest.mark.parametrize("size", [0, 4095])
def test_workspace_that_is_too_small_is_named(size: int) -> None:
    message = f"workspace: must have at least 4096 bytes, got {CUPY} ({size},) and dtype uint8"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        checks.check_workspace_size(Device((size,), np.uint8), 4096)
    checks.check_workspace_size(Device((4096,), np.uint8), 4096)


@pytest.mark.parametrize(
    ("stream", "handle"),
    [(None, None), (0, 0), (np.int64(7), 7), (OtherStream(5), 5), (OtherStream(np.uint64(1 << 47)), 1 << 47)],
)
def test_streams_that_are_taken(stream: Any, handle: int | None) -> None:
    assert checks.check_stream(stream) == handle


def test_a_stream_that_says_nonsense_is_named() -> None:
    with pytest.raises(TypeError, match=f"^{re.escape(STREAM)} <.*OtherStream object at .*>$"):
        checks.check_stream(OtherStream("five"))


@pytest.mark.parametrize("function", CALLS)
def test_lse_of_packed_sequences_is_written_and_returned(function: Any) -> None:
    expected, expected_lse = function(**packed_on_host(), return_lse=True)
    lse = np.full((4, 5), np.nan, np.float32)
    out, returned = function(**packed_on_host(lse=lse), return_lse=True)
    assert returned is lse
    assert_same_bits(out, expected)
    assert_same_bits(lse, expected_lse)


def test_packed_sequences_on_a_host_need_no_workspace() -> None:
    assert distrattn_np.workspace_size(**packed_on_host()) == 0


def test_grouped_keys_on_a_host_take_lse_and_nothing_else() -> None:
    call = on_host()
    call["k"] = distrattn_np.group_keys(call["k"], rank=2, block_size=3)
    expected, expected_lse = distrattn_np.distr_attention(**call, return_lse=True)
    lse = np.full((2, 4, 5), np.nan, np.float32)
    assert_same_bits(distrattn_np.distr_attention(**call, lse=lse), expected)
    assert_same_bits(lse, expected_lse)
    assert distrattn_np.workspace_size(**call) == 0
    for name, given in (("stream", 0), ("workspace", np.zeros(9, np.uint8))):
        with pytest.raises(ValueError, match=f"^{name}: must be None with NumPy arrays, got "):
            distrattn_np.distr_attention(**call, **{name: given})


def test_merge_on_a_host_takes_no_stream() -> None:
    out, lse = np.zeros((1, 1, 2, 3), np.float32), np.zeros((1, 1, 2), np.float32)
    with pytest.raises(ValueError, match=r"^stream: must be None with NumPy arrays, got 3$"):
        distrattn_np.merge(out, lse, out, lse, stream=3)
    with pytest.raises(TypeError, match=f"^{re.escape(STREAM)} 'x'$"):
        distrattn_np.merge(out, lse, out, lse, stream="x")


def test_workspace_size_names_what_the_call_would() -> None:
    call = on_host()
    with pytest.raises(ValueError, match=r"^rank: must be at most the width 6, got 7$"):
        distrattn_np.workspace_size(**call, rank=7)
    with pytest.raises(TypeError, match=r"^q: must be a NumPy, CuPy or Numba device array, got str$"):
        distrattn_np.workspace_size("q", call["k"], call["v"])
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'rnak'"):
        distrattn_np.workspace_size(**call, rnak=3)
