"""Keys that are grouped once, as they come, and used by many calls: a cache that grows (docs/caches.md)."""

from __future__ import annotations

import importlib
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, replace
from pathlib import Path
from sys import maxsize
from typing import IO, Any, ClassVar

import numpy as np

from . import checks, reference
from .arrays import Kind, kind_of
from .problem import Layout, Subspace

FORMAT = 1
"""Of the files that `GroupedKeys.save` writes."""


@dataclass(frozen=True, slots=True)
class KeyBlock:
    """A finished block of every head (docs/math.md, eq. 27); arrays but the last two have the dtype of the keys."""

    sampled: Any  # (B, H_kv, L, R): keys less their mean, times W
    fusion: Any  # (B, H_kv, D, R): Z
    mean: Any  # (B, H_kv, D)
    ranks: Any  # (B, H_kv) int32, at most R; what lies beyond is zero
    score_errors: Any  # (B, H_kv) float64; on a GPU in the type of the sums


BLOCK_ARRAYS = [field.name for field in fields(KeyBlock)]


@dataclass(frozen=True, slots=True)
class QueryStatistics:
    """What is known of the queries that the keys will meet."""

    gram: Any  # (B, H_kv, D, D) float64; on a GPU in the type of the sums; CuPy: D padded
    rows: int  # that it is a sum over

    def padded(self, width: int, dtype: Any) -> QueryStatistics:
        """Return host arrays with more columns, which are zero."""
        gram = np.zeros((*self.gram.shape[:2], width, width), dtype)
        columns = self.gram.shape[3]
        gram[..., :columns, :columns] = self.gram
        return replace(self, gram=gram)


def group_keys(
    k: Any,
    q: Any = None,
    *,
    group_size: int | None = None,
    rank: int | None = None,
    score_tol: float | None = None,
    refine: int = 1,
    block_size: int | None = None,
    scale: float | None = None,
    layout: str = "bhnd",
    stream: Any = None,
) -> GroupedKeys:
    """Return keys that are grouped once, can be appended to, and go into `distr_attention` in the place of ``k``.

    Every ``block_size`` keys make a block. The last block is kept as it is, and its scores are exact. When the first
    key after it comes, it is finished: R numbers a key are kept instead of D, and two small arrays for the block.

    Parameters
    ----------
    k : array, shape (B, H_kv, M, D), float16 | bfloat16 | float32 | float64
        The first keys, copied: a NumPy, CuPy or Numba device array, or what becomes one without a copy. All that is
        appended and all arrays of a call must be of its kind, and on its device. M may be 0.
    q : array, shape (B, H, any number of rows, D), dtype of ``k``
        Queries like those that the keys will meet, such as those of a prompt: the maps weigh directions by them and by
        the keys of the block. Without them by the keys alone, which costs accuracy.
    group_size, rank, score_tol, refine, block_size
        As in `distr_attention` with "subspace". ``score_tol`` needs ``q``, and is for queries like these.
    scale : float, optional
        Of the scores, in every call with these keys. Default: ``1 / sqrt(D)``.
    layout : {"bhnd", "bnhd"}
        Order of the axes of k and q here, of what is appended, and of the arrays of every call with these keys.
    stream : int or stream, optional
        What the work is queued on, with device arrays; as in `distr_attention`.

    Returns
    -------
    GroupedKeys

    Raises
    ------
    TypeError
        If an array is of a wrong kind or dtype.
    ValueError
        If shapes, strides or options break one of the rules above; the text names the argument.
    NotImplementedError
        If the keys are Numba device arrays of bfloat16.

    Notes
    -----
    Equations (26) to (28) of docs/math.md. All depends on the keys and ``q`` alone, not on how the keys were appended.

    Examples
    --------
    >>> import numpy as np
    >>> from distrattn_np import distr_attention, group_keys
    >>> rng = np.random.default_rng(0)
    >>> q, k, v = rng.standard_normal((3, 1, 2, 300, 64), dtype=np.float32)
    >>> keys = group_keys(k[:, :, :299], q[:, :, :299], block_size=128)
    >>> keys.append(k[:, :, 299:])
    >>> keys
    GroupedKeys of shape (1, 2, 300, 64) and dtype float32
    >>> distr_attention(q[:, :, 299:], keys, v, causal=True).shape
    (1, 2, 1, 64)
    """
    handle = checks.check_stream(stream)
    k, q = checks.arrays_in_place(handle, k=k, q=q)
    grouping, scale = checks.check_group_keys(
        k,
        q,
        scale=scale,
        group_size=group_size,
        rank=rank,
        score_tol=score_tol,
        refine=refine,
        block_size=block_size,
        layout=layout,
    )
    checks.check_stream_of(k, stream)
    order: Layout = "bnhd" if layout == "bnhd" else "bhnd"
    of_kind = class_for(kind_of(k) or "numpy")
    first = of_kind.bhnd(k, order)
    B, H_kv, _, D = first.shape
    queries = None
    with of_kind.on_device_of(first), of_kind.on_stream(handle):
        if q is not None and grouping is not None:
            queries = of_kind.query_statistics(of_kind.bound(of_kind.bhnd(q, order), handle), H_kv)
        nothing = of_kind.empty((B, H_kv, 0, D), of_kind.bound(first, handle))
        keys = of_kind(nothing, [], grouping=grouping, queries=queries, scale=scale, layout=order)
    keys.append(k, stream=stream)
    return keys


