"""Do calls keep to the device of their arrays where a process has several? Needs two GPUs."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from kit.backends import count_cuda_devices, to_kind
from kit.compare import assert_same_bits, to_host
from kit.pages import in_pages

from distrattn_np import distr_attention, exact_attention, group_keys, group_pages, merge, workspace_size
from distrattn_np.arrays import kind_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(count_cuda_devices() < 2, reason="one CUDA device")]


@contextmanager
def current(index: int) -> Iterator[None]:
    """Make a device current, for CuPy and Numba."""
    import cupy
    from numba import cuda

    with ExitStack() as stack:
        stack.enter_context(cupy.cuda.Device(index))
        stack.enter_context(cuda.gpus[index])
        yield


def device_of(array: Any) -> int:
    return int(array.device.id if kind_of(array) == "cupy" else array.gpu_data.context.device.id)


def inputs(rows: int = 150, keys: int = 170) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = ((2, 4, rows, 64), (2, 2, keys, 64), (2, 2, keys, 64))
    return [rng.standard_normal(shape, dtype=np.float32).astype(np.float16) for shape in shapes]


def dense(rows: int = 150, keys: int = 170, **options: Any) -> Callable[[Any], Callable[[], Any]]:
    def call(give: Any) -> Callable[[], Any]:
        q, k, v = map(give, inputs(rows, keys))
        return lambda: distr_attention(q, k, v, **options, return_lse=True)

    return call


def packed(give: Any) -> Callable[[], Any]:
    q, k, v = (give(x[0].swapaxes(0, 1).copy()) for x in inputs())
    edges_q, edges_k = give(np.array([0, 70, 70, 150], np.int32)), give(np.array([0, 90, 100, 170], np.int32))
    edges = {"cu_seqlens_q": edges_q, "cu_seqlens_k": edges_k}
    return lambda: distr_attention(q, k, v, group_size=2, **edges)


def paged(give: Any) -> Callable[[], Any]:
    q, k, v = inputs(3, 192)
    pages = in_pages(k, v, [180, 40], 16, order=np.random.default_rng(0))
    q, k, v, table, lengths = map(give, (q, pages.k, pages.v, pages.tables["page_table"], pages.tables["seqlens_k"]))
    return lambda: exact_attention(q, k, v, page_table=table, seqlens_k=lengths)


def grouped(give: Any) -> Callable[[], Any]:
    q, k, v = inputs(2, 300)
    first, second, q, v = map(give, (k[:, :, :200].copy(), k[:, :, 200:].copy(), q, v))

    def grow() -> Any:
        keys = group_keys(first, q, rank=16, block_size=64)
        keys.append(second)
        return distr_attention(q, keys, v)

    return grow


def grouped_pages(give: Any) -> Callable[[], Any]:
    q, k, v = inputs(2, 300)
    pages = in_pages(np.zeros_like(v[:, :, :64]), np.zeros_like(v[:, :, :64]), [64, 64], 16)
    table, lengths = pages.tables["page_table"], pages.tables["seqlens_k"]
    k, q, v = map(give, (k[:, :, :50].copy(), q, np.resize(v, pages.v.shape)))
    tables = {"page_table": give(table), "seqlens_k": give(np.full_like(lengths, 50))}

    def grow() -> Any:
        keys = group_pages(k[:1], q[:1], pages=len(v), tails=2, block_size=16, rank=16)
        keys.append(k, table, np.zeros_like(lengths))
        return distr_attention(q, keys, v, **tables)

    return grow


def halves(give: Any) -> Callable[[], Any]:
    q, k, v = inputs()
    q, *parts = map(give, (q, *(x[:, :, rows].copy() for rows in (slice(0, 90), slice(90, None)) for x in (k, v))))

    def both() -> Any:
        near, far = (exact_attention(q, *parts[i : i + 2], return_lse=True) for i in (0, 2))
        return merge(*near, *far)

    return both


CALLS: dict[str, Callable[[Any], Callable[[], Any]]] = {
    "exact": dense(group_size=1, causal=True),
    "lsh": dense(method="lsh"),
    "lsh-keys": dense(method="lsh", group_by="keys", fusion="lstsq"),
    "subspace": dense(rank=16, causal=True),
    "subspace-tolerance": dense(score_tol=0.3, group_by="queries"),
    "few-queries": dense(rows=2, keys=2000, group_size=1),
    "packed": packed,
    "paged": paged,
    "grouped": grouped,
    "grouped-pages": grouped_pages,
    "merge": halves,
}
KINDS = [(kind, name) for kind in ("cupy", "numba") for name in CALLS]


def results_of(call: Callable[[], Any]) -> tuple[Any, ...]:
    found = call()
    return found if isinstance(found, tuple) else (found,)


@pytest.mark.parametrize(("kind", "name"), KINDS)
def test_work_goes_to_the_device_of_the_arrays(kind: Any, name: str) -> None:
    """Whatever is current, also when the devices take turns."""
    import cupy

    calls: list[Callable[[], Any]] = []
    for index in (0, 1):
        with current(index):
            calls.append(CALLS[name](lambda x: to_kind(x, kind)))
    expected = [to_host(x) for x in results_of(calls[0])]
    for index in (1, 0, 1):
        found = results_of(calls[index])
        assert cupy.cuda.Device().id == 0
        for x, wanted in zip(found, expected, strict=True):
            assert device_of(x) == index
            assert_same_bits(to_host(x), wanted)


def test_threads_have_a_device_each() -> None:
    """Eight at once, four a device, whose first calls build the kernels there."""
    make = dense(rank=8, block_size=64)
    expected = to_host(results_of(make(lambda x: to_kind(x, "cupy")))[0])

    def work(number: int) -> tuple[int, np.ndarray]:
        with current(number % 2):
            call = make(lambda x: to_kind(x, "cupy"))
            for _ in range(5):
                out = results_of(call)[0]
            return device_of(out), to_host(out)

    with ThreadPoolExecutor(8) as pool:
        for number, (device, out) in enumerate(pool.map(work, range(8))):
            assert device == number % 2
            assert_same_bits(out, expected)


@pytest.mark.parametrize("kind", ["cupy", "numba"])
def test_a_process_that_used_both_ends_well(kind: str) -> None:
    """The code of kernels is unloaded once."""
    arrays = "cuda.to_device(x)" if kind == "numba" else "cupy.asarray(x)"
    script = f"""
