"""Grouped keys of many sequences in pages of one grouping block each, which sequences may share (docs/caches.md)."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import IO, Any, ClassVar

import numpy as np

from . import checks
from .arrays import Kind, kind_of
from .grouped_keys import (
    FORMAT,
    QueryStatistics,
    as_plain,
    class_for,
    dtype_of_name,
    read_arrays,
    reduce_block,
)
from .problem import Layout, Subspace, ceil_div

POOLS = ("sampled", "maps", "ranks", "score_errors")
"""What is kept of finished pages, by name in files and as attributes."""


def group_pages(
    k: Any,
    q: Any = None,
    *,
    pages: int,
    tails: int,
    block_size: int,
    group_size: int | None = None,
    rank: int | None = None,
    refine: int = 1,
    scale: float | None = None,
    layout: str = "bhnd",
    stream: Any = None,
) -> GroupedPages:
    """Return empty pages for the grouped keys of many sequences, which `distr_attention` takes in the place of ``k``.

    A page is a grouping block of ``block_size`` keys. The last page of a sequence is kept as it is in one of ``tails``
    places; when the first key after it comes, it is finished, as a block of `GroupedKeys` is. All memory is taken here.

    Parameters
    ----------
    k : array, shape (1, H_kv, any number of rows, D), float16 | bfloat16 | float32 | float64
        Keys like those to come: only their heads, width, dtype, kind and device count.
    q : array, shape (1, H, any number of rows, D), dtype of ``k``
        Queries like those that the keys of all sequences will meet; as in `group_keys`.
    pages, tails : int
        How many pages there are, and how many of them may be unfinished at a time: one for every sequence that lives.
    block_size : {16, 32, 64, 128, 256}
        Keys in a page; the values of the caller lie in pages of as many rows.
    group_size, rank, refine, scale, layout, stream
        As in `group_keys`. The rank must be less than D.

    Returns
    -------
    GroupedPages

    Raises
    ------
    TypeError, ValueError
        As `group_keys` does; the text names the argument.
    NotImplementedError
        If the keys are Numba device arrays of bfloat16.

    Examples
    --------
    >>> import numpy as np
    >>> from distrattn_np import distr_attention, group_pages
    >>> rng = np.random.default_rng(0)
    >>> q, k = rng.standard_normal((2, 1, 2, 40, 64), dtype=np.float32)
    >>> v = rng.standard_normal((10, 2, 16, 64), dtype=np.float32)  # 10 pages of 16 values
    >>> keys = group_pages(k, q, pages=10, tails=1, block_size=16)
    >>> table, lengths = np.array([[7, 2, 5]], np.int32), np.array([0], np.int32)
    >>> keys.append(k, table, lengths)
    >>> distr_attention(q[:, :, 39:], keys, v, page_table=table, seqlens_k=lengths + 40, causal=True).shape
    (1, 2, 1, 64)
    """
    handle = checks.check_stream(stream)
    k, q = checks.arrays_in_place(handle, k=k, q=q)
    grouping, scale = checks.check_group_pages(
        k,
        q,
        pages=pages,
        tails=tails,
        scale=scale,
        group_size=group_size,
        rank=rank,
        refine=refine,
        block_size=block_size,
        layout=layout,
    )
    checks.check_stream_of(k, stream)
    order: Layout = "bnhd" if layout == "bnhd" else "bhnd"
    of_kind = _pages_for(kind_of(k) or "numpy")
    keys = class_for(of_kind.kind)
    first = keys.bhnd(k, order)
    with keys.on_device_of(first), keys.on_stream(handle):
        queries = None
        if q is not None:
            queries = keys.query_statistics(keys.bound(keys.bhnd(q, order), handle), first.shape[1])
        like = keys.bound(first, handle)
        return of_kind(like, pages, tails, grouping=grouping, queries=queries, scale=scale, layout=order)


class GroupedPages:
    """Pages as `group_pages` makes them and `load` reads them; `distr_attention` takes them in the place of ``k``.

    Calls name the pages of each sequence by ``page_table`` and ``seqlens_k``, and have their values in pages of the
    same numbers. What a finished page holds depends on its keys and the known queries alone.

    Attributes
    ----------
    kind : {"numpy", "cupy", "numba"}
        Of the arrays that they take and hold.
    grouping : Subspace
    queries : QueryStatistics or None
        None where no queries were given.
    scale : float
        Of the scores.
    layout : {"bhnd", "bnhd"}
        Of the keys that are appended, and of the arrays of a call.
    sampled : array, shape (P, H_kv, S, R)
        The keys of finished pages, less their mean, times W. CuPy pads R and D to multiples of 16.
    maps : array, shape (P, H_kv, R + 1, D)
        Z transposed, and then the mean, of finished pages.
    ranks, score_errors : array, shape (P, H_kv)
        Of finished pages, as of `GroupedKeys`.
    tails : array, shape (places, H_kv, S, D)
        The keys of unfinished pages.
    tail_of : array, shape (P,), int32
        The place of an unfinished page among the tails; -1 of any other page.
    filled : NumPy array, shape (P,), int32
        How many keys a page has.
    """

    kind: ClassVar[Kind] = "numpy"
    called: ClassVar[str] = "GroupedPages"

    def __init__(
        self,
        like: Any,
        pages: int,
        tails: int,
        *,
        grouping: Subspace,
        queries: QueryStatistics | None,
        scale: float,
        layout: Layout,
    ) -> None:
        """Take memory for keys like those of ``like`` (1, H_kv, rows, D)."""
        self.grouping = grouping
        self.queries = queries
        self.scale = scale
        self.layout = layout
        _, heads, _, self._width = like.shape
        self._rank: int = grouping.rank or 0
        L = grouping.block_size
        rank, width = self._padded(self._rank), self._padded(self._width)
        self.sampled = self._zeros((pages, heads, L, rank), like.dtype, like)
        self.maps = self._zeros((pages, heads, rank + 1, width), like.dtype, like)
        self.ranks = self._zeros((pages, heads), np.int32, like)
        self.score_errors = self._zeros((pages, heads), self._sum_type(like.dtype), like)
        self.tails = self._zeros((tails, heads, L, self._width), like.dtype, like)
        self.filled = np.zeros(pages, np.int32)
        self.tail_of = self._zeros((pages,), np.int32, like)
        self._take_tails(np.full(pages, -1, np.int32))

    def __repr__(self) -> str:
        """Return what error messages say of it."""
        return f"GroupedPages of shape {self.shape} and dtype {self.dtype}"

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Shape of the pages as if their keys were plain, in `layout`."""
        pages, heads, size, _ = self.sampled.shape
        return (pages, size, heads, self._width) if self.layout == "bnhd" else (pages, heads, size, self._width)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the keys."""
        dtype: np.dtype[Any] = self.tails.dtype
        return dtype

    @property
    def device(self) -> int:
        """Number of the device that holds them; 0 for NumPy."""
        return 0

    @property
    def page_size(self) -> int:
        """S, keys in a page."""
        size: int = self.sampled.shape[2]
        return size

    @property
    def rank(self) -> int:
        """Numbers that are kept of a key of a finished page."""
        return self._rank

    @property
    def nbytes(self) -> int:
        """Memory that the pages and what belongs to them take."""
        arrays = [getattr(self, name) for name in POOLS] + [self.tails, self.tail_of]
        if self.queries is not None:
            arrays.append(self.queries.gram)
        return sum(x.nbytes for x in arrays)

    def append(self, k: Any, page_table: np.ndarray, seqlens_k: np.ndarray, *, stream: Any = None) -> None:
        """Append as many keys to each sequence; every page that they fill and exceed is finished.

        Parameters
        ----------
        k : array, shape (B, H_kv, any number of rows, D) in `layout`, dtype and kind of the pages
            Row i of sequence b is its key ``seqlens_k[b] + i``.
        page_table : NumPy array, shape (B, T), int32
            Key m of sequence b comes into page ``page_table[b, m // S]``. A page is begun anew with its first key, and
            what it held is forgotten. The pages before may be shared once they are finished.
        seqlens_k : NumPy array, shape (B,), int32
            How many keys each sequence has before. Table and lengths are host arrays on a GPU, too: the host must
            know which pages are finished.
        stream : int or stream, optional
            What the work is queued on, with device arrays; as in `distr_attention`.

        Raises
        ------
        TypeError, ValueError
            If an argument breaks one of the rules above, a page does not hold the keys before, or more pages are
            unfinished than there are tails; nothing is appended then.
        """
        handle = checks.check_stream(stream)
        (k,) = checks.arrays_in_place(handle, k=k)
        checks.check_appended_to_pages(k, page_table, seqlens_k, self)
        checks.check_stream_of(k, stream)
        keys = class_for(self.kind)
        new = keys.bhnd(k, self.layout)
        plan = Append(self)
        for b, length in enumerate(seqlens_k.tolist()):
            plan.add(b, page_table[b], length, new.shape[2])
        with keys.on_device_of(self.tails), keys.on_stream(handle):
            self._append(keys.bound(new, handle), plan)
        self.filled = plan.filled

    def _append(self, new: Any, plan: Append) -> None:
        """Write what comes of new keys (B, H_kv, rows, D)."""
        self._put_rows(plan.rows_before, new)
        blocks = {page: self.tails[place] for page, place in plan.from_tails.items()}
        blocks |= {page: new[b, :, i : i + self.page_size] for page, (b, i) in plan.whole.items()}
        if blocks:
            self._finish(blocks)
        self._put_rows(plan.rows_after, new)
        if not np.array_equal(plan.tail_of, self._tail_of_on_host):
            self._take_tails(plan.tail_of)

    def release(self, pages: Iterable[int]) -> None:
        """Forget what these pages hold, and give the tails of those that are unfinished to others."""
        numbers = checks.check_released(pages, len(self.filled))
        self.filled[numbers] = 0
        tail_of = self._tail_of_on_host.copy()
        tail_of[numbers] = -1
        with class_for(self.kind).on_device_of(self.tails):
            self._take_tails(tail_of)

    def save(self, file: str | Path | IO[bytes]) -> None:
        """Write everything as plain arrays, in NumPy's npz format, to a path or a binary file."""
        if isinstance(file, str | Path):
            with Path(file).open("wb") as opened:
                self.save(opened)
            return
        arrays = {name: self._on_host(getattr(self, name)) for name in (*POOLS, "tails", "tail_of")}
        rank, width = self.rank, self._width
        arrays["sampled"] = arrays["sampled"][..., :rank]
        maps = arrays["maps"][..., :width]
        arrays["maps"] = np.concatenate([maps[:, :, :rank], maps[:, :, -1:]], axis=2)
        arrays["score_errors"] = arrays["score_errors"].astype(np.float64)
        if self.queries is not None:
            gram = self._on_host(self.queries.gram)[..., :width, :width]
            arrays |= {"query_gram": gram.astype(np.float64), "query_rows": np.array(self.queries.rows)}
        numbers = {"format": FORMAT, "dtype": self.dtype.name, "layout": self.layout, "scale": self.scale}
        numbers |= {"rank": rank, "refine": self.grouping.refine, "filled": self.filled}
        everything = arrays | {name: np.asarray(value) for name, value in numbers.items()}
        np.savez(file, **{name: as_plain(array) for name, array in everything.items()})  # type: ignore[arg-type]

    @staticmethod
    def load(file: str | Path | IO[bytes], *, kind: Kind = "numpy") -> GroupedPages:
        """Return pages as `save` wrote them, bit for bit.

        Parameters
        ----------
        file : path or binary file
            What `save` wrote, of whatever kind the pages were.
        kind : {"numpy", "cupy", "numba"}
            Of the pages that are returned; those on a GPU are on the current device.

        Raises
        ------
        ValueError
            If the file holds something else, or ``kind`` is another.
        NotImplementedError
            If the keys are bfloat16, and ``kind`` is "numba".
        """
        checks.check_kind_to_load(kind)
        arrays = read_arrays(file, "GroupedPages.save")
        checks.check_saved_pages(file, arrays, FORMAT)
        checks.check_dtype_of_grouped_keys("file", str(arrays["dtype"]), kind, str(file))
        dtype = dtype_of_name(str(arrays["dtype"]))
        tails = arrays["tails"].view(dtype)
        rank, places, size = int(arrays["rank"]), len(tails), tails.shape[2]
        of_kind = _pages_for(kind)
        queries = None
        if "query_gram" in arrays:
            queries = QueryStatistics(arrays["query_gram"], int(arrays["query_rows"]))
            queries = queries.padded(of_kind._padded(tails.shape[3]), of_kind._sum_type(dtype))
            queries = replace(queries, gram=of_kind._on_device(queries.gram))
        pages = of_kind(
            of_kind._on_device(tails[:1]),
            len(arrays["filled"]),
            places,
            grouping=Subspace(rank, None, int(arrays["refine"]), size, "keys"),
            queries=queries,
            scale=float(arrays["scale"]),
            layout="bnhd" if arrays["layout"] == "bnhd" else "bhnd",
        )
        width = tails.shape[3]
        maps = arrays["maps"].view(dtype)
        for place, kept in (
            (pages.sampled[:, :, :, :rank], arrays["sampled"].view(dtype)),
            (pages.maps[:, :, :rank, :width], maps[:, :, :-1]),
            (pages.maps[:, :, -1, :width], maps[:, :, -1]),
            (pages.ranks, arrays["ranks"]),
            (pages.score_errors, arrays["score_errors"].astype(pages.score_errors.dtype)),
            (pages.tails, tails),
        ):
            pages._put(place, pages._on_device(np.ascontiguousarray(kept)))
        pages.filled = arrays["filled"]
        pages._take_tails(arrays["tail_of"])
        return pages

    def _put_rows(self, rows: list[tuple[int, int, int, int]], new: Any) -> None:
        """Write rows of new keys (B, H_kv, rows, D) into tails: (place, row in it, sequence, row of the sequence)."""
        if rows:
            place, to, b, of = self._on_device(np.array(rows).T.copy())
            as_bits(self.tails.swapaxes(1, 2))[place, to] = as_bits(new.swapaxes(1, 2))[b, of]

    def _take_tails(self, tail_of: np.ndarray) -> None:
        """Take over the places of unfinished pages."""
        self._tail_of_on_host = tail_of
        self._put(self.tail_of, self._on_device(tail_of))  # in its place, where graphs read it

    def _finish(self, blocks: dict[int, Any]) -> None:
        """Write what is kept of pages, by their keys (H_kv, S, D)."""
        for page, keys in blocks.items():
            block = reduce_block(keys[np.newaxis], self.queries, self.grouping, self.scale)
            self.sampled[page] = block.sampled[0]
            self.maps[page, :, :-1] = block.fusion[0].swapaxes(1, 2)
            self.maps[page, :, -1] = block.mean[0]
            self.ranks[page], self.score_errors[page] = block.ranks[0], block.score_errors[0]

    # ---- what the kinds of arrays differ in ----

    @staticmethod
    def _padded(size: int) -> int:
        """Return how many columns are kept for a rank or a width."""
        return size

    @staticmethod
    def _sum_type(dtype: Any) -> Any:  # noqa: ARG004
        """Return the type of predicted errors."""
        return np.float64

    @staticmethod
    def _zeros(shape: tuple[int, ...], dtype: Any, like: Any) -> Any:  # noqa: ARG004
        """Return zeros where ``like`` is."""
        return np.zeros(shape, dtype)

    @staticmethod
    def _put(target: Any, source: Any) -> None:
        """Write ``source`` into a view of the same shape."""
        target[...] = source

    @staticmethod
    def _on_device(array: np.ndarray) -> Any:
        return array

    @staticmethod
    def _on_host(array: Any) -> np.ndarray:
        host: np.ndarray = array
        return host


def as_bits(array: Any) -> Any:
    """Return a view of integers of the same size, which index arrays take where they do not take bfloat16."""
    return array.view(f"u{array.dtype.itemsize}")


def _pages_for(kind: Kind) -> type[GroupedPages]:
    """Return the class of `GroupedPages` of this kind of arrays, importing their package."""
    if kind == "numpy":
        return GroupedPages
    module = importlib.import_module(f".backends.{kind}_grouped_pages", __package__)
    found: type[GroupedPages] = module.GROUPED_PAGES
    return found


class Append:
    """What an append does to pages, found before anything is written."""

    def __init__(self, pages: GroupedPages) -> None:
        self.size, self.places = pages.page_size, len(pages.tails)
        self.filled, self.tail_of = pages.filled.copy(), pages._tail_of_on_host.copy()
        self.free: list[int] = np.setdiff1d(np.arange(self.places), self.tail_of).tolist()
        self.rows_before: list[tuple[int, int, int, int]] = []
        """Of pages that have some already; see `GroupedPages._put_rows`."""
        self.from_tails: dict[int, int] = {}
        """Pages that are finished, and the places of their keys among the tails."""
        self.whole: dict[int, tuple[int, int]] = {}
        """Pages that are finished, and the sequences and rows that their new keys begin with."""
        self.rows_after: list[tuple[int, int, int, int]] = []
        """Of pages that are begun, in places that finished ones may have had."""

    def add(self, b: int, page_table: np.ndarray, length: int, rows: int) -> None:
        """Append ``rows`` keys to a sequence of this length."""
        if not rows:
            return
        if length:
            last, room = int(page_table[(length - 1) // self.size]), -length % self.size
            checks.check_filled(last, int(self.filled[last]), self.size - room, b)
            if room == 0:
                self._finish(last)
        for c in range(length // self.size, ceil_div(length + rows, self.size)):
            page, begin = int(page_table[c]), c * self.size
            first, last_row = max(length, begin), min(length + rows, begin + self.size)
            goes_on = last_row < length + rows
            if first == begin:
                self._give_tail_back(page)
            self.filled[page] = last_row - begin
            if first == begin and goes_on:
                self.whole[page] = b, first - length
                continue
            written = self.rows_before
            if first == begin:
                self.tail_of[page], written = self._free_place(), self.rows_after
            place = int(self.tail_of[page])
            written += [(place, m - begin, b, m - length) for m in range(first, last_row)]
            if goes_on:
                self._finish(page)

    def _finish(self, page: int) -> None:
        """Reduce a full page, unless a sequence that shares it was faster."""
        if self.tail_of[page] >= 0:
            self.from_tails[page] = int(self.tail_of[page])
            self._give_tail_back(page)

    def _give_tail_back(self, page: int) -> None:
        if self.tail_of[page] >= 0:
            self.free.append(int(self.tail_of[page]))
            self.tail_of[page] = -1

    def _free_place(self) -> int:
        checks.check_free_tail(self.free, self.places)
        return self.free.pop()
