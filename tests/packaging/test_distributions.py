"""The question: do the wheel and the sdist hold all that the tree has."""

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
INSTALLED_AS = {
    "distrattn_np": "distrattn_np",
    "raw_kernels": "distrattn_np/raw_kernels",
    "reference": "distrattn_np/reference",
    "bench": "distrattn_np/bench",
}
NEEDED = {".py", ".cu", ".cuh", ".npz", ".json", ".typed"}


def wanted_files():
    """Return the names, as installed, of all sources and data in the tree."""
    return {
        f"{target}/{path.relative_to(ROOT / folder).as_posix()}"
        for folder, target in INSTALLED_AS.items()
        for path in (ROOT / folder).rglob("*")
        if (path.suffix in NEEDED or path.name == "py.typed") and "__pycache__" not in path.parts
    }


def build(tree, kind, target):
    """Run one hook of the build backend in its own process, as pip does; return the archive."""
    code = "import sys; from setuptools import build_meta; print(getattr(build_meta, sys.argv[1])(sys.argv[2]))"
    done = subprocess.run(
        [sys.executable, "-c", code, f"build_{kind}", str(target)],
        cwd=tree,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return target / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    tree = tmp_path_factory.mktemp("tree") / "distrattn_np"
    left_out = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "tests")
    shutil.copytree(ROOT, tree, ignore=left_out)
    return build(tree, "sdist", tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory):
    """Built from the sdist: what is missing there is missing here too."""
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    (tree,) = folder.iterdir()
    return build(tree, "wheel", tmp_path_factory.mktemp("wheel"))


def test_the_tree_has_what_this_file_looks_for():
    suffixes = {Path(name).suffix for name in wanted_files()}
    assert {".py", ".cu", ".cuh", ".npz", ".json"} <= suffixes
    assert "distrattn_np/py.typed" in wanted_files()


def test_wheel_holds_every_file(wheel):
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name and not name.endswith(".md")}
    assert held == wanted_files()


def test_wheel_names_licence_and_command(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (info,) = {name.split("/")[0] for name in archive.namelist() if ".dist-info/" in name}
        assert archive.read(f"{info}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
        assert "distrattn = distrattn_np.cli:main" in archive.read(f"{info}/entry_points.txt").decode()
        assert "License-Expression: Apache-2.0" in archive.read(f"{info}/METADATA").decode()


def test_sample_is_small(wheel):
    with zipfile.ZipFile(wheel) as archive:
        assert sum(entry.file_size for entry in archive.infolist() if "/data/" in entry.filename) < 2_000_000
