"""Every error that a caller can meet, raised before anything is launched or written.

Text: ``<argument>: <rule>, got <what was handed over>``. ValueError: a value or shape that is wrong; TypeError: a wrong
kind of array or dtype; NotImplementedError: legal, but no kernel covers it.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Callable
from typing import Any

import numpy as np

from .arrays import (
    Unreadable,
    address,
    describe,
    in_place,
    is_declared_read_only,
    kind_of,
    overlaps_itself,
    share_memory,
    stream_handle,
)
from .block_size import choose_block_size
from .problem import Grouping, PagedProblem, Problem, RaggedProblem, Subspace, ceil_div

DTYPES = ("float16", "bfloat16", "float32", "float64")
MAX_WIDTH = 256
WORKSPACE_ALIGNMENT = 256
"""Bytes that a workspace starts at a multiple of, as CUDA's own allocations do."""
DEFAULT_BLOCK_SIZE = 1024
"""Rows per block of ``method="lsh"`` where the caller names none; docs/block_size.md says what the choice trades."""
PACKED = "nhd"
"""The layout of sequences that are told apart by their lengths: no batch axis. A caller cannot name it."""
FLOAT32_MAX = float(np.finfo(np.float32).max)
FLOAT32_TINY = float(np.finfo(np.float32).tiny)


PAGE_SIZES = (16, 32, 64, 128, 256)
"""Keys in a page."""

KIND_NAMES = {"U": "name", "f": "number", "iu": "integer"}
"""Of a scalar in a file, by the kinds of its dtype."""

WRITTEN = ("out", "lse", "workspace")
"""Arguments that a call writes to."""

Require = Callable[[bool, str], None]
"""Raises an error with a rule unless a condition holds."""


def arrays_in_place(stream: int | None = None, /, **named: Any) -> list[Any]:
    """Return the arguments as arrays of a known kind, without a copy; what is no array, as it is.

    They are ready on the stream with this handle, or on CuPy's current one.
    """
    arrays = []
    for name, given in named.items():
        try:
            arrays.append(in_place(given, stream))
            # NumPy's views say it themselves
            read_only = name in WRITTEN and kind_of(arrays[-1]) != "numpy" and is_declared_read_only(given)
        except ImportError as error:
            raise ImportError(_message(name, str(error), type(given).__name__)) from error
        except Exception as error:  # another package's own, of any type
            reason = str(error).partition("\n")[0]
            raise TypeError(
                _message(name, "must be readable without a copy", f"{type(given).__name__}: {reason}")
            ) from error
        if read_only:
            raise ValueError(_message(name, "must be writeable", f"read-only {type(given).__name__}"))
    return arrays


