"""The question: are arrays of other packages taken where they are, and refused by name where they cannot be."""

from __future__ import annotations

import array
import ctypes
import re
import subprocess
import sys
import types
from typing import Any, ClassVar

import ml_dtypes
import numpy as np
import pytest
from kit.compare import assert_same_bits

from distrattn_np import distr_attention, exact_attention
from distrattn_np.arrays import in_place, kind_of

SHAPES = {"q": (1, 4, 9, 8), "k": (1, 2, 11, 8), "v": (1, 2, 11, 5)}
BFLOAT16_CODE = 4


def normal(dtype: Any = np.float32, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in SHAPES.items()}


class Exporter:
    """What a package may be of which nothing is known but DLPack, version 1."""

    device = (1, 0)

    def __init__(self, memory: np.ndarray) -> None:
        self.memory = memory

    def __dlpack__(self, **options: Any) -> Any:
        return self.memory.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device


class OldExporter(Exporter):
    """The same before version 1: it can say neither that its memory is read-only nor that it is not."""

    def __dlpack__(self, stream: Any = None) -> Any:
        return self.memory.__dlpack__()


def bfloat16_exporter(base: type[Exporter]) -> type[Exporter]:
    """Return an exporter of 16-bit integers that calls them bfloat16."""

    class Bfloat16Exporter(base):
        def __dlpack__(self, **options: Any) -> Any:
            capsule = super().__dlpack__(**options)
            get_name = ctypes.PYFUNCTYPE(ctypes.c_char_p, ctypes.py_object)(("PyCapsule_GetName", ctypes.pythonapi))
            get_address = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
                ("PyCapsule_GetPointer", ctypes.pythonapi)
            )
            name = get_name(capsule)
            # data, device, ndim: 20 bytes; the version, context, deleter and flags of the newer form: 32
            offset = 20 + (32 if name == b"dltensor_versioned" else 0)
            ctypes.c_uint8.from_address(get_address(capsule, name) + offset).value = BFLOAT16_CODE
            return capsule

    return Bfloat16Exporter


def assert_taken(given: dict[str, Any], arrays: dict[str, np.ndarray], **options: Any) -> None:
    """Assert that the call gives what it gives for the NumPy arrays."""
    for name, x in given.items():
        view = in_place(x)
        assert kind_of(view) == "numpy"
        assert view.dtype == arrays[name].dtype
        assert view.shape == arrays[name].shape
    for call in (distr_attention, exact_attention):
        out, lse = call(**given, **options, return_lse=True)
        expected, expected_lse = call(**arrays, **options, return_lse=True)
        assert_same_bits(out, expected)
        assert_same_bits(lse, expected_lse)


@pytest.mark.parametrize("exporter", [Exporter, OldExporter])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_dlpack_alone_is_enough(exporter: type[Exporter], dtype: str) -> None:
    arrays = normal(dtype)
    assert_taken({name: exporter(x) for name, x in arrays.items()}, arrays)
    assert all(np.shares_memory(in_place(exporter(x)), x) for x in arrays.values())


@pytest.mark.parametrize("base", [Exporter, OldExporter])
def test_bfloat16_by_dlpack(base: type[Exporter]) -> None:
    arrays = normal(ml_dtypes.bfloat16)
    exporter = bfloat16_exporter(base)
    given = {name: exporter(x.view(np.uint16)) for name, x in arrays.items()}
    assert_taken(given, arrays)
    view = in_place(given["q"])
    assert np.shares_memory(view.view(np.uint16), arrays["q"].view(np.uint16))
    assert view.flags.writeable == (base is Exporter)


def test_bfloat16_keeps_its_memory_and_strides() -> None:
    """The view outlives its exporter; offsets, strides and read-only memory come through."""
    base = np.arange(240, dtype=np.float32).reshape(4, 6, 10).astype(ml_dtypes.bfloat16)
    expected = base[1:, ::2, 3:].copy()
    part = base.view(np.uint16)[1:, ::2, 3:]
    part.flags.writeable = False
    view = in_place(bfloat16_exporter(Exporter)(part))
    del part, base
    assert view.strides == (120, 40, 2)
    assert not view.flags.writeable
    assert_same_bits(np.ascontiguousarray(view), expected)
    empty = in_place(bfloat16_exporter(Exporter)(np.zeros((2, 0, 3), np.uint16)))
    assert empty.shape == (2, 0, 3)
    assert empty.dtype == ml_dtypes.bfloat16


def test_integers_by_dlpack_stay_refused() -> None:
    """A dtype that NumPy knows and the call does not."""
    arrays = normal() | {"k": Exporter(np.ones(SHAPES["k"], np.uint16))}
    with pytest.raises(TypeError, match=r"^k: the dtype must be one of .*, got numpy array of .* dtype uint16$"):
        exact_attention(**arrays)