class GroupedKeys:
    """Keys as `group_keys` makes them and `load` reads them; `distr_attention` takes them in the place of ``k``.

    Several threads may attend to them at a time, while none appends.

    Attributes
    ----------
    kind : {"numpy", "cupy", "numba"}
        Of the arrays that they take and hold.
    grouping : Subspace or None
        None where the rank is D: all keys are kept as they are.
    queries : QueryStatistics or None
        None where no queries were given.
    scale : float
        Of the scores.
    layout : {"bhnd", "bnhd"}
        Of the keys that are appended, and of the arrays of a call.
    """

    kind: ClassVar[Kind] = "numpy"
    called: ClassVar[str] = "GroupedKeys"
    """In error messages."""

    def __init__(
        self,
        tail: Any,
        blocks: list[KeyBlock],
        *,
        grouping: Subspace | None,
        queries: QueryStatistics | None,
        scale: float,
        layout: Layout,
    ) -> None:
        """Take over finished blocks and a copy of the keys after them, (B, H_kv, rows, D)."""
        self.grouping = grouping
        self.queries = queries
        self.scale = scale
        self.layout = layout
        self._blocks = blocks
        self._buffer = self.empty(tuple(tail.shape), tail)  # its first rows are the tail, the others are room
        self._put(self._buffer, tail)
        self._tail_rows = tail.shape[2]

    @staticmethod
    def query_statistics(q: Any, kv_heads: int) -> QueryStatistics:
        """Return what the maps need of known queries (B, H, rows, D)."""
        return QueryStatistics(*reference.query_statistics(q, kv_heads))

    def __repr__(self) -> str:
        """Return what error messages say of it."""
        return f"GroupedKeys of shape {self.shape} and dtype {self.dtype}"

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Shape of all keys so far, in `layout`."""
        B, H_kv, _, D = self._buffer.shape
        M = self.exact_from + self._tail_rows
        return (B, M, H_kv, D) if self.layout == "bnhd" else (B, H_kv, M, D)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the keys."""
        dtype: np.dtype[Any] = self._buffer.dtype
        return dtype

    @property
    def device(self) -> int:
        """Number of the device that holds them; 0 for NumPy."""
        return 0

    @property
    def blocks(self) -> list[KeyBlock]:
        """The finished blocks."""
        return self._blocks

    @property
    def block_size(self) -> int:
        """Keys in a finished block; where the rank is D no block is ever full."""
        return maxsize if self.grouping is None else self.grouping.block_size

    @property
    def exact_from(self) -> int:
        """The first key that is kept as it is."""
        return len(self.blocks) * self.block_size

    @property
    def tail(self) -> Any:
        """The keys that are kept as they are, a view (B, H_kv, rows, D)."""
        return self._buffer[:, :, : self._tail_rows]

    @property
    def ranks(self) -> Any:
        """Rank of every finished block, (B, H_kv, F) int32."""
        return self._of_blocks("ranks", np.int32)

    @property
    def score_errors(self) -> Any:
        """Predicted root-mean-square error of the scores of every finished block, in nats, (B, H_kv, F) float64.

        For queries that weigh as B in eq. (28) does; those to come may have twice or three times as much.
        """
        return self._of_blocks("score_errors", np.float64)

    @property
    def nbytes(self) -> int:
        """Memory that the keys and what belongs to them take."""
        arrays = [getattr(block, name) for block in self.blocks for name in BLOCK_ARRAYS]
        arrays += [self._buffer] if self.queries is None else [self._buffer, self.queries.gram]
        return sum(array.nbytes for array in arrays)

    def append(self, k: Any, *, stream: Any = None) -> None:
        """Append keys, which are copied; every block that they fill and exceed is finished.

        Parameters
        ----------
        k : array, shape (B, H_kv, any number of rows, D) in `layout`, dtype and kind of the first keys
            Rows come after all keys so far.
        stream : int or stream, optional
            What the work is queued on, with device arrays; as in `distr_attention`.

        Raises
        ------
        TypeError, ValueError
            As `group_keys` does; nothing is appended then.
        """
        handle = checks.check_stream(stream)
        (k,) = checks.arrays_in_place(handle, k=k)
        checks.check_appended(k, self)
        checks.check_stream_of(k, stream)
        with self.on_device_of(k), self.on_stream(handle):
            self._append(self.bound(self.bhnd(k, self.layout), handle))

    def _append(self, new: Any) -> None:
        """Append checked keys (B, H_kv, rows, D)."""
        taken = 0
        while taken < new.shape[2]:
            if self.grouping is not None and self._tail_rows == self.block_size:
                self._finish_block(self.grouping)
            rows = min(self.block_size - self._tail_rows, new.shape[2] - taken)
            self._extend_tail(new[:, :, taken : taken + rows])
            taken += rows

    def save(self, file: str | Path | IO[bytes]) -> None:
        """Write everything as plain arrays, in NumPy's npz format, to a path or a binary file."""
        if isinstance(file, str | Path):
            with Path(file).open("wb") as opened:
                self.save(opened)
            return
        tail, blocks, queries = self._copy_on_host()
        arrays = {
            "format": FORMAT,
            "dtype": self.dtype.name,
            "layout": self.layout,
            "scale": self.scale,
            "tail": tail,
        }
        if self.grouping is not None:
            # zero stands for None in the first two
            arrays |= {"rank": self.grouping.rank or 0, "score_tol": self.grouping.score_tol or 0.0}
            arrays |= {"refine": self.grouping.refine, "block_size": self.grouping.block_size}
        if queries is not None:
            arrays |= {"query_gram": queries.gram, "query_rows": queries.rows}
        if blocks:
            arrays["widths"] = [block.sampled.shape[3] for block in blocks]
            for name in BLOCK_ARRAYS:
                of_blocks = [getattr(block, name) for block in blocks]
                # what has a column a rank stands side by side: blocks may differ in how many
                join = np.concatenate if name in ("sampled", "fusion") else np.stack
                arrays[name] = join(of_blocks, axis=-1)
        np.savez(file, **{name: as_plain(np.asarray(value)) for name, value in arrays.items()})  # type: ignore[arg-type]

    @staticmethod
    def load(file: str | Path | IO[bytes], *, kind: Kind = "numpy") -> GroupedKeys:
        """Return keys as `save` wrote them, bit for bit: appending goes on as if they had never been saved.

        Parameters
        ----------
        file : path or binary file
            What `save` wrote, of whatever kind the keys were.
        kind : {"numpy", "cupy", "numba"}
            Of the keys that are returned; those on a GPU are on the current device. Appending goes on bit for bit where
            they were of this kind.

        Raises
        ------
        ValueError
            If the file holds something else, or ``kind`` is another.
        NotImplementedError
            If the keys are bfloat16, and ``kind`` is "numba".
        """
        checks.check_kind_to_load(kind)
        arrays = read_arrays(file)
        checks.check_saved_keys(file, arrays, FORMAT)
        checks.check_dtype_of_grouped_keys("file", str(arrays["dtype"]), kind, str(file))
        dtype = dtype_of_name(str(arrays["dtype"]))
        grouping = None
        if "rank" in arrays:
            grouping = Subspace(
                rank=int(arrays["rank"]) or None,
                score_tol=float(arrays["score_tol"]) or None,
                refine=int(arrays["refine"]),
                block_size=int(arrays["block_size"]),
                by="keys",
            )
        queries = None
        if "query_gram" in arrays:
            queries = QueryStatistics(arrays["query_gram"], int(arrays["query_rows"]))
        blocks = []
        if "widths" in arrays:
            edges = np.cumsum(arrays["widths"])[:-1]
            sampled, fusion = (np.split(arrays[name].view(dtype), edges, axis=-1) for name in ("sampled", "fusion"))
            others = (
                np.moveaxis(array, -1, 0)
                for array in (arrays["mean"].view(dtype), arrays["ranks"], arrays["score_errors"])
            )
            blocks = [
                KeyBlock(*map(np.ascontiguousarray, parts)) for parts in zip(sampled, fusion, *others, strict=True)
            ]
        return class_for(kind)(
            arrays["tail"].view(dtype),
            blocks,
            grouping=grouping,
            queries=queries,
            scale=float(arrays["scale"]),
            layout="bnhd" if arrays["layout"] == "bnhd" else "bhnd",
        )

    def _finish_block(self, grouping: Subspace) -> None:
        """Make a block of the full tail, which is empty then."""
        self._blocks.append(reduce_block(self.tail, self.queries, grouping, self.scale))
        self._tail_rows = 0

    def _copy_on_host(self) -> tuple[np.ndarray, list[KeyBlock], QueryStatistics | None]:
        """Return what a file holds as NumPy arrays."""
        return self.tail, self.blocks, self.queries

    def _extend_tail(self, new: Any) -> None:
        """Copy keys (B, H_kv, rows, D) behind the tail, whose room doubles: one at a time must not copy all of them."""
        B, H_kv, room, D = self._buffer.shape
        rows = self._tail_rows + new.shape[2]
        if rows > room:
            grown = self.empty((B, H_kv, min(max(rows, 2 * room), self.block_size), D), self._buffer)
            self._put(grown[:, :, : self._tail_rows], self.tail)
            self._buffer = grown
        self._put(self._buffer[:, :, self._tail_rows : rows], new)
        self._tail_rows = rows

    @staticmethod
    def empty(shape: tuple[int, ...], like: Any) -> Any:
        """Return a new contiguous array of the kind and dtype of ``like``."""
        return np.empty(shape, like.dtype)

    @staticmethod
    def bhnd(array: Any, layout: Layout) -> Any:
        """Return a view of an array of the caller's with the axes (B, H, rows, D)."""
        return array.swapaxes(1, 2) if layout == "bnhd" else array

    @staticmethod
    def on_device_of(array: Any) -> AbstractContextManager[Any]:  # noqa: ARG004
        """Return a context in which the device that holds ``array`` is current."""
        return nullcontext()

    @staticmethod
    def on_stream(handle: int | None) -> AbstractContextManager[Any]:  # noqa: ARG004
        """Return a context in which work goes to the stream with this handle; None: to the current one."""
        return nullcontext()

    @staticmethod
    def bound(array: Any, handle: int | None) -> Any:  # noqa: ARG004
        """Return a view that carries the stream with this handle, where arrays of this kind carry one."""
        return array

    @staticmethod
    def _put(target: Any, source: Any) -> None:
        """Write ``source`` into a view of the same shape."""
        target[...] = source

    def _of_blocks(self, name: str, dtype: Any) -> np.ndarray:
        """Return (B, H_kv, F) numbers of the finished blocks."""
        if not self.blocks:
            return np.zeros((*self._buffer.shape[:2], 0), dtype)
        return np.stack([getattr(block, name) for block in self.blocks], axis=-1)


