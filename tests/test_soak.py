"""The soak: does it repeat its calls, see what is wrong with a result, and say when memory grows."""

from __future__ import annotations

import json
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


def test_memory_that_grows_is_told(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    held = iter(range(0, 2**40, 2**30))
    monkeypatch.setattr(soak, "_resident_bytes", lambda: next(held))
    monkeypatch.setattr(soak, "SAMPLE_SECONDS", 0)
    code, summary = run(tmp_path)
    assert code == 1
    assert summary["failures"] == []
    assert summary["growth"]["host"] >= 2**30 * (CALLS // 2)
    assert "MiB GREW" in capsys.readouterr().out
