// gram.cu - inner products of all pairs of channels, segment of rows by segment of rows.
//
//   A_s = sum over the rows n of segment s of (x_n - mean) (x_n - mean)^T       docs/math.md (eq. 11, 12)
//
// The rows of heads_per_gram neighbouring heads are added up. Segments as in channel_norms.cu:
// segment s holds the rows from edge(s) to edge(s + 1) - 1,
//
//   edge(s) = min(max(s * segment_rows + shift, lower), upper),   edge(0) = lower,   edge(S) = upper
//
// A Gram matrix is symmetric. Warp w owns 16 channels, strip w, and multiplies them with itself and the strips up to
// half way round the circle of strips: every pair of strips meets once, and all warps do the same work. Transposed,
// one fragment serves as the left operand of its strip and as the right one.
//
// Reference : reference/gram.py
// Launcher  : distrattn_np/backends/cupy_backend.py      Tests : tests/agreement/test_gpu_subspace.py
//
// Grid      : (B * grams of a batch * S * PARTS), parts fastest, then s; PARTS = 2 for D > 176, else 1
// Block     : STRIPS * 32 threads
// Shared    : 2 * ROW_TILE * STRIDE * 2 + WIDTH * 4 bytes, static, under 48 KB
// Assumes   : 1 <= D <= 256; 0 <= lower <= upper <= rows. ALIGNED: X and its strides are multiples of 16 bytes, D of 8.
//             The mean is in the range and precision of the elements; what is multiplied is x - mean rounded to them.
//             Tensor cores cut sums off instead of rounding them, so the products of 32 rows are summed apart and
//             added up in float32, in a fixed order. Channels from D on are zero; an empty segment gives 0.
// Alone     : nvcc -cubin -arch=sm_80 raw_kernels/gram.cu

// ---- the launcher sets these with -D; the defaults let the file compile alone ----
#ifndef D
#define D 128
#endif
#ifndef CENTRED  // 0: the mean is taken as zero
#define CENTRED 0
#endif
#ifndef ALIGNED
#define ALIGNED 1
#endif

#include "operands.cuh"

static_assert(ELEMENT == FLOAT16 || ELEMENT == BFLOAT16, "tensor cores take 16-bit elements");
static_assert(D >= 1 && D <= 256, "rows have 1 to 256 elements");
constexpr int STRIP = 16;  // channels: the height of a product
constexpr int STRIPS = (D + STRIP - 1) / STRIP;
constexpr int WIDTH = STRIPS * STRIP;
constexpr int PARTNERS = STRIPS / 2 + 1;  // strips that a strip is multiplied with, itself the first
constexpr int PARTS = PARTNERS > 6 ? 2 : 1;  // thread blocks that share them, where one has not the registers
constexpr int PARTNERS_HERE = (PARTNERS + PARTS - 1) / PARTS;
constexpr int NUM_THREADS = STRIPS * WARP_SIZE;
constexpr int BLOCKS_PER_PROCESSOR = NUM_THREADS <= 256 && !CENTRED ? 2 : 1;  // as far as registers reach
constexpr int MMA_K = 16;
constexpr int CHUNK = 8;  // elements in a 16-byte copy
constexpr int ROW_TILE = STRIPS > 8 ? 32 : 64;
constexpr int STEPS = 2;  // products of sixteen rows that are summed apart from the others
constexpr int STRIDE = WIDTH + CHUNK;  // an odd number of 16-byte units: rows of an ldmatrix fall into different banks

// Which of the two rows in a register are above `rows`, counted from the first of them.
__device__ inline unsigned valid_pair(int rows) { return rows >= 2 ? ~0u : rows == 1 ? 0xffffu : 0u; }

