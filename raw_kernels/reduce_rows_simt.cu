// reduce_rows_simt.cu - rows times a dense map of their block, on CUDA cores: what reduce_rows.cu does on tensor cores.
//
//   out_n = (x_n - mean) W        and, with Z in the place of W, the other side of eq. 4        docs/math.md (eq. 4, 12)
//
// Work items, rows and the two kinds of results are those of reduce_rows.cu.
//
// Reference : reference/subspace_attention.py
// Launcher  : distrattn_np/backends/cupy_backend.py      Tests : tests/agreement/test_gpu_subspace.py
//
// Grid      : row_tiles * items, row tiles fastest, where
//             row_tiles = ceil_div(ROWS_FROM_BLOCK ? block_rows : rows, 64)
// Block     : 256 threads
// Shared    : under 17 KB, static
// Assumes   : 1 <= R <= D <= 256. Maps and out are contiguous, in the type of the sums: float32 (float64 for float64).
//             Columns of out from R on are not written.
// Alone     : nvcc -cubin -arch=sm_75 raw_kernels/reduce_rows_simt.cu

#include "sequences.cuh"
#include "simt.cuh"

// ---- the launcher sets these with -D; the defaults let the file compile alone ----
#ifndef D
#define D 64
#endif
#ifndef R
#define R 32
#endif
#ifndef CENTRED  // 0: the mean is taken as zero
#define CENTRED 0
#endif
#ifndef ROWS_FROM_BLOCK
#define ROWS_FROM_BLOCK 0
#endif
static_assert(R >= 1 && R <= D && D <= 256, "a map has at least one column and at most D");

constexpr int R_PADDED = (R + 15) / 16 * 16;
constexpr int OWNED = 4;  // rows, and columns of a map, that a thread owns
constexpr int TILE = SIDE * OWNED;
constexpr int CHANNELS = channels_at_a_time(2 * TILE, D);
constexpr int MIN_BLOCKS = 2;  // per multiprocessor; without a number ptxas spills registers for occupancy

extern "C" __global__ __launch_bounds__(THREADS, MIN_BLOCKS)
void reduce_rows_simt(const element_t* __restrict__ X,        // [B, H_y, rows, D]
                      const accumulate_t* __restrict__ mean,  // [B, H_y, D]; read only where CENTRED
                      const accumulate_t* __restrict__ maps,  // [B, H_x, C, R, D], transposed
                      accumulate_t* __restrict__ out,         // [items, rows, R_PADDED] or [B, H_x, rows, R_PADDED]
                      int rows, int H_x, int H_y, int C, int first_item, int items, int block_rows, int x_rows,
                      int causal_offset, long long stride_x_b, long long stride_x_h, long long stride_x_n
#if RAGGED
                      ,
                      const Piece* __restrict__ pieces  // [C], of block_rows rows
#endif
) {
  __shared__ alignas(16) accumulate_t operands_smem[CHANNELS * 2 * (TILE + PADDING)];
  const int ty = threadIdx.x / SIDE, tx = threadIdx.x % SIDE;

  // ---- which rows this block maps, with which map ----
  const int row_tiles = ((ROWS_FROM_BLOCK ? block_rows : rows) + TILE - 1) / TILE;
  const int launch_item = blockIdx.x / row_tiles, item = first_item + launch_item;
  const int c = item % C, h = item / C % H_x, b = item / C / H_x;
  const RowRange range = ROWS_FROM_BLOCK ? rows_of_block(pieces, c, block_rows, rows)
                                         : rows_seen_by_block(pieces, c, block_rows, x_rows, rows, causal_offset);
  const int begin = range.begin + static_cast<int>(blockIdx.x) % row_tiles * TILE, end = range.end;
  if (begin >= end) return;
  const int h_y = static_cast<long long>(h) * H_y / H_x;
  X += b * stride_x_b + h_y * stride_x_h + begin * stride_x_n;
  mean += sequence_row(pieces, c, b, h_y, H_y) * D;
  maps += static_cast<long long>(item) * R * D;
  out += (static_cast<long long>(ROWS_FROM_BLOCK ? item / C : launch_item) * rows + begin) * R_PADDED;

  auto element = [&](int row, int d) -> accumulate_t {
    if (row >= end - begin) return 0;
    return to_accumulate(X[row * stride_x_n + d]) - (CENTRED ? mean[d] : 0);
  };
  for (int column = 0; column < R; column += TILE) {
    accumulate_t sums[OWNED][OWNED] = {};
    multiply_rows<CHANNELS>(sums, operands_smem, D, element, [&](int r, int d) -> accumulate_t {
      return column + r < R ? maps[(column + r) * D + d] : 0;
    });
#pragma unroll
    for (int i = 0; i < OWNED; i++) {
#pragma unroll
      for (int j = 0; j < OWNED; j++) {
        const int n = ty * OWNED + i, r = column + tx * OWNED + j;
        if (n < end - begin && r < R) out[static_cast<long long>(n) * R_PADDED + r] = sums[i][j];
      }
    }
  }
}
