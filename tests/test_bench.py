"""The bench: work counts, what it refuses to time, what its reports hold, whether the tables are current."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from distrattn_np.bench import cli, device, plot, report, roofline, runner, table
from distrattn_np.bench.axes import EXACT, PRESETS, Axes, Shape, is_cached, multiply_out
from distrattn_np.bench.oracle import Oracle, WrongResult
from distrattn_np.bench.peers import PEERS
from distrattn_np.bench.timing import time_cold

from distrattn_np import backends, bench, reference
from distrattn_np.block_size import choose_block_size
from distrattn_np.export import plan_call
from distrattn_np.grouped_keys import GroupedKeys
from distrattn_np.problem import Grouping, GroupMaps, Problem, Subspace
from distrattn_np.work import own_pairs, visible_pairs, work_of, work_of_cache

ROOT = Path(__file__).parents[1]
NUMPY = type(backends.load_by_name("numpy"))
TINY = ["run", "-N", "70", "-H", "3", "-D", "16", "-L", "32", "--backend=numpy", "--peers=none", "--repeat=2"]
SHARED_HEADS = "-H 4 --kv-heads 2 -M 90 -E 5 -G 2 --group-by queries,keys --fusion sum,lstsq --causal --full"
METHODS = ("lsh", "subspace")


@pytest.fixture(autouse=True)
def _small_yardstick(monkeypatch):
    monkeypatch.setattr(device.Cpu, "product_size", 64)
    monkeypatch.setattr(device.Cpu, "copy_bytes", 1 << 16)


def run(*extra: str, path: Path) -> tuple[int, dict]:
    code = bench.main([*TINY, *extra, "--json", str(path)])
    return code, json.loads(path.read_text(encoding="utf-8"))


class TestWork:
    @pytest.mark.parametrize("offset", [None, -9, -3, -1, 0, 1, 4, 40])
    @pytest.mark.parametrize(("N", "M"), [(1, 1), (5, 3), (3, 5), (7, 7)])
    def test_visible_pairs_are_those_of_the_definition(self, N, M, offset):
        assert visible_pairs(N, M, offset) == np.count_nonzero(reference.visible_keys(N, M, offset))

    @pytest.mark.parametrize("fusion", ["sum", "lstsq"])
    @pytest.mark.parametrize("by", ["queries", "keys"])
    @pytest.mark.parametrize("offset", [None, 2, -2])
    def test_counts_are_those_of_the_loops(self, by, fusion, offset):
        problem = Problem(
            batch=2,
            heads=4,
            kv_heads=2,
            queries=11,
            keys=13,
            width=8,
            value_width=6,
            dtype=np.dtype(np.float16),
            scale=1.0,
            causal_offset=offset,
            layout="bhnd",
            grouping=Grouping(group_size=4, block_size=5, by=by, fusion=fusion, seed=0),
        )
        D, E, R = 8, 6, 2
        seen = reference.visible_keys(11, 13, offset)
        meets = seen if by == "queries" else seen.T
        exact = executed = 0
        for _head in range(2 * 4):
            exact += 2 * seen.sum() * (D + E)
            executed += 2 * seen.sum() * (R + E)
            for start in range(0, len(meets), 5):  # each group of four takes three additions, with gains times two
                executed += meets[start : start + 5].any(axis=0).sum() * R * 3 * (2 if fusion == "lstsq" else 1)
        x_rows, y_rows = (2 * 4 * 11, 2 * 2 * 13) if by == "queries" else (2 * 2 * 13, 2 * 4 * 11)
        executed += x_rows * D * 16 * 2
        if fusion == "lstsq":
            executed += 2 * D * (x_rows + y_rows)  # lengths of the channels of both sides
            executed += 2 * R * 3 * x_rows  # inner products with the sampled member of each group
        work = work_of(problem)
        assert work.exact_flop == exact
        assert work.executed_flop == executed
        assert work.minimum_bytes == 2 * (2 * 4 * 11 * (D + E) + 2 * 2 * 13 * (D + E))

    @pytest.mark.parametrize("by", ["queries", "keys"])
    @pytest.mark.parametrize("offset", [None, -9, -2, 0, 2, 9])
    def test_own_pairs_are_those_of_the_definition(self, offset, by):
        problem = Problem(
            batch=2,
            heads=4,
            kv_heads=2,
            queries=11,
            keys=13,
            width=8,
            value_width=6,
            dtype=np.dtype(np.float16),
            scale=1.0,
            causal_offset=offset,
            layout="bhnd",
            grouping=Subspace(rank=2, score_tol=None, refine=1, block_size=4, by=by),
        )
        found = 0
        if offset is not None and by == "keys":
            seen = reference.visible_keys(11, 13, offset)
            found = sum(seen[n, m] and m // 4 == (n + offset) // 4 for n in range(11) for m in range(13))
        assert own_pairs(problem) == 2 * 4 * found

    @pytest.mark.parametrize("M", [0, 1, 12, 13, 31])
    @pytest.mark.parametrize("offset", [None, 28])
    def test_counts_of_a_cache_are_those_of_the_loops(self, M, offset):
        D, E, R, L, N = 8, 6, 2, 4, 3
        problem = Problem(
            batch=2,
            heads=4,
            kv_heads=2,
            queries=N,
            keys=M,
            width=D,
            value_width=E,
            dtype=np.dtype(np.float16),
            scale=1.0,
            causal_offset=offset,
            layout="bhnd",
            grouping=Subspace(rank=R, score_tol=None, refine=1, block_size=L, by="keys"),
        )
        finished = [c for c in range(M) if (c + 1) * L < M]
        seen = reference.visible_keys(N, M, offset)
        executed = numbers = 0
        for m in range(M):
            is_finished = m // L in finished
            executed += 2 * 4 * 2 * seen[:, m].sum() * ((R if is_finished else D) + E)
            numbers += 2 * 2 * ((R if is_finished else D) + E)
        for _block in finished:  # q Z and q mean, of every query
            executed += 2 * 4 * 2 * N * D * (R + 1)
            numbers += 2 * 2 * (R + 1) * D
        numbers += 2 * 4 * N * (D + E)
        work = work_of_cache(problem)
        assert work.executed_flop == executed
        assert work.minimum_bytes == 2 * numbers
        assert work.exact_flop == work_of(problem).exact_flop

    def test_exact_attention_executes_what_it_counts(self):
        work = work_of(Shape(B=1, H=2, kv_heads=2, N=8, M=8, D=4, E=4, dtype="float32", causal=True).problem(EXACT))
        assert work.executed_flop == work.exact_flop == 2 * work.pairs * 8
        assert work.pairs == 2 * 36


class TestAxes:
    def test_every_axis_is_multiplied_out_and_exact_comes_once(self):
        axes = Axes(N=(8, 16), D=(4, 8), G=(2, 1, 4), L=(4, 8), fusion=("sum", "lstsq"), causal=(False, True))
        shapes = list(axes.shapes("float32"))
        assert len(shapes) == len(set(shapes)) == 2 * 2 * 2
        assert all((s.M, s.E, s.kv_heads, s.dtype) == (s.N, s.D, s.H, "float32") for s in shapes)
        options = axes.options()
        assert options.count(EXACT) == 1
        of_method = {name: [o for o in options if o.get("method") == name] for name in METHODS}
        assert len(of_method["lsh"]) == 2 * 2 * 2
        assert len(of_method["subspace"]) == 2 * 2  # it has no fusion
        assert len(options) == 1 + sum(map(len, of_method.values()))

    def test_defaults_are_those_of_each_method(self):
        shape = Shape(B=1, H=1, kv_heads=1, N=4096, M=4096, D=128, E=128, dtype="float16", causal=False)
        labels = [runner.label_of("cupy", shape.problem(options)) for options in Axes(G=(1, 2, 4)).options()]
        assert labels == [
            "cupy exact",
            "cupy lsh/sum G=2 L=1024 queries",
            "cupy lsh/sum G=4 L=1024 queries",
            f"cupy subspace G=2 L={choose_block_size(128, 64)[0]} keys",
            f"cupy subspace G=4 L={choose_block_size(128, 32)[0]} keys",
        ]

    def test_what_comes_to_the_same_problem_counts_once(self):
        axes = Axes(N=(8,), D=(64,), G=(1, 2), L=(None, 1024), group_by=("queries",))
        ((shape, variants),) = multiply_out([axes, axes], "float32")
        blocks = [shape.problem(options).grouping for options in variants]
        assert [None if x is None else x.block_size for x in blocks] == [None, 1024, choose_block_size(64, 32)[0], 1024]

    def test_presets_are_problems_that_the_call_accepts(self):
        for name, preset in PRESETS.items():
            points = multiply_out(preset.axes, "float32")
            methods = {options.get("method") for _, variants in points for options in variants}
            assert methods == ({None, "subspace"} if name in ("narrow", "decode") else {None, *METHODS})
            for shape, variants in points:
                assert {shape.problem(options).queries for options in variants} == {shape.N}

    def test_serving_is_16k_and_32k_tokens_whatever_the_batch(self):
        points = multiply_out(PRESETS["serving"].axes, "float16")
        batches = {(s.B, s.N) for s, _ in points}
        assert batches == {(4, 4096), (1, 16384), (8, 4096), (1, 32768)}
        wanted = {(B, N, H, causal) for B, N in batches for H in (16, 32) for causal in (False, True)}
        assert {(s.B, s.N, s.H, s.causal) for s, _ in points} == wanted
        assert {(s.kv_heads, s.D) for s, _ in points} == {(8, 128)}
        for shape, variants in points:  # blocks as they are chosen, beside those of 1024 rows, where there is time
            assert len(variants) == (8 if shape.H == 32 and shape.B * shape.N == 16384 else 5)

    def test_ranks_come_beside_those_of_groups(self):
        ((shape, variants),) = multiply_out([Axes(N=(8,), D=(64,), G=(2,), R=(30, 32), L=(64,))], "float32")
        labels = [runner.label_of("cupy", shape.problem(options)) for options in variants]
        assert labels[1:] == ["cupy subspace G=2 L=64 keys", "cupy subspace R=30 L=64 keys"]
        assert all("rank" not in options for options in Axes(method=("lsh",), R=(30,)).options())

    def test_decode_is_a_step_of_full_caches(self):
        ((shape, variants),) = multiply_out(PRESETS["decode"].axes, "float16")
        assert (shape.B, shape.H, shape.kv_heads, shape.N, shape.M, shape.D) == (8, 32, 8, 1, 32768, 128)
        problems = [shape.problem(options) for options in variants]
        labels = [
            runner.label_of("cupy", problem, cached=is_cached(options))
            for problem, options in zip(problems, variants, strict=True)
        ]
        assert labels == ["cupy exact", *(f"cupy cache G={G} L={L}" for G in (2, 4) for L in (128, 512, 1024, 2040))]

    def test_a_cache_beside_the_plain_call_is_another_variant(self):
        axes = Axes(N=(8,), D=(64,), G=(1, 2), L=(32,), cached=(False, True))
        ((_, variants),) = multiply_out([axes], "float32")
        assert [options.get("method") for options in variants] == [None, "lsh", "subspace", "subspace"]
        assert [is_cached(options) for options in variants] == [False, False, False, True]

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["-G", "3"], "group_size: must divide"),
            (["--kv-heads", "2"], "the number of heads must divide"),
            (["--backend", "numpy,cupy"], "one run times one device"),
        ],
    )
    def test_a_mistake_ends_the_run_before_it_begins(self, arguments, message, capsys):
        assert bench.main([*TINY, *arguments]) == 2
        captured = capsys.readouterr()
        assert message in captured.err
        assert "checking" not in captured.err

    def test_a_size_is_positive_and_k_means_1024(self, capsys):
        assert cli._list_of(cli._size)("8k, 3") == [8192, 3]
        assert cli._list_of(cli._block_size)("default,1k") == [None, 1024]
        with pytest.raises(SystemExit):
            bench.main([*TINY, "-N", "0"])
        assert "must be a positive number, got '0'" in capsys.readouterr().err


class TestRun:
    def test_rows_have_every_field(self, tmp_path, capsys):
        # blocks of 48 rows, and the queries that meet them, span more dimensions than are kept
        options = ["-G", "1,2", "-L", "48", "--fusion", "sum,lstsq", "--causal", "--full", "--dtype", "float32,float16"]
        code, measured = run(*options, path=tmp_path / "report.json")
        assert code == 0
        assert measured["kind"] == "cpu"
        assert {"date", "argv", "git", "threads", "cpu", "numpy", "packages"} <= set(measured["environment"])
        assert measured["peaks"]["float16"]["burst_tflops"] > 0
        rows = measured["rows"]
        assert len(rows) == 2 * 2 * (1 + 2 + 1)
        for row in rows:
            is_exact = row["options"] == EXACT
            assert row["status"] == "ok"
            assert row["reason"] is None
            cold = row["cold_us"]
            assert 0 < cold["p20"] <= cold["median"] <= cold["p80"]
            assert cold["runs"] == 2
            assert row["check_error"] < 4e-3
            seconds = cold["median"] / 1e6
            assert row["exact_tflops"] == pytest.approx(row["work"]["exact_flop"] / seconds / 1e12)
            assert row["executed_tflops"] == pytest.approx(row["work"]["executed_flop"] / seconds / 1e12)
            peak = measured["peaks"][row["shape"]["dtype"]]["burst_tflops"]
            assert row["peak_percent"] == pytest.approx(100 * row["executed_tflops"] / peak)
            if is_exact:
                assert row["error_random"] < 4e-3
                assert row["error_sample"] == 0
                assert row["grouping_us"] is None
                assert row["speedup"] == {}
            else:
                assert row["error_random"] > 0.02  # normal data has nothing to group
                assert row["error_sample"] > 1e-3
                assert row["grouping_us"]["median"] > 0
                assert row["forward_us"]["median"] > 0
                exact = next(r for r in rows if r["options"] == EXACT and r["shape"] == row["shape"])
                assert row["speedup"] == {"numpy exact": exact["cold_us"]["median"] / cold["median"]}
        assert "B=1 H=3 N=70 D=16 float16 causal" in capsys.readouterr().out
        sample = {row["label"].split()[1]: row["error_sample"] for row in rows}
        assert sample["subspace"] < sample["lsh/lstsq"] < sample["lsh/sum"]  # a model's channels do have

    def test_keys_that_were_grouped_before_are_timed_beside_plain_ones(self, tmp_path):
        options = [
            "-N",
            "2",
            "-M",
            "150",
            "-H",
            "4",
            "--kv-heads",
            "2",
            "-G",
            "1,2",
            "--method",
            "subspace",
            "--cached",
        ]
        # longer blocks than half of the sample's width: shorter ones are exact at that rank
        code, measured = run(*options, "-L", "48", path=tmp_path / "report.json")
        assert code == 0
        exact, cache = measured["rows"]
        assert (exact["label"], cache["label"]) == ("numpy exact", "numpy cache G=2 L=48")
        # 144 keys through maps of R = 8, 6 as they are; v, and q and out of every query head
        numbers = 3 * (8 * 48 + 9 * 16) + 6 * 16 + 150 * 16
        assert cache["work"]["minimum_bytes"] == 4 * (2 * numbers + 4 * 2 * 32)
        assert cache["error_random"] > 0.02
        assert 1e-3 < cache["error_sample"] < 0.5
        assert cache["grouping_us"]["median"] > 0
        assert cache["forward_us"] is None
        for row in (exact, cache):
            rate = row["work"]["minimum_bytes"] / row["cold_us"]["median"] / 1e3
            assert row["gb_per_s"] == pytest.approx(rate)
            assert row["copy_percent"] == pytest.approx(100 * rate / measured["peaks"]["float32"]["copy_gb_per_s"])
        assert cache["speedup"] == {"numpy exact": exact["cold_us"]["median"] / cache["cold_us"]["median"]}

    @pytest.mark.parametrize(
        ("name", "factor", "reason"),
        [
            ("fusion", 1.2, "the actual score error of block 0"),
            ("score_errors", 1.2, "the predicted score error of block 0"),
            ("ranks", 2, "the ranks are not all 8"),
        ],
    )
    def test_a_cache_other_than_the_methods_is_wrong(self, name, factor, reason, tmp_path, monkeypatch):
        finish = GroupedKeys._finish_block

        def off(self, grouping):
            finish(self, grouping)
            block = self.blocks[-1]
            changed = (factor * getattr(block, name)).astype(getattr(block, name).dtype)
            self._blocks[-1] = replace(block, **{name: changed})

        monkeypatch.setattr(GroupedKeys, "_finish_block", off)
        options = ["-N", "2", "-M", "150", "-G", "2", "--method", "subspace", "--cached"]
        code, measured = run(*options, path=tmp_path / "report.json")
        assert code == 1
        assert reason in measured["rows"][0]["reason"]
        assert measured["rows"][0]["cold_us"] is None

    def test_grouped_query_heads_and_other_widths_pass_the_check(self, tmp_path):
        code, measured = run(*SHARED_HEADS.split(), path=tmp_path / "report.json")
        assert code == 0
        assert [row["status"] for row in measured["rows"]] == ["ok"] * 2 * (2 * 2 + 2)

    @pytest.mark.parametrize("method", METHODS)
    def test_a_result_that_is_off_is_not_timed(self, method, tmp_path, monkeypatch, capsys):
        attend = NUMPY.attend

        def off(self, problem, Q, K, V, O, lse, maps, *rest):
            attend(self, problem, Q, K, V, O, lse, maps, *rest)
            if maps is not None:
                O[..., -1, :] *= 1.001  # the last query of each head

        monkeypatch.setattr(NUMPY, "attend", off)
        code, measured = run("-G", "1,2", "--method", method, path=tmp_path / "report.json")
        assert code == 1
        exact, approximate = measured["rows"]
        assert exact["status"] == "ok"
        assert approximate["status"] == "wrong"
        assert "a row is off by 1" in approximate["reason"]
        assert [approximate[key] for key in runner.TIMES] == [None] * 5
        assert approximate["exact_tflops"] is approximate["peak_percent"] is None
        assert approximate["speedup"] == {}
        assert "wrong: WrongResult" in capsys.readouterr().out

    def test_rows_that_nobody_wrote_are_wrong(self, tmp_path, monkeypatch):
        attend = NUMPY.attend

        def forget_a_head(self, problem, Q, K, V, O, lse, maps, *rest):
            kept = O[:, 1].copy()  # a head that the oracle does not look at
            attend(self, problem, Q, K, V, O, lse, maps, *rest)
            O[:, 1] = kept

        monkeypatch.setattr(NUMPY, "attend", forget_a_head)
        code, measured = run("-G", "1", path=tmp_path / "report.json")
        assert code == 1
        assert "not written" in measured["rows"][0]["reason"]

    @pytest.mark.parametrize("fusion", ["sum", "lstsq"])
    def test_groups_other_than_the_methods_are_wrong(self, fusion, tmp_path, monkeypatch):
        group_maps = NUMPY.group_maps

        def ungrouped(self, problem, Q, K):  # consistent, but not the method
            maps = group_maps(self, problem, Q, K)
            channels = np.broadcast_to(np.arange(problem.width, dtype=np.int32), maps.channels.shape)
            return GroupMaps(channels.copy(), maps.gains)

        monkeypatch.setattr(NUMPY, "group_maps", ungrouped)
        code, measured = run("-G", "2", "--method=lsh", "--fusion", fusion, path=tmp_path / "report.json")
        assert code == 1
        assert "blocks differ from the reference" in measured["rows"][0]["reason"]

    @pytest.mark.parametrize("by", ["keys", "queries"])
    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            (lambda maps: replace(maps, ranks=maps.ranks - 1), "the ranks are not all 8"),
            (lambda maps: replace(maps, score_errors=1.1 * maps.score_errors), "the predicted score error of block 0"),
            (lambda maps: replace(maps, fusion=1.2 * maps.fusion), "the actual score error of block 0"),
            (lambda maps: replace(maps, fusion=maps.fusion * np.nan), "the actual score error of block 0 is nan"),
            (lambda maps: maps.key_mean, "the maps are ndarray"),
        ],
        ids=["ranks", "predicted", "actual", "nan", "kind"],
    )
    def test_maps_other_than_the_methods_are_wrong(self, change, reason, by, tmp_path, monkeypatch):
        group_maps = NUMPY.group_maps
        monkeypatch.setattr(NUMPY, "group_maps", lambda self, *arguments: change(group_maps(self, *arguments)))
        code, measured = run("-G", "2", "--method=subspace", "--group-by", by, path=tmp_path / "report.json")
        assert code == 1
        assert reason in measured["rows"][0]["reason"]
        assert measured["rows"][0]["cold_us"] is None

    @pytest.mark.parametrize("by", ["keys", "queries"])
    def test_maps_that_are_not_refined_are_wrong(self, by, tmp_path, monkeypatch):
        group_maps = NUMPY.group_maps

        def unrefined(self, problem, Q, K):  # consistent, but less than was asked for
            return group_maps(self, replace(problem, grouping=replace(problem.grouping, refine=0)), Q, K)

        monkeypatch.setattr(NUMPY, "group_maps", unrefined)
        code, measured = run("-G", "2", "--method=subspace", "--group-by", by, path=tmp_path / "report.json")
        assert code == 1
        assert "the reference's is" in measured["rows"][0]["reason"]

    @pytest.mark.parametrize(
        ("error", "status", "code"),
        [
            (NotImplementedError("no kernel"), "not supported", 0),
            (MemoryError("too large"), "out of memory", 0),
            (RuntimeError("launch failed"), "failed", 1),
        ],
    )
    def test_a_failure_is_told_and_the_run_goes_on(self, error, status, code, tmp_path, monkeypatch):
        attend = NUMPY.attend

        def fail(self, problem, Q, K, V, O, lse, maps, *rest):
            if maps is None and problem.queries in (40, 70):  # not the packaged sample, whose error is taken beside
                raise error
            attend(self, problem, Q, K, V, O, lse, maps, *rest)

        monkeypatch.setattr(NUMPY, "attend", fail)
        got, measured = run("-G", "1,2", "--method=subspace", "-N", "40,70", path=tmp_path / "report.json")
        assert got == code
        assert [row["status"] for row in measured["rows"]] == [status, "ok"] * 2
        assert str(error) in measured["rows"][0]["reason"]
        assert measured["rows"][1]["cold_us"]["median"] > 0

    def test_profile_neither_checks_nor_times(self, tmp_path, monkeypatch, capsys):
        calls = []
        attend = NUMPY.attend
        monkeypatch.setattr(NUMPY, "attend", lambda self, *args: calls.append(attend(self, *args)))
        assert bench.main([*TINY, "-G", "1,2", "--profile", "--json", str(tmp_path / "report.json")]) == 0
        assert len(calls) == 3
        assert not (tmp_path / "report.json").exists()
        assert capsys.readouterr().out == ""


class TestFile:
    def test_a_run_that_is_cut_off_keeps_what_it_has(self, tmp_path, monkeypatch):
        path = tmp_path / "report.json"
        kept = []
        attend = NUMPY.attend

        def stop_at_the_second_shape(self, problem, *rest):
            kept.append(len(json.loads(path.read_text(encoding="utf-8"))["rows"]))
            if problem.queries == 70:
                raise KeyboardInterrupt
            attend(self, problem, *rest)

        monkeypatch.setattr(NUMPY, "attend", stop_at_the_second_shape)
        with pytest.raises(KeyboardInterrupt):
            run("-G", "1", "-N", "40,70", path=path)
        assert set(kept[:-1]) == {0}  # written before the first call
        (row,) = report.load(path)["rows"]
        assert (row["shape"]["N"], row["status"]) == (40, "ok")

    def test_a_run_goes_on_with_the_shapes_that_the_file_lacks(self, tmp_path, monkeypatch, capsys):
        path = tmp_path / "report.json"
        run("-G", "1,2", "-N", "40", "--resume", path=path)  # there is nothing yet to go on with
        first = report.load(path)
        monkeypatch.setattr(runner, "measure_peak", None)  # that of the dtype is known
        code, measured = run("-G", "1,2", "-N", "40,70", "--resume", path=path)
        assert code == 0
        assert measured["rows"][:3] == first["rows"]
        assert [row["shape"]["N"] for row in measured["rows"]] == [40] * 3 + [70] * 3
        assert measured["peaks"] == first["peaks"]
        assert [later["argv"][0] for later in measured["environment"]["resumed"]] == ["run"]
        capsys.readouterr()
        changed = measured | {"environment": measured["environment"] | {"numpy": "1.0"}}
        report.save(changed, path)
        assert bench.main([*TINY, "--resume", "--json", str(path)]) == 2
        assert f"numpy of {path} is 1.0, here it is {np.__version__}" in capsys.readouterr().err
        assert report.load(path) == changed
        assert bench.main([*TINY, "--resume"]) == 2
        assert "needs --json FILE" in capsys.readouterr().err

    def test_a_file_that_cannot_be_written_ends_the_run_before_it_begins(self, tmp_path, capsys):
        (tmp_path / "file").touch()
        assert bench.main([*TINY, "--json", str(tmp_path / "file" / "report.json")]) == 2
        assert "checking" not in capsys.readouterr().err

    def test_the_length_of_sustained_load_is_told(self, tmp_path, capsys):
        _, measured = run("-G", "1", "--sustained", "2.5", path=tmp_path / "report.json")
        assert measured["sustained_seconds"] == 2.5
        with pytest.raises(SystemExit):
            bench.main([*TINY, "--sustained", "0"])
        assert "must be a positive number, got '0'" in capsys.readouterr().err


class TestPeers:
    def test_a_missing_peer_is_told_with_its_reason(self, tmp_path, monkeypatch, capsys):
        monkeypatch.setitem(sys.modules, "torch", None)  # importing it raises
        _, measured = run("-G", "1", "--peers", "all", path=tmp_path / "report.json")
        assert set(measured["missing_peers"]) == {"torch-cpu"}
        assert "ModuleNotFoundError" in measured["missing_peers"]["torch-cpu"]
        assert "peer torch-cpu is missing" in capsys.readouterr().err

    @pytest.mark.parametrize("factor", [1.0, 1.01])
    def test_a_peer_is_checked_like_everybody(self, factor, tmp_path, monkeypatch):
        def prepare(problem, q, k, v):
            out, _ = reference.exact_attention(q, k, v, scale=problem.scale, causal_offset=problem.causal_offset)
            return lambda: factor * out

        monkeypatch.setattr(cli, "load_peers", lambda *_: ({"torch-cpu": prepare}, {}))
        code, measured = run("-G", "1,2", "--causal", path=tmp_path / "report.json")
        assert code == 0  # a peer's mistake is not ours
        ours, *approximate, peer = measured["rows"]
        assert peer["status"] == ("ok" if factor == 1 else "wrong")
        assert len(approximate) == 2
        for row in (ours, *approximate):
            assert ("torch-cpu" in row["speedup"]) == (factor == 1)


def flash_attn_func(q, k, v, *, softmax_scale, causal):
    """Stand in for FlashAttention-4's: (B, N, H, D) views; what it does not take is an assertion."""
    from torch.nn.functional import scaled_dot_product_attention

    assert q.shape[-1] % 8 == 0, "head_dim must be divisible by 8"
    tensors = (x.transpose(1, 2) for x in (q, k, v))
    out = scaled_dot_product_attention(*tensors, scale=softmax_scale, is_causal=causal, enable_gqa=True)
    return out.transpose(1, 2), None


