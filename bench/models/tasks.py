"""The measurements: a decoder's perplexity, the features of a vision transformer and of passages, similarities."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from importlib import import_module
from typing import Any, ClassVar

import numpy as np

from . import dinov2, inputs, minilm, smollm2
from .layers import Attention, to_host

Quality = dict[str, float]
WINDOWS = 4
"""Passages of MiniLM's full length."""
SENTENCES = 256


class Task(ABC):
    """One model on one input. `measure` runs the model; the first call must be with exact attention."""

    model: ClassVar[str]
    title: ClassVar[str]
    causal: ClassVar[bool]
    columns: ClassVar[dict[str, str]]
    """Measured quality and what it means; the first is the one that is drawn."""
    input: str
    """What the model is fed, in words."""

    @abstractmethod
    def measure(self, attention: Attention, wait: Callable[[], None]) -> tuple[float, Quality]:
        """Return the seconds of the forward pass and the quality, `columns`."""


class Perplexity(Task):
    """SmolLM2 on the first tokens of a text."""

    model = smollm2.NAME
    title = smollm2.TITLE
    causal = True
    columns: ClassVar[dict[str, str]] = {
        "divergence": "Kullback-Leibler divergence of next-token distributions from exact attention's, mean in nats",
        "perplexity": "exp of the mean negative log probability of the next token",
        "accuracy": "share of next tokens that were the likeliest",
    }

    def __init__(self, model: smollm2.SmolLM2, tokens: np.ndarray, text: str) -> None:
        self._model, self._tokens = model, tokens
        self._exact: Any = None
        self.input = f"{len(tokens)} tokens of {text}"

    def measure(self, attention: Attention, wait: Callable[[], None]) -> tuple[float, Quality]:
        """Return the time to the first token (prompt, and logits after its end), and how good its scores are."""
        start = time.perf_counter()
        hidden = self._model.hidden(self._tokens, attention)
        self._model.logits(hidden[-1:]).argmax()
        wait()
        seconds = time.perf_counter() - start
        if self._exact is None:
            self._exact = hidden
        log_probabilities, hits = map(to_host, self._model.next_token_scores(hidden, self._tokens))
        return seconds, {
            "divergence": float(to_host(self._model.divergence(hidden, self._exact)).mean(dtype=np.float64)),
            "perplexity": float(np.exp(-log_probabilities.mean(dtype=np.float64))),
            "accuracy": float(hits.mean()),
        }


class PatchFeatures(Task):
    """DINOv2 on photographs."""

    model = dinov2.NAME
    title = dinov2.TITLE
    causal = False
    columns: ClassVar[dict[str, str]] = {
        "cosine": "cosine of a token's final features with exact attention's, mean over tokens and images",
        "nearest": "share of patches whose nearest patch in the other images is the same as with exact attention",
    }

    def __init__(self, model: dinov2.DinoV2, images: np.ndarray) -> None:
        self._model, self._images = model, images
        self._exact: np.ndarray | None = None
        self.input = f"{len(images)} images of {images.shape[1]} x {images.shape[2]} pixels"

    def measure(self, attention: Attention, wait: Callable[[], None]) -> tuple[float, Quality]:
        """Return the time of all images, one after the other, and how near the features are."""
        start = time.perf_counter()
        found = [self._model.features(image[np.newaxis], attention)[0] for image in self._images]
        wait()
        seconds = time.perf_counter() - start
        features = unit_rows(np.stack([to_host(one) for one in found]))
        if self._exact is None:
            self._exact = features
        return seconds, {
            "cosine": float((features * self._exact).sum(axis=-1).mean(dtype=np.float64)),
            "nearest": same_nearest(features[:, 1:], self._exact[:, 1:]),
        }


class PassageFeatures(Task):
    """MiniLM on passages of its full length."""

    model = minilm.NAME
    title = minilm.TITLE
    causal = False
    columns: ClassVar[dict[str, str]] = {
        "cosine": "cosine of a token's final features with exact attention's, mean over tokens and passages",
    }

    def __init__(self, model: minilm.MiniLM, passages: np.ndarray, text: str) -> None:
        self._model, self._passages = model, passages
        self._exact: np.ndarray | None = None
        self.input = f"{len(passages)} passages of {passages.shape[1]} tokens of {text}"

    def measure(self, attention: Attention, wait: Callable[[], None]) -> tuple[float, Quality]:
        """Return the time of all passages together, and how near the features are."""
        start = time.perf_counter()
        found = self._model.features(self._passages, attention)
        wait()
        seconds = time.perf_counter() - start
        features = unit_rows(to_host(found))
        if self._exact is None:
            self._exact = features
        return seconds, {"cosine": float((features * self._exact).sum(axis=-1).mean(dtype=np.float64))}


