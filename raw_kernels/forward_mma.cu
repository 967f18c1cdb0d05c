// forward_mma.cu - attention for 16-bit elements on tensor cores, sm_80 and up, with keys of reduced width.
//
//   S = scale * (X W) (Y Z)^T,   O = softmax(S) V                              docs/math.md (eq. 2, 4 and 10)
//
// Reference : reference/distr_attention.py      Numba : distrattn_np/numba_kernels/forward.py
// Launcher  : distrattn_np/backends/cupy_backend.py      Tests : tests/agreement/test_gpu_forward.py
//
// K holds what stands on the key side of eq. 4: the keys themselves (exact attention), keys fused for one block of
// queries (KEYS_PER_ITEM), or sampled keys. QUERY_MAP says how a query tile becomes the other side: as it is, sampled
// once, or anew for every block of keys: fused, or multiplied with a dense map. With OWN_BLOCK (eq. 20), a query and
// the keys of its own block are multiplied as they are; a tile's other keys come first. Scores then pass through what
// score_options.cuh switches on; tiles of keys that the window or the mask hides from the whole tile of queries are
// left out, and a warp leaves out the products of those that the mask hides from all of its rows.
//
// Grid      : (query tiles of a block * items); an item is a (batch, head, query block), see work_item.cuh
// Block     : NUM_WARPS * 32 threads; a warp owns WARP_Q query rows from the scores to the output
// Shared    : SHARED_BYTES below, dynamic: Q (and the unmapped Q) plus two stages of K and V; rows are padded by 16
//             bytes, an odd number of 16-byte units, so that the eight rows of an ldmatrix fall into different banks
// Assumes   : scale > 0. ALIGNED: pointers and strides of Q, K, V, O are multiples of 16 bytes, D and E of 8 elements
// Query n sees keys n + window_offset <= m <= n + causal_offset, limits that are read only where WINDOW and CAUSAL. One
// that sees no key: O = 0, lse = -inf. lse is that of the keys that K was made from, which are centred where QUERY_MAP
// is 3; with OWN_BLOCK, or where CENTRED gives the scores back what that took, of the keys as they are.
// Alone     : nvcc -cubin -arch=sm_80 raw_kernels/forward_mma.cu

// ---- parameters: the launcher sets these with -D; the defaults let the file compile alone ----
#ifndef D
#define D 128  // width of a row of Q
#endif
#ifndef K_COLUMNS
#define K_COLUMNS 128  // columns of K that are there to be read
#endif
#ifndef R
#define R 128  // inner width; the kernel pads it to a multiple of 16
#endif
#ifndef E
#define E 128  // width of a row of V
#endif
#ifndef QUERY_MAP
#define QUERY_MAP 0  // 0: queries as they are, 1: sampled, 2: fused for each block of keys, 3: the same by a dense map
#endif
#ifndef GROUP_SIZE
#define GROUP_SIZE 1
#endif
#ifndef WITH_GAINS
#define WITH_GAINS 0
#endif
#ifndef KEYS_PER_ITEM
#define KEYS_PER_ITEM 0  // 1: K is [items of this launch, M, K_COLUMNS]
#endif
#ifndef CAUSAL
#define CAUSAL 0
#endif
#ifndef OWN_BLOCK
#define OWN_BLOCK 0
#endif
#ifndef CENTRED
#define CENTRED 0  // 1: K's keys were centred, which cap and bias must not see; with score options only
#endif
#ifndef ALIGNED
#define ALIGNED 1
#endif
#ifndef BLOCK_Q
#define BLOCK_Q 128
#endif
#ifndef BLOCK_KV
#define BLOCK_KV 32
#endif
#ifndef NUM_WARPS
#define NUM_WARPS 4
#endif

#include "operands.cuh"
#include "score_options.cuh"
#include "work_item.cuh"

constexpr int NUM_THREADS = NUM_WARPS * WARP_SIZE;
constexpr int MMA_M = 16, MMA_N = 8, MMA_K = 16;
constexpr int CHUNK = 8;  // elements in a 16-byte copy
constexpr int R_PADDED = (R + MMA_K - 1) / MMA_K * MMA_K;
constexpr int E_PADDED = (E + 15) / 16 * 16;
constexpr int WARP_Q = BLOCK_Q / NUM_WARPS;
constexpr int M_TILES = WARP_Q / MMA_M;
constexpr int KV_TILES = BLOCK_KV / MMA_N;
constexpr int E_TILES = E_PADDED / MMA_N;
constexpr int ROWS = 2 * M_TILES;  // query rows that a lane holds accumulators of
static_assert(ELEMENT == FLOAT16 || ELEMENT == BFLOAT16, "tensor cores take 16-bit elements");
static_assert(BLOCK_Q % (NUM_WARPS * MMA_M) == 0, "each warp owns whole 16-row tiles of queries");
static_assert(BLOCK_KV % MMA_K == 0, "a key tile is a multiple of the product's depth");
static_assert(!ALIGNED || (D % CHUNK == 0 && K_COLUMNS % CHUNK == 0 && E % CHUNK == 0),
              "ALIGNED rows are whole 16-byte chunks");

