"""The ONNX operator Attention (opset 23 to 25) in terms of this package's call: what its node tests are run through."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

Call = Callable[..., Any]
"""`exact_attention`, or another function with its arguments."""


def run_node(
    call: Call, inputs: dict[str, np.ndarray], attributes: dict[str, Any], outputs: list[str]
) -> dict[str, np.ndarray]:
    """Return the named outputs of one Attention node."""
    q_heads, kv_heads = attributes.get("q_num_heads"), attributes.get("kv_num_heads")
    is_packed = inputs["Q"].ndim == 3
    q, k, v = inputs["Q"], inputs["K"], inputs["V"]
    if is_packed:
        q, k, v = (split_heads(x, heads) for x, heads in ((q, q_heads), (k, kv_heads), (v, kv_heads)))
    past = 0
    if "past_key" in inputs:
        past = inputs["past_key"].shape[2]
        k, v = np.concatenate([inputs["past_key"], k], axis=2), np.concatenate([inputs["past_value"], v], axis=2)
    results = {"present_key": k, "present_value": v}

    attn_mask = inputs.get("attn_mask")
    if "nonpad_kv_seqlen" in inputs:
        # every sequence has its own length, and its last query stands at its last key
        Y = np.concatenate(
            [
                attend(
                    call,
                    q[b : b + 1],
                    *(x[b : b + 1, :, :keys] for x in (k, v)),
                    of_sequence(attn_mask, b),
                    keys - q.shape[2],
                    attributes,
                )
                for b, keys in enumerate(inputs["nonpad_kv_seqlen"])
            ]
        )
    else:
        Y = attend(call, q, k, v, attn_mask, past, attributes)
        if "qk_matmul_output" in outputs:
            results["qk_matmul_output"] = scores(call, q, k, attn_mask, past, attributes)
    results["Y"] = Y.transpose(0, 2, 1, 3).reshape(*Y.shape[::2], -1) if is_packed else Y
    return {name: results[name] for name in outputs}


def split_heads(x: np.ndarray, heads: int) -> np.ndarray:
    """Return (B, rows, heads * width) as a (B, heads, rows, width) view."""
    return x.reshape(*x.shape[:2], heads, -1).transpose(0, 2, 1, 3)


def of_sequence(attn_mask: np.ndarray | None, b: int) -> np.ndarray | None:
    """Return the part of a mask that belongs to one sequence of the batch."""
    has_batch = attn_mask is not None and attn_mask.ndim == 4 and len(attn_mask) > 1
    return attn_mask[b : b + 1] if has_batch else attn_mask


def attend(
    call: Call,
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    attn_mask: np.ndarray | None,
    offset: int,
    attributes: dict[str, Any],
) -> np.ndarray:
    """Return the node's Y, (B, H, N, E), where query n stands at key n + offset."""
    low, high = key_limits(attributes, offset)
    keys = k.shape[2]
    if attn_mask is not None and attn_mask.shape[-1] > 1:
        keys = min(keys, attn_mask.shape[-1])  # those past the end of a short mask are not attended
    if high:
        keys = min(keys, q.shape[2] + high)  # nor those past the limit of the last query, which is at the corner then
    return call(
        q,
        k[:, :, :keys],
        v[:, :, :keys],
        scale=attributes.get("scale"),
        softcap=attributes.get("softcap", 0.0),
        **limit_options(low, high, q.shape[2], keys),
        **mask_options(None if attn_mask is None else attn_mask[..., :keys]),
    )


def scores(
    call: Call, q: np.ndarray, k: np.ndarray, attn_mask: np.ndarray | None, offset: int, attributes: dict[str, Any]
) -> np.ndarray:
    """Return the node's qk_matmul_output (B, H, N, M): a score is the lse of a call with one key.

    The softmax (mode 3) is attention to values that are the unit vectors.
    """
    mode = attributes.get("qk_matmul_output_mode", 0)
    keys = k.shape[2]
    if mode == 3:
        units = np.broadcast_to(np.eye(keys, dtype=k.dtype), (*k.shape[:2], keys, keys))
        return attend(call, q, k, units, attn_mask, offset, attributes)
    low, high = key_limits(attributes, offset)
    distance = np.arange(keys) - np.arange(q.shape[2])[:, None]
    shown = (distance >= (-np.inf if low is None else low)) & (distance <= (np.inf if high is None else high))
    columns = []
    for m in range(keys):
        options = {"scale": attributes.get("scale")}
        if mode > 0:
            options["softcap"] = attributes.get("softcap", 0.0)
        if mode > 1:
            options |= mask_options(None if attn_mask is None else attn_mask[..., m : m + 1])
            options["mask"] = shown[:, m : m + 1] & options.get("mask", True)
        key = k[:, :, m : m + 1]
        columns.append(call(q, key, key, return_lse=True, **options)[1])
    return np.stack(columns, axis=-1).astype(q.dtype)


def key_limits(attributes: dict[str, Any], offset: int) -> tuple[int | None, int | None]:
    """Return (low, high): query n sees keys n + low to n + high; None: no limit."""
    left, right = attributes.get("left_window_size", -1), attributes.get("right_window_size", -1)
    highs = [offset + right] * (right >= 0) + [offset] * bool(attributes.get("is_causal"))
    return (offset - left if left >= 0 else None), min(highs, default=None)


def limit_options(low: int | None, high: int | None, queries: int, keys: int) -> dict[str, Any]:
    """Return ``causal`` and ``window`` for key limits at a corner or above the bottom-right one."""
    causal: bool | str = False
    diagonal, right = keys - queries, None
    if high == diagonal:
        causal = True
    elif high == 0:
        causal, diagonal = "top-left", 0
    elif high is not None:
        right = high - diagonal
    return {"causal": causal, "window": (None if low is None else diagonal - low, right)}


def mask_options(attn_mask: np.ndarray | None) -> dict[str, np.ndarray]:
    """Return the mask as ``mask`` where it is bool, as ``bias`` where it is added to the scores."""
    if attn_mask is None:
        return {}
    return {"mask" if attn_mask.dtype == bool else "bias": attn_mask}
