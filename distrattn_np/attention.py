"""The public calls: check the arguments, choose a backend, run it."""

from __future__ import annotations

from typing import Any

import numpy as np

from . import backends, checks
from .arrays import REGION, array_at
from .block_size import choose_block_size
from .grouped_keys import GroupedKeys
from .grouped_pages import GroupedPages
from .problem import AttentionInfo, PagedProblem, Problem, RaggedProblem, Subspace, SubspaceMaps

NOTHING_GROUPED = AttentionInfo("exact", None, "the rank is the width, so nothing is grouped", None, None)

_MEASURE = object()
"""Stands for ``workspace`` where only its size is asked for."""


def distr_attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    method: str = "subspace",
    group_size: int | None = None,
    rank: int | None = None,
    score_tol: float | None = None,
    refine: int = 1,
    fusion: str | None = None,
    group_by: str | None = None,
    block_size: int | None = None,
    seed: int = 0,
    causal: bool | str = False,
    window: tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    mask: Any = None,
    bias: Any = None,
    cu_seqlens_q: Any = None,
    cu_seqlens_k: Any = None,
    page_table: Any = None,
    seqlens_k: Any = None,
    layout: str = "bhnd",
    out: Any = None,
    return_lse: bool = False,
    return_info: bool = False,
    lse: Any = None,
    workspace: Any = None,
    stream: Any = None,
    backend: str | None = None,
) -> Any:
    """Attention over all keys, with scores computed from fewer channels than the queries and keys have.

    Keys (or queries) are cut into blocks. Every block gets two small maps from D channels to R, one for its own rows
    and one for the rows that meet it, and the score product runs over R. Softmax and the product with ``v`` are exact.
    Equal to exact attention for R = D; with "subspace" also where a block, or what meets it, spans at most R
    dimensions, with "lsh" where the channels of every group are equal.

    Parameters
    ----------
    q : array, shape (B, H, N, D), float16 | bfloat16 | float32 | float64
        Queries: a NumPy, CuPy or Numba device array, or what becomes one without a copy (Notes). The last axis must be
        contiguous; any other strides are used as they are. D is 1 to 256.
    k : array, shape (B, H_kv, M, D), dtype and kind of ``q``; or GroupedKeys, GroupedPages
        Keys. H_kv divides H: query head h uses key head ``h * H_kv // H``. Keys from `group_keys` and `group_pages`
        bring their grouping with them: all options from ``method`` to ``block_size`` must be left as they are by
        default then.
    v : array, shape (B, H_kv, M, E), dtype and kind of ``q``
        Values. E is 1 to 256.
    method : {"lsh", "subspace"}
        How a block's channels are reduced. "subspace" keeps the R directions that matter most to its scores, for
        models as they are. "lsh" is the paper's grouping by hash, for models that were trained with it.
    group_size : int, optional
        G; must divide D. R is D / G, so 1 is exact attention. Default: 2 where neither ``rank`` nor ``score_tol`` is
        given.
    rank : int, optional
        R itself, 1 to D. "subspace" only.
    score_tol : float, optional
        The root-mean-square error of a block's scores, in nats, that each block stays under by its own choice of R
        among 16, 32, ... and D, as far as it can be predicted. "subspace" only.
    refine : int
        How often the directions of "subspace" are refined. 0 keeps the span of the R heaviest channels; 1 comes close
        to the best R directions.
    fusion : {"sum", "lstsq"}, optional
        "lsh" only. "sum" (the paper, the default) samples the first channel of a group and adds up its members;
        "lstsq" samples the channel that weighs most and adds the members up with their least-squares gains.
    group_by : {"queries", "keys"}, optional
        Which side is cut into blocks. Default: "keys" for "subspace", "queries" (the paper) for "lsh".
    block_size : int, optional
        L, rows per block. Default: 1024 for "lsh"; chosen from D and R for "subspace" (docs/block_size.md).
    seed : int
        Seeds the hyperplanes of "lsh"; the same seed gives the same groups on every backend.
    causal : bool or {"bottom-right", "top-left"}
        True and "bottom-right": query n sees keys ``m <= n + M - N``. "top-left": keys ``m <= n``.
    window : (left, right), optional
        Query n sees keys ``n + diagonal - left <= m <= n + diagonal + right``, of those that ``causal`` lets it see;
        None on a side: no limit there. ``diagonal`` is 0 for "top-left" and ``M - N`` otherwise, causal or not.
    scale : float, optional
        Multiplies the scores. Default: ``1 / sqrt(D)``.
    softcap : float
        The scaled scores S become ``softcap * tanh(S / softcap)``. 0: as they are.
    mask : array, broadcasts to (B, H, N, M) in either layout, bool, kind of ``q``
        True where a query may attend a key. Any strides; never expanded in memory.
    bias : array, broadcasts to (B, H, N, M) in either layout, dtype of ``q`` or float32, kind of ``q``
        Added to the scaled and capped scores. Any strides; never expanded in memory.
    cu_seqlens_q, cu_seqlens_k : array, shape (B + 1,), int32 or int64, kind of ``q``; given together
        Packed sequences instead of a batch: q is (N, H, D), k (M, H_kv, D), v (M, H_kv, E) and the result (N, H, E),
        N and M counting the rows of all. Sequence b has the queries ``cu_seqlens_q[b]`` to ``cu_seqlens_q[b + 1] - 1``
        and the keys that ``cu_seqlens_k`` says; lengths may be zero. ``mask`` and ``bias`` must be left out, and
        ``layout`` as it is. Values are checked only where they lie on the host: a device would have to be waited for.
    page_table, seqlens_k : array, shapes (B, T) and (B,), int32, kind of ``q``; given together
        Keys and values in pages: k is (P, H_kv, S, D) and v (P, H_kv, S, E), in ``layout``, S one of 16, 32, 64, 128
        and 256. Sequence b has ``seqlens_k[b]`` keys; key m is row ``m % S`` of page ``page_table[b, m // S]``. Pages
        may be shared, and entries behind the last page that a sequence begins may hold anything. ``mask``, ``bias`` and
        ``return_info`` must be left out. Values are checked only where they lie on the host. On a GPU the rows that
        sequences have are copied, except in decoding steps on CuPy (docs/caches.md).
    layout : {"bhnd", "bnhd"}
        Order of the axes of q, k, v and the result; "bnhd" is (B, N, H, D).
    out : array, optional
        Written and returned. Shape, dtype, kind and device of the result; must not overlap the inputs. What becomes an
        array without a copy may stand here too, where it may be written.
    return_lse : bool
        Also return the log-sum-exp of each row of the scores that the softmax sees: scaled, capped, with the bias.
    return_info : bool
        Also return the block size with its reason, and the rank and predicted score error of every block.
    lse : array, shape (B, H, N), (H, N) for packed sequences, float32, optional
        Where the log-sum-exp is written, as ``out`` for the result, contiguous; and returned with ``return_lse``.
    workspace : array, shape (bytes,), uint8, kind and device of ``q``, optional
        Device memory for all that a call needs beside its results; `workspace_size` says how much. It must begin at a
        multiple of 256 bytes, and holds nothing of worth afterwards. With ``out``, and ``lse`` or no ``return_lse``, a
        call allocates no device memory. CuPy and Numba backends.
    stream : int or stream, optional
        What the call runs on, with device arrays: the handle of a CUDA stream, or any package's stream that has
        ``__cuda_stream__``. Default: CuPy's current stream; of Numba arrays their own.
    backend : {"numpy", "cupy", "numba"}, optional
        Default: the one of the arrays' kind. NumPy arrays given to a GPU backend are copied there and back.

    Returns
    -------
    out : array, shape (B, H, N, E) in ``layout``, dtype, kind and device of ``q``
        Every row lies between the least and the greatest visible value of each column of ``v``. A query that sees no
        key gives zero.
    lse : array, shape (B, H, N), (H, N) for packed sequences, float32
        Only with ``return_lse``. Natural logarithm; minus infinity for a query that sees no key.
    info : AttentionInfo
        Only with ``return_info``. Fields ``method``, ``block_size``, ``reason``, ``ranks`` and ``score_errors``.

    Raises
    ------
    TypeError
        If an array is of another kind or dtype than ``q``, of none that is supported, or cannot be read without a copy.
    ValueError
        If shapes, strides or options break one of the rules above; the text names the argument.
    ImportError
        If the backend's package is not installed; the text says what to install.
    NotImplementedError
        If the call is legal but the backend has no kernel for it.

    Notes
    -----
    Objects with ``__dlpack__`` (JAX, PyTorch, cuda.core and others) are taken as the NumPy array that has their memory,
    or the CuPy array where it is a CUDA device's; objects with nothing but ``__cuda_array_interface__`` as CuPy arrays
    (not bfloat16); all else that ``np.asarray`` takes without a copy as NumPy arrays. The result is then such an array,
    which ``from_dlpack`` of the other package takes back (docs/interop.md).

    A score passes through ``scale``, ``softcap``, ``bias`` and ``mask`` in this order, and does not count beyond
    ``window`` or the causal limit. The channels are reduced as if there were only the causal limit: rows that nobody
    attends to, such as padding, must hold finite numbers. Packed sequences have nothing to do with one another:
    ``causal``, ``window`` and blocks count from the first row of each (eq. 29).

    Equation (4) of docs/math.md; after Jin et al., "DistrAttention" (arXiv:2507.17245), whose grouping this is with
    ``method="lsh", fusion="sum", group_by="queries"``. 16-bit inputs are multiplied on tensor cores with float32
    accumulation; the softmax is float32 (float64 for float64). With ``causal`` the result for row n never uses the
    values of later rows, but it depends on those rows through the maps: the groups of "lsh" are chosen from all rows of
    a block, and the maps of "subspace" for all rows that meet it, with the mean of all keys subtracted. "subspace" with
    blocks over keys scores the keys of a query's own block exactly (eq. 20), so later keys have no part in row n but
    for that mean. The quality on real inputs is measured in docs/accuracy.md; no bound is promised.

    Examples
    --------
    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> q, k, v = rng.standard_normal((3, 1, 2, 64, 32), dtype=np.float32)
    >>> distr_attention(q, k, v).shape
    (1, 2, 64, 32)
    >>> out, info = distr_attention(q, k, v, method="subspace", score_tol=0.5, return_info=True)
    >>> info.ranks
    array([[[16],
            [16]]], dtype=int32)
    """
    return _attention(
        q,
        k,
        v,
        grouping_options={
            "method": method,
            "group_size": group_size,
            "rank": rank,
            "score_tol": score_tol,
            "refine": refine,
            "fusion": fusion,
            "group_by": group_by,
            "block_size": block_size,
            "seed": seed,
        },
        causal=causal,
        window=window,
        scale=scale,
        softcap=softcap,
        mask=mask,
        bias=bias,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        page_table=page_table,
        seqlens_k=seqlens_k,
        layout=layout,
        out=out,
        return_lse=return_lse,
        return_info=return_info,
        lse=lse,
        workspace=workspace,
        stream=stream,
        backend=backend,
    )