def check_call(
    q: Any,
    k: Any,
    v: Any,
    *,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    page_table: Any,
    seqlens_k: Any,
    **options: Any,
) -> Problem | RaggedProblem | PagedProblem:
    """Return the problem that the arguments describe; ``**options`` are those of `check_attention`."""
    if page_table is not None or seqlens_k is not None:
        _check_absent("page_table", cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
        return check_paged(q, k, v, page_table=page_table, seqlens_k=seqlens_k, **options)
    if cu_seqlens_q is None and cu_seqlens_k is None:
        return check_attention(q, k, v, **options)
    return check_ragged(q, k, v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, **options)


def check_paged(
    q: Any,
    k: Any,
    v: Any,
    *,
    page_table: Any,
    seqlens_k: Any,
    causal: bool | str,
    layout: str,
    out: Any,
    mask: Any,
    bias: Any,
    keys_are_grouped: bool = False,
    **options: Any,
) -> PagedProblem:
    """Return the problem of keys and values in pages, or raise the first error found.

    What the table and the lengths hold is checked where they lie on the host.
    """
    for name, given in (("page_table", page_table), ("seqlens_k", seqlens_k)):
        if given is None:
            raise ValueError(_message(name, "must be given with the other of page_table and seqlens_k", "None"))
    _check_absent("page_table", mask=mask, bias=bias)
    _check_int32("page_table", page_table, q, axes=2)
    _check_int32("seqlens_k", seqlens_k, q, axes=1)
    options |= {"keys_are_grouped": keys_are_grouped, "pages_of_sequence": page_table.shape[1]}
    problem = check_attention(q, k, v, causal=causal, layout=layout, out=out, **options)
    for name, given in (("page_table", page_table), ("seqlens_k", seqlens_k)):
        if given.shape[0] != problem.batch:
            raise ValueError(_message(name, f"must have q's batch size {problem.batch}", describe(given)))
    pages, _, page_size, _ = _bhnd_shape(k, layout)
    # reading them would make the host wait for the device; descriptions cannot be read
    if kind_of(page_table) == "numpy" and not isinstance(page_table, Unreadable):
        _check_pages(page_table, seqlens_k, pages, page_size, filled=k.filled if keys_are_grouped else None)
    if out is not None:
        _check_apart("out", out, {"page_table": page_table, "seqlens_k": seqlens_k})
    return PagedProblem(problem, page_size, is_top_left=causal == "top-left")


def check_ragged(
    q: Any,
    k: Any,
    v: Any,
    *,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    causal: bool | str,
    layout: str,
    out: Any,
    mask: Any,
    bias: Any,
    **options: Any,
) -> RaggedProblem:
    """Return the problem of packed sequences, or raise the first error found.

    The values of the lengths are checked where they lie on the host.
    """
    for name, lengths in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if lengths is None:
            raise ValueError(_message(name, "must be given with the other cu_seqlens", "None"))
    if not (isinstance(layout, str) and layout == "bhnd"):
        raise ValueError(_message("layout", "must be 'bhnd', the default, with cu_seqlens_q", _show(layout)))
    _check_absent("cu_seqlens_q", mask=mask, bias=bias)
    packed = check_attention(q, k, v, causal=causal, layout=layout, out=out, is_packed=True, **options)
    _check_lengths("cu_seqlens_q", cu_seqlens_q, q, f"q's {packed.queries} rows", packed.queries)
    _check_lengths("cu_seqlens_k", cu_seqlens_k, q, f"k's {packed.keys} rows", packed.keys)
    elements = cu_seqlens_q.shape[0]
    if cu_seqlens_k.shape[0] != elements:
        raise ValueError(
            _message("cu_seqlens_k", f"must have cu_seqlens_q's {elements} elements", describe(cu_seqlens_k))
        )
    if cu_seqlens_k.dtype != cu_seqlens_q.dtype:
        rule = f"must have cu_seqlens_q's dtype {cu_seqlens_q.dtype}"
        raise TypeError(_message("cu_seqlens_k", rule, describe(cu_seqlens_k)))
    if out is not None:
        _check_apart("out", out, {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k})
    return RaggedProblem(packed, elements - 1, is_top_left=causal == "top-left")


def check_attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    causal: bool | str,
    scale: float | None,
    layout: str,
    out: Any,
    grouping: Grouping | Subspace | None,
    window: Any = None,
    softcap: float = 0.0,
    mask: Any = None,
    bias: Any = None,
    keys_are_grouped: bool = False,
    is_packed: bool = False,
    pages_of_sequence: int | None = None,
) -> Problem:
    """Return the problem that the arguments describe, or raise the first error found.

    ``keys_are_grouped``: ``k`` is a `GroupedKeys`. ``is_packed``: q, k, v and out are (rows, heads, width), and the
    problem is that of a batch of one. ``pages_of_sequence``: k and v are pages, and a sequence has so many.
    """
    if is_packed:
        layout = PACKED
    else:
        _check_choice("layout", layout, "bhnd", "bnhd")
    named = {"q": q, "v": v} if keys_are_grouped else {"q": q, "k": k, "v": v}
    if out is not None:
        named["out"] = out
    for name, array in named.items():
        _check_array(name, array, q, axes=3 if is_packed else 4)
    if keys_are_grouped:
        if k.dtype != q.dtype:
            raise TypeError(_message("k", f"must have q's dtype {q.dtype}", _show(k)))
        if k.layout != layout:
            raise ValueError(_message("layout", f"must be {k.layout!r}, as of the keys", _show(layout)))
    batch, heads, queries, width = _bhnd_shape(q, layout)
    k_batch, kv_heads, keys, k_width = _bhnd_shape(k, layout)
    v_batch, v_heads, v_keys, value_width = _bhnd_shape(v, layout)
    if pages_of_sequence is not None:
        _check_page_size(k, keys)
        if v_batch != k_batch:
            raise ValueError(_message("v", f"must have k's {k_batch} pages", describe(v)))
        if v_keys != keys:
            raise ValueError(_message("v", f"must have k's page size {keys}", describe(v)))
        k_batch = v_batch = batch
        keys = v_keys = keys * pages_of_sequence
    for name, array in (("q", q), ("v", v)):
        _check_width(name, array)
    if k_batch != batch:
        raise ValueError(_message("k", f"must have q's batch size {batch}", _show(k)))
    if v_batch != batch:
        raise ValueError(_message("v", f"must have q's batch size {batch}", describe(v)))
    if k_width != width:
        raise ValueError(_message("k", f"must have q's width {width}", _show(k)))
    if not _can_share(heads, kv_heads):
        raise ValueError(_message("k", f"the number of heads must divide q's {heads}", _show(k)))
    if v_heads != kv_heads:
        raise ValueError(_message("v", f"must have k's {kv_heads} heads", describe(v)))
    if v_keys != keys:
        raise ValueError(_message("v", f"must have k's {keys} rows", describe(v)))
    scores = (batch, heads, queries, keys)
    if mask is not None:
        named["mask"] = mask
        _check_broadcast("mask", mask, q, scores, "bool")
    if bias is not None:
        named["bias"] = bias
        _check_broadcast("bias", bias, q, scores, q.dtype.name, "float32")
    if out is not None:
        _check_out(out, named, _in_layout((batch, heads, queries, value_width), layout))
    return Problem(
        batch=batch,
        heads=heads,
        kv_heads=kv_heads,
        queries=queries,
        keys=keys,
        width=width,
        value_width=value_width,
        dtype=q.dtype,
        scale=_check_scale(scale, width),
        causal_offset=_check_causal(causal, queries, keys),
        layout="bhnd" if layout == "bhnd" else "bnhd",
        grouping=_shorten_block(grouping, queries, keys),
        window=_check_window(window, queries + keys),
        softcap=_check_softcap(softcap),
    )


def check_grouping(
    q: Any,
    *,
    method: str,
    group_size: int | None = None,
    rank: int | None = None,
    score_tol: float | None = None,
    refine: int = 1,
    fusion: str | None = None,
    group_by: str | None = None,
    block_size: int | None = None,
    seed: int = 0,
    name: str = "q",
    axes: int = 4,
) -> Grouping | Subspace | None:
    """Return the grouping that the options describe, None where they ask for exact attention, or raise.

    ``name`` is the argument that ``q`` came in as, ``axes`` how many it must have.
    """
    _check_choice("method", method, "subspace", "lsh")
    if group_by is not None:
        _check_choice("group_by", group_by, "queries", "keys")
    if block_size is not None:
        block_size = _check_integer("block_size", block_size, at_least=1)
    refine = _check_integer("refine", refine, at_least=0)
    seed = _check_integer("seed", seed, at_least=0)
    _check_array(name, q, q, name, axes)
    width = q.shape[axes - 1]
    if method == "lsh":
        _check_absent("method='lsh'", rank=rank, score_tol=score_tol)
        if fusion is not None:
            _check_choice("fusion", fusion, "sum", "lstsq")
        group_size = _check_group_size(group_size, width)
        if group_size == 1:
            return None
        return Grouping(
            group_size=group_size,
            block_size=block_size or DEFAULT_BLOCK_SIZE,
            by="keys" if group_by == "keys" else "queries",
            fusion="lstsq" if fusion == "lstsq" else "sum",
            seed=seed,
        )
    _check_absent("method='subspace'", fusion=fusion)
    if group_size is not None:
        _check_absent("group_size", rank=rank, score_tol=score_tol)
    if rank is not None:
        _check_absent("rank", score_tol=score_tol)
        _check_integer("rank", rank, at_least=1)
        if rank > width:
            raise ValueError(_message("rank", f"must be at most the width {width}", str(rank)))
        rank = int(rank)
    elif score_tol is not None:
        score_tol = _check_score_tol(score_tol)
    else:
        rank = width // _check_group_size(group_size, width)
    if rank == width:
        return None
    return Subspace(
        rank=rank,
        score_tol=score_tol,
        refine=refine,
        block_size=block_size or choose_block_size(width, rank)[0],
        by="queries" if group_by == "queries" else "keys",
    )


