// pack_rows.cu - copies rows of sequences from one array into another, as from pages into packed sequences.
//
//   to[b, h, n] <- from[b, h, n],   n < N
//
// PAGED: sequence b has s_b <= N rows, row n being row n mod S of page t_bc, c = floor(n / S); they come behind those of
// the sequences before it, from the row on that edges_k says.                                 docs/math.md (eq. 29, 30)
//
// Launcher  : distrattn_np/backends/cupy_paged_keys.py      Tests : tests/agreement/test_gpu_pages.py
//
// Grid      : B * H * max(ceil_div(N, ROWS), 1), rows fastest
// Block     : THREADS; LANES neighbouring threads share a row
// Shared    : PAGED: 4 bytes, static
// Assumes   : VECTOR divides the width; arrays and their strides are aligned to VECTOR elements. Lengths are taken for 0 to
//             N, pages are not looked at. Nothing is written behind the last row.
// Alone     : nvcc -cubin -arch=sm_75 raw_kernels/pack_rows.cu

#include "element.cuh"

// ---- the launcher sets these with -D; the defaults let the file compile alone ----
#ifndef PAGED
#define PAGED 1
#endif
#ifndef VECTOR  // elements that are copied at once: 1, or as many as fit 16 bytes
#define VECTOR 8
#endif
#ifndef LANES  // a power of two; as many as a row has copies
#define LANES 16
#endif
#ifndef THREADS
#define THREADS 256
#endif
#ifndef ROWS  // of a thread block
#define ROWS 64
#endif
constexpr int ROWS_AT_ONCE = THREADS / LANES;
static_assert(THREADS % LANES == 0 && ROWS % ROWS_AT_ONCE == 0, "every thread has its part of as many rows");

#if PAGED
__device__ __forceinline__ int length_of(const int* lengths, int b, int most) { return min(max(lengths[b], 0), most); }
#endif

extern "C" __global__ __launch_bounds__(THREADS)
void pack_rows(const element_t* __restrict__ source,  // [B, H, N, width]; PAGED: [P, H, S, width]
               element_t* __restrict__ target,        // [B, H, N, width]; PAGED: [H, B * N, width]
               int H, int N, int width,
               long long stride_source_b, long long stride_source_h, long long stride_source_n,  // PAGED: b of pages
               long long stride_target_h, long long stride_target_n,
#if PAGED
               const int* __restrict__ page_table,  // [B, pages of a sequence]
               const int* __restrict__ lengths,     // [B]
               int* __restrict__ edges_q,           // [B + 1], the first query of each sequence
               int* __restrict__ edges_k,           // [B + 1], its first key
               int B, int queries,                  // of each
               int page_shift,                      // log2 of S
               long long stride_table
#else
               long long stride_target_b
#endif
) {
  const int tiles = max((N + ROWS - 1) / ROWS, 1);
  const int tile = blockIdx.x % tiles, h = blockIdx.x / tiles % H, b = blockIdx.x / tiles / H;
  int rows = N;
  source += h * stride_source_h;
  target += h * stride_target_h;
#if PAGED
  rows = length_of(lengths, b, N);
  const bool writes_edges = tile == 0 && h == 0;
  if (tile * ROWS >= rows && !writes_edges) return;

  // ---- rows of the sequences before ----
  __shared__ int begin_smem;
  if (threadIdx.x == 0) begin_smem = 0;
  __syncthreads();  // it is zero before anything is added
  int before = 0;
  for (int other = threadIdx.x; other < b; other += THREADS) before += length_of(lengths, other, N);
  if (before) atomicAdd(&begin_smem, before);
  __syncthreads();  // all is added before it is read
  const int begin = begin_smem;
  if (writes_edges && threadIdx.x == 0) {
    edges_q[b] = b * queries;
    edges_k[b] = begin;
    if (b == B - 1) {
      edges_q[B] = B * queries;
      edges_k[B] = begin + rows;
    }
  }
  target += begin * stride_target_n;
  page_table += b * stride_table;
#else
  source += b * stride_source_b;
  target += b * stride_target_b;
#endif

  // ---- copy ----
  const int end = min(rows - tile * ROWS, ROWS);
  for (int row = threadIdx.x / LANES; row < end; row += ROWS_AT_ONCE) {
    const int n = tile * ROWS + row;
#if PAGED
    const long long page = page_table[n >> page_shift];
    const element_t* const from = source + page * stride_source_b + (n & ((1 << page_shift) - 1)) * stride_source_n;
#else
    const element_t* const from = source + n * stride_source_n;
#endif
    element_t* const to = target + n * stride_target_n;
    for (int d = threadIdx.x % LANES * VECTOR; d < width; d += LANES * VECTOR)
      *reinterpret_cast<Elements<VECTOR>*>(to + d) = *reinterpret_cast<const Elements<VECTOR>*>(from + d);
  }
}
