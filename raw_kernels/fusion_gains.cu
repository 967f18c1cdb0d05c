// fusion_gains.cu - least-squares fusion: which member stands for its group, and how much of it each member is.
//
//   first of group r = the member j with the largest |x_j| |y_j|, the earliest of equals
//   gain_j = <x_first, x_j> / <x_first, x_first>,   gain_first = 1,               docs/math.md (eq. 9)
//            0 where x_first is all zero
//
// The chosen member moves to the front of its group; the rest keep their order.
//
// Reference : reference/fusion_gains.py       Numba : distrattn_np/numba_kernels/fusion_gains.py
// Launcher  : distrattn_np/backends/cupy_backend.py
//
// Grid      : (B * H_x * C), C = ceil_div(rows, L), c fastest     one thread block per block of rows
// Block     : THREADS
// Shared    : (THREADS + MAX_D) * sizeof(accumulate_t) + MAX_D * 4 bytes, static
// Assumes   : 1 <= D <= MAX_D; GROUP_SIZE divides D; H_x divides H_y or H_y divides H_x. norm_direction says which
//             segments of channel_norms meet block c: 0 all S, +1 those up to c, -1 those from c on. Sums run in
//             float32 (float64 for float64), in a fixed order.
// Alone     : nvcc -cubin -arch=sm_80 raw_kernels/fusion_gains.cu

#include "element.cuh"
#include "sequences.cuh"

// ---- the launcher sets these with -D; the defaults let the file compile alone ----
#ifndef GROUP_SIZE
#define GROUP_SIZE 2
#endif
#ifndef THREADS
#define THREADS 512
#endif
constexpr int MAX_D = 256;
constexpr int MIN_BLOCKS = 2;  // per multiprocessor: 64 registers; without a number ptxas spills some for occupancy
static_assert(THREADS >= MAX_D, "one thread for every channel of the widest row");

extern "C" __global__ __launch_bounds__(THREADS, MIN_BLOCKS)
void fusion_gains(const element_t* __restrict__ X,        // [B, H_x, rows, D]
                  const accumulate_t* __restrict__ norms, // [B, H_y, S, D], from channel_norms
                  int* __restrict__ channels,             // [B, H_x, C, D], reordered in place
                  float* __restrict__ gains,              // [B, H_x, C, D]
                  int rows, int D, int L, int H_x, int H_y, int S, int norm_direction, long long stride_x_b,
                  long long stride_x_h, long long stride_x_n
#if RAGGED
                  ,
                  const Piece* __restrict__ pieces  // [S], of L rows; a segment for each
#endif
) {
  __shared__ accumulate_t partial_smem[THREADS];  // [slices, D]
  __shared__ accumulate_t inner_smem[MAX_D];
  __shared__ int channels_smem[MAX_D];

  // ---- which rows this block owns; which channel and rows of them this thread owns ----
#if RAGGED
  const int C = S;
#else
  const int C = (rows + L - 1) / L;
#endif
  const int c = blockIdx.x % C, h = blockIdx.x / C % H_x, b = blockIdx.x / C / H_x;
  const RowRange block = rows_of_block(pieces, c, L, rows);
  const int block_rows = block.end - block.begin;
  if (RAGGED && block_rows == 0) return;
  X += b * stride_x_b + h * stride_x_h + block.begin * stride_x_n;
  const long long map_offset = ((static_cast<long long>(b) * H_x + h) * C + c) * D;
  const int slices = THREADS / D;
  const int slice = threadIdx.x / D;
  const int own = threadIdx.x % D;  // this thread's channel, later its place in the groups
  if (threadIdx.x < D) channels_smem[own] = channels[map_offset + own];

  // Inner product of two columns of X, a pair for every value of `own`; the threads of slice 0 get the result.
  auto inner_product = [&](int one, int other) {
    accumulate_t sum = 0;
    if (slice < slices) {
#pragma unroll 8
      for (int n = slice; n < block_rows; n += slices) {
        sum += to_accumulate(X[n * stride_x_n + one]) * to_accumulate(X[n * stride_x_n + other]);
      }
    }
    partial_smem[threadIdx.x] = sum;
    __syncthreads();  // the partial sums are written before they are added up
    sum = 0;
    if (slice == 0) {
      for (int i = 0; i < slices; i++) sum += partial_smem[i * D + own];
    }
    // the barriers between the two calls part this reading from the next writing
    return sum;
  };

  // ---- weights |x_j|^2 |y_j|^2, over the y heads and segments that meet this block ----
  const accumulate_t x_norm = inner_product(own, own);
  if (slice == 0) {
    const int shared_heads = max(1, H_y / H_x);
    const int first_head = static_cast<long long>(h) * H_y / H_x;  // the product may pass 2^31
#if RAGGED
    const int first_of_all = c - pieces[c].index, last_of_all = first_of_all + pieces_of_sequence(pieces[c], L) - 1;
#else
    const int first_of_all = 0, last_of_all = S - 1;
#endif
    const int first_segment = norm_direction < 0 ? c : first_of_all;
    const int last_segment = norm_direction > 0 ? c : last_of_all;
    accumulate_t y_norm = 0;
    for (int head = first_head; head < first_head + shared_heads; head++) {
      for (int s = first_segment; s <= last_segment; s++) {
        y_norm += norms[((static_cast<long long>(b) * H_y + head) * S + s) * D + own];
      }
    }
    inner_smem[own] = x_norm * y_norm;
  }
  __syncthreads();  // the weights are written before they are compared

  // ---- the heaviest member moves to the front of its group ----
  if (threadIdx.x < D / GROUP_SIZE) {
    int* group = channels_smem + threadIdx.x * GROUP_SIZE;
    int heaviest = 0;
    for (int g = 1; g < GROUP_SIZE; g++) {
      if (inner_smem[group[g]] > inner_smem[group[heaviest]]) heaviest = g;
    }
    const int first = group[heaviest];
    for (int g = heaviest; g > 0; g--) group[g] = group[g - 1];
    group[0] = first;
  }
  __syncthreads();  // the groups are settled before their products are formed

  // ---- gains ----
  const int first_place = own / GROUP_SIZE * GROUP_SIZE;
  const accumulate_t inner = inner_product(channels_smem[first_place], channels_smem[own]);
  if (slice == 0) inner_smem[own] = inner;
  __syncthreads();  // the products are written before members divide by their first one's
  if (slice == 0) {
    const accumulate_t length = inner_smem[first_place];
    channels[map_offset + own] = channels_smem[own];
    gains[map_offset + own] = own == first_place ? 1 : length > 0 ? inner / length : 0;
  }
}
