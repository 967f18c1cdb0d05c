"""Whether windows and masks cost what they leave. Run on a GPU with CuPy; times are of the same portable kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from distrattn_np import exact_attention

pytestmark = pytest.mark.gpu

N, D = 16384, 128


@pytest.fixture
def median_ms(monkeypatch: pytest.MonkeyPatch) -> Callable[..., float]:
    """Return a function that times `exact_attention` of float16 arrays with some options."""
    import cupy

    monkeypatch.setattr("distrattn_np.backends.cupy_backend.hopper_is_usable", lambda: False)
    rng = np.random.default_rng(0)
    q, k, v = (cupy.asarray(rng.standard_normal((1, 16, N, D), dtype=np.float32).astype(np.float16)) for _ in range(3))
    out = cupy.empty_like(q)

    def measure(**options: Any) -> float:
        times = []
        for _ in range(9):
            start, stop = cupy.cuda.Event(), cupy.cuda.Event()
            start.record()
            exact_attention(q, k, v, out=out, **options)
            stop.record()
            stop.synchronize()
            times.append(cupy.cuda.get_elapsed_time(start, stop))
        return float(np.median(times[2:]))  # the first ones compile and warm up

    return measure


@pytest.mark.parametrize("window", [(1023, 0), (512, 511)])
def test_a_window_costs_its_width(median_ms: Callable[..., float], window: tuple[int, int]) -> None:
    full, windowed = median_ms(), median_ms(window=window)
    assert windowed <= 0.2 * full, f"window {window}: {windowed:.3f} ms, all keys: {full:.3f} ms"


def test_hidden_tiles_of_a_mask_are_cheap(median_ms: Callable[..., float]) -> None:
    """Looking at a tile's mask takes time too, so this is no sixteenth."""
    import cupy

    document = cupy.arange(N) // 1024
    all_shown = median_ms(mask=cupy.ones((N, N), bool))
    documents = median_ms(mask=document[:, None] == document)
    assert documents <= 0.5 * all_shown, f"16 documents: {documents:.3f} ms, one: {all_shown:.3f} ms"
