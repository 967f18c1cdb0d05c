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
//             the root mean square of the scores. float64 throughout where ELEMENT is that. Rows of the maps from a
//             block's rank on are zero. A block that no row meets has an all-zero Gram matrix B, and maps of zeros.
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

#include "operands.cuh"
#include "sequences.cuh"

// Products of all columns with a Gram matrix, where rows lie in shared memory.
#define ON_TENSOR_CORES (IN_SHARED && ELEMENT != FLOAT64 && __CUDA_ARCH__ >= 800)

typedef accumulate_t real_t;
constexpr int BLOCK = 16;  // rows that are eliminated at a time, and the step of the ranks
constexpr int WIDTH = (D + 15) / 16 * 16;
constexpr int R_PADDED = (R + BLOCK - 1) / BLOCK * BLOCK;
constexpr int PITCH = R_PADDED + 2 * WIDTH + 4;  // rows start in different banks
constexpr int G = 0, W = R_PADDED, T = R_PADDED + WIDTH;  // where the parts of a row begin
constexpr int PANEL = 64 / sizeof(real_t);  // rows of a Gram matrix in shared memory at a time
constexpr int PANEL_PITCH = WIDTH + 8;  // so that four rows start in different banks
constexpr int TILE = 4;          // a thread's part of a product is TILE x TILE, read and written four numbers at a time
constexpr int CHUNK = 16 / sizeof(real_t);  // numbers in a 16-byte copy
constexpr int FACTOR_PITCH = BLOCK + 4;
static_assert(R >= 1 && R <= D && D <= 256, "a block has at least one column and at most D");
static_assert(BLOCK == TILE * TILE, "a thread of half a warp for every tile of a diagonal block");
static_assert(THREADS % WARP_SIZE == 0 && THREADS >= 256, "one thread for every channel of the widest row");

constexpr int ROW_TILES = R_PADDED / TILE;
constexpr int QUADS = (WIDTH / 4 + WARP_SIZE - 1) / WARP_SIZE;  // four channels each, of a lane while they are chosen

#if ELEMENT == FLOAT64
typedef unsigned long long ordered_t;
__device__ inline ordered_t bits_of(double x) { return __double_as_longlong(x); }
#else
typedef unsigned ordered_t;
__device__ inline ordered_t bits_of(float x) { return __float_as_uint(x); }
#endif

struct alignas(16) SharedVectors {
  real_t panel[2][PANEL * PANEL_PITCH];
  real_t factor[BLOCK * FACTOR_PITCH];  // a diagonal block's factor, column after column; its diagonal inverted
  real_t squares[R_PADDED];             // diagonal of G before elimination, later squared lengths of X W
  real_t y_squares[R_PADDED];           // squared lengths of Y Z
  real_t scales[R_PADDED];
  real_t warp_sums[THREADS / WARP_SIZE];
  int channels[R_PADDED];
  int rank;
};
constexpr int ROWS_BYTES = R_PADDED * PITCH * sizeof(real_t);
constexpr int SHARED_BYTES = sizeof(SharedVectors) + (IN_SHARED ? ROWS_BYTES : 0);
static_assert(SHARED_BYTES <= 227 * 1024, "more shared memory than any device gives a block");
// As far as registers and the largest shared memory reach.
constexpr int BLOCKS_PER_PROCESSOR = sizeof(real_t) == 4 && THREADS == 256 && 2 * SHARED_BYTES <= 224 * 1024 ? 2 : 1;
#ifdef LAUNCH_SHARED_BYTES
static_assert(LAUNCH_SHARED_BYTES == SHARED_BYTES, "tiles.py and this file disagree on the shared memory");
#endif

constexpr real_t ROUNDING = sizeof(real_t) == 8 ? 1.0 / (1 << 29) : 1;  // of real_t, in units of float32's
constexpr real_t RIDGE = 1e-6f * ROUNDING;
// What is left of a column's square where rounding hides it: that column depends on the ones before and is dropped.
constexpr real_t DEPENDENT = 4e-6f * ROUNDING;  // of its own square
constexpr real_t RESOLVED = 1e-6f * ROUNDING;  // of tr(A B): the square of an error below it counts as zero
constexpr real_t NEGLIGIBLE = 3e-8f * ROUNDING;  // of tr(A B), which squares of refined columns are parts of

