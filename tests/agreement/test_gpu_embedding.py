"""Do calls run in other programs: on their streams, in their memory and graphs, from exported kernels? Needs a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kit.backends import to_kind
from kit.compare import assert_agrees, assert_same_bits, to_host
from kit.device import Allocations, poison, poisoned_like, write_late

from distrattn_np import cli, distr_attention, exact_attention, merge, workspace_size
from distrattn_np.arrays import kind_of

pytestmark = pytest.mark.gpu

# every kernel, and every kind of memory that a call takes
CALLS = {
    "exact": ("float16", 64, {"group_size": 1}),
    "exact-float32": ("float32", 40, {"group_size": 1, "causal": True}),
    "lsh": ("float16", 128, {"method": "lsh", "block_size": 128}),
    "lsh-lstsq": ("bfloat16", 64, {"method": "lsh", "fusion": "lstsq", "causal": True}),
    "lsh-keys-float32": ("float32", 64, {"method": "lsh", "fusion": "lstsq", "group_by": "keys", "block_size": 64}),
    "subspace": ("float16", 128, {"causal": True}),
    "subspace-tolerance": ("bfloat16", 64, {"score_tol": 0.3}),
    "subspace-queries": ("float16", 64, {"group_by": "queries", "block_size": 128, "causal": True}),
    "subspace-odd-rank": ("float32", 64, {"rank": 24, "causal": True}),
    "subspace-float64": ("float64", 40, {"rank": 9, "group_by": "queries"}),
    "subspace-wide": ("float32", 256, {"score_tol": 0.3}),
    "bnhd": ("float16", 64, {"layout": "bnhd"}),
    "window": ("float16", 64, {"group_size": 1, "window": (100, 3)}),
    "subspace-cap": ("float16", 64, {"softcap": 2.0, "causal": True}),
    "subspace-queries-cap": ("float32", 64, {"group_by": "queries", "softcap": 2.0}),
    "subspace-tables": ("float16", 64, {"mask": (1, 1, 1, 333), "bias": (4, 300, 1)}),
    "few-queries": ("float16", 64, {"group_size": 1, "rows": (5, 2000)}),
}


def make_arrays(name: str, seed: int = 0) -> tuple[list[Any], dict[str, Any]]:
    """Return q, k, v on the device and the options of a call."""
    import cupy

    dtype, width, named = CALLS[name]
    options = dict(named)
    rows, key_rows = options.pop("rows", (300, 333))
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes")  # gives NumPy the name
    rng = np.random.default_rng(seed)
    shapes = [(2, 4, rows, width), (2, 2, key_rows, width), (2, 2, key_rows, 64)]
    if options.get("layout") == "bnhd":
        shapes = [(b, n, h, d) for b, h, n, d in shapes]
    hosts = [rng.standard_normal(shape, dtype=np.float32).astype(dtype) for shape in shapes]
    if "mask" in options:
        options["mask"] = cupy.asarray(rng.random(options["mask"]) < 0.7)
        options["bias"] = cupy.asarray(rng.standard_normal(options["bias"], dtype=np.float32))
    return [cupy.asarray(host) for host in hosts], {"method": "subspace"} | options


def test_allocations_are_counted() -> None:
    import cupy

    with Allocations() as allocations:
        kept = cupy.empty(1000, np.uint8)
    assert allocations.sizes
    assert kept.nbytes == 1000


# ---- workspaces ----


@pytest.mark.parametrize("name", CALLS)
def test_a_call_in_a_workspace_allocates_nothing_and_stays_inside(name: str) -> None:
    import cupy

    arrays, options = make_arrays(name)
    expected, expected_lse = distr_attention(*arrays, **options, return_lse=True)
    size = workspace_size(*arrays, **options)
    guard = 4096
    memory = cupy.full(size + guard, 0xFF, np.uint8)  # NaN wherever it is read before it is written
    out = poisoned_like(expected)
    distr_attention(*arrays, **options, out=out, workspace=memory[:size])
    assert_same_bits(to_host(out), to_host(expected))
    assert (memory[size:] == 0xFF).all()

    lse = poisoned_like(expected_lse)
    smaller = workspace_size(*arrays, **options, return_lse=True)
    assert smaller <= size
    poison(out)
    cupy.cuda.Device().synchronize()
    with Allocations() as allocations:
        results = distr_attention(*arrays, **options, out=out, lse=lse, return_lse=True, workspace=memory[:smaller])
    assert allocations.sizes == []
    assert results[0] is out
    assert results[1] is lse
    assert_same_bits(to_host(out), to_host(expected))
    assert_same_bits(to_host(lse), to_host(expected_lse))


@pytest.mark.parametrize("name", CALLS)
def test_a_workspace_that_is_too_small_is_refused_before_anything_is_written(name: str) -> None:
    import cupy

    arrays, options = make_arrays(name)
    size = workspace_size(*arrays, **options)
    out = poisoned_like(distr_attention(*arrays, **options))
    memory = cupy.full(size, 0xFF, np.uint8)
    with pytest.raises(ValueError, match=rf"^workspace: must have at least {size} bytes, got cupy array of shape"):
        distr_attention(*arrays, **options, out=out, workspace=memory[:-1])
    assert (out.view(np.uint8) == 0xFF).all()
    assert (memory == 0xFF).all()


def test_size_is_that_of_a_description() -> None:
    from types import SimpleNamespace

    for name in CALLS:
        arrays, options = make_arrays(name)
        size = workspace_size(*arrays, **options)

        def described(x: Any) -> Any:
            return SimpleNamespace(shape=x.shape, dtype=x.dtype) if hasattr(x, "shape") else x

        def on_host(x: Any) -> Any:
            return np.zeros(x.shape, x.dtype) if hasattr(x, "shape") else x

        for other, backend in ((described, None), (on_host, "cupy")):
            given = {option: other(x) for option, x in options.items()}
            assert workspace_size(*map(other, arrays), **given, backend=backend) == size


def test_exact_attention_takes_a_workspace() -> None:
    import cupy

    arrays, _ = make_arrays("exact")
    expected = exact_attention(*arrays)
    memory = cupy.empty(workspace_size(*arrays, group_size=1), np.uint8)
    out = cupy.empty_like(expected)
    exact_attention(*arrays, out=out, workspace=memory)
    assert_same_bits(to_host(out), to_host(expected))


def test_numba_arrays_in_a_workspace() -> None:
    from numba import cuda

    arrays, options = make_arrays("subspace")
    expected = distr_attention(*arrays, **options)
    given = [cuda.as_cuda_array(x) for x in arrays]
    memory = cuda.device_array(workspace_size(*given, **options, backend="cupy"), np.uint8)
    out = cuda.device_array(expected.shape, expected.dtype)
    distr_attention(*given, **options, out=out, workspace=memory, backend="cupy")
    assert_same_bits(to_host(out), to_host(expected))


def test_torch_memory_as_a_workspace() -> None:
    torch = pytest.importorskip("torch", reason="pip install torch")
    arrays, options = make_arrays("subspace")
    expected = distr_attention(*arrays, **options)
    q, k, v = (torch.from_dlpack(x) for x in arrays)
    workspace = torch.empty(workspace_size(q, k, v, **options), dtype=torch.uint8, device="cuda")
    out, lse = torch.empty(expected.shape, dtype=q.dtype, device="cuda"), torch.empty(q.shape[:3], device="cuda")
    results = distr_attention(q, k, v, **options, out=out, lse=lse, workspace=workspace, return_lse=True)
    assert results[0] is out
    assert results[1] is lse
    assert_same_bits(out.cpu().numpy(), to_host(expected))


# ---- graphs ----


@pytest.mark.parametrize("how", ["stream", "current"])
@pytest.mark.parametrize("name", CALLS)
def test_a_captured_call_computes_with_what_its_arrays_hold_then(name: str, how: str) -> None:
    """Captured so that an allocation or synchronisation is an error."""
    import cupy

    arrays, options = make_arrays(name)
    out = cupy.empty_like(distr_attention(*arrays, **options))
    lse = cupy.empty((2, 4, CALLS[name][2].get("rows", (300,))[0]), np.float32)
    memory = cupy.empty(workspace_size(*arrays, **options, lse=lse), np.uint8)
    call = {**options, "out": out, "lse": lse, "workspace": memory}
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()
    distr_attention(*arrays, **call, stream=stream)  # builds the kernels
    stream.synchronize()
    with ExitStack() as stack:
        allocations = stack.enter_context(Allocations())
        if how == "current":
            stack.enter_context(stream)
        else:
            call["stream"] = stream
        stream.begin_capture(cupy.cuda.runtime.streamCaptureModeThreadLocal)
        try:
            distr_attention(*arrays, **call)
        finally:
            graph = stream.end_capture()
    assert allocations.sizes == []
    for seed in (1, 2):
        others, _ = make_arrays(name, seed)
        expected, expected_lse = distr_attention(*others, **options, return_lse=True)
        for array, other in zip(arrays, others, strict=True):
            array[...] = other
        for array in (out, lse, memory):
            poison(array)
        cupy.cuda.Device().synchronize()
        graph.launch(stream)
        stream.synchronize()
        assert_same_bits(to_host(out), to_host(expected))
        assert_same_bits(to_host(lse), to_host(expected_lse))


# ---- streams ----


class Wrapped:
    """A stream of a package that is not known here."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.stream.ptr


