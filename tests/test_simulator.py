"""Whether simulated threads that take turns meet at barriers, show where one is missing, and tell what they raise."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from kit.backends import SIMULATED, Runner
from kit.compare import assert_same_bits

cuda = pytest.importorskip("numba.cuda")
if not SIMULATED:
    pytest.skip("Numba's simulator is off: this machine has a GPU", allow_module_level=True)
simulator = pytest.importorskip("kit.simulator")

THREADS = 4
BLOCKS = 2


def copy_of_neighbour(out: np.ndarray, step: int, has_barrier: bool) -> None:
    slots = cuda.shared.array(THREADS, np.int32)
    thread = cuda.threadIdx.x
    slots[thread] = -1
    cuda.syncthreads()
    slots[thread] = thread
    if has_barrier:
        cuda.syncthreads()
    out[cuda.blockIdx.x, thread] = slots[(thread + step) % THREADS]


def failing(out: np.ndarray, wrong: int) -> None:
    if cuda.threadIdx.x == wrong:
        raise ValueError("wrong")
    cuda.syncthreads()
    out[cuda.blockIdx.x, cuda.threadIdx.x] = 1


def run(kernel: object, *args: object) -> np.ndarray:
    out = np.zeros((BLOCKS, THREADS), np.int32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of small grids
        cuda.jit(kernel)[BLOCKS, THREADS](out, *args)
    return out


@pytest.mark.parametrize("step", [1, THREADS - 1], ids=["next", "previous"])
def test_a_missing_barrier_is_seen(step: int) -> None:
    expected = np.roll(np.arange(THREADS), -step)
    assert (run(copy_of_neighbour, step, True) == expected).all()
    wrong = (run(copy_of_neighbour, step, False) != expected).sum(axis=1)
    assert wrong.max() == THREADS - 1, "all but the one whose neighbour is at the other end"


@pytest.mark.parametrize("wrong", [0, THREADS - 1])
def test_an_error_ends_its_block(wrong: int) -> None:
    with pytest.raises(ValueError, match=r"^wrong$"):
        run(failing, wrong)
    assert (run(failing, -1) == 1).all()


@pytest.mark.parametrize("options", [{"method": "subspace"}, {"method": "lsh", "fusion": "lstsq", "group_by": "keys"}])
def test_turns_change_no_bit(options: dict[str, str]) -> None:
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((3, 1, 2, 20, 8), dtype=np.float32)
    call = Runner("numba-simulator", "numba", "numba").distr
    results = call(q, k, v, block_size=7, causal=True, **options)
    with simulator.as_numba_has_it():
        expected = call(q, k, v, block_size=7, causal=True, **options)
    for result, wanted in zip(results, expected, strict=True):
        assert_same_bits(result, wanted)