struct alignas(16) Four {
  real_t x, y, z, w;
};

__device__ inline Four load4(const real_t* source) { return *reinterpret_cast<const Four*>(source); }

__device__ inline void store4(real_t* target, const real_t (&values)[4]) {
  *reinterpret_cast<Four*>(target) = {values[0], values[1], values[2], values[3]};
}

// Numbers out of the range of 16 bits become the largest finite one.
__device__ inline void store_narrow(element_t* target, const real_t (&values)[4]) {
  Elements<4> narrow;
#pragma unroll
  for (int i = 0; i < 4; ++i) narrow.at[i] = to_element(limit_to_element(values[i]));
  *reinterpret_cast<Elements<4>*>(target) = narrow;
}

__device__ inline real_t inner_product(Four x, Four y) { return (x.x * y.x + x.y * y.y) + (x.z * y.z + x.w * y.w); }

// sums[i][j] += x[i] y[j]
__device__ inline void add_outer_product(real_t (&sums)[TILE][TILE], Four x, Four y) {
  const real_t left[TILE] = {x.x, x.y, x.z, x.w}, right[TILE] = {y.x, y.y, y.z, y.w};
#pragma unroll
  for (int i = 0; i < TILE; ++i)
#pragma unroll
    for (int j = 0; j < TILE; ++j) sums[i][j] = fma(left[i], right[j], sums[i][j]);
}

__device__ inline void load_panel(SharedVectors& shared, const real_t* __restrict__ gram, int k) {
  if (k >= WIDTH) return;
  for (int i = thread_index_anew() * CHUNK; i < PANEL * WIDTH; i += THREADS * CHUNK)
    copy_async_or_zero(shared.panel[k / PANEL % 2] + i / WIDTH * PANEL_PITCH + i % WIDTH, gram + k * WIDTH + i, true);
}

