// gram.cu - inner products of all pairs of channels, segment of rows by segment of rows.
//
//   A_s = sum over the rows n of segment s of (x_n - mean) (x_n - mean)^T       docs/math.md (eq. 11, 12)
//
// The rows of heads_per_gram neighbouring heads are added up. Segments are those of segments.cuh.
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
// Shared    : (STAGES * ROW_TILE * STRIDE + WIDTH) * 2 bytes, static, under 48 KB: a tile of rows in each of STAGES buffers
// Assumes   : 1 <= D <= 256; 0 <= lower <= upper <= rows. RAGGED: a mean for each sequence. ALIGNED: X and its strides are multiples of 16 bytes, D of 8.
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
#include "segments.cuh"

static_assert(ELEMENT == FLOAT16 || ELEMENT == BFLOAT16, "tensor cores take 16-bit elements");
static_assert(D >= 1 && D <= 256, "rows have 1 to 256 elements");
constexpr int STRIP = 16;  // channels: the height of a product
constexpr int STRIPS = (D + STRIP - 1) / STRIP;
constexpr int WIDTH = STRIPS * STRIP;
constexpr int PARTNERS = STRIPS / 2 + 1;  // strips that a strip is multiplied with, itself the first
constexpr int PARTS = PARTNERS > 6 ? 2 : 1;  // thread blocks that share them, where one has not the registers
constexpr int PARTNERS_HERE = (PARTNERS + PARTS - 1) / PARTS;
constexpr int NUM_THREADS = STRIPS * WARP_SIZE;
constexpr int BLOCKS_PER_PROCESSOR = NUM_THREADS <= 256 ? 2 : 1;  // as far as registers reach
constexpr int MMA_K = 16;
constexpr int CHUNK = 8;  // elements in a 16-byte copy
constexpr int ROW_TILE = 32;
constexpr int STEPS = ROW_TILE / MMA_K;  // products of sixteen rows that are summed apart from other tiles'
constexpr int STRIDE = WIDTH + CHUNK;  // an odd number of 16-byte units: rows of an ldmatrix fall into different banks
constexpr int FITTING_STAGES = (48 * 1024 - WIDTH * 2) / (ROW_TILE * STRIDE * 2);
constexpr int STAGES = FITTING_STAGES < 5 ? FITTING_STAGES : 5;

constexpr int CHUNKS_PER_ROW = WIDTH / CHUNK;
constexpr int ROWS_AT_ONCE = NUM_THREADS / CHUNKS_PER_ROW;  // a thread copies the same channels of every 16th row
static_assert(ROWS_AT_ONCE * CHUNKS_PER_ROW == NUM_THREADS && ROW_TILE % ROWS_AT_ONCE == 0, "all threads copy alike");

