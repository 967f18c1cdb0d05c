"""What a call reads of grouped keys on a CUDA device, and by which kernels; planned without CuPy, as any call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..problem import Problem, ceil_div
from ..tiles import REBUILD_TILE, SIMT_THREADS, rebuild_defines
from . import ScoreTables, cupy_decode
from .cupy_backend import BACKEND, _element, _empty, _launch, _strides
from .device_work import Placed

PLACES = (7, 8)
"""Of sampled keys and maps among the arguments of a plan, behind those of a call to plain keys."""


@dataclass(frozen=True, slots=True)
class KeptKeys:
    """The exact keys (B, H_kv, rows, D) and, before them, what is kept of finished blocks."""

    tail: Any
    finished: cupy_decode.FinishedKeys | None

    def attend(self, problem: Problem, Q: Any, V: Any, O: Any, lse: Any, tables: ScoreTables) -> None:
        """Write attention to these keys into O and lse, as `Backend.attend` does."""
        if self.finished is None:
            BACKEND.attend(problem, Q, self.tail, V, O, lse, None, tables)
        elif cupy_decode.suits(problem, tables):
            cupy_decode.decode(problem, Q, self.tail, V, O, lse, self.finished)
        else:
            BACKEND.attend(problem, Q, self._rebuilt(self.finished), V, O, lse, None, tables)

    def _rebuilt(self, finished: cupy_decode.FinishedKeys) -> Any:
        """Return all keys (B, H_kv, M, D) as they are or, of finished blocks, as they count (eq. 27)."""
        batch, heads, rows, width = self.tail.shape
        keys = _empty((batch, heads, finished.keys + rows, width), self.tail.dtype)
        blocks = finished.keys // finished.block_size
        tiles = blocks * ceil_div(finished.block_size, REBUILD_TILE) + ceil_div(rows, REBUILD_TILE)
        _launch(
            "rebuild_keys",
            rebuild_defines(_element(keys), width, finished.rank),
            batch * heads * tiles,
            SIMT_THREADS,
            *(finished.sampled, finished.maps, self.tail, keys, blocks, finished.block_size, rows),
            *(_strides(x)[0] for x in (finished.sampled, finished.maps)),
            *(_strides(x)[1] for x in (self.tail, keys)),
        )
        return keys

    def placed(self) -> PlacedKeys:
        """Return all of it that a plan depends on."""
        kept = self.finished
        if kept is None:
            return PlacedKeys(Placed.of(self.tail, "bhnd"), None, None, (0, 1, 0))
        tail, sampled, maps = (Placed.of(x, "bhnd") for x in (self.tail, kept.sampled, kept.maps))
        return PlacedKeys(tail, sampled, maps, (kept.keys, kept.block_size, kept.rank))


@dataclass(frozen=True, slots=True)
class PlacedKeys:
    """`KeptKeys` as a plan has them, in the place of `Placed` keys."""

    tail: Placed
    sampled: Placed | None
    maps: Placed | None
    numbers: tuple[int, int, int]
    """Finished keys, block size and rank."""

    def planned(self, place: int) -> KeptKeys:
        """Return them as the argument of a plan that comes at this place."""
        finished = None
        if self.sampled is not None and self.maps is not None:
            kept = (x.planned(y) for x, y in zip((self.sampled, self.maps), PLACES, strict=True))
            finished = cupy_decode.FinishedKeys(*self.numbers, *kept)
        return KeptKeys(self.tail.planned(place), finished)