// target^T = source^T gram for two parts of the rows: all columns times a symmetric matrix [WIDTH, WIDTH].
#if ON_TENSOR_CORES
// Tensor cores read the upper 19 bits of a float. A number is the sum of what they read and a rest, and three products of
// these leave out what is below the rounding of float. They cut sums off, so those of a panel are added up apart.
__device__ inline void multiply_columns(SharedVectors& shared, float* rows, int source, int target,
                                        const float* __restrict__ gram) {
  constexpr int STEP = 8;  // inner length of a product
  constexpr int WARPS = THREADS / WARP_SIZE;
  constexpr int PAIRS = WIDTH / 16, BANDS = R_PADDED / 16;  // of 16 columns, of 16 rows
  constexpr int SHARE = BANDS * PAIRS / WARPS;
  constexpr int BANDS_AT_ONCE = SHARE < 1 ? 1 : SHARE > 4 ? 4 : SHARE;  // that a warp holds the sums of
  constexpr int JOBS = (BANDS + BANDS_AT_ONCE - 1) / BANDS_AT_ONCE * PAIRS;
  const int thread = thread_index_anew(), warp = thread / WARP_SIZE, group = thread % WARP_SIZE / 4, member = thread % 4;
  auto split = [](float x, float& upper, float& rest) {
    upper = __uint_as_float(__float_as_uint(x) & 0xffffe000u);
    rest = x - upper;
  };
#pragma unroll 1
  for (int first = 0; first < JOBS; first += WARPS) {
    const int job = first + warp, column = job % PAIRS * 16, first_band = job / PAIRS * BANDS_AT_ONCE;
    float sums[BANDS_AT_ONCE][2][4] = {};
    load_panel(shared, gram, 0);
    copy_async_commit();
#pragma unroll 1
    for (int k = 0; k < WIDTH; k += PANEL) {
      copy_async_wait_all();
      __syncthreads();  // the panel, and before the first the rows, are written; the buffer filled next is read
      load_panel(shared, gram, k + PANEL);
      copy_async_commit();
      if (job >= JOBS) continue;
      float products[BANDS_AT_ONCE][2][4] = {};
#pragma unroll
      for (int inner = 0; inner < PANEL; inner += STEP) {
        float right[2][2], right_rest[2][2];
#pragma unroll
        for (int n = 0; n < 2; ++n)
#pragma unroll
          for (int i = 0; i < 2; ++i)
            split(shared.panel[k / PANEL % 2][(inner + member + 4 * i) * PANEL_PITCH + column + 8 * n + group],
                  right[n][i], right_rest[n][i]);
#pragma unroll
        for (int m = 0; m < BANDS_AT_ONCE; ++m) {
          const int row = min(first_band + m, BANDS - 1) * 16 + group;
          float left[4], left_rest[4];
#pragma unroll
          for (int i = 0; i < 4; ++i)
            split(rows[(row + i % 2 * 8) * PITCH + source + k + inner + member + i / 2 * 4], left[i], left_rest[i]);
#pragma unroll
          for (int n = 0; n < 2; ++n) {
            multiply_add(products[m][n], left_rest, right[n]);
            multiply_add(products[m][n], left, right_rest[n]);
            multiply_add(products[m][n], left, right[n]);
          }
        }
      }
#pragma unroll
      for (int m = 0; m < BANDS_AT_ONCE; ++m)
#pragma unroll
        for (int i = 0; i < 8; ++i) sums[m][i / 4][i % 4] += products[m][i / 4][i % 4];
    }
#pragma unroll
    for (int m = 0; m < BANDS_AT_ONCE; ++m) {
      if (job >= JOBS || first_band + m >= BANDS) break;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float* const place = rows + ((first_band + m) * 16 + group + i % 2 * 8) * PITCH + target + column + i / 2 * 8;
        place[2 * member] = sums[m][i / 2][i % 2 * 2];
        place[2 * member + 1] = sums[m][i / 2][i % 2 * 2 + 1];
      }
    }
    __syncthreads();  // the products are written, the panels read
  }
}
#else
__device__ inline void multiply_columns(SharedVectors& shared, real_t* rows, int source, int target,
                                        const real_t* __restrict__ gram) {
  constexpr int COLUMN_TILES = WIDTH / TILE;
  constexpr int ROW_TILES_AT_ONCE = THREADS / COLUMN_TILES;  // threads beyond these have no part in a product
  // tiles that a thread holds the sums of; float64 and global addresses take registers
  constexpr int MOST_PASSES = IN_SHARED && sizeof(real_t) == 4 ? 2 : 1;
  constexpr int NEEDED_PASSES = (ROW_TILES + ROW_TILES_AT_ONCE - 1) / ROW_TILES_AT_ONCE;
  constexpr int PASSES = NEEDED_PASSES < MOST_PASSES ? NEEDED_PASSES : MOST_PASSES;
  const int thread = thread_index_anew(), column = thread % COLUMN_TILES * TILE;
#pragma unroll 1
  for (int first = thread / COLUMN_TILES; first - thread / COLUMN_TILES < ROW_TILES;
       first += PASSES * ROW_TILES_AT_ONCE) {
    real_t sums[PASSES][TILE][TILE] = {};
    load_panel(shared, gram, 0);
    copy_async_commit();
#pragma unroll 1
    for (int k = 0; k < WIDTH; k += PANEL) {
      copy_async_wait_all();
      __syncthreads();  // the panel, and before the first the rows, are written; the buffer filled next is read
      load_panel(shared, gram, k + PANEL);
      copy_async_commit();
#pragma unroll 2
      for (int inner = 0; inner < PANEL; inner += 4) {
        Four gram_rows[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) gram_rows[i] = load4(shared.panel[k / PANEL % 2] + (inner + i) * PANEL_PITCH + column);
#pragma unroll
        for (int p = 0; p < PASSES; ++p) {
          const int row = min(first + p * ROW_TILES_AT_ONCE, ROW_TILES - 1) * TILE;
#pragma unroll
          for (int i = 0; i < TILE; ++i) {
            const Four x = load4(rows + (row + i) * PITCH + source + k + inner);
            const real_t left[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
            for (int j = 0; j < 4; ++j) {
              sums[p][i][0] = fma(left[j], gram_rows[j].x, sums[p][i][0]);
              sums[p][i][1] = fma(left[j], gram_rows[j].y, sums[p][i][1]);
              sums[p][i][2] = fma(left[j], gram_rows[j].z, sums[p][i][2]);
              sums[p][i][3] = fma(left[j], gram_rows[j].w, sums[p][i][3]);
            }
          }
        }
      }
    }
#pragma unroll
    for (int p = 0; p < PASSES; ++p) {
      const int tile = first + p * ROW_TILES_AT_ONCE;
      if (tile >= ROW_TILES || thread >= COLUMN_TILES * ROW_TILES_AT_ONCE) break;
#pragma unroll
      for (int i = 0; i < TILE; ++i) store4(rows + (tile * TILE + i) * PITCH + target + column, sums[p][i]);
    }
    __syncthreads();  // the products are written, the panels read
  }
}
#endif

// The channels of eq. 15 and, in T, the rows F that they leave: Z of the half-step that starts from them. The steps are
// one chain, and for each to wait for other warps would take longer than what these could do of it: one warp does it all.
__device__ inline void choose_channels(SharedVectors& shared, real_t* rows, const real_t* __restrict__ A,
                                       const real_t* __restrict__ B) {
  const int thread = thread_index_anew();
  for (int i = thread; i < R_PADDED * WIDTH; i += THREADS) rows[i / WIDTH * PITCH + T + i % WIDTH] = 0.0f;
  __syncthreads();  // rows of F that are not there yet count as zeros

  if (thread < WARP_SIZE) {
    // A lane looks after channels first_of(q) to first_of(q) + 3.
    auto first_of = [&](int q) -> int { return (q * WARP_SIZE + thread) * 4; };
    real_t outside[QUADS][4] = {}, least[QUADS][4] = {}, weights[QUADS][4] = {};  // outside: of the span of those chosen
    unsigned is_free = 0;                                                         // a bit for each of them
    constexpr int ROWS_AT_ONCE = QUADS == 1 ? 16 : 8;  // loads that are on their way together
    static_assert(BLOCK % ROWS_AT_ONCE == 0, "there are whole steps of rows");
#pragma unroll
    for (int q = 0; q < QUADS; ++q)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int d = first_of(q) + i;
        if (d < D) {
          outside[q][i] = A[d * WIDTH + d], least[q][i] = RIDGE * outside[q][i], weights[q][i] = B[d * WIDTH + d];
          is_free |= 1u << (q * 4 + i);
        }
      }
#pragma unroll 1
    for (int r = 0; r < R; ++r) {
      // ---- the channel with the most left ----
      // Numbers that are not negative are ordered like their bits; one is added, so that a chosen channel counts least.
      ordered_t keys[QUADS][4], largest = 0;
#pragma unroll
      for (int q = 0; q < QUADS; ++q)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          keys[q][i] =
              is_free >> (q * 4 + i) & 1 ? (bits_of(outside[q][i] * weights[q][i]) & ~ordered_t(0) >> 1) + 1 : 0;
          largest = max(largest, keys[q][i]);
        }
      largest = max_of_warp(largest);
      constexpr int LAST = QUADS * WARP_SIZE * 4 - 1;
      unsigned places_behind = 0;  // it, counted from the last channel on: the earliest of equals has most
#pragma unroll
      for (int q = QUADS - 1; q >= 0; --q)
#pragma unroll
        for (int i = 3; i >= 0; --i)
          if (keys[q][i] == largest) places_behind = LAST - (first_of(q) + i);
      const int chosen = LAST - max_of_warp(places_behind);
      real_t pivot = 0.0f;
#pragma unroll
      for (int q = 0; q < QUADS; ++q)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const bool is_it = first_of(q) + i == chosen;
          if (is_it) pivot = outside[q][i], is_free &= ~(1u << (q * 4 + i));
        }
      pivot = __shfl_sync(~0u, pivot, chosen / 4 % WARP_SIZE);
      const real_t inverse = pivot > 0.0f ? rsqrt(pivot) : 0.0f;

      // ---- its row of A - F F^T, scaled. A's row is on its way while F's are multiplied ----
      Four a[QUADS];
      real_t row[QUADS][4] = {};
#pragma unroll
      for (int q = 0; q < QUADS; ++q)
        if (first_of(q) < WIDTH) a[q] = load4(A + chosen * WIDTH + first_of(q));
#pragma unroll 1
      for (int s = 0; s < r; s += ROWS_AT_ONCE) {
#pragma unroll
        for (int i = 0; i < ROWS_AT_ONCE; ++i) {
          const real_t* const F = rows + (s + i) * PITCH + T;
          const real_t factor = F[chosen];
#pragma unroll
          for (int q = 0; q < QUADS; ++q) {
            if (first_of(q) >= WIDTH) continue;
            const Four f = load4(F + first_of(q));
            row[q][0] = fma(factor, f.x, row[q][0]), row[q][1] = fma(factor, f.y, row[q][1]);
            row[q][2] = fma(factor, f.z, row[q][2]), row[q][3] = fma(factor, f.w, row[q][3]);
          }
        }
      }
#pragma unroll
      for (int q = 0; q < QUADS; ++q) {
        const real_t whole[4] = {a[q].x, a[q].y, a[q].z, a[q].w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          row[q][i] = first_of(q) < WIDTH ? (whole[i] - row[q][i]) * inverse : 0.0f;
          outside[q][i] = fma(-row[q][i], row[q][i], outside[q][i]);
          if (!(outside[q][i] > least[q][i])) outside[q][i] = 0.0f;
        }
      }
      __syncwarp();  // all lanes have read the rows that are not there yet, of which this is the first
#pragma unroll
      for (int q = 0; q < QUADS; ++q)
        if (first_of(q) < WIDTH) store4(rows + r * PITCH + T + first_of(q), row[q]);
      if (thread == 0) shared.channels[r] = chosen;
      __syncwarp();  // the row of F is written
    }
  }
  __syncthreads();  // the rows and the channels are written
}