def as_kind(stream: Any, kind: str) -> Any:
    """Return a CuPy stream as some package has it."""
    match kind:
        case "handle":
            return stream.ptr
        case "cupy":
            return stream
        case "numba":
            from numba import cuda

            return cuda.external_stream(stream.ptr)
        case "protocol":
            return Wrapped(stream)
        case "cuda.core":
            core = pytest.importorskip("cuda.core", reason="pip install cuda-core")
            return core.Stream.from_handle(stream.ptr)
    torch = pytest.importorskip("torch", reason="pip install torch")
    return torch.cuda.ExternalStream(stream.ptr).cuda_stream


@pytest.mark.parametrize("backend", ["cupy", "numba"])
@pytest.mark.parametrize("kind", ["handle", "cupy", "numba", "protocol", "cuda.core", "torch"])
def test_work_goes_to_the_stream_that_is_named(kind: str, backend: str) -> None:
    import cupy

    arrays, options = make_arrays("subspace-odd-rank")
    expected = distr_attention(*arrays, **options, backend=backend)
    late = [poisoned_like(x) for x in arrays]
    out = poisoned_like(expected)
    stream = cupy.cuda.Stream(non_blocking=True)
    named = as_kind(stream, kind)
    write_late(stream, late, arrays)
    distr_attention(*late, **options, out=out, stream=named, backend=backend)
    assert cupy.cuda.get_current_stream().ptr == cupy.cuda.Stream.null.ptr
    stream.synchronize()
    assert_same_bits(to_host(out), to_host(expected))


