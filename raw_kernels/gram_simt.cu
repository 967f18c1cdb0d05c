// gram_simt.cu - inner products of all pairs of channels, segment of rows by segment of rows, on CUDA cores.
//
//   A_s = sum over the rows n of segment s of (x_n - mean) (x_n - mean)^T       docs/math.md (eq. 11, 12)
//
// What gram.cu does on tensor cores, with the same segments. A Gram matrix is symmetric: a thread block makes the
// products of 64 channels with 64 others, or with themselves, and writes them and their mirror images.
//
// Reference : reference/gram.py
// Launcher  : distrattn_np/backends/cupy_backend.py      Tests : tests/agreement/test_gpu_subspace.py
//
// Grid      : (B * grams of a batch * S * PAIRS), pairs of strips fastest, then s
// Block     : 256 threads
// Shared    : under 18 KB, static
// Assumes   : 1 <= D <= 256; 0 <= lower <= upper <= rows. Sums run in float32 (float64 for float64), those of ROW_TILE
//             rows apart, in a fixed order. Channels from D on are zero; an empty segment gives 0.
// Alone     : nvcc -cubin -arch=sm_75 raw_kernels/gram_simt.cu

#include "segments.cuh"
#include "simt.cuh"

// ---- the launcher sets these with -D; the defaults let the file compile alone ----
#ifndef D
#define D 64
#endif
#ifndef CENTRED  // 0: the mean is taken as zero
#define CENTRED 0
#endif
static_assert(D >= 1 && D <= 256, "rows have 1 to 256 elements");

constexpr int WIDTH = (D + 15) / 16 * 16;
constexpr int OWNED = 4;  // channels of both strips that a thread owns
constexpr int STRIP = SIDE * OWNED;
constexpr int STRIPS = (D + STRIP - 1) / STRIP;
constexpr int PAIRS = STRIPS * (STRIPS + 1) / 2;
constexpr int ROW_TILE = CHUNK_BYTES / (2 * STRIP) / sizeof(accumulate_t);
constexpr int PITCH = STRIP + PADDING;
// per multiprocessor; without a number ptxas spills for occupancy
constexpr int MIN_BLOCKS = D > 128 || sizeof(accumulate_t) == 8 ? 1 : 2;

extern "C" __global__ __launch_bounds__(THREADS, MIN_BLOCKS)
void gram_simt(const element_t* __restrict__ X,        // [B, H, rows, D]
               const accumulate_t* __restrict__ mean,  // [B, H, D]; read only where CENTRED, with one head a gram
               accumulate_t* __restrict__ grams,       // [B, grams of a batch, S, WIDTH, WIDTH]
               int grams_per_batch, int heads_per_gram, int S, int segment_rows,
#if RAGGED
               const Piece* __restrict__ pieces, int offset, int direction
#else
               int shift, int lower, int upper
#endif
               ,
               long long stride_x_b, long long stride_x_h, long long stride_x_n) {
  __shared__ alignas(16) accumulate_t X_smem[2][ROW_TILE * PITCH];  // of the two strips

  // ---- which rows and channels this block owns ----
  const int gram = blockIdx.x / PAIRS / S;
  const int s = blockIdx.x / PAIRS % S, h = gram % grams_per_batch, b = gram / grams_per_batch;
  int left = 0, right = blockIdx.x % PAIRS;  // strips; rows of a triangle
  while (right > left) right -= ++left;
#if RAGGED
  const Segments segments{pieces, segment_rows, offset, direction};
#else
  const Segments segments{S, segment_rows, shift, lower, upper};
#endif
  const int begin = segments.range(s).begin, end = segments.range(s).end;

  auto load_strip = [&](int side, int head, int row) {
    const element_t* const source = X + b * stride_x_b + head * stride_x_h + row * stride_x_n;
    const accumulate_t* const centre = mean + sequence_row(pieces, s, b, h, grams_per_batch) * D;
    for (int i = threadIdx.x; i < ROW_TILE * STRIP; i += THREADS) {
      const int n = i / STRIP, d = (side == 0 ? left : right) * STRIP + i % STRIP;
      const bool is_valid = row + n < end && d < D;
      const accumulate_t x = is_valid ? to_accumulate(source[n * stride_x_n + d]) - (CENTRED ? centre[d] : 0) : 0;
      X_smem[side][n * PITCH + i % STRIP] = x;
    }
  };

  accumulate_t sums[OWNED][OWNED] = {};
  for (int head = h * heads_per_gram; head < (h + 1) * heads_per_gram; head++) {
    for (int row = begin; row < end; row += ROW_TILE) {
      __syncthreads();  // rows are read before they are overwritten
      load_strip(0, head, row);
      load_strip(1, head, row);
      __syncthreads();  // rows are written before they are read
      accumulate_t products[OWNED][OWNED] = {};
      add_products(products, X_smem[0], PITCH, X_smem[1], PITCH, ROW_TILE);
#pragma unroll
      for (int i = 0; i < OWNED * OWNED; i++) sums[i / OWNED][i % OWNED] += products[i / OWNED][i % OWNED];
    }
  }

  // ---- write the products and their mirror images ----
  accumulate_t* const A = grams + (static_cast<long long>(gram) * S + s) * WIDTH * WIDTH;
  const int ty = threadIdx.x / SIDE, tx = threadIdx.x % SIDE;
#pragma unroll
  for (int i = 0; i < OWNED; i++) {
#pragma unroll
    for (int j = 0; j < OWNED; j++) {
      const int row = left * STRIP + ty * OWNED + i, column = right * STRIP + tx * OWNED + j;
      if (row >= WIDTH || column >= WIDTH) continue;
      A[row * WIDTH + column] = sums[i][j];
      if (left != right) A[column * WIDTH + row] = sums[i][j];
    }
  }
}
