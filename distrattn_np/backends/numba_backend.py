"""Numba CUDA: launches the kernels of `distrattn_np.numba_kernels`, on a GPU or in Numba's simulator.

A native array is a Numba device array that carries its stream. One made from a CuPy array shares its memory and runs on
CuPy's current stream; whatever is allocated beside such an array comes from CuPy too.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, NamedTuple

import numba
import numpy as np
from numba import cuda
from numba.cuda.cudadrv import devicearray

from ..arrays import describe, kind_of
from ..numba_kernels.channel_norms import make_channel_norms
from ..numba_kernels.forward import choose_tiles, make_forward
from ..numba_kernels.fusion_gains import make_fusion_gains
from ..numba_kernels.group_channels import make_group_channels
from ..numba_kernels.hash_channels import make_hash_channels
from ..numba_kernels.merge_results import make_merge_results
from ..problem import Grouping, GroupMaps, Layout, Problem, ceil_div
from ..reference import hyperplanes
from . import Backend, Maps, host_copy_back

SIMULATED = bool(numba.config.ENABLE_CUDASIM)
"""Whether kernels run in Numba's simulator, where a CUDA thread is an operating-system thread: few threads then."""

SIMULATOR_SWITCH_SECONDS = 1e-4

if not SIMULATED and not hasattr(np, "row_stack"):
    # numba-cuda up to 0.30 asks for this name of vstack when it is first used; NumPy 2.5 no longer has it
    vars(np)["row_stack"] = np.vstack
    from numba.cuda import cudaimpl  # noqa: F401

    del vars(np)["row_stack"]


class Threads(NamedTuple):
    """Threads of the blocks of the grouping kernels; `choose_tiles` knows those of the forward kernel."""

    hash_channels: int
    hash_bits: int
    group: int
    reduction_rows: int
    reduction_columns: int


GPU_THREADS = Threads(hash_channels=32, hash_bits=4, group=256, reduction_rows=8, reduction_columns=32)
SIMULATOR_THREADS = Threads(hash_channels=8, hash_bits=2, group=8, reduction_rows=2, reduction_columns=8)
THREADS = SIMULATOR_THREADS if SIMULATED else GPU_THREADS


