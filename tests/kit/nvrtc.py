"""Compile a kernel alone, without a GPU: NVRTC in this process, its report of resources, and the machine code."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from functools import cache
from importlib import metadata, resources
from pathlib import Path
from typing import Any

RAW_KERNELS = Path(str(resources.files("distrattn_np.raw_kernels")))


class CompileError(Exception):
    """What the compiler said."""


@dataclass(frozen=True)
class Resources:
    """What ptxas reports of one kernel, in bytes."""

    registers: int
    stack: int
    spill_stores: int
    spill_loads: int


@dataclass(frozen=True)
class Compiled:
    """Machine code of one file for one architecture."""

    cubin: bytes
    kernels: dict[str, Resources]
    is_serialized: bool
    """Whether ptxas says that it made the asynchronous products (wgmma) wait for each other."""


def compile_kernel(stem: str, arch: str, defines: dict[str, Any] | None = None, source: str | None = None) -> Compiled:
    """Compile ``raw_kernels/<stem>.cu``, or ``source`` in its place, for ``arch`` ("sm_80"), or raise `CompileError`.

    A ``source`` of its own finds no headers beside it. Threads may compile at the same time.
    """
    from cuda.bindings import nvrtc

    def checked(result: tuple[Any, ...]) -> Any:
        status, *values = result
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise CompileError(f"{status.name} in {stem}.cu for {arch} with {defines}:\n{log()}")
        return values[0] if values else None

    def log() -> str:
        size = nvrtc.nvrtcGetProgramLogSize(program)[1]
        text = bytearray(size)
        nvrtc.nvrtcGetProgramLog(program, text)
        return text.decode(errors="replace").rstrip("\0")

    # CuPy flushes subnormals and lets lambdas run on the device in everything that it compiles
    options = [f"-arch={arch}", "-std=c++17", "-ftz=true", "-default-device", "--ptxas-options=-v"]
    if tuple(nvrtc.nvrtcVersion()[1:]) >= (12, 9):
        options.append("-no-cache")  # ptxas reports nothing of a program that is taken from NVRTC's cache
    options += [f"-D{name}={value}" for name, value in (defines or {}).items()]
    if source is None:
        options.append(f"-I{RAW_KERNELS}")
        source = (RAW_KERNELS / f"{stem}.cu").read_text(encoding="utf-8")
    program = nvrtc.nvrtcCreateProgram(source.encode(), f"{stem}.cu".encode(), 0, [], [])[1]
    try:
        checked(nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options]))
        cubin = bytearray(checked(nvrtc.nvrtcGetCUBINSize(program)))
        checked(nvrtc.nvrtcGetCUBIN(program, cubin))
        report = log()
        return Compiled(bytes(cubin), parse_resources(report), "wgmma.mma_async instructions are serialized" in report)
    finally:
        nvrtc.nvrtcDestroyProgram(program)


@cache
def compile_defaults(stem: str, arch: str) -> Compiled:
    """Compile ``raw_kernels/<stem>.cu`` with its own tile parameters."""
    return compile_kernel(stem, arch)


def parse_resources(log: str) -> dict[str, Resources]:
    """Read ptxas's verbose report: one entry for every kernel."""
    pattern = (
        r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers"
    )
    return {
        name: Resources(int(registers), int(stack), int(stores), int(loads))
        for name, stack, stores, loads, registers in re.findall(pattern, log, flags=re.DOTALL)
    }


@cache
def tool(name: str) -> Path:
    """Return a CUDA program, "cuobjdump" or "nvdisasm", from its wheel or from the toolkit on PATH."""
    try:
        files = metadata.files(f"nvidia-cuda-{name}") or []
    except metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.stem == name and file.suffix in ("", ".exe"):
            return Path(str(file.locate()))
    if installed := shutil.which(name):
        return Path(installed)
    raise FileNotFoundError(name)


def disassemble(cubin: bytes, folder: Path) -> str:
    """Return the machine code as text."""
    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    return subprocess.run([tool("nvdisasm"), "-c", path], check=True, capture_output=True, text=True).stdout