// G = W^T T on and above its diagonal, and the diagonal apart, before elimination changes it. G is symmetric: nothing reads
// the rest.
__device__ inline void multiply_parts(SharedVectors& shared, real_t* rows) {
  const int thread = thread_index_anew();
#pragma unroll 1
  for (int tile = thread; tile < ROW_TILES * ROW_TILES; tile += THREADS) {
    const int r = tile / ROW_TILES, s = tile % ROW_TILES;  // and every ROW_TILES-th row on: neighbours in other banks
    real_t sums[TILE][TILE] = {};
#pragma unroll 1
    for (int d = 0; d < WIDTH; d += 4) {
      Four left[TILE], right[TILE];
#pragma unroll
      for (int i = 0; i < TILE; ++i) {
        left[i] = load4(rows + (r + i * ROW_TILES) * PITCH + W + d);
        right[i] = load4(rows + (s + i * ROW_TILES) * PITCH + T + d);
      }
#pragma unroll
      for (int i = 0; i < TILE; ++i)
#pragma unroll
        for (int j = i; j < TILE; ++j) {
          sums[i][j] = fma(left[i].x, right[j].x, sums[i][j]);
          sums[i][j] = fma(left[i].y, right[j].y, sums[i][j]);
          sums[i][j] = fma(left[i].z, right[j].z, sums[i][j]);
          sums[i][j] = fma(left[i].w, right[j].w, sums[i][j]);
        }
    }
#pragma unroll
    for (int i = 0; i < TILE; ++i)
#pragma unroll
      for (int j = i; j < TILE; ++j) {
        rows[(r + i * ROW_TILES) * PITCH + G + s + j * ROW_TILES] = sums[i][j];
        if (r == s && i == j) shared.squares[r + i * ROW_TILES] = sums[i][j];
      }
  }
  __syncthreads();  // G is written before it is eliminated
}

