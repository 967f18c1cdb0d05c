"""The question: are the tables of docs/models.md those of docs/models.json."""

from __future__ import annotations

from pathlib import Path

import pytest
from distrattn_np.bench.models import cli, report

DOCS = Path(__file__).parents[2] / "docs"
MEASURED = report.load([DOCS / "models.json"])
EMPTY = "".join("old\n".join(report.marks(name)) for name in ("models", "comparison"))


def test_tables_are_current():
    text = (DOCS / "models.md").read_text(encoding="utf-8")
    assert "| subspace:group_size=2 |" in text
    assert report.fill(text, MEASURED) == text


def test_a_document_is_filled(tmp_path, capsys):
    document = tmp_path / "page.md"
    document.write_text(f"before\n{EMPTY}\nafter\n", encoding="utf-8")
    assert cli.main(["--show", str(DOCS / "models.json"), "--markdown", "--document", str(document)]) == 0
    capsys.readouterr()
    text = document.read_text(encoding="utf-8")
    assert text.startswith(f"before\n{report.marks('models')[0]}\n**SmolLM2")
    assert text.endswith(f"\n{report.marks('comparison')[1]}\nafter\n")
    assert text.count("| peer |") == len(report.by_task(MEASURED)) > 1
    assert "old" not in text


@pytest.mark.parametrize("name", ["models", "comparison"])
@pytest.mark.parametrize("found", ["", "{1}{0}", "{0}", "{0}{1}{0}{1}"])
def test_marks_must_be_there_once(name, found):
    whole = "".join(report.marks(name))
    text = EMPTY.replace(whole.replace("\n", "\nold\n"), found.format(*report.marks(name)))
    assert text != EMPTY
    with pytest.raises(ValueError, match=f"--document: must hold <!-- {name}:begin --> and then <!-- {name}:end -->"):
        report.fill(text, MEASURED)
