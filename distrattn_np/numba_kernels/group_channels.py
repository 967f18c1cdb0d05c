"""From hash words to groups of channels (docs/math.md, eq. 6 and 7).

    rank = word ^ (word >> 1) ^ (word >> 2) ^ ...;   a channel's place = the channels of lower rank
                                                     + the earlier channels of equal rank

Reference : reference/group_channels.py        CUDA C++ : raw_kernels/group_channels.cu
Launcher  : distrattn_np/backends/numba_backend.py

Grid      : B * H * C, one block per (batch, head, grouping block)
Block     : any number of threads
Shared    : the D ranks
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numba import cuda


@cache
def make_group_channels(width: int) -> Any:
    """Return the kernel for words of ``width`` channels."""

    def group_channels(
        words: Any,  # [B, H, C, D]
        channels: Any,  # [B, H, C, D]
    ) -> None:
        ranks_smem = cuda.shared.array(width, np.int32)
        heads, blocks = words.shape[1], words.shape[2]
        c = cuda.blockIdx.x % blocks
        h = cuda.blockIdx.x // blocks % heads
        b = cuda.blockIdx.x // blocks // heads

        for j in range(cuda.threadIdx.x, width, cuda.blockDim.x):
            word = np.int32(words[b, h, c, j])
            rank = np.int32(0)
            while word != 0:
                rank ^= word
                word >>= 1
            ranks_smem[j] = rank
        cuda.syncthreads()  # all ranks are there

        # counting makes the sort stable without moving anything
        for j in range(cuda.threadIdx.x, width, cuda.blockDim.x):
            rank = ranks_smem[j]
            place = 0
            for i in range(width):
                other = ranks_smem[i]
                if other < rank or (other == rank and i < j):
                    place += 1
            channels[b, h, c, place] = j

    return cuda.jit(group_channels)
