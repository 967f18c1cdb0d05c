"""The question: does the command line do what its help says, and name what is wrong."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import distrattn_np
from distrattn_np import cli, demo, info


def small_arrays(seed=0):
    rng = np.random.default_rng(seed)
    q = rng.standard_normal((4, 40, 16), dtype=np.float32)
    k = rng.standard_normal((2, 50, 16), dtype=np.float32)
    v = rng.standard_normal((2, 50, 8), dtype=np.float32)
    return {"q": q, "k": k, "v": v}


def saved(folder, **arrays):
    path = folder / "input.npz"
    np.savez(path, **arrays)
    return str(path)


def demo_report(capsys, *arguments):
    assert cli.main(["demo", "--backend", "numpy", "--json", *arguments]) == 0
    return json.loads(capsys.readouterr().out)


class TestDemo:
    def test_report_on_small_input(self, tmp_path, capsys):
        arrays = small_arrays()
        report = demo_report(capsys, "--no-plot", "--input", saved(tmp_path, **arrays, scale=0.5, causal=True))
        assert report["backend"] == "numpy"
        assert report["plot"] is None
        assert report["input"]["q"] == [1, 4, 40, 16]
        assert report["input"]["scale"] == 0.5
        assert [row["group_size"] for row in report["results"]] == [1, 2, 4, 2, 4, 2]
        exact, *others = report["results"]
        assert exact["relative_error"] == exact["total_variation"] == 0
        assert exact["speed_up"] == 1
        for row in others:
            assert row["seconds"] > 0
            assert 0 < row["total_variation"] < 1
            assert np.shape(row["relative_error_per_head"]) == (1, 4)

    def test_errors_are_those_of_the_call(self, tmp_path, capsys):
        arrays = small_arrays()
        report = demo_report(capsys, "--no-plot", "--input", saved(tmp_path, **arrays))
        q, k, v = (array[np.newaxis] for array in arrays.values())
        exact = distrattn_np.exact_attention(q, k, v)
        grouped = distrattn_np.distr_attention(q, k, v, method="subspace", group_size=4)
        wanted = [np.linalg.norm(grouped[0, h] - exact[0, h]) / np.linalg.norm(exact[0, h]) for h in range(4)]
        np.testing.assert_allclose(report["results"][2]["relative_error_per_head"], [wanted], rtol=1e-5)

    def test_equal_channels_have_no_error(self, tmp_path, capsys):
        arrays = small_arrays()
        for name in "qk":
            arrays[name] = np.repeat(arrays[name][..., :4], 4, axis=-1)
        report = demo_report(capsys, "--no-plot", "--input", saved(tmp_path, **arrays))
        for row in report["results"]:
            assert row["relative_error"] < 1e-5
            assert row["total_variation"] < 1e-5

    def test_rows_that_see_nothing(self, tmp_path, capsys):
        arrays = small_arrays()
        arrays["k"], arrays["v"] = arrays["k"][:, :30], arrays["v"][:, :30]  # 40 queries: the first 10 see no key
        report = demo_report(capsys, "--no-plot", "--input", saved(tmp_path, **arrays, causal=True))
        assert 0 < report["results"][1]["total_variation"] < 0.75  # those rows count as equal

    def test_picture(self, tmp_path, capsys):
        pytest.importorskip("matplotlib")
        picture = tmp_path / "rows.png"
        report = demo_report(capsys, "--plot", str(picture), "--input", saved(tmp_path, **small_arrays()))
        assert report["plot"] == str(picture)
        assert picture.read_bytes().startswith(b"\x89PNG")

    @pytest.mark.parametrize("has_extras", [True, False])
    def test_text(self, tmp_path, capsys, monkeypatch, has_extras):
        if has_extras:
            pytest.importorskip("rich")
        else:
            monkeypatch.setattr(demo, "find_spec", lambda _: None)
        plot = [] if not has_extras else ["--no-plot"]
        monkeypatch.chdir(tmp_path)
        assert cli.main(["demo", "--backend", "numpy", "--input", saved(tmp_path, **small_arrays()), *plot]) == 0
        printed = capsys.readouterr()
        for case in demo.CASES:
            assert case.label in printed.out
        assert ("distrattn_np[demo]" in printed.out) != has_extras
        assert ("needs matplotlib" in printed.err) != has_extras
        assert "fine-tunes" in printed.out

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"v": None}, r"--input: must hold arrays q, k and v, got q, k in .*input\.npz"),
            ({"q": np.ones((4, 16), np.float32)}, r"--input: q must have 3 or 4 axes, got shape \(4, 16\)"),
            ({"k": np.full((2, 50, 16), np.nan, np.float32)}, r"--input: k must be finite, got NaN or infinity"),
            ({"q": np.ones((4, 0, 16), np.float32)}, r"--input: nothing to compare, q is \(1, 4, 0, 16\) and k .*"),
            ({"q": np.ones((4, 40, 16), np.int32)}, r"q: the dtype must be one of .*int32"),
            ({"q": np.ones((4, 40, 8), np.float32)}, r"k: must have q's width 8, got .*"),
            ({"scale": [1.0, 2.0]}, r"--input: scale must be a single value, got shape \(2,\)"),
            ({"causal": "left"}, r"causal: must be True, False, 'bottom-right' or 'top-left', got 'left'"),
        ],
    )
    def test_bad_input_is_named(self, tmp_path, capsys, change, message):
        arrays = {name: array for name, array in (small_arrays() | change).items() if array is not None}
        assert cli.main(["demo", "--backend", "numpy", "--no-plot", "--input", saved(tmp_path, **arrays)]) == 2
        assert_error(capsys, message)

    @pytest.mark.parametrize("content", [None, b"hello"])
    def test_bad_file_is_named(self, tmp_path, capsys, content):
        path = tmp_path / "x.npz"
        if content is not None:
            path.write_bytes(content)
        assert cli.main(["demo", "--backend", "numpy", "--no-plot", "--input", str(path)]) == 2
        assert_error(capsys, r"--input: (no such file|must be an \.npz file as numpy\.savez writes it), got .*x\.npz")

    @pytest.mark.parametrize("name", ["rows.txt", "missing/rows.png"])
    def test_bad_plot_is_named(self, tmp_path, capsys, name):
        assert cli.main(["demo", "--backend", "numpy", "--plot", str(tmp_path / name)]) == 2
        assert_error(capsys, r"--plot: must end in \.png, \.svg, \.pdf and lie in a folder that exists, got .*")

    def test_backend_that_cannot_run_is_named(self, capsys, monkeypatch):
        state = info.BackendState("cupy", None, "not installed", None)
        monkeypatch.setattr(info, "probe", lambda _: state)
        assert cli.main(["demo", "--backend", "cupy", "--no-plot"]) == 2
        assert_error(capsys, r"--backend: cupy cannot run here: not installed \(see distrattn info\)")


class TestRows:
    def test_chunks_keep_every_row(self):
        rows = np.arange(10)
        parts = list(demo.chunks(rows, demo.CHUNK_SCORES // 3))
        assert [len(part) for part in parts] == [3, 3, 3, 1]
        assert np.array_equal(np.concatenate(parts), rows)
        assert len(next(demo.chunks(rows, 2 * demo.CHUNK_SCORES))) == 1

    @pytest.mark.parametrize(("size", "most"), [(1, 256), (5, 256), (256, 256), (257, 256), (40_000, 256)])
    def test_spread(self, size, most):
        rows = demo.spread(size, most)
        assert len(rows) == min(size, most)
        assert rows[-1] == size - 1
        assert (np.diff(rows) > 0).all()

    def test_rows_of_attention_give_the_output(self):
        plan = demo.prepare(None, "numpy", None)
        v = plan.inputs.v[1, 0].astype(np.float64)
        rows = np.array([0, 700, 1023, 1024, 1535])
        for case, problem in zip(demo.CASES, plan.problems, strict=True):
            P = demo.attention_rows(plan.inputs, problem, demo.head_maps(plan.inputs, problem), 1, 2, rows)
            out = distrattn_np.distr_attention(
                *(array.astype(np.float32) for array in (plan.inputs.q, plan.inputs.k, plan.inputs.v)),
                method=case.method,
                group_size=case.group_size,
                fusion=case.fusion,
                causal=plan.inputs.causal,
                scale=plan.inputs.scale,
            )
            np.testing.assert_allclose(P @ v, out[1, 2, rows], atol=1e-4)


class TestInfo:
    def test_json(self, capsys):
        assert cli.main(["info", "--json"]) == 0
        facts = json.loads(capsys.readouterr().out)
        states = {entry["name"]: entry for entry in facts["backends"]}
        assert set(states) == {"numpy", "cupy", "numba"}
        assert states["numpy"]["usable"]
        assert states["numpy"]["version"] == np.__version__
        assert "float32" in states["numpy"]["kernels"]["any"]
        for entry in states.values():
            assert entry["usable"] == (entry["problem"] is None)
            assert bool(entry["kernels"]) == entry["usable"]
        assert states[facts["demo_runs_on"]]["usable"]

    def test_text(self, capsys):
        assert cli.main(["info"]) == 0
        printed = capsys.readouterr().out
        for name in ("numpy", "cupy", "numba", np.__version__):
            assert name in printed

    @pytest.mark.parametrize(
        ("dtype", "capability", "words"),
        [
            ("float16", (8, 0), "tensor cores"),
            ("bfloat16", (12, 0), "tensor cores"),
            ("float16", (7, 5), "CUDA cores"),
            ("float32", (9, 0), "CUDA cores"),
            ("float64", (9, 0), "CUDA cores"),
        ],
    )
    def test_cupy_kernels(self, dtype, capability, words):
        assert words in info.kernels("cupy", dtype, capability)

    def test_best_backend_prefers_devices(self, monkeypatch):
        device = info.Device(0, "some GPU", (8, 0))
        states = {
            "numpy": info.BackendState("numpy", "1", None, "cores"),
            "cupy": info.BackendState("cupy", "1", "no driver", None),
            "numba": info.BackendState("numba", "1", None, "its simulator"),
        }
        monkeypatch.setattr(info, "probe", states.__getitem__)
        assert info.best_backend().name == "numpy"  # the simulator is no device
        states["numba"] = info.BackendState("numba", "1", None, "CUDA devices", (device,))
        assert info.best_backend().name == "numba"
        states["cupy"] = info.BackendState("cupy", "1", None, "CUDA devices", (device,))
        assert info.best_backend().name == "cupy"

    def test_advice(self):
        missing = (info.BackendState("cupy", None, "not installed", None),)
        assert "no NVIDIA driver" in info.advice(missing, None)[0]
        assert "[cuda13]" in info.advice(missing, (13, 0))[0]
        assert "[cuda12]" in info.advice(missing, (12, 8))[0]


class TestEntryPoints:
    @pytest.mark.parametrize("command", [["-m", "distrattn_np"], [str(Path(sys.executable).with_name("distrattn"))]])
    def test_version(self, command):
        command = [sys.executable, *command] if command[0] == "-m" else command
        done = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
        assert done.stdout.split() == ["distrattn_np", distrattn_np.__version__]

    def test_bench_gets_its_own_arguments(self, monkeypatch):
        import distrattn_np.bench

        got = []
        monkeypatch.setattr(distrattn_np.bench, "main", lambda argv: got.append(argv) or 7)
        assert cli.main(["bench", "--json", "run", "-N", "5"]) == 7
        assert got == [["--json", "run", "-N", "5"]]

    def test_unknown_command(self, capsys):
        with pytest.raises(SystemExit) as caught:
            cli.main(["dance"])
        assert caught.value.code == 2
        assert "invalid choice: 'dance'" in capsys.readouterr().err


def assert_error(capsys, message):
    printed = capsys.readouterr()
    assert printed.out == ""
    assert re.fullmatch(f"distrattn demo: error: {message}", printed.err.strip()), printed.err
