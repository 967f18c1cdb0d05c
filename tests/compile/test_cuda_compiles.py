"""Does each kernel compile alone, for every architecture, without spills or local memory? No GPU is needed to know."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from kit.nvrtc import RAW_KERNELS, CompileError, compile_defaults, compile_kernel, disassemble

from distrattn_np import kernel_sources, tiles
from distrattn_np.kernel_sources import kernel_source

STEMS = sorted(path.stem for path in RAW_KERNELS.glob("*.cu"))
HEADERS = sorted(path.name for path in RAW_KERNELS.glob("*.cuh"))
PORTABLE = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
SHARED_LIMITS = {  # bytes that a block can have
    "sm_75": 64 << 10,
    **dict.fromkeys(("sm_86", "sm_89", "sm_120"), 99 << 10),
    "sm_80": 163 << 10,
    **dict.fromkeys(("sm_90", "sm_90a", "sm_100"), 227 << 10),
}
ON_TENSOR_CORES = ("forward_mma", "decode", "merge_splits", "gram", "reduce_rows")
"""Those whose instructions begin with sm_80."""


def architectures(stem: str) -> tuple[str, ...]:
    if stem.endswith("_sm90"):
        return ("sm_90a",)
    return PORTABLE if stem in ON_TENSOR_CORES else ("sm_75", *PORTABLE)


def builds(stem: str) -> list[tuple[str, dict[str, Any]]]:
    """Return (architecture, -D set) of every build that is tried.

    The file's own defaults on every architecture, and every third set of the launcher, as it is for the shared memory
    there, on one in turn, so that neighbouring sets cover all of them. The nightly profile builds every set everywhere.
    """
    archs = architectures(stem)
    every = os.environ.get("HYPOTHESIS_PROFILE") == "nightly"
    chosen: list[tuple[str, dict[str, Any]]] = [(arch, {}) for arch in archs]
    for turn, arch in enumerate(archs):
        cases = tiles.compile_cases(stem, SHARED_LIMITS[arch])
        chosen += [(arch, defines) for defines in (cases if every else cases[3 * turn :: 3 * len(archs)])]
    return chosen


@pytest.mark.parametrize("stem", STEMS)
def test_kernel_compiles_without_spills_or_local_memory(stem: str) -> None:
    def fault(build: tuple[str, dict[str, Any]]) -> str | None:
        arch, defines = build
        try:
            compiled = compile_kernel(stem, arch, defines) if defines else compile_defaults(stem, arch)
        except CompileError as error:
            return "\n".join(line for line in str(error).splitlines() if "error" in line.lower())
        kernels = compiled.kernels
        if set(kernels) != {stem}:
            return f"{arch} {defines}: kernels {sorted(kernels)}, expected {stem} alone"
        used = kernels[stem]
        if used.stack or used.spill_stores or used.spill_loads:
            return f"{arch} {defines}: {used}"
        return f"{arch} {defines}: products are serialized" if compiled.is_serialized else None

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        faults = [text for text in pool.map(fault, builds(stem)) if text is not None]
    assert not faults, f"{len(faults)} of {len(builds(stem))} builds:\n" + "\n".join(faults)


@pytest.mark.parametrize(
    "stem",
    [
        *("forward_mma", "forward_simt", "forward_sm90", "decode", "merge_splits", "fuse_channels", "hash_channels"),
        *(
            "gram",
            "gram_sm90",
            "gram_simt",
            "reduce_rows",
            "reduce_rows_simt",
            "subspace_maps",
            "sum_segments",
            "add_mean_scores",
            "pack_rows",
        ),
    ],
)
def test_launcher_names_the_sets_that_it_builds(stem: str) -> None:
    """Else the test above would try a kernel's defaults only."""
    assert len(tiles.compile_cases(stem, SHARED_LIMITS["sm_90"])) > 1


@pytest.mark.parametrize("arch", PORTABLE)
def test_forward_mma_runs_on_tensor_cores(arch: str, tmp_path: Path) -> None:
    code = disassemble(compile_defaults("forward_mma", arch).cubin, tmp_path)
    assert len(re.findall(r"\bHMMA\.16816\.F32\b", code)) >= 16


@pytest.mark.parametrize(("stem", "products"), [("forward_sm90", 8), ("gram_sm90", 4)])
def test_hopper_kernels_run_on_warpgroup_tensor_cores(stem: str, products: int, tmp_path: Path) -> None:
    code = disassemble(compile_defaults(stem, "sm_90a").cubin, tmp_path)
    assert len(re.findall(r"\bHGMMA\b", code)) >= products
    assert "UTMALDG" in code, "no asynchronous tile loads"