def test_numba_arrays_on_the_stream_that_is_named() -> None:
    import cupy
    from numba import cuda

    arrays, options = make_arrays("exact-float32")
    expected = distr_attention(*(cuda.as_cuda_array(x) for x in arrays), **options)
    late = [poisoned_like(x) for x in arrays]
    stream = cupy.cuda.Stream(non_blocking=True)
    given = [cuda.as_cuda_array(x) for x in late]
    write_late(stream, late, arrays)
    result = distr_attention(*given, **options, stream=stream)
    assert kind_of(result) == "numba"
    host = result.copy_to_host(stream=cuda.external_stream(stream.ptr))
    stream.synchronize()
    assert_same_bits(host, to_host(expected))


def test_default_streams_have_handles_too() -> None:
    arrays, options = make_arrays("exact")
    expected = distr_attention(*arrays, **options)
    for handle in (0, 1, 2):  # the default, the legacy and the per-thread one
        assert_same_bits(to_host(distr_attention(*arrays, **options, stream=handle)), to_host(expected))


@pytest.mark.parametrize("kind", ["cupy", "numba"])
def test_merge_goes_to_the_stream_that_is_named(kind: Any) -> None:
    import cupy

    rng = np.random.default_rng(0)
    outs = [rng.standard_normal((1, 2, 50, 16), dtype=np.float32) for _ in range(2)]
    lses = [rng.standard_normal((1, 2, 50), dtype=np.float32) for _ in range(2)]
    expected, expected_lse = merge(outs[0], lses[0], outs[1], lses[1])
    parts = [cupy.asarray(x) for x in (outs[0], lses[0], outs[1], lses[1])]
    late = [poisoned_like(x) for x in parts]
    merge(*(to_kind(x, kind) for x in (outs[0], lses[0], outs[1], lses[1])))  # builds the kernels
    stream = cupy.cuda.Stream(non_blocking=True)
    given = late
    if kind == "numba":
        from numba import cuda

        given = [cuda.as_cuda_array(x) for x in late]
    write_late(stream, late, parts)
    out, lse = merge(*given, stream=stream)
    stream.synchronize()
    for actual, wanted in ((out, expected), (lse, expected_lse)):  # some ten roundings of float32
        assert_agrees(to_host(actual), wanted, rtol=0, atol=1e-5)


