"""How many rows a block of ``method="subspace"`` has where the caller does not say (docs/block_size.md)."""

from __future__ import annotations

SMALLEST = 128
"""Rows of a tile of keys in the GPU kernels: shorter blocks would change maps within a tile."""
EXP_COST = 128
"""What the exponential of a score costs, in multiply-adds: an SM of an H100 does 16 or 2048 of them in a cycle."""
REBUILD_SHARE = 0.1
"""Part of the two products that rebuilding Y Z may add to them."""


def choose_block_size(width: int, rank: int | None) -> tuple[int, str]:
    """Return L and the reason for it: the smallest power of two that costs little speed, since accuracy falls with L.

    Rows of the other side are multiplied by the map of every block that they meet, D R / L multiply-adds a score. That
    must hide behind the exponentials, or add at most a tenth to the R + D of the two products. Where every block
    chooses its own rank (None), R is taken for D / 2. Exact own blocks cost (D - R) L / N more and 2 D R / N less: too
    little to make the choice depend on N.
    """
    rank = width // 2 if rank is None else rank
    products = rank + width
    allowed = max(EXP_COST, (1 + REBUILD_SHARE) * products)
    size = SMALLEST
    while products + width * rank / size > allowed:
        size *= 2
    hides = products + width * rank / size <= EXP_COST
    gain = (
        f"less than the {EXP_COST} of an exponential" if hides else f"at most {1 + REBUILD_SHARE:g} times the products"
    )
    return size, (
        f"chosen: the smallest power of two from {SMALLEST} on that keeps R + D + D R / L "
        f"= {rank} + {width} + {width * rank / size:g} multiply-adds a score {gain}"
    )
