"""Sphinx: the pages of this folder, and the API from docstrings. ``sphinx-build -W docs docs/_build``."""

from typing import Any

from distrattn_np import __version__

project = "distrattn_np"
version = release = __version__
copyright = "the distrattn_np maintainers"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
default_role = "code"
napoleon_google_docstring = False
autodoc_typehints = "none"
myst_heading_anchors = 3

html_theme = "pydata_sphinx_theme"
html_theme_options = {"show_prev_next": False, "navigation_with_keys": False}
html_show_sourcelink = False


def link_readme_sections(_app: Any, _name: str, source: list[str]) -> None:
    """Let links to sections of the README lead to the index, which holds them."""
    source[0] = source[0].replace("](../README.md", "](index.md")


def setup(app: Any) -> None:
    """Register the hook above."""
    app.connect("source-read", link_readme_sections)


# "shape" in the type of a parameter is a word, not one of the attributes of that name
suppress_warnings = ["ref.python"]
