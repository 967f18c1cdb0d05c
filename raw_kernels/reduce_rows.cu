// reduce_rows.cu - rows times a dense map of their block: R numbers instead of D.
//
//   out_n = (x_n - mean) W        and, with Z in the place of W, the other side of eq. 4        docs/math.md (eq. 4, 12)
//
// Work item = (b, h, c) of the side that is cut into blocks, c fastest, as in work_item.cuh.
//   ROWS_FROM_BLOCK = 0: every item maps the rows of X with its own map, for a workspace out [items, rows, R_PADDED].
//     Rows from  min(rows, min((c + 1) * block_rows, x_rows) + causal_offset)  on, which no row of block c sees, may be
//     left unwritten; a call that is not causal passes causal_offset = rows.
//   ROWS_FROM_BLOCK = 1: item c maps rows c * block_rows ... of X, which is the side that is cut into blocks itself:
//     out [B, H_x, rows, R_PADDED]. x_rows and causal_offset are not used.
//
// A warp holds 16 rows of X in registers and multiplies them with one map after the other.
//
// Reference : reference/subspace_attention.py
// Launcher  : distrattn_np/backends/cupy_backend.py      Tests : tests/agreement/test_gpu_subspace.py
//
// Grid      : row_tiles * ceil_div(items, ITEMS_PER_BLOCK), row tiles fastest, where
//             row_tiles = ceil_div(ROWS_FROM_BLOCK ? block_rows : rows, ROW_TILE), ROW_TILE = 128
// Block     : 256 threads
// Shared    : SHARED_BYTES below, dynamic: a tile of X and two chunks of a map; WIDTH * 2 bytes, static
// Assumes   : 1 <= R <= D <= 256. ALIGNED: X and its strides are multiples of 16 bytes, D of 8 elements. Maps and out are
//             contiguous and aligned to 16 bytes; rows of the maps from R on are zero, and so are those columns of out
//             but for WITH_ONES.
//             CENTRED: x - mean is rounded to the element type. Sums are float32; results out of range become the
//             largest finite number.
// Alone     : nvcc -cubin -arch=sm_80 raw_kernels/reduce_rows.cu

// ---- the launcher sets these with -D; the defaults let the file compile alone ----
#ifndef D
#define D 128
#endif
#ifndef R
#define R 64
#endif
#ifndef CENTRED  // 0: the mean is taken as zero
#define CENTRED 0
#endif
#ifndef ROWS_FROM_BLOCK
#define ROWS_FROM_BLOCK 0
#endif
#ifndef ITEMS_PER_BLOCK  // neighbouring items mostly share their rows of X, which are then loaded once
#define ITEMS_PER_BLOCK 8
#endif
#ifndef ALIGNED
#define ALIGNED 1
#endif
#ifndef WITH_ONES  // the last two columns of out are ones: with them forward_sm90.cu subtracts its reference
#define WITH_ONES 0
#endif

#include "operands.cuh"
#include "sequences.cuh"

static_assert(ELEMENT == FLOAT16 || ELEMENT == BFLOAT16, "tensor cores take 16-bit elements");
static_assert(R >= 1 && R <= D && D <= 256, "a map has at least one column and at most D");
constexpr int WIDTH = (D + 15) / 16 * 16;
constexpr int R_PADDED = (R + 15) / 16 * 16;
static_assert(!WITH_ONES || R_PADDED - R >= 2, "the last two columns are free");
constexpr int NUM_THREADS = 256;
constexpr int BLOCKS_PER_PROCESSOR = WIDTH <= 128 && R_PADDED <= 64 ? 3 : 2;  // as far as registers reach
constexpr int WARP_ROWS = 16;
constexpr int ROW_TILE = NUM_THREADS / WARP_SIZE * WARP_ROWS;
constexpr int MMA_K = 16;
constexpr int CHUNK = 8;  // elements in a 16-byte copy
constexpr int STRIDE = WIDTH + CHUNK;  // an odd number of 16-byte units: rows of an ldmatrix fall into different banks
constexpr int MAP_ROWS = WIDTH > 128 ? 16 : 64;  // rows of a transposed map in shared memory at a time
constexpr int MAP_CHUNKS = (R_PADDED + MAP_ROWS - 1) / MAP_ROWS;
constexpr int SHARED_BYTES = (ROW_TILE + 2 * MAP_ROWS) * STRIDE * 2;
static_assert(SHARED_BYTES <= 98 * 1024, "every device gives a block as much shared memory");
#ifdef LAUNCH_SHARED_BYTES
static_assert(LAUNCH_SHARED_BYTES == SHARED_BYTES, "tiles.py and this file disagree on the shared memory");
#endif