def check_group_keys(
    k: Any, q: Any, *, scale: float | None, layout: str, score_tol: float | None, **options: Any
) -> tuple[Subspace | None, float]:
    """Return how `group_keys` groups, None where every key is kept as it is, and the scale; or raise."""
    _check_choice("layout", layout, "bhnd", "bnhd")
    _check_array("k", k, k, "k")
    check_dtype_of_grouped_keys("k", k.dtype.name, str(kind_of(k)), describe(k))
    batch, kv_heads, _, width = _bhnd_shape(k, layout)
    _check_width("k", k)
    if q is not None:
        _check_array("q", q, k, "k")
        q_batch, heads, rows, q_width = _bhnd_shape(q, layout)
        if q_batch != batch:
            raise ValueError(_message("q", f"must have k's batch size {batch}", describe(q)))
        if q_width != width:
            raise ValueError(_message("q", f"must have k's width {width}", describe(q)))
        if not _can_share(heads, kv_heads) or (kv_heads and not heads):
            raise ValueError(_message("q", f"the number of heads must be a multiple of k's {kv_heads}", describe(q)))
        if rows == 0:
            raise ValueError(_message("q", "must have a row", describe(q)))
    elif score_tol is not None:
        raise ValueError(_message("q", "must be given with score_tol", _show(q)))
    grouping = check_grouping(k, method="subspace", score_tol=score_tol, name="k", **options)
    # only lsh has another kind of grouping
    return grouping if isinstance(grouping, Subspace) else None, _check_scale(scale, width)


def check_group_pages(k: Any, q: Any, *, pages: int, tails: int, block_size: int, **options: Any) -> Any:
    """Return how `group_pages` groups, and the scale; or raise."""
    for name, number in (("pages", pages), ("tails", tails)):
        _check_integer(name, number, at_least=1)
    if not (isinstance(block_size, numbers.Integral) and block_size in PAGE_SIZES):
        raise ValueError(_message("block_size", f"must be one of {', '.join(map(str, PAGE_SIZES))}", _show(block_size)))
    grouping, scale = check_group_keys(k, q, score_tol=None, block_size=int(block_size), **options)
    if k.shape[0] != 1:
        raise ValueError(_message("k", "must have a batch size of 1", describe(k)))
    if k.shape[1 if options["layout"] == "bhnd" else 2] == 0:
        raise ValueError(_message("k", "must have a head", describe(k)))
    if grouping is None:
        raise ValueError(_message("rank", f"must be less than the width {k.shape[3]}", str(k.shape[3])))
    return grouping, scale


def check_appended_to_pages(k: Any, page_table: Any, seqlens_k: Any, pages: Any) -> None:
    """Raise unless ``k`` can be appended to sequences in `GroupedPages`; what the pages hold is not looked at."""
    batch = k.shape[0] if kind_of(k) is not None and len(k.shape) == 4 else 0
    check_appended(k, pages, batch)
    for name, array, axes in (("page_table", page_table, 2), ("seqlens_k", seqlens_k, 1)):
        if kind_of(array) != "numpy":
            rule = "must be a NumPy array, for the host says which pages are finished"
            raise TypeError(_message(name, rule, _show(array) if kind_of(array) is None else describe(array)))
        _check_int32(name, array, array, axes=axes)
        if array.shape[0] != batch:
            raise ValueError(_message(name, f"must have k's batch size {batch}", describe(array)))
    rows = k.shape[1 if pages.layout == "bnhd" else 2]
    # in 64 bits, which the sum fits
    _check_pages(page_table, seqlens_k.astype(np.int64), len(pages.filled), pages.page_size, more=rows)


def check_filled(page: int, keys: int, wanted: int, b: int) -> None:
    """Raise unless the last page of a sequence has the keys that the length of the sequence says."""
    if keys != wanted:
        raise ValueError(_message("seqlens_k", f"page {page} has {keys} keys", f"{wanted} for sequence {b}"))


def check_free_tail(free: list[int], tails: int) -> None:
    """Raise if no place is left for the keys of an unfinished page."""
    if not free:
        raise ValueError(_message("k", f"at most {tails} pages can be unfinished, as tails says", "one more"))


def check_released(pages: Any, count: int) -> list[int]:
    """Return the numbers of pages as a list, or raise."""
    try:
        given = list(pages)
    except TypeError as error:
        raise TypeError(_message("pages", "must be some integers", _show(pages))) from error
    for page in given:
        if not (_is_count(page) and page < count):
            raise ValueError(_message("pages", f"must be 0 to {count - 1}", _show(page)))
    return [int(page) for page in given]


def check_appended(k: Any, keys: Any, batch: int | None = None) -> None:
    """Raise unless ``k`` can be appended to the `GroupedKeys`, or in batches of this size to `GroupedPages`."""
    _check_array("k", k, k, "k")
    if kind_of(k) != keys.kind:
        raise TypeError(_message("k", f"must be a {keys.kind} array, as the keys so far", describe(k)))
    if _device_of(k) != keys.device:
        rule = f"must be on the device {keys.device} of the keys so far"
        raise ValueError(_message("k", rule, f"{describe(k)} on device {_device_of(k)}"))
    if k.dtype != keys.dtype:
        raise TypeError(_message("k", f"must have the dtype {keys.dtype} of the keys so far", describe(k)))
    rows_axis = 1 if keys.layout == "bnhd" else 2
    wanted = list(keys.shape)
    if batch is not None:
        wanted[0] = batch
    wanted[rows_axis] = k.shape[rows_axis]
    if list(k.shape) != wanted:
        free = {rows_axis} if batch is None else {0, rows_axis}
        shape = ", ".join("any" if axis in free else str(size) for axis, size in enumerate(wanted))
        raise ValueError(_message("k", f"must have shape ({shape})", describe(k)))


