"""``python -m distrattn_np.bench.features``: what each backend covers, found by calling it.

    --backend numpy,reference    run every feature there and write results/features_<backend>.json
    --write docs/features.md     write the table from these files; with --check, only say whether it is current

A variant of a feature is covered where a small call gives what the definition says, and not covered where it raises
NotImplementedError. Anything else is a failure: the table says so, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from .. import info, reference
from ..arrays import address
from ..attention import distr_attention, exact_attention, workspace_size
from ..checks import WORKSPACE_ALIGNMENT
from ..grouped_keys import GroupedKeys, group_keys
from ..grouped_pages import group_pages
from ..merge import merge
from . import definition
from .axes import dtype_named
from .device import BACKENDS, to_host
from .environment import describe_environment

COLUMNS = ("numpy", "cupy", "numba", "reference")
RESULTS = Path(__file__).parent / "results"
BEGIN, END = "<!-- features:begin -->", "<!-- features:end -->"
TOLERANCE = {"float16": 1e-2, "bfloat16": 8e-2, "float32": 1e-3, "float64": 1e-6}
"""Largest error of a result relative to its length: enough to see that the option was followed."""
B, H, H_KV, N, M, D, E = 1, 4, 2, 20, 33, 16, 16
RANK, BLOCK = 5, 10
"""Fewer dimensions than a block's rows span, or the maps would lose nothing."""
SCORE_TOLS = {"keys": 0.29, "queries": 0.127}
"""Nats, of blocks of all rows 40 wide: between the errors of two heads at rank 16, so that ranks of 16 and 32 come."""

Outcome = str
""" "yes", "no", "does not apply", or "fails: " and why."""


class DoesNotApply(Exception):  # noqa: N818
    """The question makes no sense for this backend."""


class WrongResult(Exception):  # noqa: N818
    """The result is not what the definition says."""


@dataclass(frozen=True, slots=True)
class Column:
    """A backend, or the reference, and how it is called with host arrays."""

    name: str

    def give(self, array: np.ndarray) -> Any:
        """Return the array as the kind that this column takes."""
        match self.name:
            case "cupy":
                return import_module("cupy").asarray(array)
            case "numba":
                return import_module("numba.cuda").to_device(np.ascontiguousarray(array))
            case _:
                return array

    def attend(self, q: Any, k: Any, v: Any, *, is_exact: bool = False, **options: Any) -> tuple[Any, ...]:
        """Return out and lse in the caller's layout, and whatever else was asked for."""
        if self.name == "reference":
            if "return_info" in options:
                raise DoesNotApply
            return definition.attention(q, k, v, is_exact=is_exact, **options)
        function = exact_attention if is_exact else distr_attention
        arrays = [self.give(x) if isinstance(x, np.ndarray) else x for x in (q, k, v)]
        options = {name: self.give(x) if isinstance(x, np.ndarray) else x for name, x in options.items()}
        results: tuple[Any, ...] = function(*arrays, **options, return_lse=True, backend=self.name)
        return results

    def must_take_arrays(self) -> None:
        """Raise where it is not arrays that are computed with, but equations."""
        if self.name == "reference":
            raise DoesNotApply


Check = Callable[[Column], None]


@dataclass(frozen=True, slots=True)
class Feature:
    """A row of the table: what a user would ask for, how it is said in a call, and what shows that it works."""

    name: str
    how: str
    variants: dict[str, Check]
    """By the words that stand in a cell where not all of them are covered."""


def inputs(
    *,
    batch: int = B,
    heads: int = H,
    kv_heads: int = H_KV,
    rows: int = N,
    width: int = D,
    value_width: int = E,
    dtype: str = "float32",
) -> list[np.ndarray]:
    """Return q, k and v, standard normal, always the same for the same sizes."""
    shapes = ((batch, heads, rows, width), (batch, kv_heads, M, width), (batch, kv_heads, M, value_width))
    rng = np.random.default_rng([rows, width, value_width])
    return [rng.standard_normal(shape, dtype=np.float32).astype(dtype_named(dtype)) for shape in shapes]