class TestFlashAttention4:
    @pytest.fixture
    def prepare(self, monkeypatch):
        pytest.importorskip("torch")
        monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))
        monkeypatch.setitem(sys.modules, "flash_attn.cute", SimpleNamespace(flash_attn_func=flash_attn_func))
        return PEERS["flash-attn-4"].load(1)

    @pytest.mark.parametrize("causal", [False, True])
    def test_it_gets_its_layout_scale_and_mask(self, causal, prepare):
        shape = Shape(B=2, H=4, kv_heads=2, N=9, M=9, D=16, E=16, dtype="float32", causal=causal)
        problem = shape.problem(EXACT)
        q, k, v = device.Cpu().inputs(shape, seed=1)
        expected, _ = reference.exact_attention(q, k, v, scale=problem.scale, causal_offset=problem.causal_offset)
        assert np.ptp(expected) > 0.1
        np.testing.assert_allclose(device.to_host(prepare(problem, q, k, v)()), expected, rtol=0, atol=1e-5)

    @pytest.mark.parametrize(("D", "M", "reason"), [(12, 9, "divisible by 8"), (16, 20, "bottom-right only")])
    def test_what_it_does_not_take_is_not_supported(self, D, M, reason, prepare):
        shape = Shape(B=1, H=1, kv_heads=1, N=9, M=M, D=D, E=D, dtype="float32", causal=True)
        problem = replace(shape.problem(EXACT), causal_offset=0)
        with pytest.raises(NotImplementedError, match=reason):
            prepare(problem, *device.Cpu().inputs(shape, seed=1))