static_assert(!OWN_BLOCK || (QUERY_MAP == 3 && CAUSAL), "own blocks are of keys, in causal calls with dense maps");
static_assert(!CENTRED || CHANGES_SCORES, "other scores of centred keys stay as they are");
constexpr bool MAPS_FOR_KEY_BLOCKS = QUERY_MAP >= 2;
constexpr int D_PADDED = QUERY_MAP == 3 ? (D + MMA_K - 1) / MMA_K * MMA_K : (D + CHUNK - 1) / CHUNK * CHUNK;
constexpr int D_STRIDE = D_PADDED + CHUNK;
constexpr int R_STRIDE = R_PADDED + CHUNK;
constexpr int E_STRIDE = E_PADDED + CHUNK;
constexpr int K_STRIDE = OWN_BLOCK && D_STRIDE > R_STRIDE ? D_STRIDE : R_STRIDE;  // room for a row of keys
constexpr int RAW_Q_ELEMENTS = QUERY_MAP == 0 ? 0 : BLOCK_Q * D_STRIDE;
constexpr int Q_ELEMENTS = BLOCK_Q * R_STRIDE;
constexpr int STAGE_ELEMENTS = BLOCK_KV * (K_STRIDE + E_STRIDE);
constexpr int SHARED_BYTES = (RAW_Q_ELEMENTS + Q_ELEMENTS + 2 * STAGE_ELEMENTS) * 2;
static_assert(SHARED_BYTES <= 227 * 1024, "more shared memory than any device gives a block");
#ifdef LAUNCH_SHARED_BYTES
static_assert(LAUNCH_SHARED_BYTES == SHARED_BYTES, "tiles.py and this file disagree on the shared memory");
#endif

// Thread blocks of a multiprocessor. With options ptxas spills for occupancy where it is given no number.
constexpr int MIN_BLOCKS = CHANGES_SCORES || WINDOW ? 1 : 0;

// The maximum may lag behind by this much (log2 units) before sums are rescaled: P stays below 2^8, far from overflow.
constexpr float RESCALE_THRESHOLD = 8.0f;
constexpr int MASK_TILES_AHEAD = 8;  // that a tile's mask is asked for before it is read
constexpr float LN_2 = 0.6931471805599453f, LOG2_E = 1.4426950408889634f;
constexpr float LARGEST_OFFSET = 1 << 20;  // of larger ones the product with scale_log2 is too far from exact for exp
#if QUERY_MAP == 3
typedef element_t map_t;
constexpr int MAP_ELEMENTS = R_PADDED * D_PADDED;
#else
typedef int map_t;
constexpr int MAP_ELEMENTS = D;
#endif

constexpr float LOWEST = -3.402823466e38f;  // maximum of no scores: finite, so that its difference to -inf is -inf

// Copies rows [ROW_COUNT, COLUMNS] to shared memory; rows from `rows_valid` on and columns from VALID_COLUMNS are zero.
template <int ROW_COUNT, int COLUMNS, int VALID_COLUMNS, int SHARED_STRIDE>
__device__ inline void load_rows(element_t* shared, const element_t* global, long long stride, int rows_valid) {
#if ALIGNED
  constexpr int CHUNKS = COLUMNS / CHUNK, COPIES = ROW_COUNT * CHUNKS;
  const int thread = thread_index_anew();
#pragma unroll
  for (int first = 0; first < COPIES; first += NUM_THREADS) {
    const int i = first + thread, row = i / CHUNKS, column = i % CHUNKS * CHUNK;
    const bool is_valid = row < rows_valid && column < VALID_COLUMNS;
    if (COPIES - first >= NUM_THREADS || i < COPIES)
      copy_async_or_zero(shared + row * SHARED_STRIDE + column, is_valid ? global + row * stride + column : global,
                         is_valid);
  }
#else
  for (int i = threadIdx.x; i < ROW_COUNT * COLUMNS; i += NUM_THREADS) {
    const int row = i / COLUMNS, column = i % COLUMNS;
    const bool is_valid = row < rows_valid && column < VALID_COLUMNS;
    shared[row * SHARED_STRIDE + column] = is_valid ? global[row * stride + column] : element_t(0);
  }
#endif
}

struct KeyTile {
  int begin, end;  // rows of K and V; end - begin may exceed BLOCK_KV
  int block;       // key block
  bool is_first_of_block;
  bool is_own;  // of the queries' own blocks, with OWN_BLOCK
};

// Keys that a query tile visits: below mapped_end in blocks, and with OWN_BLOCK from own_begin on as they are.
struct KeyRange {
  int mapped_end, own_begin, end;
};

// The tile in which the first key that some query sees lies, of those that `key_tile` counts.
__device__ inline int tile_of_key(int key, int key_block_size, const KeyRange& range) {
  if (!MAPS_FOR_KEY_BLOCKS) return key / BLOCK_KV;
  const int tiles_per_block = (key_block_size + BLOCK_KV - 1) / BLOCK_KV;
  const int mapped_key = min(key, range.mapped_end);
  const int begin = mapped_key / key_block_size * tiles_per_block, rest = mapped_key % key_block_size;
  return begin + (key < range.mapped_end ? rest : rest + BLOCK_KV - 1) / BLOCK_KV;
}

