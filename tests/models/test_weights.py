"""The question: with the real weights, are the figures those of the models? Skipped where the weights are missing."""

from __future__ import annotations

import hashlib
from importlib import import_module

import numpy as np
import pytest
from distrattn_np.bench.models import dinov2, files, inputs, minilm, smollm2

from distrattn_np import exact_attention

REFERENCE_SHA256 = "721a141a63444cfaafd304499eb8307e9cc19d671b315311785d1e82f6d5404a"
"""Of the chapters of Python 3.11 with which the perplexities were measured."""


def loaded(model, reader):
    """Return the model, or skip with what is missing."""
    pytest.importorskip(reader, reason=f"{reader} is not installed: pip install 'distrattn_np[models]'")
    try:
        return model.load(np)
    except ImportError as error:
        pytest.skip(str(error))


class TestSmolLM2:
    @pytest.mark.parametrize(("length", "perplexity"), [(2048, 12.51), (4096, 10.69)])
    def test_perplexity_of_the_python_reference(self, length, perplexity):
        model, tokenizer = loaded(smollm2, "gguf")
        text = inputs.reference_text()
        if hashlib.sha256(text.encode()).hexdigest() != REFERENCE_SHA256:
            pytest.skip("this Python's reference differs from that of Python 3.11, which the figure is of")
        tokens = np.array(tokenizer.encode(text))[:length]
        log_probabilities, _ = model.next_token_scores(model.hidden(tokens, exact_attention), tokens)
        assert np.exp(-log_probabilities.mean()) == pytest.approx(perplexity, abs=0.005)


class TestDinoV2:
    def test_features_are_those_of_the_onnx_graph(self):
        model = loaded(dinov2, "onnx")
        onnx, reference = import_module("onnx"), import_module("onnx.reference")
        image = np.random.default_rng(0).integers(256, size=(1, 518, 518, 3), dtype=np.uint8)
        graph_model = onnx.load(files.package_file(dinov2.PACKAGE, dinov2.FILE))
        graph = graph_model.graph
        (last,) = (i for i, node in enumerate(graph.node) if node.name == "/backbone/layernorm/Add_1")
        output = graph.node[last].output[0]
        del graph.node[last + 1 :]  # the saliency decoder
        del graph.output[:]
        graph.output.append(onnx.helper.make_tensor_value_info(output, onnx.TensorProto.FLOAT, None))
        colours = ((image / 255 - dinov2.MEAN) / dinov2.DEVIATION).astype(np.float32)
        (expected,) = reference.ReferenceEvaluator(graph_model).run(
            None, {"input_image": colours.transpose(0, 3, 1, 2)}
        )
        found = model.features(image, exact_attention)
        assert np.abs(expected).max() > 1
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


class TestMiniLM:
    def test_like_sentences_are_alike(self):
        model, tokenizer = loaded(minilm, "safetensors")
        texts = ("A man is playing the guitar.", "Someone plays an instrument.", "The stock market fell sharply today.")
        embeddings = [model.sentence(np.array([tokenizer.encode(text)]), exact_attention)[0] for text in texts]
        alike, unlike = (float(embeddings[0] @ other) for other in embeddings[1:])
        assert alike > 0.5
        assert unlike < 0.2

    def test_tokens_of_a_sentence(self):
        _, tokenizer = loaded(minilm, "safetensors")
        assert tokenizer.encode("Hello, world!") == [101, 7592, 1010, 2088, 999, 102]
