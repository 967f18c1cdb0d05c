"""Do grouped keys of Numba device arrays keep and compute what the reference does? On a GPU or in Numba's simulator.

Not checked here: speed, and that the approximation is near exact attention.
"""

from __future__ import annotations

import io
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from kit.backends import to_kind
from kit.compare import assert_agrees, assert_same_bits, to_host
from kit.device import poisoned_like, write_late

from distrattn_np import GroupedKeys, distr_attention, exact_attention, group_keys, reference
from distrattn_np.arrays import kind_of

pytest.importorskip("numba")

ATOL = {"float16": 4e-3, "float32": 2e-5, "float64": 1e-10}
"""Of outputs and scores of about 1; float16 keys are rounded once more where they are rebuilt."""


@dataclass(frozen=True)
class Cache:
    """Sizes and options of keys and of one call to them; letters as in docs/math.md."""

    B: int = 1
    H: int = 2
    H_kv: int = 1
    N: int = 2
    M: int = 27
    D: int = 7
    E: int = 5
    L: int = 8
    dtype: str = "float32"
    rank: int | None = 3
    score_tol: float | None = None
    refine: int = 1
    known: int = 9
    """Queries that are known beforehand; 0: none."""
    layout: str = "bhnd"

    def __str__(self) -> str:
        usual = Cache()
        changed = {name: x for name, x in vars(self).items() if x != getattr(usual, name)}
        return "-".join(f"{name}={x}" for name, x in changed.items()) or "usual"

    @property
    def options(self) -> dict[str, Any]:
        """Keywords of `group_keys`, but for the layout."""
        reduction = {"rank": self.rank} if self.score_tol is None else {"score_tol": self.score_tol}
        return reduction | {"refine": self.refine, "block_size": self.L}

    def draw(self) -> list[np.ndarray]:
        """Return q, k, v and known queries (B, H, rows, width); keys have a mean and directions that weigh more."""
        rng = np.random.default_rng([self.B, self.H, self.M, self.D])
        weights = rng.standard_normal((self.D, self.D)) * 0.9 ** np.arange(self.D) / np.sqrt(self.D)
        q, known = (rng.standard_normal((self.B, self.H, rows, self.D)) for rows in (self.N, self.known))
        k = rng.standard_normal((self.B, self.H_kv, self.M, self.D)) @ weights + rng.standard_normal(self.D)
        v = rng.standard_normal((self.B, self.H_kv, self.M, self.E))
        return [x.astype(self.dtype) for x in (q, k, v, known)]

    def give(self, array: np.ndarray) -> Any:
        """Return a Numba array in the layout of the case, its rows not contiguous with "bnhd"."""
        if self.layout == "bhnd":
            return to_kind(array, "numba")
        memory = np.zeros((*array.swapaxes(1, 2).shape[:3], array.shape[3] + 2), array.dtype)
        memory[..., : array.shape[3]] = array.swapaxes(1, 2)
        return to_kind(memory[..., : array.shape[3]], "numba")

    def back(self, array: Any) -> np.ndarray:
        """Return a result as a NumPy array (B, H, rows, width)."""
        assert kind_of(array) == "numba"
        host = to_host(array)
        return np.ascontiguousarray(host.swapaxes(1, 2) if self.layout == "bnhd" else host)

    def group(self, k: np.ndarray, known: np.ndarray, *cuts: int) -> GroupedKeys:
        """Return the keys, appended at once or in pieces."""
        first, *others = np.split(k, cuts, axis=2)
        queries = (self.give(known),) if self.known else ()
        keys = group_keys(self.give(first), *queries, layout=self.layout, **self.options)
        for piece in others:
            keys.append(self.give(piece))
        return keys


def saved(keys: GroupedKeys) -> io.BytesIO:
    file = io.BytesIO()
    keys.save(file)
    file.seek(0)
    return file


def everything_in(keys: GroupedKeys) -> dict[str, np.ndarray]:
    with np.load(saved(keys), allow_pickle=False) as npz:
        return dict(npz)


def assert_same_keys(one: GroupedKeys, other: GroupedKeys) -> None:
    files = everything_in(one), everything_in(other)
    assert files[0].keys() == files[1].keys()
    for name, array in files[0].items():
        assert_same_bits(files[1][name], array, context=name)


