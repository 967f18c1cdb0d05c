// decode.cu - attention of few queries over many keys, 16-bit elements, tensor cores of sm_80 and up.
//
//   S_nm = scale * (q_n . mean_c + (q_n Z_c) . s_m)   where block c of the keys is finished     docs/math.md (eq. 27)
//   S_nm = scale * q_n . k_m                          where it is not, and for plain keys
//   O = softmax(S) V                                                                            docs/math.md (eq. 10)
//
// s_m are the R numbers that a cache keeps of a finished key, Z_c and mean_c what its block shares. Without MAPPED all
// keys are plain, and with PAGED they and the values lie in pages: key m of sequence b is row m % S of page
// page_table[b, m / S]. With both a page is a block: s_m, Z_c and mean_c of a finished one lie where its number says, and
// the keys of another, a sequence's last, in place tail_of[page] of K.                        docs/math.md (eq. 30)
//
// With pages the host knows no lengths: it cuts the keys that would fill all pages, and splits behind the end of a
// sequence find nothing. Every row looks its page up, one of eight in 32 bytes that stay in L1; with MAPPED each tile does,
// for none leaves its block.
//
// The queries of all heads that share a key head are the rows of one tile, so keys and values are read once. The keys of
// a head are cut into splits, one thread block each; merge_splits.cu adds up what they write.
//
// Bytes, which are what this kernel waits for: 2 (R + E) a finished key and 2 (R + 1) D a block, with L keys a block
//   2 (R + E + (R + 1) D / L)     a key, where plain keys take     2 (D + E)
// D = E = 128, R = 64: 514 at L = 128, 416 at L = 512, 400 at L = 1024, of 512. A tile of 64 keys is 24 KB, 1800 cycles of
// an H100's multiprocessor at its part of 3 TB/s; its 96 products m16n8k16 for each 16 rows take 150 of them, and the
// way through shared memory 400.
//
// Reference : reference/grouped_keys.py
// Launcher  : distrattn_np/backends/cupy_decode.py      Tests : tests/agreement/test_gpu_decode.py
//
// Grid      : B * H_kv * splits * row_tiles, row tiles fastest; row_tiles = ceil_div(N * H / H_kv, ROW_TILE)
// Block     : NUM_WARPS * 32 threads: ROW_WARPS warps own 16 rows each, and as many more their part of a tile's keys
// Shared    : SHARED_BYTES below, dynamic: queries as they are and mapped, and a ring of STAGES buffers, each for a tile
//             of keys and values or some rows of a map; rows are padded by 16 bytes, an odd number of 16-byte units, so
//             that the eight rows of an ldmatrix fall into different banks
// Assumes   : s, maps and partial results are contiguous but for the first axis and aligned to 16 bytes. ALIGNED:
//             pointers and strides of Q, K and V are multiples of 16 bytes, D and E of 8 elements. scale_log2 > 0: the
//             sign of the scale stands apart. Sums are float32.
// A query that sees no key: O = 0, lse = -inf. Entries of the table that no key needs are not read.
// Alone     : nvcc -cubin -arch=sm_80 raw_kernels/decode.cu

// ---- parameters: the launcher sets these with -D; the defaults let the file compile alone ----
#ifndef D
#define D 128  // width of a row of Q and K
#endif
#ifndef R
#define R 64  // numbers kept of a finished key; unused without MAPPED
#endif
#ifndef E
#define E 128  // width of a row of V
#endif
#ifndef MAPPED
#define MAPPED 1
#endif
#ifndef PAGED
#define PAGED 0
#endif
#ifndef ALIGNED
#define ALIGNED 1
#endif
#ifndef ROW_WARPS
#define ROW_WARPS 1
#endif
#ifndef NUM_WARPS
#define NUM_WARPS 4
#endif
#ifndef BLOCK_KV
#define BLOCK_KV 64
#endif
#ifndef STAGES
#define STAGES 3
#endif

#include "operands.cuh"

