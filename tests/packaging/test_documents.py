"""The question: do the snippets of README, docs and docstrings run, and do the documents' links lead somewhere."""

import doctest
import re
import sys
import types
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

from distrattn_np import distr_attention

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
NAMES = [path.relative_to(ROOT).as_posix() for path in DOCUMENTS]


FENCE = re.compile(r"^(?:<!-- needs: (?P<needs>[^\n]*) -->\n)?```python\n(?P<text>.*?)^```", re.MULTILINE | re.DOTALL)
OTHER_LANGUAGES = {"sh", "{include}", "{toctree}", "{eval-rst}"}


def snippets(path):
    """Return the Python of a document by what it needs: a comment before it names packages, and "gpu"."""
    groups = {}
    for match in FENCE.finditer(path.read_text(encoding="utf-8")):
        groups.setdefault(match["needs"] or "", []).append(match["text"])
    return groups


WITH_SNIPPETS = [
    pytest.param(path, needs, marks=[pytest.mark.gpu] if "gpu" in needs.split() else [], id=f"{path.name}:{needs}")
    for path in DOCUMENTS
    for needs in snippets(path)
]


def run_snippets(path, needs):
    """Run the snippets of one document that need the same, and return their names."""
    for package in set(needs.split()) - {"gpu"}:
        pytest.importorskip(package, reason=f"{package}, which the example needs, is not installed")
    namespace = {"__name__": "snippet"}
    for text in snippets(path)[needs]:  # later ones may use the names of earlier ones
        exec(compile(text, str(path), "exec"), namespace)
    return namespace


@pytest.fixture
def triton_server(monkeypatch):
    """Stand in for the module that exists inside a Triton server alone."""

    class Tensor:
        def __init__(self, name, array):
            self.name, self.array = name, array

        def __dlpack__(self, stream=None):
            return self.array.__dlpack__(stream=stream)

        def __dlpack_device__(self):
            return self.array.__dlpack_device__()

        @classmethod
        def from_dlpack(cls, name, exporter):
            array = np.from_dlpack(exporter)
            assert array.flags.c_contiguous, "the server takes no other strides"
            return cls(name, array)

    module = types.ModuleType("triton_python_backend_utils")
    module.Tensor = Tensor
    module.TritonError = str
    module.InferenceResponse = lambda tensors, error=None: types.SimpleNamespace(tensors=tensors, error=error)
    module.get_input_tensor_by_name = lambda request, name: request[name]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


def test_there_are_snippets():
    assert {"README.md", "layouts.md", "block_size.md", "interop.md"} <= {
        param.values[0].name for param in WITH_SNIPPETS
    }
    interop = snippets(ROOT / "docs" / "interop.md")
    examples = {"cupy", "numba", "jax", "torch", "cuda.core", "triton_python_backend_utils", "cuda.bindings"}
    assert examples <= {package for needs in interop for package in needs.split()}


@pytest.mark.parametrize("path", DOCUMENTS, ids=NAMES)
def test_no_fence_hides_python(path):
    """Every fence is Python by that name, which runs, or one of the few others."""
    text = path.read_text(encoding="utf-8")
    fences = re.findall(r"^(?:```|~~~)(.*)\n(?:.*\n)*?(?:```|~~~)$", text, flags=re.MULTILINE)
    assert set(fences) <= {"python", *(name for name in fences if name.split(" ")[0] in OTHER_LANGUAGES)}
    assert fences.count("python") == sum(map(len, snippets(path).values()))
    assert text.count("<!-- needs:") == sum(len(texts) for needs, texts in snippets(path).items() if needs)


@pytest.mark.parametrize(("path", "needs"), WITH_SNIPPETS)
@pytest.mark.usefixtures("triton_server")
def test_snippets_run(path, needs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_snippets(path, needs)


def test_triton_model_answers(triton_server):
    model = run_snippets(ROOT / "docs" / "interop.md", triton_server.__name__)["TritonPythonModel"]()
    arrays = dict(zip("QKV", np.random.default_rng(0).standard_normal((3, 1, 2, 9, 8), dtype=np.float32), strict=True))
    good = {name: triton_server.Tensor(name, x) for name, x in arrays.items()}
    bad = good | {"K": triton_server.Tensor("K", arrays["K"].astype(np.int32))}
    answer, refusal = model.execute([good, bad])
    assert answer.error is None
    assert [tensor.name for tensor in answer.tensors] == ["OUT"]
    assert np.array_equal(answer.tensors[0].array, distr_attention(*arrays.values(), causal=True))
    assert refusal.tensors == []
    assert refusal.error.startswith("k: the dtype must be")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_jax_function_agrees_inside_jit(dtype):
    jax = pytest.importorskip("jax", reason="jax, which the example needs, is not installed")
    attention = run_snippets(ROOT / "docs" / "interop.md", "jax")["attention"]
    arrays = np.random.default_rng(0).standard_normal((3, 2, 4, 33, 16), dtype=np.float32)
    q, k, v = (jax.numpy.asarray(x, dtype) for x in arrays)
    # a GPU's kernels add in another order than NumPy; 16 bits are rounded once
    tolerance = 0 if jax.default_backend() == "cpu" else {"float32": 1e-5, "bfloat16": 2e-2}[dtype]
    for options in ({"causal": True}, {"method": "lsh", "block_size": 16}, {"group_size": 1}):
        out = jax.jit(lambda q, k, v, options=options: attention(q, k, v, **options) * 2)(q, k, v)
        expected = distr_attention(*(np.asarray(x) for x in (q, k, v)), **options).astype(np.float32)
        np.testing.assert_allclose(np.asarray(out, np.float32), expected * 2, rtol=tolerance, atol=2 * tolerance)
        assert np.ptp(expected) > 0.1


@pytest.mark.parametrize("path", DOCUMENTS, ids=NAMES)
def test_links_lead_somewhere(path):
    text = path.read_text(encoding="utf-8")
    assert text.strip()
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
        assert (path.parent / target).exists(), target


def test_readme_has_the_two_commands_and_the_tables():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in ("demo-command", "test-command", "bench:gpu", "bench:cpu"):
        kind, _, table = name.partition(":")
        begin = f"<!-- {kind}:begin {table} -->" if table else f"<!-- {kind}:begin -->"
        assert text.count(begin) == 1
        assert text.index(begin) < text.index(begin.replace(":begin", ":end"))


@pytest.mark.parametrize("module", ["attention", "grouped_keys", "merge"])
def test_doctests_of_the_public_calls(module):
    result = doctest.testmod(import_module(f"distrattn_np.{module}"))
    assert result.attempted > 0
    assert result.failed == 0