// Key tile t of those a query tile visits; tiles never straddle key blocks. Past the last one, begin is not below end.
__device__ inline KeyTile key_tile(int t, int key_block_size, const KeyRange& range) {
  if (!MAPS_FOR_KEY_BLOCKS) return {t * BLOCK_KV, range.end, 0, t == 0, false};
  const int tiles_per_block = (key_block_size + BLOCK_KV - 1) / BLOCK_KV;
  const int block = t / tiles_per_block, tile = t - block * tiles_per_block;
  const int begin = block * key_block_size + tile * BLOCK_KV;
  if (OWN_BLOCK && begin >= range.mapped_end) {
    const int last_block = range.mapped_end / key_block_size, rest = range.mapped_end % key_block_size;
    const int own_tile = t - last_block * tiles_per_block - (rest + BLOCK_KV - 1) / BLOCK_KV;
    return {range.own_begin + own_tile * BLOCK_KV, range.end, 0, false, true};
  }
  return {begin, min(range.mapped_end, (block + 1) * key_block_size), block, tile == 0, false};
}

// S += Q K^T of a warp's queries and a tile of keys in shared memory, WIDTH channels, rows STRIDE apart.
template <int WIDTH, int STRIDE>
__device__ inline void multiply_tile(float (&S_rmem)[M_TILES][KV_TILES][4], unsigned Q_address, unsigned K_address) {
#pragma unroll
  for (int r = 0; r < WIDTH / MMA_K; ++r) {
    unsigned Q_rmem[M_TILES][4];
#pragma unroll
    for (int i = 0; i < M_TILES; ++i) load_matrices(Q_rmem[i], Q_address + (i * MMA_M * STRIDE + r * MMA_K) * 2);
#pragma unroll
    for (int j = 0; j < KV_TILES; j += 2) {
      unsigned K_rmem[4];
      load_matrices(K_rmem, K_address + (j * MMA_N * STRIDE + r * MMA_K) * 2);
#pragma unroll
      for (int i = 0; i < M_TILES; ++i) {
        multiply_add(S_rmem[i][j], Q_rmem[i], K_rmem[0], K_rmem[1]);
        multiply_add(S_rmem[i][j + 1], Q_rmem[i], K_rmem[2], K_rmem[3]);
      }
    }
  }
}

// Where a lane's part of ldmatrix rows lies, in bytes: A and transposed B walk 16 rows x two 8-column halves, B 8 rows
// x two halves x 2.
__device__ inline unsigned left_offset(int lane, int stride) { return (lane % 16 * stride + lane / 16 * 8) * 2; }
__device__ inline unsigned right_offset(int lane, int stride) {
  return ((lane % 8 + lane / 16 * 8) * stride + lane / 8 % 2 * 8) * 2;
}

#if QUERY_MAP == 3
// Writes this warp's rows of Q Z; `map` is Z transposed, [R_PADDED, D_PADDED].
__device__ inline void map_queries(element_t* Q_smem, const element_t* raw_Q_smem, const element_t* map, const float*) {
  const int thread = thread_index_anew(), first_row = thread / WARP_SIZE * WARP_Q, lane = thread % WARP_SIZE;
  const unsigned raw_Q_address =
      shared_address(raw_Q_smem + (first_row + lane % 16) * D_STRIDE + lane / 16 * 8);
  const element_t* const lane_map = map + lane / 4 * D_PADDED + lane % 4 * 2;  // a right operand, read in place
#pragma unroll 1
  for (int r = 0; r < R_PADDED; r += 2 * MMA_N) {
    float sums[2][M_TILES][4] = {};
#pragma unroll 2
    for (int d = 0; d < D_PADDED; d += MMA_K) {
      unsigned map_rmem[2][2];
#pragma unroll
      for (int j = 0; j < 4; ++j)
        map_rmem[j / 2][j % 2] =
            *reinterpret_cast<const unsigned*>(lane_map + (r + j / 2 * MMA_N) * D_PADDED + d + j % 2 * 8);
#pragma unroll
      for (int i = 0; i < M_TILES; ++i) {
        unsigned Q_rmem[4];
        load_matrices(Q_rmem, raw_Q_address + (i * MMA_M * D_STRIDE + d) * 2);
        multiply_add(sums[0][i], Q_rmem, map_rmem[0][0], map_rmem[0][1]);
        multiply_add(sums[1][i], Q_rmem, map_rmem[1][0], map_rmem[1][1]);
      }
    }
#pragma unroll
    for (int i = 0; i < 4 * M_TILES; ++i) {  // row half i % 2 of tile i / 2 % M_TILES, columns half i / 2 / M_TILES
      const float* const pair = sums[i / 2 / M_TILES][i / 2 % M_TILES] + i % 2 * 2;
      const int row = first_row + i / 2 % M_TILES * MMA_M + i % 2 * 8 + lane / 4;
      const int column = r + i / 2 / M_TILES * MMA_N + lane % 4 * 2;
      *reinterpret_cast<unsigned*>(Q_smem + row * R_STRIDE + column) =
          pack(limit_to_element(pair[0]), limit_to_element(pair[1]));
    }
  }
  __syncwarp();  // the warp's lanes read each other's columns
}
#else
// Writes this warp's rows of Q W or Q Z (eq. 8, 9); a lane keeps its columns' channels while it walks down the rows.
__device__ inline void map_queries(element_t* Q_smem, const element_t* raw_Q_smem, const int* channels,
                                   const float* gains) {
  constexpr int MEMBERS = QUERY_MAP == 2 ? GROUP_SIZE : 1;
  const int first_row = threadIdx.x / WARP_SIZE * WARP_Q;
  for (int r = threadIdx.x % WARP_SIZE; r < R_PADDED; r += WARP_SIZE) {
    int member_channels[MEMBERS];
    float member_gains[MEMBERS];
#pragma unroll
    for (int g = 0; g < MEMBERS; ++g) {
      const bool is_padding = r >= R;
      member_channels[g] = is_padding ? 0 : channels[r * GROUP_SIZE + g];
      member_gains[g] = is_padding ? 0.0f : WITH_GAINS ? gains[r * GROUP_SIZE + g] : 1.0f;
    }
#pragma unroll 4
    for (int row = first_row; row < first_row + WARP_Q; ++row) {
      float sum = 0.0f;
#pragma unroll
      for (int g = 0; g < MEMBERS; ++g)
        sum += member_gains[g] * to_accumulate(raw_Q_smem[row * D_STRIDE + member_channels[g]]);
      Q_smem[row * R_STRIDE + r] = r < R ? to_element(sum) : element_t(0);
    }
  }
  __syncwarp();  // the warp's lanes read each other's columns
}
#endif

