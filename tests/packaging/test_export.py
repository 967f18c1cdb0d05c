"""The question: does `distrattn export` write, without a GPU, all that is needed to launch the kernels of a call."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from distrattn_np.reference import hyperplanes
from kit.elf import kernels

from distrattn_np import cli
from distrattn_np.kernel_sources import parameters

SMALL = ["--batch", "2", "--heads", "4", "--kv-heads", "2", "--queries", "300", "--keys", "400"]
CALLS = {
    "subspace-sm_90a": (["--arch", "sm_90a", "--causal"], "forward_sm90"),
    "subspace-queries": (
        ["--arch", "sm_80", "--group-by", "queries", "--rank", "40", "--dtype", "bfloat16"],
        "forward_mma",
    ),
    "lsh-lstsq": (["--arch", "sm_90a", "--method", "lsh", "--fusion", "lstsq", "--group-size", "4"], "forward_sm90"),
    "lsh-old": (["--arch", "sm_75", "--method", "lsh", "--layout", "bnhd"], "forward_simt"),
    "float64": (["--arch", "sm_120", "--dtype", "float64", "--width", "40", "--rank", "9"], "forward_simt"),
    "exact": (["--arch", "sm_100", "--exact", "--width", "64", "--value-width", "32", "--lse"], "forward_mma"),
    "exact-top-left": (["--arch", "sm_90", "--exact", "--causal", "top-left", "--scale", "0.5"], "forward_mma"),
}


@pytest.fixture(scope="module", params=CALLS, ids=CALLS)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path, str]:
    folder = tmp_path_factory.mktemp("export")
    options, forward = CALLS[request.param]
    assert cli.main(["export", "--out", str(folder), *SMALL, *options]) == 0
    return json.loads((folder / "launches.json").read_text(encoding="utf-8")), folder, forward


def test_cubins_hold_the_kernels_with_these_arguments(exported: tuple[Any, Path, str]) -> None:
    report, folder, _ = exported
    assert report["kernels"]
    sizes = []
    for kernel in report["kernels"]:
        held = kernels((folder / kernel["file"]).read_bytes())
        assert list(held) == [kernel["name"]]
        source = [{"type": p.type, "name": p.name} for p in parameters(kernel["name"], kernel["defines"])]
        assert kernel["parameters"] == source
        assert {"grid", "block"} <= set(kernel["rule"])
        sizes.append(held[kernel["name"]])
    for launch in report["launches"]:
        kernel = report["kernels"][launch["kernel"]]
        assert [a["bytes"] for a in launch["arguments"]] == sizes[launch["kernel"]]
        assert [(a["type"], a["name"]) for a in launch["arguments"]] == [
            (p["type"], p["name"]) for p in kernel["parameters"]
        ]


def test_launches_end_with_the_forward_that_the_device_has(exported: tuple[Any, Path, str]) -> None:
    report, folder, forward = exported
    names = [report["kernels"][launch["kernel"]]["name"] for launch in report["launches"]]
    assert forward in names[-2:]  # add_mean_scores may follow
    assert {kernel["name"] for kernel in report["kernels"]} == set(names)
    assert {path.name for path in folder.glob("*.cubin")} == {kernel["file"] for kernel in report["kernels"]}
    for launch in report["launches"]:
        assert launch["grid"][1:] == launch["block"][1:] == [1, 1]
        assert launch["grid"][0] > 0
        assert 32 <= launch["block"][0] <= 1024
        assert 0 <= launch["shared_bytes"] <= report["architecture"]["shared_limit"]


def test_addresses_are_places_in_named_buffers(exported: tuple[Any, Path, str]) -> None:
    report, folder, _ = exported
    sizes = {
        name: np.prod(of["shape"]) * (8 if of["dtype"] == "float64" else 4 if of["dtype"] == "float32" else 2)
        for name, of in report["buffers"].items()
    }
    sizes |= {name: (folder / of["file"]).stat().st_size for name, of in report["constants"].items()}
    sizes["workspace"] = report["workspace_bytes"]
    used = set()
    for launch in report["launches"]:
        for argument in launch["arguments"]:
            kinds = {"value", "buffer", "tensor_map"} & set(argument)
            assert len(kinds) == 1
            place = argument.get("tensor_map", argument)
            if place.get("buffer") is not None:
                assert 0 <= place["offset"] <= sizes[place["buffer"]]
                used.add(place["buffer"])
    assert {"q", "k", "v", "out"} <= used <= set(sizes)
    assert ("lse" in used) == ("lse" in report["buffers"])


def test_tensor_maps_are_described_whole(exported: tuple[Any, Path, str]) -> None:
    report, _, forward = exported
    maps = [a["tensor_map"] for launch in report["launches"] for a in launch["arguments"] if "tensor_map" in a]
    assert bool(maps) == (forward == "forward_sm90")
    for tensor_map in maps:
        assert tensor_map["rank"] == len(tensor_map["sizes"]) == len(tensor_map["box"]) == 4
        assert len(tensor_map["strides"]) == 3
        assert all(stride % 16 == 0 for stride in tensor_map["strides"])
        assert all(1 <= box <= 256 for box in tensor_map["box"])
        assert tensor_map["data_type"] in (6, 9)
        assert tensor_map["swizzle"] in (1, 2, 3)


def test_constants_are_those_of_the_call(exported: tuple[Any, Path, str]) -> None:
    report, folder, _ = exported
    hashes = any(kernel["name"] == "hash_channels" for kernel in report["kernels"])
    assert list(report["constants"]) == (["hyperplanes"] if hashes else [])
    for of in report["constants"].values():
        rows, planes = of["shape"]
        stored = np.frombuffer((folder / of["file"]).read_bytes(), "<f4").reshape(rows, planes)
        np.testing.assert_array_equal(stored, hyperplanes(0, rows))


def test_sizes_and_options_are_noted(exported: tuple[Any, Path, str]) -> None:
    report, _, _ = exported
    call = report["call"]
    assert [call[name] for name in ("batch", "heads", "kv_heads", "queries", "keys")] == [2, 4, 2, 300, 400]
    rows, heads = (1, 2) if call["layout"] == "bnhd" else (2, 1)
    assert report["buffers"]["q"]["shape"][rows] == 300
    assert report["buffers"]["v"]["shape"][heads] == 2
    assert report["buffers"]["out"]["shape"][3] == call["value_width"]
    assert call["scale"] == pytest.approx(0.5 if call["causal"] == "top-left" else call["width"] ** -0.5)


def test_neither_cupy_nor_a_device_is_needed(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['cupy'] = None; sys.modules['numba'] = None\n"
        "from distrattn_np import cli; sys.exit(cli.main(sys.argv[1:]))"
    )
    command = ["export", "--arch", "sm_80", "--out", str(tmp_path), "--exact", "--queries", "64"]
    done = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(
        r".*forward_mma_\w+\.cubin\n.*launches\.json: 1 launches, 2048 bytes of workspace\n", done.stdout
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--exact", "--rank", "3"], "--exact: takes no option of grouping, got rank"),
        (["--method", "lsh", "--rank", "3"], "rank: must be None with method='lsh', got 3"),
        (
            ["--width", "300"],
            "q: the last axis must have 1 to 256 elements, got numpy array of shape (1, 8, 4096, 300) "
            "and dtype float16",
        ),
        (
            ["--kv-heads", "3"],
            "k: the number of heads must divide q's 8, got numpy array of shape (1, 3, 4096, 128) and dtype float16",
        ),
    ],
)
def test_wrong_options_are_named(options: list[str], message: str, tmp_path: Path, capsys: Any) -> None:
    assert cli.main(["export", "--arch", "sm_80", "--out", str(tmp_path / "new"), *options]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == f"distrattn export: error: {message}\n"
    assert not (tmp_path / "new").exists()


def test_without_a_compiler_it_says_what_to_install(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    assert cli.main(["export", "--arch", "sm_80", "--out", str(tmp_path), "--exact"]) == 2
    message = "needs cuda-bindings and NVRTC: pip install 'distrattn_np[cuda13]'"
    assert capsys.readouterr().err == f"distrattn export: error: {message}\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--arch", "sm_70"], "argument --arch: invalid choice: 'sm_70'"),
        (["--arch", "sm_80", "--multiprocessors", "0"], "argument --multiprocessors: must be at least 1, got 0"),
        (["--arch", "sm_80", "--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
    ],
)
def test_what_no_device_has_is_refused(options: list[str], message: str, tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["export", "--out", str(tmp_path), *options])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err