class SentenceSimilarity(Task):
    """MiniLM on sentences, one at a time."""

    model = minilm.NAME
    title = minilm.TITLE
    causal = False
    columns: ClassVar[dict[str, str]] = {
        "spearman": "rank correlation of the similarities of all pairs of sentences with exact attention's",
        "cosine": "cosine of a sentence's embedding with exact attention's, mean over sentences",
    }

    def __init__(self, model: minilm.MiniLM, sentences: list[np.ndarray], text: str) -> None:
        self._model, self._sentences = model, sentences
        self._exact: np.ndarray | None = None
        lengths = [len(sentence) for sentence in sentences]
        self.input = f"{len(sentences)} sentences of {min(lengths)} to {max(lengths)} tokens of {text}"

    def measure(self, attention: Attention, wait: Callable[[], None]) -> tuple[float, Quality]:
        """Return the time of all sentences, and how near embeddings and their similarities are."""
        spearmanr = import_module("scipy.stats").spearmanr
        start = time.perf_counter()
        found = [self._model.sentence(one[np.newaxis], attention)[0] for one in self._sentences]
        wait()
        seconds = time.perf_counter() - start
        embeddings = np.stack([to_host(one) for one in found])
        if self._exact is None:
            self._exact = embeddings
        pairs = np.triu_indices(len(embeddings), k=1)
        similarities, wanted = ((x @ x.T)[pairs] for x in (embeddings, self._exact))
        return seconds, {
            "spearman": float(spearmanr(similarities, wanted).statistic),
            "cosine": float((embeddings * self._exact).sum(axis=1).mean(dtype=np.float64)),
        }


def unit_rows(x: np.ndarray) -> np.ndarray:
    """Return x with rows of length one."""
    rows: np.ndarray = x / np.linalg.norm(x, axis=-1, keepdims=True)
    return rows


def same_nearest(patches: np.ndarray, exact: np.ndarray) -> float:
    """Return the share of patches (images, patches, width) whose nearest patch is the same as for exact features.

    It is looked for among the exact features of the other images: they are the labelled set, each patch a label of its
    own, and the answer to "which known patch is this?" must not change.
    """
    same = [
        (nearest(patches[i], others) == nearest(exact[i], others)).mean()
        for i in range(len(exact))
        for others in [np.delete(exact, i, axis=0).reshape(-1, exact.shape[-1])]
    ]
    return float(np.mean(same))


def nearest(rows: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return the index of the row of ``others`` with the largest product, for each row."""
    indices: np.ndarray = np.argmax(rows @ others.T, axis=1)
    return indices


def perplexity_tasks(xp: Any, lengths: list[int], text: str, name: str) -> list[Task]:
    """Return one task for each prompt length."""
    model, tokenizer = smollm2.load(xp)
    tokens = np.array(tokenizer.encode(text))
    if max(lengths) > len(tokens):
        raise ValueError(f"--tokens: must be at most the {len(tokens)} tokens of the text, got {max(lengths)}")
    return [Perplexity(model, tokens[:length], name) for length in lengths]


def feature_tasks(xp: Any) -> list[Task]:
    """Return the task of the vision transformer."""
    return [PatchFeatures(dinov2.load(xp), inputs.photographs())]


def sentence_tasks(xp: Any, text: str, name: str) -> list[Task]:
    """Return the tasks of the sentence encoder: [CLS] and [SEP] stand around every passage and sentence."""
    model, tokenizer = minilm.load(xp)
    first, *tokens, last = tokenizer.encode(text)
    inner = minilm.POSITIONS - 2
    if len(tokens) < WINDOWS * inner:
        raise ValueError(f"--text: must have {WINDOWS * inner} word pieces for minilm, got {len(tokens)}")
    passages = [[first, *tokens[i * inner : (i + 1) * inner], last] for i in range(WINDOWS)]
    sentences = [np.array(tokenizer.encode(sentence)) for sentence in inputs.sentences(text, SENTENCES)]
    return [PassageFeatures(model, np.array(passages), name), SentenceSimilarity(model, sentences, name)]