constexpr int NUM_THREADS = NUM_WARPS * WARP_SIZE;
constexpr int MMA_M = 16, MMA_N = 8, MMA_K = 16;
constexpr int CHUNK = 8;  // elements in a 16-byte copy
constexpr int ROW_TILE = ROW_WARPS * MMA_M;
constexpr int KEY_WARPS = NUM_WARPS / ROW_WARPS;
static_assert(ELEMENT == FLOAT16 || ELEMENT == BFLOAT16, "tensor cores take 16-bit elements");
static_assert(D >= 1 && D <= 256 && E >= 1 && E <= 256 && R >= 1 && R <= D, "rows have 1 to 256 elements");
static_assert(NUM_WARPS % ROW_WARPS == 0, "each tile of rows has as many warps");
static_assert(BLOCK_KV % (MMA_K * KEY_WARPS) == 0, "each warp owns whole 16-key tiles");
static_assert(STAGES >= 2, "one buffer is filled while another is read");
static_assert(!ALIGNED || (D % CHUNK == 0 && E % CHUNK == 0), "ALIGNED rows are whole 16-byte chunks");

constexpr int D_PADDED = (D + 15) / 16 * 16, R_PADDED = (R + 15) / 16 * 16, E_PADDED = (E + 15) / 16 * 16;
constexpr int D_STRIDE = D_PADDED + CHUNK, R_STRIDE = R_PADDED + CHUNK, E_STRIDE = E_PADDED + CHUNK;
constexpr int E_TILES = E_PADDED / MMA_N;
constexpr int larger(int a, int b) { return a > b ? a : b; }

// A buffer of the ring holds BLOCK_KV finished keys or, with MAPPED, as many plain ones or rows of a map as fit.
constexpr int MAP_ROWS = R_PADDED + 16;  // Z transposed, the mean, and rows that are there for ldmatrix alone
constexpr int PLAIN_ROW = D_STRIDE + E_STRIDE;
constexpr int STAGE_ELEMENTS =
    MAPPED ? larger(BLOCK_KV * (R_STRIDE + E_STRIDE), MMA_K * PLAIN_ROW) : BLOCK_KV * PLAIN_ROW;
constexpr int whole_tiles(int rows, int step) { return rows < step ? rows / 16 * 16 : rows / step * step; }
constexpr int FITTING_KEYS = STAGE_ELEMENTS / PLAIN_ROW;
constexpr int PLAIN_KV = FITTING_KEYS < BLOCK_KV ? whole_tiles(FITTING_KEYS, MMA_K * KEY_WARPS) : BLOCK_KV;
constexpr int FITTING_MAP_ROWS = STAGE_ELEMENTS / D_STRIDE / 16 * 16;
constexpr int MAP_CHUNK = FITTING_MAP_ROWS < MAP_ROWS ? FITTING_MAP_ROWS : MAP_ROWS;  // rows of a map in a buffer

constexpr int RAW_Q_ELEMENTS = ROW_TILE * D_STRIDE;
constexpr int Q_ELEMENTS = MAPPED ? ROW_TILE * R_STRIDE : 0;
constexpr int SHARED_BYTES = (RAW_Q_ELEMENTS + Q_ELEMENTS + STAGES * STAGE_ELEMENTS) * 2;
static_assert(SHARED_BYTES <= 227 * 1024, "more shared memory than any device gives a block");
#ifdef LAUNCH_SHARED_BYTES
static_assert(LAUNCH_SHARED_BYTES == SHARED_BYTES, "tiles.py and this file disagree on the shared memory");
#endif
// At the end the ring holds the sums of all warps.
constexpr int SUM_STRIDE = E_PADDED + 4;
static_assert(NUM_WARPS * MMA_M * SUM_STRIDE * 4 <= STAGES * STAGE_ELEMENTS * 2, "the sums fit the ring");

// The maximum may lag behind by this much (log2 units) before sums are rescaled: P stays below 2^8, far from overflow.
constexpr float RESCALE_THRESHOLD = 8.0f;
constexpr float LN_2 = 0.6931471805599453f;
constexpr float LOWEST = -3.402823466e38f;  // maximum of no scores: finite, so that its difference to -inf is -inf

// What a buffer of the ring holds.
enum Kind { NOTHING, MAP, FINISHED, PLAIN };
struct Item {
  Kind kind;
  int block;       // of the map
  int begin, end;  // keys, or rows of the map
};

// Walks through the keys of a split: the map of a block comes before its first tile; tiles do not straddle blocks.
struct Cursor {
  int key, end, finished_end, block, block_size, map_row;

