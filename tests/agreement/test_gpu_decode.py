"""Does decode.cu compute exact attention of few queries, however the keys are split? Run on a GPU with CuPy.

16 bits: no worse than twice the error of plain NumPy in the same precision, against float64. Grouped keys have
their own file; not checked here: speed.
"""

from __future__ import annotations

from itertools import cycle
from typing import Any

import numpy as np
import pytest
from kit.agreement import assert_computes, poison, to_bhnd
from kit.backends import to_kind
from kit.cases import Case, in_memory, make_inputs
from kit.compare import assert_agrees, assert_same_bits, to_host
from kit.device import told_of_launches

from distrattn_np import distr_attention, exact_attention
from distrattn_np.problem import ceil_div
from distrattn_np.tiles import decode_splits

pytestmark = pytest.mark.gpu

HEADS = [(1, 1), (2, 1), (4, 1), (8, 1), (8, 2), (4, 4), (6, 2), (12, 3), (32, 1)]
WIDTHS = [(64, 64), (128, 128), (16, 16), (80, 48), (256, 256), (33, 7), (128, 64), (96, 192), (1, 1), (256, 16)]
ROWS = [1, 15, 16, 17, 63, 64, 65, 127, 128, 129, 200, 300]


def few_queries(**common: Any) -> list[Case]:
    """Return a case for every number of keys and of queries, whose other axes take turns."""
    heads, widths = cycle(HEADS), cycle(WIDTHS)
    dtypes, causal, batches = (
        cycle(["float16", "bfloat16", "float16"]),
        cycle([True, False, True, "top-left"]),
        cycle([1, 2]),
    )
    cases = []
    for i, M in enumerate(ROWS):
        for N in (1, 2 + i % 7) if i % 3 else (1, 8):
            H, H_kv = next(heads)
            D, E = next(widths)
            sizes = {"B": next(batches), "H": H, "H_kv": H_kv, "N": N, "M": M, "D": D, "E": E}
            cases.append(Case(**sizes, G=1, dtype=next(dtypes), causal=next(causal), **common))
    return cases


# what launchers meet: memory, layouts, scales of any sign, more rows than a tile, limits that hide all keys
FEATURES = [
    *(
        Case(N=3, M=150, H=4, G=1, causal=True, layout=layout, memory=memory)
        for layout in ("bhnd", "bnhd")
        for memory in ("contiguous", "strided", "unaligned")
    ),
    *(Case(N=2, M=150, G=1, scale=scale) for scale in (-0.3, 1e-3, 2.0)),
    Case(N=8, M=150, H=64, H_kv=2, G=1, causal=True),
    Case(N=8, M=5, G=1, causal=True),
    Case(N=8, M=3, G=1, causal="top-left", dtype="bfloat16"),
]


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Send calls over any number of keys to decode.cu; return the list of what is launched."""
    from distrattn_np.backends import cupy_decode

    monkeypatch.setattr(cupy_decode, "LEAST_KEYS", 0)
    return told_of_launches(monkeypatch)


def split_into(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut the keys of every call into so many splits, some of them empty where there are fewer tiles."""

    def splits(keys: int, block_kv: int, *_: int) -> tuple[int, int]:
        return count, ceil_div(ceil_div(keys, count), block_kv) * block_kv

    monkeypatch.setattr("distrattn_np.backends.cupy_decode.decode_splits", splits)


def assert_decodes(case: Case, launched: list[str], *, splits: bool | None = None) -> None:
    inputs = make_inputs(case)
    given = [to_kind(in_memory(x, case), "cupy") for x in inputs]
    results = []
    for _ in range(2):
        out = to_kind(poison(case), "cupy")
        result, lse = exact_attention(*given, **case.attention_options, out=out, return_lse=True)
        assert result is out
        results.append((to_host(out), to_host(lse)))
    for first, second in zip(*results, strict=True):
        assert_same_bits(second, first, context=f"second call of {case}")
    assert launched
    assert set(launched) <= {"decode", "merge_splits"}
    if splits is not None:
        assert ("merge_splits" in launched) == splits
    assert_computes(case, inputs, None, to_bhnd(case, results[0][0]), results[0][1])


