"""The sampling and fusion maps of every block from its two Gram matrices (docs/math.md, eq. 13 to 19).

    T = A W,   C C^T = u (W^T T) u,   W <- W u C^-T,   Z <- T u C^-T

from channels that are chosen one after another on (eq. 15), and again with B and with A for every refinement; then the
errors are predicted, a rank is chosen and the columns are balanced.

Reference : reference/subspace_maps.py        CUDA C++ : raw_kernels/subspace_maps.cu
Launcher  : distrattn_np/backends/numba_backend.py

Grid      : any number of blocks, which take turns at the B * H_x * C maps; each has a workspace of its own
Block     : (thread_columns, thread_rows)
Shared    : two tiles [size, depth] of a product's operands, numbers for each channel and column, a number a thread
Assumes   : R < D unless the ranks are chosen

Columns of W and Z are rows of the workspace, so that neighbouring threads touch neighbouring numbers.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
from numba import cuda

from ..reference import RANK_STEP
from .gram import ProductTiles
from .sequences import FIRST_BLOCK, MET_START, MET_STOP, START, STOP

WIDE_BUFFERS = 4
"""[R, D] arrays in a workspace: W, Z and one product of each."""
SQUARE_BUFFERS = 2
"""[R, R] arrays in a workspace."""


@cache
def make_subspace_maps(
    accumulator: Any, width: int, rank: int, chooses_rank: bool, y_changes: bool, tiles: ProductTiles
) -> Any:
    """Return the kernel that makes ``rank`` columns; ``y_changes``: each block has a B of its own, not each head."""
    SIZE, DEPTH, THREAD_ROWS, THREAD_COLUMNS = tiles
    THREADS = THREAD_ROWS * THREAD_COLUMNS
    TILE_SHAPE = (SIZE, DEPTH + 1)  # one more, so that neighbouring rows start in different banks
    SUMS_SHAPE = (SIZE // THREAD_ROWS, SIZE // THREAD_COLUMNS)
    ZERO = accumulator(0)
    ONE = accumulator(1)
    TWO = accumulator(2)
    ROUNDING = accumulator(16 * np.finfo(accumulator).eps)

    def multiply(left: Any, right: Any, product: Any, left_smem: Any, right_smem: Any, ty: int, tx: int) -> None:
        # product = left right^T, both with D columns
        sums = cuda.local.array(SUMS_SHAPE, accumulator)
        for first_left in range(0, left.shape[0], SIZE):
            for first_right in range(0, right.shape[0], SIZE):
                for i in range(SUMS_SHAPE[0]):
                    for j in range(SUMS_SHAPE[1]):
                        sums[i, j] = ZERO
                for first_d in range(0, width, DEPTH):
                    for place in range(ty * THREAD_COLUMNS + tx, SIZE * DEPTH, THREADS):
                        row = place // DEPTH
                        d = first_d + place % DEPTH
                        x = ZERO
                        y = ZERO
                        if d < width:
                            if first_left + row < left.shape[0]:
                                x = left[first_left + row, d]
                            if first_right + row < right.shape[0]:
                                y = right[first_right + row, d]
                        left_smem[row, place % DEPTH] = x
                        right_smem[row, place % DEPTH] = y
                    cuda.syncthreads()  # both tiles are there
                    for d in range(DEPTH):
                        for i in range(SUMS_SHAPE[0]):
                            x = left_smem[ty + i * THREAD_ROWS, d]
                            for j in range(SUMS_SHAPE[1]):
                                sums[i, j] += x * right_smem[tx + j * THREAD_COLUMNS, d]
                    cuda.syncthreads()  # both tiles are used up
                for i in range(SUMS_SHAPE[0]):
                    row = first_left + ty + i * THREAD_ROWS
                    for j in range(SUMS_SHAPE[1]):
                        column = first_right + tx + j * THREAD_COLUMNS
                        if row < left.shape[0] and column < right.shape[0]:
                            product[row, column] = sums[i, j]
        cuda.syncthreads()  # the product is there

    def choose_channels(A: Any, B: Any, W: Any, F: Any, outside_smem: Any, weights_smem: Any, thread: int) -> None:
        # W: one unit row for each chosen channel (eq. 15); a chosen channel has weight -1
        for d in range(thread, width, THREADS):
            outside_smem[d] = A[d, d]
            weights_smem[d] = A[d, d] * B[d, d]
        cuda.syncthreads()  # lengths and weights are there
        for r in range(rank):
            chosen = 0
            for d in range(1, width):
                if weights_smem[d] > weights_smem[chosen]:
                    chosen = d
            pivot = outside_smem[chosen]
            cuda.syncthreads()  # every thread has chosen
            for d in range(thread, width, THREADS):
                left = A[chosen, d]
                for s in range(r):
                    left -= F[s, chosen] * F[s, d]
                f = ZERO
                if pivot > ZERO:
                    f = left / accumulator(math.sqrt(pivot))
                outside = outside_smem[d] - f * f
                if outside <= ROUNDING * A[d, d]:
                    outside = ZERO
                F[r, d] = f
                W[r, d] = ONE if d == chosen else ZERO
                outside_smem[d] = outside
                if d == chosen or weights_smem[d] < ZERO:
                    weights_smem[d] = -ONE
                else:
                    weights_smem[d] = outside * B[d, d]
            cuda.syncthreads()  # row r of F and what it leaves are there

    def factorise(C: Any, units_smem: Any, pivots_smem: Any, inverses_smem: Any, thread: int) -> None:
        # C: above its diagonal u (W^T T) u in, the transposed factor out; inverses of its diagonal, 0 where left out
        for r in range(rank):
            inverse = ZERO
            if pivots_smem[r] > ROUNDING:
                inverse = ONE / accumulator(math.sqrt(pivots_smem[r]))
            if thread == 0:
                inverses_smem[r] = inverse
            for s in range(thread, rank, THREADS):
                if s > r:
                    left = C[r, s] * units_smem[r] * units_smem[s]
                    for t in range(r):
                        left -= C[t, r] * C[t, s]
                    C[r, s] = left * inverse
                    pivots_smem[s] -= left * inverse * left * inverse
            cuda.syncthreads()  # row r of the factor and the pivots that it leaves are there

    def substitute(C: Any, units_smem: Any, inverses_smem: Any, X: Any, d: int) -> None:
        # column d of X, which is a row of W or Z, times u C^-T
        for r in range(rank):
            left = X[r, d] * units_smem[r]
            for s in range(r):
                left -= C[s, r] * X[s, d]
            X[r, d] = left * inverses_smem[r]

    device_multiply = cuda.jit(device=True)(multiply)
    device_choose_channels = cuda.jit(device=True)(choose_channels)
    device_factorise = cuda.jit(device=True)(factorise)
    device_substitute = cuda.jit(device=True)(substitute)

    def subspace_maps(
        x_grams: Any,  # [B, H_x, C, D, D]
        y_grams: Any,  # [B, H_kv, C or more than 0, D, D]
        blocks: Any,  # [BLOCK_FIELDS, C], sequences.py
        y_heads: int,  # heads of the other side that share maps
        sampling: Any,  # [B, H_x, C, D, R]
        fusion: Any,  # [B, H_x, C, D, R]
        ranks: Any,  # [B, H_x, C]
        score_errors: Any,  # [B, H_x, C]
        wide: Any,  # [blocks of the grid, WIDE_BUFFERS, R, D]
        square: Any,  # [blocks of the grid, SQUARE_BUFFERS, R, R]
        refine: int,
        scale: Any,
        score_tol: Any,
    ) -> None:
        left_smem = cuda.shared.array(TILE_SHAPE, accumulator)
        right_smem = cuda.shared.array(TILE_SHAPE, accumulator)
        outside_smem = cuda.shared.array(width, accumulator)
        weights_smem = cuda.shared.array(width, accumulator)
        units_smem = cuda.shared.array(rank, accumulator)
        pivots_smem = cuda.shared.array(rank, accumulator)
        inverses_smem = cuda.shared.array(rank, accumulator)
        changes_smem = cuda.shared.array(rank, accumulator)
        scales_smem = cuda.shared.array(rank, accumulator)
        partial_smem = cuda.shared.array(THREADS, accumulator)
        tx = cuda.threadIdx.x
        ty = cuda.threadIdx.y
        thread = ty * THREAD_COLUMNS + tx
        W = wide[cuda.blockIdx.x, 0]
        Z = wide[cuda.blockIdx.x, 1]
        AW = wide[cuda.blockIdx.x, 2]
        BZ = wide[cuda.blockIdx.x, 3]
        WAW = square[cuda.blockIdx.x, 0]
        ZBZ = square[cuda.blockIdx.x, 1]
        heads, block_count = ranks.shape[1], ranks.shape[2]

        for item in range(cuda.blockIdx.x, ranks.shape[0] * heads * block_count, cuda.gridDim.x):
            c = item % block_count
            h = item // block_count % heads
            b = item // block_count // heads
            x_rows = blocks[STOP, c] - blocks[START, c]
            if x_rows == 0:
                if thread == 0:
                    ranks[b, h, c] = 0
                    score_errors[b, h, c] = ZERO
                continue
            A = x_grams[b, h, c]
            B = y_grams[b, h * y_grams.shape[1] // heads, c if y_changes else blocks[FIRST_BLOCK, c]]
            x_count = accumulator(x_rows)
            y_count = accumulator(max((blocks[MET_STOP, c] - blocks[MET_START, c]) * y_heads, 1))

            # ---- half-steps (eq. 16), the first and the last with A; F lies where Z will ----
            device_choose_channels(A, B, W, Z, outside_smem, weights_smem, thread)
            source, target, gram, other_gram = W, Z, A, B
            for _ in range(2 * refine + 1):
                device_multiply(source, gram, target, left_smem, right_smem, ty, tx)
                device_multiply(source, target, WAW, left_smem, right_smem, ty, tx)
                for r in range(thread, rank, THREADS):
                    uncancelled = ZERO
                    for d in range(width):
                        uncancelled += gram[d, d] * source[r, d] * source[r, d]
                    unit = ZERO
                    if WAW[r, r] > ROUNDING * uncancelled:
                        unit = ONE / accumulator(math.sqrt(WAW[r, r]))
                    units_smem[r] = unit
                    pivots_smem[r] = WAW[r, r] * unit * unit
                cuda.syncthreads()  # units and pivots are there
                device_factorise(WAW, units_smem, pivots_smem, inverses_smem, thread)
                for place in range(thread, 2 * width, THREADS):
                    if place < width:
                        device_substitute(WAW, units_smem, inverses_smem, source, place)
                    else:
                        device_substitute(WAW, units_smem, inverses_smem, target, place - width)
                cuda.syncthreads()  # both are in the new basis
                source, target = target, source
                gram, other_gram = other_gram, gram

            # ---- squared lengths of the scores (eq. 18): tr(A B), and what each column changes ----
            device_multiply(W, A, AW, left_smem, right_smem, ty, tx)
            device_multiply(Z, B, BZ, left_smem, right_smem, ty, tx)
            device_multiply(W, AW, WAW, left_smem, right_smem, ty, tx)
            device_multiply(Z, BZ, ZBZ, left_smem, right_smem, ty, tx)
            partial = ZERO
            for place in range(thread, width * width, THREADS):
                partial += A[place // width, place % width] * B[place // width, place % width]
            partial_smem[thread] = partial
            for r in range(thread, rank, THREADS):
                x_square = WAW[r, r]
                y_square = ZBZ[r, r]
                cross = ZERO
                for d in range(width):
                    cross += AW[r, d] * BZ[r, d]
                change = x_square * y_square - TWO * cross
                for s in range(r):
                    change += TWO * WAW[s, r] * ZBZ[s, r]
                changes_smem[r] = change
                # so written that NaN is kept (eq. 17)
                column_scale = ZERO
                if not (x_square <= ZERO or y_square <= ZERO):
                    y_root = accumulator(math.sqrt(math.sqrt(y_square / y_count)))
                    column_scale = y_root / accumulator(math.sqrt(math.sqrt(x_square / x_count)))
                scales_smem[r] = column_scale
            cuda.syncthreads()  # changes, scales and the parts of the trace are there

            # ---- the rank and its error (eq. 18 and 19) ----
            if thread == 0:
                left = ZERO
                for i in range(THREADS):
                    left += partial_smem[i]
                factor = abs(scale) / accumulator(math.sqrt(x_count)) / accumulator(math.sqrt(y_count))
                error = ZERO
                kept = rank
                for r in range(rank):
                    left += changes_smem[r]
                    error = factor * accumulator(math.sqrt(ZERO if left < ZERO else left))
                    if chooses_rank and (r + 1) % RANK_STEP == 0 and r + 1 < width and error <= score_tol:
                        kept = r + 1
                        break
                ranks[b, h, c] = kept
                score_errors[b, h, c] = ZERO if kept == width else error
            cuda.syncthreads()  # the rank is there

            # ---- columns of equal mean squares (eq. 17); the identity at full rank ----
            kept = ranks[b, h, c]
            for place in range(thread, width * rank, THREADS):
                d = place // rank
                r = place % rank
                w = ZERO
                z = ZERO
                if kept == width:
                    w = z = ONE if d == r else ZERO
                elif r < kept and scales_smem[r] != ZERO:
                    w = W[r, d] * scales_smem[r]
                    z = Z[r, d] / scales_smem[r]
                sampling[b, h, c, d, r] = w
                fusion[b, h, c, d, r] = z
            cuda.syncthreads()  # the workspace is used up

    return cuda.jit(subspace_maps)