def exact_attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    causal: bool | str = False,
    window: tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    mask: Any = None,
    bias: Any = None,
    cu_seqlens_q: Any = None,
    cu_seqlens_k: Any = None,
    page_table: Any = None,
    seqlens_k: Any = None,
    layout: str = "bhnd",
    out: Any = None,
    return_lse: bool = False,
    lse: Any = None,
    workspace: Any = None,
    stream: Any = None,
    backend: str | None = None,
) -> Any:
    """Exact attention ``softmax(scale q k^T + bias) v``: what `distr_attention` gives for ``group_size=1``.

    Parameters, results and errors are those of `distr_attention` without the grouping options; equations (1) to (3),
    (21) to (24) and (29) of docs/math.md.

    Examples
    --------
    >>> import numpy as np
    >>> one = np.ones((1, 1, 2, 4), dtype=np.float32)
    >>> exact_attention(one, one, one)[0, 0, 0]
    array([1., 1., 1., 1.], dtype=float32)
    """
    return _attention(
        q,
        k,
        v,
        grouping_options=None,
        causal=causal,
        window=window,
        scale=scale,
        softcap=softcap,
        mask=mask,
        bias=bias,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        page_table=page_table,
        seqlens_k=seqlens_k,
        layout=layout,
        out=out,
        return_lse=return_lse,
        return_info=False,
        lse=lse,
        workspace=workspace,
        stream=stream,
        backend=backend,
    )


