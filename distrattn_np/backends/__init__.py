"""Three implementations behind one interface, loaded only when an array of theirs comes in or a caller names one."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import numpy as np

from ..arrays import Kind, describe, kind_of
from ..grouped_keys import GroupedKeys
from ..problem import GroupMaps, Layout, PagedProblem, Problem, RaggedProblem, Subspace, SubspaceMaps

NAMES = ("numpy", "cupy", "numba")

INSTALL = {
    "cupy": "pip install 'distrattn_np[cuda13]' (or [cuda12] for a CUDA 12 driver)",
    "numba": "pip install 'distrattn_np[cuda13]' (or [cuda12]); for Numba's simulator on a CPU, pip install numba",
}


Maps = GroupMaps | SubspaceMaps | None
"""What a backend makes of a problem's queries and keys before it attends; None for exact attention."""


@dataclass(frozen=True, slots=True)
class ScoreTables:
    """What a call adds to its scores and hides of them; both broadcast to (B, H, N, M)."""

    mask: Any = None
    """Bool: True where a query may attend (eq. 24)."""
    bias: Any = None
    """Of the dtype of the queries or float32 (eq. 22)."""

    def map(self, change: Callable[[Any], Any]) -> ScoreTables:
        """Return both changed, but for what is not there."""
        return ScoreTables(*(None if x is None else change(x) for x in (self.mask, self.bias)))


NO_TABLES = ScoreTables()


@dataclass(frozen=True, slots=True)
class Lent:
    """What the caller brings along for a call, beside its arrays and ``out``."""

    stream: int | None = None
    """Handle of the stream that it runs on; None: the current one."""
    workspace: Any = None
    """Device memory that the call may use; None: the backend allocates."""
    lse: Any = None
    """Where the log-sum-exp goes; None: new memory."""
    wants_lse: bool = True
    """Whether the log-sum-exp leaves the call."""


NOTHING_LENT = Lent()


class KeysInPages(ABC):
    """Pages of keys as a backend for GPUs takes them, in the place of an array."""

    @abstractmethod
    def brought_in(self, bring_in: Callable[[Any, Layout], Any], layout: Layout) -> KeysInPages:
        """Return the same with native arrays; ``bring_in`` as of `Backend`."""

    @abstractmethod
    def attend(self, problem: Problem, Q: Any, V: Any, O: Any, lse: Any, tables: ScoreTables) -> None:
        """Write attention to these keys into O and lse, as `Backend.attend` does; each sequence has its own maps."""


def keys_brought_in(k: Any, bring_in: Callable[[Any, Layout], Any], layout: Layout) -> Any:
    """Return the keys of a call as `Backend.compute` takes them; grouped ones stay what they are."""
    if isinstance(k, KeysInPages):
        return k.brought_in(bring_in, layout)
    return k if isinstance(k, GroupedKeys) else bring_in(k, layout)


