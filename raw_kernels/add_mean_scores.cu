// add_mean_scores.cu - gives back what centring the keys took from the log-sum-exp.
//
//   lse_n += scale * q_n . mean                                                  docs/math.md (eq. 12)
//
// Launcher  : distrattn_np/backends/cupy_backend.py      Tests : tests/agreement/test_gpu_subspace.py
//
// Grid      : B * H * ceil_div(N, THREADS / LANES), RAGGED: H * tiles, rows fastest; LANES neighbouring threads share a row
// Block     : THREADS
// Assumes   : 1 <= D <= 256; VECTOR divides D, and Q and its strides are aligned to VECTOR elements. Sums are float32
//             (float64 for float64). Minus infinity stays.
// Alone     : nvcc -cubin -arch=sm_80 raw_kernels/add_mean_scores.cu

#include "element.cuh"
#include "sequences.cuh"

// ---- the launcher sets these with -D; the defaults let the file compile alone ----
#ifndef VECTOR  // elements per load: 1, or as many as fit 16 bytes
#define VECTOR 8
#endif
#ifndef LANES  // a power of two; as many as a row has loads
#define LANES 16
#endif
#ifndef THREADS
#define THREADS 256
#endif
#ifndef ADDS
#define ADDS 1  // 0: nothing is in lse yet, and the kernel writes what it would add
#endif
static_assert(LANES >= 1 && LANES <= 32 && (LANES & (LANES - 1)) == 0, "the threads of a row lie in one warp");

extern "C" __global__ __launch_bounds__(THREADS)
void add_mean_scores(const element_t* __restrict__ Q,        // [B, H, N, D]
                     const accumulate_t* __restrict__ mean,  // [B, H_kv, D]
                     float* __restrict__ lse,                // [B, H, N]
                     int H, int H_kv, int N, int D, accumulate_t scale, long long stride_q_b,
                     long long stride_q_h, long long stride_q_n
#if RAGGED
                     ,
                     const Piece* __restrict__ pieces, int tiles  // [tiles], of ROWS queries
#endif
) {
  constexpr int ROWS = THREADS / LANES;
#if !RAGGED
  const int tiles = (N + ROWS - 1) / ROWS;
#endif
  const int tile = blockIdx.x % tiles, h = blockIdx.x / tiles % H, b = blockIdx.x / tiles / H;
  const RowRange rows = rows_of_block(pieces, tile, ROWS, N);
#if RAGGED
  if (rows.begin == rows.end || pieces[tile].other_rows == 0) return;  // without keys there is no mean
#endif
  const int n = rows.begin + threadIdx.x / LANES;
  const element_t* const row = Q + b * stride_q_b + h * stride_q_h + min(n, rows.end - 1) * stride_q_n;
  const int h_kv = static_cast<long long>(h) * H_kv / H;
  const accumulate_t* const centre = mean + sequence_row(pieces, tile, b, h_kv, H_kv) * D;
  accumulate_t sum = 0;
  for (int d = threadIdx.x % LANES * VECTOR; d < D; d += LANES * VECTOR) {
    const Elements<VECTOR> q = *reinterpret_cast<const Elements<VECTOR>*>(row + d);
#pragma unroll
    for (int v = 0; v < VECTOR; v++) sum += to_accumulate(q.at[v]) * centre[d + v];
  }
#pragma unroll
  for (int distance = LANES / 2; distance > 0; distance /= 2) sum += __shfl_xor_sync(~0u, sum, distance);
  if (n >= rows.end || threadIdx.x % LANES != 0) return;
  float* const target = lse + (static_cast<long long>(b) * H + h) * N + n;
  *target = (ADDS ? *target : 0) + scale * sum;
}