@pytest.mark.parametrize(
    ("stem", "defines", "sentence"),
    [
        ("hash_channels", {"THREADS": 528}, "every thread stages the same number of plane values"),
        ("channel_norms", {"THREADS": 64, "VECTOR": 1}, "the threads reach across the widest row"),
        ("fusion_gains", {"THREADS": 128}, "one thread for every channel of the widest row"),
        (
            "fuse_channels",
            {"R_PADDED": 24},
            "a row of the result is a whole number of 16-element steps",
        ),
        ("forward_mma", {"BLOCK_Q": 40}, "each warp owns whole 16-row tiles of queries"),
        ("forward_mma", {"BLOCK_KV": 24}, "a key tile is a multiple of the product's depth"),
        ("forward_mma", {"ELEMENT": 3}, "tensor cores take 16-bit elements"),
        ("forward_mma", {"LAUNCH_SHARED_BYTES": 1}, "tiles.py and this file disagree on the shared memory"),
        ("decode", {"BLOCK_KV": 48}, "each warp owns whole 16-key tiles"),
        ("decode", {"ROW_WARPS": 3}, "each tile of rows has as many warps"),
        ("decode", {"STAGES": 1}, "one buffer is filled while another is read"),
        ("decode", {"LAUNCH_SHARED_BYTES": 1}, "tiles.py and this file disagree on the shared memory"),
        ("merge_splits", {"ELEMENT": 3}, "decode.cu has 16-bit elements"),
        ("forward_simt", {"BLOCK_Q": 40}, "every thread owns the same number of queries"),
        ("forward_simt", {"D": 257}, "rows have 1 to 256 elements"),
        ("forward_simt", {"OWN_BLOCK": 1}, "own blocks are of keys, in causal calls with maps"),
        ("forward_mma", {"OWN_BLOCK": 1}, "own blocks are of keys, in causal calls with dense maps"),
        ("gram_simt", {"D": 257}, "rows have 1 to 256 elements"),
        ("reduce_rows_simt", {"R": 65}, "a map has at least one column and at most D"),
        ("forward_sm90", {"BLOCK_KV": 136}, "S [64, BLOCK_KV] is held in registers"),
        ("pack_rows", {"ROWS": 24}, "every thread has its part of as many rows"),
        ("channel_norms", {"ELEMENT": 5}, "ELEMENT is FLOAT16, BFLOAT16, FLOAT32 or FLOAT64"),
    ],
)
def test_bad_tile_is_refused_with_a_sentence(stem: str, defines: dict[str, int], sentence: str) -> None:
    with pytest.raises(CompileError, match=f'static assertion failed with "{re.escape(sentence)}'):
        compile_kernel(stem, architectures(stem)[0], defines)


@pytest.mark.parametrize("stem", STEMS)
def test_text_that_the_launcher_compiles_holds_its_headers(stem: str) -> None:
    """CuPy's cache does not read headers: an edited one must change the text, or an old binary would run."""
    text = kernel_source(stem)
    assert not re.findall(r'^\s*#\s*include\s*"', text, flags=re.MULTILINE)
    for header in HEADERS:
        first_line = (RAW_KERNELS / header).read_text(encoding="utf-8").splitlines()[0]
        assert text.count(first_line) <= 1, f"{header} is spliced in twice"
    kernels = compile_kernel(stem, architectures(stem)[0], source=text).kernels
    assert kernels == compile_defaults(stem, architectures(stem)[0]).kernels


def test_an_edited_header_changes_the_text(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shutil.copytree(RAW_KERNELS, tmp_path, dirs_exist_ok=True)
    monkeypatch.setattr(kernel_sources.resources, "files", lambda _: tmp_path)
    before = kernel_source("hash_channels")
    header = tmp_path / "element.cuh"
    header.write_text(header.read_text(encoding="utf-8") + "// edited\n", encoding="utf-8")
    assert "// edited" not in before
    assert "// edited" in kernel_source("hash_channels")


def test_cupys_cache_is_keyed_by_our_headers(monkeypatch: pytest.MonkeyPatch) -> None:
    """CuPy names a cached kernel by target, options, compiler and text: an edited header must give another name."""
    compiler = pytest.importorskip("cupy").cuda.compiler
    names: list[str] = []

    class Cache:
        def load(self, name: str) -> None:
            names.append(name)

        def save(self, *_: Any) -> None:
            pass

    monkeypatch.setattr(compiler, "_kernel_cache_backend", Cache())
    monkeypatch.setattr(compiler, "_preprocess", lambda *_: "")
    monkeypatch.setattr(compiler, "_get_nvrtc_version", lambda: (13, 0))
    monkeypatch.setattr(compiler, "_get_arch_for_options_for_nvrtc", lambda arch: ("-arch", arch))
    monkeypatch.setattr(compiler, "_compile_using_nvrtc_no_warning", lambda *_: (b"", {}))
    monkeypatch.setattr(compiler.function, "Module", lambda: SimpleNamespace(load=bool, _set_mapping=bool))

    def name_of(stem: str, defines: dict[str, int]) -> str:
        compiler._compile_with_cache_cuda(kernel_source(stem), tuple(kernel_sources.options(defines)), "80")
        return names[-1]

    before = name_of("hash_channels", {"ELEMENT": 1})
    assert name_of("hash_channels", {"ELEMENT": 1}) == before
    assert name_of("hash_channels", {"ELEMENT": 2}) != before
    read = kernel_sources._read
    monkeypatch.setattr(kernel_sources, "_read", lambda name: read(name) + "// edited\n" * (name == "element.cuh"))
    assert name_of("hash_channels", {"ELEMENT": 1}) != before


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")
@pytest.mark.parametrize("stem", STEMS)
def test_nvcc_compiles_the_file_alone(stem: str, tmp_path: Path) -> None:
    arch = architectures(stem)[0]
    command = ["nvcc", "-cubin", f"-arch={arch}", "-std=c++17", "-Werror=all-warnings", "-o", tmp_path / "kernel.cubin"]
    done = subprocess.run([*command, RAW_KERNELS / f"{stem}.cu"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "kernel.cubin").stat().st_size > 0
