// narrow_maps.cu - maps as other kernels read them: transposed, in the element type, padded with zeros.
//
//   out_rd = map_dr rounded to the element type, 0 for r >= R or d >= D
//
// For tensor cores the elements have 16 bits, and R and D are padded; for CUDA cores nothing is rounded or padded.
//
// Launcher  : distrattn_np/backends/cupy_backend.py      Tests : tests/agreement/test_gpu_subspace.py
//
// Grid      : blocks * ceil_div(R_PADDED * WIDTH, THREADS), places in a map fastest
// Block     : THREADS
// Assumes   : out is contiguous. Numbers out of range of 16 bits become the largest finite one.
// Alone     : nvcc -cubin -arch=sm_80 raw_kernels/narrow_maps.cu

#include "element.cuh"
#if ELEMENT == FLOAT16 || ELEMENT == BFLOAT16
#include "operands.cuh"
#else
__device__ inline accumulate_t limit_to_element(accumulate_t x) { return x; }
#endif

// ---- the launcher sets these with -D; the defaults let the file compile alone ----
#ifndef THREADS
#define THREADS 256
#endif

extern "C" __global__ __launch_bounds__(THREADS)
void narrow_maps(const accumulate_t* __restrict__ maps,  // [blocks, D, R]
                 element_t* __restrict__ out,            // [blocks, R_PADDED, WIDTH]
                 int D, int R, int R_PADDED, int WIDTH, long long stride_block, long long stride_d,
                 long long stride_r) {
  const int parts = (R_PADDED * WIDTH + THREADS - 1) / THREADS;
  const long long block = blockIdx.x / parts;
  const int i = blockIdx.x % parts * THREADS + threadIdx.x;
  if (i >= R_PADDED * WIDTH) return;
  const int r = i / WIDTH, d = i % WIDTH;
  const accumulate_t entry = r < R && d < D ? maps[block * stride_block + d * stride_d + r * stride_r] : 0;
  out[block * R_PADDED * WIDTH + i] = to_element(limit_to_element(entry));
}
