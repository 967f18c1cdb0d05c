"""Whether packed sequences on the Numba backend are calls of their own on a GPU, whose host never waits for lengths.

Not checked here: which rows belong to whom in odd cases, which tests/properties and Numba's simulator look at.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from kit.backends import options_to_kind, to_kind
from kit.compare import assert_agrees, assert_same_bits, to_host

from distrattn_np import distr_attention
from distrattn_np.arrays import kind_of

pytestmark = pytest.mark.gpu

# tiles have up to 64 rows: tails of one row, whole tiles, no rows on either side
LENGTHS = ((65, 130), (0, 40), (64, 64), (1, 200), (100, 0), (129, 65))
METHODS: dict[str, dict[str, Any]] = {
    "exact": {"group_size": 1, "window": (70, None), "softcap": 5.0},
    "lsh": {"method": "lsh", "fusion": "lstsq", "group_by": "queries", "block_size": 50},
    "subspace-keys": {"rank": 16, "group_by": "keys", "block_size": 64},
    "subspace-queries": {"score_tol": 0.2, "group_by": "queries", "block_size": 64},
}
EDGES = [np.cumsum([0, *side], dtype=np.int32) for side in zip(*LENGTHS, strict=True)]


def inputs(dtype: str) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = ((EDGES[0][-1], 4, 32), (EDGES[1][-1], 2, 32), (EDGES[1][-1], 2, 32))
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


def packed(how: dict[str, Any], kind: Any) -> dict[str, Any]:
    """Return the options of a call with arrays of this kind."""
    lengths = {"cu_seqlens_q": EDGES[0], "cu_seqlens_k": EDGES[1]}
    return options_to_kind(how | lengths | {"causal": True, "return_lse": True}, kind)


@pytest.mark.parametrize("dtype", ["float16", "float64"])
@pytest.mark.parametrize("how", METHODS.values(), ids=METHODS)
def test_sequences_agree_with_the_reference(how: dict[str, Any], dtype: str) -> None:
    given = inputs(dtype)
    expected = distr_attention(*(x.astype(np.float64) for x in given), **packed(how, "numpy"))
    results = distr_attention(*(to_kind(x, "numba") for x in given), **packed(how, "numba"))
    assert all(kind_of(x) == "numba" for x in results)
    # of values of about 1: the rounding of the result, and of maps made in float32
    atol = 4e-3 if dtype == "float16" else 1e-6
    for result, wanted in zip(results, expected, strict=True):
        assert_agrees(to_host(result), wanted, rtol=1e-3 * atol, atol=atol, check_dtype=False)


@pytest.mark.parametrize("kind", ["numpy", "cupy"])
@pytest.mark.parametrize("how", METHODS.values(), ids=METHODS)
def test_other_kinds_of_array_give_the_same(how: dict[str, Any], kind: Any) -> None:
    given = inputs("float32")
    expected = distr_attention(*(to_kind(x, "numba") for x in given), **packed(how, "numba"))
    out = np.full((EDGES[0][-1], 4, 32), np.nan, np.float32)
    out = out if kind == "numpy" else to_kind(out, kind)
    results = distr_attention(*(to_kind(x, kind) for x in given), **packed(how, kind), backend="numba", out=out)
    assert results[0] is out
    for result, wanted in zip(results, expected, strict=True):
        assert kind_of(result) == kind
        assert_same_bits(to_host(result), to_host(wanted))


@pytest.mark.parametrize("how", METHODS.values(), ids=METHODS)
def test_host_does_not_wait_for_lengths(how: dict[str, Any]) -> None:
    """They are written late, after the call has returned: one that read them would have found no row of anyone's."""
    import cupy

    given = [to_kind(x, "cupy") for x in inputs("float32")]
    options = packed(how, "cupy")
    expected = distr_attention(*given, **options, backend="numba")
    good = {name: options[name] for name in ("cu_seqlens_q", "cu_seqlens_k")}
    late = {name: cupy.zeros_like(x) for name, x in good.items()}
    busy = cupy.ones((4096, 4096), cupy.float32)
    cupy.cuda.Device().synchronize()
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        for _ in range(40):  # some 100 ms of work before the lengths arrive
            busy = busy @ busy * cupy.float32(1e-4)
        for name, x in late.items():
            x[...] = good[name]
        results = distr_attention(*given, **options | late, backend="numba")
        is_waiting = not stream.done
        hosts = [x.get(stream=stream) for x in results]
    stream.synchronize()
    for host, wanted in zip(hosts, expected, strict=True):
        assert_same_bits(host, to_host(wanted))
    assert is_waiting, "the call came back after the work before it was done"