# ---- kernels ----


def test_threads_that_come_first_build_every_kernel_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from distrattn_np.backends import cupy_device
    from distrattn_np.backends.device_work import BuiltOnce

    arrays, options = make_arrays("subspace")
    expected = distr_attention(*arrays, **options)
    built: list[Any] = []
    build = cupy_device._build

    def counted(stem: str, defines: Any, shared: int) -> Any:
        built.append((stem, *defines.items(), shared))
        return build(stem, defines, shared)

    monkeypatch.setattr(cupy_device, "_build", counted)
    monkeypatch.setattr(cupy_device, "_KERNELS", BuiltOnce())
    ready = threading.Barrier(32)

    def call(_: int) -> np.ndarray:
        ready.wait()
        return distr_attention(*arrays, **options).get()

    with ThreadPoolExecutor(32) as pool:
        for result in pool.map(call, range(32)):
            assert_same_bits(result, to_host(expected))
    assert len(built) >= 5
    assert len(built) == len(set(built))


CALL_IN_A_PROCESS = """
import sys
import cupy
from distrattn_np import distr_attention, kernel_sources
read = kernel_sources._read
if "edited" in sys.argv:
    kernel_sources._read = lambda name: read(name) + ("// edited\\n" if name == "element.cuh" else "")
if "no-compiler" in sys.argv:
    def refuse(*_, **__):
        raise AssertionError("compiled again")
    cupy.cuda.compiler._compile_using_nvrtc_no_warning = refuse
q, k, v = cupy.ones((3, 1, 2, 64, 32), "float16")
assert (distr_attention(q, k, v) == 1).all()
"""