class Backend(ABC):
    """One implementation of the method. Its arrays ("native") are (B, H, rows, width) views, whatever the layout."""

    name: ClassVar[str]
    kinds: ClassVar[frozenset[Kind]]
    """Array kinds that it takes."""
    builds_subspace: ClassVar[bool] = False
    """Whether it covers ``method="subspace"``."""
    kinds_of_grouped_keys: ClassVar[frozenset[Kind]] = frozenset()
    """Array kinds of the `GroupedKeys` that it takes in the place of keys."""
    kinds_of_grouped_pages: ClassVar[frozenset[Kind]] = frozenset()
    """Array kinds of the `GroupedPages`."""

    def attention(
        self,
        problem: Problem,
        q: Any,
        k: Any,
        v: Any,
        out: Any,
        tables: ScoreTables = NO_TABLES,
        lent: Lent = NOTHING_LENT,
    ) -> tuple[Any, Any, Maps]:
        """Compute one checked call.

        Returns
        -------
        result : array, in the caller's kind and layout
        lse : array, shape (B, H, N), in the caller's kind
        maps : native arrays
        """
        self.refuse(problem, q)
        Q, V = (self.bring_in(x, problem.layout) for x in (q, v))
        K = keys_brought_in(k, self.bring_in, problem.layout)
        tables = tables.map(lambda table: self.bring_in(_written_once(table), "bhnd"))
        if out is not None and self.shares_memory(out):
            O = self.bring_in(out, problem.layout)
        else:
            O = self.empty((problem.batch, problem.heads, problem.queries, problem.value_width), Q, problem.layout)
        if lent.lse is not None and self.shares_memory(lent.lse):
            lse = self.bring_in(lent.lse, "bhnd")
        else:
            lse = self.empty_lse((problem.batch, problem.heads, problem.queries), Q, is_kept=lent.wants_lse)
        maps = self.compute(problem, Q, K, V, O, lse, tables)
        result = self.hand_back(O, problem.layout, like=q, out=out)
        return result, self.hand_back(lse, None, like=q, out=lent.lse), maps

    def refuse(self, problem: Problem | RaggedProblem | PagedProblem, q: Any) -> None:
        """Raise where the backend has no kernel for a problem."""
        if kind_of(q) not in self.kinds:
            rule = f"the {self.name} backend takes {' and '.join(sorted(self.kinds))} arrays"
            raise TypeError(f"q: {rule}, got {describe(q)}")
        if isinstance(problem, RaggedProblem):
            problem = problem.packed
        if isinstance(problem, PagedProblem):
            problem = problem.longest
        if isinstance(problem.grouping, Subspace) and not self.builds_subspace:
            rule = f"'subspace' is not built for the {self.name} backend yet"
            raise NotImplementedError(f"method: {rule}, got {describe(q)}")

    def compute(
        self,
        problem: Problem,
        Q: Any,
        K: Any,
        V: Any,
        O: Any,
        lse: Any,
        tables: ScoreTables = NO_TABLES,
    ) -> Maps:
        """Write attention into O and lse, native arrays, and return the maps that were made for it."""
        if 0 in O.shape:
            return None
        maps = None if isinstance(K, GroupedKeys | KeysInPages) else self.group_maps(problem, Q, K)
        self.attend(problem, Q, K, V, O, lse, maps, tables)
        return maps

    @abstractmethod
    def workspace_bytes(
        self,
        problem: Problem | RaggedProblem | PagedProblem,
        q: Any,
        k: Any,
        v: Any,
        out: Any,
        tables: ScoreTables = NO_TABLES,
        lent: Lent = NOTHING_LENT,
        page_table: Any = None,
        seqlens_k: Any = None,
    ) -> int:
        """Return the bytes of workspace that a call needs; of its arrays only shapes, strides, addresses count."""

    @abstractmethod
    def ragged_attention(
        self,
        problem: RaggedProblem,
        q: Any,
        k: Any,
        v: Any,
        out: Any,
        cu_seqlens_q: Any,
        cu_seqlens_k: Any,
        lent: Lent = NOTHING_LENT,
    ) -> tuple[Any, Any, tuple[Any, Any] | None]:
        """Compute one checked call with packed sequences.

        On a GPU without reading the lengths on the host: B sequences with N queries in all have at most
        ``N // BLOCK_Q + B`` tiles of queries, and grouping blocks likewise. So many work items are launched. Each finds
        its sequence in running sums of ``ceil(length / BLOCK_Q)`` over ``cu_seqlens_q``; one that finds none exits.

        Returns
        -------
        result : array, shape (N, H, E), in the caller's kind
        lse : array, shape (H, N), in the caller's kind
        blocks : (ranks, score_errors), each of shape (H_x, C), in the caller's kind
            As in `AttentionInfo`, the blocks of all sequences one after another; None unless the method is "subspace".
            Where the host does not know how many there are, C is the most that there can be, ``rows // L + B`` for
            ``rows`` rows of the side that is cut into blocks of L, and both are zero behind the last block.
        """

    @abstractmethod
    def paged_attention(
        self,
        problem: PagedProblem,
        q: Any,
        k: Any,
        v: Any,
        out: Any,
        page_table: Any,
        seqlens_k: Any,
        lent: Lent = NOTHING_LENT,
    ) -> tuple[Any, Any]:
        """Compute one checked call with keys and values in pages, on a GPU without reading the lengths on the host.

        Returns
        -------
        result : array, shape (B, H, N, E), in the caller's kind and layout
        lse : array, shape (B, H, N), in the caller's kind
        """

    @abstractmethod
    def group_maps(self, problem: Problem, Q: Any, K: Any) -> Maps:
        """Return the maps of every block (docs/math.md, eq. 5 to 9 and 11 to 19); None for exact attention."""

    @abstractmethod
    def attend(
        self,
        problem: Problem,
        Q: Any,
        K: Any,
        V: Any,
        O: Any,
        lse: Any,
        maps: Any,
        tables: ScoreTables = NO_TABLES,
    ) -> None:
        """Write attention into O (B, H, N, E) and its log-sum-exp into lse (B, H, N); no axis of O is empty.

        K is a `GroupedKeys` where the call got one, or `KeysInPages`.
        """

    @abstractmethod
    def bring_in(self, array: Any, layout: Layout) -> Any:
        """Return ``array`` as a native view; copied only from host to device."""

    @abstractmethod
    def shares_memory(self, array: Any) -> bool:
        """Whether `bring_in` of this array is a view of it, not a copy."""

    @abstractmethod
    def empty(self, shape: tuple[int, int, int, int], like: Any, layout: Layout) -> Any:
        """Return a new (B, H, rows, width) array of ``like``'s dtype whose memory is ordered as ``layout``."""

    @abstractmethod
    def empty_lse(self, shape: tuple[int, int, int], like: Any, *, is_kept: bool = True) -> Any:
        """Return a new float32 (B, H, N) array on ``like``'s device; ``is_kept``: it outlives the call."""

    @abstractmethod
    def hand_back(self, array: Any, layout: Layout | None, *, like: Any, out: Any) -> Any:
        """Return a native array as the caller's kind and layout (None: as it is), in ``out`` where that is given."""


def load(name: str | None, *, like: Any) -> Backend:
    """Return the named backend, or the one of ``like``'s kind."""
    return load_by_name(name or kind_of(like) or "numpy")


@cache
def load_by_name(name: str) -> Backend:
    """Return one backend, importing its package."""
    try:
        importlib.import_module(name)
        module = importlib.import_module(f".{name}_backend", __name__)
    except ImportError as error:
        hint = INSTALL.get(name, "")
        raise ImportError(f"backend: {name!r} needs a package that is not installed: {hint}") from error
    backend: Backend = module.BACKEND
    return backend


def _written_once(table: Any) -> Any:
    """Return ``table`` with one entry on the axes that repeat it, so that no copy to a device writes it out."""
    axes = zip(table.shape, table.strides, strict=True)
    parts = tuple(slice(0, 1) if stride == 0 and size > 1 else slice(None) for size, stride in axes)
    return table[parts] if slice(0, 1) in parts else table


def host_copy_back(host: np.ndarray, layout: Layout | None, out: Any) -> np.ndarray:
    """Return a host (B, H, rows, width) result in the caller's layout, written into ``out`` where that is given."""
    result = host.transpose(0, 2, 1, 3) if layout == "bnhd" else host
    if out is None:
        return result
    out[...] = result
    return out  # type: ignore[no-any-return]
