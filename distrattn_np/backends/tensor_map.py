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
    block_q: int = 128,
    block_kv: int = 128,
    stages: int = 2,
) -> ForwardLaunch:
    """Return the launch of forward_sm90 compiled with R = ``inner_width``, E = ``value_width`` and these tiles.

    ``mapped_width`` is D, the width of the queries that the kernel maps itself (KEY_MAPS); None where it maps none.
    ``own_block``: it scores the keys of a query's own block exactly (OWN_BLOCK).
    """
    query_width = inner_width if mapped_width is None else mapped_width
    widest_key = query_width if own_block else inner_width
    elements = block_q * query_width + stages * block_kv * (widest_key + value_width)
    barriers = 1 + 4 * stages
    mean_scores = 0
    if mapped_width is not None:
        elements += inner_width * mapped_width
        barriers += 3
        mean_scores = block_q
    return ForwardLaunch(
        block_q=block_q,
        threads=(1 + block_q // _WARPGROUP_ROWS) * _WARPGROUP_THREADS,
        shared_bytes=_SWIZZLE_ALIGNMENT + _ITEM_BYTES * elements + 4 * mean_scores + _BARRIER_BYTES * barriers,
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


@lru_cache(maxsize=256)
def encode_tensor_map(
    address: int, shape: tuple[int, int, int, int], strides: tuple[int, int, int, int], dtype: str, box: Box
) -> np.ndarray:
    """Return the tensor map of an array that `can_be_mapped` as a kernel argument: one element of 128 bytes.

    ``dtype`` is "float16" or "bfloat16", ``strides`` are in bytes. Rows and columns outside the array read as zeros.
    """
    storage = ctypes.create_string_buffer(_MAP_BYTES + _MAP_ALIGNMENT)
    encoded = ctypes.addressof(storage) + -ctypes.addressof(storage) % _MAP_ALIGNMENT
    # The driver counts axes from the inner one. It checks the strides of axes of one element too, which mean nothing.
    sizes = (ctypes.c_uint64 * 4)(*shape[::-1])
    steps = [stride if size > 1 else ALIGNMENT for size, stride in zip(shape[:3], strides[:3], strict=True)]
    error = _encoder()(
        ctypes.c_void_p(encoded),
        ctypes.c_int(_DATA_TYPES[dtype]),
        ctypes.c_uint32(4),
        ctypes.c_void_p(address),
        sizes,
        (ctypes.c_uint64 * 3)(*steps[::-1]),
        (ctypes.c_uint32 * 4)(box.columns, box.rows, 1, 1),
        (ctypes.c_uint32 * 4)(1, 1, 1, 1),
        ctypes.c_int(_NO_INTERLEAVE),
        ctypes.c_int(_SWIZZLES[_ITEM_BYTES * box.columns]),
        ctypes.c_int(_L2_PROMOTION_256_BYTES),
        ctypes.c_int(_ZEROS_OUTSIDE),
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