def check_saved_keys(file: Any, arrays: dict[str, np.ndarray], fmt: int) -> None:
    """Raise unless ``arrays`` are what `GroupedKeys.save` wrote to ``file``, whole and of one size."""
    require = _requirement(file)
    names = {"format", "dtype", "layout", "scale", "tail"}
    require(names <= set(arrays), f"must be one that GroupedKeys.save wrote, with {', '.join(sorted(names))}")
    optional = {"query_gram": {"query_rows"}, "rank": {"score_tol", "refine", "block_size"}}
    optional["widths"] = optional["rank"] | {"rank", "sampled", "fusion", "mean", "ranks", "score_errors"}
    for name, others in optional.items():
        require(name not in arrays or others <= set(arrays), f"must hold {', '.join(sorted(others))} with {name}")
    kinds = {"dtype": "U", "layout": "U", "scale": "f", "score_tol": "f"}
    kinds |= dict.fromkeys(("block_size", "format", "query_rows", "rank", "refine"), "iu")
    stored = _check_header(require, arrays, fmt, {name: kind for name, kind in kinds.items() if name in arrays})
    found = arrays["tail"].shape
    require(len(found) == 4, f"tail must have shape (B, H_kv, rows, D) and not {found}")
    batch, heads, rows, width = found
    require(1 <= width <= MAX_WIDTH, f"tail must have 1 to {MAX_WIDTH} columns and not {width}")
    wanted: dict[str, tuple[tuple[int, ...], str]] = {"tail": ((batch, heads, rows, width), stored)}
    if "query_gram" in arrays:
        wanted["query_gram"] = ((batch, heads, width, width), "float64")
        require(int(arrays["query_rows"]) >= 1, "query_rows must be at least 1")
    if "rank" in arrays:
        rank, score_tol, block_size = int(arrays["rank"]), float(arrays["score_tol"]), int(arrays["block_size"])
        require(block_size >= 1, "block_size must be at least 1")
        require(rows <= block_size, "the tail must be no longer than a block")
        require(int(arrays["refine"]) >= 0, "refine must be at least 0")
        of_rank, of_tolerance = 0 < rank < width and score_tol == 0, rank == 0 and 0 < score_tol <= FLOAT32_MAX
        require(of_rank or of_tolerance, "must hold a rank less than the width or a score_tol, and 0 for the other")
    if "widths" in arrays:
        widths = arrays["widths"]
        require(widths.ndim == 1 and widths.dtype.kind in "iu" and len(widths) > 0, "widths must be some integers")
        require(bool(((widths >= 0) & (widths <= width)).all()), f"widths must be 0 to {width}")
        columns, blocks = int(widths.sum()), len(widths)
        wanted |= {
            "sampled": ((batch, heads, block_size, columns), stored),
            "fusion": ((batch, heads, width, columns), stored),
            "mean": ((batch, heads, width, blocks), stored),
            "ranks": ((batch, heads, blocks), "int32"),
            "score_errors": ((batch, heads, blocks), "float64"),
        }
    _check_contents(require, arrays, wanted)


def check_saved_pages(file: Any, arrays: dict[str, np.ndarray], fmt: int) -> None:
    """Raise unless ``arrays`` are what `GroupedPages.save` wrote to ``file``, whole and of one size."""
    require = _requirement(file)
    scalars = {"format": "iu", "dtype": "U", "layout": "U", "scale": "f", "rank": "iu", "refine": "iu"}
    pools = {"sampled", "maps", "ranks", "score_errors", "tails", "tail_of", "filled"}
    names = {*scalars, *pools}
    require(names <= set(arrays), f"must be one that GroupedPages.save wrote, with {', '.join(sorted(names))}")
    require("query_gram" not in arrays or "query_rows" in arrays, "must hold query_rows with query_gram")
    if "query_gram" in arrays:
        scalars["query_rows"] = "iu"
    stored = _check_header(require, arrays, fmt, scalars)
    require(int(arrays["refine"]) >= 0, "refine must be at least 0")
    found = arrays["tails"].shape
    require(len(found) == 4, f"tails must have shape (places, H_kv, S, D) and not {found}")
    places, heads, size, width = found
    require(places > 0, "must hold a tail")
    require(size in PAGE_SIZES, f"the page size must be one of {', '.join(map(str, PAGE_SIZES))}")
    require(1 <= width <= MAX_WIDTH, f"tails must have 1 to {MAX_WIDTH} columns and not {width}")
    rank, pages = int(arrays["rank"]), arrays["filled"].size
    require(0 < rank < width, "must hold a rank less than the width")
    wanted: dict[str, tuple[tuple[int, ...], str]] = {
        "tails": (found, stored),
        "sampled": ((pages, heads, size, rank), stored),
        "maps": ((pages, heads, rank + 1, width), stored),
        "ranks": ((pages, heads), "int32"),
        "score_errors": ((pages, heads), "float64"),
        "tail_of": ((pages,), "int32"),
        "filled": ((pages,), "int32"),
    }
    if "query_gram" in arrays:
        wanted["query_gram"] = ((1, heads, width, width), "float64")
        require(int(arrays["query_rows"]) >= 1, "query_rows must be at least 1")
    _check_contents(require, arrays, wanted)
    filled, tail_of = arrays["filled"], arrays["tail_of"]
    require(bool(((filled >= 0) & (filled <= size)).all()), f"filled must be 0 to {size}")
    unfinished = tail_of[tail_of != -1]
    require(bool(((unfinished >= 0) & (unfinished < places)).all()), f"tail_of must be -1 to {places - 1}")
    require(len(np.unique(unfinished)) == len(unfinished), "no two pages may have one tail")
    has_tail = (filled > 0) & ((filled < size) | (tail_of >= 0))
    require(bool((has_tail == (tail_of >= 0)).all()), "pages that are not full, and no empty ones, must have a tail")