def reduce_block(keys: np.ndarray, queries: QueryStatistics | None, grouping: Subspace, scale: float) -> KeyBlock:
    """Return what is kept of one block of keys (B, H_kv, L, D)."""
    with np.errstate(all="ignore"):  # what is not finite passes through to the scores of its block
        X = keys.astype(np.float64)
        # rounded first, so that what is added to the scores is what was subtracted
        mean = X.mean(axis=2).astype(keys.dtype)
        W, Z, ranks, score_errors = reference.group_block(
            X,
            mean.astype(np.float64),
            None if queries is None else queries.gram,
            0 if queries is None else queries.rows,
            scale=scale,
            rank=grouping.rank,
            score_tol=grouping.score_tol,
            refine=grouping.refine,
        )
        R = ranks.max(initial=0)
        sampled = (X - mean[:, :, np.newaxis].astype(np.float64)) @ W[..., :R]
        fusion = np.ascontiguousarray(Z[..., :R], keys.dtype)
        return KeyBlock(sampled.astype(keys.dtype), fusion, mean, ranks, score_errors)


def class_for(kind: Kind) -> type[GroupedKeys]:
    """Return the class of `GroupedKeys` of this kind of arrays, importing their package."""
    if kind == "numpy":
        return GroupedKeys
    module = importlib.import_module(f".backends.{kind}_grouped_keys", __package__)
    found: type[GroupedKeys] = module.GROUPED_KEYS
    return found


def read_arrays(file: str | Path | IO[bytes], writer: str = "GroupedKeys.save") -> dict[str, np.ndarray]:
    """Return the arrays of an npz file."""
    with Path(file).open("rb") if isinstance(file, str | Path) else nullcontext(file) as opened:
        try:
            with np.load(opened, allow_pickle=False) as npz:
                return dict(npz)
        except Exception as error:  # whatever NumPy raises for a file that is damaged or something else
            reason = str(error).partition("\n")[0]
            raise ValueError(f"file: must be one that {writer} wrote, got {file}: {reason}") from error


def as_plain(array: np.ndarray) -> np.ndarray:
    """Return what a reader without ml_dtypes can load: bfloat16 as its 16 bits."""
    return array.view(np.uint16) if array.dtype.name == "bfloat16" else array


def dtype_of_name(name: str) -> np.dtype[Any]:
    """Return the dtype that a file names; bfloat16 is that of ml_dtypes."""
    return np.dtype(importlib.import_module("ml_dtypes").bfloat16 if name == "bfloat16" else name)