class NumbaBackend(Backend):
    """float16, float32 and float64; sums are float32, float64 for float64."""

    name = "numba"
    kinds = frozenset(("numba", "numpy", "cupy"))

    def attention(
        self, problem: Problem, q: Any, k: Any, v: Any, out: Any, mask: Any = None, bias: Any = None
    ) -> tuple[Any, Any, Maps]:
        """Compute one checked call on the device of its arrays."""
        if problem.dtype not in (np.float16, np.float32, np.float64):
            rule = "the numba backend takes float16, float32 and float64"
            raise NotImplementedError(f"q: {rule}, got {describe(q)}")
        with _on_device_of(q):
            return super().attention(problem, q, k, v, out, mask, bias)

    def group_maps(self, problem: Problem, Q: Any, K: Any) -> GroupMaps | None:
        """Return the maps of every block as native arrays; gains have the type of the sums."""
        grouping = problem.grouping
        if not isinstance(grouping, Grouping):  # `builds_subspace` is false
            return None
        K = K.bind(Q.stream)  # arrays may be bound to different streams; every launch of a call goes to that of Q
        X = K if grouping.by == "keys" else Q
        # a draw of fewer rows is the start of a draw of more
        planes = hyperplanes(grouping.seed, min(grouping.block_size, problem.grouped_rows))
        channels = self.group_channels(self.hash_channels(X, planes, grouping.block_size))
        if grouping.fusion == "sum":
            return GroupMaps(channels, None)
        norms = self.channel_norms(problem, Q, K)
        return GroupMaps(channels, self.fusion_gains(X, channels, norms, grouping.group_size, grouping.block_size))

    def hash_channels(self, X: Any, planes: np.ndarray, block_size: int) -> Any:
        """Return one word per channel and block, (B, H, C, D) uint16 (eq. 5)."""
        batch, heads, rows, width = X.shape
        words = _empty((batch, heads, ceil_div(rows, block_size), width), np.uint16, X)
        kernel = make_hash_channels(_accumulator(X.dtype), THREADS.hash_channels, THREADS.hash_bits)
        grid = batch * heads * words.shape[2] * ceil_div(width, THREADS.hash_channels)
        _launch(kernel, grid, (THREADS.hash_bits, THREADS.hash_channels), X, _copy_in(planes, X), words, block_size)
        return words

    def group_channels(self, words: Any) -> Any:
        """Return the channels of every block in the order of their Gray ranks, (B, H, C, D) int32 (eq. 6 and 7)."""
        batch, heads, blocks, width = words.shape
        channels = _empty(tuple(words.shape), np.int32, words)
        _launch(make_group_channels(width), batch * heads * blocks, THREADS.group, words, channels)
        return channels

    def channel_norms(self, problem: Problem, Q: Any, K: Any) -> Any:
        """Return the squared channel lengths of the rows that meet each block, (B, H_x, C, D) (eq. 9)."""
        grouping = problem.grouping
        assert grouping is not None
        Y = Q if grouping.by == "keys" else K
        accumulator = _accumulator(problem.dtype)
        norms = _empty((problem.batch, problem.grouped_heads, problem.blocks, problem.width), accumulator, Y)
        causal = problem.causal_offset is not None
        kernel = make_channel_norms(
            accumulator, grouping.by == "keys", causal, THREADS.reduction_rows, THREADS.reduction_columns
        )
        grid = (
            problem.batch * problem.grouped_heads * problem.blocks * ceil_div(problem.width, THREADS.reduction_columns)
        )
        numbers = (grouping.block_size, problem.grouped_rows, problem.causal_offset or 0)
        _launch(kernel, grid, (THREADS.reduction_columns, THREADS.reduction_rows), Y, norms, *numbers)
        return norms

    def fusion_gains(self, X: Any, channels: Any, norms: Any, group_size: int, block_size: int) -> Any:
        """Put the sampled member of each group first in ``channels`` and return the gains, (B, H_x, C, D) (eq. 9)."""
        batch, heads, blocks, width = channels.shape
        accumulator = _accumulator(X.dtype)
        gains = _empty((batch, heads, blocks, width), accumulator, X)
        kernel = make_fusion_gains(accumulator, width, group_size, THREADS.reduction_rows, THREADS.reduction_columns)
        threads = (THREADS.reduction_columns, THREADS.reduction_rows)
        _launch(kernel, batch * heads * blocks, threads, X, norms, channels, gains, block_size)
        return gains

    def attend(
        self,
        problem: Problem,
        Q: Any,
        K: Any,
        V: Any,
        O: Any,
        lse: Any,
        maps: GroupMaps | None,
        mask: Any = None,  # noqa: ARG002
        bias: Any = None,  # noqa: ARG002
    ) -> None:
        """Write attention into O and its log-sum-exp into lse."""
        grouping = problem.grouping
        accumulator = _accumulator(problem.dtype)
        tiles = choose_tiles(problem.width, problem.rank, problem.value_width, accumulator, SIMULATED)
        kernel = make_forward(
            accumulator,
            problem.width,
            problem.value_width,
            problem.width // problem.rank,
            None if grouping is None else grouping.by,
            maps is not None and maps.gains is not None,
            problem.causal_offset is not None,
            tiles,
        )
        query_block, key_block = problem.queries, max(problem.keys, 1)
        if grouping is not None and grouping.by == "queries":
            query_block = min(grouping.block_size, query_block)
        elif grouping is not None:
            key_block = min(grouping.block_size, key_block)
        query_tiles = ceil_div(problem.queries, query_block) * ceil_div(query_block, tiles.block_q)
        _launch(
            kernel,
            problem.batch * problem.heads * query_tiles,
            (tiles.thread_columns, tiles.thread_rows),
            Q,
            K,
            V,
            # Numba passes no None to a GPU: any array does where the kernel reads none
            lse if maps is None else maps.channels,
            lse if maps is None or maps.gains is None else maps.gains,
            O,
            lse,
            query_block,
            key_block,
            problem.causal_offset or 0,
            accumulator(problem.scale),
        )

    def merge_results(self, out_a: Any, lse_a: Any, out_b: Any, lse_b: Any, layout: Layout) -> tuple[Any, Any]:
        """Merge two results over disjoint keys and their lse, Numba arrays in ``layout`` (eq. 25)."""
        with _on_device_of(out_a):
            O_a, O_b = (self.bring_in(x, layout) for x in (out_a, out_b))
            O, lse = self.empty(tuple(O_a.shape), O_a, layout), self.empty_lse(tuple(O_a.shape[:3]), O_a)
            kernel = make_merge_results(_accumulator(O.dtype))
            _launch(kernel, ceil_div(math.prod(O.shape), THREADS.group), THREADS.group, O_a, lse_a, O_b, lse_b, O, lse)
            return self.hand_back(O, layout, like=out_a, out=None), lse

    def bring_in(self, array: Any, layout: Layout) -> Any:
        """Return ``array`` as a native view; a NumPy array as a device copy."""
        kind = kind_of(array)
        if kind == "numba":
            return _swap_rows_and_heads(array) if layout == "bnhd" else array
        view = array.transpose(0, 2, 1, 3) if layout == "bnhd" else array
        return _from_cupy(view) if kind == "cupy" else cuda.to_device(np.ascontiguousarray(view))

    def shares_memory(self, array: Any) -> bool:
        """Whether ``array`` is on the device already."""
        return kind_of(array) != "numpy"

    def empty(self, shape: tuple[int, int, int, int], like: Any, layout: Layout) -> Any:
        """Return a new native array of ``like``'s dtype, stream and allocator whose memory is ordered as ``layout``."""
        if layout == "bhnd":
            return _empty(shape, like.dtype, like)
        b, h, n, d = shape
        return _swap_rows_and_heads(_empty((b, n, h, d), like.dtype, like))

    def empty_lse(self, shape: tuple[int, int, int], like: Any) -> Any:
        """Return a new float32 native array."""
        return _empty(shape, np.float32, like)

    def hand_back(self, array: Any, layout: Layout | None, *, like: Any, out: Any) -> Any:
        """Return a native array as the caller's kind and layout; NumPy arrays are copied from the device."""
        if kind_of(like) == "numpy":
            return host_copy_back(array.copy_to_host(), layout, out)
        if out is not None:
            return out
        result = _swap_rows_and_heads(array) if layout == "bnhd" else array
        return _to_cupy(result) if kind_of(like) == "cupy" else result