def assert_agrees_with_reference(case: Cache, **options: Any) -> None:
    """Assert that blocks have the ranks and errors of the reference, and that a call gives what it gives."""
    q, k, v, known = case.draw()
    keys = case.group(k, known)
    made = {"scale": 1 / np.sqrt(case.D), "block_size": case.L}
    maps = reference.make_key_maps(
        k,
        known if case.known else None,
        rank=None if case.score_tol else case.rank,
        score_tol=case.score_tol,
        refine=case.refine,
        **made,
    )
    assert len(keys.blocks) == reference.finished_blocks(case.M, case.L) > 0
    assert_same_bits(to_host(keys.ranks), maps.ranks, context=str(case))
    atol = ATOL[case.dtype]
    # the root of a difference of sums of squares: half the digits
    errors = {"float64": 1e-6}.get(case.dtype, 2e-3)
    assert_agrees(to_host(keys.score_errors), maps.score_errors, rtol=0, atol=errors, check_dtype=False)
    given = {name: to_kind(x, "numba") if isinstance(x, np.ndarray) else x for name, x in options.items()}
    out, lse = distr_attention(
        case.give(q), keys, case.give(v), causal=True, layout=case.layout, return_lse=True, **given
    )
    expected = reference.grouped_keys_attention(
        *(q, k, v, maps), **made, causal_offset=case.M - case.N, options=reference.ScoreOptions(**options)
    )
    assert_agrees(case.back(out), expected[0], rtol=0, atol=atol, context=str(case), check_dtype=False)
    atol = max(atol, 1e-6)  # float32
    assert_agrees(to_host(lse), expected[1], rtol=0, atol=atol, context=f"lse of {case}", check_dtype=False)


