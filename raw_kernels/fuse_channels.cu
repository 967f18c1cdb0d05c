// fuse_channels.cu - rows of reduced width: the members of each group added up, or the first of each group sampled.
//
//   MEMBERS = GROUP_SIZE:  out_nr = sum over j in group r of gain_j Y_nj    (Y Z)     docs/math.md (eq. 8, 9)
//   MEMBERS = 1         :  out_nr = Y_n,first(r)                            (X W)
//
// Work item = (b, h, c) of the grouped side, c fastest, as in work_item.cuh.
//   ROWS_FROM_BLOCK = 0: every item transforms the rows of Y with its own maps, for a workspace out [items, rows,
//     R_PADDED]. Rows from  min(rows, min((c + 1) * block_rows, x_rows) + causal_offset)  on, which no row of block c
//     sees, may be left unwritten; a call that is not causal passes causal_offset = rows.
//   ROWS_FROM_BLOCK = 1: item c transforms rows c * block_rows ... of Y, which is the grouped side itself, in place:
//     out [B, H_x, rows, R_PADDED]. x_rows and causal_offset are not used.
//
// Reference : reference/fuse_channels.py      Numba : distrattn_np/numba_kernels/fuse_channels.py
// Launcher  : distrattn_np/backends/cupy_backend.py
//
// Grid      : row_tiles * ceil_div(items, ITEMS_PER_BLOCK), row tiles fastest, where
//             row_tiles = ceil_div(ROWS_FROM_BLOCK ? block_rows : rows, ROW_TILE), ROW_TILE = 128 / sizeof(element_t)
// Block     : THREADS
// Shared    : under 48 KB, static: ROW_TILE rows of Y, and the maps of one item
// Assumes   : GROUP_SIZE divides D <= 256; R = D / GROUP_SIZE <= R_PADDED; columns R ... R_PADDED - 1 are written zero.
//             VECTOR divides D, and Y and its strides are aligned to VECTOR elements; out is contiguous and aligned to
//             16 bytes. Sums run in float32 (float64 for float64) and are rounded once.
// Alone     : nvcc -cubin -arch=sm_80 raw_kernels/fuse_channels.cu

#include "element.cuh"
#include "sequences.cuh"

// ---- the launcher sets these with -D; the defaults let the file compile alone ----
#ifndef GROUP_SIZE
#define GROUP_SIZE 2
#endif
#ifndef MEMBERS  // GROUP_SIZE: fuse; 1: sample
#define MEMBERS GROUP_SIZE
#endif
#ifndef WITH_GAINS
#define WITH_GAINS 0
#endif
#ifndef R_PADDED  // R rounded up to a multiple of 16
#define R_PADDED 64
#endif
#ifndef ROWS_FROM_BLOCK
#define ROWS_FROM_BLOCK 0
#endif
#ifndef ITEMS_PER_BLOCK  // neighbouring items mostly share their rows of Y, which are then loaded once
#define ITEMS_PER_BLOCK 8
#endif
#ifndef VECTOR  // elements per load: 1, or as many as fit 16 bytes
#define VECTOR 8
#endif
#ifndef THREADS
#define THREADS 128
#endif
constexpr int WIDEST = GROUP_SIZE * R_PADDED < 256 ? GROUP_SIZE * R_PADDED : 256;  // not below D
constexpr int ROW_TILE = 128 / sizeof(element_t);
constexpr int OUTPUTS = 16 / sizeof(element_t);  // columns per thread, stored at once
constexpr int STRIPS = R_PADDED / OUTPUTS;
constexpr int MIN_BLOCKS = 3;  // per multiprocessor: 168 registers; without a number ptxas spills some for occupancy
static_assert(R_PADDED % 16 == 0, "a row of the result is a whole number of 16-element steps of the tensor core");
static_assert(MEMBERS == 1 || MEMBERS == GROUP_SIZE, "a group is sampled or fused");
static_assert(THREADS >= STRIPS, "the threads reach across a row of the result");

