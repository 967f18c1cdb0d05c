// forward_simt.cu - attention on CUDA cores, exact or with keys of reduced width: float32, float64, and 16-bit types
// where forward_mma.cu does not take them.
//
//   S = scale * A C^T,   O = softmax(S) V,   lse_n = log( sum_m exp(S_nm) )       docs/math.md (eq. 2 to 4, 8 to 10)
//
//   GROUP_BY = 0 (exact)    A = Q,            C = K
//   GROUP_BY = 1 (queries)  A = Q W sampled,  C = K Z fused     maps of the tile's query block
//   GROUP_BY = 2 (keys)     A = Q Z fused,    C = K W sampled   maps of the tile's key block
//
// These maps are applied while rows travel to shared memory; no N x M array exists.
//
//   DENSE, GROUP_BY = 1     A = reduced_Q = Q W,  C = reduced_K = (K - mean) Z, both made before
//   DENSE, GROUP_BY = 2     A = Q Z,              C = reduced_K = (K - mean) W
//
// Q Z is made anew for every block of keys, and kept in reduced_Q meanwhile. With OWN_BLOCK (eq. 20), a query and the
// keys of its own block are multiplied as they are, centred; the tile's other keys come first. Scores then pass through
// what score_options.cuh switches on; tiles of keys that the window or the mask hides from the whole tile of queries
// are left out.
//
// Reference : reference/exact_attention.py, reference/distr_attention.py, reference/subspace_attention.py
// Launcher  : distrattn_np/backends/cupy_backend.py
//
// Grid      : items * ceil_div(query_block_size, BLOCK_Q), see work_item.cuh     one thread block per query tile
// Block     : 16 x 16 = 256 threads as (row, column) of the score tile, in one dimension
// Shared    : under 48 KB, static
// Assumes   : GROUP_SIZE divides D; heads_per_kv_head divides H. Sums and softmax run in float32 (float64 for float64).
//             Query n sees keys n + window_offset <= m <= n + causal_offset, limits that are read only where WINDOW and
//             CAUSAL; one that sees no key gives O = 0 and lse = -inf. lse is that of the centred keys where DENSE,
//             but for CHANGES_SCORES. What is reduced or dense is contiguous, in the type of the sums.
// Alone     : nvcc -cubin -arch=sm_80 raw_kernels/forward_simt.cu

#include "score_options.cuh"
#include "simt.cuh"
#include "work_item.cuh"

// ---- the launcher sets these with -D; the defaults let the file compile alone ----
#ifndef D
#define D 64
#endif
#ifndef E
#define E 64
#endif
#ifndef R
#define R D
#endif
#ifndef GROUP_SIZE
#define GROUP_SIZE 1
#endif
#ifndef GROUP_BY
#define GROUP_BY 0
#endif
#ifndef WITH_GAINS
#define WITH_GAINS 0
#endif
#ifndef DENSE
#define DENSE 0
#endif
#ifndef OWN_BLOCK
#define OWN_BLOCK 0
#endif
#ifndef CAUSAL
#define CAUSAL 0
#endif
#ifndef BLOCK_Q
#define BLOCK_Q (ELEMENT == FLOAT64 ? 32 : 64)
#endif
constexpr int EXACT = 0, QUERIES = 1, KEYS = 2;  // values of GROUP_BY
static_assert(D >= 1 && D <= 256 && E >= 1 && E <= 256, "rows have 1 to 256 elements");
static_assert(DENSE || R * GROUP_SIZE == D, "every channel belongs to a group of GROUP_SIZE");
static_assert((GROUP_BY == EXACT) == (GROUP_SIZE == 1 && !DENSE), "groups of one channel are exact attention");
static_assert(!OWN_BLOCK || (DENSE && GROUP_BY == KEYS && CAUSAL), "own blocks are of keys, in causal calls with maps");

