"""The feature table: is it what the result files say, are these what a run says, and can a feature fail."""

from __future__ import annotations

import dataclasses
import inspect
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from distrattn_np.bench import features

from distrattn_np import backends, distr_attention

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "docs" / "features.md"
RESULTS = ROOT / "bench" / "results"
NUMPY = backends.load_by_name("numpy")


def test_document_is_what_the_result_files_say() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    again = "python -m distrattn_np.bench.features --write docs/features.md"
    assert features.fill(text, RESULTS) == text, again
    assert features.main(["--results", str(RESULTS), "--write", str(DOCUMENT), "--check"]) == 0


@pytest.mark.parametrize("name", ["numpy", "reference"])
def test_result_file_is_what_a_run_says(name: str) -> None:
    again = f"python -m distrattn_np.bench.features --backend {name} --write docs/features.md"
    report = features.load(RESULTS, name)
    assert report is not None
    assert features.run(name) == report["features"], again


@pytest.mark.gpu
def test_result_file_of_a_gpu_is_what_a_run_says() -> None:
    report = features.load(RESULTS, "cupy")
    assert report is not None, "python -m distrattn_np.bench.features --backend cupy --write docs/features.md"
    assert features.run("cupy") == report["features"]


@pytest.mark.parametrize("name", features.COLUMNS)
def test_no_committed_cell_fails(name: str) -> None:
    report = features.load(RESULTS, name)
    outcomes = {} if report is None else report["features"]
    assert {x for row in outcomes.values() for x in row.values()} <= {"yes", "no", "does not apply"}


def test_what_the_document_says_is_nowhere_is_nowhere() -> None:
    assert not {"dropout", "dropout_p", "sinks", "block_table"} & set(inspect.signature(distr_attention).parameters)


def outcome(name: str, variant: str) -> str:
    (feature,) = (x for x in features.FEATURES if x.name == name)
    return features.outcome_of(feature.variants[variant], features.Column("numpy"))


def test_an_option_that_is_not_followed_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend that takes a window and computes as if there were none."""
    attend = NUMPY.attend

    def deaf(problem: Any, *others: Any) -> None:
        attend(dataclasses.replace(problem, window=(None, None)), *others)

    monkeypatch.setattr(NUMPY, "attend", deaf)
    for variant in ("exact", "subspace", "lsh"):
        assert outcome("Sliding window", variant).startswith("fails: WrongResult: error")
        assert outcome("Capped scores", variant) == "yes"


def test_an_option_that_is_refused_is_not_covered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(NUMPY, "builds_subspace", False)
    assert outcome("Sliding window", "subspace") == "no"
    assert outcome("Sliding window", "lsh") == "yes"


def test_a_result_elsewhere_than_in_out_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(NUMPY, "shares_memory", lambda _: False)
    monkeypatch.setattr(NUMPY, "hand_back", lambda array, *_, **__: array)
    assert outcome("Results in given memory", "`out=`").startswith("fails: WrongResult: not finite")


def test_cells_say_what_was_found() -> None:
    feature = features.Feature("f", "how", dict.fromkeys(("a", "b"), lambda _: None))
    cells = {
        "yes": {"a": "yes", "b": "yes"},
        "no": {"a": "no", "b": "does not apply"},
        "-": {"a": "does not apply", "b": "does not apply"},
        "a": {"a": "yes", "b": "no"},
        "**fails**: b": {"a": "yes", "b": "fails: ValueError: no: not so"},
        "not run": {"a": "yes"},
    }
    for text, outcomes in cells.items():
        assert features.cell(outcomes, feature) == text
    assert features.cell(None, feature) == "not run"


def test_a_failure_is_printed_and_is_the_exit_code(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    def broken(_: Any) -> None:
        raise MemoryError("no room")

    feature = features.Feature("Good", "", {"good": lambda _: None}), features.Feature("Bad", "", {"bad": broken})
    monkeypatch.setattr(features, "FEATURES", feature)
    document = tmp_path / "features.md"
    document.write_text(f"before\n{features.BEGIN}\nold\n{features.END}\nafter\n", encoding="utf-8")
    arguments = ["--results", str(tmp_path), "--write", str(document)]
    assert features.main([*arguments, "--backend", "numpy"]) == 1
    assert "numpy: Bad: bad fails: MemoryError: no room" in capsys.readouterr().out
    text = document.read_text(encoding="utf-8")
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert "| Bad |  | **fails**: bad | not run | not run | not run |" in text
    assert json.loads((tmp_path / "features_numpy.json").read_text())["environment"]["numpy"] == np.__version__
    assert features.main([*arguments, "--check"]) == 0
    document.write_text(text.replace("Good", "Fine"), encoding="utf-8")
    assert features.main([*arguments, "--check"]) == 1
    with pytest.raises(ValueError, match=r"^--backend: must be of numpy, cupy, numba, reference, got 'torch'$"):
        features.main(["--backend", "torch"])
    with pytest.raises(ValueError, match="the document needs"):
        features.fill("no marks", tmp_path)
