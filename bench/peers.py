"""Other people's exact attention, run on the same arrays in the same rounds, where it is installed."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np

from ..arrays import kind_of
from ..problem import Problem
from .device import Call, Kind

Prepare = Callable[[Problem, Any, Any, Any], Call]
"""Takes the problem and q, k, v (B, H, rows, width); returns a call whose result is a PyTorch tensor (B, H, N, E)."""


@dataclass(frozen=True, slots=True)
class Peer:
    """One competitor."""

    name: str
    device: Kind
    title: str
    load: Callable[[int], Prepare]
    """Import it, with this many CPU threads; any error means that it is missing here."""


def load_peers(names: list[str], device: Kind, threads: int) -> tuple[dict[str, Prepare], dict[str, str]]:
    """Return the named peers that can run here, and why each other one cannot."""
    found: dict[str, Prepare] = {}
    missing: dict[str, str] = {}
    for name in names:
        peer = PEERS[name]
        if peer.device != device:
            continue
        try:
            found[name] = peer.load(threads)
        except Exception as error:  # a broken install of somebody else's package must not end the run
            missing[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    return found, missing


def _load_torch_cpu(threads: int) -> Prepare:
    import torch

    torch.set_num_threads(threads)
    return _sdpa(contextlib.nullcontext)


def _load_torch_gpu(backend: str) -> Prepare:
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    if not torch.cuda.is_available():
        raise RuntimeError("this PyTorch sees no CUDA device")
    return _sdpa(lambda: sdpa_kernel(getattr(SDPBackend, backend)))


def _sdpa(choose_kernel: Callable[[], contextlib.AbstractContextManager[Any]]) -> Prepare:
    """Return PyTorch's scaled_dot_product_attention inside this context."""

    def prepare(problem: Problem, q: Any, k: Any, v: Any) -> Call:
        from torch.nn.functional import scaled_dot_product_attention

        if problem.causal_offset not in (None, 0):
            raise NotImplementedError("PyTorch aligns its causal mask top-left only")
        tensors = tuple(_tensor(x) for x in (q, k, v))
        options = {
            "is_causal": problem.causal_offset is not None,
            "scale": problem.scale,
            "enable_gqa": problem.heads != problem.kv_heads,
        }

        def call() -> Any:
            with choose_kernel():
                return scaled_dot_product_attention(*tensors, **options)

        _first_call(call)
        return call

    return prepare


def _load_flash_attention_4(_threads: int) -> Prepare:
    flash_attn_func = import_module("flash_attn.cute").flash_attn_func

    def prepare(problem: Problem, q: Any, k: Any, v: Any) -> Call:
        if problem.causal_offset not in (None, problem.keys - problem.queries):
            raise NotImplementedError("FlashAttention aligns its causal mask bottom-right only")
        tensors = tuple(_tensor(x).transpose(1, 2) for x in (q, k, v))  # it takes (B, N, H, D) views
        options = {"softmax_scale": problem.scale, "causal": problem.causal_offset is not None}

        def call() -> Any:
            result = flash_attn_func(*tensors, **options)
            out = result[0] if isinstance(result, tuple) else result  # some versions add the lse
            return out.transpose(1, 2)

        try:
            call()  # compiles
        except AssertionError as error:  # how it refuses types and widths
            raise NotImplementedError(str(error)) from error
        return call

    return prepare


def _load_cudnn_frontend(_threads: int) -> Prepare:
    cudnn = import_module("cudnn")
    handle = cudnn.create_handle()

    def prepare(problem: Problem, q: Any, k: Any, v: Any) -> Call:
        import torch

        masks: dict[str, Any] = {}
        if problem.causal_offset is not None:
            alignments = {
                problem.keys - problem.queries: cudnn.diagonal_alignment.BOTTOM_RIGHT,
                0: cudnn.diagonal_alignment.TOP_LEFT,
            }
            masks = {"diagonal_alignment": alignments[problem.causal_offset], "diagonal_band_right_bound": 0}
        tensors = tuple(_tensor(x) for x in (q, k, v))
        out = tensors[0].new_empty((*tensors[0].shape[:3], problem.value_width))
        cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream().cuda_stream)
        float32 = cudnn.data_type.FLOAT
        graph = cudnn.pygraph(intermediate_data_type=float32, compute_data_type=float32, handle=handle)
        inputs = [graph.tensor(dim=list(x.shape), stride=list(x.stride()), data_type=x.dtype) for x in tensors]
        result, _ = graph.sdpa(*inputs, attn_scale=problem.scale, generate_stats=False, **masks)
        result.set_output(True).set_dim(list(out.shape)).set_stride(list(out.stride())).set_data_type(out.dtype)
        try:
            graph.build([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
        except cudnn.cudnnGraphNotSupportedError as error:
            raise NotImplementedError(str(error).strip()) from error
        workspace = out.new_empty(graph.get_workspace_size(), dtype=torch.uint8)
        arrays = dict(zip((*inputs, result), (*tensors, out), strict=True))

        def call() -> Any:
            graph.execute(arrays, workspace, handle=handle)
            return out

        return call

    return prepare


def _first_call(call: Call) -> None:
    """Run once; where no kernel fits, PyTorch says why in warnings beside a bare error: raise these as one."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            call()
        except RuntimeError as error:
            if "No available kernel" not in str(error):
                raise
            reasons = [str(warning.message).partition(" (Triggered")[0] for warning in caught]
            raise NotImplementedError("; ".join(reasons) or str(error)) from error


def _tensor(array: Any) -> Any:
    """Return a tensor over the same memory; on the GPU only if PyTorch and CuPy queue work on the same stream."""
    import torch

    if kind_of(array) == "numpy":
        if array.dtype.name == "bfloat16":  # NumPy has no name for it that PyTorch knows
            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(array)
    import cupy

    stream = cupy.cuda.get_current_stream().ptr
    if torch.cuda.current_stream().cuda_stream != stream:
        raise RuntimeError("PyTorch and CuPy are on different streams: the times would not be of the same queue")
    return torch.from_dlpack(array)


PEERS = {
    peer.name: peer
    for peer in (
        Peer("torch-flash", "gpu", "PyTorch FlashAttention-2", lambda _threads: _load_torch_gpu("FLASH_ATTENTION")),
        Peer("torch-cudnn", "gpu", "PyTorch cuDNN", lambda _threads: _load_torch_gpu("CUDNN_ATTENTION")),
        Peer("flash-attn-4", "gpu", "FlashAttention-4 (CuTe)", _load_flash_attention_4),
        Peer("cudnn-frontend", "gpu", "cuDNN frontend", _load_cudnn_frontend),
        Peer("torch-cpu", "cpu", "PyTorch CPU", _load_torch_cpu),
    )
}