  __device__ __forceinline__ Item next() {
    if (key >= end) return {NOTHING, 0, 0, 0};
    const int begin = key;
    if (MAPPED && key < finished_end) {
      if (map_row < MAP_ROWS) {
        const int first = map_row;
        map_row += MAP_CHUNK;
        return {MAP, block, first, min(map_row, MAP_ROWS)};
      }
      const int block_end = (block + 1) * block_size;
      key = min(min(key + BLOCK_KV, end), block_end);
      if (key == block_end) block += 1, map_row = 0;
      return {FINISHED, 0, begin, key};
    }
    key = min(key + PLAIN_KV, end);
    return {PLAIN, 0, begin, key};
  }
};

// The pages of a sequence, seen from a tile of it.
struct Pages {
  const int* table;
  long long stride;  // of pages, in elements
  int shift;         // log2 of the rows of a page
  int first;         // row of the tile

  __device__ __forceinline__ long long offset(int row, long long row_stride) const {
    const int m = first + row;
    return table[m >> shift] * stride + (m & ((1 << shift) - 1)) * row_stride;
  }
};

// Copies rows [ROW_COUNT, COLUMNS] to shared memory; rows from `rows_valid` on and columns from VALID_COLUMNS are zero.
// IN_PAGES: each row is where `pages` says, from `global` on.
template <int ROW_COUNT, int COLUMNS, int VALID_COLUMNS, int SHARED_STRIDE, bool IN_CHUNKS, bool IN_PAGES = false>
__device__ __forceinline__ void load_rows(element_t* shared, const element_t* global, long long stride, int rows_valid,
                                          const Pages& pages = {}) {
  if (IN_CHUNKS) {  // a thread keeps its columns while it walks down the rows: few registers, and no divisions
    constexpr int CHUNKS = COLUMNS / CHUNK, ROWS_AT_ONCE = NUM_THREADS / CHUNKS;
    const int thread = thread_index_anew(), column = thread % CHUNKS * CHUNK;
    if (NUM_THREADS % CHUNKS != 0 && thread >= ROWS_AT_ONCE * CHUNKS) return;
    if (column >= VALID_COLUMNS) rows_valid = 0;
    const element_t* source = global + thread / CHUNKS * stride + column;
    shared += thread / CHUNKS * SHARED_STRIDE + column;
#pragma unroll 4
    for (int row = thread / CHUNKS; row < ROW_COUNT; row += ROWS_AT_ONCE) {
      const bool is_valid = row < rows_valid;
      if (IN_PAGES && is_valid) source = global + pages.offset(row, stride) + column;
      copy_async_or_zero(shared, is_valid ? source : global, is_valid);
      if (!IN_PAGES) source += ROWS_AT_ONCE * stride;
      shared += ROWS_AT_ONCE * SHARED_STRIDE;
    }
  } else {
    for (int i = threadIdx.x; i < ROW_COUNT * COLUMNS; i += NUM_THREADS) {
      const int row = i / COLUMNS, column = i % COLUMNS;
      const bool is_valid = row < rows_valid && column < VALID_COLUMNS;
      const auto offset = [&] { return IN_PAGES ? pages.offset(row, stride) : row * stride; };
      shared[row * SHARED_STRIDE + column] = is_valid ? global[offset() + column] : element_t(0);
    }
  }
}

// Where a lane's part of ldmatrix rows lies, in elements: A and transposed B walk 16 rows x two 8-column halves, B 8
// rows x two halves x 2.
__device__ __forceinline__ int left_offset(int lane, int stride) { return lane % 16 * stride + lane / 16 * 8; }
__device__ __forceinline__ int right_offset(int lane, int stride) {
  return (lane % 8 + lane / 16 * 8) * stride + lane / 8 % 2 * 8;
}

// Of the two rows that a lane holds accumulators of: 16 rows of a warp, `group` and `group` + 8.
struct Rows {
  int key_end[2];          // past the last key that the row sees
  float row_max[2];        // of the scores before scale_log2; may lag
  float row_sum[2];        // this lane's part
  float O_rmem[E_TILES][4];
};

