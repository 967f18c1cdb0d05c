"""The question: does the package still give yesterday's numbers on real queries, keys and values."""

import hashlib
import json
from importlib import resources
from pathlib import Path

import numpy as np
import pytest

import distrattn_np
from distrattn_np import checks, demo

HERE = Path(__file__).parent
ABOUT = json.loads((HERE / "sample.json").read_text(encoding="utf-8"))
CASES = list(ABOUT["cases"])


@pytest.fixture(scope="module")
def golden():
    with np.load(HERE / "sample.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def sample():
    return demo.load_sample()


def test_the_sample_is_the_one_the_numbers_were_made_of():
    folder = resources.files("distrattn_np.data")
    stored = hashlib.sha256(folder.joinpath("smollm2_sample.npz").read_bytes()).hexdigest()
    origin = json.loads(folder.joinpath("smollm2_sample.json").read_text(encoding="utf-8"))
    assert stored == origin["sha256"] == ABOUT["sample_sha256"]


def outputs(sample, name, dtype):
    q, k, v = (array.astype(dtype) for array in (sample.q, sample.k, sample.v))
    options = ABOUT["cases"][name]
    return distrattn_np.distr_attention(q, k, v, causal=sample.causal, scale=sample.scale, **options)


# Against the largest value of a head. float64: the stored rows are float32. float32: ten times what was seen with
# OpenBLAS, for other sum orders. float16: rounding of the result.
@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-7), ("float32", 2e-6), ("float16", 2**-11)])
@pytest.mark.parametrize("name", CASES)
def test_output_rows(sample, golden, name, dtype, tolerance):
    out = outputs(sample, name, dtype)[:, :, ABOUT["rows"]].astype(np.float64)
    wanted = golden[f"{name}_rows"].astype(np.float64)
    largest = np.abs(sample.v.astype(np.float64)).max(axis=(2, 3), keepdims=True)
    assert np.abs(wanted).max() > 0.1  # not a table of zeros
    np.testing.assert_array_less(np.abs(out - wanted) / largest, tolerance)


@pytest.mark.parametrize("name", CASES[1:])
def test_relative_error_of_every_head(sample, golden, name):
    error = demo.relative_error(outputs(sample, name, "float32"), outputs(sample, "exact", "float32"))
    # atol: products of float32 are rounded in another order on another processor
    np.testing.assert_allclose(error, golden[f"{name}_relative_error"], rtol=1e-6, atol=1e-7)


def test_total_variation_of_every_head(sample, golden):
    plan = demo.prepare(None, "numpy", None)
    maps = [demo.head_maps(plan.inputs, problem) for problem in plan.problems]
    found = demo.compare_rows(plan, maps, lambda _: None, compared=sample.q.shape[2])
    wanted = [golden[f"{name}_total_variation"] for name in CASES]
    assert len(plan.problems) == len(CASES)
    for problem, options in zip(plan.problems, ABOUT["cases"].values(), strict=True):
        assert problem.grouping == checks.check_grouping(sample.q, **options)
    np.testing.assert_allclose(found, wanted, rtol=1e-4)