class StandInGraph:
    """Stand in for cuDNN's graph: one node, which PyTorch computes; an odd width is not supported."""

    def __init__(self, **_):
        pass

    def tensor(self, dim, stride, data_type):
        return (*dim, *stride, data_type, object())

    def sdpa(self, *inputs, attn_scale, generate_stats, diagonal_alignment=None, diagonal_band_right_bound=None):
        assert not generate_stats
        self.inputs, self.scale, self.alignment = inputs, attn_scale, diagonal_alignment
        assert (diagonal_band_right_bound == 0) == (diagonal_alignment is not None)
        return self, None

    def set_output(self, *_):
        return self

    set_dim = set_stride = set_data_type = set_output

    def build(self, _):
        if self.inputs[0][3] % 2:
            raise NotSupportedByGraph("no plan")

    def get_workspace_size(self):
        return 4

    def execute(self, arrays, workspace, *, handle):
        import torch

        assert (workspace.nbytes, handle) == (4, 17)
        q, k, v = (arrays[x] for x in self.inputs)
        N, M = q.shape[2], k.shape[2]
        offset = {None: M, "top-left": 0, "bottom-right": M - N}[self.alignment]
        mask = torch.ones(N, M, dtype=torch.bool).tril(offset)
        sdpa = torch.nn.functional.scaled_dot_product_attention
        arrays[self].copy_(sdpa(q, k, v, attn_mask=mask, scale=self.scale, enable_gqa=True))