// Adds a tile of keys and values in shared memory: row_max, row_sum and O of eq. 10 for this warp's share of the keys.
template <int WIDTH, int TILE_KV>
__device__ __forceinline__ void attend_tile(Rows& rows, const element_t* Q_smem, const element_t* K_smem,
                                            const float (&mean_scores)[2], const Item& tile, int key_warp, int lane,
                                            float sign, float scale_log2) {
  constexpr int STRIDE = WIDTH + CHUNK;
  constexpr int WARP_KV = (TILE_KV + 16 * KEY_WARPS - 1) / (16 * KEY_WARPS) * 16;
  constexpr int KV_TILES = WARP_KV / MMA_N;
  const int first = key_warp * WARP_KV;  // of the tile's keys
  if (tile.begin + first >= tile.end) return;

  // ---- S = Q K^T  [16, WARP_KV] ----
  float S_rmem[KV_TILES][4] = {};
  const unsigned Q_address = shared_address(Q_smem + left_offset(lane, STRIDE));
  const unsigned K_address = shared_address(K_smem + first * STRIDE + right_offset(lane, STRIDE));
#pragma unroll 4
  for (int d = 0; d < WIDTH; d += MMA_K) {
    unsigned Q_rmem[4];
    load_matrices(Q_rmem, Q_address + d * 2);
#pragma unroll
    for (int j = 0; j < KV_TILES; j += 2) {
      unsigned K_rmem[4];
      load_matrices(K_rmem, K_address + (j * MMA_N * STRIDE + d) * 2);
      multiply_add(S_rmem[j], Q_rmem, K_rmem[0], K_rmem[1]);
      multiply_add(S_rmem[j + 1], Q_rmem, K_rmem[2], K_rmem[3]);
    }
  }

  // ---- the scores with their sign and the part of the mean; minus infinity for keys that a row does not see ----
  float tile_max[2] = {minus_infinity(), minus_infinity()};
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int end = min(tile.end, rows.key_end[i]);
#pragma unroll
    for (int j = 0; j < 2 * KV_TILES; ++j) {
      const int key = tile.begin + first + j / 2 * MMA_N + lane % 4 * 2 + j % 2;
      float& score = S_rmem[j / 2][2 * i + j % 2];
      score = key < end ? fmaf(sign, score, mean_scores[i]) : minus_infinity();
      tile_max[i] = fmaxf(tile_max[i], score);
    }
  }

  // ---- running maximum (eq. 10): rescale the sums only where it grew beyond the threshold ----
  const bool has_grown = (tile_max[0] - rows.row_max[0]) * scale_log2 > RESCALE_THRESHOLD ||
                         (tile_max[1] - rows.row_max[1]) * scale_log2 > RESCALE_THRESHOLD;
  if (__any_sync(~0u, has_grown)) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float new_max = fmaxf(tile_max[i], __shfl_xor_sync(~0u, tile_max[i], 1));
      new_max = fmaxf(new_max, __shfl_xor_sync(~0u, new_max, 2));
      new_max = fmaxf(new_max, rows.row_max[i]);
      const float rescale = exp2_approximate((rows.row_max[i] - new_max) * scale_log2);
      rows.row_max[i] = new_max;
      rows.row_sum[i] *= rescale;
#pragma unroll
      for (int j = 0; j < E_TILES; ++j) {
        rows.O_rmem[j][2 * i] *= rescale;
        rows.O_rmem[j][2 * i + 1] *= rescale;
      }
    }
  }

  // ---- P = exp(S - row_max), O += P V  [16, E], sixteen keys at a time ----
  const unsigned V_address = shared_address(K_smem + TILE_KV * STRIDE + first * E_STRIDE + left_offset(lane, E_STRIDE));
#pragma unroll
  for (int k = 0; k < WARP_KV / MMA_K; ++k) {
    unsigned P_rmem[4];
#pragma unroll
    for (int part = 0; part < 4; ++part) {  // row part % 2 of accumulator tile 2 k + part / 2
      const float* const pair = S_rmem[2 * k + part / 2] + part % 2 * 2;
      const float low = exp2_approximate((pair[0] - rows.row_max[part % 2]) * scale_log2);
      const float high = exp2_approximate((pair[1] - rows.row_max[part % 2]) * scale_log2);
      rows.row_sum[part % 2] += low + high;
      P_rmem[part] = pack(low, high);
    }
#pragma unroll
    for (int j = 0; j < E_TILES; j += 2) {
      unsigned V_rmem[4];
      load_matrices_transposed(V_rmem, V_address + (k * MMA_K * E_STRIDE + j * MMA_N) * 2);
      multiply_add(rows.O_rmem[j], P_rmem, V_rmem[0], V_rmem[1]);
      multiply_add(rows.O_rmem[j + 1], P_rmem, V_rmem[2], V_rmem[3]);
    }
  }
}

