"""The question: does a forward pass compute the model, with weights small enough to follow token by token."""

from __future__ import annotations

from math import erf, pi

import numpy as np
import pytest
from distrattn_np.bench.models import layers
from distrattn_np.bench.models.dinov2 import DEVIATION, MEAN, DinoV2
from distrattn_np.bench.models.minilm import MiniLM
from distrattn_np.bench.models.smollm2 import Config, SmolLM2

from distrattn_np import exact_attention

RTOL = 2e-5
"""A dozen float32 operations in a row, each within 6e-8, on numbers of order one."""


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def assert_near(actual, expected):
    assert actual.dtype == np.float32
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(actual, expected, rtol=0, atol=RTOL * np.abs(expected).max())


def plain_attention(q, k, v, causal):
    """Rows of one head, one score at a time."""
    out = np.zeros((len(q), v.shape[1]))
    for n in range(len(q)):
        seen = range(n + 1) if causal else range(len(k))
        weights = np.exp([q[n] @ k[m] / np.sqrt(q.shape[1]) for m in seen])
        out[n] = sum(w * v[m] for w, m in zip(weights, seen, strict=True)) / weights.sum()
    return out


def plain_layer_norm(x, weight, bias, epsilon):
    return np.array([(row - row.mean()) / np.sqrt(row.var() + epsilon) * weight + bias for row in x])


def plain_gelu(x):
    return x * (1 + np.vectorize(erf)(x / 2**0.5)) / 2


