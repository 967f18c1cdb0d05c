"""What a call should give: the definition in float64, for all options of a call, on host arrays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .. import checks, reference
from ..backends import Maps
from ..problem import GroupMaps, Problem, Subspace, SubspaceMaps
from .device import to_host

Results = tuple[np.ndarray, np.ndarray]
MakeMaps = Callable[[Problem, np.ndarray, np.ndarray], Maps]
"""Takes a problem with its queries and keys in the "bhnd" layout."""


def make_reference_maps(problem: Problem, q: np.ndarray, k: np.ndarray) -> Maps:
    """Return the reference's maps."""
    if problem.grouping is None:
        return None
    if isinstance(problem.grouping, Subspace):
        return SubspaceMaps(*reference.make_maps(q, k, **problem.map_options))
    return GroupMaps(*reference.group_maps(q, k, **problem.map_options))


def attention(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    *,
    is_exact: bool = False,
    causal: bool | str = False,
    scale: float | None = None,
    window: tuple[int | None, int | None] | None = None,
    softcap: float = 0.0,
    mask: np.ndarray | None = None,
    bias: np.ndarray | None = None,
    cu_seqlens_q: np.ndarray | None = None,
    cu_seqlens_k: np.ndarray | None = None,
    make_maps: MakeMaps = make_reference_maps,
    **grouping: Any,
) -> Results:
    """Return out and lse of arrays in the "bhnd" layout, or of packed sequences; options are those of the calls."""
    options = reference.ScoreOptions(window or (None, None), softcap, mask, bias)

    def attend(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> Results:
        how = None if is_exact else checks.check_grouping(q, **({"method": "subspace"} | grouping))
        problem = checks.check_attention(
            q, k, v, causal=causal, scale=scale, layout="bhnd", out=None, grouping=how, window=window, softcap=softcap
        )
        # without queries there is nothing to make maps for
        maps = make_maps(problem, q, k) if q.size else None
        return _attend(problem, q, k, v, maps, options)

    if cu_seqlens_q is None or cu_seqlens_k is None:
        return attend(q, k, v)
    return reference.ragged_attention(q, k, v, cu_seqlens_q, cu_seqlens_k, attend)


def _attend(
    problem: Problem, q: np.ndarray, k: np.ndarray, v: np.ndarray, maps: Maps, options: reference.ScoreOptions
) -> Results:
    """Return the reference's result through these maps, of any kind of array."""
    common: dict[str, Any] = {"scale": problem.scale, "causal_offset": problem.causal_offset, "options": options}
    if problem.grouping is None or maps is None:
        return reference.exact_attention(q, k, v, **common)
    common |= {"block_size": problem.grouping.block_size, "group_by": problem.grouping.by}
    if isinstance(maps, SubspaceMaps):
        arrays = (maps.sampling, maps.fusion, maps.key_mean, maps.ranks, maps.score_errors)
        return reference.subspace_attention(q, k, v, reference.Maps(*map(to_host, arrays)), **common)
    given = to_host(maps.channels).astype(np.intp), None if maps.gains is None else to_host(maps.gains)
    group_size = problem.width // problem.rank
    # fusion and seed are in the maps
    return reference.distr_attention(q, k, v, **common, group_size=group_size, fusion="sum", seed=0, maps=given)