def test_kernels_stay_on_disk_until_a_header_changes(tmp_path: Path) -> None:
    def kernels_after(*arguments: str) -> set[str]:
        environment = os.environ | {"CUPY_CACHE_DIR": str(tmp_path)}
        command = [sys.executable, "-c", CALL_IN_A_PROCESS, *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return {path.name for path in tmp_path.glob("*.cubin")}

    first = kernels_after()
    assert len(first) >= 5
    assert kernels_after("no-compiler") == first
    edited = kernels_after("edited")
    assert len(edited) >= len(first) + 5


# ---- exported kernels ----


def launch_exported(folder: Path, arrays: dict[str, Any]) -> None:
    """Launch what launches.json says, as a program without this package would."""
    import cupy

    report = json.loads((folder / "launches.json").read_text(encoding="utf-8"))
    buffers = dict(arrays, workspace=cupy.full(max(report["workspace_bytes"], 1), 0xFF, np.uint8))
    for name, of in report["constants"].items():
        buffers[name] = cupy.asarray(np.fromfile(folder / of["file"], of["dtype"]).reshape(of["shape"]))
    functions = []
    most = [0] * len(report["kernels"])
    for launch in report["launches"]:
        most[launch["kernel"]] = max(most[launch["kernel"]], launch["shared_bytes"])
    for kernel, shared in zip(report["kernels"], most, strict=True):
        function = cupy.RawModule(path=str(folder / kernel["file"])).get_function(kernel["name"])
        if shared > 48 << 10:
            function.max_dynamic_shared_size_bytes = shared
        functions.append(function)
    scalars = {"int": np.int32, "long long": np.int64, "float": np.float32}
    for launch in report["launches"]:
        arguments = []
        for argument in launch["arguments"]:
            if "tensor_map" in argument:
                arguments.append(encode(argument["tensor_map"], buffers))
            elif isinstance(argument.get("value"), list):
                arguments.append(np.array(argument["value"]).view(f"V{argument['bytes']}"))
            elif "value" in argument:
                kind = scalars.get(argument["type"]) or {4: np.float32, 8: np.float64}[argument["bytes"]]
                arguments.append(kind(argument["value"]))
            elif argument["buffer"] is None:
                arguments.append(np.uint64(0))
            else:
                arguments.append(np.uint64(buffers[argument["buffer"]].data.ptr + argument["offset"]))
        functions[launch["kernel"]](
            tuple(launch["grid"]), tuple(launch["block"]), tuple(arguments), shared_mem=launch["shared_bytes"]
        )


def encode(of: dict[str, Any], buffers: dict[str, Any]) -> np.ndarray:
    """Return a tensor map by the driver's own call."""
    import ctypes

    memory = ctypes.create_string_buffer(128 + 64)
    start = ctypes.addressof(memory) + -ctypes.addressof(memory) % 64
    error = ctypes.CDLL("libcuda.so.1").cuTensorMapEncodeTiled(
        ctypes.c_void_p(start),
        ctypes.c_int(of["data_type"]),
        ctypes.c_uint32(of["rank"]),
        ctypes.c_void_p(buffers[of["buffer"]].data.ptr + of["offset"]),
        (ctypes.c_uint64 * 4)(*of["sizes"]),
        (ctypes.c_uint64 * 3)(*of["strides"]),
        (ctypes.c_uint32 * 4)(*of["box"]),
        (ctypes.c_uint32 * 4)(*of["element_strides"]),
        *(ctypes.c_int(of[name]) for name in ("interleave", "swizzle", "l2_promotion", "fill")),
    )
    assert error == 0
    return np.frombuffer(ctypes.string_at(start, 128), dtype="V128").copy()


@pytest.mark.parametrize("name", ["exact", "lsh-lstsq", "subspace", "subspace-queries", "subspace-odd-rank", "bnhd"])
def test_exported_kernels_compute_the_call(name: str, tmp_path: Path) -> None:
    import cupy

    arrays, options = make_arrays(name)
    device = cupy.cuda.Device()
    capability = int(device.compute_capability)
    dtype, width, _ = CALLS[name]
    command = [
        *("export", "--out", str(tmp_path), "--arch", "sm_90a" if capability == 90 else f"sm_{capability}"),
        *("--multiprocessors", str(device.attributes["MultiProcessorCount"]), "--dtype", dtype, "--lse"),
        *("--batch", "2", "--heads", "4", "--kv-heads", "2", "--queries", "300", "--keys", "333"),
        *("--width", str(width), "--value-width", "64"),
    ]
    for option, value in options.items():
        if option == "causal":
            command += ["--causal"] if value else []
        else:
            command += [f"--{option.replace('_', '-')}", str(value)]
    assert cli.main(command) == 0
    expected, expected_lse = distr_attention(*arrays, **options, return_lse=True)
    out, lse = poisoned_like(expected), poisoned_like(expected_lse)
    launch_exported(tmp_path, dict(zip("qkv", arrays, strict=True)) | {"out": out, "lse": lse})
    # the compiler that exports may be another version than CuPy's: one rounding of the output
    largest = float(np.abs(to_host(expected).astype(np.float64)).max())
    atol = {"float16": 2**-10, "bfloat16": 2**-7, "float32": 1e-6}[dtype] * largest
    assert_agrees(to_host(out), to_host(expected), rtol=0, atol=atol)
    assert_agrees(to_host(lse), to_host(expected_lse), rtol=1e-6, atol=1e-5)