extern "C" __global__ __launch_bounds__(NUM_THREADS, BLOCKS_PER_PROCESSOR)
void gram(const element_t* __restrict__ X,  // [B, H, rows, D]
          const float* __restrict__ mean,   // [B, H, D]; read only where CENTRED, with one head a Gram matrix
          float* __restrict__ grams,        // [B, grams of a batch, S, WIDTH, WIDTH]
          int grams_per_batch, int heads_per_gram, int S, int segment_rows, int shift, int lower, int upper,
          long long stride_x_b, long long stride_x_h, long long stride_x_n) {
  __shared__ alignas(16) element_t X_smem[2][ROW_TILE * STRIDE];
  __shared__ unsigned centre_smem[WIDTH];  // -mean / 2, twice in a register

  // ---- which rows this block owns ----
  const int gram = blockIdx.x / PARTS / S;
  const int s = blockIdx.x / PARTS % S, h = gram % grams_per_batch, b = gram / grams_per_batch;
  const int first_partner = blockIdx.x % PARTS * PARTNERS_HERE;  // counted from a warp's own strip
  auto edge = [&](int segment) -> int {
    if (segment == 0) return lower;
    if (segment == S) return upper;
    const long long row = static_cast<long long>(segment) * segment_rows + shift;
    return row < lower ? lower : row > upper ? upper : static_cast<int>(row);
  };
  const int begin = edge(s), end = edge(s + 1);
  const int tiles_per_head = (end - begin + ROW_TILE - 1) / ROW_TILE;
  const int tiles = tiles_per_head * heads_per_gram;
  const element_t* const first_head = X + b * stride_x_b + h * static_cast<long long>(heads_per_gram) * stride_x_h;
  for (int d = threadIdx.x; CENTRED && d < WIDTH; d += NUM_THREADS) {
    const float half = d < D ? -0.5f * mean[static_cast<long long>(gram) * D + d] : 0.0f;
    centre_smem[d] = pack(half, half);
  }

  auto load_tile = [&](int tile) {
    if (tile >= tiles) return;
    const int row = begin + tile % tiles_per_head * ROW_TILE;
    const element_t* const source = first_head + tile / tiles_per_head * stride_x_h + row * stride_x_n;
    element_t* const tile_smem = X_smem[tile % 2];
#if ALIGNED
    for (int i = threadIdx.x; i < ROW_TILE * (WIDTH / CHUNK); i += NUM_THREADS) {
      const int n = i / (WIDTH / CHUNK), d = i % (WIDTH / CHUNK) * CHUNK;
      const bool is_valid = row + n < end && d < D;
      copy_async_or_zero(tile_smem + n * STRIDE + d, is_valid ? source + n * stride_x_n + d : source, is_valid);
    }
#else
#pragma unroll 1
    for (int i = threadIdx.x; i < ROW_TILE * WIDTH; i += NUM_THREADS) {
      const int n = i / WIDTH, d = i % WIDTH;
      tile_smem[n * STRIDE + d] = row + n < end && d < D ? source[n * stride_x_n + d] : element_t(0);
    }
#endif
  };

  float sums[PARTNERS_HERE][2][4] = {};

  load_tile(0);
  copy_async_commit();
#pragma unroll 1
  for (int tile = 0; tile < tiles; ++tile) {
    copy_async_wait_all();
    __syncthreads();  // the tile has arrived for all threads, and no warp still reads the buffer that is filled next
    load_tile(tile + 1);
    copy_async_commit();
    const int thread = thread_index_anew(), strip = thread / WARP_SIZE, lane = thread % WARP_SIZE;
    // ldmatrix rows: eight rows of the tile, two halves of a strip, then eight rows on
    const unsigned tile_address =
        shared_address(X_smem[tile % 2] + (lane % 8 + lane / 16 * 8) * STRIDE + lane / 8 % 2 * 8);
    const int rows = end - (begin + tile % tiles_per_head * ROW_TILE);

    // Channels of strip j, sixteen rows from 16 step on, transposed: [channel][row]
    auto load_strip = [&](unsigned (&fragment)[4], int j, int step) {
      load_matrices_transposed(fragment, tile_address + (step * MMA_K * STRIDE + j * STRIP) * 2);
      if (CENTRED) {
        const unsigned centre[2] = {centre_smem[j * STRIP + lane / 4], centre_smem[j * STRIP + lane / 4 + 8]};
        const int row = step * MMA_K + lane % 4 * 2;
        const unsigned is_valid[2] = {valid_pair(rows - row), valid_pair(rows - row - 8)};
#pragma unroll
        for (int i = 0; i < 4; ++i) fragment[i] = add_to_half(fragment[i], centre[i % 2]) & is_valid[i / 2];
      }
    };

#pragma unroll 1
    for (int first_step = 0; first_step < ROW_TILE / MMA_K; first_step += STEPS) {
      unsigned own[STEPS][4];
#pragma unroll
      for (int step = 0; step < STEPS; ++step) load_strip(own[step], strip, first_step + step);
#pragma unroll
      for (int p = 0; p < PARTNERS_HERE; ++p) {
        const bool is_own = PARTS == 1 && p == 0;
        int partner = (strip + first_partner + p) % STRIPS;
        asm volatile("" : "+r"(partner));  // or the compiler keeps the places of all partners through the loop
        float products[2][4] = {};
#pragma unroll
        for (int step = 0; step < STEPS; ++step) {
          unsigned other[4];
          if (!is_own) load_strip(other, partner, first_step + step);
          const unsigned(&right)[4] = is_own ? own[step] : other;
          multiply_add(products[0], own[step], right[0], right[2]);
          multiply_add(products[1], own[step], right[1], right[3]);
        }
#pragma unroll
        for (int i = 0; i < 8; ++i) sums[p][i / 4][i % 4] += products[i / 4][i % 4];
      }
    }
  }

  // ---- write the products and their mirror images ----
  float* const A = grams + (static_cast<long long>(gram) * S + s) * WIDTH * WIDTH;
  constexpr float FACTOR = CENTRED ? 4.0f : 1.0f;  // both sides were halved
  const int thread = thread_index_anew(), strip = thread / WARP_SIZE, lane = thread % WARP_SIZE;
#pragma unroll
  for (int p = 0; p < PARTNERS_HERE; ++p) {
    const int distance = first_partner + p, partner = (strip + distance) % STRIPS;
    const bool is_met_by_partner = distance == 0 || 2 * distance == STRIPS;
    if (distance >= PARTNERS) break;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int row = strip * STRIP + lane / 4 + i % 4 / 2 * 8;
      const int column = partner * STRIP + i / 4 * 8 + lane % 4 * 2 + i % 2;
      const float sum = FACTOR * sums[p][i / 4][i % 4];
      A[row * WIDTH + column] = sum;
      if (!is_met_by_partner) A[column * WIDTH + row] = sum;
    }
  }
}