@pytest.mark.parametrize("exporter", [Exporter, bfloat16_exporter(Exporter)])
def test_out_is_written_in_place_and_returned(exporter: type[Exporter]) -> None:
    is_bfloat16 = exporter is not Exporter
    arrays = normal(ml_dtypes.bfloat16 if is_bfloat16 else np.float32)
    for call in (distr_attention, exact_attention):
        memory = np.zeros((1, 4, 9, 5), np.uint16 if is_bfloat16 else np.float32)
        out = exporter(memory)
        assert call(**arrays, out=out) is out
        assert call(**arrays, out=out, return_lse=True)[0] is out
        assert_same_bits(memory.view(arrays["q"].dtype), call(**arrays))


@pytest.mark.parametrize("layout", ["bhnd", "bnhd"])
def test_lse_is_written_in_place_and_returned(layout: str) -> None:
    arrays = normal()
    if layout == "bnhd":
        arrays = {name: np.ascontiguousarray(x.swapaxes(1, 2)) for name, x in arrays.items()}
    for call in (distr_attention, exact_attention):
        expected_out, expected = call(**arrays, layout=layout, return_lse=True)
        for lse in (np.full((1, 4, 9), np.nan, np.float32), Exporter(np.full((1, 4, 9), np.nan, np.float32))):
            result, returned = call(**arrays, layout=layout, lse=lse, return_lse=True)
            assert returned is lse
            assert_same_bits(result, expected_out)
            assert_same_bits(in_place(lse), expected)
            in_place(lse)[...] = np.nan
            assert_same_bits(call(**arrays, layout=layout, lse=lse), expected_out)
            assert_same_bits(in_place(lse), expected)


def test_lse_of_what_another_package_calls_read_only_is_refused() -> None:
    lse = np.zeros((1, 4, 9), np.float32)
    lse.flags.writeable = False
    message = "lse: must be writeable, got read-only numpy array of shape (1, 4, 9) and dtype float32"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        exact_attention(**normal(), lse=Exporter(lse))


@pytest.mark.parametrize("exporter", [Exporter, OldExporter])
def test_read_only_memory_may_come_in_but_not_as_out(exporter: type[Exporter]) -> None:
    arrays = normal()
    out = np.zeros((1, 4, 9, 5), np.float32)
    if exporter is Exporter:  # the older protocol cannot carry read-only memory; what it carries counts as such
        for x in (*arrays.values(), out):
            x.flags.writeable = False
    assert_taken({name: exporter(x) for name, x in arrays.items()}, arrays)
    message = "out: must be writeable, got read-only numpy array of shape (1, 4, 9, 5) and dtype float32"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        exact_attention(**arrays, out=exporter(out))
    assert not out.any()


def test_masks_and_biases_too() -> None:
    arrays = normal()
    rng = np.random.default_rng(1)
    mask, bias = rng.random((9, 11)) < 0.7, rng.standard_normal(11).astype(np.float32)
    expected = exact_attention(**arrays, mask=mask, bias=bias)
    given = {name: Exporter(x) for name, x in arrays.items()}
    assert_same_bits(exact_attention(**given, mask=Exporter(mask), bias=array.array("f", bias.tolist())), expected)


def test_buffers_and_array_protocols() -> None:
    arrays = normal()
    flat = array.array("f", arrays["q"].ravel().tolist())

    class OnlyArray:
        def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
            assert dtype is None
            assert copy is False
            return arrays["k"]

    class OnlyInterface:
        __array_interface__ = arrays["v"].__array_interface__

    given = {
        "q": memoryview(flat).cast("B").cast("f", SHAPES["q"]),
        "k": OnlyArray(),
        "v": OnlyInterface(),
    }
    assert_taken(given, arrays)
    assert np.shares_memory(in_place(given["q"]), np.asarray(flat))
    read_only = memoryview(flat.tobytes()).cast("f", SHAPES["q"])
    assert_taken(given | {"q": read_only}, arrays)


