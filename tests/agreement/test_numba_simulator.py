"""Whether the Numba kernels, run thread by thread in Numba's simulator, compute what the float64 reference computes.

Not checked here: the speed, memory races that the simulator's scheduling does not meet, and a GPU's arithmetic; the
same calls run on a GPU with the other backends' agreement tests.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from kit.backends import to_kind
from kit.cases import BFLOAT16, Case, Inputs, in_memory, make_inputs, problem_of
from kit.compare import assert_agrees, assert_same_bits, to_host

from distrattn_np import distr_attention, exact_attention, reference
from distrattn_np.problem import Problem

numba_backend = pytest.importorskip("distrattn_np.backends.numba_backend")
if not numba_backend.SIMULATED:
    pytest.skip("Numba's simulator is off: this machine has a GPU", allow_module_level=True)
BACKEND = numba_backend.BACKEND


def small(**changes: Any) -> Case:
    """Return a case of few threads: two query tiles, two key tiles, two blocks, all of them with a short tail."""
    sizes = {"N": 20, "M": 23, "D": 12, "E": 5, "L": 16, "dtype": "float32"}
    return Case(**(sizes | changes))


EXACT = {"G": 1}
GROUPINGS = [{"by": by, "fusion": fusion} for by in ("queries", "keys") for fusion in ("sum", "lstsq")]
CASES = [
    # every kernel in every precision
    *(small(dtype=dtype, **how) for dtype in ("float16", "float32", "float64") for how in (EXACT, *GROUPINGS)),
    # causal: square, more keys, fewer keys (queries that see nothing, or keys that nobody sees)
    *(
        small(N=N, M=M, causal=causal, **how)
        for N, M in ((20, 20), (20, 37), (37, 20))
        for causal in ("bottom-right", "top-left")
        for how in (EXACT, GROUPINGS[1], GROUPINGS[3])
        if N != M or causal == "bottom-right"
    ),
    # heads: grouped-query, one key head for all, a batch
    *(small(H=4, H_kv=2, **how) for how in (EXACT, GROUPINGS[1])),
    small(H=4, H_kv=2, causal=True, **GROUPINGS[3]),
    small(H=3, H_kv=1, B=2, L=23, **GROUPINGS[2]),
    # widths: odd, one, R = 1, the widest value row, the widest row of all
    small(D=15, E=33, G=5, **GROUPINGS[1]),
    small(D=1, E=1, G=1),
    small(D=7, E=1, G=7, **GROUPINGS[3]),
    small(H=1, H_kv=1, N=3, M=2, E=256, **GROUPINGS[0]),
    small(H=1, H_kv=1, N=3, M=2, D=256, G=4, **GROUPINGS[3]),
    # blocks: shorter than a tile, longer than everything, of one row, of whole tiles
    *(small(L=L, **how) for L in (7, 1000) for how in (GROUPINGS[1], GROUPINGS[3])),
    *(small(H=1, H_kv=1, N=4, M=5, L=1, **how) for how in (GROUPINGS[1], GROUPINGS[3])),
    small(N=48, M=64, L=32, causal=True, **GROUPINGS[0]),
    # one row
    small(N=1, M=1, **GROUPINGS[1]),
    small(N=1, causal=True, **GROUPINGS[3]),
    small(M=1, **GROUPINGS[2]),
    # memory
    small(layout="bnhd", **EXACT),
    small(layout="bnhd", memory="strided", **GROUPINGS[1]),
    small(layout="bnhd", memory="unaligned", causal=True, **GROUPINGS[3]),
    small(memory="strided", dtype="float16", **GROUPINGS[2]),
    # options
    small(scale=-0.4, seed=3, **GROUPINGS[1]),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_call_agrees_with_reference(case: Case) -> None:
    inputs = make_inputs(case)
    given = [to_kind(in_memory(x, case), "numba") for x in inputs]
    assert_call_agrees(case, distr_attention(*given, return_lse=True, **case.options), expected(case, inputs))


@pytest.mark.parametrize("causal", [False, True])
def test_exact_call_agrees_with_reference(causal: bool) -> None:
    case = small(causal=causal, **EXACT)
    inputs = make_inputs(case)
    result = exact_attention(*inputs, backend="numba", return_lse=True, **case.attention_options)
    assert_call_agrees(case, result, expected(case, inputs))


@pytest.mark.parametrize("how", [EXACT, *GROUPINGS], ids=str)
def test_tiles_of_a_gpu_agree(monkeypatch: pytest.MonkeyPatch, how: dict[str, Any]) -> None:
    """Tests elsewhere use tiles that suit the simulator; here those that a GPU gets, 256 threads a block."""
    choose_tiles = numba_backend.choose_tiles
    used = []

    def choose(*arguments: Any) -> Any:
        used.append(choose_tiles(*arguments[:-1], simulated=False))
        return used[-1]

    monkeypatch.setattr(numba_backend, "choose_tiles", choose)
    monkeypatch.setattr(numba_backend, "THREADS", numba_backend.GPU_THREADS)
    case = small(H=1, H_kv=1, N=33, M=35, L=33, causal=True, dtype="float64", **how)
    inputs = make_inputs(case)
    result = distr_attention(*inputs, backend="numba", return_lse=True, **case.options)
    assert_call_agrees(case, result, expected(case, inputs))
    assert used[0].thread_rows * used[0].thread_columns == 256


@pytest.mark.parametrize("case", [case for case in CASES if case.G > 1], ids=str)
def test_groups_equal_the_reference(case: Case) -> None:
    """The permutation bit for bit, the gains to rounding: sums of at most 64 products, so 64 eps of each length."""
    inputs = make_inputs(case)
    problem = problem_of(*inputs, **(case.options | {"layout": "bhnd"}))
    maps = BACKEND.group_maps(problem, *(to_kind(x, "numba") for x in (inputs.q, inputs.k)))
    assert maps is not None
    channels, gains = reference_maps(problem, inputs)
    assert_same_bits(to_host(maps.channels), channels)
    if gains is None:
        assert maps.gains is None
    else:
        # |gain| <= |x_j| / |x_first|: allow for the cancellation within <x_first, x_j>
        eps = np.finfo(accumulator(case)).eps
        assert_agrees(to_host(maps.gains), gains, rtol=64 * eps, atol=64 * eps * np.abs(gains).max(), check_dtype=False)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("rows", [1, 15, 33, 70], ids="rows={}".format)
def test_hash_words_equal_the_reference(dtype: str, rows: int) -> None:
    block_size = 33
    q, *_ = make_inputs(small(N=rows, D=20, L=block_size, dtype=dtype))
    planes = reference.hyperplanes(0, block_size)
    words = to_host(BACKEND.hash_channels(to_kind(q, "numba"), planes[:rows], block_size))
    blocks = range(0, rows, block_size)
    wanted = [[reference.hash_channels(x[start : start + block_size], planes) for start in blocks] for x in q[0]]
    assert_same_bits(words, np.array([wanted]))


@pytest.mark.parametrize("distinct", [1, 3, 2**16], ids="distinct={}".format)
def test_channels_are_sorted_stably(distinct: int) -> None:
    words = np.random.default_rng(0).integers(0, distinct, (2, 1, 3, 40)).astype(np.uint16)
    channels = to_host(BACKEND.group_channels(to_kind(words, "numba")))
    wanted = np.apply_along_axis(reference.group_channels, 3, words)
    assert_same_bits(channels, wanted)


@pytest.mark.parametrize("kind", ["numpy", "numba"])
@pytest.mark.parametrize("layout", ["bhnd", "bnhd"])
def test_out_is_written_and_returned(kind: Any, layout: str) -> None:
    case = small(layout=layout, **GROUPINGS[0])
    inputs = make_inputs(case)
    given = [to_kind(in_memory(x, case), kind) for x in inputs]
    # every second row of a wider buffer: what lies between must stay
    buffer = np.full((1, 40, 40, case.E), -1, np.float32)
    out = buffer[:, :40:2, :2] if layout == "bnhd" else buffer[:, :2, :40:2]
    out = type(given[0])(out) if kind == "numba" else out
    result, lse = distr_attention(*given, backend="numba", return_lse=True, out=out, **case.options)
    assert result is out
    assert_call_agrees(case, (result, lse), expected(case, inputs))
    assert np.count_nonzero(buffer != -1) == result.size


@pytest.mark.parametrize("how", [EXACT, *GROUPINGS], ids=str)
def test_no_keys_give_zero(how: dict[str, Any]) -> None:
    case = small(M=0, **how)
    result, lse = distr_attention(*make_inputs(case), backend="numba", return_lse=True, **case.options)
    assert_same_bits(result, np.zeros((1, 2, 20, 5), np.float32))
    assert_same_bits(lse, np.full((1, 2, 20), -np.inf, np.float32))


@pytest.mark.parametrize("how", [EXACT, *GROUPINGS], ids=str)
def test_no_queries_give_an_empty_result(how: dict[str, Any]) -> None:
    case = small(N=0, **how)
    result, lse = distr_attention(*make_inputs(case), backend="numba", return_lse=True, **case.options)
    assert_same_bits(result, np.zeros((1, 2, 0, 5), np.float32))
    assert_same_bits(lse, np.zeros((1, 2, 0), np.float32))


@pytest.mark.parametrize("how", [EXACT, *GROUPINGS], ids=str)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_bad_numbers_stay_in_their_head(how: dict[str, Any], bad: float) -> None:
    case = small(**how)
    inputs = make_inputs(case)
    clean = distr_attention(*inputs, backend="numba", **case.options)
    for x in inputs:
        x[0, 0, 1, 1] = bad
    spoilt = distr_attention(*inputs, backend="numba", **case.options)
    assert not np.isfinite(spoilt[0, 0]).all()
    assert_same_bits(spoilt[0, 1], clean[0, 1])


def test_bfloat16_is_refused() -> None:
    q = np.zeros((1, 1, 2, 4), BFLOAT16)
    message = r"^q: the numba backend takes float16, float32 and float64, got numpy array .* dtype bfloat16$"
    with pytest.raises(NotImplementedError, match=message):
        exact_attention(q, q, q, backend="numba")


def reference_maps(problem: Problem, inputs: Inputs) -> Any:
    """Return the reference's channels and float64 gains."""
    g = problem.grouping
    assert g is not None
    return reference.group_maps(
        inputs.q,
        inputs.k,
        group_size=g.group_size,
        block_size=g.block_size,
        group_by=g.by,
        fusion=g.fusion,
        seed=g.seed,
        causal_offset=problem.causal_offset,
    )


