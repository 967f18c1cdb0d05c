// hash_channels.cu - a 16-bit word for every channel of every block of rows: which side of 16 hyperplanes it lies on.
//
//   bit p of word_j = [ sum_l X_lj g_lp > 0 ]                                     docs/math.md (eq. 5)
//
// Reference : reference/hash_channels.py      Numba : distrattn_np/numba_kernels/hash_channels.py
// Launcher  : distrattn_np/backends/cupy_backend.py
//
// Grid      : (B * H * C), C = ceil_div(rows, L), c fastest     one thread block per block of rows
// Block     : THREADS
// Shared    : 2 * PLANE_ROWS * 16 floats, static; the same bytes then hold the partial sums
// Assumes   : 1 <= D <= 256; VECTOR divides D; X and its strides are aligned to VECTOR elements, planes to 16 bytes.
//             Sums run in float32 (float64 for float64), in a fixed order. A NaN sum gives 0, and so does no row.
// Alone     : nvcc -cubin -arch=sm_80 raw_kernels/hash_channels.cu

#include "element.cuh"
#include "sequences.cuh"

// ---- the launcher sets these with -D; the defaults let the file compile alone ----
#ifndef THREADS
#define THREADS 512
#endif
#ifndef VECTOR  // elements per load: 1, or as many as fit 16 bytes
#define VECTOR 8
#endif
constexpr int MAX_D = 256;
constexpr int HASH_BITS = 16;
constexpr int PLANES = 8;        // hyperplanes per thread: VECTOR * PLANES sums have to fit the registers
constexpr int PARTS = HASH_BITS / PLANES;
constexpr int PLANE_ROWS = 256;  // rows of hyperplanes in shared memory at a time
constexpr int ROWS_IN_FLIGHT = 4;  // loads that a thread has under way
constexpr int ROW_FLOAT4S = HASH_BITS / 4;
constexpr int STAGED = PLANE_ROWS * ROW_FLOAT4S / THREADS;
constexpr int PARTIAL_PITCH = THREADS + 4;  // 8 planes of 4 neighbouring threads lie in 32 different banks
constexpr int PLANE_BYTES = 2 * PLANE_ROWS * HASH_BITS * sizeof(float);
constexpr int PARTIAL_BYTES = PLANES * PARTIAL_PITCH * sizeof(accumulate_t);
constexpr int SHARED_BYTES = PLANE_BYTES > PARTIAL_BYTES ? PLANE_BYTES : PARTIAL_BYTES;
static_assert(THREADS % 32 == 0, "whole warps vote on the bits of a word");
static_assert(THREADS * VECTOR >= MAX_D * PARTS, "the threads reach across the widest row");
static_assert(PLANE_ROWS * ROW_FLOAT4S % THREADS == 0, "every thread stages the same number of plane values");

