// expected_gram.cu - what the maps of a finished block of a cache weigh directions by.
//
//   B = ( Y^T Y + w X^T X ) / 2,   w = tr(Y^T Y) / tr(X^T X);   where one is all zero, B is the other    docs/math.md (eq. 28)
//
// X are the keys of the block, Y the queries that are known beforehand, of the key head.
//
// Reference : reference/grouped_keys.py
// Launcher  : distrattn_np/backends/cupy_grouped_keys.py      Tests : tests/agreement/test_gpu_grouped_keys.py
//
// Grid      : heads * blocks, blocks fastest
// Block     : THREADS
// Assumes   : contiguous matrices [WIDTH, WIDTH]. Traces are summed in a fixed order.
// Alone     : nvcc -cubin -arch=sm_75 raw_kernels/expected_gram.cu

// ---- the launcher sets these with -D; the defaults let the file compile alone ----
#ifndef WIDTH
#define WIDTH 128
#endif
#ifndef THREADS
#define THREADS 256
#endif
#ifndef ELEMENT
#define ELEMENT 3
#endif

#include "element.cuh"

static_assert(ELEMENT == FLOAT32 || ELEMENT == FLOAT64, "Gram matrices are float32 or float64");

extern "C" __global__ __launch_bounds__(THREADS)
void expected_gram(element_t* __restrict__ keys,           // [heads, blocks, WIDTH, WIDTH]: X^T X, and B afterwards
                   const element_t* __restrict__ queries,  // [heads, WIDTH, WIDTH]: Y^T Y
                   int blocks) {
  keys += static_cast<long long>(blockIdx.x) * WIDTH * WIDTH;
  queries += static_cast<long long>(blockIdx.x / blocks) * WIDTH * WIDTH;
  __shared__ element_t diagonals_smem[2][WIDTH];
  for (int d = threadIdx.x; d < WIDTH; d += THREADS) {
    diagonals_smem[0][d] = keys[d * (WIDTH + 1)];
    diagonals_smem[1][d] = queries[d * (WIDTH + 1)];
  }
  __syncthreads();  // both diagonals are there
  element_t of_keys = 0, of_queries = 0;
  for (int d = 0; d < WIDTH; ++d) of_keys += diagonals_smem[0][d], of_queries += diagonals_smem[1][d];

  const element_t weight = of_queries / of_keys;
  for (int i = threadIdx.x; i < WIDTH * WIDTH; i += THREADS) {
    // a side of zeros leaves the other alone, and NaN is kept
    if (of_keys == 0 && of_queries != 0) keys[i] = queries[i];
    if (of_keys != 0 && of_queries != 0) keys[i] = (queries[i] + weight * keys[i]) / 2;
  }
}
