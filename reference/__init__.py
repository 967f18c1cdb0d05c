"""NumPy, one function an equation: the oracle of the tests, and the steps that the NumPy backend calls.

Every function computes in the precision of its inputs. ``distr_attention``, ``subspace_attention`` and
``exact_attention`` convert to float64 first: called through them, this package is the definition that all backends are
compared with.
"""

from .channel_norms import channel_norms
from .distr_attention import distr_attention, fused_scores, group_maps
from .exact_attention import exact_attention, softmax_attention
from .fuse_channels import fuse_channels, sample_channels
from .fusion_gains import fusion_gains
from .gram import gram
from .group_channels import gray_rank, group_channels
from .grouped_keys import (
    expected_gram,
    finished_blocks,
    group_block,
    grouped_keys_attention,
    grouped_keys_scores,
    make_key_maps,
    query_statistics,
)
from .hash_channels import HASH_BITS, hash_channels, hyperplanes
from .merge_results import merge_results
from .paged_attention import paged_attention, rows_of_pages
from .ragged_attention import Attend, ragged_attention
from .score_options import ScoreOptions, Window, cap_scores, key_limits, of_head, visible_keys
from .subspace_attention import (
    Maps,
    key_mean,
    keys_of_mean,
    make_maps,
    own_block_begin,
    subspace_attention,
    subspace_scores,
)
from .subspace_maps import (
    RANK_STEP,
    balance_columns,
    cholesky,
    choose_channels,
    choose_ranks,
    half_step,
    rounding,
    score_errors,
    subspace_maps,
)

__all__ = [
    "HASH_BITS",
    "RANK_STEP",
    "Attend",
    "Maps",
    "ScoreOptions",
    "Window",
    "balance_columns",
    "cap_scores",
    "channel_norms",
    "cholesky",
    "choose_channels",
    "choose_ranks",
    "distr_attention",
    "exact_attention",
    "expected_gram",
    "finished_blocks",
    "fuse_channels",
    "fused_scores",
    "fusion_gains",
    "gram",
    "gray_rank",
    "group_block",
    "group_channels",
    "group_maps",
    "grouped_keys_attention",
    "grouped_keys_scores",
    "half_step",
    "hash_channels",
    "hyperplanes",
    "key_limits",
    "key_mean",
    "keys_of_mean",
    "make_key_maps",
    "make_maps",
    "merge_results",
    "of_head",
    "own_block_begin",
    "paged_attention",
    "query_statistics",
    "ragged_attention",
    "rounding",
    "rows_of_pages",
    "sample_channels",
    "score_errors",
    "softmax_attention",
    "subspace_attention",
    "subspace_maps",
    "subspace_scores",
    "visible_keys",
]
