// subspace_maps.cu - the sampling and fusion maps of every block, from its two Gram matrices.
//
//   T = A W,   C C^T = u (W^T T) u + ridge I,   W <- W u C^-T,   Z <- T u C^-T      docs/math.md (eq. 15 to 19)
//
// from channels that are chosen one after another on (eq. 15), and again with B and with A for every refinement; then
// columns are balanced, the error of the scores is predicted and, with score_tol, the rank is chosen.
//
// The columns of W and Z are kept as rows beside their inner products, [G | W^T | T^T], one row for each of R columns.
// Gaussian elimination of such a row by the ones above it is what multiplies by u C^-T, so factor and solve are one
// sweep of 16 rows at a time. Without u: a pivot's ridge is a part of its own column's square, which is the same.
//
// Reference : reference/subspace_maps.py
// Launcher  : distrattn_np/backends/cupy_backend.py      Tests : tests/agreement/test_gpu_subspace.py
//
// Grid      : (B * H_x * C), c fastest     one thread block per block of rows
// Block     : THREADS
// Shared    : SHARED_BYTES below, dynamic: a panel of a Gram matrix in two buffers, vectors of R and, IN_SHARED, the rows
// Assumes   : 1 <= R <= D <= 256; R = D only with score_tol. Gram matrices are [WIDTH, WIDTH], zero from D on; those of
//             the X side are one a block, those of the Y side one a block or, with y_direction 0, one a head, and H_y
//             divides H_x. float32 throughout, in a fixed order; the predicted error is good to about a thousandth of
//             the root mean square of the scores. Rows of the maps from a block's rank on are zero.
// Alone     : nvcc -cubin -arch=sm_80 raw_kernels/subspace_maps.cu

// ---- the launcher sets these with -D; the defaults let the file compile alone ----
#ifndef D
#define D 128
#endif
#ifndef R
#define R 64  // columns to make; the rank, or D where each block chooses its rank
#endif
#ifndef IN_SHARED
#define IN_SHARED 1  // 0: the rows lie in a workspace in global memory
#endif
#ifndef THREADS
#define THREADS 256
#endif

#include "mma.cuh"

constexpr int BLOCK = 16;  // rows that are eliminated at a time, and the step of the ranks
constexpr int WIDTH = (D + 15) / 16 * 16;
constexpr int R_PADDED = (R + BLOCK - 1) / BLOCK * BLOCK;
constexpr int PITCH = R_PADDED + 2 * WIDTH + 4;  // rows start four banks apart
constexpr int G = 0, W = R_PADDED, T = R_PADDED + WIDTH;  // where the parts of a row begin
constexpr int PANEL = 16;        // rows of a Gram matrix in shared memory at a time
constexpr int TILE = 4;          // a thread's part of a product is TILE x TILE, read and written four floats at a time
constexpr int FACTOR_PITCH = BLOCK + 4;
static_assert(R >= 1 && R <= D && D <= 256, "a block has at least one column and at most D");
static_assert(THREADS % WARP_SIZE == 0 && THREADS >= 256, "one thread for every channel of the widest row");

constexpr int COLUMN_TILES = WIDTH / TILE;
constexpr int ROW_TILES = R_PADDED / TILE;
constexpr int ROW_TILES_AT_ONCE = THREADS / COLUMN_TILES;  // threads beyond these have no part in a product
constexpr int MOST_PASSES = 2;  // tiles that a thread holds the sums of
constexpr int NEEDED_PASSES = (ROW_TILES + ROW_TILES_AT_ONCE - 1) / ROW_TILES_AT_ONCE;
constexpr int PASSES = NEEDED_PASSES < MOST_PASSES ? NEEDED_PASSES : MOST_PASSES;