class NotSupportedByGraph(Exception):  # noqa: N818
    pass


class TestCudnnFrontend:
    @pytest.fixture
    def prepare(self, monkeypatch):
        torch = pytest.importorskip("torch")
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=5))
        streams = []
        module = SimpleNamespace(
            create_handle=lambda: 17,
            set_stream=lambda *, handle, stream: streams.append((handle, stream)),
            pygraph=StandInGraph,
            data_type=SimpleNamespace(FLOAT=0),
            heur_mode=SimpleNamespace(A=0, FALLBACK=1),
            diagonal_alignment=SimpleNamespace(TOP_LEFT="top-left", BOTTOM_RIGHT="bottom-right"),
            cudnnGraphNotSupportedError=NotSupportedByGraph,
        )
        monkeypatch.setitem(sys.modules, "cudnn", module)
        yield PEERS["cudnn-frontend"].load(1)
        assert set(streams) == {(17, 5)}

    @pytest.mark.parametrize("offset", [None, 0, 5])
    def test_it_gets_its_arrays_scale_and_mask(self, offset, prepare):
        shape = Shape(B=2, H=4, kv_heads=2, N=9, M=14, D=16, E=8, dtype="float32", causal=offset is not None)
        problem = replace(shape.problem(EXACT), causal_offset=offset)
        q, k, v = device.Cpu().inputs(shape, seed=1)
        expected, _ = reference.exact_attention(q, k, v, scale=problem.scale, causal_offset=offset)
        assert np.ptp(expected) > 0.1
        np.testing.assert_allclose(device.to_host(prepare(problem, q, k, v)()), expected, rtol=0, atol=1e-5)

    def test_what_it_does_not_take_is_not_supported(self, prepare):
        shape = Shape(B=1, H=1, kv_heads=1, N=9, M=9, D=13, E=13, dtype="float32", causal=False)
        with pytest.raises(NotImplementedError, match="no plan"):
            prepare(shape.problem(EXACT), *device.Cpu().inputs(shape, seed=1))


