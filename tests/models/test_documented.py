"""The question: are the tables of docs/models.md those of docs/models.json."""

from __future__ import annotations

from pathlib import Path

import pytest
from distrattn_np.bench.models import cli, report

DOCS = Path(__file__).parents[2] / "docs"
MEASURED = report.load([DOCS / "models.json"])


def test_tables_are_current():
    text = (DOCS / "models.md").read_text(encoding="utf-8")
    assert "| subspace:group_size=2 |" in text
    assert report.fill(text, MEASURED) == text


def test_a_document_is_filled(tmp_path, capsys):
    document = tmp_path / "page.md"
    document.write_text(f"before\n{report.BEGIN}old\n{report.END}\nafter\n", encoding="utf-8")
    assert cli.main(["--show", str(DOCS / "models.json"), "--markdown", "--document", str(document)]) == 0
    capsys.readouterr()
    text = document.read_text(encoding="utf-8")
    assert text.startswith(f"before\n{report.BEGIN}\n**SmolLM2")
    assert text.endswith(f"\n{report.END}\nafter\n")
    assert "old" not in text


@pytest.mark.parametrize("text", ["", report.END + report.BEGIN, report.BEGIN, 2 * (report.BEGIN + report.END)])
def test_marks_must_be_there_once(text):
    with pytest.raises(ValueError, match="--document: must hold <!-- models:begin --> and then <!-- models:end -->"):
        report.fill(text, MEASURED)