// ---- tiles: thread (ty, tx) owns ROWS queries, COLUMNS keys of a tile and VALUES columns of every value strip ----
constexpr int BLOCK_KV = 64;
constexpr int ROWS = BLOCK_Q / SIDE;
constexpr int COLUMNS = BLOCK_KV / SIDE;
constexpr int WIDEST_READ = 16 / sizeof(accumulate_t);
constexpr int VALUES = (E + SIDE - 1) / SIDE < WIDEST_READ ? (E + SIDE - 1) / SIDE : WIDEST_READ;
constexpr int VALUE_STRIPS = (E + SIDE * VALUES - 1) / (SIDE * VALUES);
constexpr int E_PADDED = VALUE_STRIPS * SIDE * VALUES;
constexpr int R_PADDED = (R + 15) / 16 * 16;
constexpr bool ADDS_MEAN_SCORES = DENSE && CHANGES_SCORES;  // cap and bias act on scores of keys as they are
// two leave 128 registers per thread
constexpr bool NEEDS_FEW_REGISTERS =
    E <= 128 && sizeof(accumulate_t) == 4 && !CHANGES_SCORES && !(OWN_BLOCK && (WINDOW || RAGGED || __CUDA_ARCH__ >= 1200));
constexpr int MIN_BLOCKS = NEEDS_FEW_REGISTERS ? 2 : 1;
static_assert(BLOCK_Q % SIDE == 0, "every thread owns the same number of queries");

// ---- shared memory: A and C pass through in chunks of channels, then V, in the same place, in chunks of rows ----
constexpr int P_PITCH = BLOCK_Q + PADDING;
constexpr int CHANNELS = channels_at_a_time(BLOCK_Q + BLOCK_KV, DENSE ? D : R);
constexpr int MOST_VALUE_ROWS = CHUNK_BYTES / E_PADDED / sizeof(accumulate_t);
constexpr int VALUE_ROWS = BLOCK_KV < MOST_VALUE_ROWS ? BLOCK_KV : MOST_VALUE_ROWS;
constexpr int SCORE_OPERANDS = CHANNELS * (BLOCK_Q + BLOCK_KV + 2 * PADDING);
constexpr int VALUE_OPERANDS = VALUE_ROWS * E_PADDED;
constexpr int OPERANDS = SCORE_OPERANDS > VALUE_OPERANDS ? SCORE_OPERANDS : VALUE_OPERANDS;

struct Maps {
  const int* channels_smem;
  const float* gains_smem;
};

// Element r of a row of X W (sampled) or Y Z (fused); of the row itself in an exact call.
__device__ __forceinline__ accumulate_t reduced_element(const element_t* row, int r, bool is_fused, Maps maps) {
  if (GROUP_BY == EXACT) return to_accumulate(row[r]);
  const int first = r * GROUP_SIZE;
  if (!is_fused) return to_accumulate(row[maps.channels_smem[first]]);
  accumulate_t sum = 0;
#pragma unroll 4
  for (int g = 0; g < GROUP_SIZE; g++) {
    const accumulate_t value = to_accumulate(row[maps.channels_smem[first + g]]);
    sum += WITH_GAINS ? maps.gains_smem[first + g] * value : value;
  }
  return sum;
}