class TestTiming:
    def test_contenders_take_turns_on_a_clean_cache(self):
        log = []

        class Recorder(device.Cpu):
            def scrub(self):
                log.append("scrub")

        a, b = (lambda: log.append("a")), (lambda: log.append("b"))
        times = time_cold(Recorder(), [a, b], rounds=3)
        assert log == ["scrub", "a", "scrub", "b"] * 3
        assert [t.runs for t in times] == [3, 3]

    def test_threads_are_set_in_a_new_process(self, tmp_path):
        path = tmp_path / "report.json"
        command = [sys.executable, "-m", "distrattn_np.bench", *TINY, "-G", "1", "--threads", "1", "--json", str(path)]
        environment = {name: value for name, value in os.environ.items() if name not in cli.THREAD_VARIABLES}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert json.loads(path.read_text(encoding="utf-8"))["environment"]["threads"] == 1

    def test_import_needs_no_device_library(self):
        code = "import sys, distrattn_np.bench; print(sorted({'cupy', 'torch', 'numba'} & set(sys.modules)))"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "[]"


class TestOracle:
    @pytest.fixture
    def oracle(self):
        shape = Shape(B=1, H=2, kv_heads=1, N=200, M=90, D=8, E=3, dtype="float32", causal=True)
        return Oracle(shape.problem(EXACT), *device.Cpu().inputs(shape, seed=1))

    def test_expected_rows_are_those_of_exact_attention(self):
        shape = Shape(B=1, H=2, kv_heads=1, N=200, M=90, D=8, E=3, dtype="float32", causal=True)
        q, k, v = device.Cpu().inputs(shape, seed=1)
        problem = shape.problem(EXACT)
        oracle = Oracle(problem, q, k, v)
        exact, _ = reference.exact_attention(q, k, v, scale=problem.scale, causal_offset=problem.causal_offset)
        assert {0, 199} <= set(oracle.rows)
        assert np.abs(oracle.exact).max() > 0.1
        np.testing.assert_allclose(oracle.rows_of(exact), oracle.exact, rtol=0, atol=1e-13)

    @pytest.mark.parametrize("causal", [False, True])
    @pytest.mark.parametrize("by", ["keys", "queries"])
    @pytest.mark.parametrize("M", [90, 300])
    def test_expected_rows_of_maps_are_those_of_the_reference(self, M, by, causal):
        shape = Shape(B=2, H=4, kv_heads=2, N=200, M=M, D=8, E=3, dtype="float64", causal=causal)
        q, k, v = device.Cpu().inputs(shape, seed=1)
        problem = shape.problem({"method": "subspace", "group_size": 2, "group_by": by, "block_size": 32})
        oracle = Oracle(shape.problem(EXACT), q, k, v)
        backend = backends.load_by_name("numpy")
        maps = backend.group_maps(problem, q, k)
        wanted, _ = reference.subspace_attention(
            q,
            k,
            v,
            reference.Maps(maps.sampling, maps.fusion, maps.key_mean, maps.ranks, maps.score_errors),
            scale=problem.scale,
            block_size=32,
            group_by=by,
            causal_offset=problem.causal_offset,
        )
        expected = oracle.expected(backend, problem, q, k)
        assert oracle.error_to_exact(expected) > 0.01
        np.testing.assert_allclose(oracle.rows_of(wanted), expected, rtol=0, atol=1e-12)

    def test_nan_and_values_in_empty_rows_are_wrong(self, oracle):
        empty = np.flatnonzero(~oracle.exact[0].any(axis=-1))
        assert len(empty) > 0  # N > M: the first queries see nothing
        for value in (np.nan, 1e-3):
            actual = oracle.exact.copy()
            actual[0, empty[0], 0] = value
            with pytest.raises(WrongResult):
                oracle.check(actual, oracle.exact)
        assert oracle.check(oracle.exact, oracle.exact) == 0