// The factor of the diagonal block at `first`, by one warp: lane i % 16 holds row i. The two half-warps do the same.
__device__ inline void factor_block(SharedVectors& shared, const real_t* rows, int first, real_t negligible) {
  const int row = thread_index_anew() % BLOCK;
  const real_t square = shared.squares[first + row];
  real_t entries[BLOCK];
#pragma unroll
  for (int j = 0; j < BLOCK; ++j) entries[j] = rows[(first + min(row, j)) * PITCH + G + first + max(row, j)];
#pragma unroll
  for (int k = 0; k < BLOCK; ++k) {
    const real_t whole = __shfl_sync(~0u, square, k), left = __shfl_sync(~0u, entries[k], k);
    const real_t inverse = left > max(DEPENDENT * whole, negligible) ? rsqrt(fma(RIDGE, whole, left)) : 0.0f;
    const real_t entry = entries[k] * inverse;
    entries[k] = row == k ? inverse : entry;
#pragma unroll
    for (int j = k + 1; j < BLOCK; ++j) entries[j] = fma(-entry, __shfl_sync(~0u, entry, j), entries[j]);
  }
#pragma unroll
  for (int j = 0; j < BLOCK; ++j)
    if (j <= row) shared.factor[j * FACTOR_PITCH + row] = entries[j];
}