struct alignas(16) SharedVectors {
  float panel[2][PANEL * WIDTH];
  float factor[BLOCK * FACTOR_PITCH];  // lower triangle of a diagonal block's factor; its diagonal inverted
  float squares[R_PADDED];             // diagonal of G before elimination, later squared lengths of X W
  float y_squares[R_PADDED];           // squared lengths of Y Z
  float scales[R_PADDED];
  float row[R_PADDED];      // of F, while channels are chosen
  float outside[WIDTH];     // squared length of a channel outside the span of the chosen ones
  unsigned keys[WIDTH];     // that times the channel's weight, as a number to compare; 0 for a chosen channel
  int channels[R_PADDED];
  float warp_sums[THREADS / WARP_SIZE];
  int rank;
};
constexpr int ROWS_BYTES = R_PADDED * PITCH * 4;
constexpr int SHARED_BYTES = sizeof(SharedVectors) + (IN_SHARED ? ROWS_BYTES : 0);
static_assert(SHARED_BYTES <= 227 * 1024, "more shared memory than any device gives a block");
#ifdef LAUNCH_SHARED_BYTES
static_assert(LAUNCH_SHARED_BYTES == SHARED_BYTES, "tiles.py and this file disagree on the shared memory");
#endif

constexpr float RIDGE = 1e-6f;
// What is left of a column's square where rounding hides it: that column depends on the ones before and is dropped.
constexpr float DEPENDENT = 4e-6f;  // of its own square
constexpr float NEGLIGIBLE = 3e-8f;  // of tr(A B), which squares of refined columns are parts of

__device__ inline float4 load4(const float* source) { return *reinterpret_cast<const float4*>(source); }

__device__ inline void store4(float* target, const float (&values)[4]) {
  *reinterpret_cast<float4*>(target) = make_float4(values[0], values[1], values[2], values[3]);
}

// sums[i][j] += x[i] y[j]
__device__ inline void add_outer_product(float (&sums)[TILE][TILE], float4 x, float4 y) {
  const float left[TILE] = {x.x, x.y, x.z, x.w}, right[TILE] = {y.x, y.y, y.z, y.w};
#pragma unroll
  for (int i = 0; i < TILE; ++i)
#pragma unroll
    for (int j = 0; j < TILE; ++j) sums[i][j] = fmaf(left[i], right[j], sums[i][j]);
}