extern "C" __global__ __launch_bounds__(NUM_THREADS, BLOCKS_PER_PROCESSOR)
void gram(const element_t* __restrict__ X,  // [B, H, rows, D]
          const float* __restrict__ mean,   // [B, H, D]; read only where CENTRED, with one head a Gram matrix
          float* __restrict__ grams,        // [B, grams of a batch, S, WIDTH, WIDTH]
          int grams_per_batch, int heads_per_gram, int S, int segment_rows,
#if RAGGED
          const Piece* __restrict__ pieces, int offset, int direction
#else
          int shift, int lower, int upper
#endif
          ,
          long long stride_x_b, long long stride_x_h, long long stride_x_n) {
  __shared__ alignas(16) element_t X_smem[STAGES][ROW_TILE * STRIDE];
  __shared__ alignas(16) element_t centre_smem[WIDTH];  // -mean / 2

  // ---- which rows this block owns ----
  const int gram = blockIdx.x / PARTS / S;
  const int s = blockIdx.x / PARTS % S, h = gram % grams_per_batch, b = gram / grams_per_batch;
  const int first_partner = blockIdx.x % PARTS * PARTNERS_HERE;  // counted from a warp's own strip
#if RAGGED
  const Segments segments{pieces, segment_rows, offset, direction};
#else
  const Segments segments{S, segment_rows, shift, lower, upper};
#endif
  const int begin = segments.range(s).begin, end = segments.range(s).end;
  const int tiles_per_head = (end - begin + ROW_TILE - 1) / ROW_TILE;
  const int tiles = tiles_per_head * heads_per_gram;
  const element_t* const first_head = X + b * stride_x_b + h * static_cast<long long>(heads_per_gram) * stride_x_h;

  const float* const centre = mean + sequence_row(pieces, s, b, h, grams_per_batch) * D;
  for (int d = threadIdx.x; CENTRED && d < WIDTH; d += NUM_THREADS)
    centre_smem[d] = d < D ? to_element(-0.5f * centre[d]) : element_t(0);
  __syncthreads();  // the centre is written

  // ---- a thread copies the same channels of some rows of every tile, and centres them when they have arrived ----
  auto valid_rows = [&](int tile) { return end - (begin + tile % tiles_per_head * ROW_TILE); };
  auto load_tile = [&](int tile) {
    if (tile >= tiles) return;
    const int thread = thread_index_anew();
    const int own_row = thread / CHUNKS_PER_ROW, own_channel = thread % CHUNKS_PER_ROW * CHUNK;
    const int rows = valid_rows(tile);
    const element_t* const source = first_head + tile / tiles_per_head * stride_x_h + (end - rows) * stride_x_n;
#pragma unroll
    for (int n = own_row; n < own_row + ROW_TILE; n += ROWS_AT_ONCE) {
      element_t* const chunk_smem = X_smem[tile % STAGES] + n * STRIDE + own_channel;
      const element_t* const chunk = source + n * stride_x_n + own_channel;
#if ALIGNED
      const bool is_valid = n < rows && own_channel < D;
      copy_async_or_zero(chunk_smem, is_valid ? chunk : source, is_valid);
#else
#pragma unroll
      for (int i = 0; i < CHUNK; ++i) chunk_smem[i] = n < rows && own_channel + i < D ? chunk[i] : element_t(0);
#endif
    }
  };
  auto centre_tile = [&](int tile) {
    const int thread = thread_index_anew();
    const int own_row = thread / CHUNKS_PER_ROW, own_channel = thread % CHUNKS_PER_ROW * CHUNK;
    const int rows = valid_rows(tile);
    const uint4 centre = *reinterpret_cast<const uint4*>(centre_smem + own_channel);
#pragma unroll
    for (int n = own_row; n < own_row + ROW_TILE; n += ROWS_AT_ONCE) {
      if (n >= rows) break;
      uint4& chunk = *reinterpret_cast<uint4*>(X_smem[tile % STAGES] + n * STRIDE + own_channel);
      chunk = make_uint4(add_to_half(chunk.x, centre.x), add_to_half(chunk.y, centre.y),
                         add_to_half(chunk.z, centre.z), add_to_half(chunk.w, centre.w));
    }
  };

  float sums[PARTNERS_HERE][2][4] = {};

#pragma unroll 1
  for (int tile = 0; tile < STAGES - 1; ++tile) {
    load_tile(tile);
    copy_async_commit();
  }
#pragma unroll 1
  for (int tile = 0; tile < tiles; ++tile) {
    copy_async_wait_all_but<STAGES - 2>();  // this thread's chunks of the tile have arrived
    if (CENTRED) centre_tile(tile);
    __syncthreads();  // the tile is complete, and no warp still reads the one whose place is filled next
    load_tile(tile + STAGES - 1);
    copy_async_commit();
    const int thread = thread_index_anew(), strip = thread / WARP_SIZE, lane = thread % WARP_SIZE;
    // ldmatrix rows: eight rows of the tile, two halves of a strip, then eight rows on
    const unsigned tile_address =
        shared_address(X_smem[tile % STAGES] + (lane % 8 + lane / 16 * 8) * STRIDE + lane / 8 % 2 * 8);

    // Channels of strip j, all rows of the tile, transposed: [channel][row]
    auto load_strip = [&](unsigned (&fragments)[STEPS][4], int j) {
#pragma unroll
      for (int step = 0; step < STEPS; ++step)
        load_matrices_transposed(fragments[step], tile_address + (step * MMA_K * STRIDE + j * STRIP) * 2);
    };
    auto partner = [&](int p) -> int {
      int j = (strip + first_partner + p) % STRIPS;
      asm volatile("" : "+r"(j));  // or the compiler keeps the places of all partners through the loop
      return j;
    };

    unsigned own[STEPS][4], others[2][STEPS][4];  // the next partner's fragments are on their way during a product
    load_strip(own, strip);
    if (PARTS > 1) load_strip(others[0], partner(0));  // else a strip's first partner is the strip itself
#pragma unroll
    for (int p = 0; p < PARTNERS_HERE; ++p) {
      if (p + 1 < PARTNERS_HERE) load_strip(others[(p + 1) % 2], partner(p + 1));
      float products[2][4] = {};
#pragma unroll
      for (int step = 0; step < STEPS; ++step) {
        const unsigned(&right)[4] = PARTS == 1 && p == 0 ? own[step] : others[p % 2][step];
        multiply_add(products[0], own[step], right[0], right[2]);
        multiply_add(products[1], own[step], right[1], right[3]);
      }
#pragma unroll
      for (int i = 0; i < 8; ++i) sums[p][i / 4][i % 4] += products[i / 4][i % 4];
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
