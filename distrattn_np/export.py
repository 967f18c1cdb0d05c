"""Kernels compiled without a GPU, and what launches them: ``distrattn export``.

One call is planned for one architecture. What comes out is every cubin that it needs, and a JSON with its launches in
order: grid, block, shared memory and arguments, each named and typed as in the source (docs/interop.md).
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from . import __version__, checks
from .arrays import REGION, array_at
from .backends.device_work import (
    ARGUMENTS,
    WORKSPACE,
    DeviceFacts,
    Placed,
    Plan,
    PlannedArray,
    PlannedLaunch,
    PlannedTensorMap,
)
from .backends.tensor_map import Encoding
from .kernel_sources import kernel_source, launch_rule, options, parameters
from .problem import Layout, Problem
from .tiles import Defines

FORMAT = 1
"""Of launches.json."""
ARCHITECTURES = {
    # the multiprocessors are those of a large device: T4, A100, RTX 3090, L40, H100, B200, RTX PRO 6000
    "sm_75": DeviceFacts(0, 75, False, 40, 64 << 10),
    "sm_80": DeviceFacts(0, 80, False, 108, 163 << 10),
    "sm_86": DeviceFacts(0, 86, False, 82, 99 << 10),
    "sm_89": DeviceFacts(0, 89, False, 142, 99 << 10),
    "sm_90": DeviceFacts(0, 90, False, 132, 227 << 10),
    "sm_90a": DeviceFacts(0, 90, True, 132, 227 << 10),
    "sm_100": DeviceFacts(0, 100, False, 148, 227 << 10),
    "sm_120": DeviceFacts(0, 120, False, 188, 99 << 10),
}


class ExportError(RuntimeError):
    """Why there is nothing to export."""


@dataclass(frozen=True, slots=True)
class Call:
    """The call that is exported: contiguous arrays in ``layout``, grouping options as of `distr_attention`."""

    batch: int
    heads: int
    kv_heads: int
    queries: int
    keys: int
    width: int
    value_width: int
    dtype: str
    layout: Layout
    causal: bool | str
    scale: float | None
    grouping: dict[str, Any]
    """Empty for exact attention."""

    def shape(self, name: str) -> tuple[int, int, int, int]:
        """Return the shape of q, k, v or out in the layout."""
        heads = self.heads if name in ("q", "out") else self.kv_heads
        rows = self.queries if name in ("q", "out") else self.keys
        width = self.width if name in ("q", "k") else self.value_width
        return (self.batch, rows, heads, width) if self.layout == "bnhd" else (self.batch, heads, rows, width)

    def problem(self) -> Problem:
        """Return what is to be computed, or raise as the call would."""
        dtype = _dtype(self.dtype)
        q, k, v = (array_at(place * REGION, self.shape(name), dtype) for place, name in enumerate("qkv", start=1))
        # grouping looks at the last axis alone
        grouping = checks.check_grouping(q, **self.grouping) if self.grouping else None
        return checks.check_attention(
            q, k, v, causal=self.causal, scale=self.scale, layout=self.layout, out=None, grouping=grouping
        )


def plan_call(problem: Problem, device: DeviceFacts, *, returns_lse: bool) -> tuple[Plan, list[str]]:
    """Return what the call does on ``device``, and the names of its arrays by their places."""
    from .backends.cupy_backend import BACKEND

    rows = (problem.batch, problem.heads, problem.queries)
    key_rows = (problem.batch, problem.kv_heads, problem.keys)
    shapes = {
        "q": (*rows, problem.width),
        "k": (*key_rows, problem.width),
        "v": (*key_rows, problem.value_width),
        "out": (*rows, problem.value_width),
    }
    arrays = [Placed.contiguous(shape, problem.dtype, problem.layout) for shape in shapes.values()]
    if returns_lse:
        arrays.append(Placed.contiguous(rows, np.dtype(np.float32)))
    plan = BACKEND.plan(problem, device, *(array.planned(place) for place, array in enumerate(arrays)))
    return plan, [*shapes, "lse"][: len(arrays)]


def compile_cubin(stem: str, defines: Defines, arch: str) -> bytes:
    """Return the machine code of one kernel, made by NVRTC."""
    try:
        from cuda.bindings import nvrtc
    except ImportError as error:
        raise ExportError("needs cuda-bindings and NVRTC: pip install 'distrattn_np[cuda13]'") from error

    program = None

    def log() -> str:
        if program is None:
            return ""
        text = bytearray(nvrtc.nvrtcGetProgramLogSize(program)[1])
        nvrtc.nvrtcGetProgramLog(program, text)
        return f":\n{text.decode(errors='replace').rstrip(chr(0))}"

    def checked(result: tuple[Any, ...]) -> Any:
        status, *values = result
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise ExportError(f"{status.name} in {stem}.cu for {arch} with {defines}{log()}")
        return values[0] if values else None

    program = checked(nvrtc.nvrtcCreateProgram(kernel_source(stem).encode(), f"{stem}.cu".encode(), 0, [], []))
    try:
        flags = compiler_options(defines, arch)
        checked(nvrtc.nvrtcCompileProgram(program, len(flags), [flag.encode() for flag in flags]))
        cubin = bytearray(checked(nvrtc.nvrtcGetCUBINSize(program)))
        checked(nvrtc.nvrtcGetCUBIN(program, cubin))
        return bytes(cubin)
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def compiler_options(defines: Defines, arch: str) -> list[str]:
    """Return the options that CuPy's build of the same kernel has."""
    return [*options(defines), f"-arch={arch}", "-ftz=true", "-default-device"]


