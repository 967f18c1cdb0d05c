"""The soak: does it repeat its calls, see what is wrong with a result, and say when memory grows."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from distrattn_np.bench import soak

from distrattn_np import backends

NUMPY = backends.load_by_name("numpy")
CALLS = 25


def run(path: Path, *options: str) -> tuple[int, dict[str, Any]]:
    file = path / "soak.json"
    code = soak.main(["--rows=70", f"--calls={CALLS}", f"--json={file}", *options])
    return code, json.loads(file.read_text(encoding="utf-8"))


def test_right_calls_pass_and_a_run_goes_on_where_it_stopped(tmp_path: Path, capsys: Any) -> None:
    code, summary = run(tmp_path, "--seed=3", "--start-at=40")
    assert code == 0
    assert (summary["first"], summary["next"], summary["failures"], summary["refused"]) == (40, 40 + CALLS, [], {})
    assert summary["worst"].keys() <= {"float16", "bfloat16", "float32", "float64"}
    assert max(error for errors in summary["worst"].values() for error in errors.values()) > 0
    assert summary["environment"]["numpy"] == np.__version__
    assert f"go on with --seed 3 --start-at {40 + CALLS}" in capsys.readouterr().out


def test_a_call_is_known_by_seed_and_index() -> None:
    calls = [soak.draw_call(0, index, 70) for index in range(200)]
    assert str(soak.draw_call(0, 7, 70)) == str(calls[7])
    np.testing.assert_array_equal(soak.draw_call(0, 7, 70).arrays["q"], calls[7].arrays["q"])
    assert len({str(call) for call in [*calls, soak.draw_call(1, 7, 70)]}) == 201
    used = {name for call in calls for name in (*call.options, *call.arrays)}
    assert {"window", "softcap", "mask", "bias", "cu_seqlens_q", "layout", "score_tol", "rank", "fusion"} <= used
    assert {call.gives_out for call in calls} == {call.is_exact for call in calls} == {True, False}


SPOIL = {
    "one element": lambda O, _: O[-1, -1, -1].__iadd__(np.eye(1, O.shape[3], dtype=O.dtype)[0] * O.dtype.type(3)),
    "a row that nobody wrote": lambda O, _: O[0, 0, 0].fill(np.nan),
    "lse": lambda _, lse: lse.__iadd__(np.float32(0.5)),
    "all a little": lambda O, _: O.__imul__(O.dtype.type(0.75)),
}


@pytest.mark.parametrize("spoil", SPOIL.values(), ids=SPOIL)
def test_what_is_wrong_is_found_and_named(spoil: Any, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    attend, count = NUMPY.attend, 0

    def wrong(problem: Any, Q: Any, K: Any, V: Any, O: np.ndarray, lse: np.ndarray, *others: Any) -> None:
        nonlocal count
        attend(problem, Q, K, V, O, lse, *others)
        count += 1
        if np.isfinite(lse).any():
            spoil(O, lse)

    monkeypatch.setattr(NUMPY, "attend", wrong)
    code, summary = run(tmp_path)
    assert code == 1
    assert CALLS / 2 < len(summary["failures"]) <= count
    first = summary["failures"][0]
    assert first["error"].startswith("WrongCall: ")
    assert f"--seed 0 --start-at {first['index']} --calls 1" in capsys.readouterr().out
    code, again = run(tmp_path, f"--start-at={first['index']}", "--calls=1")
    assert (code, again["failures"]) == (1, [first])


def test_what_a_backend_does_not_build_is_counted(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(NUMPY, "builds_subspace", False)
    code, summary = run(tmp_path)
    assert code == 0
    assert set(summary["refused"]) == {"method: 'subspace' is not built for the numpy backend yet"}


def test_an_error_of_any_kind_is_a_failure(tmp_path: Path, monkeypatch: Any) -> None:
    def broken(*_: Any) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr(NUMPY, "attend", broken)
    code, summary = run(tmp_path)
    assert code == 1
    assert {failure["error"] for failure in summary["failures"]} == {"MemoryError: no room"}


def launches(path: Path, *options: str) -> tuple[int, dict[str, Any]]:
    file = path / "soak.json"
    code = soak.main(["--rows=70", f"--json={file}", *options])
    return code, json.loads(file.read_text(encoding="utf-8"))


def test_launches_are_counted_and_some_are_compared(tmp_path: Path, capsys: Any) -> None:
    code, summary = launches(tmp_path, "--launches=230", "--seconds=0")
    assert code == 0
    assert (summary["next"], summary["compared"], summary["failures"], summary["refused"]) == (230, 3, [], {})
    assert max(error for errors in summary["worst"].values() for error in errors.values()) > 0
    assert "230 calls" in capsys.readouterr().out


def test_launches_are_of_few_kernels_and_many_sizes() -> None:
    calls = [soak.draw_launch(0, index, 2048) for index in range(300)]
    assert str(soak.draw_launch(0, 7, 2048)) == str(calls[7])
    np.testing.assert_array_equal(soak.draw_launch(0, 7, 2048).arrays["v"], calls[7].arrays["v"])
    sizes = {(*call.arrays["q"].shape[:3], *call.arrays["k"].shape[1:3]) for call in calls}
    assert len(sizes) > 290
    N = [call.arrays["q"].shape[2] for call in calls]
    assert min(N) == 1
    assert max(N) > 1500
    kinds = {(call.arrays["q"].dtype.name, call.arrays["q"].shape[3], call.options.get("method")) for call in calls}
    assert len(kinds) <= len(soak.FEW_KERNELS)
    assert {call.options["causal"] for call in calls} == {call.is_exact for call in calls} == {True, False}
    for index in (0, soak.COMPARED_EVERY, 2 * soak.COMPARED_EVERY):  # the definition takes time
        assert max(calls[index].arrays["q"].shape[2], calls[index].arrays["k"].shape[2]) <= soak.COMPARED_ROWS


def test_a_part_is_the_array_that_was_drawn() -> None:
    kind = soak.Kind("numpy")
    for index in range(20):
        for array in soak.draw_launch(1, index, 70).arrays.values():
            np.testing.assert_array_equal(kind.give_part(array), array)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda O, *_: O[-1, -1, -1].fill(np.nan), "the result: an element is not finite"),
        (lambda _, lse, *__: lse.fill(np.inf), "lse: an element is not finite"),
        (lambda O, _, count: O.__imul__(O.dtype.type(1 + count % 2)), "the result: the same call gave other bits"),
    ],
    ids=["nan", "lse", "bits"],
)
def test_a_wrong_launch_is_found_without_the_definition(
    spoil: Any, reason: str, tmp_path: Path, monkeypatch: Any
) -> None:
    attend, count = NUMPY.attend, 0

    def wrong(problem: Any, Q: Any, K: Any, V: Any, O: np.ndarray, lse: np.ndarray, *others: Any) -> None:
        nonlocal count
        attend(problem, Q, K, V, O, lse, *others)
        count += 1
        if np.isfinite(lse).any() and problem.queries * problem.keys > 100:  # short ones may have nothing to spoil
            spoil(O, lse, count)

    monkeypatch.setattr(NUMPY, "attend", wrong)
    code, summary = launches(tmp_path, "--launches=20", "--start-at=1")
    assert code == 1
    assert {failure["error"] for failure in summary["failures"]} == {f"WrongCall: {reason}"}
    assert summary["compared"] == 0
    first = summary["failures"][0]
    code, again = launches(tmp_path, f"--start-at={first['index']}", "--launches=1")
    assert (code, again["failures"]) == (1, [first])


@pytest.mark.gpu
def test_launches_run_on_a_gpu(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(soak, "FEW_KERNELS", soak.FEW_KERNELS[:2])  # each is some kernels to compile
    code, summary = launches(tmp_path, "--backend=cupy", "--launches=120")
    assert code == 0, summary["failures"]
    assert (summary["compared"], summary["refused"]) == (2, {})
    assert {"host", "pool", "reserve"} <= summary["memory"][0].keys()


def test_a_call_that_hangs_ends_the_run() -> None:
    script = """
