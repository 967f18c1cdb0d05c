"""Whether the NumPy backend computes what reference/ computes, tile edges, thread counts and bad numbers included.

Its memory is measured in tests/performance. Small shapes against every option are drawn in tests/properties.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from kit.cases import Case, in_memory, make_inputs, plain, problem_of, reference_maps, truth
from kit.compare import assert_agrees, assert_no_worse_than_plain, assert_same_bits, relative_error

from distrattn_np import distr_attention, exact_attention, reference
from distrattn_np.backends import numpy_backend
from distrattn_np.backends.numpy_backend import BACKEND, KEY_TILE, QUERY_TILE
from distrattn_np.problem import Problem

GROUPINGS = [{"by": by, "fusion": fusion} for by in ("queries", "keys") for fusion in ("sum", "lstsq")]
SUBSPACES = [{"method": "subspace", "by": by} for by in ("queries", "keys")]
LONG = {"H": 1, "H_kv": 1, "D": 6, "E": 5}
CASES = [
    # a tile and a bit on both sides; blocks that divide neither tile nor length; one block over everything
    *(
        Case(N=QUERY_TILE + 9, M=KEY_TILE + 90, L=L, **LONG, **how)
        for L in (100, 700, 5000)
        for how in GROUPINGS + SUBSPACES
    ),
    # the causal limit crosses tiles; rows that see nothing fill a tile, or part of one
    *(
        Case(N=N, M=M, causal=causal, **LONG, **how)
        for N, M in ((QUERY_TILE + 9, 2 * KEY_TILE + 1), (QUERY_TILE + 200, 150), (600, 600))
        for causal in ("bottom-right", "top-left")
        for how in ({"G": 1}, GROUPINGS[1], GROUPINGS[3], *SUBSPACES)
    ),
    # blocks that end inside a tile, and one of all keys; queries of a whole tile past the last block
    *(
        Case(N=N, M=M, L=L, causal=causal, **LONG, **SUBSPACES[1])
        for N, M, causal in ((QUERY_TILE + 9, 611, True), (QUERY_TILE + 400, 300, "top-left"))
        for L in (7, 100, 700)
    ),
    # heads that share keys, a batch, odd widths, rows that do not lie one after another
    Case(B=2, H=6, H_kv=2, N=37, M=53, D=9, E=7, G=3, L=16, layout="bnhd", memory="strided", **GROUPINGS[1]),
    Case(B=2, H=6, H_kv=2, N=37, M=53, D=9, E=7, G=3, L=16, memory="strided", causal=True, **GROUPINGS[3]),
    Case(B=2, H=6, H_kv=2, N=37, M=53, D=9, E=7, G=3, L=16, layout="bnhd", memory="strided", **SUBSPACES[0]),
    Case(B=2, H=6, H_kv=2, N=37, M=53, D=9, E=7, rank=5, L=16, memory="strided", causal=True, **SUBSPACES[1]),
    Case(H=3, H_kv=1, N=40, M=41, D=256, E=256, G=4, **GROUPINGS[3]),
    # ranks that differ between blocks: 16, 32 and all 40
    *(
        Case(N=600, M=700, D=40, E=5, L=150, score_tol=0.55, refine=2, scale=0.3, causal=True, **how)
        for how in SUBSPACES
    ),
    Case(N=70, M=90, D=1, E=1, G=1, layout="bnhd"),
    Case(N=1, M=900, D=8, E=8, **GROUPINGS[1]),
    Case(N=90, M=1, D=8, E=8, causal="top-left", **GROUPINGS[2]),
    # windows, caps, masks and biases that cross tiles, end in them and hide whole ones
    *(
        Case(N=QUERY_TILE + 200, M=2 * KEY_TILE + 1, causal=causal, **LONG, **options, **how)
        for causal, options in (
            (False, {"window": (40, 3), "softcap": 2.0}),
            (True, {"window": (KEY_TILE + 10, None), "mask": "nm", "bias": "m"}),
            ("top-left", {"window": (None, 0), "softcap": 0.5, "mask": "m", "bias": "hn", "bias_dtype": "float32"}),
            (False, {"window": (0, 0), "bias": "nm"}),
        )
        for how in ({"G": 1}, GROUPINGS[1], GROUPINGS[3], *SUBSPACES)
    ),
    Case(B=2, H=6, H_kv=2, N=37, M=53, D=9, E=7, G=3, layout="bnhd", mask="bhnm", bias="bhnm", softcap=1.0),
    Case(B=2, H=6, H_kv=2, N=53, M=37, D=9, E=7, G=3, window=(5, None), mask="b", bias="", softcap=9.0, causal=True),
]


def native_problem(case: Case, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> Problem:
    return problem_of(q, k, v, **(case.options | {"layout": "bhnd"}))


def run(case: Case, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    out, lse = distr_attention(*(in_memory(x, case) for x in (q, k, v)), return_lse=True, **case.options)
    return (out.transpose(0, 2, 1, 3) if case.layout == "bnhd" else out), lse


@pytest.mark.parametrize("case", [replace(case, dtype="float64") for case in CASES], ids=str)
def test_float64_is_the_reference(case: Case) -> None:
    q, k, v = make_inputs(case)
    problem = native_problem(case, q, k, v)
    maps = reference_maps(problem, q, k, np.float64)
    expected, expected_lse = truth(problem, q, k, v, maps, case.score_options)
    out, lse = run(case, q, k, v)
    assert_agrees(out, expected, rtol=1e-12, atol=1e-13)
    assert_agrees(lse, expected_lse.astype(np.float32), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_worse_than_plain_numpy(case: Case, dtype: str) -> None:
    case = replace(case, dtype=dtype)
    q, k, v = make_inputs(case)
    problem = native_problem(case, q, k, v)
    maps = reference_maps(problem, q, k)
    expected, expected_lse = truth(problem, q, k, v, maps, case.score_options)
    usual, usual_lse = plain(problem, q, k, v, maps, case.score_options)
    out, lse = run(case, q, k, v)
    # a few units in the last place of numbers of order one: plain may be right by luck
    atol = 1e-6 if dtype == "float32" else 0
    assert_no_worse_than_plain(out, usual, expected, atol=atol, context=str(case))
    assert_no_worse_than_plain(lse, usual_lse, expected_lse, atol=1e-6, context=str(case))
    if dtype == "float32":
        assert relative_error(out, expected) < 1e-5


@pytest.mark.parametrize("by", ["queries", "keys"])
def test_maps_are_those_of_the_reference(by: str) -> None:
    case = Case(B=2, H=4, H_kv=2, N=70, M=1300, D=12, L=32, by=by, fusion="lstsq", causal=True, dtype="float32")
    q, k, v = make_inputs(case)
    problem = native_problem(case, q, k, v)
    expected = reference_maps(problem, q, k)
    maps = BACKEND.group_maps(problem, q, k)
    assert_same_bits(maps.channels, expected.channels)
    assert_agrees(maps.gains, expected.gains, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("score_tol", [None, 0.18])
@pytest.mark.parametrize("by", ["queries", "keys"])
def test_subspace_maps_are_those_of_the_reference(
    by: str, score_tol: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More blocks than are solved in one stack, of several ranks."""
    case = Case(
        B=2, H=4, H_kv=2, N=1100, M=1300, D=24, L=32, method="subspace", by=by, causal=True, score_tol=score_tol
    )
    q, k, v = make_inputs(replace(case, dtype="float32"))
    q[:, :, 500:] *= 0.25
    k[:, :, 500:] *= 0.25
    problem = native_problem(case, q, k, v)
    monkeypatch.setattr(numpy_backend, "STACK_BYTES", 8 * case.D**2 * 10)
    assert problem.blocks > 30
    expected, maps = reference_maps(problem, q, k), BACKEND.group_maps(problem, q, k)
    assert_same_bits(maps.ranks, expected.ranks)
    if score_tol is not None:
        assert set(np.unique(maps.ranks)) == {16, 24}
    for name in ("sampling", "fusion", "key_mean", "score_errors"):
        assert_agrees(getattr(maps, name), getattr(expected, name), rtol=1e-5, atol=1e-5, context=name)