def export(
    call: Call, arch: str, folder: Path, *, returns_lse: bool = False, multiprocessors: int | None = None
) -> dict[str, Any]:
    """Write the cubins, the constants and launches.json of a call to ``folder``; return what the JSON holds."""
    device = ARCHITECTURES[arch]
    if multiprocessors is not None:
        device = replace(device, multiprocessors=multiprocessors)
    problem = call.problem()
    plan, names = plan_call(problem, device, returns_lse=returns_lse)
    folder.mkdir(parents=True, exist_ok=True)
    kernels: list[dict[str, Any]] = []
    numbers: dict[tuple[Any, ...], int] = {}
    for launch in plan.launches:
        if _key(launch) not in numbers:
            numbers[_key(launch)] = len(kernels)
            kernels.append(_write_kernel(launch, arch, folder))
    buffers = {ARGUMENTS + place: name for place, name in enumerate(names)} | {WORKSPACE: "workspace"}
    constants = {}
    for (name, *key), (array, host) in plan.constants.items():
        file = "_".join(map(str, (name, *key))) + ".bin"
        (folder / file).write_bytes(host.astype(host.dtype.newbyteorder("<")).tobytes())
        buffers[array.data.ptr // REGION] = name
        constants[name] = {"file": file, "dtype": host.dtype.name, "shape": list(host.shape)}
    sizes = {name: {"dtype": call.dtype, "shape": list(call.shape(name))} for name in ("q", "k", "v", "out")}
    if returns_lse:
        sizes["lse"] = {"dtype": "float32", "shape": [call.batch, call.heads, call.queries]}
    report = {
        "format": FORMAT,
        "distrattn_np": __version__,
        "nvrtc": _nvrtc_version(),
        "architecture": {"name": arch, **{k: v for k, v in asdict(device).items() if k != "index"}},
        "call": asdict(call) | {"scale": problem.scale},
        "buffers": sizes,
        "workspace_bytes": plan.memory.bytes,
        "constants": constants,
        "kernels": kernels,
        "launches": [
            {
                "kernel": numbers[_key(launch)],
                "grid": [launch.blocks, 1, 1],
                "block": [launch.threads, 1, 1],
                "shared_bytes": launch.shared,
                "arguments": _arguments(launch, buffers),
            }
            for launch in plan.launches
        ],
    }
    (folder / "launches.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return report


def _key(launch: PlannedLaunch) -> tuple[Any, ...]:
    return launch.stem, *launch.defines.items()


def _write_kernel(launch: PlannedLaunch, arch: str, folder: Path) -> dict[str, Any]:
    """Compile the kernel of a launch into ``folder`` and return what is to be known of it."""
    stem, defines = launch.stem, launch.defines
    text = "\n".join([*compiler_options(defines, arch), kernel_source(stem)])
    file = f"{stem}_{hashlib.sha256(text.encode()).hexdigest()[:12]}.cubin"
    (folder / file).write_bytes(compile_cubin(stem, defines, arch))
    return {
        "name": stem,
        "file": file,
        "options": compiler_options(defines, arch),
        "defines": defines,
        "rule": launch_rule(stem),
        "parameters": [asdict(parameter) for parameter in parameters(stem, defines)],
    }


def _arguments(launch: PlannedLaunch, buffers: dict[int, str]) -> list[dict[str, Any]]:
    """Return the arguments of a launch with their names in the source; ``buffers`` by region."""

    def place(array: PlannedArray) -> dict[str, Any]:
        region, offset = divmod(array.data.ptr, REGION)
        return {"buffer": buffers[region], "offset": offset}

    def value(argument: Any) -> dict[str, Any]:
        match argument:
            case PlannedArray():
                return {"bytes": 8, **place(argument)}
            case PlannedTensorMap(array, box):
                encoding = Encoding.of(array.shape, array.strides, array.dtype.name, box)
                return {"bytes": 128, "tensor_map": place(array) | asdict(encoding)}
            case _ if argument.dtype == np.uint64:
                return {"bytes": 8, "buffer": None}
            case _ if argument.dtype.kind == "V":  # a table of score options, which an exported call has none of
                return {"bytes": argument.nbytes, "value": argument.view(np.int64).tolist()}
            case _:
                return {"bytes": argument.dtype.itemsize, "value": argument.item()}

    expected = parameters(launch.stem, launch.defines)
    return [
        {"name": parameter.name, "type": parameter.type, **value(argument)}
        for parameter, argument in zip(expected, launch.arguments, strict=True)
    ]


def _dtype(name: str) -> np.dtype:
    if name != "bfloat16":
        return np.dtype(name)
    try:
        import ml_dtypes
    except ImportError as error:
        raise ExportError("bfloat16 needs ml_dtypes: pip install 'distrattn_np[bf16]'") from error
    bfloat16: np.dtype = np.dtype(ml_dtypes.bfloat16)
    return bfloat16


def _nvrtc_version() -> str:
    from cuda.bindings import nvrtc

    return ".".join(map(str, nvrtc.nvrtcVersion()[1:]))