def check_kind_to_load(kind: str) -> None:
    """Raise unless `GroupedKeys` and `GroupedPages` of this kind of arrays can be loaded."""
    _check_choice("kind", kind, "numpy", "cupy", "numba")


def check_dtype_of_grouped_keys(name: str, dtype: str, kind: str, got: str) -> None:
    """Raise unless there are grouped keys of this kind of arrays with this dtype; ``name`` is where they come from."""
    if kind == "numba" and dtype == "bfloat16":
        raise NotImplementedError(_message(name, "grouped keys of numba arrays are not built for bfloat16 yet", got))


def check_options_of_grouped_keys(
    keys: Any, *, method: str, refine: int, scale: float | None, page_table: Any, seqlens_k: Any, **options: Any
) -> None:
    """Raise unless a call leaves to the `GroupedKeys` or `GroupedPages` what they were made with."""
    called = keys.called
    if not (isinstance(method, str) and method == "subspace"):
        raise ValueError(_message("method", f"must be 'subspace' with {called}", _show(method)))
    tables = {"page_table": page_table, "seqlens_k": seqlens_k}
    if called == "GroupedPages":
        for name, table in tables.items():
            if table is None:
                raise ValueError(_message(name, f"must be given with {called}", "None"))
    else:
        options |= tables
    _check_absent(called, **options)
    if _check_integer("refine", refine, at_least=0) != 1:
        raise ValueError(_message("refine", f"must be 1, the default, with {called}", _show(refine)))
    if scale is not None and _check_scale(scale, 1) != keys.scale:
        raise ValueError(_message("scale", f"must be None or the {keys.scale} of the keys", _show(scale)))


def check_kind_of_grouped_keys(q: Any, keys: Any, backend: str, kinds: frozenset[str]) -> None:
    """Raise unless a backend that takes grouped keys, or pages of them, of these kinds can attend to ``keys``."""
    if keys.kind != kind_of(q):
        raise TypeError(_message("k", f"must hold {kind_of(q)} arrays, as q is", str(keys)))
    if keys.kind not in kinds:
        rule = f"{keys.called} are not built for the {backend} backend yet"
        if kinds:
            rule = f"the {backend} backend takes {keys.called} of {' and '.join(sorted(kinds))} arrays"
        raise NotImplementedError(_message("k", rule, str(keys)))
    if keys.device != _device_of(q):
        raise ValueError(_message("k", f"must be on q's device {_device_of(q)}", f"{keys} on device {keys.device}"))


def check_merge(out_a: Any, lse_a: Any, out_b: Any, lse_b: Any, *, layout: str, stream: Any) -> None:
    """Raise the first error found in the arguments of `merge`."""
    _check_choice("layout", layout, "bhnd", "bnhd")
    _check_array("out_a", out_a, out_a, "out_a")
    _check_array("out_b", out_b, out_a, "out_a")
    if tuple(out_b.shape) != tuple(out_a.shape):
        raise ValueError(_message("out_b", f"must have out_a's shape {tuple(out_a.shape)}", describe(out_b)))
    if out_a.shape[3] == 0:
        raise ValueError(_message("out_a", "the last axis must not be empty", describe(out_a)))
    rows = _bhnd_shape(out_a, layout)[:3]
    for name, lse in (("lse_a", lse_a), ("lse_b", lse_b)):
        _check_lse(name, lse, out_a, "out_a", rows)
    check_stream_of(out_a, stream)


def check_pooling(k: Any, v: Any, *, size: Any, layout: str) -> int:
    """Return the size of a cluster, or raise the first error found in the arguments of `pool_keys`."""
    _check_choice("layout", layout, "bhnd", "bnhd")
    _check_arithmetic("k", k)
    for name, array in (("k", k), ("v", v)):
        _check_array(name, array, k, "k")
        _check_width(name, array)
    for axis, what in enumerate(("batch size", "heads", "rows")):
        wanted, found = (_bhnd_shape(x, layout)[axis] for x in (k, v))
        if found != wanted:
            raise ValueError(_message("v", f"must have k's {what}, {wanted}", describe(v)))
    return _check_integer("size", size, at_least=1)


def check_projection(v: Any, *, rank: Any, layout: str) -> int:
    """Return the rank, or raise the first error found in the arguments of `project_values`."""
    _check_choice("layout", layout, "bhnd", "bnhd")
    _check_arithmetic("v", v)
    _check_array("v", v, v, "v")
    _check_width("v", v)
    if not (_is_count(rank, 1) and rank <= v.shape[3]):
        raise ValueError(_message("rank", f"must be an integer of 1 to {v.shape[3]}", _show(rank)))
    return int(rank)


def check_restoring(out: Any, lse: Any, *, values: Any, layout: str) -> None:
    """Raise the first error found in the arguments of `ProjectedValues.restore`."""
    _check_kind("out", out, values, "v")
    _check_array("out", out, out, "out")
    batch, heads, rows, width = _bhnd_shape(out, layout)
    v_batch, kv_heads, _, rank = _bhnd_shape(values, layout)
    if batch != v_batch:
        raise ValueError(_message("out", f"must have v's batch size {v_batch}", describe(out)))
    if not _can_share(heads, kv_heads):
        raise ValueError(_message("out", f"v's {kv_heads} heads must divide the number of heads", describe(out)))
    if width != rank:
        raise ValueError(_message("out", f"must have the width of the projected values, {rank}", describe(out)))
    if lse is not None:
        _check_lse("lse", lse, out, "out", (batch, heads, rows))


def _check_arithmetic(name: str, array: Any) -> None:
    """Raise unless there are array operations for this kind."""
    if kind_of(array) not in ("numpy", "cupy"):
        raise TypeError(_message(name, "must be a NumPy or CuPy array", describe(array)))


