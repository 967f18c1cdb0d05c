"""Tensor maps, through which Hopper's copy engine reads arrays, and the launch sizes of raw_kernels/forward_sm90.cu.

A tensor map is a 128-byte description of an array and of the box that one copy takes from it. The driver encodes it on
the host; a kernel gets it by value.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import numpy as np

ALIGNMENT = 16
"""Bytes that addresses and strides must be multiples of."""

# From cuda.h.
_DATA_TYPES = {"float16": 6, "bfloat16": 9}
_NO_INTERLEAVE = 0
_SWIZZLES = {32: 1, 64: 2, 128: 3}
_L2_PROMOTION_256_BYTES = 3
_ZEROS_OUTSIDE = 0
_MAP_BYTES = 128
_MAP_ALIGNMENT = 64
_MAX_STRIDE = 1 << 40

# From raw_kernels/hopper.cuh and forward_sm90.cu.
_ITEM_BYTES = 2
_WARPGROUP_THREADS = 128
_WARPGROUP_ROWS = 64
_SWIZZLE_ALIGNMENT = 1024
_BARRIER_BYTES = 8


@dataclass(frozen=True, slots=True)
class Box:
    """What one copy takes: ``rows`` of ``columns`` 16-bit elements, swizzled as wide as a row."""

    rows: int
    columns: int


@dataclass(frozen=True, slots=True)
class ForwardLaunch:
    """How forward_sm90 is launched: query rows and threads a block, dynamic shared memory, boxes of the maps."""

    block_q: int
    threads: int
    shared_bytes: int
    q_box: Box
    k_box: Box
    v_box: Box
    z_box: Box | None
    own_box: Box | None


def forward_sm90_launch(
    inner_width: int,
    value_width: int,
    *,
    mapped_width: int | None = None,
    own_block: bool = False,
    ragged: bool = False,
    block_q: int = 128,
    block_kv: int = 128,
    stages: int = 2,
) -> ForwardLaunch:
    """Return the launch of forward_sm90 compiled with R = ``inner_width``, E = ``value_width`` and these tiles.

    ``mapped_width`` is D, the width of the queries that the kernel maps itself (KEY_MAPS); None where it maps none.
    ``own_block``: it scores the keys of a query's own block exactly (OWN_BLOCK). ``ragged``: sequences are packed.
    """
    query_width = inner_width if mapped_width is None else mapped_width
    widest_key = query_width if own_block else inner_width
    elements = block_q * query_width + stages * block_kv * (widest_key + value_width)
    barriers = 3 + 4 * stages  # one of them is a word of the same size
    mean_scores = 0
    if mapped_width is not None:
        elements += inner_width * mapped_width
        barriers += 4
        mean_scores = block_q
    return ForwardLaunch(
        block_q=block_q,
        threads=(1 + block_q // _WARPGROUP_ROWS) * _WARPGROUP_THREADS,
        shared_bytes=_SWIZZLE_ALIGNMENT
        + _ITEM_BYTES * elements
        + 4 * (mean_scores + 6 * ragged)
        + _BARRIER_BYTES * barriers,
        q_box=Box(block_q, panel_columns(query_width)),
        k_box=Box(block_kv, panel_columns(inner_width)),
        v_box=Box(block_kv, panel_columns(value_width)),
        z_box=None if mapped_width is None else Box(inner_width, panel_columns(mapped_width)),
        own_box=Box(block_kv, panel_columns(query_width)) if own_block else None,
    )


def can_be_mapped(address: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether the copy engine can read a 4-D array of 16-bit elements; ``strides`` in bytes, as arrays give them."""
    steps = [stride for size, stride in zip(shape[:3], strides[:3], strict=True) if size > 1]
    return (
        address % ALIGNMENT == 0
        and 0 not in shape
        and (shape[3] == 1 or strides[3] == _ITEM_BYTES)
        and all(0 < step < _MAX_STRIDE and step % ALIGNMENT == 0 for step in steps)
    )


@dataclass(frozen=True, slots=True)
class Encoding:
    """Arguments of cuTensorMapEncodeTiled beside the address; the driver counts axes from the inner one."""

    data_type: int
    rank: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    """Bytes, without the inner axis."""
    box: tuple[int, ...]
    element_strides: tuple[int, ...]
    interleave: int
    swizzle: int
    l2_promotion: int
    fill: int

    @classmethod
    def of(cls, shape: tuple[int, ...], strides: tuple[int, ...], dtype: str, box: Box) -> Encoding:
        """Return how an array that `can_be_mapped` is described; ``strides`` are in bytes."""
        # the driver checks the strides of axes of one element too, which mean nothing
        steps = [stride if size > 1 else ALIGNMENT for size, stride in zip(shape[:3], strides[:3], strict=True)]
        return cls(
            data_type=_DATA_TYPES[dtype],
            rank=4,
            sizes=tuple(shape[::-1]),
            strides=tuple(steps[::-1]),
            box=(box.columns, box.rows, 1, 1),
            element_strides=(1, 1, 1, 1),
            interleave=_NO_INTERLEAVE,
            swizzle=_SWIZZLES[_ITEM_BYTES * box.columns],
            l2_promotion=_L2_PROMOTION_256_BYTES,
            fill=_ZEROS_OUTSIDE,
        )


@lru_cache(maxsize=256)
def encode_tensor_map(
    address: int, shape: tuple[int, int, int, int], strides: tuple[int, int, int, int], dtype: str, box: Box
) -> np.ndarray:
    """Return the tensor map of an array that `can_be_mapped` as a kernel argument: one element of 128 bytes.

    ``dtype`` is "float16" or "bfloat16", ``strides`` are in bytes. Rows and columns outside the array read as zeros.
    """
    storage = ctypes.create_string_buffer(_MAP_BYTES + _MAP_ALIGNMENT)
    encoded = ctypes.addressof(storage) + -ctypes.addressof(storage) % _MAP_ALIGNMENT
    how = Encoding.of(shape, strides, dtype, box)
    error = _encoder()(
        ctypes.c_void_p(encoded),
        ctypes.c_int(how.data_type),
        ctypes.c_uint32(how.rank),
        ctypes.c_void_p(address),
        (ctypes.c_uint64 * 4)(*how.sizes),
        (ctypes.c_uint64 * 3)(*how.strides),
        (ctypes.c_uint32 * 4)(*how.box),
        (ctypes.c_uint32 * 4)(*how.element_strides),
        ctypes.c_int(how.interleave),
        ctypes.c_int(how.swizzle),
        ctypes.c_int(how.l2_promotion),
        ctypes.c_int(how.fill),
    )
    if error:
        raise RuntimeError(
            f"cuTensorMapEncodeTiled: error {error} for {dtype} of shape {shape} with strides {strides} bytes "
            f"at {address:#x}, {box}"
        )
    tensor_map = np.frombuffer(ctypes.string_at(encoded, _MAP_BYTES), dtype=f"V{_MAP_BYTES}").copy()
    tensor_map.flags.writeable = False  # shared by all calls that ask for it
    return tensor_map


def panel_columns(width: int) -> int:
    """Columns of a panel (hopper.cuh, ``Panels``): the widest swizzle that divides the tile."""
    for columns in (64, 32, 16):
        if width % columns == 0:
            return columns
    raise ValueError(f"width: must be a multiple of 16, got {width}")


@cache
def _encoder() -> Any:
    try:
        return ctypes.CDLL("libcuda.so.1").cuTensorMapEncodeTiled
    except (OSError, AttributeError) as error:
        raise RuntimeError(f"tensor maps need an NVIDIA driver for CUDA 12 or later: {error}") from error