// row_max += q . mean for the rows that a lane holds accumulators of.
__device__ inline void add_mean_scores(float (&row_max)[ROWS], const element_t* raw_Q_smem, const float* mean) {
  const int thread = thread_index_anew(), first_row = thread / WARP_SIZE * WARP_Q + thread % WARP_SIZE / 4;
  float sums[ROWS] = {};
#pragma unroll 1
  for (int d = thread % 4; d < D; d += 4) {
    const float centre = mean[d];
#pragma unroll
    for (int i = 0; i < ROWS; ++i)
      sums[i] = fmaf(to_accumulate(raw_Q_smem[(first_row + i * 8) * D_STRIDE + d]), centre, sums[i]);
  }
#pragma unroll
  for (int i = 0; i < ROWS; ++i) {
    sums[i] += __shfl_xor_sync(~0u, sums[i], 1);
    row_max[i] += sums[i] + __shfl_xor_sync(~0u, sums[i], 2);
  }
}

// Within 2e-6 of its value; tanh.approx would round scores as much as 16 bits do, and lse with them.
__device__ inline float tanh_approximate(float x) {
  const float decay = exp2_approximate(-2 * LOG2_E * fabsf(x)), square = x * x;
  const float far_from_zero = copysignf(__fdividef(1 - decay, 1 + decay), x);
  const float near_zero = x * fmaf(square, fmaf(square, fmaf(square, -17.0f / 315, 2.0f / 15), -1.0f / 3), 1.0f);
  return fabsf(x) < 0.25f ? near_zero : far_from_zero;
}

// Four bools as four bits.
__device__ inline unsigned pack_bools(unsigned bools) {
  return __vsetne4(bools, 0) * 0x01020408u >> 24;  // byte k of ones and zeros goes to bit 24 + k
}

// Which scores of a tile the mask shows, of those that a lane holds: a bit for each, row by row.
struct ShownScores {
  unsigned words[(ROWS * 2 * KV_TILES + 31) / 32];

  __device__ bool any() const {
    unsigned bits = 0;
#pragma unroll
    for (unsigned word : words) bits |= word;
    return bits != 0;
  }
  __device__ bool at(int i, int j) const {
    const int bit = i * 2 * KV_TILES + j;
    return words[bit / 32] >> bit % 32 & 1;
  }
  // `mask_tile` is that of the tile of queries; key j is in column j * stride_m of its rows.
  __device__ void read(const mask_t* mask_tile, long long stride_n, long long stride_m, const KeyTile& tile, int rows) {
    const int thread = thread_index_anew(), lane = thread % WARP_SIZE;
    const int first_row = thread / WARP_SIZE * WARP_Q + lane / 4;
    const int keys = tile.end - tile.begin;
    const mask_t* const first = mask_tile + tile.begin * stride_m;
    const bool are_words = stride_m == 1 && keys >= BLOCK_KV && ((size_t)first | stride_n) % 4 == 0;
#pragma unroll
    for (unsigned& word : words) word = 0;
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
      const mask_t* const mask_row = first + min(first_row + i * 8, rows - 1) * stride_n;
      const int row_bit = i * 2 * KV_TILES;
      if (are_words) {
        // the four lanes of a row read four keys in turn and tell one another: of eight, lane q holds two from 2 q on
        unsigned fours = 0;
#pragma unroll
        for (int w = 0; w < KV_TILES / 2; ++w)
          fours |= pack_bools(reinterpret_cast<const unsigned*>(mask_row)[w * 4 + lane % 4]) << w * 4;
        const unsigned even = __shfl_sync(~0u, fours, lane % 4 / 2, 4), odd = __shfl_sync(~0u, fours, lane % 4 / 2 + 2, 4);
        const int pair = lane % 2 * 2;
        words[row_bit / 32] |= ((even >> pair & 0x33333333) | (odd >> pair & 0x33333333) << 2) << row_bit % 32;
      } else {
#pragma unroll
        for (int j = 0; j < 2 * KV_TILES; ++j) {
          const int key = j / 2 * MMA_N + lane % 4 * 2 + j % 2;
          if (key < keys && mask_row[key * stride_m]) words[(row_bit + j) / 32] |= 1u << (row_bit + j) % 32;
        }
      }
    }
  }
};

