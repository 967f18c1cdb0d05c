// cut_sequences.cu - cuts packed sequences into pieces of `step` rows, for the kernels that are built with RAGGED.
//
//   piece p is the rows  begin + index * step ...  of the sequence in which the p-th piece of all lies
//
// docs/math.md (eq. 29), sequences.cuh. Pieces past the last one have no rows.
//
// Launcher  : distrattn_np/backends/cupy_backend.py      Tests : tests/agreement/test_gpu_ragged.py
//
// Grid      : ceil_div(count, THREADS)
// Block     : THREADS, a piece each
// Shared    : 2 * THREADS ints, static
// Assumes   : edges that begin with 0, do not fall and end with at most the rows. Whatever they hold, no piece reaches
//             out of the arrays, and none is of a sequence that has others past the last.
// Alone     : nvcc -cubin -arch=sm_80 raw_kernels/cut_sequences.cu

#include "sequences.cuh"

// ---- the launcher sets these with -D; the defaults let the file compile alone ----
#ifndef LONG_EDGES
#define LONG_EDGES 0  // 1: the edges are 64-bit integers
#endif
#ifndef THREADS
#define THREADS 256
#endif

#if LONG_EDGES
typedef long long edge_t;
#else
typedef int edge_t;
#endif

struct Rows {
  int begin, count;
};

__device__ __forceinline__ Rows rows_of(const edge_t* edges, int sequence, int rows) {
  const long long begin = min(max(static_cast<long long>(edges[sequence]), 0LL), static_cast<long long>(rows));
  const long long end = min(max(static_cast<long long>(edges[sequence + 1]), begin), static_cast<long long>(rows));
  return {static_cast<int>(begin), static_cast<int>(end - begin)};
}

__device__ __forceinline__ int count_pieces(Rows rows, int step) { return rows.count / step + (rows.count % step > 0); }

extern "C" __global__ __launch_bounds__(THREADS)
void cut_sequences(const edge_t* __restrict__ edges,        // [sequences + 1], of the side that is cut
                   const edge_t* __restrict__ other_edges,  // [sequences + 1]
                   Piece* __restrict__ pieces,              // [count]
                   int count, int sequences, int rows, int other_rows, int step, int other_step,
                   int diagonal_sign) {  // 1: the other side holds the keys, -1: queries; 0: top-left
  __shared__ int ends_smem[THREADS], other_ends_smem[THREADS];  // of a chunk of sequences: pieces up to each

  const int p = blockIdx.x * THREADS + threadIdx.x;
  Piece own = {-1, 0, 0, 0, 0, 0, 0, 0};
  int first = 0, other_first = 0;  // pieces of the chunks before
  for (int chunk = 0; chunk < sequences; chunk += THREADS) {
    // ---- running sums over a chunk of sequences, a thread each ----
    const int s = chunk + threadIdx.x;
    const bool is_there = s < sequences;
    __syncthreads();  // the sums of the chunk before are read before they are overwritten
    ends_smem[threadIdx.x] = is_there ? count_pieces(rows_of(edges, s, rows), step) : 0;
    other_ends_smem[threadIdx.x] = is_there ? count_pieces(rows_of(other_edges, s, other_rows), other_step) : 0;
    for (int distance = 1; distance < THREADS; distance *= 2) {
      __syncthreads();  // sums are written before they are read
      const int before = static_cast<int>(threadIdx.x) - distance;
      const int added = before < 0 ? 0 : ends_smem[before], other_added = before < 0 ? 0 : other_ends_smem[before];
      __syncthreads();  // sums are read before they are overwritten
      ends_smem[threadIdx.x] += added;
      other_ends_smem[threadIdx.x] += other_added;
    }
    __syncthreads();  // the last sums are written before they are read

    // ---- the first sequence whose pieces end behind this one ----
    const int place = p - first;
    if (place >= 0 && place < ends_smem[THREADS - 1]) {
      int low = 0, high = THREADS - 1;
      while (low < high) {
        const int middle = (low + high) / 2;
        if (ends_smem[middle] > place) high = middle;
        else low = middle + 1;
      }
      const Rows cut = rows_of(edges, chunk + low, rows), other = rows_of(other_edges, chunk + low, other_rows);
      const int before = low ? ends_smem[low - 1] : 0, other_before = low ? other_ends_smem[low - 1] : 0;
      const int last_first = other_rows / other_step + sequences - count_pieces(other, other_step);
      if (first + ends_smem[low] <= count)  // wrong edges may make more
        own = {chunk + low,
               place - before,
               cut.begin,
               cut.count,
               other.begin,
               other.count,
               min(other_first + other_before, last_first),
               diagonal_sign * (other.count - cut.count)};
    }
    first += ends_smem[THREADS - 1];
    other_first += other_ends_smem[THREADS - 1];
  }
  if (p < count) pieces[p] = own;
}