class Refuses:
    """An exporter that raises."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __dlpack__(self, **_options: Any) -> Any:
        raise self.error

    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0


class Elsewhere(Exporter):
    device = (7, 0)


class DeviceOnly:
    """An exporter by __cuda_array_interface__; nothing may read its address."""

    def __init__(self, typestr: str, *, read_only: bool = False, shape: tuple[int, ...] = SHAPES["k"]) -> None:
        self.__cuda_array_interface__ = {"version": 3, "typestr": typestr, "data": (4096, read_only), "shape": shape}


@pytest.mark.parametrize(
    ("given", "got"),
    [
        (Refuses(BufferError("requires grad\nand more")), "Refuses: requires grad"),
        (Refuses(RuntimeError("deleted")), "Refuses: deleted"),
        (
            Elsewhere(np.zeros(SHAPES["k"], np.float32)),
            "Elsewhere: memory of DLPack device type 7 is neither a CPU's nor a CUDA device's",
        ),
        (DeviceOnly("<V2"), "DeviceOnly: __cuda_array_interface__ has no bfloat16, which takes __dlpack__"),
    ],
    ids=["grad", "deleted", "device", "bfloat16"],
)
def test_what_cannot_be_read_is_named(given: Any, got: str) -> None:
    for call in (distr_attention, exact_attention):
        with pytest.raises(TypeError, match=f"^{re.escape(f'k: must be readable without a copy, got {got}')}$"):
            call(**normal() | {"k": given})


class ByCopy:
    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError("only by a copy")
        return np.zeros(SHAPES["k"], np.float32)


@pytest.mark.parametrize("given", [ByCopy(), [[1.0]], "k", np.ma.masked_less(np.zeros(SHAPES["k"], "f4"), 1)])
def test_what_is_no_array_in_place_is_refused(given: Any) -> None:
    message = f"k: must be a NumPy, CuPy or Numba device array, got {type(given).__name__}"
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        exact_attention(**normal() | {"k": given})


class OnDevice(Exporter):
    device = (2, 0)


class Managed(Exporter):
    device = (13, 0)


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """Put a stand-in for CuPy in place, whose arrays are no more than their shapes."""
    module = types.ModuleType("cupy")

    class ndarray:  # noqa: N801  CuPy's name
        __module__ = "cupy"
        __cuda_array_interface__: ClassVar = {"data": (4096, False)}
        device = types.SimpleNamespace(id=0)
        data = types.SimpleNamespace(ptr=4096)
        dtype = np.dtype(np.float32)

        def __init__(self, source: Any, shape: tuple[int, ...]) -> None:
            self.source, self.shape = source, shape
            self.strides = np.zeros(shape, np.float32).strides

    module.from_dlpack = lambda x: ndarray(x, x.memory.shape)  # type: ignore[attr-defined]
    module.asarray = lambda x: ndarray(x, x.__cuda_array_interface__["shape"])  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cupy", module)
    return module


@pytest.mark.parametrize("exporter", [OnDevice, Managed])
@pytest.mark.usefixtures("cupy")
def test_device_memory_becomes_a_cupy_array(exporter: type[Exporter]) -> None:
    given = exporter(np.zeros(SHAPES["k"], np.float32))
    view = in_place(given)
    assert kind_of(view) == "cupy"
    assert view.source is given
    only = DeviceOnly("<f4")
    assert kind_of(in_place(only)) == "cupy"
    assert in_place(only).source is only


@pytest.mark.usefixtures("cupy")
def test_dlpack_goes_before_the_cuda_array_interface() -> None:
    """PyTorch has had both, and called bfloat16 a float16 in the second."""

    class Both(OnDevice):
        __cuda_array_interface__ = DeviceOnly("<V2").__cuda_array_interface__

    given = Both(np.zeros(SHAPES["k"], np.float32))
    assert in_place(given).source is given


@pytest.mark.parametrize("name", ["k", "v", "out", "mask", "bias"])
@pytest.mark.usefixtures("cupy")
def test_host_and_device_memory_do_not_mix(name: str) -> None:
    shape = {**SHAPES, "out": (1, 4, 9, 5), "mask": (9, 11), "bias": (9, 11)}[name]
    given: dict[str, Any] = {key: Exporter(x) for key, x in normal().items()}
    given[name] = OnDevice(np.zeros(shape, np.float32))
    message = f"{name}: must be a numpy array, as q is, got cupy array of shape {shape} and dtype float32"
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        exact_attention(**given)


@pytest.mark.usefixtures("cupy")
def test_read_only_device_memory_is_refused_as_out() -> None:
    given = {name: DeviceOnly("<f4", shape=shape) for name, shape in SHAPES.items()}
    out = DeviceOnly("<f4", read_only=True, shape=(1, 4, 9, 5))
    with pytest.raises(ValueError, match=r"^out: must be writeable, got read-only DeviceOnly$"):
        exact_attention(**given, out=out)


def test_device_memory_without_cupy_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)  # importing it fails now
    message = "k: needs cupy: pip install 'distrattn_np[cuda13]', got OnDevice"
    with pytest.raises(ImportError, match=f"^{re.escape(message)}$"):
        exact_attention(**normal() | {"k": OnDevice(np.zeros(SHAPES["k"], np.float32))})


def test_host_memory_of_other_packages_imports_none() -> None:
    code = """
import sys, array
import numpy as np
from distrattn_np import exact_attention
class Exporter:
    def __init__(self, x): self.x = x
    def __dlpack__(self, **options): return self.x.__dlpack__(**options)
    def __dlpack_device__(self): return 1, 0
one = Exporter(np.ones((1, 1, 2, 4), np.float32))
out = exact_attention(one, one, one, bias=array.array("f", [0.0, 1.0]))
assert (out == 1).all()
print(*({"cupy", "numba", "torch", "jax"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
