"""The question: does the documentation build as a site, without a warning."""

import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
CALLS = ["distr_attention", "exact_attention", "merge", "group_keys", "GroupedKeys.append", "group_pages"]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    for package in ("sphinx", "myst_parser", "pydata_sphinx_theme"):
        pytest.importorskip(package, reason="pip install 'distrattn_np[docs]'")
    out = tmp_path_factory.mktemp("site")
    # the trees apart from the pages: neither may be left in docs/
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-d", str(out / "trees"), str(DOCS)]
    done = subprocess.run([*command, str(out / "html")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out / "html"


def test_every_page_is_built(site):
    for path in DOCS.glob("*.md"):
        assert (site / f"{path.stem}.html").stat().st_size > 0


def test_api_shows_every_call_with_its_parameters(site):
    text = (site / "api.html").read_text(encoding="utf-8")
    for name in CALLS:
        assert f'id="distrattn_np.{name}"' in text
    assert "score_tol" in text
    assert "Parameters" in text


def test_links_between_pages_are_links_to_pages(site):
    """A link to another Markdown file that Sphinx did not take for a page would lead to its source."""
    for page in site.glob("*.html"):
        assert '.md"' not in page.read_text(encoding="utf-8"), page.name
