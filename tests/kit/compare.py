"""How two results are compared: no default tolerance, and nothing passes by being empty, constant or not finite."""

from __future__ import annotations

from typing import Any

import numpy as np

from distrattn_np.arrays import kind_of


def to_host(array: Any) -> np.ndarray:
    """Return ``array`` as a NumPy array: itself, or a copy from the device."""
    match kind_of(array):
        case "cupy":
            return array.get()
        case "numba":
            return array.copy_to_host()
        case _:
            return np.asarray(array)


def assert_agrees(
    actual: Any,
    expected: Any,
    *,
    rtol: float,
    atol: float,
    context: str = "",
    check_kind: bool = True,
    check_dtype: bool = True,
    constant_ok: bool = False,
) -> None:
    """Fail unless ``|actual - expected| <= atol + rtol |expected|`` everywhere.

    Checked in this order: kind of array, shape, dtype, positions of nan, +inf and -inf, every finite element. An
    ``expected`` that is empty, all zero or constant proves little and is refused unless ``constant_ok``.
    """
    where = f"{context}: " if context else ""
    if check_kind:
        assert kind_of(actual) == kind_of(expected), f"{where}kind {kind_of(actual)}, expected {kind_of(expected)}"
    assert tuple(actual.shape) == tuple(expected.shape), f"{where}shape {actual.shape}, expected {expected.shape}"
    if check_dtype:
        assert actual.dtype == expected.dtype, f"{where}dtype {actual.dtype}, expected {expected.dtype}"
    got, want = (to_host(array).astype(np.float64) for array in (actual, expected))
    if not constant_ok:
        assert not is_constant(want), f"{where}expected is empty, all zero or constant: this comparison proves little"
    for name, mask_of in (("nan", np.isnan), ("+inf", np.isposinf), ("-inf", np.isneginf)):
        differ = np.argwhere(mask_of(got) != mask_of(want))
        if len(differ):
            index = tuple(int(i) for i in differ[0])
            text = f"{where}{name} at different places, {len(differ)} of {got.size}; first at {index}"
            raise AssertionError(f"{text}: got {got[index]}, expected {want[index]}")
    finite = np.isfinite(want)
    error = np.abs(np.subtract(got, want, out=np.zeros_like(want), where=finite))
    allowed = atol + rtol * np.abs(np.where(finite, want, 0))
    passing = error <= allowed
    if not passing.all():
        # the worst is the one furthest over its own allowance, not the largest
        excess = np.where(passing, -np.inf, error - allowed)
        index = tuple(int(i) for i in np.unravel_index(np.argmax(excess), excess.shape))
        raise AssertionError(
            f"{where}{100 * passing.mean():.2f} % of {passing.size} elements agree; worst at {index}: "
            f"got {got[index]!r}, expected {want[index]!r}, error {error[index]:.3g} > {allowed[index]:.3g} "
            f"(rtol={rtol:.3g}, atol={atol:.3g})"
        )


def is_constant(array: np.ndarray) -> bool:
    """Whether ``array`` is empty, all zero, or several elements that are all the same."""
    return array.size == 0 or not array.any() or (array.size > 1 and bool((array == array.flat[0]).all()))


def assert_same_bits(actual: Any, expected: Any, *, context: str = "") -> None:
    """Fail unless both are of one kind, shape and dtype and every byte is equal (nan and -0 included)."""
    where = f"{context}: " if context else ""
    for what, of in (("kind", kind_of), ("shape", lambda x: tuple(x.shape)), ("dtype", lambda x: x.dtype)):
        assert of(actual) == of(expected), f"{where}{what} {of(actual)}, expected {of(expected)}"
    got, want = to_host(actual), to_host(expected)
    size = got.dtype.itemsize
    bits = [np.ascontiguousarray(x).view(np.uint8).reshape(-1, size) for x in (got, want)]
    differ = np.flatnonzero((bits[0] != bits[1]).any(axis=1))
    if len(differ):
        index = tuple(int(i) for i in np.unravel_index(differ[0], got.shape))
        text = f"{where}{len(differ)} of {got.size} elements differ in their bits; first at {index}"
        raise AssertionError(f"{text}: got {got[index]!r}, expected {want[index]!r}")


def relative_error(actual: Any, expected: Any) -> float:
    """Return the Frobenius norm of the difference over that of ``expected``."""
    got, want = (to_host(array).astype(np.float64) for array in (actual, expected))
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def assert_no_worse_than_plain(
    actual: Any, plain: Any, truth: np.ndarray, *, atol: float, context: str = "", constant_ok: bool = False
) -> None:
    """Fail unless the largest error of ``actual`` is at most twice that of ``plain``, plus ``atol``.

    ``plain`` is the same quantity from a plain NumPy computation in the same precision; both errors are against
    ``truth``, float64. Elements of ``truth`` that are not finite must be the same in ``actual``.
    """
    assert_agrees(
        actual,
        truth,
        rtol=0,
        atol=np.inf,
        context=context,
        check_kind=False,
        check_dtype=False,
        constant_ok=constant_ok,
    )
    got, usual = (_error(array, truth) for array in (actual, plain))
    if got.max(initial=0) > 2 * usual.max(initial=0) + atol:
        index = tuple(int(i) for i in np.unravel_index(np.argmax(got), got.shape))
        raise AssertionError(
            f"{context}: error {got[index]:.3g} at {index} (got {to_host(actual)[index]!r}, truth {truth[index]!r}) is "
            f"over 2 x {usual.max():.3g}, the error of plain {plain.dtype} NumPy, + {atol:.3g}"
        )


def _error(array: Any, truth: np.ndarray) -> np.ndarray:
    host = to_host(array).astype(np.float64)
    return np.abs(np.subtract(host, truth, out=np.zeros_like(truth), where=np.isfinite(truth)))