#if MAPPED
// Writes this warp's part of Q Z  [16, R] and, where the mean is among the rows of the map, sign * Q mean.
__device__ __forceinline__ void map_queries(element_t* Q_smem, float* mean_scores, const element_t* raw_Q_smem,
                                            const element_t* map_smem, const Item& map, int key_warp, int lane,
                                            float sign) {
  const unsigned Q_address = shared_address(raw_Q_smem + left_offset(lane, D_STRIDE));
#pragma unroll 1
  for (int row = key_warp * 16; row < map.end - map.begin; row += KEY_WARPS * 16) {
    const unsigned map_address = shared_address(map_smem + row * D_STRIDE + right_offset(lane, D_STRIDE));
    float sums[2][4] = {};
#pragma unroll 4
    for (int d = 0; d < D_PADDED; d += MMA_K) {
      unsigned Q_rmem[4], map_rmem[4];
      load_matrices(Q_rmem, Q_address + d * 2);
      load_matrices(map_rmem, map_address + d * 2);
      multiply_add(sums[0], Q_rmem, map_rmem[0], map_rmem[1]);
      multiply_add(sums[1], Q_rmem, map_rmem[2], map_rmem[3]);
    }
    const int column = map.begin + row;
    if (column < R_PADDED) {
#pragma unroll
      for (int i = 0; i < 4; ++i)  // row half i % 2, columns half i / 2
        *reinterpret_cast<unsigned*>(Q_smem + (lane / 4 + i % 2 * 8) * R_STRIDE + column + i / 2 * 8 + lane % 4 * 2) =
            pack(limit_to_element(sums[i / 2][i % 2 * 2]), limit_to_element(sums[i / 2][i % 2 * 2 + 1]));
    } else if (lane % 4 == 0) {  // of this tile only the first column is real
      mean_scores[lane / 4] = sign * sums[0][0];
      mean_scores[lane / 4 + 8] = sign * sums[0][2];
    }
  }
}
#endif

