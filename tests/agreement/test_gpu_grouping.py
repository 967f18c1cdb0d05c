"""Do all implementations form the same groups? Bit for bit, on inputs where rounding decides nothing.

Run on a GPU with CuPy. Not checked here: what attention makes of the groups.
"""

from __future__ import annotations

import numpy as np
import pytest
from kit.backends import to_kind
from kit.cases import Case, make_inputs, reference_maps
from kit.compare import assert_agrees, assert_same_bits, to_host
from kit.lists import BLOCKS, FEATURES, FEW, HEADS, WIDTHS, grouping

from distrattn_np import backends, reference
from distrattn_np.problem import block_edges

pytestmark = pytest.mark.gpu

GROUPED = [case for case in (*FEATURES, *BLOCKS, *HEADS, *WIDTHS) if case.G > 1]
RUNS = [
    *(("cupy", case) for case in GROUPED),
    *(("numba", case) for case in FEW if case.G > 1 and case.M),
]


@pytest.mark.parametrize(("name", "case"), RUNS, ids=lambda value: str(value))
def test_groups_are_those_of_the_reference(name: str, case: Case) -> None:
    inputs = make_inputs(case)
    problem = case.native_problem(inputs)
    backend = backends.load_by_name(name)
    own = backend.group_maps(problem, *(to_kind(x, name) for x in (inputs.q, inputs.k)))
    expected = reference_maps(problem, inputs.q, inputs.k)
    assert_same_bits(to_host(own.channels), expected.channels, context=str(case))
    assert (own.gains is None) == (expected.gains is None)
    if expected.gains is not None:
        largest = float(np.abs(expected.gains).max())
        assert_agrees(
            to_host(own.gains), expected.gains, rtol=1e-5, atol=2e-6 * largest, context=str(case), check_dtype=False
        )


HASHED = [
    Case(N=N, D=D, G=grouping(D), dtype=dtype, L=L)
    for N, D, L in ((1, 64, 128), (300, 128, 128), (300, 33, 100), (129, 256, 1024), (5, 7, 1), (3000, 72, 1024))
    for dtype in ("float16", "bfloat16", "float32", "float64")
]


@pytest.mark.parametrize("name", ["cupy", "numba"])
@pytest.mark.parametrize("case", HASHED, ids=str)
def test_words_and_order_are_those_of_the_reference(name: str, case: Case) -> None:
    if name == "numba" and (case.dtype == "bfloat16" or case.D not in (33, 128)):
        pytest.skip("Numba has no bfloat16, and takes seconds to compile a width")
    x = make_inputs(case).q
    backend = backends.load_by_name(name)
    planes = reference.hyperplanes(case.seed, case.L)
    X = to_kind(x, name)
    words = backend.hash_channels(X, to_kind(planes, name), case.L)
    expected = np.empty(words.shape, np.uint16)
    for b, h in np.ndindex(x.shape[:2]):
        for c, (start, stop) in enumerate(block_edges(case.N, case.L)):
            expected[b, h, c] = reference.hash_channels(x[b, h, start:stop].astype(np.float64), planes)
    assert_same_bits(to_host(words), expected, context=str(case))
    order = np.array([reference.group_channels(row) for row in expected.reshape(-1, case.D)]).reshape(expected.shape)
    assert_same_bits(to_host(backend.group_channels(words)), order, context=str(case))


@pytest.mark.parametrize("name", ["cupy", "numba"])
@pytest.mark.parametrize("D", [1, 33, 256])
def test_any_words_are_sorted_stably_by_gray_rank(name: str, D: int) -> None:
    """Words with many ties and with all 16 bits in use, which hashes of random data seldom are."""
    rng = np.random.default_rng(D)
    words = np.stack([rng.integers(0, top, (3, 2, D), dtype=np.uint16) for top in (2, 65535)])
    words[0, 0, 0] = 65535
    expected = np.array([reference.group_channels(row) for row in words.reshape(-1, D)]).reshape(words.shape)
    got = backends.load_by_name(name).group_channels(to_kind(words, name))
    assert_same_bits(to_host(got), expected)
