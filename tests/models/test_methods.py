"""The question: are methods read, called and counted as they say."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from distrattn_np.bench.models.methods import (
    EXACT,
    PEERS,
    Meter,
    Method,
    expand,
    parse,
    pooling_flop,
    projection_flop,
    subspace_flop,
)

from distrattn_np import checks, distr_attention, exact_attention, pool_keys, project_values


def arrays(N=64, D=32, E=16):
    rng = np.random.default_rng(0)
    return (
        rng.standard_normal((1, 4, N, D), dtype=np.float32),
        rng.standard_normal((1, 2, N, D), dtype=np.float32),
        rng.standard_normal((1, 2, N, E), dtype=np.float32),
    )


def metered(method, *, causal=False, dtype="float32", **sizes):
    meter = Meter(method, backend="numpy", dtype=dtype)
    return meter(*arrays(**sizes), causal=causal), meter


class TestParse:
    def test_options(self):
        assert parse("lsh") == [Method("lsh")]
        assert parse("lsh:fusion=lstsq,group_size=4") == [Method("lsh", {"fusion": "lstsq", "group_size": 4})]
        assert parse("subspace:score_tol=0.25") == [Method("subspace", {"score_tol": 0.25})]

    def test_a_list_gives_one_method_each(self):
        found = parse("hyper:block_size=64/128,samples=8/16")
        assert [method.options for method in found] == [
            {"block_size": 64, "samples": 8},
            {"block_size": 64, "samples": 16},
            {"block_size": 128, "samples": 8},
            {"block_size": 128, "samples": 16},
        ]

    @pytest.mark.parametrize("text", ["exact", "hydra", "subspace:rank=16,block_size=64", "subspace:score_tol=0.5"])
    def test_a_label_is_read_back(self, text):
        (method,) = parse(text)
        assert method.label == text
        assert parse(method.label) == [method]

    def test_exact_comes_once_and_first(self):
        assert list(expand(["lsh", "exact", "int8"])) == [EXACT, Method("lsh"), Method("int8")]

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("fast", "--methods: must be one of exact, lsh, subspace, window, hyper, .*, got 'fast'"),
            ("lsh:group_size", "--methods: options are written name=value, got 'group_size' in 'lsh:group_size'"),
            ("lsh:=2", "--methods: options are written name=value, got '=2' in 'lsh:=2'"),
        ],
    )
    def test_errors(self, text, message):
        with pytest.raises(ValueError, match=message):
            parse(text)


class TestMeter:
    @pytest.mark.parametrize("causal", [False, True])
    def test_results_are_those_of_the_calls(self, causal):
        q, k, v = arrays()
        wanted = [
            (EXACT, exact_attention(q, k, v, causal=causal)),
            (Method("lsh", {"group_size": 4}), distr_attention(q, k, v, method="lsh", group_size=4, causal=causal)),
            (Method("subspace", {"rank": 16}), distr_attention(q, k, v, method="subspace", rank=16, causal=causal)),
            (Method("int8"), PEERS["int8"][0](q, k, v, causal=causal)),
        ]
        for method, expected in wanted:
            np.testing.assert_array_equal(metered(method, causal=causal)[0], expected)

    def test_smaller_inputs_are_those_of_the_calls(self):
        q, k, v = arrays()
        projected = project_values(v, 5)
        pooled = pool_keys(k, projected.values, 3)
        wanted = projected.restore(distr_attention(q, pooled.k, pooled.v, bias=pooled.bias, rank=8))
        out, meter = metered(Method("subspace", {"rank": 8, "pool": 3, "value_rank": 5}))
        np.testing.assert_array_equal(out, wanted)
        assert meter.mean_rank == 8
        assert meter.exact_flop == metered(EXACT)[1].flop
        out, _ = metered(Method("subspace", {"group_size": 1, "pool": 4}))
        pooled = pool_keys(k, v, 4)
        np.testing.assert_array_equal(out, exact_attention(q, pooled.k, pooled.v))

    def test_smaller_inputs_are_less_work(self):
        """Of 64 keys 22 clusters in 5 levels; q has 4 heads, k and v 2, of widths 32 and 16."""
        q, k, v = arrays()
        problem = checks.check_attention(q, k, v, causal=False, scale=None, layout="bhnd", out=None, grouping=None)
        assert pooling_flop(problem, 3) == 2 * 64 * (32 + 16) * (12 * 5 + 1)
        assert projection_flop(problem, 5) == 2 * (16 * 17 * 64 + 9 * 16**3 + 2 * 64 * 16 * 5) + 4 * 2 * 64 * 16 * 5
        options = {"group_size": 1, "pool": 3, "value_rank": 5}
        _, meter = metered(Method("subspace", options))
        smaller = pooling_flop(dataclasses.replace(problem, value_width=5), 3) + projection_flop(problem, 5)
        assert meter.flop == 4 * 64 * 22 * 2 * (32 + 5) + smaller

    def test_pooled_keys_have_no_causal_form(self):
        with pytest.raises(ValueError, match="pool: pooled keys have no order, and no causal form"):
            metered(Method("subspace", {"pool": 3}), causal=True)

    @pytest.mark.parametrize("causal", [False, True])
    def test_a_window_and_sinks_are_a_mask(self, causal):
        q, k, v = arrays()
        shown = np.array(
            [[(0 <= n - m < 5 or m < 2) if causal else abs(n - m) < 5 or m < 2 for m in range(64)] for n in range(64)]
        )
        shown &= np.tri(64, dtype=bool) | (not causal)
        out, meter = metered(Method("window", {"keys": 5, "sinks": 2}), causal=causal)
        np.testing.assert_array_equal(out, exact_attention(q, k, v, causal=causal, mask=shown))
        assert meter.flop == 4 * int(shown.sum()) * 2 * (32 + 16)
        assert meter.exact_flop == metered(EXACT, causal=causal)[1].flop

    def test_exact_work(self):
        _, meter = metered(EXACT, causal=True)
        assert meter.flop == meter.exact_flop == 4 * (64 * 65 // 2) * 2 * (32 + 16)
        assert meter.mean_rank == 32
        assert meter.seconds > 0

    def test_calls_add_up(self):
        meter = Meter(Method("lsh", {"group_size": 4}), backend="numpy", dtype="float32")
        for _ in range(3):
            meter(*arrays(), causal=False)
        _, once = metered(Method("lsh", {"group_size": 4}))
        assert meter.flop == 3 * once.flop
        assert meter.mean_rank == once.mean_rank == 8

    def test_peers_count_every_query_head(self):
        _, meter = metered(Method("performer", {"features": 8}), E=32)
        assert meter.flop == 4 * PEERS["performer"][1](64, 64, 32, 32, features=8)
        assert meter.mean_rank is None

    def test_subspace_work(self):
        method = Method("subspace", {"rank": 16, "block_size": 32})
        _, meter = metered(method)
        q, k, v = arrays()
        grouping = checks.check_grouping(q, method="subspace", **method.options)
        problem = checks.check_attention(q, k, v, causal=False, scale=None, layout="bhnd", out=None, grouping=grouping)
        assert meter.flop == subspace_flop(problem, np.full((1, 2, 2), 16))
        assert meter.exact_flop == 4 * 64 * 64 * 2 * (32 + 16)

    def test_ranks_chosen_by_error_are_averaged(self):
        q, k, v = arrays()
        k[:, 0, :, 10:] = 0  # this head's keys span ten dimensions, the other's all 32
        meter = Meter(Method("subspace", {"score_tol": 0.01, "block_size": 64}), backend="numpy", dtype="float32")
        for _ in range(2):
            meter(q, k, v, causal=False)
        assert meter.mean_rank == (16 + 32) / 2

    def test_blocks_that_nobody_meets_have_no_part_in_the_mean_rank(self):
        _, meter = metered(Method("subspace", {"score_tol": 1e-9, "block_size": 24}), causal=True)
        assert meter.mean_rank == 32
        _, meter = metered(Method("subspace", {"rank": 5, "block_size": 64}), causal=True)
        assert meter.mean_rank is None

    def test_half_precision_inputs_give_float32(self):
        half, _ = metered(EXACT, dtype="float16")
        full, _ = metered(EXACT)
        assert half.dtype == np.float32
        assert 0 < np.abs(half - full).max() < 5e-3


class TestSubspaceFlop:
    def problem(self, causal, N=40, **options):
        q, k, v = arrays(N=N)
        grouping = checks.check_grouping(q, method="subspace", **options)
        return checks.check_attention(q, k, v, causal=causal, scale=None, layout="bhnd", out=None, grouping=grouping)

    @pytest.mark.parametrize("by", ["queries", "keys"])
    @pytest.mark.parametrize("causal", [False, True])
    def test_products_pair_by_pair(self, by, causal):
        """Two block ranks, 16 and 32 = D, at 40 rows in blocks of 16: counted from the list of pairs.

        Causal by keys, both rows of a pair in one block: the score is exact, and the pair needs no maps.
        """
        D, E, N, L = 32, 16, 40, 16
        problem = self.problem(causal, block_size=L, group_by=by, rank=16, refine=2)
        heads = 2 if by == "keys" else 4
        ranks = np.full((1, heads, 3), 16)
        ranks[0, 0, 1] = D
        pairs = [(n, m) for n in range(N) for m in range(n + 1 if causal else N)]
        exact_pairs = {(n, m) for n, m in pairs if causal and by == "keys" and n // L == m // L}
        ever_meeting = {n if by == "keys" else m for n, m in pairs if (n, m) not in exact_pairs}
        flop = 0
        for h in range(heads):
            shared = 2 if by == "keys" else 1  # query heads of a map
            for c in range(3):
                R = ranks[0, h, c]
                rows = range(c * L, min((c + 1) * L, N))
                own = [(n, m) for n, m in pairs if (m if by == "keys" else n) in rows]
                meeting = {n if by == "keys" else m for n, m in own if (n, m) not in exact_pairs}
                flop += shared * sum(2 * ((D if pair in exact_pairs else R) + E) for pair in own)
                if not meeting:
                    continue
                flop += 5 * (2 * D * D * R + 4 * D * R * R + R**3 // 3) + D * R * R + 4 * D * D * R + 4 * D * R * R
                flop += len(rows) * (D * D + 2 * D)
                if R < D:
                    flop += 2 * D * R * (len(rows) + shared * len(meeting))
            flop += shared * len(ever_meeting) * (D * D + 2 * D)
        assert subspace_flop(problem, ranks) == flop

    def test_columns_are_made_for_all_ranks_that_may_be_chosen(self):
        ranks = np.full((1, 2, 1), 16)
        fixed, chosen = (
            subspace_flop(self.problem(False, block_size=64, **options), ranks)
            for options in ({"rank": 16}, {"score_tol": 0.1})
        )
        half_steps = 3 * (2 * 32**2 * (32 - 16) + 4 * 32 * (32**2 - 16**2) + 32**3 // 3 - 16**3 // 3)
        others = 32 * (32**2 - 16**2) + 4 * 32**2 * (32 - 16) + 4 * 32 * (32**2 - 16**2)
        assert chosen - fixed == 2 * (half_steps + others)

    def test_other_methods_are_refused(self):
        q, k, v = arrays()
        problem = checks.check_attention(q, k, v, causal=False, scale=None, layout="bhnd", out=None, grouping=None)
        with pytest.raises(TypeError, match="problem: must be one of the subspace method, got None"):
            subspace_flop(problem, np.ones((1, 2, 1)))