extern "C" __global__ __launch_bounds__(NUM_THREADS, 2)
void decode(const element_t* __restrict__ Q,         // [B, H, N, D]
            const element_t* __restrict__ finished,  // [B * H_kv, at least finished_end, R_PADDED], unused if not MAPPED
            const element_t* __restrict__ maps,      // [B * H_kv, blocks, R_PADDED + 1, D_PADDED], unused if not MAPPED
                                                     // with PAGED of each page and head: [P * H_kv, S or R_PADDED + 1, ...]
            const element_t* __restrict__ K,         // [B, H_kv, M - finished_end, D], keys as they are; or pages of S keys
            const element_t* __restrict__ V,         // [B, H_kv, M, E]; or pages
            element_t* __restrict__ O,               // [B, H, N, E], written if splits == 1
            float* __restrict__ lse,                 // [B, H, N], written if splits == 1
            float* __restrict__ partial_O,           // [splits, B, H, N, E_PADDED], not divided by the sums
            float* __restrict__ partial_stats,       // [splits, B, H, N, 2], maxima before scale_log2, and sums
            int H, int heads_per_kv_head, int N,
            int M,                                   // with PAGED the most that a sequence has room for
            int finished_end, int block_size,
            int splits, int keys_per_split,
            int causal_offset,                       // query n sees m <= n + causal_offset; M and more: all
            float sign, float scale_log2,            // |scale| * log2(e); sign 0 and 1 where the scale is 0
            long long stride_finished,               // of the first axis, in elements as all below
            long long stride_maps,
            long long stride_q_b, long long stride_q_h, long long stride_q_n,
            long long stride_k_b, long long stride_k_h, long long stride_k_m,
            long long stride_v_b, long long stride_v_h, long long stride_v_m,
            long long stride_o_b, long long stride_o_h, long long stride_o_n
#if PAGED
            , const int* __restrict__ page_table,    // [B, pages of a sequence]
            const int* __restrict__ seqlens_k,       // [B]
            long long stride_table,                  // of sequences
            int page_shift,                          // log2 of S
            int counts_from_end                      // 1: causal_offset is one more for each key of the sequence
#if MAPPED
            , const int* __restrict__ tail_of        // [P], among the places of K; -1 of a finished page
#endif
#endif
            ) {
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  element_t* const raw_Q_smem = reinterpret_cast<element_t*>(shared_bytes);  // [ROW_TILE, D_STRIDE]
  element_t* const Q_smem = raw_Q_smem + RAW_Q_ELEMENTS;                     // [ROW_TILE, R_STRIDE], with MAPPED
  element_t* const ring_smem = Q_smem + Q_ELEMENTS;                          // STAGES x STAGE_ELEMENTS
  __shared__ float mean_scores_smem[ROW_TILE];
  __shared__ float stats_smem[2][NUM_WARPS * MMA_M];  // maxima and sums of the rows, [KEY_WARPS, ROW_TILE]

  // ---- which rows and which keys this block owns; row p is query p / heads_per_kv_head of head p % heads_per_kv_head ----
  const int row_count = N * heads_per_kv_head, row_tiles = (row_count + ROW_TILE - 1) / ROW_TILE;
  const int first_row = blockIdx.x % row_tiles * ROW_TILE;
  const int split = blockIdx.x / row_tiles % splits;
  const int head = blockIdx.x / row_tiles / splits;  // b * H_kv + h_kv
  const int H_kv = H / heads_per_kv_head, b = head / H_kv, h_kv = head % H_kv;
#if PAGED
  const int keys = min(max(seqlens_k[b], 0), M);
  const long long last_offset = causal_offset + (counts_from_end ? static_cast<long long>(keys) : 0);
#if MAPPED
  const int* const table = page_table + b * stride_table;
  const int last_page = max(keys - 1, 0) >> page_shift;
  const int place = keys == 0 ? 0 : tail_of[table[last_page]];
  finished_end = place < 0 ? keys : last_page << page_shift;
#else
  Pages pages = {page_table + b * stride_table, stride_k_b, page_shift, 0};
#endif
#else
  const int keys = M;
  const long long last_offset = causal_offset;
#endif
  auto visible_end = [&](int p) {
    return static_cast<int>(max(0LL, min(static_cast<long long>(keys), p / heads_per_kv_head + 1LL + last_offset)));
  };
  const int last_row = min(first_row + ROW_TILE, row_count) - 1;
  const int begin = static_cast<int>(min(static_cast<long long>(split) * keys_per_split, static_cast<long long>(keys)));
  const int end = min(begin + min(keys_per_split, keys - begin), visible_end(last_row));

  // ---- the copies ----
  const element_t* const K_head = K + (PAGED ? 0 : b * stride_k_b) + h_kv * stride_k_h;
  const element_t* const V_head = V + (PAGED ? 0 : b * stride_v_b) + h_kv * stride_v_h;
#if MAPPED && PAGED
  auto row_of = [&](const Item& item) { return item.begin & (block_size - 1); };
  auto page_of = [&](const Item& item) -> long long {
    return table[item.kind == MAP ? item.block : item.begin >> page_shift];
  };
  auto map_rows = [&](const Item& item) {
    return maps + (page_of(item) * H_kv + h_kv) * stride_maps + item.begin * D_PADDED;
  };
  auto finished_rows = [&](const Item& item) {
    return finished + (page_of(item) * H_kv + h_kv) * stride_finished + row_of(item) * R_PADDED;
  };
  auto K_rows = [&](const Item& item) { return K_head + place * stride_k_b + row_of(item) * stride_k_m; };
  auto V_rows = [&](const Item& item) { return V_head + page_of(item) * stride_v_b + row_of(item) * stride_v_m; };
#else
  const element_t* const finished_head = finished + head * stride_finished;
  const element_t* const maps_head = maps + head * stride_maps;
  auto map_rows = [&](const Item& item) {
    return maps_head + (static_cast<long long>(item.block) * (R_PADDED + 1) + item.begin) * D_PADDED;
  };
  auto finished_rows = [&](const Item& item) { return finished_head + static_cast<long long>(item.begin) * R_PADDED; };
  auto K_rows = [&](const Item& item) { return K_head + (item.begin - finished_end) * stride_k_m; };
  auto V_rows = [&](const Item& item) { return V_head + item.begin * stride_v_m; };
#endif
  auto load = [&](const Item& item, element_t* stage) {
    if (item.kind == NOTHING) return;
    const int rows_valid = item.end - item.begin;
#if MAPPED
    if (item.kind == MAP) {  // past the mean there is nothing to read
      load_rows<MAP_CHUNK, D_PADDED, D_PADDED, D_STRIDE, true>(stage, map_rows(item), D_PADDED,
                                                               min(rows_valid, R_PADDED + 1 - item.begin));
      return;
    }
    if (item.kind == FINISHED) {
      load_rows<BLOCK_KV, R_PADDED, R_PADDED, R_STRIDE, true>(stage, finished_rows(item), R_PADDED, rows_valid);
      load_rows<BLOCK_KV, E_PADDED, E, E_STRIDE, ALIGNED>(stage + BLOCK_KV * R_STRIDE, V_rows(item), stride_v_m,
                                                          rows_valid);
      return;
    }
#endif
#if PAGED && !MAPPED
    pages.first = item.begin;
    pages.stride = stride_k_b;
    load_rows<PLAIN_KV, D_PADDED, D, D_STRIDE, ALIGNED, true>(stage, K_head, stride_k_m, rows_valid, pages);
    pages.stride = stride_v_b;
    load_rows<PLAIN_KV, E_PADDED, E, E_STRIDE, ALIGNED, true>(stage + PLAIN_KV * D_STRIDE, V_head, stride_v_m,
                                                              rows_valid, pages);
#else
    load_rows<PLAIN_KV, D_PADDED, D, D_STRIDE, ALIGNED>(stage, K_rows(item), stride_k_m, rows_valid);
    load_rows<PLAIN_KV, E_PADDED, E, E_STRIDE, ALIGNED>(stage + PLAIN_KV * D_STRIDE, V_rows(item), stride_v_m,
                                                        rows_valid);
#endif
  };

  // ---- load the queries [ROW_TILE, D] and what comes first ----
#pragma unroll 1
  for (int i = threadIdx.x; i < ROW_TILE * (D_PADDED / CHUNK); i += NUM_THREADS) {
    const int row = i / (D_PADDED / CHUNK), d = i % (D_PADDED / CHUNK) * CHUNK, p = first_row + row;
    const element_t* const q = Q + b * stride_q_b + (h_kv * heads_per_kv_head + p % heads_per_kv_head) * stride_q_h +
                               p / heads_per_kv_head * stride_q_n + d;
    element_t* const q_smem = raw_Q_smem + row * D_STRIDE + d;
#if ALIGNED
    const bool is_valid = p < row_count && d < D;
    copy_async_or_zero(q_smem, is_valid ? q : Q, is_valid);
#else
    for (int j = 0; j < CHUNK; ++j) q_smem[j] = p < row_count && d + j < D ? q[j] : element_t(0);
#endif
  }
  const int first_block = MAPPED ? begin / block_size : 0;
  Cursor loading = {begin, end, finished_end, first_block, block_size, 0};
  Cursor attending = loading;
#pragma unroll 1
  for (int stage = 0; stage < STAGES - 1; ++stage) {
    load(loading.next(), ring_smem + stage * STAGE_ELEMENTS);
    copy_async_commit();
  }

  const int warp = threadIdx.x / WARP_SIZE, lane = threadIdx.x % WARP_SIZE;
  const int row_warp = warp % ROW_WARPS, key_warp = warp / ROW_WARPS, group = lane / 4;
  const element_t* const warp_raw_Q_smem = raw_Q_smem + row_warp * MMA_M * D_STRIDE;
  element_t* const warp_Q_smem = Q_smem + row_warp * MMA_M * R_STRIDE;
  float* const warp_mean_scores = mean_scores_smem + row_warp * MMA_M;
  Rows rows;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    rows.key_end[i] = visible_end(first_row + row_warp * MMA_M + group + 8 * i);
    rows.row_max[i] = LOWEST;
    rows.row_sum[i] = 0.0f;
  }