// Shared memory holds rows in words of 32 bits or more, so that one read of a 16-bit channel serves two rows.
constexpr int ROWS_PER_WORD = sizeof(element_t) < 4 ? 4 / sizeof(element_t) : 1;
constexpr int WORDS = ROW_TILE / ROWS_PER_WORD;
constexpr int PITCH = WIDEST + 8;  // a shift of 8 banks from one row to the next
constexpr int ZERO = WIDEST;       // this word of every row is zero: what padding columns are read from
struct alignas(ROWS_PER_WORD * sizeof(element_t)) RowWord {
  element_t row[ROWS_PER_WORD];
};

// A thread owns one strip of OUTPUTS columns in WORDS_PER_THREAD words, and reads the maps once for all of them.
constexpr int WORDS_PER_PASS = THREADS / STRIPS;
constexpr int WORDS_PER_THREAD = (WORDS + WORDS_PER_PASS - 1) / WORDS_PER_PASS;
constexpr bool EVERY_WORD_EXISTS = WORDS % WORDS_PER_PASS == 0 && THREADS % STRIPS == 0;
constexpr int MOST_STRIPS = (WIDEST / GROUP_SIZE + OUTPUTS - 1) / OUTPUTS;
constexpr int MAP_STRIPS = MOST_STRIPS < STRIPS ? MOST_STRIPS : STRIPS;  // strips from here on are padding for any D
struct alignas(OUTPUTS * sizeof(unsigned short)) StripMembers {
  unsigned short at[OUTPUTS];
};
struct alignas(OUTPUTS * sizeof(float)) StripGains {
  float at[OUTPUTS];
};