@pytest.fixture
def results(tmp_path):
    """Return a folder of results with a CPU report of two shapes, the last of whose rows failed."""
    folder = tmp_path / "results"
    _, measured = run("-G", "1,2", "-N", "40,70", path=folder / "cpu.json")
    measured["rows"][-1] |= {"status": "out of memory", "reason": "MemoryError", "cold_us": None, "speedup": {}}
    (folder / "cpu.json").write_text(json.dumps(measured), encoding="utf-8")
    return folder


DOCUMENT = """a
<!-- bench:begin cpu -->
old
<!-- bench:end cpu -->
b
<!-- bench:begin gpu -->
<!-- bench:end gpu -->
c"""


class TestTable:
    def test_blocks_are_written_and_the_rest_is_kept(self, results):
        text = table.fill(DOCUMENT, results)
        assert text.startswith("a\n<!-- bench:begin cpu -->\n")
        assert text.endswith(f"<!-- bench:begin gpu -->\n{table.MISSING}\n<!-- bench:end gpu -->\nc")
        assert "old" not in text
        lines = text.splitlines()
        assert [line.split(" | ")[0] for line in lines if line.startswith("| numpy ")] == [
            "| numpy exact",
            "| numpy lsh/sum G=2 L=32 queries",
            "| numpy subspace G=2 L=32 keys",
        ]
        (second,) = (line for line in lines if line.startswith("| B=1 H=3 N=70"))
        assert "out of memory" in second
        tables = [line.count("|") for line in lines if line.startswith("|")]
        assert tables == [tables[0]] * 5 + [tables[-1]] * 3  # as many cells in each line as in its heading
        assert table.fill(text, results) == text

    def test_shapes_with_other_contenders_have_a_table_of_their_own(self, results):
        measured = json.loads((results / "cpu.json").read_text(encoding="utf-8"))
        rows = [row | {"shape_label": f"shape {name}"} for name in "abc" for row in measured["rows"][:3]]
        del rows[4]
        text = table.markdown(measured | {"rows": rows})
        lines = [line for line in text.splitlines() if line.startswith("| shape")]
        assert [(line[:9], line.count("|")) for line in lines] == [("| shape b", 4), ("| shape c", 5)]
        assert text.count("Milliseconds (x") == 2

    def test_check_tells_a_table_that_is_not_current(self, results, tmp_path, capsys):
        path = tmp_path / "doc.md"
        path.write_text(DOCUMENT, encoding="utf-8")
        arguments = ["table", str(path), "--results", str(results)]
        assert bench.main([*arguments, "--check"]) == 1
        assert path.read_text(encoding="utf-8") == DOCUMENT
        assert bench.main(arguments) == 0
        assert bench.main([*arguments, "--check"]) == 0
        (results / "cpu.json").unlink()
        assert bench.main([*arguments, "--check"]) == 1
        assert "not current" in capsys.readouterr().out

    @pytest.mark.parametrize("text", ["<!-- bench:begin cpu -->\n", "<!-- bench:begin tpu -->\n<!-- bench:end tpu -->"])
    def test_a_bad_mark_is_refused(self, text, tmp_path):
        with pytest.raises(ValueError, match="bench marks must"):
            table.fill(text, tmp_path)

    def test_documents_are_current(self):
        texts = [(ROOT / path).read_text(encoding="utf-8") for path in cli.DOCUMENTS]
        blocks = {block["kind"]: block[0] for text in texts for block in table.BLOCK.finditer(text)}
        assert set(blocks) == set(table.RESULTS)
        for kind, file in table.RESULTS.items():
            is_measured = (ROOT / "bench" / "results" / file).exists()
            assert (table.MISSING in blocks[kind]) == (not is_measured)
        for text in texts:
            assert table.fill(text, ROOT / "bench" / "results") == text, "run distrattn bench table"

    def test_a_report_that_was_cut_off_before_its_first_shape_is_no_measurement(self, results):
        measured = json.loads((results / "cpu.json").read_text(encoding="utf-8"))
        (results / "cpu.json").write_text(json.dumps(measured | {"rows": []}), encoding="utf-8")
        assert table.fill(DOCUMENT, results).count(table.MISSING) == 2


