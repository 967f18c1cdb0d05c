// channel_norms.cu - squared lengths of all channels, segment of rows by segment of rows; or their sums.
//
//   norms_sj = sum over the rows n of segment s of Y_nj^POWER       docs/math.md (|y_j|^2 of eq. 9, the mean of eq. 12)
//
// Segments, and not whole columns, because in a causal call every block meets other rows: fusion_gains adds up the
// segments that its block meets (segments.cuh).
//
// Reference : reference/channel_norms.py      Numba : distrattn_np/numba_kernels/channel_norms.py
// Launcher  : distrattn_np/backends/cupy_backend.py
//
// RAGGED with POWER 1 sums the keys that SampledKeys of segments.cuh has; the pieces are those of the keys themselves.
//
// Grid      : (B * H * S), s fastest     one thread block per segment
// Block     : THREADS
// Shared    : THREADS * VECTOR * sizeof(accumulate_t), static
// Assumes   : 1 <= D <= 256; 0 <= lower <= upper <= rows; VECTOR divides D, and Y and its strides are aligned to VECTOR
//             elements. Sums run in float32 (float64 for float64), in a fixed order. An empty segment gives 0.
// Alone     : nvcc -cubin -arch=sm_80 raw_kernels/channel_norms.cu

#include "element.cuh"
#include "segments.cuh"

// ---- the launcher sets these with -D; the defaults let the file compile alone ----
#ifndef THREADS
#define THREADS 256
#endif
#ifndef POWER
#define POWER 2
#endif
#ifndef VECTOR  // elements per load: 1, or as many as fit 16 bytes
#define VECTOR 8
#endif
constexpr int MAX_D = 256;
constexpr int ROWS_AT_ONCE = 8;  // loads of a thread that are on their way together
constexpr int MIN_BLOCKS = 4;  // per multiprocessor: 64 registers; without a number ptxas spills some for occupancy
static_assert(THREADS * VECTOR >= MAX_D, "the threads reach across the widest row");

extern "C" __global__ __launch_bounds__(THREADS, MIN_BLOCKS)
void channel_norms(const element_t* __restrict__ Y,   // [B, H, rows, D]
                   accumulate_t* __restrict__ norms,  // [B, H, S, D]
                   int H, int S, int rows, int D, int segment_rows,
#if RAGGED
                   const Piece* __restrict__ pieces, int offset, int direction,
#else
                   int shift, int lower, int upper,
#endif
                   long long stride_y_b, long long stride_y_h, long long stride_y_n) {
  __shared__ accumulate_t partial_smem[THREADS * VECTOR];  // [slices, D]

  // ---- which rows this block owns; which channels and rows of them this thread owns ----
  const int s = blockIdx.x % S, h = blockIdx.x / S % H, b = blockIdx.x / S / H;
#if !RAGGED
  const Segments segments{S, segment_rows, shift, lower, upper};
#elif POWER == 1
  const SampledKeys segments{pieces, segment_rows};
  Y += pieces[s].begin * stride_y_n;
  stride_y_n *= segments.step(s);
#else
  const Segments segments{pieces, segment_rows, offset, direction};
#endif
  const int begin = segments.range(s).begin, end = segments.range(s).end;
  const int strips = D / VECTOR;  // a strip is VECTOR neighbouring channels; neighbouring threads read along a row
  const int slices = THREADS / strips;
  const int slice = threadIdx.x / strips;
  const int channel = threadIdx.x % strips * VECTOR;
  const element_t* column = Y + b * stride_y_b + h * stride_y_h + channel;

  // ---- sums over this thread's rows ----
  accumulate_t sums[VECTOR] = {};
  if (slice < slices) {
#pragma unroll 1
    for (int first = begin + slice; first < end; first += ROWS_AT_ONCE * slices) {
      Elements<VECTOR> y[ROWS_AT_ONCE];
#pragma unroll
      for (int i = 0; i < ROWS_AT_ONCE; i++) {  // rows past the end are read as the first one and not counted
        const int n = first + i * slices < end ? first + i * slices : first;
        y[i] = *reinterpret_cast<const Elements<VECTOR>*>(column + n * stride_y_n);
      }
#pragma unroll
      for (int i = 0; i < ROWS_AT_ONCE; i++) {
        if (first + i * slices >= end) break;
#pragma unroll
        for (int v = 0; v < VECTOR; v++)
          sums[v] += to_accumulate(y[i].at[v]) * (POWER == 2 ? to_accumulate(y[i].at[v]) : 1);
      }
    }
#pragma unroll
    for (int v = 0; v < VECTOR; v++) partial_smem[slice * D + channel + v] = sums[v];
  }
  __syncthreads();  // the partial sums are written before they are added up

  // ---- add up the slices ----
  if (threadIdx.x < D) {
    accumulate_t sum = 0;
    for (int i = 0; i < slices; i++) sum += partial_smem[i * D + threadIdx.x];
    norms[blockIdx.x * static_cast<long long>(D) + threadIdx.x] = sum;
  }
}
