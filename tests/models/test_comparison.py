"""The question: is what the comparison with peers says what the rows say."""

from __future__ import annotations

from pathlib import Path

import pytest
from distrattn_np.bench.models import comparison, report

MEASURED = report.load([Path(__file__).parents[2] / "docs" / "models.json"])


def row(method, flop_ratio, first, second=0.0, **more):
    return {
        "title": "Toy",
        "input": "text",
        "columns": {"perplexity": "", "accuracy": ""},
        "method": method,
        "label": f"{method}:{flop_ratio}",
        "status": "ok",
        "flop_ratio": flop_ratio,
        "quality": {"perplexity": first, "accuracy": second},
    } | more


EXACT = row("exact", 1.0, 10.0, 0.5)
OWN = [row("subspace", 0.6, 14.0, 0.4), row("lsh", 0.7, 15.0), row("subspace", 0.9, 9.9, 0.3)]
PEERS = [row("hyper", 0.5, 20.0), row("hyper", 0.7, 13.0, 0.35), row("int8", 1.0, 10.2, 0.5)]


def test_rows_are_own_or_of_peers():
    failed = row("hyper", 0.8, 10.0, status="failed: no")
    assert comparison.split([EXACT, *OWN, *PEERS, failed]) == (EXACT, OWN, PEERS)


def test_nearness_counts_to_both_sides():
    assert comparison.loss(OWN[2], EXACT, "perplexity") == pytest.approx(0.1)
    assert comparison.loss(OWN[0], EXACT, "perplexity") == pytest.approx(4)
    assert comparison.nearer_in(OWN[0], PEERS[1], EXACT) == ["accuracy"]
    assert comparison.nearer_in(OWN[2], PEERS[2], EXACT) == ["perplexity"]
    assert comparison.nearer_in(EXACT, EXACT, EXACT) == []


@pytest.mark.parametrize(("flop", "best"), [(0.59, None), (0.6, OWN[0]), (0.89, OWN[0]), (0.9, OWN[2]), (2.0, OWN[2])])
def test_best_row_takes_no_more(flop, best):
    assert comparison.best_within(OWN, flop, EXACT, "perplexity") == best


def test_ranges_end_where_a_peer_is_as_near():
    assert comparison.ranges(OWN, PEERS, EXACT, "perplexity") == [(0.6, 0.7), (0.9, 1.0)]
    assert comparison.ranges(OWN, [*PEERS, row("int8", 0.95, 10.1)], EXACT, "perplexity") == [(0.6, 0.7), (0.9, 0.95)]
    assert comparison.ranges([], PEERS, EXACT, "perplexity") == []
    assert comparison.ranges(OWN, PEERS[2:], EXACT, "perplexity") == [(0.6, 1.0)]


def test_comparison_as_markdown():
    no_row = row("nystrom", 0.0, 0.0, status="no causal form")
    lines = report.comparison({"rows": [EXACT, *OWN, *PEERS, no_row]}).splitlines()
    assert lines[0] == "**Toy, text**"
    assert lines[2] == "| peer | FLOP | perplexity | accuracy | own | FLOP | perplexity | accuracy | own is nearer in |"
    assert lines[3] == "| --- | ---: | ---: | ---: | --- | ---: | ---: | ---: | --- |"
    assert lines[4].endswith("| none |  |  |  | none |")
    assert "`hyper:0.7` | 0.70 | 13.00 (+30 %) | 0.3500 | `subspace:0.6` | 0.60 | 14.00 (+40 %)" in lines[5]
    assert lines[5].endswith("| accuracy |")
    assert lines[6].endswith("| perplexity |")
    assert lines[-1].endswith("nearer than every peer in perplexity at a FLOP of: 0.600 to 0.700, 0.900 to 1.000.")
    assert report.comparison({"rows": [EXACT, *OWN]}) == ""


@pytest.mark.parametrize("rows", [rows for _, rows in report.by_task(MEASURED)])
def test_a_range_holds_no_peer_that_is_nearer(rows):
    """By another way than the ranges were found: every measured peer against every affordable own row."""
    exact, own, peers = comparison.split(rows)
    measure = next(iter(exact["columns"]))
    spans = comparison.ranges(own, peers, exact, measure)
    edges = sorted({one["flop_ratio"] for one in (*own, *peers)})
    for edge in edges[:-1]:
        theirs = [comparison.loss(one, exact, measure) for one in peers if one["flop_ratio"] <= edge]
        ours = [comparison.loss(one, exact, measure) for one in own if one["flop_ratio"] <= edge]
        is_nearer = any(all(mine < other for other in theirs) for mine in ours)
        assert is_nearer == any(low <= edge < high for low, high in spans)
