"""Whether every Numba kernel compiles for a real GPU, in the precision it should, within what any GPU offers.

The kernels are compiled by a child process, this file run as a script: Numba's simulator, which the other tests use on
a machine without a GPU, cannot be switched off again. Not checked here: what the kernels compute.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

MAX_SHARED_BYTES = 48 * 1024
ELEMENTS = ("float16", "float32", "float64")
# (D, E, R, blocks over, gains, in a subspace, causal, score options): usual, widest, odd; packed sequences
FORWARDS = {
    "forward-queries-sum": (64, 64, 32, "queries", False, False, True, {}),
    "forward-queries-lstsq": (128, 128, 32, "queries", True, False, False, {}),
    "forward-keys-lstsq-odd": (255, 33, 85, "keys", True, False, True, {}),
    "forward-exact-widest": (256, 256, 256, None, False, False, False, {}),
    "forward-exact-window": (64, 64, 64, None, False, False, True, {"window": True}),
    "forward-exact-options": (64, 64, 64, None, False, False, False, {"softcap": True, "bias": 1, "mask": True}),
    "forward-subspace-keys-widest": (256, 256, 255, "keys", False, True, True, {}),
    "forward-subspace-keys-options": (
        *(64, 64, 32, "keys", False, True, True),
        {"window": True, "softcap": True, "bias": 1, "mask": True},
    ),
    "forward-subspace-queries-odd": (33, 7, 20, "queries", False, True, True, {}),
    "forward-ragged-exact-options": (64, 64, 64, None, False, False, True, {"window": True, "softcap": True}),
    "forward-ragged-keys-lstsq": (128, 128, 32, "keys", True, False, False, {}),
    "forward-ragged-subspace-keys": (128, 128, 64, "keys", False, True, True, {}),
    "forward-ragged-subspace-queries": (128, 128, 64, "queries", False, True, False, {}),
}
RAGGED = (
    "hash_channels-ragged",
    "channel_norms-ragged",
    "fusion_gains-ragged",
    "reduce_rows-ragged",
    "sequence_tables-ragged",
)
# (D, R, whether blocks choose their rank)
MAPS = {"subspace_maps-odd": (33, 20, False), "subspace_maps-widest": (256, 256, True)}
PLAIN = ("hash_channels", "group_channels", "channel_norms", "fusion_gains", "key_mean", "gram", "gram-centred")
COPIES = ("copy_rows", "copy_rows-listed", "pack_rows")
CACHES = (*COPIES, "expected_gram", "rebuild_keys", "rebuild_keys-paged")
KERNELS = (
    *(*PLAIN, *RAGGED, "sequence_tables", "merge_results", "sum_segments", "reduce_rows"),
    *(*CACHES, *MAPS, *FORWARDS),
)
UNSHARED = ("merge_results", "sum_segments", "reduce_rows", "reduce_rows-ragged", *CACHES)
"""Kernels whose threads have nothing to tell one another."""
INTEGER = ("group_channels", "sequence_tables", "sequence_tables-ragged")
ADDING = ("key_mean", "sum_segments")
"""Kernels that add numbers but multiply none."""


ARCHITECTURES = ((8, 0), (9, 0))
BUILDS = [(element, kernel) for element in ELEMENTS for kernel in KERNELS]


def builds(cc: tuple[int, int]) -> list[tuple[str, str]]:
    """Return what is compiled for ``cc``: each build for one of the architectures, in the nightly profile for all."""
    every = os.environ.get("HYPOTHESIS_PROFILE") == "nightly"
    return BUILDS if every else BUILDS[ARCHITECTURES.index(cc) :: len(ARCHITECTURES)]


@cache
def compiled(cc: tuple[int, int]) -> dict[str, str]:
    """Return the PTX of the builds for ``cc``."""
    if importlib.util.find_spec("numba_cuda") is None:
        pytest.skip("numba-cuda is not installed")
    major, minor = cc
    environment = {name: value for name, value in os.environ.items() if name != "NUMBA_ENABLE_CUDASIM"}
    command = [sys.executable, __file__, str(major), str(minor)]
    child = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr
    answer = json.loads(child.stdout)
    if "skip" in answer:
        pytest.skip(answer["skip"])
    return answer  # type: ignore[no-any-return]


@pytest.mark.parametrize(("cc", "element", "kernel"), [(cc, *build) for cc in ARCHITECTURES for build in builds(cc)])
def test_kernel_compiles_in_its_precision(cc: tuple[int, int], element: str, kernel: str) -> None:
    ptx = compiled(cc)[f"{kernel} {element}"]
    assert f".target sm_{cc[0]}{cc[1]}" in ptx
    assert ".local" not in ptx, "an array that should be in registers is in local memory"
    assert not re.search(r"\b(shfl|vote|redux)\.", ptx), "a warp intrinsic, which the simulator does not have"
    shared = [int(size) for size in re.findall(r"\.shared [^;]*\[(\d+)\]", ptx)]
    assert sum(shared) <= MAX_SHARED_BYTES
    assert (sum(shared) > 0) == (kernel not in UNSHARED)
    if kernel in (*INTEGER, *COPIES):
        return  # no sums
    operation = "add" if kernel in ADDING else "fma"
    if element == "float64":
        assert re.search(rf"\b{operation}\.(rn\.)?f64", ptx)
        # libdevice's tanh in float64 takes its power of two from a float32 exponential, which is exact there
        in_float32 = "fma|add|sub|div" if kernel.endswith("options") else "fma|mul|add|sub|div|ex2"
        assert not re.search(rf"\b({in_float32})\.[a-z.]*f32", ptx), "float64 is computed in float32"
    else:
        assert re.search(rf"\b{operation}\.(rn\.)?f32", ptx)
        assert ".f64" not in ptx, "float32 is computed in float64"


def test_tiles_fit_every_width() -> None:
    pytest.importorskip("numba")
    from distrattn_np.numba_kernels.forward import choose_tiles

    for accumulator in (np.float32, np.float64):
        for width in range(1, 257):
            for rank in {width, width // 2 or 1, 1}:
                for value_width in (1, 33, 128, 255, 256):
                    tiles = choose_tiles(width, rank, value_width, accumulator, simulated=False)
                    assert tiles.block_q % tiles.thread_rows == 0
                    assert tiles.block_kv % tiles.thread_columns == 0
                    size = tiles.shared_bytes(width, rank, value_width, np.dtype(accumulator).itemsize)
                    assert size <= MAX_SHARED_BYTES, f"{width=} {rank=} {value_width=} {accumulator=}"


def kernels(types: Any) -> Iterator[tuple[str, Any, tuple[Any, ...]]]:
    """Yield the id, the kernel and the signature of everything that is to be compiled."""
    from distrattn_np.backends.numba_backend import GPU_THREADS
    from distrattn_np.numba_kernels.channel_norms import make_channel_norms
    from distrattn_np.numba_kernels.copy_rows import make_copy_rows
    from distrattn_np.numba_kernels.expected_gram import make_expected_gram
    from distrattn_np.numba_kernels.forward import choose_tiles, make_forward
    from distrattn_np.numba_kernels.fusion_gains import make_fusion_gains
    from distrattn_np.numba_kernels.gram import make_gram
    from distrattn_np.numba_kernels.group_channels import make_group_channels
    from distrattn_np.numba_kernels.hash_channels import make_hash_channels
    from distrattn_np.numba_kernels.key_mean import make_key_mean
    from distrattn_np.numba_kernels.merge_results import make_merge_results
    from distrattn_np.numba_kernels.pack_rows import make_pack_rows
    from distrattn_np.numba_kernels.rebuild_keys import make_rebuild_keys
    from distrattn_np.numba_kernels.reduce_rows import make_reduce_rows
    from distrattn_np.numba_kernels.sequences import make_sequence_tables
    from distrattn_np.numba_kernels.subspace_maps import make_subspace_maps
    from distrattn_np.numba_kernels.sum_segments import make_sum_segments
    from distrattn_np.tiles import ScoreSwitches

    product = GPU_THREADS.product
    integer = types.int64
    words, channels = (types.Array(dtype, 4, "C") for dtype in (types.uint16, types.int32))
    planes, lse = (types.Array(types.float32, axes, "C") for axes in (2, 3))
    ranks, table = types.Array(types.int32, 3, "C"), types.Array(integer, 2, "C")
    edges = types.Array(types.int32, 1, "C")
    for element in ELEMENTS:
        accumulator = np.float64 if element == "float64" else np.float32
        number = getattr(types, np.dtype(accumulator).name)
        X = types.Array(getattr(types, element), 4, "A")  # "A": any strides
        vectors, sums, matrices = (types.Array(number, axes, "C") for axes in (3, 4, 5))
        for suffix, is_ragged in (("", False), ("-ragged", True)):
            blocks = table if is_ragged else types.none
            kernel = make_hash_channels(accumulator, 32, 4, is_ragged)
            yield f"hash_channels{suffix} {element}", kernel, (X, planes, words, blocks, integer)
            kernel = make_channel_norms(accumulator, True, True, is_ragged, 8, 32)
            yield f"channel_norms{suffix} {element}", kernel, (X, sums, blocks, integer, integer, integer)
            kernel = make_fusion_gains(accumulator, 128, 4, is_ragged, 8, 32)
            yield f"fusion_gains{suffix} {element}", kernel, (X, sums, channels, sums, blocks, integer)
            kernel = make_reduce_rows(accumulator, 128, True, is_ragged, product)
            yield f"reduce_rows{suffix} {element}", kernel, (X, vectors, matrices, ranks, sums, blocks, blocks, integer)
            kernel = make_sequence_tables(is_ragged, is_ragged, True, True, GPU_THREADS.group)
            lengths = edges if is_ragged else types.none
            signature: tuple[Any, ...] = (table, table, lengths, lengths, *(integer,) * 7)
            yield f"sequence_tables{suffix} {element}", kernel, signature
        yield f"group_channels {element}", make_group_channels(128), (words, channels)
        yield f"merge_results {element}", make_merge_results(accumulator), (X, lse, X, lse, X, lse)
        yield f"key_mean {element}", make_key_mean(accumulator, False, 8, 32), (X, vectors, table)
        signature = (X, types.none, table, integer, matrices)
        yield f"gram {element}", make_gram(accumulator, False, product), signature
        signature = (X, vectors, table, integer, matrices)
        yield f"gram-centred {element}", make_gram(accumulator, True, product), signature
        yield f"sum_segments {element}", make_sum_segments(True, product.size), (matrices, table)
        signature = (X, types.Array(number, 4, "A"))
        yield f"copy_rows {element}", make_copy_rows(accumulator, False), (*signature, types.none)
        yield f"copy_rows-listed {element}", make_copy_rows(accumulator, True), (*signature, table)
        signature = (X, X, types.Array(types.int32, 2, "A"), edges, edges, edges, integer)
        yield f"pack_rows {element}", make_pack_rows(accumulator, 8, 32), signature
        yield f"expected_gram {element}", make_expected_gram(accumulator), (matrices, sums)
        blocks = types.Array(X.dtype, 5, "A")
        signature = (X, blocks, blocks, X, integer)
        kernel = make_rebuild_keys(accumulator, 64, False, 8, 32)
        yield f"rebuild_keys {element}", kernel, (*signature, *(types.none,) * 3)
        kernel = make_rebuild_keys(accumulator, 64, True, 8, 32)
        signature += (types.Array(types.int32, 2, "A"), edges, edges)
        yield f"rebuild_keys-paged {element}", kernel, signature
        for name, (D, R, chooses) in MAPS.items():
            kernel = make_subspace_maps(accumulator, D, R, chooses, True, product)
            outputs = (matrices, matrices, ranks, vectors)
            signature = (matrices, matrices, table, integer, *outputs, sums, sums, integer, number, number)
            yield f"{name} {element}", kernel, signature
        for name, (D, E, R, by, gains, in_subspace, causal, options) in FORWARDS.items():
            is_ragged = "ragged" in name
            own_block = in_subspace and by == "keys" and causal
            tiles = choose_tiles(D, D if own_block else R, E, accumulator, simulated=False)
            is_grouped = by is not None and not in_subspace
            maps = (channels if is_grouped else types.none, sums if gains else types.none)
            maps += (sums, matrices, ranks, vectors) if in_subspace else (types.none,) * 4
            maps += (table if is_ragged else types.none,)
            tables = (X, types.Array(types.boolean, 4, "A")) if options and not is_ragged else (types.none, types.none)
            signature = (X, X, X, *maps, X, lse, *(integer,) * 4, number, number, *tables)
            kernel = make_forward(
                *(accumulator, D, E, R, by, gains, in_subspace, own_block, causal, is_ragged),
                ScoreSwitches(**options),
                tiles,
            )
            yield f"{name} {element}", kernel, signature


def compile_all(cc: tuple[int, int]) -> dict[str, str]:
    """Compile every kernel for compute capability ``cc``, or say under "skip" why none can be compiled here."""
    from numba import cuda
    from numba.cuda import dispatcher, types

    from distrattn_np.backends import numba_backend  # noqa: F401  (lets numba-cuda meet a newer NumPy)

    # Numba asks the current device what to compile device functions for; there may be none
    dispatcher.get_current_device = lambda: SimpleNamespace(compute_capability=cc)
    try:
        cuda.compile_ptx(lambda: None, (), cc=cc)
    except Exception as error:  # whatever is wrong, an empty kernel is not the cause
        return {"skip": f"Numba cannot compile an empty kernel here: {error}"}
    # kernels that read only sums are the same for float16 and float32
    ptx: dict[Any, str] = {}
    answer = {}
    wanted = {f"{kernel} {element}" for element, kernel in builds(cc)}
    for name, kernel, signature in kernels(types):
        if name not in wanted:
            continue
        if (kernel, signature) not in ptx:
            ptx[kernel, signature] = cuda.compile_ptx(kernel.py_func, signature, cc=cc)[0]
        answer[name] = ptx[kernel, signature]
    return answer


if __name__ == "__main__":
    print(json.dumps(compile_all((int(sys.argv[1]), int(sys.argv[2])))))