def _accumulator(dtype: Any) -> Any:
    return np.float64 if dtype == np.float64 else np.float32


def _launch(kernel: Any, blocks: int, threads: int | tuple[int, int], first: Any, *others: Any) -> None:
    """Run ``kernel(first, *others)`` on the stream of ``first``."""
    if blocks == 0:
        return
    with warnings.catch_warnings(), _simulator_repaired():
        # Numba warns of small grids, which are the caller's to choose; the simulator, being NumPy, of the infinities
        # and NaNs that a GPU computes with in silence
        warnings.simplefilter("ignore")
        kernel[blocks, threads, first.stream](first, *others)


class _SharedArrays:
    """Shared memory of one simulated launch, in the place of the simulator's own.

    That one looks an array up and then stores it, so two threads that arrive together can get one each. Here the two
    are one step. An array is known by the line that asks for it, as there.
    """

    def __init__(self, _dynamic_bytes: int) -> None:
        self._arrays: dict[tuple[Any, int], np.ndarray] = {}

    def array(self, shape: int | tuple[int, ...], dtype: Any) -> np.ndarray:
        caller = sys._getframe(1)
        return self._arrays.setdefault((caller.f_code, caller.f_lineno), np.empty(shape, dtype))


@contextmanager
def _simulator_repaired() -> Iterator[None]:
    """Give the simulator safe shared memory, and let Python change threads sooner.

    It waits for its threads in a busy loop, which makes them six times slower at the interval that Python starts with.
    """
    if not SIMULATED:
        yield
        return
    from numba.cuda.simulator import kernelapi

    shared, interval = kernelapi.FakeCUDAShared, sys.getswitchinterval()
    kernelapi.FakeCUDAShared = _SharedArrays
    sys.setswitchinterval(SIMULATOR_SWITCH_SECONDS)
    try:
        yield
    finally:
        kernelapi.FakeCUDAShared = shared
        sys.setswitchinterval(interval)


def _on_device_of(array: Any) -> AbstractContextManager[Any]:
    stack = ExitStack()
    if kind_of(array) == "cupy":
        stack.enter_context(array.device)
        stack.enter_context(cuda.gpus[array.device.id])
    elif kind_of(array) == "numba" and not SIMULATED:
        stack.enter_context(cuda.gpus[array.gpu_data.context.device.id])
    return stack


def _swap_rows_and_heads(array: Any) -> Any:
    """Return a view of a native (B, N, H, D) array as (B, H, N, D), or back."""
    order = (0, 2, 1, 3)
    if SIMULATED:
        return array.transpose(order)
    # Numba transposes matrices only
    return devicearray.DeviceNDArray(
        shape=tuple(array.shape[axis] for axis in order),
        strides=tuple(array.strides[axis] for axis in order),
        dtype=array.dtype,
        stream=array.stream,
        gpu_data=array.gpu_data,
    )


def _empty(shape: tuple[int, ...], dtype: Any, like: Any) -> Any:
    if _owned_by_cupy(like):
        import cupy

        with _cupy_stream(like):
            return _from_cupy(cupy.empty(shape, dtype))
    return cuda.device_array(shape, dtype).bind(like.stream)


def _copy_in(host: np.ndarray, like: Any) -> Any:
    if _owned_by_cupy(like):
        import cupy

        with _cupy_stream(like):
            return _from_cupy(cupy.asarray(host))
    return cuda.to_device(host, stream=like.stream)


class _StreamHandle(NamedTuple):
    """A stream as CuPy takes one from another library."""

    handle: int

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.handle


def _cupy_stream(array: Any) -> Any:
    import cupy

    return cupy.cuda.Stream.from_external(_StreamHandle(int(array.stream)))


def _from_cupy(array: Any) -> Any:
    """Return a native view that keeps ``array`` alive and runs on CuPy's current stream."""
    import cupy

    pointer = cupy.cuda.get_current_stream().ptr
    return cuda.as_cuda_array(array, sync=False).bind(cuda.external_stream(pointer) if pointer else 0)


def _to_cupy(array: Any) -> Any:
    """Return a CuPy view of a native array."""
    import cupy

    if array.size == 0:
        return cupy.empty(array.shape, array.dtype)
    owner = array.gpu_data.owner
    return cupy.ndarray(array.shape, array.dtype, owner.data, array.strides)


def _owned_by_cupy(array: Any) -> bool:
    return not SIMULATED and kind_of(array.gpu_data.owner) == "cupy"


BACKEND = NumbaBackend()