class TestSmolLM2:
    config = Config(layers=2, heads=4, kv_heads=2, rope_base=100.0, norm_epsilon=1e-5)
    width, head, inner, vocabulary = 24, 6, 20, 30

    def model(self, rng):
        matrices = {
            "attn_q": (self.config.heads * self.head, self.width),
            "attn_k": (self.config.kv_heads * self.head, self.width),
            "attn_v": (self.config.kv_heads * self.head, self.width),
            "attn_output": (self.width, self.config.heads * self.head),
            "ffn_gate": (self.inner, self.width),
            "ffn_up": (self.inner, self.width),
            "ffn_down": (self.width, self.inner),
            "attn_norm": (self.width,),
            "ffn_norm": (self.width,),
        }
        weights = {
            f"blk.{layer}.{name}.weight": rng.standard_normal(shape) / 3
            for layer in range(self.config.layers)
            for name, shape in matrices.items()
        }
        weights["token_embd.weight"] = rng.standard_normal((self.vocabulary, self.width))
        weights["output_norm.weight"] = rng.standard_normal(self.width)
        return SmolLM2(np, self.config, layers.on_device(weights, np))

    def plain(self, model, tokens):
        weights = {name: array.astype(np.float64) for name, array in model.weights.items()}

        def norm(row, name):
            return row / np.sqrt(np.mean(row**2) + self.config.norm_epsilon) * weights[name]

        def rotated(head, n):
            turned = np.empty(self.head)
            for i in range(self.head // 2):
                angle = n * self.config.rope_base ** (-2 * i / self.head)
                number = complex(head[2 * i], head[2 * i + 1]) * np.exp(1j * angle)
                turned[2 * i : 2 * i + 2] = number.real, number.imag
            return turned

        x = np.array([weights["token_embd.weight"][token] for token in tokens])
        for layer in range(self.config.layers):
            w = {name.split(".")[2]: array for name, array in weights.items() if name.startswith(f"blk.{layer}.")}
            q, k, v = (
                np.array([w[part] @ norm(row, f"blk.{layer}.attn_norm.weight") for row in x])
                for part in ("attn_q", "attn_k", "attn_v")
            )
            heads = []
            for h in range(self.config.heads):
                h_kv = h // (self.config.heads // self.config.kv_heads)
                own, shared = (slice(i * self.head, (i + 1) * self.head) for i in (h, h_kv))
                turned_q = np.array([rotated(row[own], n) for n, row in enumerate(q)])
                turned_k = np.array([rotated(row[shared], n) for n, row in enumerate(k)])
                heads.append(plain_attention(turned_q, turned_k, v[:, shared], causal=True))
            x = x + np.concatenate(heads, axis=1) @ w["attn_output"].T
            for n, row in enumerate(x.copy()):
                row = norm(row, f"blk.{layer}.ffn_norm.weight")
                gate = w["ffn_gate"] @ row
                x[n] += w["ffn_down"] @ (gate / (1 + np.exp(-gate)) * (w["ffn_up"] @ row))
        return np.array([norm(row, "output_norm.weight") for row in x])

    def test_hidden_features(self, rng):
        model = self.model(rng)
        tokens = rng.integers(self.vocabulary, size=7)
        assert_near(model.hidden(tokens, exact_attention), self.plain(model, tokens))

    def test_attention_gets_shared_key_heads(self, rng):
        shapes = set()

        def attention(q, k, v, *, causal):
            shapes.add((q.shape, k.shape, v.shape, causal))
            return exact_attention(q, k, v, causal=causal)

        self.model(rng).hidden(np.arange(5), attention)
        assert shapes == {((1, 4, 5, 6), (1, 2, 5, 6), (1, 2, 5, 6), True)}

    def test_scores_of_next_tokens(self, rng, monkeypatch):
        monkeypatch.setattr("distrattn_np.bench.models.smollm2.LOGIT_ROWS", 4)
        model = self.model(rng)
        tokens = rng.integers(self.vocabulary, size=11)
        hidden = model.hidden(tokens, exact_attention)
        log_probabilities, hits = model.next_token_scores(hidden, tokens)
        assert len(log_probabilities) == len(hits) == 10
        for n, token in enumerate(tokens[1:]):
            logits = model.weights["token_embd.weight"].astype(np.float64) @ hidden[n]
            probability = np.exp(logits[token]) / np.exp(logits).sum()
            assert log_probabilities[n] == pytest.approx(np.log(probability), rel=1e-4)
            assert hits[n] == (np.argmax(logits) == token)

    def test_divergence_of_next_tokens(self, rng, monkeypatch):
        monkeypatch.setattr("distrattn_np.bench.models.smollm2.LOGIT_ROWS", 4)
        model = self.model(rng)
        exact, hidden = rng.standard_normal((2, 10, self.width), dtype=np.float32)
        found = model.divergence(hidden, exact)
        for n in range(10):
            q, p = (np.exp(model.weights["token_embd.weight"].astype(np.float64) @ rows[n]) for rows in (hidden, exact))
            q, p = q / q.sum(), p / p.sum()
            assert found[n] == pytest.approx((p * np.log(p / q)).sum(), rel=1e-4)
        assert not model.divergence(exact, exact).any()

    def test_a_likely_token_is_a_hit(self, rng):
        model = self.model(rng)
        hidden = model.weights["token_embd.weight"][[3, 4]] * 10  # each row meets its own embedding best
        _, hits = model.next_token_scores(hidden, np.array([0, 3, 5]))
        assert hits.tolist() == [True, False]


class TestDinoV2:
    heads, width, inner, size, grid = 2, 8, 12, 3, 2

    def model(self, rng):
        weights = {
            "embeddings.cls_token": rng.standard_normal((1, 1, self.width)),
            "embeddings.class_position": rng.standard_normal((1, 1, self.width)),
            "embeddings.patch_positions": rng.standard_normal((1, self.grid**2, self.width)),
            "embeddings.patch_embeddings.projection.weight": rng.standard_normal((self.width, 3, self.size, self.size)),
            "embeddings.patch_embeddings.projection.bias": rng.standard_normal(self.width),
            "layernorm.weight": rng.standard_normal(self.width),
            "layernorm.bias": rng.standard_normal(self.width),
        }
        for layer in range(2):
            for name, shape in {
                "norm1": (self.width,),
                "norm2": (self.width,),
                "attention.attention.query": (self.width, self.width),
                "attention.attention.key": (self.width, self.width),
                "attention.attention.value": (self.width, self.width),
                "attention.output.dense": (self.width, self.width),
                "mlp.fc1": (self.width, self.inner),
                "mlp.fc2": (self.inner, self.width),
            }.items():
                weights[f"encoder.layer.{layer}.{name}.weight"] = rng.standard_normal(shape) / 2
                weights[f"encoder.layer.{layer}.{name}.bias"] = rng.standard_normal(shape[-1])
            for scale in ("layer_scale1", "layer_scale2"):
                weights[f"encoder.layer.{layer}.{scale}.lambda1"] = rng.standard_normal(self.width)
        return DinoV2(np, layers=2, heads=self.heads, weights=layers.on_device(weights, np))

    def plain(self, model, image):
        w = {name: array.astype(np.float64) for name, array in model.weights.items()}
        colours = (image / 255 - MEAN) / DEVIATION
        kernel = w["embeddings.patch_embeddings.projection.weight"]
        rows = [w["embeddings.cls_token"][0, 0] + w["embeddings.class_position"][0, 0]]
        for p in range(self.grid**2):
            top, left = self.size * (p // self.grid), self.size * (p % self.grid)
            row = w["embeddings.patch_embeddings.projection.bias"] + w["embeddings.patch_positions"][0, p]
            for c, y, z in np.ndindex(3, self.size, self.size):
                row = row + kernel[:, c, y, z] * colours[top + y, left + z, c]
            rows.append(row)
        x = np.array(rows)
        for layer in range(2):

            def weight(name, kind="weight", layer=layer):
                return w[f"encoder.layer.{layer}.{name}.{kind}"]

            def linear(name, x):
                return x @ weight(name) + weight(name, "bias")

            inner = plain_layer_norm(x, weight("norm1"), weight("norm1", "bias"), 1e-6)
            q, k, v = (linear(f"attention.attention.{part}", inner) for part in ("query", "key", "value"))
            parts = np.array_split(np.arange(self.width), self.heads)
            joined = np.concatenate([plain_attention(q[:, i], k[:, i], v[:, i], causal=False) for i in parts], axis=1)
            x = x + linear("attention.output.dense", joined) * weight("layer_scale1", "lambda1")
            inner = plain_layer_norm(x, weight("norm2"), weight("norm2", "bias"), 1e-6)
            inner = linear("mlp.fc2", plain_gelu(linear("mlp.fc1", inner)))
            x = x + inner * weight("layer_scale2", "lambda1")
        return plain_layer_norm(x, w["layernorm.weight"], w["layernorm.bias"], 1e-6)

    def test_features(self, rng):
        model = self.model(rng)
        images = rng.integers(256, size=(2, 6, 6, 3), dtype=np.uint8)
        features = model.features(images, exact_attention)
        assert features.shape == (2, 5, 8)
        for image, found in zip(images, features, strict=True):
            assert_near(found, self.plain(model, image))


class TestMiniLM:
    heads, width, inner, vocabulary = 2, 8, 12, 20

    def model(self, rng):
        weights = {
            "embeddings.word_embeddings.weight": rng.standard_normal((self.vocabulary, self.width)),
            "embeddings.position_embeddings.weight": rng.standard_normal((16, self.width)),
            "embeddings.token_type_embeddings.weight": rng.standard_normal((2, self.width)),
        }
        names = {"embeddings.LayerNorm": (self.width,)}
        for layer in range(2):
            names |= {
                f"encoder.layer.{layer}.{name}": shape
                for name, shape in {
                    "attention.self.query": (self.width, self.width),
                    "attention.self.key": (self.width, self.width),
                    "attention.self.value": (self.width, self.width),
                    "attention.output.dense": (self.width, self.width),
                    "attention.output.LayerNorm": (self.width,),
                    "intermediate.dense": (self.inner, self.width),
                    "output.dense": (self.width, self.inner),
                    "output.LayerNorm": (self.width,),
                }.items()
            }
        for name, shape in names.items():
            weights[f"{name}.weight"] = rng.standard_normal(shape) / 2
            weights[f"{name}.bias"] = rng.standard_normal(shape[0])
        return MiniLM(np, layers=2, heads=self.heads, weights=layers.on_device(weights, np))

    def plain(self, model, tokens):
        w = {name: array.astype(np.float64) for name, array in model.weights.items()}

        def norm(x, name):
            return plain_layer_norm(x, w[f"{name}.weight"], w[f"{name}.bias"], 1e-12)

        def linear(x, name):
            return np.array([w[f"{name}.weight"] @ row + w[f"{name}.bias"] for row in x])

        x = np.array(
            [
                w["embeddings.word_embeddings.weight"][token]
                + w["embeddings.position_embeddings.weight"][n]
                + w["embeddings.token_type_embeddings.weight"][0]
                for n, token in enumerate(tokens)
            ]
        )
        x = norm(x, "embeddings.LayerNorm")
        for layer in range(2):
            name = f"encoder.layer.{layer}"
            q, k, v = (linear(x, f"{name}.attention.self.{part}") for part in ("query", "key", "value"))
            parts = np.array_split(np.arange(self.width), self.heads)
            joined = np.concatenate([plain_attention(q[:, i], k[:, i], v[:, i], causal=False) for i in parts], axis=1)
            attended = linear(joined, f"{name}.attention.output.dense")
            x = norm(x + attended, f"{name}.attention.output.LayerNorm")
            inner = plain_gelu(linear(x, f"{name}.intermediate.dense"))
            x = norm(x + linear(inner, f"{name}.output.dense"), f"{name}.output.LayerNorm")
        return x

    def test_features_and_sentence(self, rng):
        model = self.model(rng)
        tokens = rng.integers(self.vocabulary, size=(2, 6))
        features, embeddings = model.features(tokens, exact_attention), model.sentence(tokens, exact_attention)
        for row, found, embedding in zip(tokens, features, embeddings, strict=True):
            expected = self.plain(model, row)
            assert_near(found, expected)
            mean = expected.mean(axis=0)
            assert_near(embedding, mean / np.sqrt(mean @ mean))


class TestParts:
    def test_rotation_of_a_quarter_turn(self):
        cosine, sine = layers.rotary_angles(np, 2, 4, 4 / pi**2)
        # row 1 turns its first pair by one radian, its second by base^(-1/2) = pi / 2
        np.testing.assert_allclose(cosine, [[1, 1], [np.cos(1), 0]], atol=1e-7)
        x = np.tile(np.array([1, 0, 1, 0], np.float32), (1, 1, 2, 1))
        turned = layers.rotate(np, x, cosine, sine)[0, 0]
        np.testing.assert_allclose(turned, [[1, 0, 1, 0], [np.cos(1), np.sin(1), 0, 1]], atol=1e-7)

    def test_silu_is_finite_everywhere(self):
        x = np.array([-1e30, -200, 0, 200, 1e30], np.float32)
        np.testing.assert_array_equal(layers.silu(np, x), [0, 0, 0, 200, x[-1]])

    def test_heads_are_neighbouring_columns(self):
        x = np.arange(12.0).reshape(1, 2, 6)
        heads = layers.split_heads(x, 3)
        assert heads.shape == (1, 3, 2, 2)
        assert heads.base is not None
        assert heads[0, 1].tolist() == [[2, 3], [8, 9]]
        np.testing.assert_array_equal(layers.join_heads(heads), x)