def _attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    grouping_options: dict[str, Any] | None,
    causal: bool | str,
    window: tuple[int | None, int | None] | None,
    scale: float | None,
    softcap: float,
    mask: Any,
    bias: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    page_table: Any,
    seqlens_k: Any,
    layout: str,
    out: Any,
    return_lse: bool,
    return_info: bool,
    lse: Any,
    workspace: Any,
    stream: Any,
    backend: str | None,
) -> Any:
    """Check a call and let its backend compute it; without ``grouping_options`` it is exact attention."""
    checks.check_flags(return_lse=return_lse, return_info=return_info)
    given_out, given_lse, handle = out, lse, checks.check_stream(stream)
    page_table, seqlens_k, q, k, v, mask, bias, cu_seqlens_q, cu_seqlens_k, out, lse, workspace = (
        checks.arrays_in_place(
            handle,
            page_table=page_table,
            seqlens_k=seqlens_k,
            q=q,
            k=k,
            v=v,
            mask=mask,
            bias=bias,
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k=cu_seqlens_k,
            out=out,
            lse=lse,
            workspace=workspace,
        )
    )
    is_packed = not (cu_seqlens_q is None and cu_seqlens_k is None) and page_table is None and seqlens_k is None
    keys = grouping = None
    if grouping_options is not None and isinstance(k, GroupedKeys | GroupedPages):
        keys = k
        checks.check_options_of_grouped_keys(
            keys,
            scale=scale,
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k=cu_seqlens_k,
            page_table=page_table,
            seqlens_k=seqlens_k,
            **{name: option for name, option in grouping_options.items() if name != "seed"},
        )
        scale = keys.scale
    elif grouping_options is not None:
        grouping = checks.check_grouping(q, **grouping_options, axes=3 if is_packed else 4)
    if page_table is not None:
        checks.check_no_info("page_table", return_info)
    checks.check_backend_name(backend)
    problem = checks.check_call(
        q,
        k,
        v,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        page_table=page_table,
        seqlens_k=seqlens_k,
        causal=causal,
        window=window,
        scale=scale,
        softcap=softcap,
        mask=mask,
        bias=bias,
        layout=layout,
        out=out,
        grouping=grouping,
        keys_are_grouped=keys is not None,
    )
    lent = backends.Lent(handle, None if workspace is _MEASURE else workspace, lse, return_lse)
    checks.check_lent(
        q,
        stream=stream,
        workspace=lent.workspace,
        lse=lse,
        lse_shape=problem.lse_shape,
        return_info=return_info,
        others={"q": q, "k": None if keys is not None else k, "v": v, "mask": mask, "bias": bias, "out": out}
        | {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}
        | {"page_table": page_table, "seqlens_k": seqlens_k},
    )
    chosen = backends.load(backend, like=q)
    if keys is not None:  # before a device is looked for
        chosen.refuse(problem, q)
        are_pages = isinstance(keys, GroupedPages)
        kinds = chosen.kinds_of_grouped_pages if are_pages else chosen.kinds_of_grouped_keys
        checks.check_kind_of_grouped_keys(q, keys, chosen.name, kinds)
    tables = backends.ScoreTables(mask, bias)
    if workspace is _MEASURE:
        return chosen.workspace_bytes(problem, q, k, v, out, tables, lent, page_table, seqlens_k)
    asked_size = None if grouping_options is None else grouping_options["block_size"]
    info: AttentionInfo | None = None
    if isinstance(problem, PagedProblem):
        result, lse = chosen.paged_attention(problem, q, k, v, out, page_table, seqlens_k, lent)
    elif isinstance(problem, RaggedProblem):
        result, lse, blocks = chosen.ragged_attention(problem, q, k, v, out, cu_seqlens_q, cu_seqlens_k, lent)
        info = _info_of_blocks(problem.packed, blocks or (None, None), asked_size)
    else:
        result, lse, maps = chosen.attention(problem, q, k, v, out, tables, lent)
        if return_info:
            info = _info(problem, chosen, maps, q, asked_size) if keys is None else _info_of_grouped_keys(k)
    results = [result if given_out is None else given_out]
    if return_lse:
        results.append(lse if given_lse is None else given_lse)
    if return_info:
        results.append(info)
    return tuple(results) if len(results) > 1 else results[0]


