// gram_sm90.cu - inner products of all pairs of channels, segment of rows by segment of rows, on Hopper (sm_90a).
//
//   A_s = sum over the rows n of segment s of x_n x_n^T       docs/math.md (eq. 11)
//
// What gram.cu does, without a mean: a tile of rows is both operands of wgmma as it lies in shared memory, its rows the
// inner dimension, so that reading X is what takes the time. Each warpgroup owns 64 channels, one panel of the tile.
//
// Reference : reference/gram.py
// Launcher  : distrattn_np/backends/cupy_backend.py      Tests : tests/agreement/test_gpu_subspace.py
//
// Grid      : (B * grams of a batch * S), s fastest; segments are those of segments.cuh
// Block     : (1 + WARPGROUPS) * 128 threads. Warpgroup 0 copies tiles
// Shared    : SHARED_BYTES below, dynamic: STAGES tiles of rows and their barriers
// Maps      : x_map shows X (D, rows, H, B) in boxes (64, ROW_TILE, 1, 1), as in forward_sm90.cu
// Assumes   : D is 64 or 128; 0 <= lower <= upper <= rows. Tensor cores cut sums off instead of rounding them, so the
//             products of ROW_TILE rows are summed apart and added up in float32, in a fixed order.
//             An empty segment gives 0.
// Alone     : nvcc -cubin -gencode arch=compute_90a,code=sm_90a raw_kernels/gram_sm90.cu

// ---- the launcher sets these with -D; the defaults let the file compile alone ----
#ifndef D
#define D 128
#endif

#include "hopper.cuh"
#include "segments.cuh"

static_assert(ELEMENT == FLOAT16 || ELEMENT == BFLOAT16, "tensor cores take 16-bit elements");
static_assert(D == 64 || D == 128, "a warpgroup owns 64 channels, and has registers for D sums of each");
constexpr int WARPGROUP = 128;  // threads
constexpr int CHANNELS = Panels<D>::COLUMNS;
constexpr int WARPGROUPS = D / CHANNELS;
constexpr int NUM_CONSUMERS = WARPGROUPS * WARPGROUP;
constexpr int NUM_THREADS = WARPGROUP + NUM_CONSUMERS;
constexpr int ROW_TILE = 64;
constexpr int STAGES = 6;
constexpr int PANEL = ROW_TILE * CHANNELS;  // elements

struct SharedTiles {
  element_t X[STAGES][ROW_TILE * D];
  Barrier full[STAGES], empty[STAGES];
};
constexpr int SHARED_BYTES = sizeof(SharedTiles) + SWIZZLE_ALIGNMENT;
static_assert(SHARED_BYTES <= 227 * 1024, "more shared memory than a block may have");
#ifdef LAUNCH_SHARED_BYTES
static_assert(LAUNCH_SHARED_BYTES == SHARED_BYTES, "tiles.py and this file disagree on the shared memory");
#endif

extern "C" __global__ __launch_bounds__(NUM_THREADS, 1)
void gram_sm90(const __grid_constant__ TensorMap x_map,
               float* __restrict__ grams,  // [B, grams of a batch, S, D, D]
               int grams_per_batch, int heads_per_gram, int S, int segment_rows,
#if RAGGED
               const Piece* __restrict__ pieces, int offset, int direction
#else
               int shift, int lower, int upper
#endif
) {
  extern __shared__ unsigned char shared_bytes[];
  SharedTiles& shared = *reinterpret_cast<SharedTiles*>(
      shared_bytes + (SWIZZLE_ALIGNMENT - shared_address(shared_bytes) % SWIZZLE_ALIGNMENT) % SWIZZLE_ALIGNMENT);

  // ---- which rows this block owns ----
  const int gram = blockIdx.x / S, s = blockIdx.x % S;
  const int first_head = gram % grams_per_batch * heads_per_gram, b = gram / grams_per_batch;
#if RAGGED
  const Segments segments{pieces, segment_rows, offset, direction};
#else
  const Segments segments{S, segment_rows, shift, lower, upper};
#endif
  const int begin = segments.range(s).begin, end = segments.range(s).end;
  const int tiles_per_head = (end - begin + ROW_TILE - 1) / ROW_TILE;
  const int tiles = tiles_per_head * heads_per_gram;

  if (threadIdx.x == 0) {
#pragma unroll
    for (int stage = 0; stage < STAGES; ++stage) {
      barrier_init(shared.full[stage], 1);
      barrier_init(shared.empty[stage], WARPGROUPS);
    }
    barrier_init_fence();
  }
  __syncthreads();  // no one arrives or waits before the barriers are initialised

  const int warpgroup = __shfl_sync(~0u, threadIdx.x / WARPGROUP, 0);  // the compiler sees that a warp agrees on it
  Ring<STAGES> ring;
  if (warpgroup == 0) {
    if (threadIdx.x != 0) return;
#pragma unroll 1
    for (int tile = 0; tile < tiles; ++tile) {
      barrier_wait(shared.empty[ring.stage], ring.parity ^ 1);
      copy_tile<D, ROW_TILE>(shared.X[ring.stage], x_map, shared.full[ring.stage],
                             begin + tile % tiles_per_head * ROW_TILE, first_head + tile / tiles_per_head, b);
      ring.advance();
    }
    return;
  }

  const int panel = warpgroup - 1;
  float sums[D / 2] = {};
#pragma unroll 1
  for (int tile = 0; tile < tiles; ++tile) {
    element_t* const X = shared.X[ring.stage];
    barrier_wait(shared.full[ring.stage], ring.parity);
    const int valid = end - (begin + tile % tiles_per_head * ROW_TILE);
    if (valid < ROW_TILE) clear_rows<D, ROW_TILE, WARPGROUP, NUM_CONSUMERS>(X, valid);

    const Descriptor own = describe_inner_rows<CHANNELS, ROW_TILE>(X + panel * PANEL);
    const Descriptor all = describe_inner_rows<D, ROW_TILE>(X);
    float products[D / 2];
    pin(products);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < ROW_TILE / MMA_DEPTH; ++k)
      multiply_inner_rows(products, own + inner_row_step<D>(k), all + inner_row_step<D>(k), k > 0);
    wgmma_commit();
    wgmma_wait<0>();
    pin(products);
    if (threadIdx.x % WARPGROUP == 0) barrier_arrive(shared.empty[ring.stage]);
    ring.advance();
#pragma unroll
    for (int i = 0; i < D / 2; ++i) sums[i] += products[i];
  }

  const int warp = threadIdx.x % WARPGROUP / WARP_SIZE, lane = threadIdx.x % WARP_SIZE;
  const int row = panel * CHANNELS + warp * 16 + lane / 4;
  float* const A = grams + static_cast<long long>(blockIdx.x) * D * D + row * D + lane % 4 * 2;
#pragma unroll
  for (int t = 0; t < D / 8; ++t) {
    *reinterpret_cast<float2*>(A + 8 * t) = make_float2(sums[4 * t], sums[4 * t + 1]);
    *reinterpret_cast<float2*>(A + 8 * D + 8 * t) = make_float2(sums[4 * t + 2], sums[4 * t + 3]);
  }
}
