// merge_splits.cu - one result from those over the splits of the keys that decode.cu or forward_sm90.cu wrote.
//
//   row_max = max_s row_max_s,   weight_s = exp(row_max_s - row_max)
//   O = sum_s weight_s O_s / sum_s weight_s row_sum_s,   lse = row_max + log(sum_s weight_s row_sum_s)
//
// which is eq. 25 for any number of parts whose O_s are not divided yet.                     docs/math.md (eq. 25)
//
// Reference : reference/merge_results.py
// Launcher  : distrattn_np/backends/cupy_backend.py     Tests : tests/agreement/test_gpu_decode.py, test_gpu_forward.py
//
// Grid      : ceil_div(rows * E_SLICES, WARPS); a warp makes up to 128 elements of a row
// Block     : THREADS
// Assumes   : parts are contiguous and aligned to 16 bytes. The order of the sums is that of the splits.
// A query that sees no key (all row_sum_s are zero): O = 0, lse = -inf.
// Alone     : nvcc -cubin -arch=sm_80 raw_kernels/merge_splits.cu

// ---- the launcher sets these with -D; the defaults let the file compile alone ----
#ifndef E
#define E 128
#endif
#ifndef THREADS
#define THREADS 128
#endif

#include "mma.cuh"

static_assert(ELEMENT == FLOAT16 || ELEMENT == BFLOAT16, "decode.cu has 16-bit elements");
static_assert(THREADS % WARP_SIZE == 0, "whole warps");
constexpr int E_PADDED = (E + 15) / 16 * 16;
constexpr int PER_LANE = 4;
constexpr int E_SLICES = (E_PADDED + PER_LANE * WARP_SIZE - 1) / (PER_LANE * WARP_SIZE);
constexpr float LN_2 = 0.6931471805599453f;

extern "C" __global__ __launch_bounds__(THREADS)
void merge_splits(const float* __restrict__ partial_O,      // [splits, rows, E_PADDED]
                  const float* __restrict__ partial_stats,  // [splits, rows, 2], maxima before scale_log2, and sums
                  element_t* __restrict__ O,                // [B, H, N, E]
                  float* __restrict__ lse,                  // [B, H, N]
                  int rows, int H, int N, int splits,
                  long long first_row,                      // of [B, H, N]
                  float scale_log2,
                  long long stride_o_b, long long stride_o_h, long long stride_o_n) {  // elements
  const long long item = static_cast<long long>(blockIdx.x) * (THREADS / WARP_SIZE) + threadIdx.x / WARP_SIZE;
  const int lane = threadIdx.x % WARP_SIZE;
  const long long row = item / E_SLICES;
  if (row >= rows) return;
  const int e = static_cast<int>(item % E_SLICES) * PER_LANE * WARP_SIZE + lane * PER_LANE;

  // ---- the largest of the maxima ----
  float row_max = minus_infinity();
  for (int s = lane; s < splits; s += WARP_SIZE) row_max = fmaxf(row_max, partial_stats[2 * (s * 1LL * rows + row)]);
#pragma unroll
  for (int lanes = WARP_SIZE / 2; lanes > 0; lanes /= 2)
    row_max = fmaxf(row_max, __shfl_xor_sync(~0u, row_max, lanes));

  // ---- sums of all splits ----
  float sum = 0.0f, output[PER_LANE] = {};
#pragma unroll 4
  for (int s = 0; s < splits; ++s) {
    const long long place = s * 1LL * rows + row;
    const float2 stats = *reinterpret_cast<const float2*>(partial_stats + 2 * place);
    const float weight = exp2_approximate((stats.x - row_max) * scale_log2);
    sum = fmaf(weight, stats.y, sum);
    if (e < E_PADDED) {
      const float4 part = *reinterpret_cast<const float4*>(partial_O + place * E_PADDED + e);
      output[0] = fmaf(weight, part.x, output[0]);
      output[1] = fmaf(weight, part.y, output[1]);
      output[2] = fmaf(weight, part.z, output[2]);
      output[3] = fmaf(weight, part.w, output[3]);
    }
  }

  const long long whole_row = first_row + row;
  const int n = whole_row % N, h = whole_row / N % H;
  const long long b = whole_row / N / H;
  element_t* const O_row = O + b * stride_o_b + h * stride_o_h + n * stride_o_n;
#pragma unroll
  for (int i = 0; i < PER_LANE; ++i)
    if (e + i < E) O_row[e + i] = to_element(sum == 0.0f ? 0.0f : output[i] / sum);
  if (e == 0) lse[whole_row] = sum == 0.0f ? minus_infinity() : LN_2 * (row_max * scale_log2 + log2f(sum));
}