import sys, time
from distrattn_np import backends
from distrattn_np.bench import soak
soak.HANG_SECONDS = 0.5
type(backends.load_by_name("numpy")).attend = lambda *_: time.sleep(60)
sys.exit(soak.main(["--launches=3", "--start-at=1", "--rows=70"]))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=50, check=False)
    assert done.returncode == 1, done.stderr
    assert "call 1 hangs: " in done.stdout
    assert "--seed 0 --start-at 1 --launches 1 --rows 70" in done.stdout


def test_memory_that_grows_is_told(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    held = iter(range(0, 2**40, 2**30))
    monkeypatch.setattr(soak, "_resident_bytes", lambda: next(held))
    monkeypatch.setattr(soak, "SAMPLE_SECONDS", 0)
    code, summary = run(tmp_path)
    assert code == 1
    assert summary["failures"] == []
    assert summary["growth"]["host"] >= 2**30 * (CALLS // 2)
    assert "MiB GREW" in capsys.readouterr().out


def test_growth_is_that_of_the_later_calls_however_long_the_first_take() -> None:
    samples = [(0, 0), (1, 100), (2, 300), (3, 500), (4, 501), (50, 502), (100, 503)]
    memory = [{"call": call, "seconds": 5.0 * i, "host": held} for i, (call, held) in enumerate(samples)]
    assert soak.Soak(seed=0, first=0, next=110, most_rows=70, memory=memory).growth() == {"host": 1}
