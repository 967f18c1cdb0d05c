"""Whether the Numba kernels, run thread by thread in Numba's simulator, compute what the float64 reference computes.

Not checked here: the speed, memory races that the simulator's scheduling does not meet, and a GPU's arithmetic; on a
GPU these kernels run with the other backends' agreement tests, and those of the subspace method with the properties.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from distrattn_np.reference.distr_attention import rows_that_meet
from kit.backends import options_to_kind, to_kind
from kit.cases import BFLOAT16, Case, Inputs, in_memory, make_inputs, problem_of
from kit.compare import assert_agrees, assert_same_bits, to_host

from distrattn_np import distr_attention, exact_attention, reference
from distrattn_np.problem import Problem, RaggedProblem, Subspace, block_edges

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
LSH_CASES = [
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

SUBSPACES = [{"method": "subspace", "by": by} for by in ("keys", "queries")]
BY_KEYS, BY_QUERIES = SUBSPACES
CHOSEN_RANKS = {"N": 44, "M": 44, "D": 20, "L": 32, "score_tol": 0.01}
"""Blocks of 32 rows, which keep all 20 dimensions, and of 12 rows, for which 16 are enough."""
SUBSPACE_CASES = [
    # every kernel in every precision
    *(small(dtype=dtype, **how) for dtype in ("float16", "float32", "float64") for how in SUBSPACES),
    # causal, as above; own blocks that are whole, partial, cut by a tile of queries, and behind the last key
    *(
        small(N=N, M=M, L=L, H=1, H_kv=1, causal=causal, **BY_KEYS)
        for N, M in ((20, 20), (20, 37), (37, 20))
        for causal in ("bottom-right", "top-left")
        for L in (7, 16)
        if N != M or causal == "bottom-right"
    ),
    *(
        small(N=N, M=M, H=1, H_kv=1, causal=causal, **BY_QUERIES)
        for N, M in ((20, 37), (37, 20))
        for causal in ("bottom-right", "top-left")
    ),
    # heads that share maps and means, a batch
    *(small(H=4, H_kv=2, causal=causal, **how) for how in SUBSPACES for causal in (False, True)),
    small(H=3, H_kv=1, B=2, L=23, N=9, **BY_QUERIES),
    # ranks: given, one, all but one; chosen, where blocks differ, where all are D, where D has one choice
    *(small(rank=rank, refine=2, H=1, H_kv=1, **how) for rank, how in ((1, BY_KEYS), (11, BY_QUERIES))),
    *(small(**CHOSEN_RANKS, H=2, H_kv=1, causal=causal, **how) for how in SUBSPACES for causal in (False, True)),
    small(D=17, score_tol=1e-9, dtype="float64", H=1, H_kv=1, causal=True, **BY_QUERIES),
    small(D=5, score_tol=0.1, **BY_KEYS),
    # refinements
    *(small(refine=refine, H=1, H_kv=1, causal=True, **how) for how in SUBSPACES for refine in (0, 3)),
    # widths: odd, R = 1, the widest value row
    small(D=15, E=33, G=5, **BY_KEYS),
    small(D=2, E=1, G=2, causal=True, **BY_KEYS),
    small(N=3, M=2, E=256, H=1, H_kv=1, **BY_QUERIES),
    # blocks: longer than everything, of one row
    *(small(L=1000, causal=causal, **BY_KEYS) for causal in (False, "top-left")),
    *(small(H=1, H_kv=1, N=4, M=5, L=1, causal=causal, **how) for how in SUBSPACES for causal in (False, True)),
    # one row
    *(small(N=N, M=M, causal=True, **how) for how in SUBSPACES for N, M in ((1, 23), (20, 1), (1, 1))),
    # memory
    small(layout="bnhd", memory="strided", causal=True, **BY_KEYS),
    small(layout="bnhd", memory="unaligned", dtype="float16", **BY_QUERIES),
    # options
    small(scale=-0.4, seed=3, **BY_KEYS),
]

# windows of one key, of both sides, of one, wider than everything; caps that all scores reach and few
ONE_OPTION: list[dict[str, Any]] = [
    {"window": (0, 0)},
    {"window": (6, 3)},
    {"window": (None, 2), "dtype": "float64"},
    {"window": (4, None)},
    {"window": (100, 100)},
    {"softcap": 0.5, "dtype": "float64"},
    {"softcap": 20.0},
    {"mask": "bhnm"},
    {"mask": "m"},
    {"bias": "hnm", "dtype": "float16"},
    {"bias": "bm", "dtype": "float64", "bias_dtype": "float32"},
]
ALL_OPTIONS = {"window": (9, 5), "softcap": 3.0, "mask": "nm", "bias": "bhnm"}
OPTION_CASES = [
    *(
        small(B=2, H=2, H_kv=1, L=7, causal=causal, **how, **ONE_OPTION[(i + 3 * j) % len(ONE_OPTION)])
        for i, how in enumerate((EXACT, GROUPINGS[1], GROUPINGS[2], *SUBSPACES))
        for j, causal in enumerate((False, "bottom-right", "top-left"))
    ),
    *(small(causal=False, **how) for how in ({**EXACT, **option} for option in ONE_OPTION)),
    # with all of them: sizes around the tiles of 16 rows, and queries that see nothing
    *(
        small(N=N, M=M, H=1, H_kv=1, L=11, causal=causal, **how, **ALL_OPTIONS)
        for N, M in ((17, 33), (40, 15))
        for causal in (False, "bottom-right", "top-left")
        for how in (EXACT, GROUPINGS[3], BY_KEYS)
    ),
    small(**ALL_OPTIONS, **BY_QUERIES),
    small(**ALL_OPTIONS, scale=-0.4, layout="bnhd", memory="strided", **GROUPINGS[0]),
]


@pytest.mark.parametrize("case", [*LSH_CASES, *SUBSPACE_CASES, *OPTION_CASES], ids=str)
def test_call_agrees_with_reference(case: Case) -> None:
    inputs = make_inputs(case)
    given = [to_kind(in_memory(x, case), "numba") for x in inputs]
    options = options_to_kind(case.options, "numba")
    assert_call_agrees(case, distr_attention(*given, return_lse=True, **options), expected(case, inputs))


@pytest.mark.parametrize("causal", [False, True])
def test_exact_call_agrees_with_reference(causal: bool) -> None:
    case = small(causal=causal, **EXACT)
    inputs = make_inputs(case)
    result = exact_attention(*inputs, backend="numba", return_lse=True, **case.attention_options)
    assert_call_agrees(case, result, expected(case, inputs))


@pytest.fixture
def tiles_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Give kernels what a GPU gets, 256 threads a block; tests elsewhere use tiles that suit the simulator."""
    choose_tiles = numba_backend.choose_tiles
    used: list[Any] = []

    def choose(*arguments: Any) -> Any:
        used.append(choose_tiles(*arguments[:-1], simulated=False))
        return used[-1]

    monkeypatch.setattr(numba_backend, "choose_tiles", choose)
    monkeypatch.setattr(numba_backend, "THREADS", numba_backend.GPU_THREADS)
    return used