def test_own_blocks_do_without_their_maps() -> None:
    """Nobody meets the last block of a call aligned bottom-right: what stands in its maps is never read."""
    case = Case(H=4, N=700, M=650, D=8, E=5, L=90, dtype="float32", causal=True, method="subspace", by="keys")
    q, k, v = make_inputs(case)
    problem = native_problem(case, q, k, v)
    maps = BACKEND.group_maps(problem, q, k)
    assert not maps.sampling[:, :, -1].any()
    assert not maps.score_errors[:, :, -1].any()
    assert (maps.score_errors[:, :, :-1] > 0).all()
    maps.sampling[:, :, -1] = maps.fusion[:, :, -1] = np.nan
    out, lse = np.empty_like(q[..., :5]), np.empty(q.shape[:3], np.float32)
    BACKEND.attend(problem, q, k, v, out, lse, maps)
    expected, expected_lse = run(case, q, k, v)
    assert_same_bits(out, expected)
    assert_same_bits(lse, expected_lse)


def test_info_of_a_call() -> None:
    q, k, v = make_inputs(Case(N=300, M=500, D=64, dtype="float32"))
    out, lse, info = distr_attention(q, k, v, method="subspace", return_lse=True, return_info=True)
    assert out.shape == q.shape
    assert lse.shape == (1, 2, 300)
    assert (info.method, info.block_size) == ("subspace", 128)
    assert info.reason.startswith("chosen: the smallest power of two")
    assert info.ranks.shape == info.score_errors.shape == (1, 2, 4)
    assert (info.ranks == 32).all()
    assert (info.score_errors > 0).all()
    _, info = distr_attention(q, k, v, method="subspace", return_info=True, block_size=200, score_tol=1e-9)
    assert (info.block_size, info.reason) == (200, "given")
    assert (info.ranks == 64).all()
    assert (info.score_errors == 0).all()
    _, info = distr_attention(q, k, v, return_info=True, method="lsh")
    assert (info.method, info.block_size, info.reason) == ("lsh", 1024, "the default of lsh")
    assert info.ranks is None
    assert info.score_errors is None
    _, info = distr_attention(q, k, v, return_info=True, group_size=1)
    assert (info.method, info.block_size, info.ranks) == ("exact", None, None)