extern "C" __global__ __launch_bounds__(NUM_THREADS, MIN_BLOCKS)
void forward_mma(const element_t* __restrict__ Q,     // [B, H, N, D]
                 const element_t* __restrict__ K,     // [B, H_kv, M, K_COLUMNS], or as KEYS_PER_ITEM says
                 const element_t* __restrict__ V,     // [B, H_kv, M, E]
                 const element_t* __restrict__ own_K,  // [B, H_kv, M, D], keys as they are; unused without OWN_BLOCK
                 const float* __restrict__ mean,       // [B, H_kv, D], what they were centred by; unused as well
                 const map_t* __restrict__ maps,      // [B, H_x, C, MAP_ELEMENTS]; unused without QUERY_MAP
                 const float* __restrict__ gains,     // [B, H_x, C, D]; unused without WITH_GAINS
                 element_t* __restrict__ O,           // [B, H, N, E]
                 float* __restrict__ lse,             // [B, H, N]
                 int H, int heads_per_kv_head, int N, int M,
                 int query_blocks, int query_block_size,  // one block of N rows where queries are not cut
                 int key_block_size,                      // at least 1; M where keys are not cut
                 int first_item, int causal_offset,
                 float scale_log2,                        // scale * log2(e)
                 long long stride_q_b, long long stride_q_h, long long stride_q_n,  // elements, here and below
                 long long stride_k_b, long long stride_k_h, long long stride_k_m,
                 long long stride_own_b, long long stride_own_h, long long stride_own_m,
                 long long stride_v_b, long long stride_v_h, long long stride_v_m,
                 long long stride_o_b, long long stride_o_h, long long stride_o_n,
                 int window_offset, float softcap, Table<mask_t> mask, Table<bias_t> bias,
                 const float* __restrict__ mean_scores  // [B, H, N], scale * q . mean; unused without CENTRED
#if RAGGED
                 ,
                 const Piece* __restrict__ pieces,  // [query_blocks]
                 int key_blocks                     // of all sequences; with maps for blocks of keys
#endif
) {
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  element_t* const raw_Q_smem = reinterpret_cast<element_t*>(shared_bytes);  // [BLOCK_Q, D_STRIDE], with QUERY_MAP
  element_t* const Q_smem = raw_Q_smem + RAW_Q_ELEMENTS;                     // [BLOCK_Q, R_STRIDE]
  element_t* const stages_smem = Q_smem + Q_ELEMENTS;                        // 2 x ([BLOCK_KV, R_STRIDE] K, then V)

  // ---- which query rows this block owns, which keys they see ----
  auto find_work_anew = [=]() mutable {  // hidden from the compiler: registers through the main loop are dearer
    asm volatile("" : "+r"(first_item), "+r"(query_block_size));
    return find_work(BLOCK_Q, H, N, query_blocks, query_block_size, first_item, CAUSAL, pieces);
  };
  const WorkItem work = find_work_anew();
  if (work.query_begin >= work.query_end) return;
  const int h_kv = work.h / heads_per_kv_head;
  causal_offset = work.key_offset(causal_offset);
  window_offset = work.key_offset(window_offset);
  const int first_key = work.first_key(), keys_there = work.keys(M);
  KeyRange range;
  range.end = CAUSAL ? visible_key_end(work.query_end, keys_there, causal_offset) : keys_there;
  range.mapped_end = range.end;
  if (OWN_BLOCK) {
    range.mapped_end = min(range.end, own_block_begin(work.query_end - 1, causal_offset, key_block_size));
    range.own_begin = own_block_begin(work.query_begin, causal_offset, key_block_size);
  }
  int first_tile = 0;
  if (WINDOW) {
    const int key_begin = visible_key_begin(work.query_begin, window_offset);
    first_tile = tile_of_key(key_begin, key_block_size, range);
    if (OWN_BLOCK) range.own_begin = max(range.own_begin, key_begin);
  }
  const element_t* const Q_tile = Q + work.b * stride_q_b + work.h * stride_q_h + work.query_begin * stride_q_n;
  const element_t* K_head = KEYS_PER_ITEM ? K + (long long)work.launch_item * M * K_COLUMNS
                                                : K + work.b * stride_k_b + h_kv * stride_k_h;
  const long long stride_k = KEYS_PER_ITEM ? K_COLUMNS : stride_k_m;
  const element_t* V_head = V + work.b * stride_v_b + h_kv * stride_v_h + first_key * stride_v_m;
  const element_t* own_K_head = own_K + work.b * stride_own_b + h_kv * stride_own_h + first_key * stride_own_m;
  K_head += first_key * stride_k;

  asm volatile("" : "+l"(K_head), "+l"(V_head));  // hold two pointers through the main loop, not what they are sums of
  auto key_tile_anew = [=](int t) mutable {  // hidden as well
    asm volatile("" : "+r"(key_block_size));
    return key_tile(t, key_block_size, range);
  };
  auto mean_of_head = [&]() -> const float* {
    const WorkItem item = find_work_anew();
    return mean + ((long long)item.sequence() * (H / heads_per_kv_head) + item.h / heads_per_kv_head) * D;
  };
  int loads = 0;  // where the mask leaves tiles out, those that were loaded take turns
  auto load_keys_and_values = [&](int t) {
    const int stage = MASK ? loads++ % 2 : t % 2;
    KeyTile tile = key_tile_anew(t);
    if (tile.begin >= tile.end) return;
    asm volatile("" : "+r"(tile.begin));  // or the compiler keeps pointers that walk with the loop
    element_t* const K_smem = stages_smem + stage * STAGE_ELEMENTS;
    if (OWN_BLOCK && tile.is_own)
      load_rows<BLOCK_KV, D_PADDED, D, D_STRIDE>(K_smem, own_K_head + tile.begin * stride_own_m, stride_own_m,
                                                 tile.end - tile.begin);
    else
      load_rows<BLOCK_KV, R_PADDED, K_COLUMNS, R_STRIDE>(K_smem, K_head + tile.begin * stride_k, stride_k,
                                                         tile.end - tile.begin);
    load_rows<BLOCK_KV, E_PADDED, E, E_STRIDE>(K_smem + BLOCK_KV * K_STRIDE, V_head + tile.begin * stride_v_m,
                                               stride_v_m, tile.end - tile.begin);
  };

  // ---- load the Q tile [BLOCK_Q, D] and the first K and V tiles ----
  const int rows_valid = work.query_end - work.query_begin;
  const mask_t* mask_tile = mask.row(work.b, work.h, work.query_begin);
  const bias_t* bias_tile = bias.row(work.b, work.h, work.query_begin);
  const float* mean_scores_tile = mean_scores + ((long long)work.b * H + work.h) * N + work.query_begin;
  ShownScores shown, shown_next;
  int next_tile = 0;
  // The first tile from t on of which the mask shows some thread something. Its barriers stand for the main loop's.
  auto find_shown_tile = [&](int t) {
    for (;; ++t) {
      const KeyTile tile = key_tile_anew(t), later = key_tile_anew(t + MASK_TILES_AHEAD);
      const bool is_past = tile.begin >= tile.end;
      if (!is_past) shown_next.read(mask_tile, mask.stride_n, mask.stride_m, tile, rows_valid);
      if (later.begin < later.end && thread_index_anew() < rows_valid)
        prefetch_to_l2(mask_tile + thread_index_anew() * mask.stride_n + later.begin * mask.stride_m);
      if (__syncthreads_or(is_past || shown_next.any())) return t;
    }
  };
  if (QUERY_MAP == 0)
    load_rows<BLOCK_Q, R_PADDED, D, R_STRIDE>(Q_smem, Q_tile, stride_q_n, rows_valid);
  else
    load_rows<BLOCK_Q, D_PADDED, D, D_STRIDE>(raw_Q_smem, Q_tile, stride_q_n, rows_valid);
  if (MASK) first_tile = find_shown_tile(first_tile);
  load_keys_and_values(first_tile);
  copy_async_commit();

  const int warp = threadIdx.x / WARP_SIZE, lane = threadIdx.x % WARP_SIZE;
  float O_rmem[M_TILES][E_TILES][4] = {};
  float row_max[ROWS], row_sum[ROWS];  // the maximum is of S as it stands then, unscaled or changed, and may lag
#pragma unroll
  for (int i = 0; i < ROWS; ++i) row_max[i] = LOWEST, row_sum[i] = 0.0f;
  bool has_large_offset = true;  // some row's maximum, scaled; the same in the whole warp
  // What makes log2 units of a score: cap and bias take natural ones, in which their largest numbers are finite.
  const float factor_log2 = CHANGES_SCORES ? LOG2_E : scale_log2;

  const unsigned Q_address = shared_address(Q_smem + warp * WARP_Q * R_STRIDE) + left_offset(lane, R_STRIDE);
  // Made anew for each tile: registers are dearer.
  auto K_lane_offset = [] { return right_offset(thread_index_anew() % WARP_SIZE, R_STRIDE); };
  auto V_lane_offset = [] { return BLOCK_KV * K_STRIDE * 2 + left_offset(thread_index_anew() % WARP_SIZE, E_STRIDE); };

  int mapped_block = -1;  // whose map the warp's queries went through

#pragma unroll 1
  for (int t = first_tile;; t = MASK ? next_tile : t + 1) {
    const KeyTile tile = key_tile_anew(t);
    if (tile.begin >= tile.end) break;
    copy_async_wait_all();
    shown = shown_next;
    if (MASK)
      next_tile = find_shown_tile(t + 1);
    else
      __syncthreads();  // tile t has arrived for all threads, and no warp still reads the stage that is filled next
    load_keys_and_values(MASK ? next_tile : t + 1);
    copy_async_commit();
    if (MASK && !__any_sync(~0u, shown.any())) continue;
    if (OWN_BLOCK && !CHANGES_SCORES && tile.is_own && tile.begin == range.own_begin) {
      // from here on scores are q . mean larger
      add_mean_scores(row_max, raw_Q_smem, mean_of_head());
      has_large_offset = true;
    }
    if (QUERY_MAP != 0 && (WINDOW || MASK ? !tile.is_own && tile.block != mapped_block : tile.is_first_of_block)) {
      mapped_block = tile.block;
      const WorkItem item = find_work_anew();
      const int H_x = MAPS_FOR_KEY_BLOCKS ? H / heads_per_kv_head : H;
      const int h_x = MAPS_FOR_KEY_BLOCKS ? item.h / heads_per_kv_head : item.h;
#if !RAGGED
      const int key_blocks = (M + key_block_size - 1) / key_block_size;
#endif
      const int C = MAPS_FOR_KEY_BLOCKS ? key_blocks : query_blocks;
      const int c = MAPS_FOR_KEY_BLOCKS ? item.first_key_block() + tile.block : item.c;
      const long long map_offset = (((long long)item.b * H_x + h_x) * C + c) * MAP_ELEMENTS;
      map_queries(Q_smem, raw_Q_smem, maps + map_offset, gains + map_offset);
    }
    const unsigned stage_address = shared_address(stages_smem + (MASK ? loads % 2 : t % 2) * STAGE_ELEMENTS);

    // ---- S = Q K^T  [WARP_Q, BLOCK_KV] ----
    float S_rmem[M_TILES][KV_TILES][4] = {};
    if (OWN_BLOCK && tile.is_own) {
      const int anew = thread_index_anew();
      multiply_tile<D_PADDED, D_STRIDE>(
          S_rmem,
          shared_address(raw_Q_smem + anew / WARP_SIZE * WARP_Q * D_STRIDE) + left_offset(anew % WARP_SIZE, D_STRIDE),
          stage_address + right_offset(anew % WARP_SIZE, D_STRIDE));
    } else {
      multiply_tile<R_PADDED, R_STRIDE>(S_rmem, Q_address, stage_address + K_lane_offset());
    }

    // ---- S = cap(scale * S + mean score) + bias, minus infinity where the mask hides (eq. 12, 21, 22, 24) ----
    if (CHANGES_SCORES) {
      const int anew = thread_index_anew(), lane_row = anew / WARP_SIZE * WARP_Q + anew % WARP_SIZE / 4;
      const bool is_centred = CENTRED && !tile.is_own;
      const float scale = scale_log2 * LN_2, inverse_softcap = SOFTCAP ? 1 / softcap : 0;
#pragma unroll
      for (int i = 0; i < ROWS; ++i) {
        const int row = min(lane_row + i * 8, rows_valid - 1);
        const float mean_score = is_centred ? mean_scores_tile[row] : 0.0f;
        const bias_t* const bias_row = bias_tile + row * bias.stride_n + tile.begin * bias.stride_m;
#pragma unroll
        for (int j = 0; j < 2 * KV_TILES; ++j) {
          const int key = j / 2 * MMA_N + anew % 4 * 2 + j % 2;
          float& score = S_rmem[i / 2][j / 2][i % 2 * 2 + j % 2];
          score = fmaf(score, scale, mean_score);
          if (SOFTCAP) score = softcap * tanh_approximate(score * inverse_softcap);
          if (BIAS && tile.begin + key < tile.end) score += bias_to_accumulate(bias_row[key * bias.stride_m]);
          if (MASK && !shown.at(i, j)) score = minus_infinity();
        }
      }
    }

    // ---- minus infinity where a key is past the tile's end, out of the row's limits or scored with other tiles ----
    const int first_query = work.query_begin + warp * WARP_Q;
    auto own_begin_of = [&](int query) { return own_block_begin(query, causal_offset, key_block_size); };
    bool is_masked = tile.begin + BLOCK_KV > tile.end;
    if (CAUSAL && (!OWN_BLOCK || tile.is_own))
      is_masked = is_masked || tile.begin + BLOCK_KV - 1 > first_query + causal_offset;
    if (WINDOW) is_masked = is_masked || tile.begin < first_query + WARP_Q - 1 + window_offset;
    if (OWN_BLOCK)
      is_masked = is_masked || (tile.is_own ? own_begin_of(first_query + WARP_Q - 1) > tile.begin
                                            : tile.begin + BLOCK_KV > own_begin_of(first_query));
    if (is_masked) {
      const int anew = thread_index_anew() % WARP_SIZE;
#pragma unroll
      for (int i = 0; i < ROWS; ++i) {
        const int query = first_query + anew / 4 + i * 8;
        const int own_begin = OWN_BLOCK ? own_begin_of(query) : 0;
        const int own_first = OWN_BLOCK && tile.is_own ? own_begin : 0;
        const int first = WINDOW ? max(own_first, query + window_offset) : own_first;
        const int end = !CAUSAL                      ? tile.end
                        : OWN_BLOCK && !tile.is_own ? min(tile.end, own_begin)
                                                    : min(tile.end, query + causal_offset + 1);
#pragma unroll
        for (int j = 0; j < 2 * KV_TILES; ++j) {
          const int key = tile.begin + j / 2 * MMA_N + anew % 4 * 2 + j % 2;
          if (key < first || key >= end) S_rmem[i / 2][j / 2][i % 2 * 2 + j % 2] = minus_infinity();
        }
      }
    }

    // ---- running maximum (eq. 10): rescale the sums only where it grew beyond the threshold ----
    float tile_max[ROWS];
    bool has_grown = false;
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
      tile_max[i] = minus_infinity();
#pragma unroll
      for (int j = 0; j < KV_TILES; ++j)
        tile_max[i] = fmaxf(tile_max[i], fmaxf(S_rmem[i / 2][j][i % 2 * 2], S_rmem[i / 2][j][i % 2 * 2 + 1]));
      has_grown = has_grown || (tile_max[i] - row_max[i]) * factor_log2 > RESCALE_THRESHOLD;
    }
    if (__any_sync(~0u, has_grown)) {
      bool is_large = false;
#pragma unroll
      for (int i = 0; i < ROWS; ++i) {
        float new_max = fmaxf(tile_max[i], __shfl_xor_sync(~0u, tile_max[i], 1));
        new_max = fmaxf(new_max, __shfl_xor_sync(~0u, new_max, 2));
        new_max = fmaxf(new_max, row_max[i]);
        const float rescale = exp2_approximate((row_max[i] - new_max) * factor_log2);
        row_max[i] = new_max;
        is_large = is_large || fabsf(new_max * factor_log2) > LARGEST_OFFSET;
        row_sum[i] *= rescale;
#pragma unroll
        for (int j = 0; j < E_TILES; ++j) {
          O_rmem[i / 2][j][i % 2 * 2] *= rescale;
          O_rmem[i / 2][j][i % 2 * 2 + 1] *= rescale;
        }
      }
      has_large_offset = __any_sync(~0u, is_large);
    }

    // ---- P = exp(S - row_max), O += P V  [WARP_Q, E], sixteen keys at a time: exp runs beside the products ----
    if (has_large_offset) {  // the difference first
#pragma unroll
      for (int i = 0; i < ROWS; ++i)
#pragma unroll
        for (int j = 0; j < KV_TILES; ++j) {
          S_rmem[i / 2][j][i % 2 * 2] -= row_max[i];
          S_rmem[i / 2][j][i % 2 * 2 + 1] -= row_max[i];
        }
    }
    const unsigned V_address = stage_address + V_lane_offset();
    float offset_log2[ROWS];
#pragma unroll
    for (int i = 0; i < ROWS; ++i) offset_log2[i] = has_large_offset ? 0.0f : row_max[i] * factor_log2;
#pragma unroll
    for (int k = 0; k < BLOCK_KV / MMA_K; ++k) {
      unsigned P_rmem[M_TILES][4];
#pragma unroll
      for (int i = 0; i < M_TILES; ++i)
#pragma unroll
        for (int part = 0; part < 4; ++part) {  // row half part % 2 of accumulator tile 2 k + part / 2
          const float* const S_pair = S_rmem[i][2 * k + part / 2] + part % 2 * 2;
          const float low = exp2_approximate(fmaf(S_pair[0], factor_log2, -offset_log2[2 * i + part % 2]));
          const float high = exp2_approximate(fmaf(S_pair[1], factor_log2, -offset_log2[2 * i + part % 2]));
          row_sum[2 * i + part % 2] += low + high;
          P_rmem[i][part] = pack(low, high);
        }
#pragma unroll
      for (int j = 0; j < E_TILES; j += 2) {
        unsigned V_rmem[4];
        load_matrices_transposed(V_rmem, V_address + (k * MMA_K * E_STRIDE + j * MMA_N) * 2);
#pragma unroll
        for (int i = 0; i < M_TILES; ++i) {
          multiply_add(O_rmem[i][j], P_rmem[i], V_rmem[0], V_rmem[1]);
          multiply_add(O_rmem[i][j + 1], P_rmem[i], V_rmem[2], V_rmem[3]);
        }
      }
    }
  }

  if (OWN_BLOCK && !CHANGES_SCORES && range.own_begin >= range.end)
    add_mean_scores(row_max, raw_Q_smem, mean_of_head());

  // ---- O / row_sum and lse, rows n < query_end ----
  const int thread = thread_index_anew(), member = thread % 4;
  const WorkItem done = find_work_anew();