def assert_near(actual: Any, expected: np.ndarray, dtype: str = "float32") -> None:
    """Raise `WrongResult` unless the results are the same within what rounding does, in the same places finite."""
    got, want = to_host(actual), np.asarray(expected, np.float64)
    if got.shape != want.shape:
        raise WrongResult(f"shape {got.shape} instead of {want.shape}")
    finite = np.isfinite(want)
    if (np.isfinite(got) != finite).any():
        raise WrongResult("not finite at other places")
    error = np.linalg.norm(np.where(finite, got - np.where(finite, want, 0), 0))
    allowed = TOLERANCE[dtype] * max(float(np.linalg.norm(want[finite])), 1e-3)
    if not error <= allowed:
        raise WrongResult(f"error {error:.2g} where {allowed:.2g} is rounding")


def agrees(arrays: dict[str, Any] | None = None, /, **options: Any) -> Check:
    """Return a check that a call with these sizes and options gives what the definition says."""
    sizes = arrays or {}

    def check(column: Column) -> None:
        q, k, v = inputs(**sizes)
        out, lse = column.attend(q, k, v, **options)
        expected = definition.attention(q, k, v, **options)
        dtype = sizes.get("dtype", "float32")
        assert_near(out, expected[0], dtype)
        assert_near(lse, expected[1], dtype)

    return check


def each_method(arrays: dict[str, Any] | None = None, /, **options: Any) -> dict[str, Check]:
    """Return a check for exact attention and for each method."""
    return {
        "exact": agrees(arrays, is_exact=True, **options),
        "subspace": agrees(arrays, rank=RANK, block_size=BLOCK, **options),
        "lsh": agrees(arrays, method="lsh", block_size=BLOCK, **options),
    }


def _packed(**options: Any) -> Check:
    def check(column: Column) -> None:
        q, k, v = (x[0].swapaxes(0, 1) for x in inputs())
        told = options | {
            "cu_seqlens_q": np.array([0, 7, 7, N], np.int32),
            "cu_seqlens_k": np.array([0, 9, 20, M], np.int32),
        }
        out, lse = column.attend(q, k, v, **told)
        expected = definition.attention(q, k, v, **told)
        assert_near(out, expected[0])
        assert_near(lse, expected[1])

    return check


def _layout(layout: str) -> Check:
    def check(column: Column) -> None:
        column.must_take_arrays()
        arrays = inputs()
        given = [np.ascontiguousarray(x.swapaxes(1, 2)) if layout == "bnhd" else x for x in arrays]
        out, _ = column.attend(*given, layout=layout)
        expected, _ = definition.attention(*arrays)
        assert_near(out, expected.swapaxes(1, 2) if layout == "bnhd" else expected)

    return check


def _strided(column: Column) -> None:
    column.must_take_arrays()
    rng = np.random.default_rng(0)
    packed = rng.standard_normal((B, N, 3, H, D), dtype=np.float32)  # one projection
    given = column.give(packed)
    out, _ = column.attend(given[:, :, 0], given[:, :, 1], given[:, :, 2], layout="bnhd")
    q, k, v = (packed[:, :, i].swapaxes(1, 2) for i in range(3))
    assert_near(out, definition.attention(q, k, v)[0].swapaxes(1, 2))


def _out(column: Column) -> None:
    column.must_take_arrays()
    q, k, v = inputs()
    out = column.give(np.full_like(q, np.nan))
    result, _ = column.attend(q, k, v, out=out)
    if result is not out:
        raise WrongResult("another array than out was returned")
    assert_near(out, definition.attention(q, k, v)[0])


def _info(column: Column) -> None:
    _, _, told = column.attend(*inputs(width=40), score_tol=SCORE_TOLS["keys"], block_size=M, return_info=True)
    assert_near(np.sort(to_host(told.ranks).ravel()), np.array([16, 32]))


def _repeats(column: Column) -> None:
    first, second = (to_host(column.attend(*inputs(), causal=True)[0]) for _ in range(2))
    if first.tobytes() != second.tobytes():
        raise WrongResult("two calls differ")


def _blind(column: Column) -> None:
    out, lse = (to_host(x) for x in column.attend(*inputs(rows=M + 5), causal=True))
    if out[:, :, :5].any() or not np.isneginf(lse[:, :, :5]).all() or not np.isfinite(lse[:, :, 5:]).all():
        raise WrongResult("a query that sees no key")


