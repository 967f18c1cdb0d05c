// rebuild_keys.cu - the keys that a cache stands for, D numbers each.
//
//   k_m = mean_c + Z_c s_m       so that q_n . k_m = q_n . mean_c + (q_n Z_c) . s_m              docs/math.md (eq. 27)
//
// where block c is finished, and k_m as it is behind the last of these.
//
// PAGED: keys lie in pages, each a block, and the last page of a sequence may be unfinished (eq. 30). The keys of all
// sequences are written one sequence after another, from the rows on that pack_rows.cu found.
//
// For calls that decode.cu does not take: what follows is exact attention to these keys.
//
// Reference : reference/grouped_keys.py
// Launcher  : distrattn_np/backends/cupy_kept_keys.py, cupy_paged_keys.py
// Tests     : tests/agreement/test_gpu_grouped_keys.py, test_gpu_grouped_pages.py
//
// Grid      : heads * (blocks * row_tiles + ceil_div(tail_rows, 64)), row tiles fastest; row_tiles = ceil_div(block_size, 64)
//             PAGED: B * H * blocks * row_tiles, blocks those that a sequence has room for
// Block     : 256 threads
// Shared    : under 17 KB, static
// Assumes   : all arrays are contiguous but for the first axis. Sums are float32 (float64 for float64); keys are rounded
//             to the element type.
// Alone     : nvcc -cubin -arch=sm_75 raw_kernels/rebuild_keys.cu

#include "simt.cuh"

// ---- the launcher sets these with -D; the defaults let the file compile alone ----
#ifndef D
#define D 128
#endif
#ifndef R
#define R 64
#endif
#ifndef PAGED
#define PAGED 0
#endif
static_assert(R >= 1 && R <= D && D <= 256, "a map has at least one column and at most D");

constexpr int R_PADDED = (R + 15) / 16 * 16, D_PADDED = (D + 15) / 16 * 16;
constexpr int OWNED = 4;  // keys, and columns of them, that a thread owns
constexpr int TILE = SIDE * OWNED;
constexpr int CHANNELS = channels_at_a_time(2 * TILE, R);
constexpr int MIN_BLOCKS = 2;  // per multiprocessor; without a number ptxas spills registers for occupancy

extern "C" __global__ __launch_bounds__(THREADS, MIN_BLOCKS)
void rebuild_keys(const element_t* __restrict__ finished,  // [heads, at least blocks * block_size, R_PADDED]
                  const element_t* __restrict__ maps,      // [heads, at least blocks, R_PADDED + 1, D_PADDED]
                  const element_t* __restrict__ tail,      // [heads, tail_rows, D]
                  element_t* __restrict__ keys,            // [heads, blocks * block_size + tail_rows, D]
                                                           // PAGED: [P * H, S, R_PADDED], [P * H, R_PADDED + 1, D_PADDED],
                                                           // [places * H, S, D] and [as many as fill all pages, H, D]
                  int blocks, int block_size,
#if PAGED
                  int H,
                  const int* __restrict__ page_table,  // [B, blocks]
                  const int* __restrict__ edges_k,     // [B + 1], the first key of each sequence
                  const int* __restrict__ tail_of,     // [P], among the places; -1 of a finished page
                  long long stride_table,
#else
                  int tail_rows,
#endif
                  long long stride_finished, long long stride_maps,  // of heads, in elements
                  long long stride_tail, long long stride_keys) {    // PAGED: stride_keys of rows
  __shared__ alignas(16) accumulate_t operands_smem[CHANNELS * 2 * (TILE + PADDING)];
  const int ty = threadIdx.x / SIDE, tx = threadIdx.x % SIDE;

  // ---- which keys this block owns ----
  const int row_tiles = (block_size + TILE - 1) / TILE;
#if PAGED
  const int tile = blockIdx.x % (blocks * row_tiles), c = tile / row_tiles, first = tile % row_tiles * TILE;
  const int h = blockIdx.x / (blocks * row_tiles) % H, b = blockIdx.x / (blocks * row_tiles) / H;
  const int behind = edges_k[b + 1] - edges_k[b] - c * block_size;  // keys of the sequence from this page on
  const int rows = min(TILE, min(behind, block_size) - first);
  if (rows <= 0) return;
  const int page = page_table[b * stride_table + c];
  const int place = behind > block_size ? -1 : tail_of[page];
  const long long head = static_cast<long long>(page) * H + h, key_stride = stride_keys;
  keys += (edges_k[b] + static_cast<long long>(c) * block_size + first) * key_stride + h * D;
  if (place >= 0) {
    tail += (static_cast<long long>(place) * H + h) * stride_tail + first * D;
    for (int i = threadIdx.x; i < rows * D; i += THREADS) keys[i / D * key_stride + i % D] = tail[i];
    return;
  }
  finished += head * stride_finished + first * R_PADDED;
  maps += head * stride_maps;
#else
  const int tiles = blocks * row_tiles + (tail_rows + TILE - 1) / TILE;
  const int tile = blockIdx.x % tiles, c = tile / row_tiles;
  const long long head = blockIdx.x / tiles;
  constexpr long long key_stride = D;
  keys += head * stride_keys;
  if (c >= blocks) {  // of the tail
    const long long begin = static_cast<long long>(tile - blocks * row_tiles) * TILE * D;
    const long long end = min(begin + TILE * D, static_cast<long long>(tail_rows) * D);
    tail += head * stride_tail;
    keys += static_cast<long long>(blocks) * block_size * D;
    for (long long i = begin + threadIdx.x; i < end; i += THREADS) keys[i] = tail[i];
    return;
  }
  const int first = tile % row_tiles * TILE;
  const int rows = min(TILE, block_size - first);
  const long long key = static_cast<long long>(c) * block_size + first;
  finished += head * stride_finished + key * R_PADDED;
  maps += head * stride_maps + static_cast<long long>(c) * (R_PADDED + 1) * D_PADDED;
  keys += key * D;
#endif

  for (int column = 0; column < D; column += TILE) {
    accumulate_t sums[OWNED][OWNED] = {};
    multiply_rows<CHANNELS>(
        sums, operands_smem, R,
        [&](int row, int r) -> accumulate_t { return row < rows ? to_accumulate(finished[row * R_PADDED + r]) : 0; },
        [&](int d, int r) -> accumulate_t {
          return column + d < D ? to_accumulate(maps[r * D_PADDED + column + d]) : 0;
        });
#pragma unroll
    for (int i = 0; i < OWNED; i++) {
#pragma unroll
      for (int j = 0; j < OWNED; j++) {
        const int row = ty * OWNED + i, d = column + tx * OWNED + j;
        if (row < rows && d < D)
          keys[row * key_stride + d] = to_element(sums[i][j] + to_accumulate(maps[R_PADDED * D_PADDED + d]));
      }
    }
  }
}