// Where row r of a transposed map lies among its sixteen in shared memory: so that the four columns of a product that a
// lane holds, two of each half of the sixteen, are neighbours.
__device__ inline int place_of_row(int r) { return r / 16 * 16 + r % 4 / 2 * 8 + r % 16 / 4 * 2 + r % 2; }

extern "C" __global__ __launch_bounds__(NUM_THREADS, BLOCKS_PER_PROCESSOR)
void reduce_rows(const element_t* __restrict__ X,     // [B, H_y, rows, D]
                 const float* __restrict__ mean,      // [B, H_y, D]; read only where CENTRED
                 const element_t* __restrict__ maps,  // [B, H_x, C, R_PADDED, WIDTH], transposed
                 element_t* __restrict__ out,         // [items, rows, R_PADDED] or [B, H_x, rows, R_PADDED]
                 int rows, int H_x, int H_y, int C, int first_item, int items, int block_rows, int x_rows,
                 int causal_offset, long long stride_x_b, long long stride_x_h, long long stride_x_n
#if RAGGED
                 ,
                 const Piece* __restrict__ pieces  // [C], of block_rows rows
#endif
) {
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  element_t* const X_smem = reinterpret_cast<element_t*>(shared_bytes);  // [ROW_TILE, STRIDE]
  element_t* const maps_smem = X_smem + ROW_TILE * STRIDE;               // 2 x [MAP_ROWS, STRIDE]
  __shared__ unsigned centre_smem[WIDTH / 2];                            // -mean / 2 of two neighbouring channels

  const int row_tiles = ((ROWS_FROM_BLOCK ? block_rows : rows) + ROW_TILE - 1) / ROW_TILE;
  const int tile_row = blockIdx.x % row_tiles * ROW_TILE;
  const int first_launch_item = blockIdx.x / row_tiles * ITEMS_PER_BLOCK;
  const int steps = (min(first_launch_item + ITEMS_PER_BLOCK, items) - first_launch_item) * MAP_CHUNKS;

  // ---- which rows an item maps: from `begin` on, none from `end` on ----
  struct Rows {
    int b, h_y, begin, end;
    long long mean;  // which
  };
  auto rows_of = [&](int launch_item) -> Rows {
    const int item = first_item + launch_item;
    const int c = item % C, h = item / C % H_x, b = item / C / H_x;
    const RowRange range = ROWS_FROM_BLOCK ? rows_of_block(pieces, c, block_rows, rows)
                                           : rows_seen_by_block(pieces, c, block_rows, x_rows, rows, causal_offset);
    const int h_y = static_cast<long long>(h) * H_y / H_x;
    return {b, h_y, range.begin + tile_row, range.end, sequence_row(pieces, c, b, h_y, H_y)};
  };

  auto load_rows = [&](const Rows& from) {
    const element_t* const source =
        X + from.b * stride_x_b + from.h_y * stride_x_h + from.begin * stride_x_n;
    const int rows_valid = rows - from.begin;
#if ALIGNED
    for (int i = threadIdx.x; i < ROW_TILE * (WIDTH / CHUNK); i += NUM_THREADS) {
      const int n = i / (WIDTH / CHUNK), d = i % (WIDTH / CHUNK) * CHUNK;
      const bool is_valid = n < rows_valid && d < D;
      copy_async_or_zero(X_smem + n * STRIDE + d, is_valid ? source + n * stride_x_n + d : X, is_valid);
    }
#else
    for (int i = threadIdx.x; i < ROW_TILE * WIDTH; i += NUM_THREADS) {
      const int n = i / WIDTH, d = i % WIDTH;
      X_smem[n * STRIDE + d] = n < rows_valid && d < D ? source[n * stride_x_n + d] : element_t(0);
    }
#endif
    const float* const centre = mean + from.mean * D;
    for (int d = 2 * threadIdx.x; CENTRED && d < WIDTH; d += 2 * NUM_THREADS)
      centre_smem[d / 2] = pack(d < D ? -0.5f * centre[d] : 0.0f, d + 1 < D ? -0.5f * centre[d + 1] : 0.0f);
  };

  auto load_map = [&](int step) {
    if (step >= steps) return;
    const int first_row = step % MAP_CHUNKS * MAP_ROWS, map_rows = min(MAP_ROWS, R_PADDED - first_row);
    const long long item = first_item + first_launch_item + step / MAP_CHUNKS;
    const element_t* const source = maps + (item * R_PADDED + first_row) * WIDTH;
    element_t* const map_smem = maps_smem + step % 2 * MAP_ROWS * STRIDE;
    for (int i = threadIdx.x; i < map_rows * (WIDTH / CHUNK); i += NUM_THREADS) {
      const int r = i / (WIDTH / CHUNK), d = i % (WIDTH / CHUNK) * CHUNK;
      copy_async_or_zero(map_smem + place_of_row(r) * STRIDE + d, source + r * WIDTH + d, true);
    }
  };

  const int warp = threadIdx.x / WARP_SIZE, lane = threadIdx.x % WARP_SIZE;
  const int group = lane / 4, member = lane % 4;
  unsigned X_rmem[WIDTH / MMA_K][4];
  Rows own = rows_of(first_launch_item);
#if RAGGED
  bool is_needed = false;
  for (int i = 0; i < steps / MAP_CHUNKS; ++i) {
    const Rows of_item = rows_of(first_launch_item + i);
    is_needed = is_needed || of_item.begin < of_item.end;
  }
  if (!is_needed) return;  // most tiles are past the end of their sequence
#endif
  load_rows(own);
  load_map(0);
  copy_async_commit();

#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    const int launch_item = first_launch_item + step / MAP_CHUNKS;
    copy_async_wait_all();
    __syncthreads();  // the map has arrived for all threads, and no warp still reads the buffer that is filled next
    load_map(step + 1);
    copy_async_commit();

    // ---- rows of X in registers, unless they are there already ----
    const Rows before = own;
    own = rows_of(launch_item);
    const bool is_moved = own.mean != before.mean || own.begin != before.begin;
    if (is_moved) {
      load_rows(own);
      copy_async_commit();
      copy_async_wait_all();
      __syncthreads();  // the rows have arrived for all threads; the ones before are in registers
    }
    if (is_moved || step == 0) {
      const unsigned X_address = shared_address(X_smem + (warp * WARP_ROWS + lane % 16) * STRIDE + lane / 16 * 8);
#pragma unroll
      for (int k = 0; k < WIDTH / MMA_K; ++k) {
        load_matrices(X_rmem[k], X_address + k * MMA_K * 2);
        if (CENTRED) {
          const unsigned centre[2] = {centre_smem[k * MMA_K / 2 + member], centre_smem[k * MMA_K / 2 + 4 + member]};
#pragma unroll
          for (int i = 0; i < 4; ++i) X_rmem[k][i] = add_to_half(X_rmem[k][i], centre[i / 2]);
        }
      }
    }
    if (own.begin >= own.end) continue;

    // ---- sixteen columns of X W at a time ----
    const int first_column = step % MAP_CHUNKS * MAP_ROWS, columns = min(MAP_ROWS, R_PADDED - first_column);
    const unsigned map_address = shared_address(maps_smem + step % 2 * MAP_ROWS * STRIDE +
                                                (lane % 8 + lane / 16 * 8) * STRIDE + lane / 8 % 2 * 8);
    const int n = own.begin + warp * WARP_ROWS + group;
    const long long plane = ROWS_FROM_BLOCK ? (first_item + launch_item) / C : launch_item;
    element_t* const out_row = out + (plane * rows + n) * R_PADDED + first_column + 4 * member;
#pragma unroll 2
    for (int column = 0; column < columns; column += 16) {
      float sums[2][4] = {};
#pragma unroll
      for (int k = 0; k < WIDTH / MMA_K; ++k) {
        unsigned map_rmem[4];
        load_matrices(map_rmem, map_address + (column * STRIDE + k * MMA_K) * 2);
        multiply_add(sums[0], X_rmem[k], map_rmem[0], map_rmem[1]);
        multiply_add(sums[1], X_rmem[k], map_rmem[2], map_rmem[3]);
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {  // rows n and n + 8
        if (n + 8 * half >= own.end) continue;
        Elements<4> four;
#pragma unroll
        for (int i = 0; i < 4; ++i)
          four.at[i] = to_element(limit_to_element((CENTRED ? 2.0f : 1.0f) * sums[i / 2][2 * half + i % 2]));
        if (WITH_ONES && first_column + column + 4 * member + 4 == R_PADDED) four.at[2] = four.at[3] = to_element(1.0f);
        *reinterpret_cast<Elements<4>*>(out_row + 8 * half * R_PADDED + column) = four;
      }
    }
  }
}