def check_stream(stream: Any) -> int | None:
    """Return the handle of ``stream``; None where the call runs on the current one."""
    if stream is None:
        return None
    try:
        return stream_handle(stream)
    except (TypeError, ValueError) as error:
        raise type(error)(_message("stream", str(error), _show(stream))) from error


def check_stream_of(array: Any, stream: Any) -> None:
    """Raise where a call on host arrays is given a stream."""
    if stream is not None and kind_of(array) == "numpy":
        raise ValueError(_message("stream", "must be None with NumPy arrays", _show(stream)))


def check_lent(
    q: Any,
    *,
    stream: Any,
    workspace: Any,
    lse: Any,
    lse_shape: tuple[int, ...],
    return_info: bool = False,
    others: dict[str, Any],
) -> None:
    """Raise unless the call can run on this stream, in this workspace, and write this lse; ``others`` are its arrays.

    `check_workspace_size` follows, once the backend is known.
    """
    others = {name: array for name, array in others.items() if array is not None}
    check_stream_of(q, stream)
    if workspace is not None and kind_of(q) == "numpy":
        raise ValueError(_message("workspace", "must be None with NumPy arrays", _show(workspace)))
    if lse is not None:
        _check_lse("lse", lse, q, "q", lse_shape)
        _check_plain_memory("lse", lse, 4)
        _check_apart("lse", lse, others)
        others["lse"] = lse
    if workspace is not None:
        _check_kind("workspace", workspace, q)
        if workspace.dtype != np.uint8:
            raise TypeError(_message("workspace", "the dtype must be uint8", describe(workspace)))
        if len(workspace.shape) != 1:
            raise ValueError(_message("workspace", "must have one axis", describe(workspace)))
        _check_plain_memory("workspace", workspace, WORKSPACE_ALIGNMENT)
        _check_apart("workspace", workspace, others)
        check_no_info("workspace, which has no room for it", return_info)


def check_no_info(given: str, return_info: bool) -> None:
    """Raise where a call with ``given`` is asked what it did."""
    if return_info:
        raise ValueError(_message("return_info", f"must be False with {given}", "True"))


def check_workspace_size(workspace: Any, needed: int) -> None:
    """Raise unless a workspace has as many bytes as its call needs."""
    if workspace.shape[0] < needed:
        raise ValueError(_message("workspace", f"must have at least {needed} bytes", describe(workspace)))


def check_flags(**flags: bool) -> None:
    """Raise unless what a call is asked to return beside its result is said by True or False."""
    for name, flag in flags.items():
        if not isinstance(flag, bool | np.bool_):
            raise ValueError(_message(name, "must be True or False", _show(flag)))


def check_backend_name(name: str | None) -> None:
    """Raise unless ``name`` is one of the backends."""
    if name is not None:
        _check_choice("backend", name, "numpy", "cupy", "numba")


def _message(argument: str, rule: str, got: str) -> str:
    return f"{argument}: {rule}, got {got}"


def _show(value: Any) -> str:
    return repr(value) if kind_of(value) is None else describe(value)


def _requirement(file: Any) -> Require:
    """Return a function that raises an error about ``file`` with this rule, unless the condition holds."""

    def require(condition: bool, rule: str) -> None:
        if not condition:
            raise ValueError(_message("file", rule, str(file)))

    return require


def _check_header(require: Require, arrays: dict[str, np.ndarray], fmt: int, scalars: dict[str, str]) -> str:
    """Return the dtype that keys are stored in; ``scalars``: the kinds of those that the file must hold."""
    for name, kinds in scalars.items():
        is_one = arrays[name].shape == () and arrays[name].dtype.kind in kinds
        require(is_one, f"{name} must be one {KIND_NAMES[kinds]}")
    require(int(arrays["format"]) == fmt, f"must be of format {fmt}")
    require(str(arrays["dtype"]) in DTYPES, f"the dtype must be one of {', '.join(DTYPES)}")
    require(str(arrays["layout"]) in ("bhnd", "bnhd"), "the layout must be 'bhnd' or 'bnhd'")
    require(bool(abs(arrays["scale"]) <= FLOAT32_MAX), "the scale must be a finite number in the range of float32")
    return "uint16" if arrays["dtype"] == "bfloat16" else str(arrays["dtype"])


def _check_contents(
    require: Require, arrays: dict[str, np.ndarray], wanted: dict[str, tuple[tuple[int, ...], str]]
) -> None:
    for name, (shape, dtype) in wanted.items():
        array = arrays[name]
        require(array.shape == shape, f"{name} must have shape {shape} and not {array.shape}")
        require(array.dtype == dtype, f"{name} must have dtype {dtype} and not {array.dtype}")


def _check_choice(name: str, value: Any, *choices: str) -> None:
    if not (isinstance(value, str) and value in choices):
        *others, last = map(repr, choices)
        rule = f"must be {', '.join(others)} or {last}" if others else f"must be {last}"
        raise ValueError(_message(name, rule, _show(value)))


def _check_kind(name: str, array: Any, q: Any, first: str = "q") -> None:
    """Raise unless ``array`` is of the kind and on the device of ``q``, the argument named ``first``."""
    if kind_of(array) is None:
        raise TypeError(_message(name, "must be a NumPy, CuPy or Numba device array", describe(array)))
    if kind_of(array) != kind_of(q):
        raise TypeError(_message(name, f"must be a {kind_of(q)} array, as {first} is", describe(array)))
    if _device_of(array) != _device_of(q):
        rule = f"must be on {first}'s device {_device_of(q)}"
        raise ValueError(_message(name, rule, f"{describe(array)} on device {_device_of(array)}"))


def _check_array(name: str, array: Any, q: Any, first: str = "q", axes: int = 4) -> None:
    _check_kind(name, array, q, first)
    if len(array.shape) != axes:
        raise ValueError(_message(name, f"must have {axes} axes", describe(array)))
    if array.dtype.name not in DTYPES or not np.dtype(array.dtype).isnative:
        raise TypeError(_message(name, f"the dtype must be one of {', '.join(DTYPES)}", describe(array)))
    if array.dtype != q.dtype:
        raise TypeError(_message(name, f"must have {first}'s dtype {q.dtype}", describe(array)))
    _check_last_axis(name, array)
    _check_elements(name, array)