def test_words_and_channels_are_those_of_the_reference() -> None:
    x = np.random.default_rng(0).standard_normal((2, 3, 70, 24), dtype=np.float32)
    planes = reference.hyperplanes(1, 32)
    words = BACKEND.hash_channels(x, planes, 32)
    assert words.shape == (2, 3, 3, 24)
    channels = BACKEND.group_channels(words)
    for b, h, c in np.ndindex(2, 3, 3):
        expected = reference.hash_channels(x[b, h, 32 * c : 32 * c + 32].astype(np.float64), planes)
        assert_same_bits(words[b, h, c], expected)
        assert_same_bits(channels[b, h, c], reference.group_channels(expected))


BIG = Case(B=2, H=2, H_kv=1, N=1300, M=1200, D=32, E=32, G=4, L=600, fusion="lstsq", dtype="float32", causal=True)


@pytest.fixture
def allow_threads() -> Iterator[Callable[[int], None]]:
    """Set OpenBLAS's thread count, which is what the backend goes by, and put it back."""
    get_threads, set_threads = numpy_backend._openblas_functions()
    if get_threads is None or set_threads is None:
        pytest.skip("this NumPy does not use OpenBLAS")
    before = get_threads()
    yield set_threads
    set_threads(before)


@pytest.mark.parametrize("method", ["lsh", "subspace"])
@pytest.mark.parametrize("by", ["queries", "keys"])
def test_the_number_of_threads_changes_no_bit(
    by: str, method: str, allow_threads: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    used = set()

    class Pool(numpy_backend.ThreadPoolExecutor):
        def __init__(self, workers: int) -> None:
            used.add(workers)
            super().__init__(workers)

    monkeypatch.setattr(numpy_backend, "ThreadPoolExecutor", Pool)
    case = replace(BIG, by=by, method=method)
    inputs = make_inputs(case)
    results = []
    for threads in (1, 2, 5):
        allow_threads(threads)
        results.append(run(case, *inputs))
    assert used >= {2, 5}, f"pools of {used} workers: nothing ran side by side"
    for out, lse in results[1:]:
        assert_same_bits(out, results[0][0])
        assert_same_bits(lse, results[0][1])


def test_concurrent_calls_give_the_same_and_restore_blas(allow_threads: Callable[[int], None]) -> None:
    inputs = make_inputs(BIG)
    expected, _ = run(BIG, *inputs)
    allow_threads(3)
    with ThreadPoolExecutor(4) as pool:
        results = [job.result() for job in [pool.submit(run, BIG, *inputs) for _ in range(8)]]
    for out, _ in results:
        assert_same_bits(out, expected)
    get_threads, _ = numpy_backend._openblas_functions()
    assert get_threads is not None
    assert get_threads() == 3


def test_an_error_in_a_worker_reaches_the_caller(allow_threads: Callable[[int], None]) -> None:
    started = []

    def fail(task: int) -> None:
        started.append(task)
        if task == 0:
            raise MemoryError("no room")
        time.sleep(0.001)

    allow_threads(2)
    with pytest.raises(MemoryError, match="no room"):
        numpy_backend._run_tasks(fail, (1000,), memory=1, work=numpy_backend.THREADED_WORK)
    assert len(started) < 1000, "the other worker did all the tasks before the error was raised"


@pytest.mark.parametrize("method", ["lsh", "subspace"])
@pytest.mark.parametrize("by", ["queries", "keys"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("array", [0, 1, 2], ids="qkv")
def test_a_bad_number_stays_in_its_head_and_warns_of_nothing(array: int, bad: float, by: str, method: str) -> None:
    case = Case(H=4, H_kv=4, N=700, M=600, D=8, E=8, L=300, dtype="float32", by=by, fusion="lstsq", causal=True)
    case = replace(case, method=method)
    inputs = make_inputs(case)
    expected, expected_lse = run(case, *inputs)
    broken = [x.copy() for x in inputs]
    broken[array][0, 2, 100, 3] = bad
    out, lse = run(case, *broken)
    others = [0, 1, 3]
    assert_same_bits(out[:, others], expected[:, others])
    assert_same_bits(lse[:, others], expected_lse[:, others])
    assert not np.array_equal(out[:, 2], expected[:, 2]), "the bad number had no effect at all"


def test_scores_that_overflow_warn_of_nothing() -> None:
    x = np.full((1, 1, 5, 4), 1e30, np.float32)
    assert np.isnan(exact_attention(x, x, x)).all()
    assert (exact_attention(-x, x, x) == 0).all()  # all scores are minus infinity, as if nothing were seen


def test_views_that_blas_cannot_read_are_read_right() -> None:
    rng = np.random.default_rng(0)
    q = rng.standard_normal((1, 2, 40, 8), dtype=np.float32)
    k, v = rng.standard_normal((2, 1, 2, 30, 8), dtype=np.float32)
    backwards = exact_attention(q[:, :, ::-1], k[:, :, ::-1], v[:, :, ::-1])
    assert_agrees(backwards[:, :, ::-1], exact_attention(q, k, v), rtol=1e-5, atol=1e-6)
    shared = np.broadcast_to(k[:, :1], k.shape)
    same_row = np.broadcast_to(v[:, :, :1], v.shape)
    result = exact_attention(q, shared, same_row)
    assert_agrees(result, exact_attention(q, shared.copy(), same_row.copy()), rtol=0, atol=0)


def test_out_in_any_order_of_memory_is_written_in_place() -> None:
    q, k, v = make_inputs(BIG)
    expected, _ = run(BIG, q, k, v)
    out = np.zeros((2, 1300, 3, 40), np.float32)
    view = out[:, :, 1:, 8:].transpose(0, 2, 1, 3)
    result = distr_attention(q, k, v, out=view, **BIG.options)
    assert result is view
    assert_same_bits(view.copy(), expected)
    assert not out[:, :, 0].any()
    assert not out[..., :8].any()