@pytest.mark.parametrize("case", [*few_queries(), *FEATURES], ids=str)
def test_few_queries_are_exact(case: Case, launched: list[str]) -> None:
    assert_decodes(case, launched)


@pytest.mark.parametrize("count", [1, 2, 7, 40])
@pytest.mark.parametrize("case", few_queries(seed=1)[::4] + FEATURES[-3:], ids=str)
def test_any_number_of_splits_gives_the_same(
    case: Case, count: int, launched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    split_into(count, monkeypatch)
    assert_decodes(case, launched, splits=count > 1)


@pytest.mark.parametrize(
    "case",
    [
        Case(B=2, H=8, H_kv=2, N=1, M=20000, D=128, E=128, G=1),
        Case(B=1, H=8, H_kv=1, N=8, M=9999, D=64, E=128, G=1, causal=True, dtype="bfloat16"),
        Case(B=70, H=4, H_kv=4, N=4, M=1025, D=64, E=64, G=1, causal=True),
    ],
    ids=str,
)
def test_long_keys_are_split(case: Case, launched: list[str]) -> None:
    # where thread blocks enough are without splits, the number of multiprocessors decides
    assert_decodes(case, launched, splits=True if case.B < 70 else None)


def test_rounding_does_not_hang_on_which_split_has_the_largest_score(
    launched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scores that grow from split to split, by far more than exponentials bear."""
    split_into(5, monkeypatch)
    case = Case(N=2, M=320, D=64, E=64, G=1, scale=1.0)
    q, k, v = make_inputs(case)
    for growing in (np.linspace(0, 200, 320), np.linspace(200, 0, 320)):
        k[..., 0] = growing
        q[..., 0] = 4
        out, lse = exact_attention(*(to_kind(x, "cupy") for x in (q, k, v)), scale=1.0, return_lse=True)
        assert_computes(case, type(make_inputs(case))(q, k, v), None, to_host(out), to_host(lse))
    assert "merge_splits" in launched


@pytest.mark.parametrize("scale", [0.0, 1e-44, -1e-40])
@pytest.mark.parametrize("count", [1, 3])
def test_a_scale_that_kernels_flush_is_zero(
    scale: float, count: int, launched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    split_into(count, monkeypatch)
    q, k, v = make_inputs(Case(N=2, M=150, G=1))
    out, lse = exact_attention(*(to_kind(x, "cupy") for x in (q, k, v)), scale=scale, causal=True, return_lse=True)
    for n, seen in enumerate((149, 150)):
        expected = v[:, :, :seen].astype(np.float64).mean(axis=2)
        assert_agrees(to_host(out)[:, :, n], expected, rtol=0, atol=2e-4, check_dtype=False)
        assert_agrees(
            to_host(lse)[:, :, n], np.full((1, 2), np.log(seen)), rtol=1e-6, atol=0, check_dtype=False, constant_ok=True
        )
    assert launched


def test_other_calls_go_elsewhere(launched: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def call(case: Case, **options: Any) -> None:
        given = (to_kind(x, "cupy") for x in make_inputs(case))
        distr_attention(*given, **(case.options | options))

    call(Case(N=9, M=64, G=1))
    call(Case(N=8, M=64, G=2))
    call(Case(N=8, M=64, G=1, dtype="float32"))
    for options in ({"window": (5, None)}, {"softcap": 2.0}):
        call(Case(N=8, M=64, G=1), **options)
    for name, table in (("mask", np.ones((8, 64), bool)), ("bias", np.ones(64, np.float32))):
        call(Case(N=8, M=64, G=1), **{name: to_kind(table, "cupy")})
    monkeypatch.setattr("distrattn_np.backends.cupy_decode.LEAST_KEYS", 65)
    call(Case(N=8, M=64, G=1))
    assert not launched
    monkeypatch.setattr("distrattn_np.backends.cupy_decode.LEAST_KEYS", 64)
    call(Case(N=8, M=64, G=1))
    assert launched
    assert decode_splits(64, 64, 1, 264) == (1, 64)