def expected(case: Case, inputs: Inputs) -> tuple[np.ndarray, np.ndarray]:
    """Return the reference's result, in the layout of the case, and lse."""
    problem = problem_of(*inputs, **(case.options | {"layout": "bhnd"}))
    g = problem.grouping
    options: dict[str, Any] = {"scale": problem.scale, "causal_offset": problem.causal_offset}
    if g is None:
        result, lse = reference.exact_attention(*inputs, **options)
    else:
        options |= {"group_size": g.group_size, "block_size": g.block_size, "group_by": g.by}
        result, lse = reference.distr_attention(*inputs, fusion=g.fusion, seed=g.seed, **options)
    return (result.transpose(0, 2, 1, 3) if case.layout == "bnhd" else result), lse


def accumulator(case: Case) -> type[np.floating[Any]]:
    """Return the type that the kernels add up in."""
    return np.float64 if case.dtype == "float64" else np.float32


def assert_call_agrees(case: Case, actual: Any, wanted: tuple[np.ndarray, np.ndarray]) -> None:
    """Compare result and lse.

    Scores and values are below 32 here, sums have at most 64 terms: 64 eps of the type of the sums, and the result
    rounded to its own type. lse is float32 always.
    """
    (result, lse), (wanted_result, wanted_lse) = actual, wanted
    assert result.dtype == case.numpy_dtype
    assert lse.dtype == np.float32
    atol = 64 * np.finfo(accumulator(case)).eps
    kinds = {"check_kind": False, "check_dtype": False}
    assert_agrees(result, wanted_result, rtol=np.finfo(case.numpy_dtype).eps, atol=atol, context="result", **kinds)
    eps = np.finfo(np.float32).eps
    assert_agrees(lse, wanted_lse, rtol=eps, atol=max(atol, eps), context="lse", **kinds)