extern "C" __global__ __launch_bounds__(THREADS)
void hash_channels(const element_t* __restrict__ X,    // [B, H, rows, D]
                   const float* __restrict__ planes,   // [L, 16]
                   unsigned short* __restrict__ words, // [B, H, C, D]
                   int H, int rows, int D, int L, long long stride_x_b, long long stride_x_h, long long stride_x_n
#if RAGGED
                   ,
                   const Piece* __restrict__ pieces, int C  // [C], of L rows
#endif
) {
  __shared__ alignas(16) unsigned char shared[SHARED_BYTES];
  float* planes_smem = reinterpret_cast<float*>(shared);                  // [2, PLANE_ROWS, 16]
  accumulate_t* partial_smem = reinterpret_cast<accumulate_t*>(shared);   // [PLANES, PARTIAL_PITCH]

  // ---- which rows this block owns; which channels, planes and rows of them this thread owns ----
#if !RAGGED
  const int C = (rows + L - 1) / L;
#endif
  const int c = blockIdx.x % C, h = blockIdx.x / C % H, b = blockIdx.x / C / H;
  const RowRange block = rows_of_block(pieces, c, L, rows);
  const int block_rows = block.end - block.begin;
  X += b * stride_x_b + h * stride_x_h + block.begin * stride_x_n;
  const int strips = D / VECTOR;            // a strip is VECTOR neighbouring channels
  const int row_threads = strips * PARTS;   // neighbouring threads read along a row
  const int slices = THREADS / row_threads;
  const int slice = threadIdx.x / row_threads;
  const int strip = threadIdx.x % row_threads / PARTS;
  const int part = threadIdx.x % PARTS;
  const element_t* column = X + strip * VECTOR;
  const bool has_work = slice < slices;     // the last threads when row_threads does not divide THREADS

  // ---- sums over this thread's rows, while the next hyperplanes are on their way ----
  accumulate_t sums[VECTOR][PLANES] = {};
  auto add_row = [&](const Elements<VECTOR>& x, const float* row_planes) {
#pragma unroll
    for (int v = 0; v < VECTOR; v++) {
#pragma unroll
      for (int p = 0; p < PLANES; p++) sums[v][p] += to_accumulate(x.at[v]) * row_planes[p];
    }
  };
  auto load_row = [&](int row) {
    return *reinterpret_cast<const Elements<VECTOR>*>(column + row * stride_x_n);
  };
  float4 staged[STAGED];
  auto fetch_planes = [&](int first_row) {
    const float4* source = reinterpret_cast<const float4*>(planes) + first_row * static_cast<long long>(ROW_FLOAT4S);
#pragma unroll
    for (int i = 0; i < STAGED; i++) {
      const int at = i * THREADS + threadIdx.x;
      if (at / ROW_FLOAT4S < block_rows - first_row) staged[i] = source[at];
    }
  };
  fetch_planes(0);
  for (int chunk = 0; chunk < block_rows; chunk += PLANE_ROWS) {
    // the two halves take turns: one barrier per chunk parts writing a half from reading it two chunks before
    float* chunk_smem = planes_smem + chunk / PLANE_ROWS % 2 * PLANE_ROWS * HASH_BITS;
#pragma unroll
    for (int i = 0; i < STAGED; i++) reinterpret_cast<float4*>(chunk_smem)[i * THREADS + threadIdx.x] = staged[i];
    __syncthreads();  // the chunk is written before it is read
    fetch_planes(chunk + PLANE_ROWS);

    const int chunk_rows = has_work ? min(PLANE_ROWS, block_rows - chunk) : 0;
    const float* my_planes = chunk_smem + part * PLANES;
    int row = slice;
    for (; row + (ROWS_IN_FLIGHT - 1) * slices < chunk_rows; row += ROWS_IN_FLIGHT * slices) {
      Elements<VECTOR> x[ROWS_IN_FLIGHT];
#pragma unroll
      for (int i = 0; i < ROWS_IN_FLIGHT; i++) x[i] = load_row(chunk + row + i * slices);
#pragma unroll
      for (int i = 0; i < ROWS_IN_FLIGHT; i++) add_row(x[i], my_planes + (row + i * slices) * HASH_BITS);
    }
    for (; row < chunk_rows; row += slices) add_row(load_row(chunk + row), my_planes + row * HASH_BITS);
  }

  // ---- add up the slices, one channel of every strip at a time; vote on the bits ----
  const int outputs = strips * HASH_BITS;
#pragma unroll
  for (int v = 0; v < VECTOR; v++) {
    __syncthreads();  // the planes, then the sums of the channel before, are read before they are overwritten
#pragma unroll
    for (int p = 0; p < PLANES; p++) partial_smem[p * PARTIAL_PITCH + threadIdx.x] = sums[v][p];
    __syncthreads();  // the partial sums are written before they are added up
    for (int first = 0; first < outputs; first += THREADS) {
      const int output = first + threadIdx.x;  // one bit; 16 neighbouring threads make a word
      const int bit = output % HASH_BITS;
      const int owner = output / HASH_BITS * PARTS + bit / PLANES;
      accumulate_t sum = 0;
      if (output < outputs) {
#pragma unroll 4
        for (int s = 0; s < slices; s++) sum += partial_smem[bit % PLANES * PARTIAL_PITCH + s * row_threads + owner];
      }
      const unsigned votes = __ballot_sync(0xffffffffu, sum > 0);
      if (output < outputs && bit == 0) {
        words[blockIdx.x * static_cast<long long>(D) + output / HASH_BITS * VECTOR + v] = votes >> (threadIdx.x & HASH_BITS) & 0xffffu;
      }
    }
  }
}