extern "C" __global__ __launch_bounds__(THREADS, MIN_BLOCKS)
void forward_simt(const element_t* __restrict__ Q,   // [B, H, N, D]
                  const element_t* __restrict__ K,   // [B, H_kv, M, D]
                  const element_t* __restrict__ V,   // [B, H_kv, M, E]
                  const int* __restrict__ channels,  // [B, H, C, D] or, by keys, [B, H_kv, C, D]; of groups
                  const float* __restrict__ gains,   // as channels; read only where WITH_GAINS
                  const accumulate_t* __restrict__ fusion,     // [B, H_kv, C, R, D], Z transposed; by keys, where DENSE
                  const accumulate_t* __restrict__ mean,       // [B, H_kv, D]; with OWN_BLOCK or ADDS_MEAN_SCORES
                  accumulate_t* reduced_Q,                     // [B, H, N, R_PADDED]; by keys: room for it; where DENSE
                  const accumulate_t* __restrict__ reduced_K,  // [items, M, R_PADDED]; by keys: [B, H_kv, M, R_PADDED]
                  element_t* __restrict__ O,         // [B, H, N, E]
                  float* __restrict__ lse,           // [B, H, N], contiguous, natural logarithm
                  int H, int heads_per_kv_head, int N, int M, int query_blocks, int query_block_size,
                  int key_block_size, int first_item, int causal_offset, accumulate_t scale,
                  long long stride_q_b, long long stride_q_h, long long stride_q_n,
                  long long stride_k_b, long long stride_k_h, long long stride_k_m,
                  long long stride_v_b, long long stride_v_h, long long stride_v_m,
                  long long stride_o_b, long long stride_o_h, long long stride_o_n,
                  int window_offset, accumulate_t softcap, Table<mask_t> mask, Table<bias_t> bias
#if RAGGED
                  ,
                  const Piece* __restrict__ pieces,  // [query_blocks]
                  int key_blocks                     // of all sequences; by keys
#endif
) {
  __shared__ alignas(16) accumulate_t operands_smem[OPERANDS];
  __shared__ alignas(16) accumulate_t P_smem[BLOCK_KV][P_PITCH];  // transposed: a thread's queries are neighbours
  __shared__ int channels_smem[GROUP_BY == EXACT ? 1 : D];
  __shared__ float gains_smem[WITH_GAINS ? D : 1];
  __shared__ accumulate_t mean_scores_smem[ADDS_MEAN_SCORES ? BLOCK_Q : 1];
  accumulate_t* V_smem = operands_smem;  // [VALUE_ROWS, E_PADDED]
  const Maps maps = {channels_smem, gains_smem};
  const int ty = threadIdx.x / SIDE, tx = threadIdx.x % SIDE;

  // ---- which rows this block owns ----
  const WorkItem work = find_work(BLOCK_Q, H, N, query_blocks, query_block_size, first_item, CAUSAL, pieces);
  if (work.query_begin >= work.query_end) return;
  const int queries = work.query_end - work.query_begin;
  causal_offset = work.key_offset(causal_offset);
  window_offset = work.key_offset(window_offset);
  const int keys_there = work.keys(M), first_key = work.first_key();
  const int key_begin = WINDOW ? visible_key_begin(work.query_begin, window_offset) : 0;
  const int key_end = CAUSAL ? visible_key_end(work.query_end, keys_there, causal_offset) : keys_there;
  const int h_kv = work.h / heads_per_kv_head, H_kv = H / heads_per_kv_head;
  Q += work.b * stride_q_b + work.h * stride_q_h + work.query_begin * stride_q_n;
  K += work.b * stride_k_b + h_kv * stride_k_h + first_key * stride_k_m;
  V += work.b * stride_v_b + h_kv * stride_v_h + first_key * stride_v_m;
  O += work.b * stride_o_b + work.h * stride_o_h + work.query_begin * stride_o_n;
  lse += (static_cast<long long>(work.b) * H + work.h) * N + work.query_begin;
  const long long kv_head = static_cast<long long>(work.b) * H_kv + h_kv;
  mean += (static_cast<long long>(work.sequence()) * H_kv + h_kv) * D;
  reduced_Q += ((static_cast<long long>(work.b) * H + work.h) * N + work.query_begin) * R_PADDED;
  reduced_K += ((GROUP_BY == QUERIES ? work.launch_item : kv_head) * M + first_key) * R_PADDED;

  auto load_maps = [&](long long map) {
    for (int i = threadIdx.x; i < D; i += THREADS) {
      channels_smem[i] = channels[map * D + i];
      if (WITH_GAINS) gains_smem[i] = gains[map * D + i];
    }
  };
  if (GROUP_BY == QUERIES && !DENSE) load_maps((static_cast<long long>(work.b) * H + work.h) * query_blocks + work.c);

  accumulate_t row_max[ROWS], row_sum[ROWS];  // row_sum: over this thread's keys only, until the end
  accumulate_t O_rmem[ROWS][VALUE_STRIPS][VALUES] = {};
#pragma unroll
  for (int i = 0; i < ROWS; i++) {
    row_max[i] = minus_infinity();
    row_sum[i] = 0;
  }

  auto query = [&](int row, int d) { return row < queries ? to_accumulate(Q[row * stride_q_n + d]) : 0; };
  auto row_or_last = [&](int row) { return min(work.query_begin + row, work.query_end - 1); };
  auto reduced_query = [&](int row, int r) { return row < queries ? reduced_Q[row * R_PADDED + r] : 0; };

  if (ADDS_MEAN_SCORES) {  // the barriers of the first product come before they are read
#pragma unroll
    for (int i = 0; i < ROWS; i++) {
      accumulate_t sum = 0;
      for (int d = tx; d < D; d += SIDE) sum += query(ty * ROWS + i, d) * mean[d];
#pragma unroll
      for (int lanes = SIDE / 2; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lanes);
      if (tx == 0) mean_scores_smem[ty * ROWS + i] = scale * sum;
    }
  }
  const accumulate_t inverse_softcap = SOFTCAP ? 1 / softcap : 0;

  // Keys below mapped_end are scored through maps; those of the rows' own blocks, from own_begin on, are not.
  const int mapped_end =
      OWN_BLOCK ? min(key_end, own_block_begin(work.query_end - 1, causal_offset, key_block_size)) : key_end;
  const int own_begin = OWN_BLOCK ? own_block_begin(work.query_begin, causal_offset, key_block_size) : key_end;
  bool is_own = false;
  for (int key = key_begin, keys = 0;; key += keys) {
    if (!is_own && key >= mapped_end) is_own = true, key = WINDOW ? max(own_begin, key_begin) : own_begin;
    if (key >= key_end) break;
    // ---- the next tile: `keys` keys from `key` on; blocks over keys: none of them in another block ----
    keys = min(BLOCK_KV, (is_own ? key_end : mapped_end) - key);
    if (GROUP_BY == KEYS && !is_own) {
      const int block_key = key % key_block_size;
      keys = min(keys, key_block_size - block_key);
      if (block_key == 0 || (WINDOW && key == key_begin)) {
#if !RAGGED
        const int key_blocks = (M - 1) / key_block_size + 1;
#endif
        const long long map = kv_head * key_blocks + work.first_key_block() + key / key_block_size;
#if DENSE
        // ---- Q Z [BLOCK_Q, R], as many columns at a time as a tile has keys ----
        for (int column = 0; column < R; column += BLOCK_KV) {
          accumulate_t sums[ROWS][COLUMNS] = {};
          multiply_rows<CHANNELS>(sums, operands_smem, D, query, [&](int r, int d) -> accumulate_t {
            return column + r < R ? fusion[(map * R + column + r) * D + d] : 0;
          });
#pragma unroll
          for (int i = 0; i < ROWS; i++) {
#pragma unroll
            for (int j = 0; j < COLUMNS; j++) {
              const int row = ty * ROWS + i, r = column + tx * COLUMNS + j;
              if (row < queries && r < R) reduced_Q[row * R_PADDED + r] = sums[i][j];
            }
          }
        }
#else
        load_maps(map);  // those of the block before were last read ahead of the barriers around the values
#endif
      }
    }

    unsigned shown = 0;  // bit i * COLUMNS + j: whether the mask shows the score that this thread has there
    if (MASK) {
#pragma unroll
      for (int i = 0; i < ROWS; i++) {
        const mask_t* const row = mask.row(work.b, work.h, row_or_last(ty * ROWS + i)) + key * mask.stride_m;
#pragma unroll
        for (int j = 0; j < COLUMNS; j++) {
          const int m = tx * COLUMNS + j;
          if (m < keys && row[m * mask.stride_m]) shown |= 1u << (i * COLUMNS + j);
        }
      }
      if (!__syncthreads_or(shown)) continue;  // all threads go the same way
    }

    // ---- S = A C^T [BLOCK_Q, BLOCK_KV] ----
    accumulate_t S[ROWS][COLUMNS] = {};
    if (OWN_BLOCK && is_own) {
      multiply_rows<CHANNELS>(S, operands_smem, D, query, [&](int row, int d) -> accumulate_t {
        return row < keys ? to_accumulate(K[(key + row) * stride_k_m + d]) - mean[d] : 0;
      });
    } else if (DENSE) {
      multiply_rows<CHANNELS>(S, operands_smem, R, reduced_query, [&](int row, int r) {
        return row < keys ? reduced_K[static_cast<long long>(key + row) * R_PADDED + r] : 0;
      });
    } else {
      multiply_rows<CHANNELS>(
          S, operands_smem, R,
          [&](int row, int r) {
            return row < queries ? reduced_element(Q + row * stride_q_n, r, GROUP_BY == KEYS, maps) : 0;
          },
          [&](int row, int r) {
            return row < keys ? reduced_element(K + (key + row) * stride_k_m, r, GROUP_BY == QUERIES, maps) : 0;
          });
    }

    // ---- running softmax: P = exp(S - row_max), rescale what came before ----
#pragma unroll
    for (int i = 0; i < ROWS; i++) {
      const int n = work.query_begin + ty * ROWS + i;
      const int own = OWN_BLOCK ? own_block_begin(n, causal_offset, key_block_size) - key : 0;
      const int own_first = OWN_BLOCK && is_own ? own : 0;
      const int first = WINDOW ? max(own_first, n + window_offset - key) : own_first;  // of the keys that it scores
      const int end = OWN_BLOCK && !is_own ? min(keys, own) : CAUSAL ? min(keys, n + causal_offset + 1 - key) : keys;
      const bias_t* const bias_row = bias.row(work.b, work.h, row_or_last(ty * ROWS + i)) + key * bias.stride_m;
      accumulate_t new_max = row_max[i];
#pragma unroll
      for (int j = 0; j < COLUMNS; j++) {
        bool is_scored = tx * COLUMNS + j >= first && tx * COLUMNS + j < end;
        if (MASK) is_scored = is_scored && (shown >> (i * COLUMNS + j) & 1);
        S[i][j] = is_scored ? scale * S[i][j] : minus_infinity();
        if (CHANGES_SCORES && is_scored) {
          if (ADDS_MEAN_SCORES) S[i][j] += mean_scores_smem[ty * ROWS + i];
          if (SOFTCAP) S[i][j] = softcap * tanh(S[i][j] * inverse_softcap);
          if (BIAS) S[i][j] += bias_to_accumulate(bias_row[(tx * COLUMNS + j) * bias.stride_m]);
        }
        new_max = max(new_max, S[i][j]);
      }
#pragma unroll
      for (int lanes = SIDE / 2; lanes > 0; lanes /= 2) {
        new_max = max(new_max, __shfl_xor_sync(0xffffffffu, new_max, lanes));
      }
      const accumulate_t reference = new_max == minus_infinity() ? 0 : new_max;  // nothing seen yet: avoid inf - inf
      const accumulate_t rescale = exp(row_max[i] - reference);
      row_max[i] = new_max;
      row_sum[i] *= rescale;
#pragma unroll
      for (int j = 0; j < COLUMNS; j++) {
        const accumulate_t P = exp(S[i][j] - reference);
        row_sum[i] += P;
        P_smem[tx * COLUMNS + j][ty * ROWS + i] = P;
      }
#pragma unroll
      for (int strip = 0; strip < VALUE_STRIPS; strip++) {
#pragma unroll
        for (int v = 0; v < VALUES; v++) O_rmem[i][strip][v] *= rescale;
      }
    }

    // ---- O += P V [BLOCK_Q, E] ----
    for (int first = 0; first < keys; first += VALUE_ROWS) {
      const int value_rows = min(VALUE_ROWS, keys - first);
      __syncthreads();  // P is written before it is read; operands are read before they are overwritten
#pragma unroll 1
      for (int m = ty; m < value_rows; m += SIDE) {
        const element_t* value_row = V + (key + first + m) * stride_v_m;
#pragma unroll
        for (int e = tx; e < E_PADDED; e += SIDE) V_smem[m * E_PADDED + e] = e < E ? to_accumulate(value_row[e]) : 0;
      }
      __syncthreads();  // operands are written before they are read
#pragma unroll 2
      for (int m = 0; m < value_rows; m++) {
        accumulate_t P_rmem[ROWS];
#pragma unroll
        for (int i = 0; i < ROWS; i++) P_rmem[i] = P_smem[first + m][ty * ROWS + i];
#pragma unroll
        for (int strip = 0; strip < VALUE_STRIPS; strip++) {
          accumulate_t V_rmem[VALUES];
#pragma unroll
          for (int v = 0; v < VALUES; v++) V_rmem[v] = V_smem[m * E_PADDED + (strip * SIDE + tx) * VALUES + v];
#pragma unroll
          for (int i = 0; i < ROWS; i++) {
#pragma unroll
            for (int v = 0; v < VALUES; v++) O_rmem[i][strip][v] += P_rmem[i] * V_rmem[v];
          }
        }
      }
    }
  }

  // ---- O / row_sum and lse, rows below query_end ----
#pragma unroll
  for (int i = 0; i < ROWS; i++) {
    const int row = ty * ROWS + i;
#pragma unroll
    for (int lanes = SIDE / 2; lanes > 0; lanes /= 2) row_sum[i] += __shfl_xor_sync(0xffffffffu, row_sum[i], lanes);
    if (row >= queries) continue;
    const accumulate_t inverse = row_sum[i] == 0 ? 0 : 1 / row_sum[i];
#pragma unroll
    for (int strip = 0; strip < VALUE_STRIPS; strip++) {
#pragma unroll
      for (int v = 0; v < VALUES; v++) {
        const int e = (strip * SIDE + tx) * VALUES + v;
        if (e < E) O[row * stride_o_n + e] = to_element(O_rmem[i][strip][v] * inverse);
      }
    }
    if (tx == 0) lse[row] = row_max[i] + log(row_sum[i]);
  }
}
