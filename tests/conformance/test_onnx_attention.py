"""Whether the node tests of the ONNX operator Attention pass, through the exact call and the approximate one.

The approximate path is run too where it must be exact: with every channel of q and k twice and groups of two.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kit.compare import assert_agrees
from kit.strategies import SPACING

from distrattn_np import distr_attention, exact_attention

from .onnx_attention import run_node

onnx = pytest.importorskip("onnx")


@cache
def all_cases() -> dict[str, Any]:
    """Return the node tests of onnx's own backend suite, by name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its reference computes on NaN on purpose
        from onnx.backend.test.case.node import collect_testcases

        return {case.name: case for case in collect_testcases("Attention")}


def is_decomposed(case: Any) -> bool:
    """Whether the model is the operator's body in other operators: the same data without an Attention node."""
    return [node.op_type for node in case.model.graph.node] != ["Attention"]


def opset(case: Any) -> int:
    return next(entry.version for entry in case.model.opset_import if entry.domain in ("", "ai.onnx"))


def run_cases() -> list[str]:
    return [name for name, case in all_cases().items() if not is_decomposed(case)]


def on_twin_channels(q: np.ndarray, k: np.ndarray, v: np.ndarray, *, scale: float | None, **options: Any) -> Any:
    """Attend with q and k of twice the width, every channel beside its copy, and half the scale."""
    scale = (1 / np.sqrt(q.shape[-1]) if scale is None else scale) / 2
    q, k = (np.repeat(x, 2, axis=-1) for x in (q, k))
    return distr_attention(q, k, v, scale=scale, group_size=2, **options)


CALLS = {
    "exact": exact_attention,
    "lsh-G=1": partial(distr_attention, method="lsh", group_size=1),
    "subspace-G=1": partial(distr_attention, method="subspace", group_size=1),
    "lsh-queries-twins": partial(on_twin_channels, method="lsh", group_by="queries", block_size=3),
    "lsh-keys-twins": partial(on_twin_channels, method="lsh", group_by="keys", fusion="lstsq", block_size=4),
    "subspace-twins": partial(on_twin_channels, method="subspace", block_size=4),
}


ON_GPU = {f"{name}-cupy": partial(call, backend="cupy") for name, call in CALLS.items()} | {
    "exact-numba": partial(exact_attention, backend="numba")
}


@pytest.mark.parametrize(
    "call",
    [
        *(pytest.param(call, id=name) for name, call in CALLS.items()),
        *(pytest.param(call, id=name, marks=pytest.mark.gpu) for name, call in ON_GPU.items()),
    ],
)
@pytest.mark.parametrize("name", run_cases())
def test_node(name: str, call: Any) -> None:
    case = all_cases()[name]
    (node,) = case.model.graph.node
    attributes = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
    outputs = [output for output in node.output if output]
    ((given, expected),) = case.data_sets
    inputs = dict(zip((name for name in node.input if name), given, strict=True))
    if call is ON_GPU["exact-numba"] and inputs["Q"].dtype.name == "bfloat16":
        pytest.skip("Numba has no bfloat16")
    results = run_node(call, inputs, attributes, outputs)
    for output, want in zip(outputs, expected, strict=True):
        # onnx's reference rounds q, k, every score and every weight to 16 bits; the call rounds the result alone
        rtol = max(case.rtol, 4 * SPACING[want.dtype.name])
        assert_agrees(results[output], want, rtol=rtol, atol=max(case.atol, 1e-6), context=output, constant_ok=True)


def test_numbers_run_and_excluded() -> None:
    """A case that onnx renames or drops, or that this file loses, is noticed; so is a table that was not updated."""
    run = [all_cases()[name] for name in run_cases()]
    decomposed = [case for case in all_cases().values() if is_decomposed(case)]
    by_opset = Counter(opset(case) for case in run)
    assert by_opset == {23: 69, 24: 13, 25: 11}
    assert Counter(opset(case) for case in decomposed) == by_opset
    # every decomposed model has a case that is run, on the same data
    assert {re.sub("_expanded.*", "", case.name) for case in decomposed} == {case.name for case in run}
    outputs = Counter(output for case in run for output in case.model.graph.node[0].output if output)
    assert outputs == {"Y": 93, "present_key": 21, "present_value": 21, "qk_matmul_output": 18}

    page = (Path(__file__).parents[2] / "docs" / "conformance.md").read_text(encoding="utf-8")
    for version, count in by_opset.items():
        assert f"| {version} | {count} | {count} | 0 | {count} |" in page
    for output, count in outputs.items():
        assert f"| `{output}` | {count} |" in page
