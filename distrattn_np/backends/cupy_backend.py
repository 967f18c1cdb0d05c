"""CuPy: compiles raw_kernels/ on first use and launches on the current stream of the device that holds the arrays.

The only file that knows RawModule. RawKernel checks neither the number nor the types of its arguments and ignores
strides, so every launch goes through `_launch`, with explicit 4- and 8-byte scalars and strides in elements.
"""

from __future__ import annotations

import math
import re
import threading
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib import resources
from typing import Any, ClassVar

import cupy
import numpy as np

from ..arrays import Kind, kind_of
from ..problem import GroupMaps, Layout, Problem, ceil_div
from ..reference import hyperplanes
from ..tiles import (
    ELEMENTS,
    FUSE,
    NO_MAP,
    SAMPLE,
    SIMT_THREADS,
    SM90_WIDTHS,
    Defines,
    fuse_defines,
    gains_defines,
    hash_defines,
    mma_defines,
    mma_tiles,
    norms_defines,
    pad,
    simt_defines,
    sm90_defines,
    sm90_tiles,
)
from . import Backend, host_copy_back
from .tensor_map import can_be_mapped, encode_tensor_map, forward_sm90_launch

WORKSPACE_BYTES = 256 << 20
"""Most that the fused keys of one launch take; longer calls go through (head, block) pairs in several launches."""

_NO_LIMIT = np.iinfo(np.int32).max


