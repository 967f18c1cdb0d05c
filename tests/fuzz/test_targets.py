"""Does anything at all make a call or a file fail other than as documented? A short run of tests/fuzz."""

from __future__ import annotations

import pytest
from fuzz.targets import TARGETS
from hypothesis import settings

EXAMPLES = 300


@pytest.mark.filterwarnings("ignore")  # numbers of any size overflow
@pytest.mark.parametrize("name", TARGETS)
def test_what_is_wrong_is_refused_as_documented(name: str) -> None:
    settings(max_examples=max(settings().max_examples, EXAMPLES))(TARGETS[name])()
