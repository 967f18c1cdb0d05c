"""Does the kit catch what it must? A comparison that cannot fail is worse than none."""

from __future__ import annotations

import numpy as np
import pytest
from kit.backends import Runner, runners, to_kind
from kit.cases import Case, in_memory, make_inputs, plain, reference_maps, truth, unsafe_firsts, unsafe_hashes
from kit.compare import assert_agrees, assert_no_worse_than_plain, assert_same_bits, relative_error, to_host

from distrattn_np import reference

RAMP = np.arange(6, dtype=np.float32).reshape(2, 3)


def changed(value: float, index: tuple[int, int] = (1, 2)) -> np.ndarray:
    array = RAMP.copy()
    array[index] = value
    return array


def test_agreement_within_the_tolerance_passes() -> None:
    assert_agrees(changed(5.5), RAMP, rtol=0, atol=0.5)
    assert_agrees(changed(5.5), RAMP, rtol=0.1, atol=0)


@pytest.mark.parametrize(
    ("actual", "expected", "message"),
    [
        (5.0, RAMP, r"kind None, expected numpy"),
        (RAMP[:1], RAMP, r"shape \(1, 3\), expected \(2, 3\)"),
        (RAMP.astype(np.float64), RAMP, r"dtype float64, expected float32"),
        (changed(np.nan), RAMP, r"nan at different places, 1 of 6; first at \(1, 2\): got nan, expected 5.0"),
        (changed(np.inf), RAMP, r"\+inf at different places, 1 of 6; first at \(1, 2\): got inf, expected 5.0"),
        (RAMP, changed(-np.inf), r"-inf at different places, 1 of 6; first at \(1, 2\): got 5.0, expected -inf"),
        (
            changed(6),
            RAMP,
            r"83.33 % of 6 elements agree; worst at \(1, 2\): got .*6.0.*, expected .*5.0.*, error 1 > 0.1",
        ),
        (np.zeros_like(RAMP), np.zeros_like(RAMP), r"empty, all zero or constant"),
        (np.ones_like(RAMP), np.ones_like(RAMP), r"empty, all zero or constant"),
        (RAMP[:0], RAMP[:0], r"empty, all zero or constant"),
    ],
)
def test_disagreement_is_named(actual: object, expected: np.ndarray, message: str) -> None:
    with pytest.raises(AssertionError, match=rf"^here: .*{message}"):
        assert_agrees(actual, expected, rtol=0, atol=0.1, context="here")


def test_constants_pass_where_they_are_meant() -> None:
    assert_agrees(np.zeros(3), np.zeros(3), rtol=0, atol=0, constant_ok=True)


def test_same_bits_sees_the_sign_of_zero() -> None:
    assert_same_bits(changed(np.nan), changed(np.nan))
    with pytest.raises(AssertionError, match=r"1 of 6 elements differ in their bits; first at \(0, 0\)"):
        assert_same_bits(changed(-0.0, (0, 0)), RAMP)


def test_error_over_twice_the_plain_one_is_refused() -> None:
    exact = RAMP.astype(np.float64)
    assert_no_worse_than_plain(exact + 0.2, exact + 0.1, exact, atol=0.001)
    with pytest.raises(AssertionError, match=r"error 0.3 at \(0, 0\)"):
        assert_no_worse_than_plain(exact + np.eye(2, 3) * 0.3, exact + 0.1, exact, atol=0.001)


@pytest.mark.parametrize("by", ["queries", "keys"])
@pytest.mark.parametrize("fusion", ["sum", "lstsq"])
@pytest.mark.parametrize("causal", [False, True, "top-left"])
def test_plain_computation_is_the_reference_but_for_rounding(by: str, fusion: str, causal: bool | str) -> None:
    case = Case(H=4, N=37, M=29, D=12, E=5, dtype="float32", L=16, by=by, fusion=fusion, causal=causal)
    inputs = make_inputs(case)
    problem = case.native_problem(inputs)
    maps = reference_maps(problem, inputs.q, inputs.k)
    for got, want in zip(plain(problem, *inputs, maps), truth(problem, *inputs, maps), strict=True):
        assert_agrees(got, want, rtol=0, atol=1e-5, check_dtype=False)


def test_plain_computation_in_16_bits_is_visibly_rounded() -> None:
    case = Case(dtype="bfloat16")
    inputs = make_inputs(case)
    problem = case.native_problem(inputs)
    maps = reference_maps(problem, inputs.q, inputs.k)
    error = relative_error(plain(problem, *inputs, maps)[0], truth(problem, *inputs, maps)[0])
    assert 1e-3 < error < 2e-2


def test_channel_within_rounding_of_a_hyperplane_is_found() -> None:
    planes = reference.hyperplanes(0, 8).astype(np.float64)
    X = np.random.default_rng(0).standard_normal((8, 5))
    X[:, 1] = 0
    X[:, 3] -= planes[:, 7] * (X[:, 3] @ planes[:, 7]) / (planes[:, 7] @ planes[:, 7])
    assert unsafe_hashes(X, planes).tolist() == [3]


def test_nearly_tied_first_member_is_found() -> None:
    X = np.array([[1.0, 2.0, 3.0, 1.0, 0.0, 0.0]])
    Y = np.array([[2.0, 1.00001, 1.0, 1.0, 1.0, 1.0]])
    assert unsafe_firsts(X, Y, np.arange(6), 2).tolist() == [1]


@pytest.mark.parametrize("layout", ["bhnd", "bnhd"])
@pytest.mark.parametrize("memory", ["contiguous", "strided", "unaligned"])
@pytest.mark.parametrize("backend", runners(), ids=lambda runner: runner.name)
def test_views_keep_their_strides_on_every_kind(backend: Runner, memory: str, layout: str) -> None:
    case = Case(N=5, M=7, D=6, E=3, dtype="float32", memory=memory, layout=layout)
    array = make_inputs(case).q
    view = in_memory(array, case)
    moved = to_kind(view, backend.kind)
    assert tuple(moved.strides) == view.strides
    restored = to_host(moved)
    assert_agrees(restored.transpose(0, 2, 1, 3) if layout == "bnhd" else restored, array, rtol=0, atol=0)


def test_case_id_names_what_is_not_the_default() -> None:
    assert str(Case(N=1, G=4, causal=True)) == "N=1-M=200-D=64-E=64-G=4-causal=True"