def workspace_size(q: Any, k: Any, v: Any, *, backend: str | None = None, **options: Any) -> int:
    """Return the bytes of ``workspace`` that `distr_attention` needs for a call with these arguments.

    Parameters
    ----------
    q, k, v : array or description
        As in the call. Only shapes, strides, dtypes, addresses and the device are read. What has a shape and a dtype
        and no memory, such as a ``jax.ShapeDtypeStruct``, stands for a contiguous array on the current device.
    backend : {"numpy", "cupy", "numba"}, optional
        Default: the one of the arrays' kind, "cupy" for descriptions. NumPy arrays with a GPU's backend are such.
    **options
        All others of `distr_attention`, as in the call; with ``group_size=1`` it is `exact_attention` that is measured.
        ``mask``, ``bias``, ``page_table``, ``seqlens_k``, ``out`` and ``lse`` may be descriptions too; without ``out``
        it is taken for contiguous.
        ``stream`` and ``workspace`` make no difference.

    Returns
    -------
    int
        The smallest size that the call takes; 0 for NumPy arrays, whose calls take no workspace.

    Raises
    ------
    TypeError, ValueError, ImportError, NotImplementedError
        What the call would raise.

    Notes
    -----
    It is the call itself that is run here, with launches left out, so both agree by construction. The size is larger
    with ``return_lse=False``, where the log-sum-exp has no place of its own. It depends on the device.

    Examples
    --------
    >>> import numpy as np
    >>> q, k, v = np.ones((3, 1, 2, 64, 32), dtype=np.float32)
    >>> workspace_size(q, k, v)
    0
    """
    named = ("mask", "bias", "out", "lse", "page_table", "seqlens_k")
    arrays = {name: options.get(name) for name in named} | {"q": q, "k": k, "v": v}
    arrays = {name: _described(x, place) for place, (name, x) in enumerate(arrays.items())}
    if backend is None and arrays["q"] is not q:
        backend = "cupy"
    size: int = distr_attention(**options | arrays | {"stream": None, "workspace": _MEASURE}, backend=backend)
    return size