#pragma unroll
  for (int j = 0; j < E_TILES; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i) rows.O_rmem[j][i] = 0.0f;

  int stage = 0, free_stage = STAGES - 1;
#pragma unroll 1
  for (;;) {
    const Item item = attending.next();
    if (item.kind == NOTHING) break;
    copy_async_wait_all_but<STAGES - 2>();
    __syncthreads();  // this buffer has arrived for all threads; no warp still reads the one that is filled next, nor Q Z
    load(loading.next(), ring_smem + free_stage * STAGE_ELEMENTS);
    copy_async_commit();
    const element_t* const stage_smem = ring_smem + stage * STAGE_ELEMENTS;
    free_stage = stage;
    stage = stage + 1 == STAGES ? 0 : stage + 1;
#if MAPPED
    if (item.kind == MAP) {  // the barrier before the next item makes Q Z known to all warps
      map_queries(warp_Q_smem, warp_mean_scores, warp_raw_Q_smem, stage_smem, item, key_warp, lane, sign);
      continue;
    }
    if (item.kind == FINISHED) {
      const float mean_scores[2] = {warp_mean_scores[group], warp_mean_scores[group + 8]};
      attend_tile<R_PADDED, BLOCK_KV>(rows, warp_Q_smem, stage_smem, mean_scores, item, key_warp, lane, sign, scale_log2);
      continue;
    }
#endif
    const float no_mean_scores[2] = {0.0f, 0.0f};
    attend_tile<D_PADDED, PLAIN_KV>(rows, warp_raw_Q_smem, stage_smem, no_mean_scores, item, key_warp, lane, sign,
                                    scale_log2);
  }

  // ---- every warp's sums of its keys, by way of shared memory: O [KEY_WARPS, ROW_TILE, E] ----
  float* const sums_smem = reinterpret_cast<float*>(ring_smem);
  const int tile_row = row_warp * MMA_M + group;
  __syncthreads();  // no warp still reads the ring
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float sum = rows.row_sum[i] + __shfl_xor_sync(~0u, rows.row_sum[i], 1);
    sum += __shfl_xor_sync(~0u, sum, 2);
    const int place = key_warp * ROW_TILE + tile_row + 8 * i;
    if (lane % 4 == 0) stats_smem[0][place] = rows.row_max[i], stats_smem[1][place] = sum;