#pragma unroll
  for (int i = 0; i < ROWS; ++i) {
    float sum = row_sum[i] + __shfl_xor_sync(~0u, row_sum[i], 1);
    sum += __shfl_xor_sync(~0u, sum, 2);
    const int n = done.query_begin + thread / WARP_SIZE * WARP_Q + thread % WARP_SIZE / 4 + i * 8;
    if (n >= done.query_end) continue;
    const float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
    element_t* const O_row = O + done.b * stride_o_b + done.h * stride_o_h + n * stride_o_n;
#pragma unroll
    for (int j = 0; j < E_TILES; ++j) {
      const int e = j * MMA_N + member * 2;
      const float low = O_rmem[i / 2][j][i % 2 * 2] * inverse, high = O_rmem[i / 2][j][i % 2 * 2 + 1] * inverse;
#if ALIGNED
      if (e < E) *reinterpret_cast<unsigned*>(O_row + e) = pack(low, high);
#else
      if (e < E) O_row[e] = to_element(low);
      if (e + 1 < E) O_row[e + 1] = to_element(high);
#endif
    }
    if (member == 0)
      lse[((long long)done.b * H + done.h) * N + n] =
          sum == 0.0f      ? minus_infinity()
          : CHANGES_SCORES ? row_max[i] + LN_2 * log2f(sum)  // biases may be too large for log2 units
                           : LN_2 * (row_max[i] * scale_log2 + log2f(sum));
  }
}