// target^T = source^T gram for two parts of the rows: all columns times a symmetric matrix [WIDTH, WIDTH].
__device__ inline void multiply_columns(SharedVectors& shared, float* rows, int source, int target,
                                        const float* __restrict__ gram) {
  const int column = threadIdx.x % COLUMN_TILES * TILE;
  auto load_panel = [&](int k) {
    if (k >= WIDTH) return;
    for (int i = threadIdx.x * 4; i < PANEL * WIDTH; i += THREADS * 4)
      copy_async_or_zero(shared.panel[k / PANEL % 2] + i, gram + k * WIDTH + i, true);
  };
#pragma unroll 1
  for (int first = threadIdx.x / COLUMN_TILES; first - (int)threadIdx.x / COLUMN_TILES < ROW_TILES;
       first += PASSES * ROW_TILES_AT_ONCE) {
    float sums[PASSES][TILE][TILE] = {};
    load_panel(0);
    copy_async_commit();
#pragma unroll 1
    for (int k = 0; k < WIDTH; k += PANEL) {
      copy_async_wait_all();
      __syncthreads();  // the panel, and before the first the rows, are written; the buffer filled next is read
      load_panel(k + PANEL);
      copy_async_commit();
#pragma unroll 2
      for (int inner = 0; inner < PANEL; inner += 4) {
        float4 gram_rows[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) gram_rows[i] = load4(shared.panel[k / PANEL % 2] + (inner + i) * WIDTH + column);
#pragma unroll
        for (int p = 0; p < PASSES; ++p) {
          const int row = min(first + p * ROW_TILES_AT_ONCE, ROW_TILES - 1) * TILE;
#pragma unroll
          for (int i = 0; i < TILE; ++i) {
            const float4 x = load4(rows + (row + i) * PITCH + source + k + inner);
            const float left[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
            for (int j = 0; j < 4; ++j) {
              sums[p][i][0] = fmaf(left[j], gram_rows[j].x, sums[p][i][0]);
              sums[p][i][1] = fmaf(left[j], gram_rows[j].y, sums[p][i][1]);
              sums[p][i][2] = fmaf(left[j], gram_rows[j].z, sums[p][i][2]);
              sums[p][i][3] = fmaf(left[j], gram_rows[j].w, sums[p][i][3]);
            }
          }
        }
      }
    }
#pragma unroll
    for (int p = 0; p < PASSES; ++p) {
      const int tile = first + p * ROW_TILES_AT_ONCE;
      if (tile >= ROW_TILES || threadIdx.x >= COLUMN_TILES * ROW_TILES_AT_ONCE) break;
#pragma unroll
      for (int i = 0; i < TILE; ++i) store4(rows + (tile * TILE + i) * PITCH + target + column, sums[p][i]);
    }
    __syncthreads();  // the products are written, the panels read
  }
}

// The channels of eq. 15 and, in T, the rows F that they leave: Z of the half-step that starts from them. A thread keeps a
// channel; every warp finds the largest for itself.
__device__ inline void choose_channels(SharedVectors& shared, float* rows, const float* __restrict__ A,
                                       const float* __restrict__ B) {
  const int d = threadIdx.x;
  const bool is_channel = d < D;
  const float length = is_channel ? A[d * WIDTH + d] : 0.0f, weight = is_channel ? B[d * WIDTH + d] : 0.0f;
  float outside = length;
  bool is_free = is_channel;
#pragma unroll 1
  for (int r = 0; r < R_PADDED; ++r) {
    // Numbers that are not negative are ordered like their bits; one is added, so that a chosen channel counts least.
    if (d < WIDTH) {
      shared.outside[d] = outside;
      shared.keys[d] = is_free ? (__float_as_uint(outside * weight) & 0x7fffffffu) + 1 : 0;
    }
    __syncthreads();  // the keys are written before they are compared, row r - 1 before it is read
    unsigned largest = 0;
    for (int i = d % WARP_SIZE; i < WIDTH; i += WARP_SIZE) largest = max(largest, shared.keys[i]);
    largest = __reduce_max_sync(~0u, largest);
    unsigned first = WIDTH - 1;
    for (int i = d % WARP_SIZE; i < WIDTH; i += WARP_SIZE)
      if (shared.keys[i] == largest) first = min(first, static_cast<unsigned>(i));
    const int chosen = __reduce_min_sync(~0u, first);
    const bool is_padding = r >= R;
    const float entry = d < WIDTH && !is_padding ? A[chosen * WIDTH + d] : 0.0f;
    const float pivot = shared.outside[chosen];
    if (d < r) shared.row[d] = rows[d * PITCH + T + chosen];
    if (d == 0) shared.channels[r] = chosen;
    __syncthreads();  // the row of F is gathered; keys and outside are read before they are overwritten
    if (d < WIDTH) {
      float left = entry;
#pragma unroll 8
      for (int s = 0; s < r; ++s) left = fmaf(-shared.row[s], rows[s * PITCH + T + d], left);
      const float F = pivot > 0.0f && !is_padding ? left * rsqrtf(pivot) : 0.0f;
      rows[r * PITCH + T + d] = F;
      outside = fmaf(-F, F, outside);
      if (!(outside > RIDGE * length)) outside = 0.0f;
      if (d == chosen) is_free = false;
    }
  }
  __syncthreads();  // F is complete
}

// G = W^T T, and its diagonal apart, before elimination changes it.
__device__ inline void multiply_parts(SharedVectors& shared, float* rows) {
#pragma unroll 1
  for (int tile = threadIdx.x; tile < ROW_TILES * ROW_TILES; tile += THREADS) {
    const int r = tile / ROW_TILES, s = tile % ROW_TILES;  // and every ROW_TILES-th row on: neighbours in other banks
    float sums[TILE][TILE] = {};
#pragma unroll 1
    for (int d = 0; d < WIDTH; d += 4) {
      float4 left[TILE], right[TILE];
#pragma unroll
      for (int i = 0; i < TILE; ++i) {
        left[i] = load4(rows + (r + i * ROW_TILES) * PITCH + W + d);
        right[i] = load4(rows + (s + i * ROW_TILES) * PITCH + T + d);
      }
#pragma unroll
      for (int i = 0; i < TILE; ++i)
#pragma unroll
        for (int j = 0; j < TILE; ++j) {
          sums[i][j] = fmaf(left[i].x, right[j].x, sums[i][j]);
          sums[i][j] = fmaf(left[i].y, right[j].y, sums[i][j]);
          sums[i][j] = fmaf(left[i].z, right[j].z, sums[i][j]);
          sums[i][j] = fmaf(left[i].w, right[j].w, sums[i][j]);
        }
    }
#pragma unroll
    for (int i = 0; i < TILE; ++i)
#pragma unroll
      for (int j = 0; j < TILE; ++j) {
        rows[(r + i * ROW_TILES) * PITCH + G + s + j * ROW_TILES] = sums[i][j];
        if (r == s && i == j) shared.squares[r + i * ROW_TILES] = sums[i][j];
      }
  }
  __syncthreads();  // G is written before it is eliminated
}

// The factor of the diagonal block at `first`, by one warp: lane i % 16 holds row i. The two half-warps do the same.
__device__ inline void factor_block(SharedVectors& shared, const float* rows, int first, float negligible) {
  const int row = threadIdx.x % BLOCK;
  const float square = shared.squares[first + row];
  float entries[BLOCK];
#pragma unroll
  for (int j = 0; j < BLOCK; ++j) entries[j] = rows[(first + min(row, j)) * PITCH + G + first + max(row, j)];
#pragma unroll
  for (int k = 0; k < BLOCK; ++k) {
    const float whole = __shfl_sync(~0u, square, k), left = __shfl_sync(~0u, entries[k], k);
    const float inverse = left > fmaxf(DEPENDENT * whole, negligible) ? rsqrtf(fmaf(RIDGE, whole, left)) : 0.0f;
    const float entry = entries[k] * inverse;
    entries[k] = row == k ? inverse : entry;
#pragma unroll
    for (int j = k + 1; j < BLOCK; ++j) entries[j] = fmaf(-entry, __shfl_sync(~0u, entry, j), entries[j]);
  }
#pragma unroll
  for (int j = 0; j < BLOCK; ++j)
    if (j <= row) shared.factor[row * FACTOR_PITCH + j] = entries[j];
}

// Multiplies the columns that stand in the rows up to `end` by u C^-T, where C C^T = u G u + ridge I; columns of which no
// more than `negligible` is left become zero.
__device__ inline void eliminate(SharedVectors& shared, float* rows, int end, float negligible) {
#pragma unroll 1
  for (int first = 0; first < R_PADDED; first += BLOCK) {
    if (threadIdx.x < WARP_SIZE) factor_block(shared, rows, first, negligible);
    __syncthreads();  // the factor is written

    // ---- the block's own rows: forward substitution, a thread for each place in a row ----
    const int next = first + BLOCK;
    float* const block = rows + first * PITCH;
#pragma unroll 1
    for (int place = next + threadIdx.x; place < end; place += THREADS) {
      float x[BLOCK];
#pragma unroll
      for (int i = 0; i < BLOCK; ++i) x[i] = block[i * PITCH + place];
#pragma unroll
      for (int i = 0; i < BLOCK; ++i) {
        float factor[BLOCK];  // row i of it, up to the diagonal
#pragma unroll
        for (int j = 0; j <= i; j += 4) {
          const float4 four = load4(shared.factor + i * FACTOR_PITCH + j);
          factor[j] = four.x, factor[j + 1] = four.y, factor[j + 2] = four.z, factor[j + 3] = four.w;
        }
#pragma unroll
        for (int j = 0; j < i; ++j) x[i] = fmaf(-factor[j], x[j], x[i]);
        x[i] *= factor[i];
        block[i * PITCH + place] = x[i];
      }
    }
    __syncthreads();  // the block's rows are done before they are subtracted from those below

    // ---- rows below ----
    const int column_tiles = (end - next) / TILE, tiles = (R_PADDED - next) / TILE * column_tiles;
#pragma unroll 1
    for (int tile = threadIdx.x; tile < tiles; tile += THREADS) {
      const int row = next + tile / column_tiles * TILE, place = next + tile % column_tiles * TILE;
      float sums[TILE][TILE] = {};
#pragma unroll 4
      for (int i = 0; i < BLOCK; ++i)
        add_outer_product(sums, load4(block + i * PITCH + G + row), load4(block + i * PITCH + place));
#pragma unroll
      for (int i = 0; i < TILE; ++i) {
        float* const target = rows + (row + i) * PITCH + place;
        const float4 before = load4(target);
        store4(target, {before.x - sums[i][0], before.y - sums[i][1], before.z - sums[i][2], before.w - sums[i][3]});
      }
    }
    __syncthreads();  // the next block is up to date
  }
}

__device__ inline float sum_of_warp(float x) {
#pragma unroll
  for (int distance = WARP_SIZE / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(~0u, x, distance);
  return x;
}

// products[r] = inner product of the parts W and T of row r
__device__ inline void multiply_parts_of_rows(float* products, const float* rows) {
  for (int r = threadIdx.x / WARP_SIZE; r < R_PADDED; r += THREADS / WARP_SIZE) {
    float sum = 0.0f;
    for (int d = threadIdx.x % WARP_SIZE; d < WIDTH; d += WARP_SIZE)
      sum = fmaf(rows[r * PITCH + W + d], rows[r * PITCH + T + d], sum);
    sum = sum_of_warp(sum);
    if (threadIdx.x % WARP_SIZE == 0) products[r] = sum;
  }
}

extern "C" __global__ __launch_bounds__(THREADS, BLOCKS_PER_PROCESSOR)
void subspace_maps(const float* __restrict__ x_grams,  // [B, H_x, C, WIDTH, WIDTH]
                   const float* __restrict__ y_grams,  // [B, H_y, C or 1, WIDTH, WIDTH]
                   float* __restrict__ sampling,       // [B, H_x, C, R_PADDED, WIDTH], W transposed
                   float* __restrict__ fusion,         // [B, H_x, C, R_PADDED, WIDTH], Z transposed
                   int* __restrict__ ranks,            // [B, H_x, C]
                   float* __restrict__ score_errors,   // [B, H_x, C], in nats
                   float* __restrict__ workspace,      // [B, H_x, C, R_PADDED, PITCH]; unused where IN_SHARED
                   int refine, float score_tol,        // in nats; negative: every block has rank R
                   float scale, int H_x, int H_y, int C,
                   int x_rows, int L,                    // of a head, of a block
                   int y_rows, int heads_per_gram,       // of a head; heads that a Gram matrix of the Y side adds up
                   int y_direction, int causal_offset) { // +1: block c meets keys up to ..., -1: queries from ... on
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  SharedVectors& shared = *reinterpret_cast<SharedVectors*>(shared_bytes);

  // ---- which block this is, and how many rows meet it ----
  const long long block = blockIdx.x;
  const int c = blockIdx.x % C, h = blockIdx.x / C % H_x, b = blockIdx.x / C / H_x;
  const long long y_head = static_cast<long long>(b) * H_y + static_cast<long long>(h) * H_y / H_x;
  const float* const A = x_grams + block * WIDTH * WIDTH;
  const float* const B = y_grams + (y_direction == 0 ? y_head : y_head * C + c) * WIDTH * WIDTH;
#if IN_SHARED
  float* const rows = reinterpret_cast<float*>(shared_bytes + sizeof(SharedVectors));
#else
  float* const rows = workspace + block * R_PADDED * PITCH;
#endif
  const long long begin = static_cast<long long>(c) * L;
  const long long end = min(begin + L, static_cast<long long>(x_rows));
  const long long y_last = max(0LL, min(end + causal_offset, static_cast<long long>(y_rows)));
  const long long y_first = max(0LL, min(begin - causal_offset, static_cast<long long>(y_rows)));
  const float own_rows = end - begin;
  const float met_rows =
      static_cast<float>(y_direction > 0 ? y_last : y_direction < 0 ? y_rows - y_first : y_rows) * heads_per_gram;

  // ---- tr(A B), which is the square of all scores; it also brings both matrices near ----
  float trace = 0.0f;
  for (int i = threadIdx.x * 4; i < WIDTH * WIDTH; i += THREADS * 4) {
    const float4 a = load4(A + i), b = load4(B + i);
    trace += (a.x * b.x + a.y * b.y) + (a.z * b.z + a.w * b.w);
  }
  trace = sum_of_warp(trace);
  if (threadIdx.x % WARP_SIZE == 0) shared.warp_sums[threadIdx.x / WARP_SIZE] = trace;

  // ---- Z of the first half-step; W too, where no refinement makes another ----
  choose_channels(shared, rows, A, B);
  if (refine == 0) {
    for (int i = threadIdx.x; i < R_PADDED * WIDTH; i += THREADS) {
      const int r = i / WIDTH, d = i % WIDTH, channel = r < R ? shared.channels[r] : -1;
      rows[r * PITCH + W + d] = d == channel ? 1.0f : 0.0f;
      rows[r * PITCH + T + d] = channel < 0 ? 0.0f : A[channel * WIDTH + d];
    }
    __syncthreads();  // the rows are written before they are multiplied
    multiply_parts(shared, rows);
    eliminate(shared, rows, T + WIDTH, 0.0f);
  }

  float whole = 0.0f;
  for (int i = 0; i < THREADS / WARP_SIZE; ++i) whole += shared.warp_sums[i];

  // ---- refinements: Z in a basis where Y Z is orthonormal, the best W for it, and back ----
#pragma unroll 1
  for (int i = 0; i < refine; ++i) {
    multiply_columns(shared, rows, T, W, B);
    multiply_parts(shared, rows);
    eliminate(shared, rows, W + WIDTH, NEGLIGIBLE * whole);
    multiply_columns(shared, rows, W, T, A);
    multiply_parts(shared, rows);
    eliminate(shared, rows, T + WIDTH, NEGLIGIBLE * whole);
  }

  // ---- squared lengths of X W and Y Z; W leaves for the output, its place takes B Z ----
  float* const W_out = sampling + block * R_PADDED * WIDTH;
  float* const Z_out = fusion + block * R_PADDED * WIDTH;
  multiply_parts_of_rows(shared.squares, rows);
  for (int i = threadIdx.x; i < R_PADDED * WIDTH; i += THREADS) W_out[i] = rows[i / WIDTH * PITCH + W + i % WIDTH];
  __syncthreads();  // W is read before it is overwritten
  multiply_columns(shared, rows, T, W, B);
  multiply_parts_of_rows(shared.y_squares, rows);

  __syncthreads();  // the squared lengths are written

  // ---- predicted error of the first 1, 2, ... columns, and the rank ----
  if (threadIdx.x == 0) {
    float left = whole;
    const float factor = fabsf(scale) * rsqrtf(fmaxf(own_rows, 1.0f) * fmaxf(met_rows, 1.0f));
    int rank = R;
    float error = 0.0f;
    for (int r = 0; r < R; ++r) {
      // W^T A W is the identity but for the ridge, Z is A W, so a column takes 2 - (W^T A W)_rr times its square away
      left -= shared.y_squares[r] * (2.0f - shared.squares[r]);
      error = factor * sqrtf(fmaxf(left, 0.0f));
      if (score_tol >= 0.0f && (r + 1) % BLOCK == 0 && r + 1 < D && error <= score_tol) {
        rank = r + 1;
        break;
      }
    }
    shared.rank = rank;
    ranks[block] = rank;
    score_errors[block] = rank == D ? 0.0f : error;
  }
  // ---- columns of equal mean squares in X W and Y Z; zero where their product is zero ----
  for (int r = threadIdx.x; r < R_PADDED; r += THREADS) {
    const float x_square = shared.squares[r] / fmaxf(own_rows, 1.0f);
    const float y_square = shared.y_squares[r] / fmaxf(met_rows, 1.0f);
    const bool is_zero = !(x_square > 0.0f && y_square > 0.0f);
    shared.scales[r] = is_zero ? 0.0f : sqrtf(sqrtf(y_square)) / sqrtf(sqrtf(x_square));  // the quotient may overflow
  }
  __syncthreads();  // rank and scales are written

  const int rank = shared.rank;
  for (int i = threadIdx.x; i < R_PADDED * WIDTH; i += THREADS) {
    const int r = i / WIDTH, d = i % WIDTH;
    const float column_scale = r < rank ? shared.scales[r] : 0.0f;
    const float identity = r == d && d < D ? 1.0f : 0.0f;
    W_out[i] = rank == D ? identity : W_out[i] * column_scale;
    Z_out[i] = rank == D ? identity : column_scale > 0.0f ? rows[r * PITCH + T + d] / column_scale : 0.0f;
  }
}