def _merge(column: Column) -> None:
    q, k, v = inputs()
    parts = [column.attend(q, k[:, :, keys], v[:, :, keys], is_exact=True) for keys in (slice(9), slice(9, M))]
    join = reference.merge_results if column.name == "reference" else merge
    out, lse = join(*parts[0], *parts[1])
    expected = definition.attention(q, k, v, is_exact=True)
    assert_near(out, expected[0])
    assert_near(lse, expected[1])


def _pages(dtype: str = "float32", **options: Any) -> Check:
    """Return a check with keys and values in pages, the first of which two sequences share."""

    def check(column: Column) -> None:
        rng = np.random.default_rng(5)
        shapes = ((2, H, 3, D), (6, H_KV, 16, D), (6, H_KV, 16, E))
        q, k, v = (rng.standard_normal(shape, dtype=np.float32).astype(dtype) for shape in shapes)
        tables: dict[str, Any] = {
            "page_table": np.array([[4, 1, 3], [4, 5, -1]], np.int32),
            "seqlens_k": np.array([40, 21], np.int32),
        }

        def attend(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            return definition.attention(q, k, v, **options)

        expected = reference.paged_attention(q, k, v, **tables, attend=attend)
        if column.name == "reference":  # which the definition is
            return
        results = column.attend(q, k, v, **tables, **options)
        for result, wanted in zip(results, expected, strict=True):
            assert_near(result, wanted, dtype)

    return check


def _grouped_pages(column: Column, dtype: str) -> None:
    """Two sequences that share a page, whose keys less their means lie in as few dimensions as are kept."""
    rank, size = 5, 16
    rng = np.random.default_rng(6)
    table, lengths = np.array([[4, 1, 3], [4, 5, -1]], np.int32), np.array([40, 21], np.int32)
    q, v = (rng.standard_normal(shape).astype(dtype) for shape in ((2, H, 3, D), (6, H_KV, size, E)))
    k = rng.standard_normal((6, H_KV, size, rank)) @ rng.standard_normal((rank, D)) / np.sqrt(rank)
    k = k.astype(dtype)

    def attend(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return definition.attention(q, k, v, is_exact=True, causal=True)

    expected = reference.paged_attention(q, k, v, table, lengths, attend=attend)
    if column.name == "reference":
        made = {"scale": 1 / np.sqrt(D), "block_size": size}

        def attend_grouped(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            maps = reference.make_key_maps(k, rank=rank, **made)
            offset = k.shape[2] - q.shape[2]
            return reference.grouped_keys_attention(q, k, v, maps, **made, causal_offset=offset)

        results = reference.paged_attention(q, k, v, table, lengths, attend=attend_grouped)
    else:
        keys = group_pages(column.give(k[:1]), pages=6, tails=2, block_size=size, rank=rank)
        for b, first in ((0, 0), (1, size)):
            rows = reference.rows_of_pages(k, table[b], lengths[b])[np.newaxis, :, first:]
            keys.append(column.give(rows), table[b : b + 1], np.array([first], np.int32))
        results = column.attend(q, keys, v, page_table=table, seqlens_k=lengths, causal=True)
    for result, wanted in zip(results, expected, strict=True):
        assert_near(result, wanted, dtype)


def _cache(*, is_saved: bool) -> Check:
    """Return a check with keys whose blocks, less their means, lie in as few dimensions as are kept."""
    rank = 5

    def check(column: Column) -> None:
        q, k, v = inputs()
        k = k[..., :rank] @ np.random.default_rng(3).standard_normal((rank, D), dtype=np.float32)
        expected, _ = definition.attention(q, k, v, is_exact=True)
        if column.name == "reference":
            made = {"scale": 1 / np.sqrt(D), "block_size": 8}
            maps = reference.make_key_maps(k, rank=rank, **made)
            assert_near(reference.grouped_keys_attention(q, k, v, maps, **made)[0], expected)
            return
        keys = group_keys(column.give(k[:, :, :20]), rank=rank, block_size=8)
        if is_saved:
            file = io.BytesIO()
            keys.save(file)
            file.seek(0)
            keys = GroupedKeys.load(file, kind=keys.kind)
        keys.append(column.give(k[:, :, 20:]))
        assert_near(column.attend(q, keys, v)[0], expected)

    return check


class _Exported:
    """An array of another package: nothing but DLPack."""

    def __init__(self, array: Any) -> None:
        self._array = array

    def __dlpack__(self, **options: Any) -> Any:
        return self._array.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self._array.__dlpack_device__()


def _dlpack(column: Column) -> None:
    column.must_take_arrays()
    # device memory comes in as CuPy arrays, which either GPU backend takes
    source = Column("cupy") if column.name == "numba" else column
    if source.name == "cupy" and not info.probe("cupy").devices:
        raise DoesNotApply
    arrays = inputs()
    out, _ = column.attend(*(_Exported(source.give(x)) for x in arrays))
    assert_near(out, definition.attention(*arrays)[0])


def _host_arrays(column: Column) -> None:
    column.must_take_arrays()
    q, k, v = inputs()
    out = distr_attention(q, k, v, backend=column.name)
    if not isinstance(out, np.ndarray):
        raise WrongResult(f"a {type(out).__name__} came back")
    assert_near(out, definition.attention(q, k, v)[0])


def _lse(column: Column) -> None:
    column.must_take_arrays()
    lse = column.give(np.full((B, H, N), np.nan, np.float32))
    _, returned = column.attend(*inputs(), lse=lse)
    if returned is not lse:
        raise WrongResult("another array than lse was returned")
    assert_near(lse, definition.attention(*inputs())[1])


def _workspace(column: Column) -> None:
    if column.name in ("numpy", "reference"):
        raise DoesNotApply
    arrays = [column.give(x) for x in inputs()]
    size = workspace_size(*arrays, rank=RANK, backend=column.name)
    memory = column.give(np.zeros(size + WORKSPACE_ALIGNMENT, np.uint8))
    start = -address(memory) % WORKSPACE_ALIGNMENT
    out, _ = column.attend(*arrays, rank=RANK, workspace=memory[start : start + size])
    assert_near(out, definition.attention(*inputs(), rank=RANK)[0])


def _stream(*, is_named: bool) -> Check:
    def check(column: Column) -> None:
        if column.name != "cupy":
            raise DoesNotApply
        cupy = import_module("cupy")
        arrays = [column.give(x) for x in inputs()]
        stream = cupy.cuda.Stream(non_blocking=True)
        cupy.cuda.Device().synchronize()
        with nullcontext() if is_named else stream:
            out, _ = column.attend(*arrays, **({"stream": stream} if is_named else {}))
        stream.synchronize()
        assert_near(out, definition.attention(*inputs())[0])

    return check


WIDTHS = (1, 7, 40, 64, 72, 80, 96, 128, 160, 256)
SHOWN = np.random.default_rng(1).random((B, H, N, M)) < 0.7
ADDED = np.random.default_rng(2).standard_normal((B, H, N, M), dtype=np.float32)

FEATURES = (
    Feature("Exact attention", "`exact_attention`, `group_size=1`", {"exact": agrees(is_exact=True)}),
    Feature(
        "Fewer channels by subspace",
        '`method="subspace"`',
        {
            f"{name}, blocks over {by}": agrees(sizes, group_by=by, **how)
            for by, score_tol in SCORE_TOLS.items()
            for name, sizes, how in (
                ("`group_size`", {}, {"group_size": 2, "block_size": BLOCK}),
                ("`rank`", {}, {"rank": RANK, "block_size": BLOCK}),
                ("`score_tol`", {"width": 40}, {"score_tol": score_tol, "block_size": M}),
            )
        },
    ),
    Feature(
        "Fewer channels by hash (the paper)",
        '`method="lsh"`',
        {
            f"`{fusion}`, blocks over {by}": agrees(method="lsh", group_by=by, block_size=BLOCK, fusion=fusion)
            for fusion in ("sum", "lstsq")
            for by in ("queries", "keys")
        },
    ),
    Feature("Causal, last query sees all", '`causal=True`, `"bottom-right"`', each_method(causal=True)),
    Feature("Causal, first query sees one key", '`causal="top-left"`', each_method(causal="top-left")),
    Feature("Shared key heads (GQA, MQA)", "H_kv divides H", each_method({"heads": 6, "kv_heads": 1})),
    Feature("Sliding window", "`window=(left, right)`", each_method(window=(6, 2))),
    Feature("Capped scores", "`softcap=`", each_method(softcap=2.0)),
    Feature(
        "Bool mask",
        "`mask=`, broadcast",
        {
            "(B, H, N, M)": agrees(mask=SHOWN),
            "(M,)": agrees(mask=SHOWN[0, 0, 0]),
            "exact": agrees(is_exact=True, mask=SHOWN),
        },
    ),
    Feature(
        "Additive bias, as of ALiBi",
        "`bias=`, broadcast",
        {
            "(B, H, N, M)": agrees(bias=ADDED),
            "(H, 1, M)": agrees(bias=ADDED[0, :, :1]),
            "exact": agrees(is_exact=True, bias=ADDED),
        },
    ),
    Feature(
        "Packed sequences of any lengths",
        "`cu_seqlens_q=`, `cu_seqlens_k=`",
        {
            "exact": _packed(is_exact=True, causal=True),
            "subspace": _packed(rank=RANK, block_size=BLOCK, causal=True),
            "lsh": _packed(method="lsh", block_size=BLOCK, causal=True),
        },
    ),
    Feature(
        "Keys and values in pages",
        "`page_table=`, `seqlens_k=`",
        {
            "decoding": _pages("float16", is_exact=True, causal=True),
            "window": _pages(is_exact=True, window=(20, None)),
            "subspace": _pages(rank=RANK, block_size=BLOCK, causal=True),
            "lsh": _pages(method="lsh", block_size=BLOCK, causal=True),
        },
    ),
    Feature(
        "Grouped keys in pages",
        "`group_pages`",
        {"decoding": partial(_grouped_pages, dtype="float16"), "float32": partial(_grouped_pages, dtype="float32")},
    ),
    Feature(
        "Caches that grow",
        "`group_keys`, `append`",
        {"append": _cache(is_saved=False), "save, load": _cache(is_saved=True)},
    ),
    Feature("Keys in parts", "`merge`", {"merge": _merge}),
    Feature("Log-sum-exp", "`return_lse=True`", each_method()),
    Feature("Ranks and predicted errors", "`return_info=True`", {"info": _info}),
    Feature(
        "dtypes",
        "that of q, k and v",
        {name: agrees({"dtype": name}) for name in ("float16", "bfloat16", "float32", "float64")},
    ),
    Feature(
        "Any width of 1 to 256",
        "D",
        {str(width): agrees({"width": width, "dtype": "float16"}, is_exact=True) for width in WIDTHS},
    ),
    Feature("Values of another width", "E", each_method({"value_width": 40})),
    Feature("Order of axes", '`layout="bhnd"`, `"bnhd"`', {layout: _layout(layout) for layout in ("bhnd", "bnhd")}),
    Feature("Views without a copy", "any strides, last axis contiguous", {"views": _strided}),
    Feature("Results in given memory", "`out=`, `lse=`", {"`out=`": _out, "`lse=`": _lse}),
    Feature("Same bits every time", "the same call", {"twice": _repeats}),
    Feature("Query that sees no key", "zero, lse minus infinity", {"blind": _blind}),
    Feature("Arrays of other packages", "`__dlpack__`", {"dlpack": _dlpack}),
    Feature("NumPy arrays in and out", "`backend=`", {"host": _host_arrays}),
    Feature(
        "Stream of the caller",
        "CuPy's current one, `stream=`",
        {"current": _stream(is_named=False), "`stream=`": _stream(is_named=True)},
    ),
    Feature("Device memory of the caller", "`workspace=`", {"workspace": _workspace}),
)


def run(name: str) -> dict[str, dict[str, Outcome]]:
    """Return the outcome of every variant of every feature in one column."""
    column = Column(name)
    return {
        feature.name: {variant: outcome_of(check, column) for variant, check in feature.variants.items()}
        for feature in FEATURES
    }


def outcome_of(check: Check, column: Column) -> Outcome:
    """Return what running the check says."""
    try:
        with np.errstate(all="ignore"):
            check(column)
    except NotImplementedError:
        return "no"
    except DoesNotApply:
        return "does not apply"
    except Exception as error:  # a feature that does not work is told as such, whatever it raises
        return f"fails: {type(error).__name__}: {error}"
    return "yes"


def cell(outcomes: dict[str, Outcome] | None, feature: Feature) -> str:
    """Return what the table says of one feature on one backend; None where it was not run."""
    if outcomes is None or not set(feature.variants) <= set(outcomes):
        return "not run"
    by_outcome: dict[str, list[str]] = {}
    for variant in feature.variants:
        by_outcome.setdefault(outcomes[variant].partition(":")[0], []).append(variant)
    if "fails" in by_outcome:
        return f"**fails**: {', '.join(by_outcome['fails'])}"
    if len(by_outcome) == 1:
        (outcome,) = by_outcome
        return "-" if outcome == "does not apply" else outcome
    return ", ".join(by_outcome["yes"]) if "yes" in by_outcome else "no"


def table(results: Path) -> str:
    """Return the table and where its columns come from, as Markdown."""
    reports = {name: load(results, name) for name in COLUMNS}
    lines = [
        f"| what the call covers | how | {' | '.join(COLUMNS)} |",
        f"|---|---|{'---|' * len(COLUMNS)}",
    ]
    for feature in FEATURES:
        cells = (
            cell(None if report is None else report["features"].get(feature.name), feature)
            for report in reports.values()
        )
        lines.append(f"| {feature.name} | {feature.how} | {' | '.join(cells)} |")
    lines.append("")
    lines += [f"* {_provenance(name, report)}" for name, report in reports.items()]
    return "\n".join(lines)


def load(results: Path, name: str) -> dict[str, Any] | None:
    """Return the report of one column; None where there is none."""
    path = results / f"features_{name}.json"
    if not path.exists():
        return None
    report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return report


def _provenance(name: str, report: dict[str, Any] | None) -> str:
    if report is None:
        return f"{name}: not run yet"
    environment = report["environment"]
    machine = environment.get("gpu") or ("Numba's simulator on a CPU" if report["is_simulated"] else environment["cpu"])
    versions = [f"NumPy {environment['numpy']}"]
    if environment.get("cupy"):
        versions = [f"CuPy {environment['cupy']}", f"NVRTC {environment['nvrtc']}"]
    if name == "numba":
        versions.append(f"numba-cuda {environment['packages']['numba-cuda']}")
    return f"{name}: {machine}; {', '.join(versions)}; {environment['date'][:10]}"


def fill(text: str, results: Path) -> str:
    """Return a document with the table between its marks written anew."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"the document needs {BEGIN} and {END}")
    return f"{before}{BEGIN}\n{table(results)}\n{END}{after}"


def _columns_to_run(text: str) -> Iterator[str]:
    for name in text.split(","):
        if name not in COLUMNS:
            raise ValueError(f"--backend: must be of {', '.join(COLUMNS)}, got {name!r}")
        state = None if name == "reference" else info.probe(name)
        if state is not None and not state.is_usable:
            raise ValueError(f"--backend: {name} cannot run here: {state.problem}")
        yield name


def main(argv: list[str]) -> int:
    """Run with these arguments; return 1 where a feature fails or a document is not current."""
    parser = argparse.ArgumentParser(
        prog="python -m distrattn_np.bench.features", description="What each backend covers, found by calling it."
    )
    parser.add_argument("--backend", metavar="LIST", help=f"run and write results: of {', '.join(COLUMNS)}")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER", help="default: %(default)s")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the table between the marks of a document")
    parser.add_argument("--check", action="store_true", help="with --write: write nothing, exit with 1 if not current")
    options = parser.parse_args(argv)
    failed = False
    for name in _columns_to_run(options.backend) if options.backend else ():
        outcomes_of = run(name)
        report = {
            "environment": describe_environment(BACKENDS["numpy"] if _is_on_host(name) else "gpu", argv),
            "is_simulated": name == "numba" and _is_on_host(name),
            "features": outcomes_of,
        }
        (options.results / f"features_{name}.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        for feature, outcomes in outcomes_of.items():
            for variant, outcome in outcomes.items():
                if outcome.startswith("fails"):
                    failed = True
                    print(f"{name}: {feature}: {variant} {outcome}")
    if options.write is not None:
        old = options.write.read_text(encoding="utf-8")
        new = fill(old, options.results)
        if new != old:
            print(f"{options.write}: {'not current' if options.check else 'written'}")
            failed |= options.check
            if not options.check:
                options.write.write_text(new, encoding="utf-8")
    return 1 if failed else 0


def _is_on_host(name: str) -> bool:
    return name in ("numpy", "reference") or not info.probe(name).devices


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
