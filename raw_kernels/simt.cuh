// simt.cuh - products of tiles of rows on CUDA cores, by 16 x 16 threads.
//
// Thread (ty, tx) owns ROWS neighbouring rows of the left tile and COLUMNS of the right one, and their inner products.
// Rows travel to shared memory transposed, [channels][pitch], a chunk of channels at a time.
#pragma once
#include "element.cuh"

constexpr int SIDE = 16;
constexpr int THREADS = SIDE * SIDE;
constexpr int PADDING = 4;  // shifts one channel's row by four banks, and keeps 16-byte reads aligned
constexpr int CHUNK_BYTES = 16384;
constexpr int NEIGHBOURS = 8;  // threads that read along a row; the four rows of a warp reach all 32 banks

// Channels that are in shared memory at a time, of two tiles that have `rows` rows together.
__device__ constexpr int channels_at_a_time(int rows, int width) {
  const int most = CHUNK_BYTES / rows / static_cast<int>(sizeof(accumulate_t)) / NEIGHBOURS * NEIGHBOURS;
  return width < most ? width : most;
}

// sums += A C^T over `depth` channels in shared memory
template <int ROWS, int COLUMNS>
__device__ __forceinline__ void add_products(accumulate_t (&sums)[ROWS][COLUMNS], const accumulate_t* A_smem,
                                             int A_pitch, const accumulate_t* C_smem, int C_pitch, int depth) {
  const int ty = threadIdx.x / SIDE, tx = threadIdx.x % SIDE;
#pragma unroll 4
  for (int r = 0; r < depth; r++) {
    accumulate_t A_rmem[ROWS], C_rmem[COLUMNS];
#pragma unroll
    for (int i = 0; i < ROWS; i++) A_rmem[i] = A_smem[r * A_pitch + ty * ROWS + i];
#pragma unroll
    for (int j = 0; j < COLUMNS; j++) C_rmem[j] = C_smem[r * C_pitch + tx * COLUMNS + j];
#pragma unroll
    for (int i = 0; i < ROWS; i++) {
#pragma unroll
      for (int j = 0; j < COLUMNS; j++) sums[i][j] += A_rmem[i] * C_rmem[j];
    }
  }
}

// Writes channels first_r ... below `width` of `rows` rows; element(row, r) gives one of them.
template <int CHANNELS, class Element>
__device__ __forceinline__ void load_transposed(accumulate_t* tile_smem, int pitch, int rows, int first_r, int width,
                                                const Element& element) {
#pragma unroll 1
  for (int row = threadIdx.x / NEIGHBOURS; row < rows; row += THREADS / NEIGHBOURS) {
#pragma unroll
    for (int i = 0; i < CHANNELS; i += NEIGHBOURS) {
      const int r = i + threadIdx.x % NEIGHBOURS;
      if (r >= CHANNELS || first_r + r >= width) break;
      tile_smem[r * pitch + row] = element(row, first_r + r);
    }
  }
}

// sums += A C^T over all channels; A(row, r) and C(row, r) give the elements of the two tiles. operands_smem has room
// for CHANNELS channels of both. All threads call it: what they wrote before is seen by all when A and C are called.
template <int CHANNELS, int ROWS, int COLUMNS, class Left, class Right>
__device__ __forceinline__ void multiply_rows(accumulate_t (&sums)[ROWS][COLUMNS], accumulate_t* operands_smem,
                                              int width, const Left& A, const Right& C) {
  constexpr int A_PITCH = SIDE * ROWS + PADDING, C_PITCH = SIDE * COLUMNS + PADDING;
  accumulate_t* const C_smem = operands_smem + CHANNELS * A_PITCH;
#pragma unroll 1
  for (int first_r = 0; first_r < width; first_r += CHANNELS) {
    __syncthreads();  // operands are read before they are overwritten
    load_transposed<CHANNELS>(operands_smem, A_PITCH, SIDE * ROWS, first_r, width, A);
    load_transposed<CHANNELS>(C_smem, C_PITCH, SIDE * COLUMNS, first_r, width, C);
    __syncthreads();  // operands are written before they are read
    add_products(sums, operands_smem, A_PITCH, C_smem, C_PITCH, min(CHANNELS, width - first_r));
  }
}