def _described(array: Any, place: int) -> Any:
    """Return ``array``, or where it has no memory, an array like it at an address of its own."""
    has_memory = ("__dlpack__", "__cuda_array_interface__", "__array_interface__", "__array__")
    if isinstance(array, GroupedKeys | GroupedPages) or any(hasattr(array, name) for name in has_memory):
        return array
    try:
        shape, dtype = tuple(array.shape), np.dtype(array.dtype)
    except (AttributeError, TypeError):
        return array  # the call says what it is not
    return array_at((1 + place) * REGION, shape, dtype)


def _info(
    problem: Problem, backend: backends.Backend, maps: backends.Maps, like: Any, block_size: int | None
) -> AttentionInfo:
    """Return what a call did; ``block_size`` is what the caller asked for."""
    ranks = score_errors = None
    if isinstance(maps, SubspaceMaps):
        ranks, score_errors = (backend.hand_back(x, None, like=like, out=None) for x in (maps.ranks, maps.score_errors))
    return _info_of_blocks(problem, (ranks, score_errors), block_size)


def _info_of_blocks(problem: Problem, blocks: tuple[Any, Any], block_size: int | None) -> AttentionInfo:
    """Return what a call did with blocks of these ranks and score errors."""
    grouping = problem.grouping
    if grouping is None:
        return NOTHING_GROUPED
    if block_size is not None:
        reason = "given"
    elif isinstance(grouping, Subspace):
        _, reason = choose_block_size(problem.width, grouping.rank)
    else:
        reason = "the default of lsh"
    method = "subspace" if isinstance(grouping, Subspace) else "lsh"
    return AttentionInfo(method, grouping.block_size, reason, *blocks)


def _info_of_grouped_keys(keys: GroupedKeys) -> AttentionInfo:
    if keys.grouping is None:
        return NOTHING_GROUPED
    return AttentionInfo("subspace", keys.block_size, "that of the grouped keys", keys.ranks, keys.score_errors)