import cupy, numpy as np
from numba import cuda
from distrattn_np import exact_attention
x = np.ones((1, 1, 40, 16), np.float16)
for index in (0, 1):
    with cupy.cuda.Device(index), cuda.gpus[index]:
        q = {arrays}
        exact_attention(q, q, q)
        cuda.synchronize()
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr


def test_a_stream_of_the_device_that_is_not_current() -> None:
    import cupy

    make = CALLS["grouped"]
    expected = [to_host(x) for x in results_of(make(lambda x: to_kind(x, "cupy")))]
    with current(1):
        q, k, v = (to_kind(x, "cupy") for x in inputs(2, 300))
        stream = cupy.cuda.Stream(non_blocking=True)
        cupy.cuda.Device().synchronize()
    keys = group_keys(k[:, :, :200], q, rank=16, block_size=64, stream=stream)
    keys.append(k[:, :, 200:], stream=stream)
    out = distr_attention(q, keys, v, stream=stream)
    stream.synchronize()
    assert_same_bits(to_host(out), expected[0])


def test_a_workspace_on_each_device() -> None:
    import cupy

    options = {"rank": 16, "causal": True}
    expected = distr_attention(*(to_kind(x, "cupy") for x in inputs()), **options)
    with current(1):
        there = [to_kind(x, "cupy") for x in inputs()]
        memory = cupy.empty(workspace_size(*there, **options), np.uint8)
        out = cupy.empty(expected.shape, expected.dtype)
    distr_attention(*there, **options, out=out, workspace=memory)
    assert_same_bits(to_host(out), to_host(expected))


@pytest.mark.parametrize("name", ["k", "workspace", "out"])
def test_arrays_on_two_devices_are_named(name: str) -> None:
    import cupy

    q, k, v = (to_kind(x, "cupy") for x in inputs())
    arrays = {"q": q, "k": k, "v": v, "out": cupy.empty_like(q), "workspace": cupy.empty(1 << 20, np.uint8)}
    with current(1):
        arrays[name] = arrays[name].copy()
    with pytest.raises(ValueError, match=rf"^{name}: must be on q's device 0, got cupy array .* on device 1$"):
        distr_attention(**arrays)