CASES = [
    Cache(),
    Cache(dtype="float16", B=2),
    Cache(dtype="float64", H=4, H_kv=2, M=16),
    Cache(known=0, refine=0),
    Cache(D=20, L=10, M=23, rank=None, score_tol=0.2, dtype="float64"),
    Cache(layout="bnhd", M=17),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_call_agrees_with_reference(case: Cache) -> None:
    assert_agrees_with_reference(case)


def test_score_options_apply_to_what_is_kept() -> None:
    rng = np.random.default_rng(1)
    mask, bias = rng.random((2, 27)) < 0.7, rng.standard_normal((2, 1, 27), dtype=np.float32)
    assert_agrees_with_reference(Cache(), mask=mask, bias=bias, window=(20, None), softcap=2.0)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize(
    "sizes",
    [
        {"B": 2, "H": 8, "H_kv": 2, "N": 5, "M": 1000, "D": 64, "E": 64, "L": 128, "rank": 32, "known": 100},
        {"N": 130, "M": 700, "D": 128, "E": 33, "L": 200, "rank": None, "score_tol": 0.1, "known": 256},
    ],
    ids=["rank", "tolerance"],
)
def test_a_long_cache_agrees_with_reference(sizes: dict[str, Any], dtype: str) -> None:
    assert_agrees_with_reference(Cache(dtype=dtype, **sizes))


@pytest.mark.parametrize("case", [CASES[1], replace(CASES[4], dtype="float32")], ids=str)
def test_how_keys_came_changes_no_bit(case: Cache) -> None:
    q, k, v, known = case.draw()
    at_once = case.group(k, known)
    pieces = case.group(k, known, 0, 3, 4, 5, 6, 7, 8, 9, 19)
    assert_same_keys(pieces, at_once)
    one, other = (distr_attention(case.give(q), keys, case.give(v)) for keys in (pieces, at_once))
    assert_same_bits(to_host(one), to_host(other))


def test_blocks_that_are_made_in_turns_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Cache()
    _, k, _, known = case.draw()
    at_once = case.group(k, known)
    monkeypatch.setattr("distrattn_np.backends.numba_grouped_keys.WORKSPACE_BYTES", 1)
    assert_same_keys(case.group(k, known), at_once)


@pytest.mark.parametrize("case", [CASES[1], replace(CASES[4], dtype="float32"), Cache(M=8)], ids=str)
def test_a_file_gives_it_back_bit_for_bit(case: Cache) -> None:
    q, k, v, known = case.draw()
    keys = case.group(k[:, :, :-3], known)
    loaded = GroupedKeys.load(saved(keys), kind="numba")
    assert (loaded.kind, loaded.shape, loaded.dtype) == ("numba", keys.shape, keys.dtype)
    for one in (keys, loaded):
        one.append(case.give(k[:, :, -3:]))
    assert_same_keys(loaded, keys)
    out = distr_attention(case.give(q), keys, case.give(v))
    assert_same_bits(to_host(distr_attention(case.give(q), loaded, case.give(v))), to_host(out))
    # another kind reads the same file
    on_host = GroupedKeys.load(saved(keys))
    assert_agrees(distr_attention(q, on_host, v), to_host(out), rtol=0, atol=ATOL[case.dtype])


@pytest.mark.parametrize("case", [Cache(M=8), Cache(rank=7), Cache(M=5, dtype="float16", layout="bnhd")], ids=str)
def test_a_tail_alone_is_exact_attention_bit_for_bit(case: Cache) -> None:
    q, k, v, known = case.draw()
    keys = case.group(k, known, 0, 2)
    assert keys.blocks == []
    given, options = (case.give(q), case.give(v)), {"layout": case.layout, "causal": True, "return_lse": True}
    expected = exact_attention(given[0], case.give(k), given[1], **options)
    for one, other in zip(distr_attention(given[0], keys, given[1], **options), expected, strict=True):
        assert_same_bits(to_host(one), to_host(other))


@pytest.mark.parametrize("shape", [(0, 2, 20, 8), (2, 0, 20, 8), (1, 2, 0, 8)])
def test_empty_axes(shape: tuple[int, ...]) -> None:
    def ones(*sizes: int) -> Any:
        return to_kind(np.ones(sizes, np.float32), "numba")

    keys = group_keys(ones(*shape), rank=3, block_size=8)
    keys.append(ones(*shape))
    out, lse = distr_attention(ones(*shape[:2], 3, 8), keys, ones(*shape[:2], 2 * shape[2], 5), return_lse=True)
    assert tuple(out.shape) == (*shape[:2], 3, 5)
    assert not to_host(out).any()
    assert np.isneginf(to_host(lse)).all()
    assert_same_keys(GroupedKeys.load(saved(keys), kind="numba"), keys)


def test_info_memory_and_text() -> None:
    case = Cache()
    q, k, v, known = case.draw()
    keys = case.group(k, known)
    _, info = distr_attention(case.give(q), keys, case.give(v), return_info=True)
    assert (info.method, info.block_size, info.reason) == ("subspace", 8, "that of the grouped keys")
    assert kind_of(info.ranks) == kind_of(info.score_errors) == "numba"
    assert_same_bits(to_host(info.ranks), np.full((1, 1, 3), 3, np.int32))
    numbers = 3 * (8 * 3 + 4 * 7) + 3 * 7 + 7 * 7  # blocks, the tail, the Gram matrix of known queries
    assert keys.nbytes == 4 * numbers + 3 * (4 + 4)
    assert repr(keys) == "GroupedKeys of shape (1, 1, 27, 7) and dtype float32 on a CUDA device"


@pytest.mark.gpu
def test_keys_are_grouped_on_the_stream_that_is_named() -> None:
    """What comes first and what is appended is written there late; elsewhere poison would be read."""
    import cupy
    from numba import cuda

    case = Cache(D=64, E=64, M=215, L=50, rank=32, H=4, H_kv=2)
    q, k, v, known = case.draw()
    expected = case.group(k, known)
    good = [cupy.asarray(x) for x in (known, k[:, :, :100], k[:, :, 100:])]
    late = [poisoned_like(x) for x in good]
    stream = cupy.cuda.Stream(non_blocking=True)
    given = [cuda.as_cuda_array(x) for x in late]
    write_late(stream, late, good)
    keys = group_keys(given[1], given[0], **case.options, stream=stream)
    keys.append(given[2], stream=stream)
    stream.synchronize()
    assert_same_keys(keys, expected)
    results = (distr_attention(case.give(q), x, case.give(v)) for x in (keys, expected))
    assert_same_bits(*(to_host(x) for x in results))


def test_out_and_lse_are_written() -> None:
    case = Cache()
    q, k, v, known = case.draw()
    keys = case.group(k, known)
    expected = distr_attention(case.give(q), keys, case.give(v), return_lse=True)
    out, lse = (to_kind(np.full(x.shape, np.nan, np.float32), "numba") for x in expected)
    results = distr_attention(case.give(q), keys, case.give(v), out=out, lse=lse, return_lse=True)
    assert results[0] is out
    assert results[1] is lse
    for written, wanted in zip(results, expected, strict=True):
        assert_same_bits(to_host(written), to_host(wanted))
