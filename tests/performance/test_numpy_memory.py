"""Whether the NumPy backend's own memory stays under 64 MB for any lengths and heads, all threads together.

The maps of the subspace method come on top: 2 R / L of the size of the side that is cut into blocks, in float32.

Own memory is what NumPy allocates during the call, as tracemalloc sees it in all threads, less what the call returns.
OpenBLAS's packing buffers (about 1 MB a core, kept for the life of the process) are not NumPy's and not counted.
"""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from distrattn_np import distr_attention, exact_attention
from distrattn_np.backends import numpy_backend

LIMIT = 64 << 20


def own_bytes(call: Callable[..., Any], *arrays: np.ndarray, **options: Any) -> int:
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        results = call(*arrays, return_lse=True, **options)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert all(np.isfinite(result).all() for result in results)
    return peak - before - sum(result.nbytes for result in results)


def random(*shape: int, dtype: str = "float32") -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape, dtype=np.float32).astype(dtype)


@pytest.fixture(params=[2, 64], ids=["2 cores", "64 cores"])
def cores(request: pytest.FixtureRequest) -> Iterator[int]:
    """As many threads as a machine with so many cores would start."""
    get_threads, set_threads = numpy_backend._openblas_functions()
    if get_threads is None or set_threads is None:
        pytest.skip("this NumPy does not use OpenBLAS")
    before = get_threads()
    set_threads(request.param)
    yield request.param
    set_threads(before)


def test_the_measure_sees_all_threads(cores: int) -> None:
    def touch(task: int) -> None:  # noqa: ARG001
        barrier.wait()
        held.append(np.ones(1 << 20))
        barrier.wait()

    barrier = numpy_backend.threading.Barrier(cores)
    held: list[np.ndarray] = []

    def call(**options: bool) -> tuple[np.ndarray, ...]:  # noqa: ARG001
        numpy_backend._run_tasks(touch, (cores,), memory=1, work=numpy_backend.THREADED_WORK)
        held.clear()
        return ()

    assert own_bytes(call) >= cores * 8 << 20


GROUPINGS = [
    {"method": "lsh", "group_by": by, "fusion": fusion} for by in ("queries", "keys") for fusion in ("sum", "lstsq")
]
SUBSPACES = [{"method": "subspace", "group_by": by, "block_size": 1024} for by in ("queries", "keys")]


@pytest.mark.usefixtures("cores")
@pytest.mark.parametrize("options", GROUPINGS + SUBSPACES, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_200_000_keys(dtype: str, options: dict[str, Any]) -> None:
    q, k, v = random(1, 2, 8, 64, dtype=dtype), *random(2, 1, 2, 200_000, 64, dtype=dtype)
    assert k.nbytes > LIMIT / 3, "a copy of the keys would not be noticed"
    # the maps W and Z of every block of 1024 keys, (D, D / 2) each, are the only part that grows
    maps = 2 * (200_000 / 1024 + 1) * 2 * 64 * 32 * 4 if options["method"] == "subspace" else 0
    assert own_bytes(distr_attention, q, k, v, causal=True, **options) < LIMIT / 3 + maps


@pytest.mark.usefixtures("cores")
@pytest.mark.parametrize("layout", ["bhnd", "bnhd"])
def test_exact_attention_to_200_000_keys(layout: str) -> None:
    q, k, v = random(1, 2, 8, 64), *random(2, 1, 2, 200_000, 64)
    if layout == "bnhd":
        q, k, v = (x.reshape(1, -1, 2, 64) for x in (q, k, v))
    assert own_bytes(exact_attention, q, k, v, layout=layout) < LIMIT / 3


@pytest.mark.usefixtures("cores")
@pytest.mark.parametrize("options", GROUPINGS + SUBSPACES, ids=str)
def test_200_000_queries(options: dict[str, Any]) -> None:
    q, k, v = random(1, 1, 200_000, 128), *random(2, 1, 1, 64, 128)
    assert q.nbytes > LIMIT, "a copy of the queries would not be noticed"
    assert own_bytes(distr_attention, q, k, v, **options) < LIMIT


@pytest.mark.usefixtures("cores")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_widest_tiles(dtype: str) -> None:
    q, k, v = random(3, 2, 12, 1024, 256, dtype=dtype)
    assert LIMIT < 24 * 1024**2 * 4, "a score table of every head would not be noticed"
    for options in GROUPINGS + SUBSPACES:
        assert own_bytes(distr_attention, q, k, v, causal=True, **options) < LIMIT


@pytest.mark.usefixtures("cores")
@pytest.mark.parametrize("options", [{"method": "lsh"}, {"method": "subspace", "block_size": 1024}], ids=str)
def test_mask_and_bias_are_not_expanded(options: dict[str, Any]) -> None:
    q, k, v = random(1, 2, 8192, 32), *random(2, 1, 1, 8192, 32)
    assert LIMIT <= 8192 * 8192, "a table of bools for one head would not be noticed"
    mask, bias = np.arange(8192) % 3 > 0, random(2, 1, 8192)
    options = options | {"mask": mask, "bias": bias, "window": (3000, 200), "softcap": 4.0}
    assert own_bytes(distr_attention, q, k, v, **options) < LIMIT


@pytest.mark.usefixtures("cores")
def test_whole_tables_are_read_in_place() -> None:
    q, k, v = random(1, 2, 4096, 16, dtype="float16"), *random(2, 1, 2, 4096, 16, dtype="float16")
    bias = random(2, 4096, 4096, dtype="float16").transpose(0, 2, 1)
    assert bias.nbytes >= LIMIT, "a copy of the bias would not be noticed"
    assert own_bytes(exact_attention, q, k, v, bias=bias, mask=bias > -2) < LIMIT
