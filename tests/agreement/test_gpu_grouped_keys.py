"""Do grouped keys on a GPU keep what the reference keeps, and do calls compute what they keep? Run with CuPy.

Blocks: ranks are those of the reference, predicted errors close, and scores through them no further from exact ones.
Given the blocks, 16 bits: no worse than twice the error of plain NumPy in the same precision, against float64. Not
checked here: that the approximation is near exact attention, and speed.
"""

from __future__ import annotations

import io
from dataclasses import dataclass, fields
from functools import partial
from itertools import cycle
from typing import Any

import numpy as np
import pytest
from kit.backends import to_kind
from kit.cases import BFLOAT16, Case, in_memory
from kit.compare import assert_agrees, assert_no_worse_than_plain, assert_same_bits, relative_error, to_host
from kit.device import Captured, assert_stays_in_workspace, poisoned_like, write_late
from kit.strategies import SPACING

from distrattn_np import GroupedKeys, distr_attention, exact_attention, group_keys, reference, workspace_size
from distrattn_np.grouped_keys import KeyBlock

pytestmark = pytest.mark.gpu

PREDICTION = {"float16": 4e-3, "bfloat16": 1.6e-2, "float32": 4e-3, "float64": 1e-6}
"""Of the root mean square of all scores, as in test_gpu_subspace.py."""


@dataclass(frozen=True)
class Cache:
    """Sizes and options of keys and of one call to them; letters as in docs/math.md."""

    B: int = 1
    H: int = 4
    H_kv: int = 2
    N: int = 1
    M: int = 200
    D: int = 64
    E: int = 64
    dtype: str = "float16"
    rank: int = 32
    score_tol: float | None = None
    refine: int = 1
    L: int = 64
    known: int = 50
    """Queries that are known beforehand; 0: none."""
    causal: bool | str = True
    scale: float | None = None
    layout: str = "bhnd"
    memory: str = "contiguous"

    def __str__(self) -> str:
        return "-".join(f"{f.name}={getattr(self, f.name)}" for f in fields(self) if getattr(self, f.name) != f.default)

    @property
    def numpy_dtype(self) -> np.dtype:
        """The dtype that the name stands for."""
        return BFLOAT16 if self.dtype == "bfloat16" else np.dtype(self.dtype)

    @property
    def options(self) -> dict[str, Any]:
        """Keywords of `group_keys`."""
        reduction = {"rank": self.rank} if self.score_tol is None else {"score_tol": self.score_tol}
        return reduction | {"refine": self.refine, "block_size": self.L, "scale": self.scale, "layout": self.layout}

    @property
    def all_scores_scale(self) -> float:
        """The scale, by default too."""
        return 1 / np.sqrt(self.D) if self.scale is None else self.scale

    @property
    def causal_offset(self) -> int | None:
        """Query n sees keys m <= n + causal_offset."""
        return {True: self.M - self.N, "top-left": 0, False: None}[self.causal]

    def give(self, array: np.ndarray) -> Any:
        """Return a CuPy copy in the layout and memory of the case."""
        return to_kind(in_memory(array, Case(layout=self.layout, memory=self.memory)), "cupy")

    def back(self, array: Any) -> np.ndarray:
        """Return a result as a NumPy array (B, H, rows, width)."""
        host = to_host(array)
        return np.ascontiguousarray(host.swapaxes(1, 2) if self.layout == "bnhd" else host)