// Multiplies the columns that stand in the rows up to `end` by u C^-T, where C C^T = u G u + ridge I; columns of which no
// more than `negligible` is left become zero.
__device__ inline void eliminate(SharedVectors& shared, real_t* rows, int end, real_t negligible) {
  if (threadIdx.x < WARP_SIZE) factor_block(shared, rows, 0, negligible);
  __syncthreads();  // the factor is written
#pragma unroll 1
  for (int first = 0; first < R_PADDED; first += BLOCK) {
    const int thread = thread_index_anew();

    // ---- the block's own rows: forward substitution, a thread for each place in a row ----
    const int next = first + BLOCK;
    real_t* const block = rows + first * PITCH;
#pragma unroll 1
    for (int place = next + thread; place < end; place += THREADS) {
      real_t x[BLOCK];
#pragma unroll
      for (int i = 0; i < BLOCK; ++i) x[i] = block[i * PITCH + place];
#pragma unroll
      for (int j = 0; j < BLOCK; ++j) {
        asm volatile("" ::: "memory");  // or the compiler keeps the factor in registers from one place to the next
        real_t factor[BLOCK];  // column j of it, from the diagonal on
#pragma unroll
        for (int i = j / 4 * 4; i < BLOCK; i += 4) {
          const Four four = load4(shared.factor + j * FACTOR_PITCH + i);
          factor[i] = four.x, factor[i + 1] = four.y, factor[i + 2] = four.z, factor[i + 3] = four.w;
        }
        x[j] *= factor[j];
        block[j * PITCH + place] = x[j];
#pragma unroll
        for (int i = j + 1; i < BLOCK; ++i) x[i] = fma(-factor[i], x[j], x[i]);
      }
    }
    __syncthreads();  // the block's rows are done before they are subtracted from those below

    // ---- rows below; one warp makes the next diagonal block, and its factor at once ----
    auto subtract = [&](int row, int place) {
      real_t sums[TILE][TILE] = {};
#pragma unroll 4
      for (int i = 0; i < BLOCK; ++i)
        add_outer_product(sums, load4(block + i * PITCH + G + row), load4(block + i * PITCH + place));
#pragma unroll
      for (int i = 0; i < TILE; ++i) {
        real_t* const target = rows + (row + i) * PITCH + place;
        const Four before = load4(target);
        store4(target, {before.x - sums[i][0], before.y - sums[i][1], before.z - sums[i][2], before.w - sums[i][3]});
      }
    };
    const int column_tiles = (end - next) / TILE, tiles = (R_PADDED - next) / TILE * column_tiles;
    if (thread >= WARP_SIZE) {
#pragma unroll 1
      for (int tile = thread - WARP_SIZE; tile < tiles; tile += THREADS - WARP_SIZE) {
        const int row = tile / column_tiles * TILE, place = tile % column_tiles * TILE;
        if (place >= max(row, BLOCK)) subtract(next + row, next + place);
      }
    } else if (tiles > 0) {
      if (thread < BLOCK) subtract(next + thread / TILE * TILE, next + thread % TILE * TILE);
      __syncwarp();  // the diagonal block is written
      factor_block(shared, rows, next, negligible);
    }
    __syncthreads();  // the next block is up to date, its factor written
  }
}

