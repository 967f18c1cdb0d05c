"""The question: do the snippets of README, docs and docstrings run, and do the documents' links lead somewhere."""

import doctest
import re
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
NAMES = [path.relative_to(ROOT).as_posix() for path in DOCUMENTS]


def snippets(path):
    return re.findall(r"^```python\n(.*?)^```", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


WITH_SNIPPETS = [path for path in DOCUMENTS if snippets(path)]


def test_there_are_snippets():
    assert ROOT / "README.md" in WITH_SNIPPETS
    assert ROOT / "docs" / "layouts.md" in WITH_SNIPPETS


@pytest.mark.parametrize("path", WITH_SNIPPETS, ids=lambda path: path.name)
def test_snippets_run(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "snippet"}
    for text in snippets(path):  # later ones may use the names of earlier ones
        exec(compile(text, str(path), "exec"), namespace)


@pytest.mark.parametrize("path", DOCUMENTS, ids=NAMES)
def test_links_lead_somewhere(path):
    text = path.read_text(encoding="utf-8")
    assert text.strip()
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
        assert (path.parent / target).exists(), target


def test_readme_has_the_two_commands_and_the_tables():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in ("demo-command", "test-command", "bench:gpu", "bench:cpu"):
        kind, _, table = name.partition(":")
        begin = f"<!-- {kind}:begin {table} -->" if table else f"<!-- {kind}:begin -->"
        assert text.count(begin) == 1
        assert text.index(begin) < text.index(begin.replace(":begin", ":end"))


@pytest.mark.parametrize("module", ["attention", "grouped_keys", "merge"])
def test_doctests_of_the_public_calls(module):
    result = doctest.testmod(import_module(f"distrattn_np.{module}"))
    assert result.attempted > 0
    assert result.failed == 0
