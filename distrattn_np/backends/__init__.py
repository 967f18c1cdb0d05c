"""Three implementations behind one interface, loaded only when an array of theirs comes in or a caller names one."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import numpy as np

from ..arrays import Kind, describe, kind_of
from ..grouped_keys import GroupedKeys
from ..problem import GroupMaps, Layout, Problem, Subspace, SubspaceMaps

NAMES = ("numpy", "cupy", "numba")

INSTALL = {
    "cupy": "pip install 'distrattn_np[cuda13]' (or [cuda12] for a CUDA 12 driver)",
    "numba": "pip install 'distrattn_np[cuda13]' (or [cuda12]); for Numba's simulator on a CPU, pip install numba",
}


Maps = GroupMaps | SubspaceMaps | None
"""What a backend makes of a problem's queries and keys before it attends; None for exact attention."""


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


class Backend(ABC):
    """One implementation of the method. Its arrays ("native") are (B, H, rows, width) views, whatever the layout."""

    name: ClassVar[str]
    kinds: ClassVar[frozenset[Kind]]
    """Array kinds that it takes."""
    builds_subspace: ClassVar[bool] = False
    """Whether it covers ``method="subspace"``."""
    score_options: ClassVar[frozenset[str]] = frozenset()
    """Which of "window", "softcap", "mask" and "bias" it covers."""
    attends_grouped_keys: ClassVar[bool] = False
    """Whether it takes `GroupedKeys` in the place of keys."""

    def attention(
        self,
        problem: Problem,
        q: Any,
        k: Any,
        v: Any,
        out: Any,
        mask: Any = None,
        bias: Any = None,
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
        keys_are_grouped = isinstance(k, GroupedKeys)
        Q, V = (self.bring_in(x, problem.layout) for x in (q, v))
        K = k if keys_are_grouped else self.bring_in(k, problem.layout)
        mask, bias = (None if x is None else self.bring_in(x, "bhnd") for x in (mask, bias))
        if out is not None and self.shares_memory(out):
            O = self.bring_in(out, problem.layout)
        else:
            O = self.empty((problem.batch, problem.heads, problem.queries, problem.value_width), Q, problem.layout)
        if lent.lse is not None and self.shares_memory(lent.lse):
            lse = self.bring_in(lent.lse, "bhnd")
        else:
            lse = self.empty_lse((problem.batch, problem.heads, problem.queries), Q, is_kept=lent.wants_lse)
        maps = self.compute(problem, Q, K, V, O, lse, mask, bias)
        result = self.hand_back(O, problem.layout, like=q, out=out)
        return result, self.hand_back(lse, None, like=q, out=lent.lse), maps

    def refuse(self, problem: Problem, q: Any) -> None:
        """Raise where the backend has no kernel for a problem."""
        if kind_of(q) not in self.kinds:
            rule = f"the {self.name} backend takes {' and '.join(sorted(self.kinds))} arrays"
            raise TypeError(f"q: {rule}, got {describe(q)}")
        if isinstance(problem.grouping, Subspace) and not self.builds_subspace:
            rule = f"'subspace' is not built for the {self.name} backend yet"
            raise NotImplementedError(f"method: {rule}, got {describe(q)}")
        for name in sorted(problem.score_options - self.score_options):
            rule = f"is not built for the {self.name} backend yet"
            raise NotImplementedError(f"{name}: {rule}, got {describe(q)}")

    def compute(
        self,
        problem: Problem,
        Q: Any,
        K: Any,
        V: Any,
        O: Any,
        lse: Any,
        mask: Any = None,
        bias: Any = None,
    ) -> Maps:
        """Write attention into O and lse, native arrays, and return the maps that were made for it."""
        if 0 in O.shape:
            return None
        maps = None if isinstance(K, GroupedKeys) else self.group_maps(problem, Q, K)
        self.attend(problem, Q, K, V, O, lse, maps, mask, bias)
        return maps

    @abstractmethod
    def workspace_bytes(
        self,
        problem: Problem,
        q: Any,
        k: Any,
        v: Any,
        out: Any,
        mask: Any = None,
        bias: Any = None,
        lent: Lent = NOTHING_LENT,
    ) -> int:
        """Return the bytes of workspace that `attention` needs; of its arrays only shapes, strides, addresses count."""

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
        mask: Any = None,
        bias: Any = None,
    ) -> None:
        """Write attention into O (B, H, N, E) and its log-sum-exp into lse (B, H, N); no axis of O is empty.

        K is a `GroupedKeys` where the call got one. ``mask`` and ``bias`` broadcast to (B, H, N, M); they are None
        where `score_options` does not name them.
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


def host_copy_back(host: np.ndarray, layout: Layout | None, out: Any) -> np.ndarray:
    """Return a host (B, H, rows, width) result in the caller's layout, written into ``out`` where that is given."""
    result = host.transpose(0, 2, 1, 3) if layout == "bnhd" else host
    if out is None:
        return result
    out[...] = result
    return out  # type: ignore[no-any-return]
