"""Other training-free approximations of attention, in NumPy or CuPy, each from its paper's equations.

They are here to be compared with, on whole models (docs/models.md). Every module has two functions. The call,
``<name>_attention(q, k, v, causal=..., options)``, takes the arrays of `distr_attention`; its scale is ``1 / sqrt(D)``,
and a causal call has as many queries as keys. ``<name>_flop(N, M, D, E, causal=..., options)`` is what one query head
costs: a multiply-add counts as two, exponentials and sorting not at all, as in `distrattn_np.work`.
"""

from .hydra import hydra_attention, hydra_flop
from .hyper import hyper_attention, hyper_flop
from .int8 import int8_attention, int8_flop
from .nystrom import nystrom_attention, nystrom_flop
from .performer import performer_attention, performer_flop

__all__ = [
    "hydra_attention",
    "hydra_flop",
    "hyper_attention",
    "hyper_flop",
    "int8_attention",
    "int8_flop",
    "nystrom_attention",
    "nystrom_flop",
    "performer_attention",
    "performer_flop",
]