def _check_lse(name: str, lse: Any, like: Any, first: str, shape: tuple[int, ...]) -> None:
    """Raise unless ``lse`` is float32 of this shape, of the kind and on the device of the argument named ``first``."""
    _check_kind(name, lse, like, first)
    if lse.dtype != np.float32:
        raise TypeError(_message(name, "the dtype must be float32", describe(lse)))
    if tuple(lse.shape) != shape:
        axes = "(B, H, N)" if len(shape) == 3 else "(H, N)"
        raise ValueError(_message(name, f"must have shape {axes} = {shape}", describe(lse)))


def _can_share(heads: int, kv_heads: int) -> bool:
    """Whether each of the key heads can serve as many query heads."""
    return heads % kv_heads == 0 if kv_heads else heads == 0


def _check_width(name: str, array: Any) -> None:
    if not 1 <= array.shape[len(array.shape) - 1] <= MAX_WIDTH:
        raise ValueError(_message(name, f"the last axis must have 1 to {MAX_WIDTH} elements", describe(array)))


def _check_last_axis(name: str, array: Any) -> None:
    last = len(array.shape) - 1  # the shapes of Numba's simulator take no -1
    if array.shape[last] > 1 and 0 not in array.shape and array.strides[last] != array.dtype.itemsize:
        got = f"{describe(array)} with strides {tuple(array.strides)} bytes"
        raise ValueError(_message(name, "the last axis must be contiguous", got))


def _check_lengths(name: str, lengths: Any, q: Any, rows: str, total: int) -> None:
    """Raise unless ``lengths`` are cumulative lengths of sequences that hold ``total`` rows, ``rows`` in words."""
    _check_kind(name, lengths, q)
    if len(lengths.shape) != 1 or lengths.shape[0] == 0:
        raise ValueError(_message(name, "must have 1 axis of B + 1 elements", describe(lengths)))
    if lengths.dtype.name not in ("int32", "int64") or not np.dtype(lengths.dtype).isnative:
        raise TypeError(_message(name, "the dtype must be int32 or int64", describe(lengths)))
    _check_last_axis(name, lengths)
    _check_elements(name, lengths)
    if kind_of(lengths) != "numpy":  # reading them would make the host wait for the device
        return
    if lengths[0] != 0:
        raise ValueError(_message(name, "must begin with 0", str(lengths[0])))
    falls = np.flatnonzero(lengths[1:] < lengths[:-1])
    if len(falls):
        before, after = lengths[falls[0] : falls[0] + 2]
        raise ValueError(_message(name, "must not fall", f"{after} after {before}"))
    if lengths[-1] != total:
        raise ValueError(_message(name, f"must end with {rows}", str(lengths[-1])))


def _check_int32(name: str, array: Any, q: Any, *, axes: int) -> None:
    _check_kind(name, array, q)
    if len(array.shape) != axes:
        raise ValueError(_message(name, f"must have {axes} {'axis' if axes == 1 else 'axes'}", describe(array)))
    if array.dtype.name != "int32" or not np.dtype(array.dtype).isnative:
        raise TypeError(_message(name, "the dtype must be int32", describe(array)))
    _check_last_axis(name, array)
    _check_elements(name, array)


def _check_page_size(k: Any, page_size: int) -> None:
    if page_size not in PAGE_SIZES:
        rule = f"the page size must be one of {', '.join(map(str, PAGE_SIZES))}"
        raise ValueError(_message("k", rule, f"{page_size}: {describe(k)}"))


def _check_pages(
    page_table: np.ndarray, lengths: np.ndarray, pages: int, page_size: int, *, more: int = 0, filled: Any = None
) -> None:
    """Raise unless every entry that is used names a page; of a sequence as many are as its keys fill or begin.

    ``more`` keys are to come. ``filled``: the pages of `GroupedPages` have so many keys.
    """
    most = page_table.shape[1] * page_size
    for b, (row, length) in enumerate(zip(page_table, lengths.tolist(), strict=True)):
        if not 0 <= length <= most - more:
            rule = f"must be 0 to {most - more}, the keys that the pages of a sequence hold"
            if more:
                rule += f" less the {more} to come"
            raise ValueError(_message("seqlens_k", rule, f"{length} for sequence {b}"))
        used = row[: ceil_div(length + more, page_size)].tolist()
        wrong = [page for page in used if not 0 <= page < pages]
        if wrong:
            raise ValueError(_message("page_table", f"pages must be 0 to {pages - 1}", f"{wrong[0]} for sequence {b}"))
        for c, page in enumerate([] if filled is None else used):
            wanted = min(length - c * page_size, page_size)
            if filled[page] < wanted:
                rule = f"page {page} has {filled[page]} keys"
                raise ValueError(_message("seqlens_k", rule, f"{wanted} for sequence {b}"))


def _check_broadcast(name: str, array: Any, q: Any, shape: tuple[int, ...], *dtypes: str) -> None:
    """Raise unless ``array`` broadcasts to ``shape`` and has one of the dtypes."""
    _check_kind(name, array, q)
    if array.dtype.name not in dtypes or not np.dtype(array.dtype).isnative:
        raise TypeError(_message(name, f"the dtype must be {' or '.join(dict.fromkeys(dtypes))}", describe(array)))
    missing = len(shape) - len(array.shape)
    if missing < 0 or any(size not in (1, n) for size, n in zip(array.shape, shape[missing:], strict=True)):
        raise ValueError(_message(name, f"must broadcast to (B, H, N, M) = {shape}", describe(array)))
    _check_elements(name, array)


def _check_elements(name: str, array: Any) -> None:
    """Raise unless every element lies at a multiple of its size."""
    if any(stride % array.dtype.itemsize for stride in array.strides):
        got = f"{describe(array)} with strides {tuple(array.strides)} bytes"
        raise ValueError(_message(name, "strides must be multiples of the element size", got))
    if address(array) % array.dtype.itemsize:
        got = f"{describe(array)} at address {address(array):#x}"
        raise ValueError(_message(name, "the address must be a multiple of the element size", got))


