"""How many different misuses are tested with their whole message? Counted here, over the tables of this folder."""

from __future__ import annotations

import re

import pytest
from errors import test_arguments, test_grouped_keys, test_lent, test_pages, test_ragged

LEAST = 100
TABLES = {
    "distr_attention and exact_attention": (
        test_arguments.WRONG_ARRAYS,
        test_arguments.WRONG_SCORE_ARRAYS,
        test_arguments.WRONG_OPTIONS,
        test_ragged.WRONG_PACKED,
        test_pages.WRONG_PAGES,
        test_lent.WRONG,
    ),
    "distr_attention": (test_arguments.WRONG_GROUPING, test_grouped_keys.WRONG_CALLS),
    "merge": (test_arguments.WRONG_MERGES,),
    "pool_keys": (test_arguments.WRONG_POOLINGS,),
    "project_values": (test_arguments.WRONG_PROJECTIONS,),
    "ProjectedValues.restore": (test_arguments.WRONG_RESTORINGS,),
    "group_keys": (test_grouped_keys.WRONG_GROUPINGS,),
    "GroupedKeys.append": (test_grouped_keys.WRONG_KEYS,),
    "GroupedKeys.load": (test_grouped_keys.WRONG_FILES,),
}
"""The tests of a table match its messages from the first letter to the last."""


def messages(call: str) -> list[str]:
    return [row[-1] for table in TABLES[call] for row in table.values()]


def rule_of(message: str) -> str:
    """Return argument and rule without what was handed over, and without numbers: they differ between like cases."""
    return re.sub(r"\d+", "N", message.partition(", got ")[0])


def test_there_are_a_hundred_rules() -> None:
    """Counted by what they say, whichever call says it: the same rule for two calls or two values counts once."""
    rules = {rule_of(message) for call in TABLES for message in messages(call)}
    assert len(rules) >= LEAST, sorted(rules)


@pytest.mark.parametrize("call", TABLES)
def test_every_message_names_its_argument(call: str) -> None:
    for message in messages(call):
        if call != "GroupedKeys.load":  # whose test puts the file before and behind
            assert re.match(r"[a-z_]+: .+, got .", message), message
