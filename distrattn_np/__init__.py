"""Approximate attention that keeps the full context, on NumPy, CuPy and Numba CUDA arrays, without a framework."""

from importlib.metadata import PackageNotFoundError, version

from .attention import distr_attention, exact_attention, workspace_size
from .grouped_keys import GroupedKeys, group_keys
from .grouped_pages import GroupedPages, group_pages
from .merge import merge
from .shrink import PooledKeys, ProjectedValues, pool_keys, project_values

try:
    __version__ = version("distrattn_np")
except PackageNotFoundError:  # an uninstalled source tree
    __version__ = "0+unknown"

__all__ = [
    "GroupedKeys",
    "GroupedPages",
    "PooledKeys",
    "ProjectedValues",
    "__version__",
    "distr_attention",
    "exact_attention",
    "group_keys",
    "group_pages",
    "merge",
    "pool_keys",
    "project_values",
    "workspace_size",
]