__device__ inline real_t sum_of_warp(real_t x) {
#pragma unroll
  for (int distance = WARP_SIZE / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(~0u, x, distance);
  return x;
}

// products[r] = inner product of the parts W and T of row r
__device__ inline void multiply_parts_of_rows(real_t* products, const real_t* rows) {
  const int thread = thread_index_anew(), lane = thread % WARP_SIZE;
#pragma unroll 4
  for (int r = thread / WARP_SIZE; r < R_PADDED; r += THREADS / WARP_SIZE) {
    real_t sum = 0.0f;
    for (int d = lane * 4; d < WIDTH; d += WARP_SIZE * 4)
      sum += inner_product(load4(rows + r * PITCH + W + d), load4(rows + r * PITCH + T + d));
    sum = sum_of_warp(sum);
    if (lane == 0) products[r] = sum;
  }
}

extern "C" __global__ __launch_bounds__(THREADS, BLOCKS_PER_PROCESSOR)
void subspace_maps(const real_t* __restrict__ x_grams,  // [B, H_x, C, WIDTH, WIDTH]
                   const real_t* __restrict__ y_grams,  // [B, H_y, C or 1, WIDTH, WIDTH]
                   real_t* __restrict__ sampling,       // [B, H_x, C, R_PADDED, WIDTH], W transposed
                   real_t* __restrict__ fusion,         // [B, H_x, C, R_PADDED, WIDTH], Z transposed
                   element_t* __restrict__ narrow_sampling,  // the two in 16 bits, where ELEMENT has those; else unused
                   element_t* __restrict__ narrow_fusion,
                   int* __restrict__ ranks,             // [B, H_x, C]
                   real_t* __restrict__ score_errors,   // [B, H_x, C], in nats
                   real_t* __restrict__ workspace,      // [B, H_x, C, R_PADDED, PITCH]; unused where IN_SHARED
                   int refine, real_t score_tol,        // in nats; negative: every block has rank R
                   real_t scale, int H_x, int H_y, int C,
                   int x_rows, int L,                    // of a head, of a block
                   int y_rows, int heads_per_gram,       // of a head; heads that a Gram matrix of the Y side adds up
                   int y_direction, int causal_offset   // +1: block c meets keys up to ..., -1: queries from ... on
#if RAGGED
                   ,
                   const Piece* __restrict__ pieces,    // [C]
                   int is_by_keys
#endif
) {
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  SharedVectors& shared = *reinterpret_cast<SharedVectors*>(shared_bytes);

  // ---- which block this is ----
  const long long block = blockIdx.x;
  const int c = blockIdx.x % C, h = blockIdx.x / C % H_x, b = blockIdx.x / C / H_x;
  const int h_y = static_cast<long long>(h) * H_y / H_x;
  const long long y_head = static_cast<long long>(b) * H_y + h_y;
  const real_t* const A = x_grams + block * WIDTH * WIDTH;
  const real_t* const B =
      y_grams + (y_direction == 0 ? sequence_row(pieces, c, b, h_y, H_y) : y_head * C + c) * WIDTH * WIDTH;
#if RAGGED
  const Piece piece = pieces[c];
  if (piece.rows == 0 || (is_by_keys && piece.other_rows == 0)) {  // no such block, or of a sequence without queries
    if (threadIdx.x == 0) ranks[block] = 0, score_errors[block] = 0;
    return;
  }
#endif
#if IN_SHARED
  real_t* const rows = reinterpret_cast<real_t*>(shared_bytes + sizeof(SharedVectors));
#else
  real_t* const rows = workspace + block * R_PADDED * PITCH;
#endif

  // ---- tr(A B), which is the square of all scores; it also brings both matrices near ----
  constexpr int ADDING = 256;  // threads: whatever THREADS, the order of the sum and so all results are the same
  real_t trace = 0.0f;
  if (threadIdx.x < ADDING) {
#pragma unroll 4
    for (int i = threadIdx.x * 4; i < WIDTH * WIDTH; i += ADDING * 4) trace += inner_product(load4(A + i), load4(B + i));
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

  real_t whole = 0.0f;
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
  real_t* const W_out = sampling + block * R_PADDED * WIDTH;
  real_t* const Z_out = fusion + block * R_PADDED * WIDTH;
  multiply_parts_of_rows(shared.squares, rows);
  for (int i = threadIdx.x * 4; i < R_PADDED * WIDTH; i += THREADS * 4)
    *reinterpret_cast<Four*>(W_out + i) = load4(rows + i / WIDTH * PITCH + W + i % WIDTH);
  __syncthreads();  // W is read before it is overwritten
  multiply_columns(shared, rows, T, W, B);
  multiply_parts_of_rows(shared.y_squares, rows);

  __syncthreads();  // the squared lengths are written

  // ---- how many rows the block has, and how many meet it ----
#if RAGGED
  const Piece met = pieces[c];  // read again: registers in between are dearer
  const int block_in_sequence = met.index;
  x_rows = met.rows, y_rows = met.other_rows, causal_offset += met.diagonal;
#else
  const int block_in_sequence = c;
#endif
  const long long begin = static_cast<long long>(block_in_sequence) * L;
  const long long end = min(begin + L, static_cast<long long>(x_rows));
  const long long y_last = max(0LL, min(end + causal_offset, static_cast<long long>(y_rows)));
  const long long y_first = max(0LL, min(begin - causal_offset, static_cast<long long>(y_rows)));
  const real_t own_rows = end - begin;
  const real_t met_rows =
      static_cast<real_t>(y_direction > 0 ? y_last : y_direction < 0 ? y_rows - y_first : y_rows) * heads_per_gram;

  // ---- predicted error of the first 1, 2, ... columns, and the rank ----
  if (threadIdx.x == 0) {
    real_t left = whole;
    const real_t factor = fabs(scale) * rsqrt(max(own_rows, 1.0f) * max(met_rows, 1.0f));
    int rank = R;
    real_t error = 0.0f;
#pragma unroll 1
    for (int first = 0; first < R && rank == R; first += BLOCK) {
      // W^T A W is the identity but for the ridge, Z is A W, so a column takes 2 - (W^T A W)_rr times its square away
#pragma unroll
      for (int r = first; r < first + BLOCK; ++r) left -= shared.y_squares[r] * (2.0f - shared.squares[r]);
      error = left > RESOLVED * whole ? factor * sqrt(left) : 0.0f;
      if (score_tol >= 0.0f && first + BLOCK < D && error <= score_tol) rank = first + BLOCK;
    }
    shared.rank = rank;
    ranks[block] = rank;
    score_errors[block] = rank == D ? 0.0f : error;
  }
  // ---- columns of equal mean squares in X W and Y Z; zero where their product is zero ----
  for (int r = threadIdx.x; r < R_PADDED; r += THREADS) {
    const real_t x_square = shared.squares[r] / max(own_rows, 1.0f);
    const real_t y_square = shared.y_squares[r] / max(met_rows, 1.0f);
    const bool is_zero = !(x_square > 0.0f && y_square > 0.0f);
    shared.scales[r] = is_zero ? 0.0f : sqrt(sqrt(y_square)) / sqrt(sqrt(x_square));  // the quotient may overflow
  }
  __syncthreads();  // rank and scales are written

  const int rank = shared.rank;
#pragma unroll 2
  for (int i = threadIdx.x * 4; i < R_PADDED * WIDTH; i += THREADS * 4) {
    const int r = i / WIDTH, d = i % WIDTH;
    const Four w = load4(W_out + i), z = load4(rows + r * PITCH + T + d);
    const real_t column_scale = r < rank ? shared.scales[r] : 0.0f;
    const real_t inverse = 1.0f / column_scale;
    real_t W_row[4] = {w.x * column_scale, w.y * column_scale, w.z * column_scale, w.w * column_scale};
    real_t Z_row[4] = {z.x * inverse, z.y * inverse, z.z * inverse, z.w * inverse};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (rank == D) W_row[j] = Z_row[j] = r == d + j && r < D ? 1.0f : 0.0f;
      else if (!(column_scale > 0.0f)) Z_row[j] = 0.0f;
    }
    store4(W_out + i, W_row);
    store4(Z_out + i, Z_row);
    if (sizeof(element_t) == 2) {
      store_narrow(narrow_sampling + block * R_PADDED * WIDTH + i, W_row);
      store_narrow(narrow_fusion + block * R_PADDED * WIDTH + i, Z_row);
    }
  }
}