extern "C" __global__ __launch_bounds__(THREADS, MIN_BLOCKS)
void fuse_channels(const element_t* __restrict__ Y,   // [B, H_y, rows, D]
                   const int* __restrict__ channels,  // [B, H_x, C, D]
                   const float* __restrict__ gains,   // [B, H_x, C, D]; read only where WITH_GAINS
                   element_t* __restrict__ out,       // [items, rows, R_PADDED] or [B, H_x, rows, R_PADDED]
                   int rows, int D, int R, int H_x, int H_y, int C, int first_item, int items, int block_rows,
                   int x_rows, int causal_offset, long long stride_y_b, long long stride_y_h, long long stride_y_n
#if RAGGED
                   ,
                   const Piece* __restrict__ pieces  // [C], of block_rows rows
#endif
) {
  __shared__ alignas(16) RowWord tile_smem[WORDS][PITCH];
  __shared__ StripMembers member_smem[MEMBERS][MAP_STRIPS];
  __shared__ StripGains gain_smem[WITH_GAINS ? MEMBERS : 1][MAP_STRIPS];

  const int strip = threadIdx.x % STRIPS;
  const int first_word = threadIdx.x / STRIPS;
  const int row_tiles = ((ROWS_FROM_BLOCK ? block_rows : rows) + ROW_TILE - 1) / ROW_TILE;
  const int tile_row = blockIdx.x % row_tiles * ROW_TILE;
  const element_t* loaded = nullptr;  // where the rows in tile_smem come from
  for (int i = threadIdx.x; i < WORDS; i += THREADS) tile_smem[i][ZERO] = {};

  const int first_launch_item = blockIdx.x / row_tiles * ITEMS_PER_BLOCK;
  const int items_end = min(first_launch_item + ITEMS_PER_BLOCK, items);
  for (int launch_item = first_launch_item; launch_item < items_end; launch_item++) {
    // ---- which rows: `begin` is the tile's first, no row from `end` on is needed ----
    const int item = first_item + launch_item;
    const int c = item % C, h = item / C % H_x, b = item / C / H_x;
    const RowRange range = ROWS_FROM_BLOCK ? rows_of_block(pieces, c, block_rows, rows)
                                           : rows_seen_by_block(pieces, c, block_rows, x_rows, rows, causal_offset);
    const int begin = range.begin + tile_row, end = range.end;
    if (begin >= end) continue;
    const int h_y = static_cast<long long>(h) * H_y / H_x;  // the product may pass 2^31
    const element_t* source = Y + b * stride_y_b + h_y * stride_y_h + begin * stride_y_n;
    __syncthreads();  // the item before is done with the tile and its maps

    // ---- load the tile [ROW_TILE, D] ----
    if (source != loaded) {
      const int tile_rows = min(ROW_TILE, rows - begin);
      const int vectors = D / VECTOR;
      for (int i = threadIdx.x; i < WORDS * vectors; i += THREADS) {
        const int word = i / vectors, channel = i % vectors * VECTOR;
        Elements<VECTOR> y[ROWS_PER_WORD] = {};
#pragma unroll
        for (int k = 0; k < ROWS_PER_WORD; k++) {
          const int row = word * ROWS_PER_WORD + k;
          if (row < tile_rows) y[k] = *reinterpret_cast<const Elements<VECTOR>*>(source + row * stride_y_n + channel);
        }
#pragma unroll
        for (int v = 0; v < VECTOR; v++) {
#pragma unroll
          for (int k = 0; k < ROWS_PER_WORD; k++) tile_smem[word][channel + v].row[k] = y[k].at[v];
        }
      }
      loaded = source;
    }

    // ---- load the maps, padding columns lead to zero ----
    for (int i = threadIdx.x; i < MEMBERS * MAP_STRIPS * OUTPUTS; i += THREADS) {
      const int r = i / MEMBERS, g = i % MEMBERS;
      const long long at = static_cast<long long>(item) * D + r * GROUP_SIZE + g;
      member_smem[g][r / OUTPUTS].at[r % OUTPUTS] = r < R ? channels[at] : ZERO;
      if (WITH_GAINS) gain_smem[g][r / OUTPUTS].at[r % OUTPUTS] = r < R ? gains[at] : 0;
    }
    __syncthreads();  // tile and maps are written before they are read

    // ---- add up the members ----
    accumulate_t sums[WORDS_PER_THREAD][ROWS_PER_WORD][OUTPUTS] = {};
    if (strip < MAP_STRIPS) {
#pragma unroll 4
      for (int g = 0; g < MEMBERS; g++) {
        const StripMembers members = member_smem[g][strip];
        StripGains member_gains;
        if (WITH_GAINS) member_gains = gain_smem[g][strip];
#pragma unroll
        for (int w = 0; w < WORDS_PER_THREAD; w++) {
          const int word = first_word + w * WORDS_PER_PASS;
          const RowWord* row_smem = tile_smem[EVERY_WORD_EXISTS ? word : min(word, WORDS - 1)];
#pragma unroll
          for (int i = 0; i < OUTPUTS; i++) {
            const RowWord y = row_smem[members.at[i]];
#pragma unroll
            for (int k = 0; k < ROWS_PER_WORD; k++) {
              const accumulate_t value = to_accumulate(y.row[k]);
              sums[w][k][i] += WITH_GAINS ? member_gains.at[i] * value : value;
            }
          }
        }
      }
    }

    // ---- write rows below end ----
    element_t* item_out = out + (ROWS_FROM_BLOCK ? item / C : launch_item) * static_cast<long long>(rows) * R_PADDED;
    const int tile_rows = first_word < WORDS_PER_PASS ? min(ROW_TILE, end - begin) : 0;  // none for a spare thread
#pragma unroll
    for (int w = 0; w < WORDS_PER_THREAD; w++) {
#pragma unroll
      for (int k = 0; k < ROWS_PER_WORD; k++) {
        const int row = (first_word + w * WORDS_PER_PASS) * ROWS_PER_WORD + k;
        Elements<OUTPUTS> result;
#pragma unroll
        for (int i = 0; i < OUTPUTS; i++) result.at[i] = to_element(sums[w][k][i]);
        if (row < tile_rows) {
          const long long at = static_cast<long long>(begin + row) * R_PADDED + strip * OUTPUTS;
          *reinterpret_cast<Elements<OUTPUTS>*>(item_out + at) = result;
        }
      }
    }
  }
}