class TestReports:
    def test_compare_tells_the_ratio(self, results, tmp_path, capsys):
        measured = json.loads((results / "cpu.json").read_text(encoding="utf-8"))
        for row in measured["rows"][:5]:
            row["cold_us"]["median"] *= 2
        slower = tmp_path / "slower.json"
        slower.write_text(json.dumps(measured), encoding="utf-8")
        capsys.readouterr()
        assert bench.main(["compare", str(results / "cpu.json"), str(slower)]) == 0
        assert capsys.readouterr().out.count("0.500") == 5

    def test_a_file_that_is_no_report_is_refused(self, tmp_path, capsys):
        path = tmp_path / "other.json"
        path.write_text("{}", encoding="utf-8")
        assert bench.main(["compare", str(path), str(path)]) == 2
        assert "not a bench report" in capsys.readouterr().err

    def test_tables_need_no_rich(self, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr("distrattn_np.bench.report.find_spec", lambda _: None)
        run("-G", "1,2", path=tmp_path / "report.json")
        lines = capsys.readouterr().out.splitlines()
        start = next(i for i, line in enumerate(lines) if line.startswith("contender"))
        assert len({len(line) for line in lines[start : start + 4]}) == 1

    def test_list_names_every_preset(self, capsys):
        assert bench.main(["list"]) == 0
        names = [line.partition(":")[0] for line in capsys.readouterr().out.splitlines()]
        assert list(dict.fromkeys(names)) == list(PRESETS)


def gpu_row(label: str, options: dict, N: int, milliseconds: float, **shape) -> dict:
    """Return a row as a run on a GPU leaves it."""
    sizes = {"B": 1, "H": 10, "kv_heads": 10, "N": N, "M": N, "D": 64, "dtype": "float16", "causal": False} | shape
    sizes = Shape(**({"E": sizes["D"]} | sizes))
    return {
        "label": label,
        "contender": label.split()[0],
        "shape_label": sizes.label,
        "shape": asdict(sizes),
        "options": options,
        "status": "ok",
        "reason": None,
        "work": asdict(work_of(sizes.problem(options))),
        "cold_us": {"median": 1e3 * milliseconds, "p20": None, "p80": None, "runs": 3},
        **dict.fromkeys(("burst_us", "sustained_us"), 900 * milliseconds),
        "executed_tflops": 100.0,
        "peak_percent": 50.0,
        "gb_per_s": 30.0,
        "copy_percent": 1.0,
    }


@pytest.fixture
def measured():
    """Return a report of an H100: two methods and two peers at two sizes, and a shape of one size."""
    halved = {"method": "subspace", "group_size": 2, "block_size": None}
    rows = []
    for N, scale in ((2048, 1), (4096, 4)):
        rows += [
            gpu_row("cupy exact", EXACT, N, 1.0 * scale),
            gpu_row(f"cupy subspace G=2 L={N // 8} keys", halved, N, 0.5 * scale),
            gpu_row("torch-flash", EXACT, N, 4.0 * scale),
            gpu_row("torch-cudnn", EXACT, N, 2.0 * scale),
        ]
    rows += [gpu_row("cupy exact", EXACT, 8192, 3.0, H=16, kv_heads=8), gpu_row("torch-flash", EXACT, 2048, 1.0, D=32)]
    return {
        "schema": 1,
        "kind": "gpu",
        "environment": {
            "gpu": "NVIDIA H100",
            "date": "2026-11-22",
            "compute_capability": "90",
            "nvrtc": "13.0",
            "gpu_state": {"clocks.max.sm": "1980 MHz"},
        },
        "peaks": {
            "float16": {
                "product": "a product",
                "burst_tflops": 700.0,
                "sustained_tflops": 600.0,
                "copy": "a copy",
                "copy_gb_per_s": 3000.0,
            }
        },
        "rows": rows,
    }


class TestPlot:
    def test_the_base_is_the_fastest_peer_of_each_shape(self, measured):
        rows = measured["rows"]
        base = plot.base_times(rows)
        assert base[rows[0]["shape_label"]] == 2000
        assert rows[8]["shape_label"] not in base  # no peer was timed there
        ours = [row for row in rows if row["contender"] == "cupy"]
        assert plot.base_times(ours)[rows[0]["shape_label"]] == 1000

    def test_heads_are_drawn_where_they_have_two_sizes(self, measured):
        wide = [gpu_row("cupy exact", EXACT, N, 1.0, D=128) for N in (2048, 4096)]
        (sweep, other) = plot.sweeps_of(measured["rows"] + wide)
        assert sweep == measured["rows"][:8]  # one size of D = 32 is no line
        assert other == wide

    def test_of_batches_the_largest_is_drawn(self, measured):
        batches = [gpu_row("cupy exact", EXACT, 2048, 0.5, B=B) for B in (4, 8, 2)]
        (sweep,) = plot.sweeps_of(measured["rows"][:8] + batches)
        assert sweep == [batches[1], *measured["rows"][4:8]]

    def test_a_line_goes_on_where_the_block_size_follows_the_shape(self, measured):
        names = [plot._series(row) for row in measured["rows"][:8]]
        assert names == ["cupy exact", "cupy subspace G=2", "PyTorch FlashAttention-2", "PyTorch cuDNN"] * 2
        options = {"method": "lsh", "fusion": "lstsq", "group_size": 4, "group_by": "keys", "block_size": 512}
        assert plot._series(measured["rows"][0] | {"options": options}) == "cupy lsh lstsq G=4 by=keys L=512"

    def test_the_picture_lies_beside_the_report(self, results, capsys):
        pytest.importorskip("matplotlib")
        assert bench.main(["plot", str(results / "cpu.json")]) == 0
        picture = results / "cpu.png"
        assert picture.read_bytes().startswith(b"\x89PNG")
        assert str(picture) in capsys.readouterr().out

    def test_a_report_of_one_size_is_refused(self, results, capsys):
        pytest.importorskip("matplotlib")
        measured = json.loads((results / "cpu.json").read_text(encoding="utf-8"))
        measured["rows"] = [row for row in measured["rows"] if row["shape"]["N"] == 40]
        (results / "cpu.json").write_text(json.dumps(measured), encoding="utf-8")
        assert bench.main(["plot", str(results / "cpu.json")]) == 2
        assert "two or more sizes" in capsys.readouterr().err


class TestRoofline:
    def test_exponentials_are_pairs_over_time_and_a_share_of_the_unit(self, measured):
        roofline.add_exponentials(measured)
        assert roofline.exponential_peak(measured["environment"]) == pytest.approx(16 * 132 * 1980e6 / 1e12)
        row = measured["rows"][1]
        rate = 10 * 2048**2 / 0.5e-3 / 1e12
        assert row["tera_exponentials_per_s"] == pytest.approx(rate)
        assert row["exponentials_percent"] == pytest.approx(100 * rate / 4.18176)
        fewer = measured["environment"] | {"multiprocessors": 66}
        assert roofline.exponential_peak(fewer) == pytest.approx(4.18176 / 2)

    @pytest.mark.parametrize("change", [{"gpu_state": None}, {"compute_capability": "100"}])
    def test_an_unknown_rate_is_no_rate(self, change, measured):
        measured["environment"] |= change
        roofline.add_exponentials(measured)
        assert measured["rows"][0]["tera_exponentials_per_s"] > 0
        assert measured["rows"][0]["exponentials_percent"] is None
        assert "exponentials a second" not in roofline.markdown(measured)

    def test_tables_are_of_the_largest_shape_of_a_kind_and_name_the_nearest_limit(self, measured):
        measured["rows"][5] |= {"peak_percent": 2.0}
        text = roofline.markdown(measured)
        headings = [line for line in text.splitlines() if line.startswith("**")]
        assert headings == [f"**{measured['rows'][i]['shape_label']}**" for i in (4, 8, 9)]
        lines = [line.split(" | ") for line in text.splitlines() if line.startswith("| cupy")]
        assert [line[-1] for line in lines] == ["products |", "exponentials |", "products |"]
        assert {len(line) for line in lines} == {11}

    def test_of_a_run_on_a_cpu_there_are_rates_and_no_kernels(self, results, capsys):
        path = str(results / "cpu.json")
        assert bench.main(["roofline", path]) == 0
        assert "| numpy exact |" in capsys.readouterr().out
        assert bench.main(["roofline", path, "--kernels"]) == 2
        assert "only a report of a GPU" in capsys.readouterr().err

    def test_kernels_are_those_of_the_plan_with_what_their_code_says(self, measured, tmp_path, capsys):
        pytest.importorskip("cuda.bindings.nvrtc")
        try:
            roofline.cuobjdump()
            roofline.nvrtc_version()
        except Exception as error:  # the library is loaded by the first call
            pytest.skip(f"no compiler: {error}")
        path = tmp_path / "h100.json"
        report.save(measured | {"rows": measured["rows"][4:8]}, path)
        assert bench.main(["roofline", str(path), "--kernels"]) == 0
        kept = report.load(path)
        exact, halved, *peers = kept["rows"]
        builds = kept["kernels"]["builds"]
        assert [row["launches"] for row in peers] == [None, None]
        assert [builds[place]["stem"] for place in exact["launches"]] == ["forward_sm90"]
        assert {"gram_sm90", "subspace_maps", "forward_sm90"} <= {builds[i]["stem"] for i in halved["launches"]}
        assert len({json.dumps([x["stem"], x["defines"]]) for x in builds}) == len(builds)
        for build in builds:
            assert 0 < build["registers"] <= 65536 // build["threads"]
            assert build["local_bytes"] == build["local_accesses"] == 0  # no spills
            assert (build["hgmma"] > 0) == build["stem"].endswith("_sm90")
            if build["stem"] == "forward_sm90":
                assert build["exponentials"] > 0
                assert build["shared_bytes"] > 48 << 10
        lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| forward_sm90")]
        assert len(lines) == 2

    @pytest.mark.gpu
    def test_kernels_that_are_compiled_again_are_those_that_run(self):
        from distrattn_np.backends.cupy_device import ON_CURRENT_DEVICE, kernel_of

        roofline.cuobjdump()
        shape = Shape(B=1, H=2, kv_heads=2, N=256, M=256, D=64, E=64, dtype="float16", causal=False)
        facts = ON_CURRENT_DEVICE.device
        plan, _ = plan_call(shape.problem(EXACT), facts, returns_lse=False)
        (launch,) = plan.launches
        kernel = kernel_of(launch.stem, launch.defines, launch.shared)
        build = roofline.describe_kernel(launch, facts)
        assert (build["registers"], build["local_bytes"]) == (kernel.num_regs, kernel.local_size_bytes)
        assert build["shared_bytes"] - launch.shared in (kernel.shared_size_bytes, kernel.shared_size_bytes + 1024)