#pragma unroll
    for (int j = 0; j < E_TILES; ++j)
      *reinterpret_cast<float2*>(sums_smem + place * SUM_STRIDE + j * MMA_N + lane % 4 * 2) =
          make_float2(rows.O_rmem[j][2 * i], rows.O_rmem[j][2 * i + 1]);
  }
  __syncthreads();  // the sums and maxima of all warps are there

  // ---- O / row_sum and lse, or this split's part of them ----
#pragma unroll 1
  for (int i = threadIdx.x; i < ROW_TILE * E_PADDED; i += NUM_THREADS) {
    const int row = i / E_PADDED, e = i % E_PADDED, p = first_row + row;
    if (p >= row_count) break;
    float row_max = stats_smem[0][row];
#pragma unroll
    for (int w = 1; w < KEY_WARPS; ++w) row_max = fmaxf(row_max, stats_smem[0][w * ROW_TILE + row]);
    float sum = 0.0f, output = 0.0f;
#pragma unroll
    for (int w = 0; w < KEY_WARPS; ++w) {
      const float weight = exp2_approximate((stats_smem[0][w * ROW_TILE + row] - row_max) * scale_log2);
      sum = fmaf(weight, stats_smem[1][w * ROW_TILE + row], sum);
      output = fmaf(weight, sums_smem[(w * ROW_TILE + row) * SUM_STRIDE + e], output);
    }
    const int n = p / heads_per_kv_head, h = h_kv * heads_per_kv_head + p % heads_per_kv_head;
    const long long out_row = (static_cast<long long>(b) * H + h) * N + n;
    if (splits == 1) {
      if (e < E) O[b * stride_o_b + h * stride_o_h + n * stride_o_n + e] = to_element(sum == 0.0f ? 0.0f : output / sum);
      if (e == 0) lse[out_row] = sum == 0.0f ? minus_infinity() : LN_2 * (row_max * scale_log2 + log2f(sum));
    } else {
      const long long place = split * (static_cast<long long>(gridDim.x) / (row_tiles * splits) / H_kv * H * N) + out_row;
      partial_O[place * E_PADDED + e] = output;
      if (e == 0) partial_stats[2 * place] = row_max, partial_stats[2 * place + 1] = sum;
    }
  }
}
