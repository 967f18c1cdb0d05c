"""``python tests/fuzz TARGET [libFuzzer's options]``: a target of targets.py under Atheris, until it fails.

Needs ``pip install -e '.[fuzz]'``. CORPUS, a folder, comes after the target: it keeps what reached something new.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).parents[1]))

with atheris.instrument_imports(include=["distrattn_np"]):
    from fuzz.targets import TARGETS


def main() -> None:
    """Fuzz the target that the command line names."""
    program, name, *options = sys.argv if len(sys.argv) > 1 else [sys.argv[0], ""]
    if name not in TARGETS:
        sys.exit(f"python tests/fuzz TARGET [CORPUS] [libFuzzer's options]\nTARGET: {', '.join(TARGETS)}")
    warnings.simplefilter("ignore")  # numbers of any size overflow
    atheris.Setup([program, *options], TARGETS[name].hypothesis.fuzz_one_input)  # type: ignore[attr-defined]
    atheris.Fuzz()


if __name__ == "__main__":
    main()
