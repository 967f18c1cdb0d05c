// narrow_maps.cu - maps as the tensor cores read them: transposed, in 16 bits, padded with zeros.
//
//   out_rd = map_dr rounded to the element type, 0 for r >= R or d >= D
//
// Launcher  : distrattn_np/backends/cupy_backend.py      Tests : tests/agreement/test_gpu_subspace.py
//
// Grid      : blocks * ceil_div(R_PADDED * WIDTH, THREADS), places in a map fastest
// Block     : THREADS
// Assumes   : out is contiguous. Numbers out of range become the largest finite one.
// Alone     : nvcc -cubin -arch=sm_80 raw_kernels/narrow_maps.cu

#include "operands.cuh"

// ---- the launcher sets these with -D; the defaults let the file compile alone ----
#ifndef THREADS
#define THREADS 256
#endif

extern "C" __global__ __launch_bounds__(THREADS)
void narrow_maps(const float* __restrict__ maps,  // [blocks, D, R]
                 element_t* __restrict__ out,     // [blocks, R_PADDED, WIDTH]
                 int D, int R, int R_PADDED, int WIDTH, long long stride_block, long long stride_d,
                 long long stride_r) {
  const int parts = (R_PADDED * WIDTH + THREADS - 1) / THREADS;
  const long long block = blockIdx.x / parts;
  const int i = blockIdx.x % parts * THREADS + threadIdx.x;
  if (i >= R_PADDED * WIDTH) return;
  const int r = i / WIDTH, d = i % WIDTH;
  const float entry = r < R && d < D ? maps[block * stride_block + d * stride_d + r * stride_r] : 0.0f;
  out[block * R_PADDED * WIDTH + i] = to_element(limit_to_element(entry));
}
