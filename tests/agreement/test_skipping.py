"""Do the GPU kernels leave out the tiles of keys that a window or a mask hides? On a GPU, and in Numba's simulator.

Values that are NaN spoil every row that is multiplied by them, weight zero or not: so they tell what is left out.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from kit.backends import Runner, runners
from kit.compare import assert_agrees

# one tile of queries; keys in tiles of at most 64, which begin at multiples of 64
N, M, D = 16, 448, 8
DOCUMENT = np.zeros((N, M), bool)
DOCUMENT[:, 192:256] = True
HIDDEN: dict[str, tuple[dict[str, Any], slice]] = {
    "window": ({"window": (3, 2)}, slice(384, M)),
    "window, causal": ({"window": (70, None), "causal": True}, slice(320, M)),
    "window, top-left": ({"window": (3, 2), "causal": "top-left"}, slice(0, 64)),
    "mask": ({"mask": DOCUMENT}, slice(192, 256)),
    "mask of keys": ({"mask": DOCUMENT[0]}, slice(192, 256)),
    "mask and window": ({"mask": np.ones((N, 1), bool), "window": (3, 2)}, slice(384, M)),
}
WAYS: list[dict[str, Any]] = [
    {"group_size": 1},
    *({"method": "lsh", "group_size": 2, "group_by": by, "block_size": 64} for by in ("queries", "keys")),
    *({"method": "subspace", "group_size": 2, "group_by": by, "block_size": 64} for by in ("queries", "keys")),
]


@pytest.mark.parametrize("backend", [runner for runner in runners() if runner.name != "numpy"], ids=lambda x: x.name)
@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("name", HIDDEN)
def test_hidden_tiles_are_left_out(name: str, way: dict[str, Any], backend: Runner) -> None:
    options, shown = HIDDEN[name]
    for dtype in ("float16", "float32"):
        rng = np.random.default_rng(0)
        q, k, v = (rng.standard_normal((1, 1, rows, D)).astype(dtype) for rows in (N, M, M))
        expected = backend.distr(q, k, v, **way, **options)
        poisoned = np.full_like(v, np.nan)
        poisoned[:, :, shown] = v[:, :, shown]
        for one, other in zip(backend.distr(q, k, poisoned, **way, **options), expected, strict=True):
            assert_agrees(one, other, rtol=0, atol=0, context=dtype)
