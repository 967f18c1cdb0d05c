"""The question: does one stem name a step in each of its places, and can an installed package read its sources."""

import re
from importlib import import_module, resources
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STEPS = ["hash_channels", "group_channels", "channel_norms", "fusion_gains", "fuse_channels"]
KERNELS = sorted(path.stem for path in (ROOT / "raw_kernels").glob("*.cu"))


@pytest.mark.parametrize("stem", STEPS)
def test_reference_function(stem):
    assert callable(getattr(import_module("distrattn_np.reference"), stem))
    assert (ROOT / "reference" / f"{stem}.py").is_file()


@pytest.mark.parametrize("stem", STEPS)
def test_numba_kernel(stem):
    assert (ROOT / "distrattn_np" / "numba_kernels" / f"{stem}.py").is_file()


@pytest.mark.parametrize("stem", STEPS)
def test_cuda_source(stem):
    assert stem in KERNELS


@pytest.mark.parametrize("stem", KERNELS)
def test_cuda_source_defines_its_stem(stem):
    source = resources.files("distrattn_np.raw_kernels").joinpath(f"{stem}.cu").read_text(encoding="utf-8")
    assert re.match(rf"// {stem}\.cu\b", source), "the first line names the file"
    assert re.search(rf'extern "C" __global__[^;{{]*\b{stem}\w*\s*\(', source)


def test_headers_are_readable():
    folder = resources.files("distrattn_np.raw_kernels")
    headers = [entry for entry in folder.iterdir() if entry.name.endswith(".cuh")]
    assert headers
    for header in headers:
        assert "#pragma once" in header.read_text(encoding="utf-8")


def test_every_include_is_packaged():
    folder = resources.files("distrattn_np.raw_kernels")
    sources = [entry for entry in folder.iterdir() if entry.name.endswith((".cu", ".cuh"))]
    wanted = {
        name for entry in sources for name in re.findall(r'#include "([^"]+)"', entry.read_text(encoding="utf-8"))
    }
    assert wanted <= {entry.name for entry in sources}
