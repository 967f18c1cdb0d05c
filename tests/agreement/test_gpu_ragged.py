"""Is a packed sequence on the GPU what it is alone, whatever lies beside it, without the host waiting? Needs a GPU."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from kit.agreement import assert_computes
from kit.backends import to_kind
from kit.cases import Case, Inputs
from kit.compare import assert_same_bits, relative_error, to_host
from kit.strategies import SPACING

from distrattn_np import distr_attention, exact_attention, workspace_size

pytestmark = pytest.mark.gpu

QUERIES = (0, 1, 63, 64, 65, 127, 129, 300, 0, 193)
"""Beside the edges of tiles; with the keys, each side is longer, shorter and empty in some sequence."""
KEYS = (5, 64, 0, 129, 65, 300, 127, 300, 0, 63)
H, H_KV = 4, 2

# (dtype, D, E, options): on an H100 the first ones run on forward_sm90.cu, gram_sm90.cu and reduce_rows.cu
CALLS: dict[str, tuple[str, int, int, dict[str, Any]]] = {
    "exact": ("float16", 128, 128, {"group_size": 1}),
    "exact-causal": ("bfloat16", 64, 64, {"group_size": 1, "causal": True}),
    "exact-top-left": ("float16", 64, 128, {"group_size": 1, "causal": "top-left"}),
    "subspace": ("float16", 128, 128, {"block_size": 128}),
    "subspace-causal": ("float16", 128, 128, {"block_size": 128, "causal": True}),
    "subspace-reference": ("bfloat16", 64, 64, {"block_size": 128, "rank": 30, "causal": "top-left"}),
    "subspace-queries": ("float16", 64, 64, {"block_size": 100, "group_by": "queries", "causal": True}),
    "subspace-tolerance": ("float16", 64, 64, {"block_size": 128, "score_tol": 0.3}),
    "lsh": ("float16", 128, 128, {"method": "lsh", "block_size": 128}),
    # tensor cores from sm_80 on
    "exact-window": ("float16", 128, 128, {"group_size": 1, "window": (40, 3), "softcap": 5.0}),
    "exact-odd": ("bfloat16", 40, 24, {"group_size": 1, "causal": True, "window": (70, None)}),
    "lsh-keys": ("float16", 64, 64, {"method": "lsh", "block_size": 48, "group_by": "keys", "fusion": "lstsq"}),
    "subspace-short": ("float16", 64, 64, {"block_size": 48, "causal": True}),
    "subspace-cap": ("bfloat16", 64, 64, {"block_size": 48, "softcap": 5.0, "causal": "top-left"}),
    "subspace-queries-cap": ("float16", 64, 64, {"block_size": 64, "group_by": "queries", "softcap": 5.0}),
    # CUDA cores
    "exact-float32": ("float32", 40, 40, {"group_size": 1, "causal": True, "window": (40, None)}),
    "lsh-float32": ("float32", 64, 64, {"method": "lsh", "block_size": 64, "fusion": "lstsq", "causal": True}),
    "subspace-float32": ("float32", 64, 64, {"block_size": 64, "causal": True}),
    "subspace-queries-float64": ("float64", 40, 40, {"block_size": 64, "rank": 9, "group_by": "queries"}),
}
IS_EXACT = [name for name, call in CALLS.items() if call[3].get("group_size") == 1]


def edges_of(lengths: tuple[int, ...], dtype: Any = np.int32) -> np.ndarray:
    return np.cumsum([0, *lengths]).astype(dtype)


def make_call(name: str, queries: tuple[int, ...] = QUERIES, keys: tuple[int, ...] = KEYS) -> tuple[Inputs, dict]:
    """Return packed q, k and v on the host, and the options with the edges."""
    dtype, D, E, options = CALLS[name]
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes")  # gives NumPy the name
    rng = np.random.default_rng([0, len(queries), D])
    shapes = ((sum(queries), H, D), (sum(keys), H_KV, D), (sum(keys), H_KV, E))
    inputs = Inputs(*(rng.standard_normal(shape, dtype=np.float32).astype(dtype) for shape in shapes))
    edges = {"cu_seqlens_q": edges_of(queries), "cu_seqlens_k": edges_of(keys)}
    return inputs, {"method": "subspace"} | options | edges


def attend(inputs: Inputs, options: dict[str, Any], **lent: Any) -> tuple[Any, Any]:
    """Return (out, lse) on the device."""
    on_device = {name: to_kind(x, "cupy") if isinstance(x, np.ndarray) else x for name, x in options.items()}
    out, lse = distr_attention(*(to_kind(x, "cupy") for x in inputs), **on_device, return_lse=True, **lent)
    return out, lse


def sequences(options: dict[str, Any]) -> list[tuple[slice, slice]]:
    """Return the queries and the keys of every sequence that has queries."""
    sides = (pairwise(options[name].tolist()) for name in ("cu_seqlens_q", "cu_seqlens_k"))
    pairs = [(slice(*n), slice(*m)) for n, m in zip(*sides, strict=True)]
    return [(rows, keys) for rows, keys in pairs if rows.stop > rows.start]


def tolerance(name: str) -> float:
    """Return a relative error that two orders of summation may make in a result; maps weigh it more."""
    dtype = CALLS[name][0]
    return (4 if name in IS_EXACT else 16) * max(SPACING[dtype], SPACING["float32"] if dtype == "float32" else 1e-7)


@pytest.mark.parametrize("name", CALLS)
def test_a_sequence_is_what_it_is_alone(name: str) -> None:
    inputs, options = make_call(name)
    out, lse = (to_host(x) for x in attend(inputs, options))
    alone_options = {x: value for x, value in options.items() if not x.startswith("cu_seqlens")} | {"layout": "bnhd"}
    for rows, keys in sequences(options):
        one = Inputs(inputs.q[None, rows], inputs.k[None, keys], inputs.v[None, keys])
        alone, lse_alone = (to_host(x)[0] for x in attend(one, alone_options))
        if keys.start == keys.stop:
            assert not out[rows].any()
            assert np.isneginf(lse[:, rows]).all()
            continue
        assert relative_error(out[rows], alone) <= tolerance(name), (rows, keys)
        seen = np.isfinite(lse_alone)
        np.testing.assert_array_equal(np.isfinite(lse[:, rows]), seen)
        assert np.abs(lse[:, rows][seen] - lse_alone[seen]).max(initial=0) <= 10 * tolerance(name), (rows, keys)


@pytest.mark.parametrize("name", IS_EXACT)
def test_exact_attention_is_the_definition(name: str) -> None:
    dtype, D, E, named = CALLS[name]
    inputs, options = make_call(name)
    out, lse = (to_host(x) for x in attend(inputs, options))
    plain = {x: value for x, value in named.items() if x != "group_size"}
    for rows, keys in sequences(options):
        N, M = rows.stop - rows.start, keys.stop - keys.start
        if M == 0:
            continue
        case = Case(B=1, H=H, H_kv=H_KV, N=N, M=M, D=D, E=E, dtype=dtype, G=1, layout="bnhd", **plain)
        one = Inputs(*(x[None, own].swapaxes(1, 2) for x, own in zip(inputs, (rows, keys, keys), strict=True)))
        assert_computes(case, one, None, out[None, rows].swapaxes(1, 2), lse[None, :, rows])


@pytest.mark.parametrize("name", CALLS)
def test_nan_stays_in_its_sequence(name: str) -> None:
    """What is not a number in q, k and v of one sequence changes no bit of the others."""
    inputs, options = make_call(name)
    expected, expected_lse = (to_host(x) for x in attend(inputs, options))
    for b in (1, 4, 7):
        edges = options["cu_seqlens_q"], options["cu_seqlens_k"]
        bad = Inputs(*(x.copy() for x in inputs))
        for x, side in zip(bad, (0, 1, 1), strict=True):
            x[edges[side][b] : edges[side][b + 1]] = np.nan
        out, lse = (to_host(x) for x in attend(bad, options))
        kept = np.ones(len(inputs.q), bool)
        kept[edges[0][b] : edges[0][b + 1]] = False
        assert_same_bits(out[kept], expected[kept], context=f"beside sequence {b}")
        assert_same_bits(lse[:, kept], expected_lse[:, kept], context=f"lse beside sequence {b}")
        assert np.isnan(out[~kept].astype(np.float32)).any()


@pytest.mark.parametrize("name", CALLS)
def test_a_captured_call_follows_lengths_that_change(name: str) -> None:
    """Capture ends in an error where the host waits for the device, and a graph knows no length but the device's."""
    import cupy

    inputs, options = make_call(name)
    attend(inputs, options)  # builds the kernels
    given = [to_kind(x, "cupy") for x in inputs]
    edges = {x: to_kind(options[x], "cupy") for x in ("cu_seqlens_q", "cu_seqlens_k")}
    out = cupy.empty((*given[0].shape[:2], given[2].shape[2]), given[0].dtype)
    lse = cupy.empty(given[0].shape[1::-1], np.float32)
    lent = options | edges | {"out": out, "lse": lse}
    workspace = cupy.empty(workspace_size(*given, **lent), np.uint8)
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        stream.begin_capture()
        distr_attention(*given, **lent, workspace=workspace)
        graph = stream.end_capture()
    for order in (range(len(QUERIES)), reversed(range(len(QUERIES)))):
        chosen = list(order)
        new = options | {
            "cu_seqlens_q": edges_of(tuple(QUERIES[b] for b in chosen)),
            "cu_seqlens_k": edges_of(tuple(KEYS[b] for b in chosen)),
        }
        with stream:
            for x, array in edges.items():
                array.set(new[x])
            graph.launch()
        stream.synchronize()
        expected, expected_lse = attend(inputs, new)
        assert_same_bits(out, expected, context=str(chosen))
        assert_same_bits(lse, expected_lse, context=f"lse of {chosen}")