@dataclass(frozen=True)
class Inputs:
    """NumPy arrays (B, H, rows, width)."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    known: np.ndarray | None


def make_inputs(case: Cache, seed: int = 0) -> Inputs:
    """Return inputs whose keys have a mean and weigh some directions more than others, as those of models do."""
    rng = np.random.default_rng([seed, case.B, case.H, case.N, case.M, case.D])
    weights = rng.standard_normal((case.D, case.D)) * 0.9 ** np.arange(case.D) / np.sqrt(case.D) * 3
    k = rng.standard_normal((case.B, case.H_kv, case.M, case.D)) @ weights + rng.standard_normal(case.D)
    q, known = (rng.standard_normal((case.B, case.H, rows, case.D)) for rows in (case.N, case.known))
    v = rng.standard_normal((case.B, case.H_kv, case.M, case.E))
    q, k, v, known = (x.astype(case.numpy_dtype) for x in (q, k, v, known))
    return Inputs(q, k, v, known if case.known else None)


def grouped(case: Cache, inputs: Inputs, pieces: list[int] | None = None) -> GroupedKeys:
    """Return the keys of a case, appended at once or in pieces that end before these rows."""
    known = None if inputs.known is None else case.give(inputs.known)
    first, *others = np.split(inputs.k, pieces or [], axis=2)
    keys = group_keys(case.give(first), known, **case.options)
    for piece in others:
        keys.append(case.give(piece))
    return keys


def kept(keys: GroupedKeys) -> tuple[np.ndarray, list[KeyBlock]]:
    """Return the tail and the finished blocks on the host."""
    return to_host(keys.tail), [
        KeyBlock(*(to_host(getattr(block, name)) for name in KeyBlock.__slots__)) for block in keys.blocks
    ]


def everything_in(keys: GroupedKeys) -> dict[str, np.ndarray]:
    file = io.BytesIO()
    keys.save(file)
    file.seek(0)
    with np.load(file, allow_pickle=False) as npz:
        return dict(npz)


def assert_same_keys(one: GroupedKeys, other: GroupedKeys, *but: str) -> None:
    files = everything_in(one), everything_in(other)
    assert files[0].keys() == files[1].keys()
    for name in files[0].keys() - set(but):
        assert_same_bits(files[0][name], files[1][name], context=name)


def scores(case: Cache, inputs: Inputs, tail: np.ndarray, blocks: list[KeyBlock], *, plain: bool) -> np.ndarray:
    """Return the scaled scores (B, H, N, M) of eq. 27: in float64, or in ``plain`` arithmetic of the dtype."""
    real = np.float32 if plain else np.float64

    def rounded(x: np.ndarray) -> np.ndarray:
        return x.astype(case.numpy_dtype).astype(real) if plain else x

    S = np.empty((case.B, case.H, case.N, case.M), real)
    shared = case.H // case.H_kv
    q = inputs.q.astype(real)
    for b, h in np.ndindex(case.B, case.H):
        for c, block in enumerate(blocks):
            s, Z, mean = (x[b, h // shared].astype(real) for x in (block.sampled, block.fusion, block.mean))
            S[b, h, :, c * case.L : (c + 1) * case.L] = (q[b, h] @ mean)[:, None] + rounded(q[b, h] @ Z) @ s.T
        S[b, h, :, len(blocks) * case.L :] = q[b, h] @ tail[b, h // shared].astype(real).T
    return rounded(real(case.all_scores_scale) * S)


def attention(case: Cache, inputs: Inputs, S: np.ndarray, *, plain: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return the softmax of scores times values, and lse; ``plain``: every result rounded to the dtype."""
    seen = reference.visible_keys(case.N, case.M, case.causal_offset)
    out, lse = np.zeros((case.B, case.H, case.N, case.E), S.dtype), np.zeros((case.B, case.H, case.N), S.dtype)
    for b, h in np.ndindex(case.B, case.H):
        v = inputs.v[b, h // (case.H // case.H_kv)].astype(S.dtype)
        masked = np.where(seen, S[b, h], -np.inf)
        out[b, h], lse[b, h] = reference.softmax_attention(masked, v)
        if plain:
            P = np.exp(masked - np.where(np.isfinite(lse[b, h]), lse[b, h], 0)[:, None]).astype(S.dtype)
            out[b, h] = P.astype(case.numpy_dtype).astype(S.dtype) @ v
    return out.astype(case.numpy_dtype) if plain else out, lse


def assert_attends(case: Cache, inputs: Inputs, keys: GroupedKeys) -> None:
    """Assert that a call computes what the keys hold."""
    results = []
    for _ in range(2):
        out, lse = distr_attention(
            *(case.give(inputs.q), keys, case.give(inputs.v)),
            causal=case.causal,
            layout=case.layout,
            return_lse=True,
        )
        results.append((case.back(out), to_host(lse)))
    for first, second in zip(*results, strict=True):
        assert_same_bits(second, first, context=f"second call of {case}")
    out, lse = results[0]
    tail, blocks = kept(keys)
    expected, expected_lse = attention(case, inputs, scores(case, inputs, tail, blocks, plain=False), plain=False)
    largest_lse = float(np.abs(expected_lse, where=np.isfinite(expected_lse), out=np.zeros_like(expected_lse)).max())
    if SPACING[case.dtype] > SPACING["float32"]:
        usual = attention(case, inputs, scores(case, inputs, tail, blocks, plain=True), plain=True)
        atol = SPACING[case.dtype] / 2 * float(np.abs(expected).max())
        assert_no_worse_than_plain(out, usual[0], expected, atol=atol, context=str(case), constant_ok=case.E == 1)
        atol = 1e-5 * (1 + largest_lse)
        assert_no_worse_than_plain(lse, usual[1], expected_lse, atol=atol, context=f"lse of {case}", constant_ok=True)
    else:
        assert relative_error(out, expected) <= {"float32": 1e-5, "float64": 1e-12}[case.dtype]
        assert_agrees(lse, expected_lse, rtol=0, atol=1e-5 * (1 + largest_lse), check_dtype=False, constant_ok=True)


def ragged() -> list[Cache]:
    """Return every number of queries and keys around the edges of tiles and blocks, whose other axes take turns."""
    heads, batches = cycle([(1, 1), (2, 1), (4, 1), (8, 1), (8, 2), (4, 4), (12, 3), (16, 8)]), cycle([1, 2, 1])
    widths = cycle([(64, 64, 32), (128, 128, 64), (128, 64, 32), (33, 7, 11), (80, 80, 40), (16, 256, 16 - 1)])
    sizes = cycle([64, 48, 100, 16])
    dtypes, causal = cycle(["float16", "float16", "bfloat16"]), cycle([True, True, False])
    cases = []
    for i, blocks in enumerate((0, 1, 1, 2, 3, 3, 4)):
        for rest in (0, 1, 17, None):
            L, (H, H_kv), (D, E, rank) = next(sizes), next(heads), next(widths)
            M = blocks * L + (L if rest is None else min(rest, L))
            if M == 0:
                continue
            N = 1 if rest == 1 else min(1 + (i + blocks + len(cases)) % 8, M)
            some = {"B": next(batches), "H": H, "H_kv": H_kv, "N": N, "M": M, "D": D, "E": E, "rank": rank, "L": L}
            cases.append(Cache(**some, dtype=next(dtypes), causal=next(causal), known=0 if i % 4 == 3 else 30))
    return cases


FEATURES = [
    *(
        Cache(N=3, layout=layout, memory=memory)
        for layout in ("bhnd", "bnhd")
        for memory in ("contiguous", "strided", "unaligned")
    ),
    Cache(N=2, scale=-0.3),
    Cache(N=2, scale=0.5, refine=0),
    Cache(N=5, score_tol=0.3, D=48, L=100, M=250),
    Cache(N=8, H=16, H_kv=1, D=128, E=128, M=150, causal="top-left"),
    Cache(N=8, H=8, H_kv=2, D=256, E=256, rank=128, M=150),
    Cache(N=2, D=256, E=16, rank=240, M=150),
]
ELSEWHERE = [
    Cache(N=9, M=150),
    Cache(N=40, M=150, H=2, H_kv=2, causal="top-left", dtype="bfloat16"),
    *(Cache(N=N, M=150, D=33, E=7, rank=11, L=40, dtype=dtype) for N in (1, 20) for dtype in ("float32", "float64")),
    Cache(N=3, score_tol=0.3, D=48, L=100, M=250, dtype="float32"),
]
"""Calls that read the keys rebuilt."""


@pytest.mark.parametrize("case", [*ragged(), *FEATURES, *ELSEWHERE], ids=str)
def test_call_computes_what_is_kept(case: Cache) -> None:
    inputs = make_inputs(case)
    keys = grouped(case, inputs)
    assert len(keys.blocks) == reference.finished_blocks(case.M, case.L)
    assert_attends(case, inputs, keys)


@pytest.mark.parametrize("count", [1, 2, 5, 30])
@pytest.mark.parametrize("case", [*ragged()[9::5], FEATURES[-1], FEATURES[-2]], ids=str)
def test_any_number_of_splits_gives_the_same(case: Cache, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also such that begin within a block, or within the tail."""

    def splits(keys: int, block_kv: int, *_: int) -> tuple[int, int]:
        return count, -(-keys // count // 16) * 16 if count < 30 else block_kv

    monkeypatch.setattr("distrattn_np.backends.cupy_decode.decode_splits", splits)
    inputs = make_inputs(case)
    assert_attends(case, inputs, grouped(case, inputs))


@pytest.mark.parametrize("N", [1, 20])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_score_options_apply_to_what_is_kept(N: int, dtype: str) -> None:
    """Also to few queries, which decode.cu leaves to other kernels then."""
    case = Cache(N=N, M=150, dtype=dtype)
    inputs = make_inputs(case)
    keys = grouped(case, inputs)
    rng = np.random.default_rng(1)
    mask = rng.random((case.N, case.M)) < 0.7
    bias = rng.standard_normal((case.H, 1, case.M), dtype=np.float32)
    tables = {"mask": to_kind(mask, "cupy"), "bias": to_kind(bias, "cupy")}
    options = {"causal": True, "window": (130, None), "softcap": 2.0}
    out, lse = distr_attention(case.give(inputs.q), keys, case.give(inputs.v), **options, **tables, return_lse=True)
    S = 2 * np.tanh(scores(case, inputs, *kept(keys), plain=False) / 2) + bias
    n, m = np.indices((case.N, case.M))
    low = n + case.M - case.N - 130
    seen = mask & (m >= low) & reference.visible_keys(case.N, case.M, case.causal_offset)
    expected = np.empty(out.shape)
    expected_lse = np.empty(lse.shape)
    for b, h in np.ndindex(case.B, case.H):
        v = inputs.v[b, h // (case.H // case.H_kv)].astype(np.float64)
        expected[b, h], expected_lse[b, h] = reference.softmax_attention(np.where(seen, S[b, h], -np.inf), v)
    # keys rebuilt, weights and results are rounded to the dtype, each time less than all of it
    rtol = 4 * SPACING[dtype] + 1e-5
    assert relative_error(to_host(out), expected) <= rtol
    assert_agrees(to_host(lse), expected_lse, rtol=rtol, atol=rtol, check_dtype=False)


def test_a_long_cache() -> None:
    case = Cache(B=2, H=8, H_kv=2, N=4, M=10000, D=128, E=128, rank=64, L=512)
    inputs = make_inputs(case)
    assert_attends(case, inputs, grouped(case, inputs))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize(
    "case",
    [Cache(), Cache(known=0), Cache(score_tol=0.5, D=48), Cache(D=33, rank=11, L=50), Cache(refine=2, scale=0.2, B=2)],
    ids=str,
)
def test_blocks_are_as_good_as_the_reference(case: Cache, dtype: str) -> None:
    case = Cache(**{f.name: getattr(case, f.name) for f in fields(case)} | {"dtype": dtype})
    inputs = make_inputs(case)
    keys = grouped(case, inputs)
    _, blocks = kept(keys)
    expected = reference.make_key_maps(
        inputs.k,
        inputs.known,
        scale=case.all_scores_scale,
        rank=None if case.score_tol else case.rank,
        score_tol=case.score_tol,
        refine=case.refine,
        block_size=case.L,
    )
    assert_same_bits(to_host(keys.ranks), expected.ranks, context=str(case))
    assert len(blocks) == 3
    own, usual, all_scores = ([], [], [])
    sums = "float64" if dtype == "float64" else "float32"
    shared = case.H // case.H_kv
    for (b, h), (c, block) in ((head, one) for head in np.ndindex(case.B, case.H_kv) for one in enumerate(blocks)):
        X = inputs.k[b, h, c * case.L : (c + 1) * case.L].astype(np.float64)
        u, W, Z = (x[b, h, c] for x in (expected.key_mean, expected.sampling, expected.fusion))
        # the rounding of the mean, and of its sum
        atol = SPACING[dtype] * float(np.abs(u).max()) + SPACING[sums] * float(np.abs(X).max())
        assert_agrees(block.mean[b, h].astype(np.float64), u, rtol=0, atol=atol, context="mean")
        # the directions that the maps were made for
        Y = (
            X
            if inputs.known is None
            else inputs.known[b, h * shared : (h + 1) * shared].reshape(-1, case.D).astype(float)
        )
        S = case.all_scores_scale * Y @ X.T
        s, own_Z, own_u = (x[b, h].astype(np.float64) for x in (block.sampled, block.fusion, block.mean))
        all_scores.append(np.square(S).mean())
        own.append(np.sqrt(np.square(case.all_scores_scale * ((Y @ own_u)[:, None] + Y @ own_Z @ s.T) - S).mean()))
        reached = (Y @ u)[:, None] + (Y @ Z) @ ((X - u) @ W).T
        usual.append(np.sqrt(np.square(case.all_scores_scale * reached - S).mean()))
    atol = PREDICTION[dtype] * float(np.sqrt(np.mean(all_scores)))
    assert_agrees(np.maximum(own, usual), np.array(usual), rtol=1e-2, atol=atol, context=str(case), constant_ok=True)
    assert_agrees(
        to_host(keys.score_errors),
        expected.score_errors,
        rtol=1e-2 if dtype == "bfloat16" else 1e-3,
        atol=atol,
        context=f"predicted errors of {case}",
        check_dtype=False,
        constant_ok=True,
    )


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("case", [Cache(), Cache(known=0, D=33, rank=11), Cache(score_tol=0.3, D=48, B=2)], ids=str)
def test_how_keys_came_changes_no_bit(case: Cache, dtype: str) -> None:
    options = {f.name: getattr(case, f.name) for f in fields(case)} | {"dtype": dtype, "M": 215, "L": 50}
    case = Cache(**options)
    inputs = make_inputs(case)
    at_once = grouped(case, inputs)
    assert len(at_once.blocks) == 4
    assert_same_keys(grouped(case, inputs, list(range(30, case.M))), at_once)
    assert_same_keys(grouped(case, inputs, [0, 50, 101, 200]), at_once)
    for other in (Cache(**options | {"layout": "bnhd"}), Cache(**options | {"memory": "unaligned"})):
        assert_same_keys(grouped(other, inputs, [7, 120]), at_once, "layout")


def test_heads_that_share_their_memory_change_no_bit() -> None:
    case = Cache(M=215)
    inputs = make_inputs(case)
    shared = np.broadcast_to(case.give(inputs.k[:, :1]), inputs.k.shape)
    assert_same_keys(group_keys(shared, **case.options), group_keys(shared.copy(), **case.options))


def test_blocks_that_are_made_in_turns_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Cache(M=330)
    inputs = make_inputs(case)
    at_once = grouped(case, inputs)
    monkeypatch.setattr("distrattn_np.backends.cupy_grouped_keys.WORKSPACE_BYTES", 1)
    assert_same_keys(grouped(case, inputs), at_once)


@pytest.mark.parametrize(
    "case", [Cache(M=64), Cache(M=40, N=3), Cache(rank=64, M=150), Cache(M=30, dtype="float32")], ids=str
)
def test_a_tail_alone_is_exact_attention_bit_for_bit(case: Cache) -> None:
    inputs = make_inputs(case)
    keys = grouped(case, inputs, [11])
    assert keys.blocks == []
    q, v = case.give(inputs.q), case.give(inputs.v)
    expected = exact_attention(q, case.give(inputs.k), v, causal=True, return_lse=True)
    for one, other in zip(distr_attention(q, keys, v, causal=True, return_lse=True), expected, strict=True):
        assert_same_bits(one, other)


@pytest.mark.parametrize(
    "case", [Cache(M=215), Cache(M=215, score_tol=0.3, D=48), Cache(M=30), Cache(M=99, rank=64)], ids=str
)
def test_a_file_gives_it_back_bit_for_bit(case: Cache) -> None:
    inputs = make_inputs(case)
    saved = grouped(case, Inputs(inputs.q, inputs.k[:, :, : case.M - 20], inputs.v, inputs.known))
    file = io.BytesIO()
    saved.save(file)
    file.seek(0)
    loaded = GroupedKeys.load(file, kind="cupy")
    for keys in (saved, loaded):
        keys.append(case.give(inputs.k[:, :, case.M - 20 :]))
    assert_same_keys(loaded, saved)
    q, v = case.give(inputs.q), case.give(inputs.v)
    assert_same_bits(distr_attention(q, loaded, v), distr_attention(q, saved, v))
    # another kind reads the same file
    file = io.BytesIO()
    saved.save(file)
    file.seek(0)
    on_host = GroupedKeys.load(file)
    assert_agrees(
        distr_attention(inputs.q, on_host, inputs.v),
        to_host(distr_attention(q, saved, v)),
        rtol=0,
        atol=8 * SPACING[case.dtype],
    )


def test_a_step_keeps_its_arrays() -> None:
    """One key more neither allocates what is kept anew nor copies it, but for a few times on the way."""
    case = Cache(M=50, D=16, E=16, rank=8, L=4, known=0)
    inputs = make_inputs(case)
    keys = grouped(case, inputs)
    arrays, renewed = set(), 0
    for step in range(400):
        keys.append(case.give(inputs.k[:, :, step % 50 : step % 50 + 1]))
        now = {keys._sampled.array.data.ptr, keys._maps.array.data.ptr}
        renewed += now != arrays
        arrays = now
    assert len(keys.blocks) == 112
    assert renewed <= 1 + np.log(112 / 12) / np.log(9 / 8) + 8  # the first blocks get room one by one
    assert keys._buffer.shape[2] == 4


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_memory_is_that_of_the_rank(dtype: str) -> None:
    B, H_kv, L, D, R, F = 2, 3, 128, 64, 32, 7
    k = np.random.default_rng(0).standard_normal((B, H_kv, F * L + 1, D)).astype(dtype)
    keys = group_keys(to_kind(k, "cupy"), rank=R, block_size=L)
    numbers = F * (L * R + D * R + D) + L * D  # blocks, and room for the tail
    few = 8 * F  # a rank and a predicted error a block
    assert keys.nbytes <= B * H_kv * (numbers * k.itemsize + few)
    keys.append(to_kind(k[:, :, :L], "cupy"))  # a block more has room for one
    assert keys.nbytes <= B * H_kv * ((numbers + L * R + D * R + D) * k.itemsize + few + 8)


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_what_is_not_finite_stays_in_its_head(wrong: float) -> None:
    case = Cache(M=150)
    inputs = make_inputs(case)

    def attend() -> np.ndarray:
        return to_host(distr_attention(case.give(inputs.q), grouped(case, inputs), case.give(inputs.v)))

    expected = attend()
    inputs.k[0, 1, 5, 2] = wrong
    got = attend()
    assert_same_bits(got[:, :2], expected[:, :2])
    assert np.isnan(got[:, 2:]).any()


@pytest.mark.parametrize("shape", [(0, 2, 40, 8), (2, 0, 40, 8), (1, 2, 0, 8)])
def test_empty_axes(shape: tuple[int, ...]) -> None:
    def ones(*sizes: int) -> Any:
        return to_kind(np.ones(sizes, np.float16), "cupy")

    keys = group_keys(ones(*shape), rank=3, block_size=16)
    keys.append(ones(*shape))
    out, lse = distr_attention(ones(*shape[:2], 3, 8), keys, ones(*shape[:2], 2 * shape[2], 5), return_lse=True)
    assert out.shape == (*shape[:2], 3, 5)
    assert not to_host(out).any()
    assert np.isneginf(to_host(lse)).all()


def test_info_and_out() -> None:
    case = Cache(M=150)
    inputs = make_inputs(case)
    keys, q, v = grouped(case, inputs), case.give(inputs.q), case.give(inputs.v)
    out = to_kind(np.full(inputs.q.shape, np.nan, np.float16), "cupy")
    result, info = distr_attention(q, keys, v, out=out, return_info=True)
    assert result is out
    assert_same_bits(out, distr_attention(q, keys, v))
    assert (info.method, info.block_size, info.reason) == ("subspace", 64, "that of the grouped keys")
    assert_same_bits(to_host(info.ranks), np.full((1, 2, 2), 32, np.int32))


def test_a_call_runs_on_a_stream_and_writes_lse() -> None:
    import cupy

    case = Cache(M=150)
    inputs = make_inputs(case)
    keys, q, v = grouped(case, inputs), case.give(inputs.q), case.give(inputs.v)
    expected, expected_lse = distr_attention(q, keys, v, return_lse=True)
    lse = cupy.full(expected_lse.shape, np.nan, np.float32)
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()
    out = distr_attention(q, keys, v, stream=stream, lse=lse)
    stream.synchronize()
    assert_same_bits(out, expected)
    assert_same_bits(lse, expected_lse)


def test_keys_are_grouped_on_the_stream_that_is_named() -> None:
    """What comes first and what is appended is written there late; elsewhere poison would be read."""
    import cupy

    case = Cache(M=215)
    inputs = make_inputs(case)
    good = [case.give(x) for x in (inputs.known, inputs.k[:, :, :100], inputs.k[:, :, 100:])]
    expected = grouped(case, inputs)
    late = [poisoned_like(x) for x in good]
    stream = cupy.cuda.Stream(non_blocking=True)
    write_late(stream, late, good)
    keys = group_keys(late[1], late[0], **case.options, stream=stream)
    keys.append(late[2], stream=stream.ptr)
    assert cupy.cuda.get_current_stream().ptr == cupy.cuda.Stream.null.ptr
    stream.synchronize()
    assert_same_keys(keys, expected)


IN_WORKSPACES = {
    "splits": (Cache(M=3000, L=512, N=2), {}),
    "one split": (Cache(M=150), {}),
    "tail alone": (Cache(M=60), {}),
    "rebuilt": (Cache(M=150, N=20, layout="bnhd"), {}),
    "rebuilt-cap": (Cache(M=150, D=33, E=7, rank=11, L=40), {"softcap": 2.0}),
    "rebuilt-float32": (Cache(M=150, N=3, dtype="float32"), {}),
}


@pytest.mark.parametrize("name", IN_WORKSPACES)
def test_a_step_in_a_workspace_allocates_nothing_and_stays_inside(name: str) -> None:

    case, options = IN_WORKSPACES[name]
    inputs = make_inputs(case)
    options = options | {"layout": case.layout, "causal": True}
    keys, q, v = grouped(case, inputs), case.give(inputs.q), case.give(inputs.v)
    expected, expected_lse = distr_attention(q, keys, v, **options, return_lse=True)
    out, lse = poisoned_like(expected), poisoned_like(expected_lse)
    size = workspace_size(q, keys, v, **options, out=out, lse=lse)
    assert (size > 0) == (name == "splits" or name.startswith("rebuilt"))
    call = partial(distr_attention, q, keys, v, **options)
    memory = assert_stays_in_workspace(call, out, lse, size, (expected, expected_lse))
    if size:
        with pytest.raises(ValueError, match=rf"^workspace: must have at least {size} bytes, got cupy array of shape"):
            distr_attention(q, keys, v, **options, out=out, lse=lse, workspace=memory[: size - 1])


@pytest.mark.parametrize("name", IN_WORKSPACES)
def test_a_captured_step_computes_with_what_its_arrays_hold_then(name: str) -> None:
    import cupy

    case, options = IN_WORKSPACES[name]
    inputs = make_inputs(case)
    options = options | {"layout": case.layout, "causal": True}
    keys, q, v = grouped(case, inputs), case.give(inputs.q), case.give(inputs.v)
    out, lse = (poisoned_like(x) for x in distr_attention(q, keys, v, **options, return_lse=True))
    memory = cupy.empty(workspace_size(q, keys, v, **options, out=out, lse=lse), np.uint8)
    graph = Captured(partial(distr_attention, q, keys, v, **options), out, lse, memory)
    for seed in (1, 2):
        others = make_inputs(case, seed)
        q[...], v[...] = case.give(others.q), case.give(others.v)
        graph.assert_gives(distr_attention(q, keys, v, **options, return_lse=True))


def test_kinds_are_not_mixed() -> None:
    case = Cache(M=150)
    inputs = make_inputs(case)
    keys = grouped(case, inputs)
    shown = r"GroupedKeys of shape \(1, 2, 150, 64\) and dtype float16"
    with pytest.raises(TypeError, match=f"^k: must hold numpy arrays, as q is, got {shown} on a CUDA device$"):
        distr_attention(inputs.q, keys, inputs.v)
    on_host = group_keys(inputs.k, rank=32, block_size=64)
    with pytest.raises(TypeError, match=f"^k: must hold cupy arrays, as q is, got {shown}$"):
        distr_attention(case.give(inputs.q), on_host, case.give(inputs.v))
    with pytest.raises(
        NotImplementedError, match=f"^k: the cupy backend takes GroupedKeys of cupy arrays, got {shown}$"
    ):
        distr_attention(inputs.q, on_host, inputs.v, backend="cupy")
    with pytest.raises(TypeError, match=r"^k: must be a cupy array, as the keys so far, got numpy array"):
        keys.append(inputs.k)
    with pytest.raises(TypeError, match=r"^k: must be a numpy array, as the keys so far, got cupy array"):
        on_host.append(case.give(inputs.k))
    with pytest.raises(TypeError, match=r"^q: must be a cupy array, as k is, got numpy array"):
        group_keys(case.give(inputs.k), inputs.q)
