"""What is fuzzed: anything at all as an argument, and any bytes as a file of grouped keys.

Each target is a Hypothesis test: test_targets.py runs it for a moment, ``python tests/fuzz`` for as long as wanted,
led by the branches that an input reaches.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

import ml_dtypes
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from distrattn_np import (
    GroupedKeys,
    GroupedPages,
    distr_attention,
    exact_attention,
    group_keys,
    group_pages,
    merge,
    pool_keys,
    project_values,
)

REFUSALS = (TypeError, ValueError, NotImplementedError)
"""What the docstrings name."""
DTYPES = ["float32", "float16", "float64", ml_dtypes.bfloat16, ">f4", "int32", "int64", "bool", "complex64", "S3", "O"]

numbers = st.one_of(
    st.integers(-2, 9),
    st.sampled_from([10**12, 10**400, -(2**63), 1.5, -0.0, 1e-310, 1e39, float("nan"), float("inf"), 1j, True, False]),
    st.sampled_from([np.int8(2), np.uint64(2**63), np.float16(0.5), np.longdouble("1e400"), np.bool_(True)]),
    st.sampled_from([Fraction(1, 3), Fraction(10**400), Decimal("0.5"), Decimal("nan")]),
)
RIGHT_NAMES = [
    "subspace",
    "lsh",
    "sum",
    "lstsq",
    "queries",
    "keys",
    "bhnd",
    "bnhd",
    "bottom-right",
    "top-left",
    "numpy",
]
names = st.sampled_from([*RIGHT_NAMES, "torch", "", "LSH", np.str_("keys"), b"keys"])


class Raising:
    """Something that calls itself an array and is none."""

    def __dlpack__(self, **_: Any) -> None:
        raise RuntimeError("out of reach\nfor now")

    def __dlpack_device__(self) -> tuple[int, int]:
        return (1, 0)


@st.composite
def any_array(draw: Any, sizes: tuple[int, ...] | None = None) -> np.ndarray:
    """Draw an array of these sizes, or of any; its dtype and its place in memory may be wrong."""
    if sizes is None:
        sizes = tuple(draw(st.lists(st.integers(0, 5), max_size=5)))
    dtype = np.dtype(draw(st.sampled_from(DTYPES)) if draw(st.integers(0, 7)) == 0 else "float32")
    array = np.arange(np.prod(sizes, dtype=int)).reshape(sizes).astype(np.float32).astype(dtype)
    if array.ndim == 0:
        return array
    match draw(st.integers(0, 15)):
        case 0:
            return np.asfortranarray(array)
        case 1:
            return array[::-1]
        case 2:
            return np.repeat(array, 2, axis=-1)[..., ::2]
        case 3:
            return np.broadcast_to(array[:1], array.shape) if len(array) else array
        case 4:
            return np.ma.masked_array(array)
        case 5:
            array.flags.writeable = False
            return array
        case 6 if not dtype.hasobject:
            return np.ndarray(array.shape, dtype, buffer=np.zeros(array.nbytes + 1, np.uint8), offset=1)
        case _:
            return array


anything = st.one_of(
    st.none(),
    numbers,
    names,
    any_array(),
    st.lists(st.one_of(st.none(), numbers), max_size=3),
    st.lists(st.one_of(st.none(), numbers), max_size=3).map(tuple),
    st.builds(Raising),
    st.just(memoryview(b"\0" * 8)),
    st.just(group_keys(np.ones((1, 1, 5, 4), np.float32), rank=2, block_size=2)),
)


@st.composite
def sometimes(draw: Any, right: st.SearchStrategy[Any], *, wrong: int = 12) -> Any:
    """Draw what is right, and one time in ``wrong`` anything."""
    return draw(anything if draw(st.integers(1, wrong)) == wrong else right)


@st.composite
def attention_arguments(draw: Any) -> tuple[Callable[..., Any], dict[str, Any]]:
    """Draw arguments of which a few, or none, are wrong."""
    H_kv, shared = draw(st.integers(0, 2)), draw(st.integers(1, 2))
    B, N, M = (draw(st.integers(0, 5)) for _ in range(3))
    D, E = (draw(st.sampled_from([1, 2, 4, 6, 257])) for _ in range(2))
    layout, is_packed = draw(st.sampled_from(["bhnd", "bnhd"])), draw(st.booleans())

    def shape(heads: int, rows: int, width: int) -> tuple[int, ...]:
        if is_packed:
            return rows, heads, width
        return (B, rows, heads, width) if layout == "bnhd" else (B, heads, rows, width)

    function = draw(st.sampled_from([distr_attention, exact_attention]))
    arguments = {
        name: draw(sometimes(any_array(shape(heads, rows, width))))
        for name, heads, rows, width in (
            ("q", H_kv * shared, N, D),
            ("k", H_kv, M, D),
            ("v", H_kv, M, E),
            ("out", H_kv * shared, N, E),
        )
    }
    lse_sizes = (H_kv * shared, N) if is_packed else (B, H_kv * shared, N)
    booleans, counts = st.booleans(), st.integers(0, 7)
    axes = st.tuples(*(st.sampled_from([1, size]) for size in (B, H_kv * shared, N, M)))
    options = {
        "causal": st.sampled_from([False, True, "top-left", "bottom-right"]),
        "window": st.one_of(st.none(), st.tuples(*[st.one_of(st.none(), counts)] * 2)),
        "scale": st.sampled_from([None, 0, -0.5, 1]),
        "softcap": st.sampled_from([0, 2.5]),
        "mask": axes.map(lambda sizes: np.ones(sizes, bool)),
        "bias": axes.map(lambda sizes: np.ones(sizes, np.float32)),
        "layout": st.just(layout),
        "return_lse": booleans,
        "lse": any_array(lse_sizes),
        "workspace": st.none(),
        "stream": st.none(),
        "backend": st.sampled_from([None, "numpy"]),
    }
    if is_packed:
        for name, rows in (("cu_seqlens_q", N), ("cu_seqlens_k", M)):
            inner = st.lists(st.integers(0, rows), min_size=B, max_size=B).map(sorted)
            # one of three is right: the others fall, or have other ends
            lengths = inner.map(lambda inner, rows=rows: np.array([0, *inner, rows], np.int32))
            arguments[name] = draw(sometimes(lengths))
        for name in ("layout", "mask", "bias"):
            options.pop(name)
    if function is distr_attention:
        options |= {
            "method": st.sampled_from(["subspace", "lsh"]),
            "group_size": st.sampled_from([None, 1, 2]),
            "rank": st.sampled_from([None, None, 1, 2]),
            "score_tol": st.sampled_from([None, None, 0.1]),
            "refine": st.integers(0, 2),
            "fusion": st.sampled_from([None, None, "sum", "lstsq"]),
            "group_by": st.sampled_from([None, "queries", "keys"]),
            "block_size": st.sampled_from([None, 1, 3, 10**20]),
            "seed": counts,
            "return_info": booleans,
        }
    for name in draw(st.lists(st.sampled_from(sorted(options)), max_size=6, unique=True)):
        arguments[name] = draw(sometimes(options[name]))
    if draw(booleans):
        del arguments["out"]
    return function, arguments


@st.composite
def other_arguments(draw: Any) -> tuple[Callable[..., Any], dict[str, Any]]:
    """Draw arguments of what goes with a call: merging, smaller inputs, grouped keys."""
    B, H_kv, rows, width = (draw(st.integers(0, 4)) for _ in range(4))
    sizes = st.just((B, H_kv, rows, width))
    array = sizes.flatmap(any_array)
    queries = st.sampled_from([(B, H_kv * 2, 3, width), (B, H_kv, 0, width)]).flatmap(any_array)
    lse = sizes.flatmap(lambda sizes: any_array(sizes[:3]))
    function = draw(st.sampled_from([merge, pool_keys, restored, group_keys, append]))
    layout = sometimes(st.sampled_from(["bhnd", "bnhd"]))
    count = sometimes(st.integers(1, 5))
    if function is pool_keys:
        return pool_keys, {
            "k": draw(sometimes(array)),
            "v": draw(sometimes(array)),
            "size": draw(count),
            "layout": draw(layout),
        }
    if function is restored:
        results = {name: draw(sometimes(given)) for name, given in (("out", array), ("lse", st.one_of(st.none(), lse)))}
        return restored, results | {"v": draw(sometimes(array)), "rank": draw(count), "layout": draw(layout)}
    if function is merge:
        parts = {
            name: draw(sometimes(lse if "lse" in name else array)) for name in ("out_a", "lse_a", "out_b", "lse_b")
        }
        return merge, parts | {"layout": draw(layout)}
    options = {
        "group_size": st.sampled_from([1, 2]),
        "rank": st.sampled_from([1, 2, 3]),
        "score_tol": st.just(0.1),
        "refine": st.integers(0, 2),
        "block_size": st.integers(1, 3),
        "scale": st.sampled_from([None, 2.0]),
        "layout": layout,
    }
    chosen = draw(st.lists(st.sampled_from(sorted(options)), max_size=3, unique=True))
    arguments = {name: draw(sometimes(options[name])) for name in chosen}
    arguments |= {"k": draw(sometimes(array)), "q": draw(sometimes(st.one_of(st.none(), queries)))}
    if function is append:
        arguments["more"] = draw(sometimes(array))
    return function, arguments


def restored(v: Any, rank: Any, layout: Any, out: Any, lse: Any) -> Any:
    """Project values, and restore a result."""
    return project_values(v, rank, layout=layout).restore(out, lse)


def append(more: Any, **options: Any) -> GroupedKeys:
    """Group keys and append others; what is appended is named k as well."""
    keys = group_keys(**options)
    before = keys.shape
    try:
        keys.append(more)
    except REFUSALS:
        assert keys.shape == before
        raise
    return keys


def assert_taken_or_refused(function: Callable[..., Any], arguments: dict[str, Any]) -> None:
    """Call; what is refused must be refused as documented, and nothing but results of a call that succeeds written."""
    arrays = {name: x for name, x in arguments.items() if isinstance(x, np.ndarray)}
    before = {name: (x.tobytes(), x.shape, x.strides) for name, x in arrays.items()}
    taken = False
    try:
        function(**arguments)
        taken = True
    except REFUSALS as error:
        refusal = re.fullmatch(r"(\w+): .+, got .+", str(error), re.DOTALL)
        if refusal is None or refusal[1] not in {*arguments, "group_size", "k", "cu_seqlens_q", "cu_seqlens_k"}:
            raise AssertionError(f"{type(error).__name__} does not say what is wrong: {error}") from error
    for name, x in arrays.items():
        if not (taken and name in ("out", "lse")) and (x.tobytes(), x.shape, x.strides) != before[name]:
            raise AssertionError(f"{name} was changed")


@given(st.one_of(attention_arguments(), other_arguments()))
def arguments(call: tuple[Callable[..., Any], dict[str, Any]]) -> None:
    """Anything as an argument is taken or refused with a text that names it, and is left as it was."""
    assert_taken_or_refused(*call)


def saved_keys() -> dict[str, np.ndarray]:
    """Return the arrays of a good file."""
    file = io.BytesIO()
    k, q = np.random.default_rng(0).standard_normal((2, 1, 2, 7, 6), dtype=np.float32)
    group_keys(k, q, rank=2, block_size=3).save(file)
    file.seek(0)
    with np.load(file) as npz:
        return dict(npz)


SAVED = saved_keys()


def saved_pages() -> dict[str, np.ndarray]:
    """Return the arrays of a file with a finished page and one that is not."""
    file, k = io.BytesIO(), np.random.default_rng(1).standard_normal((1, 2, 20, 6), dtype=np.float32)
    keys = group_pages(k, k, pages=4, tails=2, block_size=16, rank=3)
    keys.append(k, np.array([[3, 1]], np.int32), np.array([0], np.int32))
    keys.save(file)
    file.seek(0)
    with np.load(file) as npz:
        return dict(npz)


SAVED_PAGES = saved_pages()


@st.composite
def any_file(draw: Any, saved: dict[str, np.ndarray]) -> bytes:
    """Draw a file whose arrays, or whose bytes, are partly wrong."""
    arrays = dict(saved)
    for name in draw(st.lists(st.sampled_from(sorted(arrays)), max_size=3, unique=True)):
        match draw(st.integers(0, 3)):
            case 0:
                del arrays[name]
            case 1:
                arrays[name] = arrays[name][..., :0] if arrays[name].ndim else arrays[name][None]
            case 2:
                arrays[name] = np.array(draw(st.one_of(st.integers(-3, 9), st.floats(), names)))
            case _:
                arrays[name] = draw(any_array())
    file = io.BytesIO()
    np.savez(file, **arrays)
    content = bytearray(file.getvalue())
    for place, byte in draw(st.lists(st.tuples(st.integers(0, len(content) - 1), st.integers(0, 255)), max_size=2)):
        content[place] = byte
    return bytes(content[: draw(st.one_of(st.none(), st.integers(0, len(content))))])


@given(any_file(SAVED))
def files(content: bytes) -> None:
    """Any bytes are loaded or refused as a file; what is loaded can be used."""
    try:
        keys = GroupedKeys.load(io.BytesIO(content))
    except ValueError as error:
        if not re.fullmatch(r"file: .+, got .+", str(error), re.DOTALL):
            raise AssertionError(f"the file is not named: {error}") from error
        return
    B, H_kv, _, D = keys.tail.shape
    more, queries = np.ones((B, H_kv, 5, D), keys.dtype), np.ones((B, H_kv, 2, D), keys.dtype)
    if keys.layout == "bnhd":
        more, queries = more.swapaxes(1, 2), queries.swapaxes(1, 2)
    keys.append(more)
    out = distr_attention(queries, keys, np.ones((*keys.shape[:3], 1), keys.dtype), layout=keys.layout)
    assert out.size == B * H_kv * 2


@given(any_file(SAVED_PAGES))
def page_files(content: bytes) -> None:
    """Any bytes are loaded or refused as a file of pages; what is loaded can be used."""
    try:
        pages = GroupedPages.load(io.BytesIO(content))
    except ValueError as error:
        if not re.fullmatch(r"file: .+, got .+", str(error), re.DOTALL):
            raise AssertionError(f"the file is not named: {error}") from error
        return
    heads, size, width = pages.tails.shape[1:]
    pages.release(range(len(pages.filled)))
    table, lengths = np.array([[0, len(pages.filled) - 1]], np.int32), np.array([0], np.int32)
    shape = (1, size, heads, width) if pages.layout == "bnhd" else (1, heads, size, width)
    rows = np.ones(shape, pages.dtype)
    pages.append(rows, table, lengths)
    values = np.ones((*pages.shape[:3], 1), pages.dtype)
    out = distr_attention(rows, pages, values, page_table=table, seqlens_k=lengths + size, layout=pages.layout)
    assert out.size == heads * size


TARGETS = {"arguments": arguments, "files": files, "page_files": page_files}
