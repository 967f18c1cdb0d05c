"""What packing sequences of different lengths costs beside dense calls of the same work. Run on a GPU with CuPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from distrattn_np import distr_attention

pytestmark = pytest.mark.gpu

H, D = 16, 128
SEQUENCES = 32
DENSE = 2048
"""Rows of the dense calls: whole tiles."""


def median_ms(arrays: list[Any], **options: Any) -> float:
    import cupy

    out = cupy.empty_like(arrays[0])
    times = []
    for _ in range(25):
        start, stop = cupy.cuda.Event(), cupy.cuda.Event()
        start.record()
        distr_attention(*arrays, out=out, **options)
        stop.record()
        stop.synchronize()
        times.append(cupy.cuda.get_elapsed_time(start, stop))
    return float(np.median(times[5:]))  # the first ones compile and warm up


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("options", [{"group_size": 1}, {"rank": 62}], ids=["exact", "subspace"])
def test_ragged_costs_what_its_pairs_do(causal: bool, options: dict[str, Any]) -> None:
    import cupy

    rng = np.random.default_rng(0)
    lengths = rng.integers(200, 4001, SEQUENCES)
    edges = cupy.asarray(np.cumsum([0, *lengths]).astype(np.int32))
    rows = int(lengths.sum())
    pairs = float((lengths.astype(float) ** 2).sum())
    batch = max(round(pairs / DENSE**2), 1)

    def draw(*shape: int) -> list[Any]:
        return [cupy.random.standard_normal(shape, dtype=np.float32).astype(np.float16) for _ in range(3)]

    dense = median_ms(draw(batch, DENSE, H, D), layout="bnhd", causal=causal, **options)
    ragged = median_ms(draw(rows, H, D), cu_seqlens_q=edges, cu_seqlens_k=edges, causal=causal, **options)
    expected = dense * pairs / (batch * DENSE**2)
    assert ragged <= 1.10 * expected, f"ragged {ragged:.3f} ms, dense {expected:.3f} ms for the same pairs"