@pytest.mark.parametrize("how", [EXACT, *GROUPINGS, *SUBSPACES], ids=str)
def test_tiles_of_a_gpu_agree(tiles_of_a_gpu: list[Any], how: dict[str, Any]) -> None:
    sizes = {"N": 33, "M": 35, "L": 33, "D": 4 if how in SUBSPACES else 12}
    case = small(H=1, H_kv=1, causal=True, dtype="float64", **sizes, **how)
    inputs = make_inputs(case)
    result = distr_attention(*inputs, backend="numba", return_lse=True, **case.options)
    assert_call_agrees(case, result, expected(case, inputs))
    assert tiles_of_a_gpu[0].thread_rows * tiles_of_a_gpu[0].thread_columns == 256


@pytest.mark.parametrize("case", [case for case in LSH_CASES if case.G > 1], ids=str)
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


@pytest.mark.parametrize("how", SUBSPACES, ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_maps_equal_the_reference(how: dict[str, Any], causal: bool) -> None:
    """In float64, where each step's rounding, grown by a factor of a thousand or so, is far from any choice."""
    case = small(**CHOSEN_RANKS, causal=causal, H=2, H_kv=1, dtype="float64", **how)
    inputs = make_inputs(case)
    maps = BACKEND.group_maps(case.native_problem(inputs), *(to_kind(x, "numba") for x in (inputs.q, inputs.k)))
    wanted = subspace_maps(case.native_problem(inputs), inputs)
    assert_same_bits(to_host(maps.ranks), wanted.ranks)
    assert set(wanted.ranks.flat) == {16, 20}
    for name in ("sampling", "fusion", "key_mean"):
        largest = np.abs(getattr(wanted, name)).max()
        assert_agrees(to_host(getattr(maps, name)), getattr(wanted, name), rtol=0, atol=1e-12 * largest, context=name)
    # a difference of sums of squares: half the digits
    assert_agrees(to_host(maps.score_errors), wanted.score_errors, rtol=1e-10, atol=1e-7, constant_ok=True)


@pytest.mark.parametrize("how", SUBSPACES, ids=str)
@pytest.mark.parametrize("kind", ["numpy", "numba"])
def test_info_tells_ranks_and_errors(how: dict[str, Any], kind: Any) -> None:
    case = small(L=7, causal=True, **how)
    inputs = make_inputs(case)
    *_, info = distr_attention(*(to_kind(x, kind) for x in inputs), backend="numba", return_info=True, **case.options)
    wanted = subspace_maps(case.native_problem(inputs), inputs)
    assert_same_bits(info.ranks, to_kind(wanted.ranks, kind))
    # the root of a difference of float32 sums of squares, which are scores of about 1
    errors = to_kind(wanted.score_errors.astype(np.float32), kind)
    assert_agrees(info.score_errors, errors, rtol=1e-5, atol=np.sqrt(16 * np.finfo(np.float32).eps))


@pytest.mark.parametrize("how", SUBSPACES, ids=str)
def test_one_workspace_for_all_maps_changes_nothing(monkeypatch: pytest.MonkeyPatch, how: dict[str, Any]) -> None:
    case = small(**how)
    inputs = make_inputs(case)
    expected = distr_attention(*inputs, backend="numba", **case.options)
    monkeypatch.setattr(numba_backend, "WORKSPACE_BYTES", 1)
    assert_same_bits(distr_attention(*inputs, backend="numba", **case.options), expected)


def spoil(inputs: Inputs, how: str) -> Inputs:
    """Return inputs whose blocks span fewer dimensions than a block keeps."""
    q, k, v = (x.astype(np.float64) for x in inputs)
    rng = np.random.default_rng(0)
    match how:
        case "keys of rank 3":
            k = k @ rng.standard_normal((12, 3)) @ rng.standard_normal((3, 12)) / 6
        case "constant channels":
            k[..., 3:9] = rng.standard_normal(6)
        case "equal keys":
            k[...] = k[:, :, :1]
        case "zero queries":
            q[...] = 0
        case "equal channels":
            k, q = (np.repeat(x[..., ::2], 2, axis=-1) for x in (k, q))
    return Inputs(*(x.astype(np.float32) for x in (q, k, v)))


@pytest.mark.parametrize("how", SUBSPACES, ids=str)
@pytest.mark.parametrize(
    "what", ["keys of rank 3", "constant channels", "equal keys", "zero queries", "equal channels"]
)
def test_low_rank_is_exact(how: dict[str, Any], what: str) -> None:
    """Six directions are kept; what is left of the others is rounding, in a matrix of squares.

    A direction that holds less than 16 eps of the square of a block may be dropped: 1e-3 of a score, and scores are 8
    here at most.
    """
    case = small(causal=what == "equal channels", **how)
    inputs = spoil(make_inputs(case), what)
    result, lse = distr_attention(*inputs, backend="numba", return_lse=True, **case.options)
    exact = reference.exact_attention(*inputs, scale=1 / np.sqrt(12), causal_offset=3 if case.causal else None)
    for got, wanted in zip((result, lse), exact, strict=True):
        # the lse of zero queries is the same for all
        assert_agrees(
            got, wanted, rtol=0, atol=1e-3, check_dtype=False, context=what, constant_ok=what == "zero queries"
        )


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("rows", [1, 15, 33, 70], ids="rows={}".format)
def test_hash_words_equal_the_reference(dtype: str, rows: int) -> None:
    block_size = 33
    q, *_ = make_inputs(small(N=rows, D=20, L=block_size, dtype=dtype))
    planes = reference.hyperplanes(0, block_size)
    words = to_host(BACKEND.hash_channels(to_kind(q, "numba"), to_kind(planes[:rows], "numba"), block_size))
    blocks = range(0, rows, block_size)
    wanted = [[reference.hash_channels(x[start : start + block_size], planes) for start in blocks] for x in q[0]]
    assert_same_bits(words, np.array([wanted]))


@pytest.mark.parametrize("distinct", [1, 3, 2**16], ids="distinct={}".format)
def test_channels_are_sorted_stably(distinct: int) -> None:
    words = np.random.default_rng(0).integers(0, distinct, (2, 1, 3, 40)).astype(np.uint16)
    channels = to_host(BACKEND.group_channels(to_kind(words, "numba")))
    wanted = np.apply_along_axis(reference.group_channels, 3, words)
    assert_same_bits(channels, wanted)


def test_axes_that_repeat_are_not_written_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mask or bias of a few rows stays small on its way to the device, however the caller broadcast it."""
    bring_in, sizes = BACKEND.bring_in, []

    def record(self: Any, array: Any, layout: Any) -> Any:  # noqa: ARG001
        sizes.append(array.size)
        return bring_in(array, layout)

    case = small(mask="m", bias="hn", **EXACT)
    inputs = make_inputs(case)
    expected = distr_attention(*inputs, backend="numba", **case.options)
    shape = (case.B, case.H, case.N, case.M)
    tables = {"mask": np.broadcast_to(case.mask_array, shape), "bias": np.broadcast_to(case.bias_array, shape)}
    monkeypatch.setattr(numba_backend.NumbaBackend, "bring_in", record)
    assert_same_bits(distr_attention(*inputs, backend="numba", **case.options | tables), expected)
    assert sizes[-2:] == [case.M, case.H * case.N]


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


@pytest.mark.parametrize("how", [EXACT, *GROUPINGS, *SUBSPACES], ids=str)
def test_no_keys_give_zero(how: dict[str, Any]) -> None:
    case = small(M=0, **how)
    result, lse = distr_attention(*make_inputs(case), backend="numba", return_lse=True, **case.options)
    assert_same_bits(result, np.zeros((1, 2, 20, 5), np.float32))
    assert_same_bits(lse, np.full((1, 2, 20), -np.inf, np.float32))


@pytest.mark.parametrize("how", [EXACT, *GROUPINGS, *SUBSPACES], ids=str)
def test_no_queries_give_an_empty_result(how: dict[str, Any]) -> None:
    case = small(N=0, **how)
    result, lse = distr_attention(*make_inputs(case), backend="numba", return_lse=True, **case.options)
    assert_same_bits(result, np.zeros((1, 2, 0, 5), np.float32))
    assert_same_bits(lse, np.zeros((1, 2, 0), np.float32))


@pytest.mark.parametrize("how", [EXACT, *GROUPINGS, *SUBSPACES], ids=str)
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


def packed(case: Case, *lengths: tuple[int, int]) -> tuple[list[np.ndarray], dict[str, Any]]:
    """Return q, k and v of sequences with these numbers of queries and keys, and the options that say where they are.

    Options and sizes but N and M are those of the case.
    """
    edges = [np.cumsum([0, *side], dtype=np.int32) for side in zip(*lengths, strict=True)]
    inputs = make_inputs(replace(case, N=int(edges[0][-1]), M=int(edges[1][-1])))
    options = case.options | {"cu_seqlens_q": edges[0], "cu_seqlens_k": edges[1]}
    return [np.ascontiguousarray(x[0].swapaxes(0, 1)) for x in inputs], options


@pytest.mark.parametrize("how", [EXACT, GROUPINGS[1], GROUPINGS[3], *SUBSPACES], ids=str)
def test_packed_sequences_in_tiles_of_a_gpu_agree(tiles_of_a_gpu: list[Any], how: dict[str, Any]) -> None:
    case = small(H=1, H_kv=1, D=4, L=18, dtype="float64", causal=True, **how)
    inputs, options = packed(case, (3, 5), (0, 2), (20, 19), (4, 0))
    expected = distr_attention(*inputs, return_lse=True, **options)
    given = [to_kind(x, "numba") for x in inputs]
    result = distr_attention(*given, return_lse=True, **options_to_kind(options, "numba"))
    assert_call_agrees(case, [to_host(x) for x in result], expected)
    assert tiles_of_a_gpu[0].thread_rows * tiles_of_a_gpu[0].thread_columns == 256


def ragged_problem(by: str, causal: bool | str, N: int, M: int, sequences: int, block_size: int) -> RaggedProblem:
    case = small(N=N, M=M, H=1, H_kv=1, causal=causal, L=block_size, rank=4, method="subspace", by=by)
    return RaggedProblem(case.native_problem(make_inputs(case)), sequences, is_top_left=causal == "top-left")


@pytest.mark.parametrize("causal", [False, True, "top-left"])
@pytest.mark.parametrize("by", ["keys", "queries"])
def test_tables_say_where_sequences_and_blocks_are(by: str, causal: bool | str) -> None:
    """More sequences than threads; blocks that tiles do not divide, of 16 rows in the forward kernel and of 8."""
    from distrattn_np.numba_kernels import sequences as tables

    L = 19
    lengths = np.random.default_rng(0).choice([0, 1, 2, 18, 19, 20, 40, 60], (21, 2))
    edges = np.concatenate([np.zeros((1, 2), np.int64), np.cumsum(lengths, axis=0)])
    problem = ragged_problem(by, causal, *edges[-1].tolist(), len(lengths), L)
    assert len(lengths) > numba_backend.THREADS.group
    found = BACKEND.sequences(
        problem.packed, to_kind(edges, "numba"), problem, *(to_kind(edges[:, side].copy(), "numba") for side in (0, 1))
    )
    table, blocks = to_host(found.table), to_host(found.blocks)
    assert_same_bits(table[[tables.QUERIES, tables.KEYS]], np.ascontiguousarray(edges.T))

    cut = 0 if by == "queries" else 1
    before = {tables.BLOCKS: 0, tables.QUERY_TILES: 0, tables.SAMPLE_TILES: 0}
    wanted = []
    for s, (N, M) in enumerate(lengths.tolist()):
        one = problem.sequence(N, M)
        assert table[tables.DIAGONALS, s] == (0 if causal == "top-left" else M - N)
        for row, count in before.items():
            assert table[row, s] == count
        own = block_edges((N, M)[cut], L)
        met = [
            rows_that_meet(*edge, group_by=by, N=N, M=M, causal_offset=one.meeting_offset) if N else (0, 0)
            for edge in own
        ]
        first_block = before[tables.BLOCKS]
        for c, ((start, stop), (first, last)) in enumerate(zip(own, met, strict=True)):
            if causal is False:
                new = [(N, M)[1 - cut] * part // len(own) for part in (c, c + 1)]
            elif by == "keys":
                new = [first, met[c + 1][0] if c + 1 < len(own) else last]
            else:
                new = [met[c - 1][1] if c else 0, last]
            cut_row, other_row = edges[s, cut], edges[s, 1 - cut]
            rows = [cut_row + start, cut_row + stop, *(other_row + x for x in (first, last, *new))]
            wanted.append([s, first_block, *rows] if N else [0] * tables.BLOCK_FIELDS)
        queries_of_blocks = own if by == "queries" else block_edges(N, max(N, 1))
        before[tables.BLOCKS] += len(own)
        before[tables.QUERY_TILES] += sum(-(-(stop - start) // 16) for start, stop in queries_of_blocks)
        before[tables.SAMPLE_TILES] += sum(-(-(stop - start) // 8) for start, stop in own)
    for row, count in before.items():
        assert table[row, -1] == count
        block, tile = {tables.BLOCKS: (L, L), tables.SAMPLE_TILES: (L, 8)}.get(row, (L, 16))
        if row == tables.QUERY_TILES and by == "keys":
            block = int(edges[-1, 0])
        rows = int(edges[-1, 0 if row == tables.QUERY_TILES else cut])
        assert count <= tables.most_tiles(rows, len(lengths), block, tile)
    assert blocks.shape[1] == edges[-1, cut] // L + len(lengths)
    surplus = [[0] * tables.BLOCK_FIELDS] * (blocks.shape[1] - len(wanted))
    assert_same_bits(blocks, np.array([*wanted, *surplus], np.int64).T)


@pytest.mark.parametrize("wrong", [(3, 2, 1, 0), (0, 100, -7, 9), (-5, 4, 2, 2**40)], ids=str)
def test_wrong_lengths_make_no_more_work_than_right_ones(wrong: tuple[int, ...]) -> None:
    """Edges that fall or leave the array are cut off, so nothing is numbered past what is launched and allocated."""
    from distrattn_np.numba_kernels import sequences as tables

    problem = ragged_problem("keys", True, 9, 9, 3, 2)
    edges = to_kind(np.array(wrong), "numba")
    table = to_host(BACKEND.sequences(problem.packed, edges, problem, edges, edges).table)
    inside = np.maximum.accumulate(np.clip(wrong, 0, 9))
    assert_same_bits(table[[tables.QUERIES, tables.KEYS]], np.array([inside, inside]))
    assert table[tables.BLOCKS, -1] <= tables.most_tiles(9, 3, 2, 2)
    assert table[tables.QUERY_TILES, -1] <= tables.most_tiles(9, 3, 9, 16)


@pytest.mark.parametrize("how", [EXACT, *GROUPINGS, *SUBSPACES], ids=str)
def test_host_reads_no_lengths(monkeypatch: pytest.MonkeyPatch, how: dict[str, Any]) -> None:
    """Nothing is copied from the device, and the same is launched whatever the lengths are."""
    case = small(H=2, H_kv=1, causal=True, **how)
    launches: list[tuple[Any, ...]] = []
    launch = numba_backend.launch

    def record(kernel: Any, blocks: int, threads: Any, *arguments: Any) -> None:
        shapes = [tuple(x.shape) if getattr(x, "shape", ()) else x for x in arguments]
        launches.append((kernel, blocks, threads, *shapes))
        launch(kernel, blocks, threads, *arguments)

    def refuse(*_: Any) -> None:
        raise AssertionError("the host waits for the device")

    calls = []
    for lengths in (((20, 23), (0, 0), (17, 9)), ((0, 23), (36, 0), (1, 9)), ((10, 10), (10, 11), (17, 11))):
        inputs, options = packed(case, *lengths)
        calls.append(([to_kind(x, "numba") for x in inputs], options_to_kind(options, "numba")))
    monkeypatch.setattr(numba_backend, "launch", record)
    monkeypatch.setattr(type(calls[0][0][0]), "copy_to_host", refuse)
    made = []
    for inputs, options in calls:
        distr_attention(*inputs, **options)
        made.append(launches[:])
        launches.clear()
    assert made[0]
    assert made[0] == made[1] == made[2]


def test_mean_of_many_keys_takes_some_of_each_sequence() -> None:
    edges = np.array([0, 4100, 4103, 6200], np.int32)
    k = np.random.default_rng(0).standard_normal((edges[-1], 1, 2))
    K = to_kind(np.ascontiguousarray(k.swapaxes(0, 1)[None]), "numba")
    problem = ragged_problem("keys", False, 1, 6200, 3, 5000)
    found = BACKEND.sequences(problem.packed, K, problem, *(to_kind(edges, "numba"),) * 2)
    mean = to_host(BACKEND.key_mean(K, found))
    parts = [k[first:stop].swapaxes(0, 1)[None] for first, stop in pairwise(edges)]
    assert_agrees(mean, np.concatenate([reference.key_mean(x) for x in parts]), rtol=1e-12, atol=1e-14)


def test_bfloat16_is_refused() -> None:
    q = np.zeros((1, 1, 2, 4), BFLOAT16)
    message = r"^q: the numba backend takes float16, float32 and float64, got numpy array .* dtype bfloat16$"
    with pytest.raises(NotImplementedError, match=message):
        exact_attention(q, q, q, backend="numba")


def reference_maps(problem: Problem, inputs: Inputs) -> Any:
    """Return the reference's channels and float64 gains."""
    return reference.group_maps(inputs.q, inputs.k, **problem.map_options)


def subspace_maps(problem: Problem, inputs: Inputs) -> reference.Maps:
    """Return the reference's maps, in float64."""
    return reference.make_maps(inputs.q, inputs.k, **problem.map_options)


def expected(case: Case, inputs: Inputs) -> tuple[np.ndarray, np.ndarray]:
    """Return the reference's result, in the layout of the case, and lse."""
    problem = problem_of(*inputs, **(case.options | {"layout": "bhnd"}))
    g = problem.grouping
    options: dict[str, Any] = {"scale": problem.scale, "causal_offset": problem.causal_offset}
    options["options"] = case.score_options
    if g is None:
        result, lse = reference.exact_attention(*inputs, **options)
    elif isinstance(g, Subspace):
        options |= {"block_size": g.block_size, "group_by": g.by}
        result, lse = reference.subspace_attention(*inputs, subspace_maps(problem, inputs), **options)
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