class CupyBackend(Backend):
    """CUDA C++ through CuPy."""

    name: ClassVar[str] = "cupy"
    kinds: ClassVar[frozenset[Kind]] = frozenset({"cupy", "numba", "numpy"})

    def attention(self, problem: Problem, q: Any, k: Any, v: Any, out: Any) -> tuple[Any, Any]:
        """Compute one call on the device that holds ``q`` (the current one for NumPy arrays)."""
        with _device_of(q):
            return super().attention(problem, q, k, v, out)

    # ---- arrays ----

    def bring_in(self, array: Any, layout: Layout) -> Any:
        native = cupy.asarray(array)
        return native.transpose(0, 2, 1, 3) if layout == "bnhd" else native

    def shares_memory(self, array: Any) -> bool:
        return kind_of(array) != "numpy"

    def empty(self, shape: tuple[int, int, int, int], like: Any, layout: Layout) -> Any:
        b, h, n, d = shape
        if layout == "bnhd":
            return cupy.empty((b, n, h, d), like.dtype).transpose(0, 2, 1, 3)
        return cupy.empty(shape, like.dtype)

    def empty_lse(self, shape: tuple[int, int, int], like: Any) -> Any:  # noqa: ARG002  the current device is like's
        return cupy.empty(shape, np.float32)

    def hand_back(self, array: Any, layout: Layout | None, *, like: Any, out: Any) -> Any:
        if kind_of(like) == "numpy":
            return host_copy_back(cupy.asnumpy(array), layout, out)
        if out is not None:
            return out
        result = array.transpose(0, 2, 1, 3) if layout == "bnhd" else array
        if kind_of(like) == "numba":
            from numba import cuda  # only where a Numba array came in

            return cuda.as_cuda_array(result)
        return result

    # ---- maps ----

    def hash_channels(self, x: Any, planes: Any, block_size: int) -> Any:
        """Return the words (B, H, C, D) uint16 of eq. 5 for x (B, H, rows, D) and planes (L, 16) float32."""
        batch, heads, rows, width = x.shape
        words = cupy.empty((batch, heads, ceil_div(rows, block_size), width), np.uint16)
        defines = hash_defines(_element(x), _vector(x))
        _launch(
            "hash_channels",
            defines,
            words.size // width,
            None,
            *(x, planes, words, heads, rows, width, block_size),
            *_strides(x),
        )
        return words

    def group_channels(self, words: Any) -> Any:
        """Return the channels (B, H, C, D) int32 in the order of eq. 7."""
        channels = cupy.empty(words.shape, np.int32)
        _launch("group_channels", {}, words.size // words.shape[3], 256, words, channels, words.shape[3])
        return channels

    def group_maps(self, problem: Problem, Q: Any, K: Any) -> GroupMaps | None:
        grouping = problem.grouping
        if grouping is None or problem.blocks == 0:
            return None
        X, Y = (Q, K) if grouping.by == "queries" else (K, Q)
        block_size = min(grouping.block_size, problem.grouped_rows)
        planes = _planes(grouping.seed, block_size, X.device.id)
        channels = self.group_channels(self.hash_channels(X, planes, block_size))
        if grouping.fusion == "sum":
            return GroupMaps(channels, None)
        norms, direction = self._channel_norms(problem, Y)
        gains = cupy.empty(channels.shape, np.float32)
        rows, width = X.shape[2:]
        _launch(
            "fusion_gains",
            gains_defines(_element(X), grouping.group_size),
            channels.size // width,
            None,
            *(X, norms, channels, gains, rows, width, block_size, X.shape[1], Y.shape[1], norms.shape[2], direction),
            *_strides(X),
        )
        return GroupMaps(channels, gains)

    def _channel_norms(self, problem: Problem, Y: Any) -> tuple[Any, int]:
        """Return squared channel lengths of Y by segments (B, H_y, S, D), and which of them meet block c.

        Without a causal limit one segment, all rows. With one, segment c holds the keys that block c sees and block
        c - 1 does not (+1: block c meets the segments up to c), or the queries that see block c and not block c + 1
        (-1: it meets the segments from c on).
        """
        assert problem.grouping is not None
        batch, heads, rows, width = Y.shape
        offset, step = problem.causal_offset, problem.grouping.block_size
        if offset is None:
            segments, shift, lower, upper, direction = 1, 0, 0, rows, 0
        elif problem.grouping.by == "queries":
            # block c sees up to min((c + 1) L, N) + offset keys
            segments, shift, lower, direction = problem.blocks, offset, 0, 1
            upper = min(max(problem.queries + offset, 0), rows)
        else:
            segments, shift, upper, direction = problem.blocks, -offset, rows, -1
            lower = min(max(-offset, 0), rows)
        norms = cupy.empty((batch, heads, segments, width), np.float64 if Y.dtype == np.float64 else np.float32)
        _launch(
            "channel_norms",
            norms_defines(_element(Y), _vector(Y)),
            segments * heads * batch,
            None,
            *(Y, norms, heads, segments, rows, width, min(step, _NO_LIMIT), shift, lower, upper),
            *_strides(Y),
        )
        return norms, direction

    # ---- attention ----

    def attend(self, problem: Problem, Q: Any, K: Any, V: Any, O: Any, lse: Any, maps: GroupMaps | None) -> None:
        if maps is not None:
            maps = GroupMaps(_contiguous(maps.channels), None if maps.gains is None else _contiguous(maps.gains))
        forward = _Forward(problem, Q, K, V, O, lse, maps)
        if uses_tensor_cores(problem, capability()):
            forward.on_tensor_cores()
        else:
            forward.on_cuda_cores()


def uses_tensor_cores(problem: Problem, compute_capability: int) -> bool:
    """Whether a problem goes to the tensor-core forward: 16-bit elements, sm_80 and up, scores that grow with q k."""
    return problem.dtype.itemsize == 2 and compute_capability >= 80 and problem.scale > 0


def hopper_is_usable() -> bool:
    """Whether the current device runs sm_90a code and NVRTC, from 12.9 on, accepts that target beside CuPy's own."""
    return capability() == 90 and cupy.cuda.nvrtc.getVersion() >= (12, 9)


def capability() -> int:
    """Return the compute capability of the current device: 90 for an H100."""
    return int(cupy.cuda.Device().compute_capability)


@dataclass(frozen=True, slots=True)
class _Forward:
    """One forward on one device: how its arrays reach the kernels."""

    problem: Problem
    Q: Any
    K: Any
    V: Any
    O: Any
    lse: Any
    maps: GroupMaps | None

    @property
    def by(self) -> str | None:
        """The side that is cut into blocks; None for exact attention."""
        return None if self.maps is None or self.problem.grouping is None else self.problem.grouping.by

    @property
    def group_size(self) -> int:
        return 1 if self.by is None or self.problem.grouping is None else self.problem.grouping.group_size

    @property
    def block_size(self) -> int:
        """Rows of a grouping block, never more than there are."""
        assert self.problem.grouping is not None
        return min(self.problem.grouping.block_size, self.problem.grouped_rows)

    @property
    def rank(self) -> int:
        return self.problem.width // self.group_size

    def sizes(self, first_item: int) -> tuple[int, ...]:
        """Return H to causal_offset of the forwards' arguments."""
        problem = self.problem
        by_queries, by_keys = self.by == "queries", self.by == "keys"
        return (
            problem.heads,
            problem.heads_per_kv_head,
            problem.queries,
            problem.keys,
            problem.blocks if by_queries else 1,
            self.block_size if by_queries else problem.queries,
            self.block_size if by_keys else max(problem.keys, 1),
            first_item,
            problem.causal_offset or 0,
        )

    def on_cuda_cores(self) -> None:
        """Launch forward_simt.cu, which applies the maps itself."""
        problem = self.problem
        defines = simt_defines(
            element=_element(self.Q),
            width=problem.width,
            value_width=problem.value_width,
            group_size=self.group_size,
            group_by=self.by,
            with_gains=self.maps is not None and self.maps.gains is not None,
            causal=problem.causal_offset is not None,
        )
        scale = np.float64(problem.scale) if problem.dtype == np.float64 else np.float32(problem.scale)
        sizes = self.sizes(0)
        items = problem.batch * problem.heads * sizes[4]
        _launch(
            "forward_simt",
            defines,
            items * ceil_div(sizes[5], defines["BLOCK_Q"]),
            SIMT_THREADS,
            *(self.Q, self.K, self.V, *self._map_arrays(), self.O, self.lse),
            *sizes,
            scale,
            *self._strides(self.K),
        )

    def on_tensor_cores(self) -> None:
        """Launch forward_sm90.cu or forward_mma.cu; for blocks over queries in turns with the fusion of their keys."""
        heads = self.problem.batch * self.problem.heads
        on_hopper = self._runs_on_hopper()
        if self.by == "queries":
            Q = self._sample(self.Q) if on_hopper else self.Q
            per_item = self.problem.keys * pad(self.rank) * 2
            launch_items = max(1, WORKSPACE_BYTES // max(per_item, 1))
            items = heads * self.problem.blocks
            workspace = cupy.empty((min(items, launch_items), self.problem.keys, pad(self.rank)), self.K.dtype)
            for first in range(0, items, launch_items):
                count = min(launch_items, items - first)
                self._launch_fuse(self.K, workspace, first, count)
                if on_hopper:
                    self._launch_sm90(Q, workspace[None], first, count)
                else:
                    self._launch_mma(workspace, SAMPLE, first, count)
        elif self.by == "keys":
            self._launch_mma(self._sample(self.K), FUSE, 0, heads)
        elif on_hopper:
            self._launch_sm90(self.Q, self.K, 0, heads)
        else:
            self._launch_mma(self.K, NO_MAP, 0, heads)

    def _runs_on_hopper(self) -> bool:
        """Whether forward_sm90.cu takes this problem: what it multiplies must suit wgmma and the copy engine."""
        read_by_copies = (self.V,) if self.by else (self.Q, self.K, self.V)
        return (
            hopper_is_usable()
            and self.by != "keys"
            and self.problem.keys > 0
            and pad(self.rank) in SM90_WIDTHS
            and self.problem.value_width in SM90_WIDTHS
            and (self.by is not None or self.problem.width in SM90_WIDTHS)
            and all(can_be_mapped(x.data.ptr, x.shape, x.strides) for x in read_by_copies)
            and _vector(self.O) == 8
        )

    def _launch_sm90(self, Q: Any, K: Any, first_item: int, items: int) -> None:
        """Launch forward_sm90.cu; K is (B, H_kv, M, R), or (1, items of this launch, M, R) where fused for items."""
        problem = self.problem
        rank, dtype = K.shape[3], problem.dtype.name
        sizes = self.sizes(first_item)
        tiles = sm90_tiles(rank, problem.value_width, sizes[5])
        defines = sm90_defines(
            tiles,
            element=_element(self.Q),
            rank=rank,
            value_width=problem.value_width,
            keys_per_item=self.by == "queries",
            causal=problem.causal_offset is not None,
        )
        launch = forward_sm90_launch(
            rank, problem.value_width, block_q=tiles.block_q, block_kv=tiles.block_kv, stages=tiles.stages
        )
        heads, heads_per_kv_head, N, M, query_blocks, query_block_size, _, first, offset = sizes
        maps = [
            encode_tensor_map(x.data.ptr, x.shape, x.strides, dtype, box)
            for x, box in ((Q, launch.q_box), (K, launch.k_box), (self.V, launch.v_box))
        ]
        _launch(
            "forward_sm90",
            defines,
            items * ceil_div(query_block_size, launch.block_q),
            launch.threads,
            *(*maps, self.O, self.lse, heads, heads_per_kv_head, N, M, query_blocks, query_block_size, first, offset),
            np.float32(problem.scale * math.log2(math.e)),
            *_strides(self.O),
            shared=launch.shared_bytes,
        )

    def _sample(self, X: Any) -> Any:
        """Return X W (B, H_x, rows, R padded), X the side that is cut into blocks."""
        sampled = cupy.empty((*X.shape[:3], pad(self.rank)), X.dtype)
        self._launch_fuse(X, sampled, 0, X.shape[0] * X.shape[1] * self.problem.blocks, sample=True)
        return sampled

    def _launch_fuse(self, Y: Any, out: Any, first_item: int, items: int, *, sample: bool = False) -> None:
        """Launch fuse_channels.cu: Y Z for ``items`` query blocks from the first one on, or X W of all blocks."""
        assert self.maps is not None
        problem = self.problem
        rows, width = Y.shape[2:]
        defines = fuse_defines(
            element=_element(Y),
            group_size=self.group_size,
            rank=self.rank,
            with_gains=self.maps.gains is not None and not sample,
            sample=sample,
            vector=_vector(Y),
        )
        offset = rows if problem.causal_offset is None else problem.causal_offset
        row_tile = 128 // Y.itemsize
        _launch(
            "fuse_channels",
            defines,
            ceil_div(self.block_size if sample else rows, row_tile) * ceil_div(items, defines["ITEMS_PER_BLOCK"]),
            None,
            *(Y, *self._map_arrays(), out),
            *(rows, width, self.rank, problem.grouped_heads, Y.shape[1], problem.blocks, first_item, items),
            *(self.block_size, problem.grouped_rows, offset),
            *_strides(Y),
        )

    def _launch_mma(self, K: Any, query_map: int, first_item: int, items: int) -> None:
        problem = self.problem
        limit = _shared_memory_limit(cupy.cuda.Device().id)
        tiles = mma_tiles(problem.width, self.rank, problem.value_width, query_map, limit)
        user_arrays = (self.Q, self.V, self.O) if self.by else (self.Q, self.K, self.V, self.O)
        defines = mma_defines(
            tiles,
            element=_element(self.Q),
            width=problem.width,
            rank=self.rank,
            value_width=problem.value_width,
            query_map=query_map,
            group_size=self.group_size,
            with_gains=self.maps is not None and self.maps.gains is not None,
            keys_per_item=self.by == "queries",
            causal=problem.causal_offset is not None,
            aligned=all(_vector(x) == 8 for x in user_arrays),
        )
        sizes = self.sizes(first_item)
        _launch(
            "forward_mma",
            defines,
            items * ceil_div(sizes[5], tiles.block_q),
            32 * tiles.num_warps,
            *(self.Q, K, self.V, *self._map_arrays(), self.O, self.lse),
            *sizes,
            np.float32(problem.scale * math.log2(math.e)),
            *self._strides(K if self.by != "queries" else self.K),
            shared=defines["LAUNCH_SHARED_BYTES"],
        )

    def _map_arrays(self) -> tuple[Any, Any]:
        """Return channels and gains as kernel arguments: null pointers where there are none."""
        if self.maps is None:
            return _NULL, _NULL
        return self.maps.channels, _NULL if self.maps.gains is None else self.maps.gains

    def _strides(self, K: Any) -> tuple[np.int64, ...]:
        return (*_strides(self.Q), *_strides(K), *_strides(self.V), *_strides(self.O))


_NULL = np.uint64(0)


@cache
def _shared_memory_limit(device: int) -> int:
    """Return the most bytes of shared memory that a block of the device can ask for."""
    limit: int = cupy.cuda.Device(device).attributes["MaxSharedMemoryPerBlockOptin"]
    return limit


def _device_of(array: Any) -> AbstractContextManager[Any]:
    device: AbstractContextManager[Any] = array.device if kind_of(array) == "cupy" else cupy.cuda.Device()
    return device


def _contiguous(array: Any) -> Any:
    return cupy.ascontiguousarray(cupy.asarray(array))


def _strides(array: Any) -> tuple[np.int64, ...]:
    """Return the strides of the first three axes in elements, as the 64-bit integers that the kernels take."""
    return tuple(np.int64(stride // array.itemsize) for stride in array.strides[:3])


def _vector(array: Any) -> int:
    """Return how many elements one 16-byte load takes, or 1 where pointer, width or a stride is not made of such."""
    steps = [stride for stride, size in zip(array.strides[:3], array.shape[:3], strict=True) if size > 1]
    starts = [array.data.ptr, array.shape[3] * array.itemsize, *steps]
    return 16 // array.itemsize if all(start % 16 == 0 for start in starts) else 1


def _element(array: Any) -> int:
    return ELEMENTS[array.dtype.name]


@lru_cache(maxsize=64)
def _planes(seed: int, block_size: int, device: int) -> Any:
    """Return the hyperplanes on one device; kept, because drawing them takes longer than hashing with them."""
    with cupy.cuda.Device(device):
        return cupy.asarray(hyperplanes(seed, block_size))


# ---- kernels ----


def kernel_source(stem: str) -> str:
    """Return the text of a kernel with our headers spliced in.

    CuPy's cache on disk is keyed by the source text and does not read headers found through -I: with the headers inside
    the text, an edit of one can never meet a stale binary.
    """
    spliced: set[str] = set()

    def splice(name: str) -> str:
        if name in spliced:  # what #pragma once does for files
            return ""
        spliced.add(name)
        text = resources.files("distrattn_np.raw_kernels").joinpath(name).read_text(encoding="utf-8")
        text = text.replace("#pragma once\n", "")
        return re.sub(r'^#include "([\w.]+)".*$', lambda match: splice(match[1]), text, flags=re.MULTILINE)

    return splice(f"{stem}.cu")


_build_lock = threading.Lock()
_kernels: dict[Any, Any] = {}


def _kernel(stem: str, defines: Defines, shared: int) -> Any:
    """Return one kernel that may use ``shared`` bytes, built for the current device on first use."""
    key = (stem, *defines.items(), shared, cupy.cuda.Device().id)
    kernel = _kernels.get(key)
    if kernel is None:
        with _build_lock:  # two threads that build one RawKernel race
            kernel = _kernels.get(key) or _kernels.setdefault(key, _build(stem, defines, shared))
    return kernel


def _build(stem: str, defines: Defines, shared: int) -> Any:
    options = ["--std=c++17", *(f"-D{name}={value}" for name, value in defines.items())]
    if stem.endswith("_sm90"):
        options.append("-arch=sm_90a")  # CuPy adds -arch=sm_90; NVRTC takes the more specific of the two
    kernel = cupy.RawModule(code=kernel_source(stem), options=tuple(options)).get_function(stem)
    if shared > 48 << 10:
        kernel.max_dynamic_shared_size_bytes = shared
    return kernel


def _launch(stem: str, defines: Defines, blocks: int, threads: int | None, *arguments: Any, shared: int = 0) -> None:
    """Launch one kernel; ``threads`` defaults to -DTHREADS. Python integers are passed as 32-bit ones.

    Grids have one axis: the others end at 65535, which batch times heads may pass.
    """
    if blocks == 0:
        return
    typed = tuple(np.int32(x) if isinstance(x, int) else x for x in arguments)
    _kernel(stem, defines, shared)((blocks,), (threads or defines["THREADS"],), typed, shared_mem=shared)


BACKEND = CupyBackend()