def _check_out(out: Any, named: dict[str, Any], shape: tuple[int, ...]) -> None:
    if tuple(out.shape) != shape:
        raise ValueError(_message("out", f"must have shape {shape}", describe(out)))
    if kind_of(out) == "numpy" and not out.flags.writeable:
        raise ValueError(_message("out", "must be writeable", f"read-only {describe(out)}"))
    if overlaps_itself(out):
        got = f"{describe(out)} with strides {tuple(out.strides)} bytes"
        raise ValueError(_message("out", "elements must not share memory", got))
    _check_apart("out", out, {name: array for name, array in named.items() if name != "out"})


def _check_plain_memory(name: str, array: Any, alignment: int) -> None:
    """Raise unless ``array`` is contiguous memory that can be written, from a multiple of ``alignment`` bytes on."""
    if kind_of(array) == "numpy" and not array.flags.writeable:
        raise ValueError(_message(name, "must be writeable", f"read-only {describe(array)}"))
    step = array.dtype.itemsize
    for size, stride in zip(array.shape[::-1], array.strides[::-1], strict=True):
        if size > 1 and stride != step and 0 not in array.shape:  # the strides of an empty array mean nothing
            got = f"{describe(array)} with strides {tuple(array.strides)} bytes"
            raise ValueError(_message(name, "must be contiguous", got))
        step *= size
    if address(array) % alignment:
        got = f"{describe(array)} at address {address(array):#x}"
        raise ValueError(_message(name, f"the address must be a multiple of {alignment}", got))


def _check_apart(name: str, array: Any, others: dict[str, Any]) -> None:
    for other, given in others.items():
        if share_memory(array, given):
            raise ValueError(_message(name, f"must not share memory with {other}", describe(array)))


def _check_scale(scale: float | None, width: int) -> float:
    if scale is None:
        return 1 / math.sqrt(width)
    if isinstance(scale, numbers.Real) and not isinstance(scale, bool) and abs(scale) <= FLOAT32_MAX:
        return float(scale)
    raise ValueError(_message("scale", "must be a finite number in the range of float32", _show(scale)))


def _check_softcap(softcap: float) -> float:
    is_number = isinstance(softcap, numbers.Real) and not isinstance(softcap, bool)
    if is_number and (softcap == 0 or FLOAT32_TINY <= softcap <= FLOAT32_MAX):
        return float(softcap)
    raise ValueError(
        _message("softcap", "must be 0 or a positive finite number in the range of float32", _show(softcap))
    )


def _check_window(window: Any, rows: int) -> tuple[int | None, int | None]:
    """Return (left, right); no side is longer than ``rows``, so that numbers of any size stay within kernels' ints."""
    if window is None:
        return None, None
    sides = tuple(window) if isinstance(window, tuple | list) else ()
    if len(sides) != 2 or not all(side is None or _is_count(side) for side in sides):
        rule = "must be None or (left, right), each None or an integer of at least 0"
        raise ValueError(_message("window", rule, _show(window)))
    left, right = (None if side is None else min(int(side), rows) for side in sides)
    return left, right


def _check_group_size(group_size: int | None, width: int) -> int:
    size = 2 if group_size is None else _check_integer("group_size", group_size, at_least=1)
    if width % size:
        raise ValueError(_message("group_size", f"must divide the width {width}", str(size)))
    return size


def _check_score_tol(score_tol: float) -> float:
    is_number = isinstance(score_tol, numbers.Real) and not isinstance(score_tol, bool)
    if is_number and 0 < score_tol <= FLOAT32_MAX:
        return float(score_tol)
    raise ValueError(
        _message("score_tol", "must be a positive finite number in the range of float32", _show(score_tol))
    )


def _check_absent(given: str, **options: Any) -> None:
    for name, value in options.items():
        if value is not None:
            raise ValueError(_message(name, f"must be None with {given}", _show(value)))


def _check_causal(causal: bool | str, queries: int, keys: int) -> int | None:
    if isinstance(causal, bool | np.bool_):
        return keys - queries if causal else None
    if isinstance(causal, str) and causal in ("bottom-right", "top-left"):
        return keys - queries if causal == "bottom-right" else 0
    raise ValueError(_message("causal", "must be True, False, 'bottom-right' or 'top-left'", _show(causal)))


def _check_integer(name: str, value: Any, *, at_least: int) -> int:
    if not _is_count(value, at_least):
        raise ValueError(_message(name, f"must be an integer of at least {at_least}", _show(value)))
    return int(value)


def _is_count(value: Any, at_least: int = 0) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and int(value) >= at_least


def _shorten_block(grouping: Grouping | Subspace | None, queries: int, keys: int) -> Grouping | Subspace | None:
    """Return the grouping with no more rows a block than the arrays have, rounded up to whole default blocks.

    All rows are one block then as before, with the same hyperplanes; numbers of any size stay within the kernels' ints.
    """
    if grouping is None:
        return None
    rows = keys if grouping.by == "keys" else queries
    enough = DEFAULT_BLOCK_SIZE * max(ceil_div(rows, DEFAULT_BLOCK_SIZE), 1)
    return dataclasses.replace(grouping, block_size=min(grouping.block_size, enough))


def _bhnd_shape(array: Any, layout: str) -> tuple[int, int, int, int]:
    if layout == PACKED:
        n, h, d = array.shape
        return 1, h, n, d
    b, h, n, d = array.shape
    return (b, n, h, d) if layout == "bnhd" else (b, h, n, d)


def _in_layout(shape: tuple[int, int, int, int], layout: str) -> tuple[int, ...]:
    b, h, n, d = shape
    if layout == PACKED:
        return n, h, d
    return (b, n, h, d) if layout == "bnhd" else shape


def _device_of(array: Any) -> int:
    # CuPy: .device.id. A Numba array belongs to the context it was made in; NumPy has one device.
    return int(array.device.id) if kind_of(array) == "cupy" else 0