@pytest.mark.parametrize("name", ["exact", "subspace-causal", "subspace-queries", "lsh-float32"])
def test_numpy_and_numba_arrays_give_the_same(name: str) -> None:
    inputs, options = make_call(name)
    expected, expected_lse = attend(inputs, options)
    kinds = ["numpy", "numba"] if CALLS[name][0] != "bfloat16" else ["numpy"]
    for kind in kinds:
        given = [to_kind(x, kind) for x in inputs]
        edges = {x: to_kind(options[x].astype(np.int64), kind) for x in ("cu_seqlens_q", "cu_seqlens_k")}
        out, lse = distr_attention(*given, **options | edges, return_lse=True, backend="cupy")
        assert_same_bits(to_host(out), to_host(expected), context=kind)
        assert_same_bits(to_host(lse), to_host(expected_lse), context=kind)


def test_many_short_sequences() -> None:
    """More than one chunk of cut_sequences.cu, most of them empty."""
    rng = np.random.default_rng(0)
    lengths = tuple(rng.integers(0, 4, 1500).tolist())
    inputs, options = make_call("exact", lengths, lengths[::-1])
    out, _ = (to_host(x) for x in attend(inputs, options))
    on_host = {x: options[x] for x in ("cu_seqlens_q", "cu_seqlens_k")}
    expected = exact_attention(*(x.astype(np.float64) for x in inputs), **on_host)
    assert relative_error(out, expected) <= tolerance("exact")


def test_edges_of_any_content_stay_inside_the_arrays() -> None:
    """They are not checked on a device. What comes out is anything, but the device lives on."""
    import cupy

    inputs, options = make_call("subspace-causal")
    bad = np.array([-(2**31), 2**31 - 1, 5, 70000, -3, 900, 0, 2, 10**9, 7, 10**6], np.int32)
    attend(inputs, options | {"cu_seqlens_q": bad, "cu_seqlens_k": bad[::-1].copy()})
    cupy.cuda.runtime.deviceSynchronize()
    out, _ = attend(inputs, options)
    assert np.isfinite(to_host(out)).all()
