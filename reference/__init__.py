"""NumPy, one function an equation: the oracle of the tests, and the steps that the NumPy backend calls.

Every function computes in the precision of its inputs. ``distr_attention`` and ``exact_attention`` convert to float64
first: called through them, this package is the definition that all backends are compared with.
"""

from .channel_norms import channel_norms
from .distr_attention import distr_attention, fused_scores, group_maps
from .exact_attention import exact_attention, softmax_attention, visible_keys
from .fuse_channels import fuse_channels, sample_channels
from .fusion_gains import fusion_gains
from .group_channels import gray_rank, group_channels
from .hash_channels import HASH_BITS, hash_channels, hyperplanes

__all__ = [
    "HASH_BITS",
    "channel_norms",
    "distr_attention",
    "exact_attention",
    "fuse_channels",
    "fused_scores",
    "fusion_gains",
    "gray_rank",
    "group_channels",
    "group_maps",
    "hash_channels",
    "hyperplanes",
    "sample_channels",
    "softmax_attention",
    "visible_keys",
]
