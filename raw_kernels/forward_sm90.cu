// forward_sm90.cu - attention for 16-bit elements on Hopper (sm_90a): wgmma, tensor-map copies, specialised warpgroups.
//
//   S = scale * (X W) (Y Z)^T,   O = softmax(S) V                              docs/math.md (eq. 2, 4 and 10)
//
// Reference : reference/distr_attention.py      Numba : distrattn_np/numba_kernels/forward.py
// Launcher  : distrattn_np/backends/cupy_backend.py; sizes, boxes and encoding of the maps: backends/tensor_map.py
//
// What the maps show decides what is computed:
//   exact attention        : Q and K as the caller holds them, R = D
//   blocks over queries    : Q sampled, K fused for each query block (KEYS_PER_ITEM)
//   blocks over keys       : Q as the caller holds it, K sampled, and a map Z for each key block (KEY_MAPS). Q Z is
//                            computed here, once for each key block, and stays in registers. With CAUSAL a query
//                            scores the keys of its own block exactly (OWN_BLOCK, eq. 20), from K as the caller has it.
//                            With FOLD_REFERENCE the last two columns are free, K has ones there and Z zeros: they
//                            take the softmax's reference off the scores.
//
// Grid      : (positions / MAX_ROUNDS or more); see work_item.cuh. A thread block takes one position after the other, at
//             most MAX_ROUNDS, and copies the first tiles of the next while it finishes one. CAUSAL: a multiple of
//             blocks_at_once (Deal). SPLITS_KEYS: the last tiles have several positions (KeySplits). RAGGED, and CAUSAL
//             with KEYS_PER_ITEM or KEY_MAPS: (positions), CAUSAL from the longest
// Block     : (1 + NUM_CONSUMERS) * 128 threads. Warpgroup 0 copies tiles, the others own 64 query rows each
// Shared    : sizeof(SharedTiles) + SWIZZLE_ALIGNMENT bytes, dynamic: 2 (BLOCK_Q Q_WIDTH + STAGES BLOCK_KV (R + E))
//             + 8 (3 + 4 STAGES) + 1024; KEY_MAPS: and 2 R D + 4 BLOCK_Q + 32; OWN_BLOCK: D in place of R in the tiles of K;
//             RAGGED: and 24
// Maps      : 16-bit elements, strides as they are, swizzle as wide as a row of the box, zeros outside
//             axes from the inner one             box (Panels<width>::COLUMNS, rows, 1, 1)
//             q_map (Q_WIDTH, N, H, B)            (Q_WIDTH, BLOCK_Q)
//             k_map (R, M, H_kv, B)               (R, BLOCK_KV)          KEYS_PER_ITEM: (R, M, items of this launch, 1)
//             v_map (E, M, H_kv, B)               (E, BLOCK_KV)
//             z_map (D, key blocks * R, H_kv, B)  (D, R)                 KEY_MAPS: Z transposed
//             own_map (D, M, H_kv, B)             (D, BLOCK_KV)          OWN_BLOCK: K as the caller holds it
// RAGGED    : k_map, v_map and own_map show the rows of all sequences, and z_map their key blocks (sequences.cuh). Boxes may
//             reach into the next sequence: its keys are hidden, its queries and values set to zero.
// Assumes   : scale > 0, M > 0; pointers and strides of what the maps show are multiples of 16 bytes, those of O of 4;
//             KEY_MAPS: key_block_size is a multiple of BLOCK_KV. Q Z (FOLD_REFERENCE: in powers of two) is rounded to
//             the element type; what is out of its range becomes the largest element.
// A query that sees no key: O = 0, lse = -inf.
// Alone     : nvcc -cubin -gencode arch=compute_90a,code=sm_90a raw_kernels/forward_sm90.cu

// ---- parameters: the launcher sets these with -D; the defaults let the file compile alone ----
#ifndef R
#define R 128  // inner width of the score product
#endif
#ifndef E
#define E 128  // width of a row of V
#endif
#ifndef D
#define D R  // width of a row of Q before it is mapped; only with KEY_MAPS
#endif
#ifndef KEYS_PER_ITEM
#define KEYS_PER_ITEM 0
#endif
#ifndef KEY_MAPS
#define KEY_MAPS 0
#endif
#ifndef CAUSAL
#define CAUSAL 0
#endif
#define OWN_BLOCK (KEY_MAPS && CAUSAL)
#ifndef FOLD_REFERENCE
#define FOLD_REFERENCE 0  // only with KEY_MAPS: the last two of the R columns carry the softmax's reference
#endif
#ifndef MAP_AHEAD
#define MAP_AHEAD 1  // only with KEY_MAPS: Q Z of the next key block runs beside a softmax; takes R / 2 more registers
#endif

#ifndef BLOCK_Q
#define BLOCK_Q 128
#endif
#ifndef BLOCK_KV
#define BLOCK_KV 128
#endif
#ifndef STAGES
#define STAGES 2
#endif
#ifndef MAX_ROUNDS
#define MAX_ROUNDS ((CAUSAL && (KEYS_PER_ITEM || KEY_MAPS)) || RAGGED ? 1 : 31)  // positions that a thread block takes
#endif

#define SPLITS_KEYS (!CAUSAL && !RAGGED && !KEYS_PER_ITEM && !KEY_MAPS)
#include "hopper.cuh"
#include "work_item.cuh"

constexpr int WARPGROUP = 128;     // threads
constexpr int CONSUMER_ROWS = 64;  // rows of one wgmma
constexpr int NUM_CONSUMERS = BLOCK_Q / CONSUMER_ROWS;
constexpr int NUM_THREADS = (1 + NUM_CONSUMERS) * WARPGROUP;
constexpr int Q_WIDTH = KEY_MAPS ? D : R;   // width of the Q tile
constexpr int K_WIDTH = OWN_BLOCK ? D : R;  // of the widest K tile
static_assert(ELEMENT == FLOAT16 || ELEMENT == BFLOAT16, "tensor cores take 16-bit elements");
static_assert(BLOCK_Q % CONSUMER_ROWS == 0 && NUM_CONSUMERS >= 2 && NUM_CONSUMERS <= 4,
              "two to four warpgroups own 64 query rows each");
static_assert(BLOCK_KV % MMA_DEPTH == 0 && BLOCK_KV <= 128, "S [64, BLOCK_KV] is held in registers");
static_assert(MAX_ROUNDS <= 31, "a bit for each round, and one for the pass");
static_assert(!((CAUSAL && KEYS_PER_ITEM) || RAGGED) || MAX_ROUNDS == 1, "only whole heads of one length are dealt out");
constexpr bool DEALS = CAUSAL && MAX_ROUNDS > 1;
static_assert(R % MMA_DEPTH == 0 && E % MMA_DEPTH == 0 && Q_WIDTH % MMA_DEPTH == 0, "a product is 16 columns deep");

// Registers of a thread. What the warpgroups hold together may not exceed what they are launched with, or the block
// hangs: 65536 / NUM_THREADS each, rounded down to a multiple of eight.
// Two consumers of narrow rows leave some to the producer; at two ranks others can too, with own blocks of packed
// sequences, where it has most to hold and spilled.
constexpr bool SPARES_REGISTERS = E <= 64 || (SPLITS_KEYS && R <= 64) || (RAGGED && OWN_BLOCK && (R == 16 || R == 96));
constexpr int PRODUCER_REGISTERS = NUM_CONSUMERS == 2 ? (SPARES_REGISTERS ? 40 : 24) : 32;
constexpr int CONSUMER_REGISTERS =
    NUM_CONSUMERS == 2 ? (SPARES_REGISTERS ? 232 : 240) : NUM_CONSUMERS == 3 ? 160 : 112;
static_assert(PRODUCER_REGISTERS + NUM_CONSUMERS * CONSUMER_REGISTERS <=
                  (1 + NUM_CONSUMERS) * (65536 / NUM_THREADS / 8 * 8),
              "the register file holds all warpgroups");

constexpr float LN_2 = 0.6931471805599453f;
constexpr float INFINITE = __builtin_bit_cast(float, 0x7f800000);

struct SharedTiles {
  element_t Q[BLOCK_Q * Q_WIDTH];
  element_t K[STAGES][BLOCK_KV * K_WIDTH];
  element_t V[STAGES][BLOCK_KV * E];
#if KEY_MAPS
  element_t Z[R * D];
  float mean_scores[BLOCK_Q];  // q . mean of each row
  Barrier Z_full, Z_empty, mean_scores_full, mean_scores_empty;
#endif
#if RAGGED
  volatile struct {
    int M, causal_offset, first_key, first_key_block;
    int queries;  // of this tile
  } sequence;  // read where it is needed: registers of the loops are dearer
#endif
  Barrier Q_full, Q_empty, K_full[STAGES], K_empty[STAGES], V_full[STAGES], V_empty[STAGES];
  alignas(8) unsigned lost_rounds;  // a bit for each position that has to be computed again
};
static_assert(sizeof(element_t[BLOCK_Q * Q_WIDTH]) % SWIZZLE_ALIGNMENT == 0 &&
                  sizeof(element_t[BLOCK_KV * K_WIDTH]) % SWIZZLE_ALIGNMENT == 0 &&
                  sizeof(element_t[BLOCK_KV * E]) % SWIZZLE_ALIGNMENT == 0,
              "every tile is aligned to its swizzle");

// The key tiles that a thread block visits, from the last one down: `own_begin` to `tiles - 1`, whose keys are scored as
// they are (OWN_BLOCK: at least one, if only hidden), and then those before `mapped_end`. The two ranges overlap where
// not all queries have the same own block.
struct KeyTiles {
  int own_begin, tiles, mapped_end;

  __device__ __forceinline__ int own_count() const { return tiles - own_begin; }
  __device__ __forceinline__ int visits() const { return own_count() + mapped_end; }
  __device__ __forceinline__ int visited(int visit) const {
    return visit < own_count() ? tiles - 1 - visit : visits() - 1 - visit;
  }
};

// A lane holds scores of this row of its warpgroup's and of the eighth after it.
__device__ __forceinline__ int row_of_lane() {
  const int thread = thread_index_anew();
  return thread % WARPGROUP / WARP_SIZE * 16 + thread % WARP_SIZE / 4;
}

// Sets the scores of keys after the last that each of this lane's two rows sees to minus infinity.
__device__ __forceinline__ void hide_scores(float (&S)[BLOCK_KV / 2], int first_key, const int (&last_key)[2]) {
#pragma unroll
  for (int i = 0; i < BLOCK_KV / 2; ++i)
    if (i / 4 * 8 + i % 2 > last_key[i / 2 % 2] - first_key) S[i] = -INFINITE;
}

using MappedQueries = unsigned[R / MMA_DEPTH][4];  // Q Z [64, R], in registers

// The softmax (eq. 10) of the two rows that a lane holds scores of; four lanes share a row. P = exp(score - reference),
// where the reference need not be the row's maximum: it is taken from the maximum where a row begins, and then stays
// until a tile shows by its sum of P that it is too low. So most tiles need no maximum. That is exact as long as P fits
// its 16-bit type and the sums fit float32; where a pass cannot keep this up it is lost, and the block is computed
// again in a pass that follows the maximum.
//
// Scores are in units of S: times the `scale_log2` of a step they are powers of two. With FOLD_REFERENCE, Q Z carries
// that factor and, in its last two columns, the reference, which S is then short of (`is_folded`).
struct RunningSoftmax {
  float reference[2] = {-INFINITE, -INFINITE};  // the same in the four lanes; -INFINITE: this row has seen no key
  float row_sum[2] = {0.0f, 0.0f};              // of this lane's columns only
  float rescale[2];                             // set where a step returns true
  bool is_lost = false;

  // The steps turn S into P. They return whether this warp's O has to be multiplied by `rescale` before P V is added.

  // Any scores: looks for the maximum. The reference may lag behind it by LARGEST_LAG.
  __device__ __forceinline__ bool step_by_maximum(float (&S)[BLOCK_KV / 2], float scale_log2, bool is_folded,
                                                  bool is_last_pass) {
    constexpr float LARGEST_LAG = 8.0f;  // powers of two
    const float folded[2] = {is_folded ? finite_reference(0) : 0.0f, is_folded ? finite_reference(1) : 0.0f};
    float tile_max[2] = {S[0], S[2]};
#pragma unroll
    for (int i = 0; i < BLOCK_KV / 2; i += 2)
      tile_max[i / 2 % 2] = fmaxf(tile_max[i / 2 % 2], fmaxf(S[i], S[i + 1]));
    const float growth =
        fmaxf(tile_max[0] + folded[0] - reference[0], tile_max[1] + folded[1] - reference[1]) * scale_log2;
    const bool has_grown = __any_sync(~0u, growth > LARGEST_LAG);
    if (has_grown) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float row_max = tile_max[i] + folded[i];
        row_max = fmaxf(row_max, __shfl_xor_sync(~0u, row_max, 1));
        row_max = fmaxf(row_max, __shfl_xor_sync(~0u, row_max, 2));
        move_reference(i, fmaxf(reference[i], row_max), scale_log2, is_last_pass);
      }
    }
#pragma unroll
    for (int i = 0; i < BLOCK_KV / 2; i += 2) {
      // the difference first: for large scores the product would not be exact enough
      const float shift = finite_reference(i / 2 % 2) - folded[i / 2 % 2];
      S[i] = exp2_approximate((S[i] - shift) * scale_log2);
      S[i + 1] = exp2_approximate((S[i + 1] - shift) * scale_log2);
      row_sum[i / 2 % 2] += S[i] + S[i + 1];
    }
    return has_grown;
  }

  // Rows that have seen a key, scores that are not hidden: relies on the reference, and looks at the sums of P, which
  // bound every P. IS_FOLDED: S is the argument of exp2.
  template <bool IS_FOLDED>
  __device__ __forceinline__ bool step_by_sum(float (&S)[BLOCK_KV / 2], float scale_log2) {
    constexpr float LARGEST_SUM = 1 << 14;
    constexpr float LARGEST_REPAIRED_SUM = 0x1p100f;
    const float offset[2] = {reference[0] * scale_log2, reference[1] * scale_log2};
    float tile_sum[2] = {0.0f, 0.0f};
#pragma unroll
    for (int i = 0; i < BLOCK_KV / 2; i += 2) {
      S[i] = exp2_approximate(IS_FOLDED ? S[i] : fmaf(S[i], scale_log2, -offset[i / 2 % 2]));
      S[i + 1] = exp2_approximate(IS_FOLDED ? S[i + 1] : fmaf(S[i + 1], scale_log2, -offset[i / 2 % 2]));
      tile_sum[i / 2 % 2] += S[i] + S[i + 1];
    }
    const bool is_large = __any_sync(~0u, fmaxf(tile_sum[0], tile_sum[1]) > LARGEST_SUM);
    if (is_large) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float bound = fmaxf(tile_sum[i], __shfl_xor_sync(~0u, tile_sum[i], 1));
        bound = fmaxf(bound, __shfl_xor_sync(~0u, bound, 2));
        is_lost |= bound > LARGEST_REPAIRED_SUM;
        const float growth = bound > LARGEST_SUM ? __log2f(bound) : 0.0f;  // powers of two
        move_reference(i, reference[i] + __fdividef(growth, scale_log2), scale_log2, false);
        tile_sum[i] *= rescale[i];
      }
#pragma unroll
      for (int i = 0; i < BLOCK_KV / 2; ++i) S[i] *= rescale[i / 2 % 2];
    }
    row_sum[0] += tile_sum[0];
    row_sum[1] += tile_sum[1];
    return is_large;
  }

#if FOLD_REFERENCE
  // Lets the products that follow subtract the reference: keys have ones in the last two columns.
  __device__ __forceinline__ void fold(MappedQueries& QZ) {
    const bool holds_last_columns = thread_index_anew() % 4 == 3;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float high = round_to_element(finite_reference(i));
      if (holds_last_columns) QZ[R / MMA_DEPTH - 1][2 + i] = pack(-high, high - finite_reference(i));
    }
  }
#endif

  __device__ __forceinline__ void move_reference(int i, float target, float scale_log2, bool is_last_pass) {
    // Of larger references the product with scale_log2 is not exact enough.
    constexpr float LARGEST_REFERENCE = 1 << 15;  // powers of two
    if (!is_last_pass && target != -INFINITE) {
      is_lost |= fabsf(target) * scale_log2 > LARGEST_REFERENCE;
      if (FOLD_REFERENCE && scale_log2 == 1.0f) {  // powers of two, in range: to the sum of two elements
        const float high = round_to_element(target);
        target = high + round_to_element(target - high);
      }
    }
    rescale[i] = exp2_approximate((reference[i] - (target == -INFINITE ? 0.0f : target)) * scale_log2);
    row_sum[i] *= rescale[i];
    reference[i] = target;
  }

  // Goes on with scores that are lower by these shifts than those so far. With FOLD_REFERENCE they are powers of two from
  // here on, and O has to be multiplied by `rescale`.
  __device__ __forceinline__ void lower_scores(float shift_0, float shift_1, float scale_log2, bool is_last_pass) {
    reference[0] -= shift_0;
    reference[1] -= shift_1;
#pragma unroll
    for (int i = 0; FOLD_REFERENCE && i < 2; ++i) {
      reference[i] *= scale_log2;
      move_reference(i, reference[i], 1.0f, is_last_pass);
    }
  }

  // A row that has seen no key yet: any finite reference makes its P zero.
  __device__ __forceinline__ float finite_reference(int i) const {
    return reference[i] == -INFINITE ? 0.0f : reference[i];
  }
};

// Where the keys of a block's sequence begin, and their blocks, among all that the maps show; how many queries of the
// tile are of the sequence.
#if RAGGED
#define QUERIES shared.sequence.queries
#define FIRST_KEY shared.sequence.first_key
#define FIRST_KEY_BLOCK shared.sequence.first_key_block
#else
#define QUERIES BLOCK_Q
#define FIRST_KEY work.first_key()
#define FIRST_KEY_BLOCK 0
#endif

// ---- producers: a thread of one warp copies tiles in the order of their use, in which V follows K by one; a thread of
// the other warps copies queries ----
struct TileCopies {
  Ring<STAGES> K_ring, V_ring;
#if KEY_MAPS
  Ring<1> Z_ring;
#endif

  __device__ __forceinline__ void copy(SharedTiles& shared, const TensorMap& k_map, const TensorMap& v_map,
#if KEY_MAPS
                                       const TensorMap& z_map, int key_block_size,
#endif
#if OWN_BLOCK
                                       const TensorMap& own_map,
#endif
                                       const WorkItem& work, int kv_head, const KeyTiles& keys) {
    const int k_head = KEYS_PER_ITEM ? work.launch_item : kv_head;
    const int b = RAGGED ? 0 : work.b, k_batch = KEYS_PER_ITEM ? 0 : b;
    const int visits = keys.visits();
#if KEY_MAPS
    int key_block = (keys.mapped_end - 1) * BLOCK_KV / key_block_size;
    if (keys.mapped_end > 0) copy_map(shared, z_map, FIRST_KEY_BLOCK + key_block, kv_head, b);
#endif
#pragma unroll 1
    for (int visit = 0; visit <= visits; ++visit) {
      if (visit < visits) {
        const int row = FIRST_KEY + keys.visited(visit) * BLOCK_KV;
        barrier_wait(shared.K_empty[K_ring.stage], K_ring.parity ^ 1);
#if OWN_BLOCK
        if (visit < keys.own_count())
          copy_tile<D, BLOCK_KV>(shared.K[K_ring.stage], own_map, shared.K_full[K_ring.stage], row, kv_head, b);
        else
#endif
          copy_tile<R, BLOCK_KV>(shared.K[K_ring.stage], k_map, shared.K_full[K_ring.stage], row, k_head, k_batch);
        K_ring.advance();
      }
      if (visit > 0) {
        barrier_wait(shared.V_empty[V_ring.stage], V_ring.parity ^ 1);
        copy_tile<E, BLOCK_KV>(shared.V[V_ring.stage], v_map, shared.V_full[V_ring.stage],
                               FIRST_KEY + keys.visited(visit - 1) * BLOCK_KV, kv_head, b);
        V_ring.advance();
      }
#if KEY_MAPS
      // Z of the next block, behind what consumers wait for before they release the last Z
      const bool is_mapped = visit >= keys.own_count() && visit < visits;
      if (is_mapped && key_block > 0 && keys.visited(visit) * BLOCK_KV == key_block * key_block_size)
        copy_map(shared, z_map, FIRST_KEY_BLOCK + --key_block, kv_head, b);
#endif
    }
  }

#if KEY_MAPS
  __device__ __forceinline__ void copy_map(SharedTiles& shared, const TensorMap& z_map, int key_block, int kv_head,
                                           int b) {
    barrier_wait(shared.Z_empty, Z_ring.parity ^ 1);
    copy_tile<D, R>(shared.Z, z_map, shared.Z_full, key_block * R, kv_head, b);
    Z_ring.advance();
  }
#endif
};

struct QueryCopies {
  Ring<1> ring;

  __device__ __forceinline__ void copy(SharedTiles& shared, const TensorMap& q_map, const WorkItem& work) {
    barrier_wait(shared.Q_empty, ring.parity ^ 1);
    copy_tile<Q_WIDTH, BLOCK_Q>(shared.Q, q_map, shared.Q_full, work.query_begin, work.h, work.b);
  }

#if KEY_MAPS
  __device__ __forceinline__ void multiply_by(const float* __restrict__ mean, SharedTiles& shared) {
    constexpr int CHUNK = 2;  // the swizzle keeps eight together, which would take too many registers
    barrier_wait(shared.mean_scores_empty, ring.parity ^ 1);
    barrier_wait(shared.Q_full, ring.parity);
#pragma unroll 1
    for (int row = threadIdx.x - WARP_SIZE; row < BLOCK_Q; row += WARPGROUP - WARP_SIZE) {
      float sum = 0.0f;
#pragma unroll 1
      for (int d = 0; d < (row < QUERIES ? D : 0); d += CHUNK) {
        const unsigned chunk = *reinterpret_cast<const unsigned*>(shared.Q + swizzled_place<D, BLOCK_Q>(row, d));
        const element_t(&q)[CHUNK] = reinterpret_cast<const element_t(&)[CHUNK]>(chunk);
#pragma unroll
        for (int j = 0; j < CHUNK; ++j) sum = fmaf(to_accumulate(q[j]), mean[d + j], sum);
      }
      shared.mean_scores[row] = sum;
    }
    barrier_arrive(shared.Q_empty);
    barrier_arrive(shared.mean_scores_full);
  }
#endif
};

// ---- parts of the consumer's loop ----

// The products pin and fence their registers, and return while they are still running.

// S = Q K^T  [64, BLOCK_KV], from Q [64, Q_WIDTH]
__device__ __forceinline__ void start_scores(float (&S)[BLOCK_KV / 2], Descriptor Q, Descriptor K) {
  pin(S);
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < Q_WIDTH / MMA_DEPTH; ++k)
    multiply(S, Q + inner_step<Q_WIDTH, BLOCK_Q>(k), K + inner_step<Q_WIDTH, BLOCK_KV>(k), k > 0);
  wgmma_commit();
}

// S = (Q Z) K^T  [64, BLOCK_KV]
__device__ __forceinline__ void start_scores(float (&S)[BLOCK_KV / 2], MappedQueries& QZ, Descriptor K) {
  pin(S);
  pin(QZ);
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < R / MMA_DEPTH; ++k) multiply<false>(S, QZ[k], K + inner_step<R, BLOCK_KV>(k), k > 0);
  wgmma_commit();
}

// O += P V  [64, E]
__device__ __forceinline__ void start_values(float (&O)[E / 2], unsigned (&P)[BLOCK_KV / MMA_DEPTH][4],
                                             Descriptor V) {
  pin(O);
  pin(P);
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < BLOCK_KV / MMA_DEPTH; ++k) multiply<true>(O, P[k], V + inner_row_step<E>(k), true);
  wgmma_commit();
}

#if KEY_MAPS
// C = Q Z  [64, R] of one key block, from Q [64, D] and Z transposed, [R, D]
__device__ __forceinline__ void start_map(float (&C)[R / 2], Descriptor Q, Descriptor Z) {
  pin(C);
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < D / MMA_DEPTH; ++k) multiply(C, Q + inner_step<D, BLOCK_Q>(k), Z + inner_step<D, R>(k), k > 0);
  wgmma_commit();
}

__device__ __forceinline__ void finish_map(MappedQueries& QZ, float (&C)[R / 2], float scale_log2) {
  pin(C);
#pragma unroll
  for (int i = 0; i < R / MMA_DEPTH; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float factor = FOLD_REFERENCE ? scale_log2 : 1.0f;
      QZ[i][j] = pack_finite(C[8 * i + 2 * j] * factor, C[8 * i + 2 * j + 1] * factor);
    }
  }
}
#endif

#if RAGGED
// Queries of a sequence without keys: O = 0, lse = -inf.
__device__ __forceinline__ void write_nothing_seen(element_t* O, float* lse, const WorkItem& work, int H, int N,
                                                   long long stride_o_h, long long stride_o_n) {
  for (int i = threadIdx.x; i < (work.query_end - work.query_begin) * E; i += NUM_THREADS)
    O[work.h * stride_o_h + (work.query_begin + i / E) * stride_o_n + i % E] = element_t(0);
  for (int n = work.query_begin + threadIdx.x; n < work.query_end; n += NUM_THREADS)
    lse[(long long)work.h * N + n] = -INFINITE;
}
#endif

template <bool VALUE>
struct Bool {
  static constexpr bool value = VALUE;
};

extern "C" __global__ __launch_bounds__(NUM_THREADS, 1)
void forward_sm90(const __grid_constant__ TensorMap q_map, const __grid_constant__ TensorMap k_map,
                  const __grid_constant__ TensorMap v_map,
#if KEY_MAPS
                  const __grid_constant__ TensorMap z_map,
#endif
#if OWN_BLOCK
                  const __grid_constant__ TensorMap own_map,
#endif
                  element_t* __restrict__ O,               // [B, H, N, E]
                  float* __restrict__ lse,                 // [B, H, N]
                  int H, int heads_per_kv_head, int N, int M,
                  int query_blocks, int query_block_size,  // one block of N rows where queries are not cut
                  int first_item, int positions,           // of this launch
                  int items_dealt, int blocks_at_once,     // Deal, where CAUSAL thread blocks take several positions
#if SPLITS_KEYS
                  int whole_tiles, int splits, int keys_per_split,
                  float* __restrict__ partial_O,           // [splits, split_rows, E], not divided yet
                  float* __restrict__ partial_stats,       // [splits, split_rows, 2], maxima before scale_log2, and sums
                  int split_rows,                          // the last of [B, H, N]
                  long long first_split_row,
#endif
                  int causal_offset,
                  float scale_log2,                        // scale * log2(e)
                  long long stride_o_b, long long stride_o_h, long long stride_o_n  // elements
#if KEY_MAPS
                  ,
                  const float* __restrict__ mean,          // [B, H_kv, D], taken off the keys behind k_map; may be null
                  int key_block_size
#endif
#if RAGGED
                  ,
                  const Piece* __restrict__ pieces         // [query_blocks]
#endif
) {
  extern __shared__ unsigned char shared_bytes[];
  SharedTiles& shared = *reinterpret_cast<SharedTiles*>(
      shared_bytes + (SWIZZLE_ALIGNMENT - shared_address(shared_bytes) % SWIZZLE_ALIGNMENT) % SWIZZLE_ALIGNMENT);

  __shared__ int dealt[DEALS ? WARP_SIZE : 1];  // positions of this thread block, round by round
  if (DEALS && threadIdx.x < WARP_SIZE) {       // seen behind the barrier below
    const int query_tiles = (N + BLOCK_Q - 1) / BLOCK_Q, round = threadIdx.x;
    const Deal deal = {items_dealt, blocks_at_once, positions / query_tiles, query_tiles, MAX_ROUNDS};
    const int position = round < deal.rounds() ? deal.position(round) : positions;
    const unsigned rounds_with_one = __ballot_sync(~0u, position < positions);
    dealt[round] = positions;
    __syncwarp();
    if (position < positions) dealt[__popc(rounds_with_one & ((1u << round) - 1))] = position;
  }
  // `positions` and more where there is none any more.
  const auto position_of = [&](int round) -> int {
    return DEALS ? dealt[round] : blockIdx.x + round * gridDim.x;
  };
  const auto find_position = [&](int round) {
    const int position = position_of(round);
#if SPLITS_KEYS
    const KeySplits key_splits = {whole_tiles, splits, keys_per_split};
    WorkItem work = find_work(BLOCK_Q, H, N, query_blocks, query_block_size, first_item, false, pieces,
                              key_splits.tile_of(position));
    key_splits.cut(work, position, M);
    return work;
#else
    return find_work(BLOCK_Q, H, N, query_blocks, query_block_size, first_item, CAUSAL && !DEALS, pieces, position);
#endif
  };
#if RAGGED
  const WorkItem only = find_position(0);  // MAX_ROUNDS is 1
  if (only.query_begin >= only.query_end) return;
  causal_offset = only.key_offset(causal_offset);
  M = only.keys(M);
  if (M == 0) {
    write_nothing_seen(O, lse, only, H, N, stride_o_h, stride_o_n);
    return;
  }
  if (threadIdx.x == 0) {  // seen behind the barrier below
    shared.sequence.M = M;
    shared.sequence.causal_offset = causal_offset;
    shared.sequence.first_key = only.first_key();
    shared.sequence.first_key_block = only.first_key_block();
    shared.sequence.queries = only.query_end - only.query_begin;
  }
#endif
  // ---- which keys the query rows of a position see ----
  const auto find_keys = [&](const WorkItem& work) {
    const int key_end = CAUSAL ? visible_key_end(work.query_end, M, causal_offset) : RAGGED ? M : work.keys(M);
    // Rows that see no key visit one tile all the same, hidden from them, so that every barrier has its use.
    const int tiles = max(1, (key_end + BLOCK_KV - 1) / BLOCK_KV);
#if OWN_BLOCK
    return KeyTiles{min(tiles - 1, own_block_begin(work.query_begin, causal_offset, key_block_size) / BLOCK_KV), tiles,
                    min(tiles, own_block_begin(work.query_end - 1, causal_offset, key_block_size) / BLOCK_KV)};
#else
    return KeyTiles{tiles, tiles, tiles};
#endif
  };
#if KEY_MAPS
  auto tiles_per_key_block = [&]() -> int {
    int size = key_block_size;
    asm volatile("" : "+r"(size));  // or a register of the main loop keeps the quotient
    return size / BLOCK_KV;
  };
#endif

  // ---- barriers: a full one hears from the producer and the copy engine, an empty one from each consumer ----
  if (threadIdx.x == 0) {
    barrier_init(shared.Q_full, 1);
#if KEY_MAPS
    constexpr int MULTIPLIERS = WARPGROUP - WARP_SIZE;  // of Q by the mean: they read Q as consumers do
    barrier_init(shared.Q_empty, NUM_CONSUMERS + (mean ? MULTIPLIERS : 0));
    barrier_init(shared.Z_full, 1);
    barrier_init(shared.Z_empty, NUM_CONSUMERS);
    barrier_init(shared.mean_scores_full, MULTIPLIERS);
    barrier_init(shared.mean_scores_empty, NUM_CONSUMERS * WARPGROUP / WARP_SIZE);
#else
    barrier_init(shared.Q_empty, NUM_CONSUMERS);
#endif
#pragma unroll
    for (int stage = 0; stage < STAGES; ++stage) {
      barrier_init(shared.K_full[stage], 1);
      barrier_init(shared.V_full[stage], 1);
      barrier_init(shared.K_empty[stage], NUM_CONSUMERS);
      barrier_init(shared.V_empty[stage], NUM_CONSUMERS);
    }
    barrier_init_fence();
    shared.lost_rounds = 0;
  }

  __syncthreads();  // no one arrives or waits before the barriers are initialised

  // Calls body(follows_maximum, round, work) for the positions of this thread block. The first pass takes all of them and
  // relies on references; the second takes those again of which a warp lost the reference, and follows the maximum. It
  // is rare: one product waits for the other there.
  const auto for_positions = [&](const auto& body) {
    unsigned rounds = ~0u;  // the highest bit: it is the first pass
    do {
#pragma unroll 1
      for (int round = 0; round < MAX_ROUNDS && position_of(round) < positions; ++round) {
        if (!(rounds >> round & 1)) continue;
        const WorkItem work = find_position(round);
        if (work.query_begin < work.query_end) body(!(rounds >> MAX_ROUNDS), round, work);
      }
      __syncthreads();
      rounds = rounds >> MAX_ROUNDS ? shared.lost_rounds : 0;
    } while (rounds);
  };

  const int warpgroup = __shfl_sync(~0u, threadIdx.x / WARPGROUP, 0);  // the compiler sees that a warp agrees on it
  if (warpgroup == 0) {
    give_up_registers<PRODUCER_REGISTERS>();
    if (threadIdx.x < WARP_SIZE) {
      TileCopies tiles;
      for_positions([&](bool, int, const WorkItem& work) {
        if (threadIdx.x == 0) {
          tiles.copy(shared, k_map, v_map,
#if KEY_MAPS
                     z_map, key_block_size,
#endif
#if OWN_BLOCK
                     own_map,
#endif
                     work, work.h / heads_per_kv_head, find_keys(work));
        }
        __syncwarp();
      });
    } else {
      QueryCopies queries;
      for_positions([&](bool, int, const WorkItem& work) {
        if (threadIdx.x == WARP_SIZE) queries.copy(shared, q_map, work);
#if KEY_MAPS
        const int kv_heads = H / heads_per_kv_head;
        if (mean)
          queries.multiply_by(mean + (work.sequence() * kv_heads + work.h / heads_per_kv_head) * D, shared);
#endif
        queries.ring.advance();
        __syncwarp();
      });
    }
  } else {
    take_registers<CONSUMER_REGISTERS>();
    const int consumer = warpgroup - 1;
    const bool is_speaker = threadIdx.x % WARPGROUP == 0;  // arrives at barriers for its warpgroup
    // what S is multiplied by to be a power of two
    const auto score_scale_of = [&](auto is_own) {
      return FOLD_REFERENCE && !decltype(is_own)::value ? 1.0f : scale_log2;
    };

    const Descriptor Q_smem = describe_inner_columns<Q_WIDTH>(
        shared.Q + consumer * CONSUMER_ROWS * Panels<Q_WIDTH>::COLUMNS);  // these rows of every panel
    const Descriptor K_smem = describe_inner_columns<R>(shared.K);
    const Descriptor whole_K_smem = describe_inner_columns<Q_WIDTH>(shared.K);  // keys as wide as queries
    const Descriptor V_smem = describe_inner_rows<E, BLOCK_KV>(shared.V);
    constexpr unsigned K_STAGE = sizeof(shared.K[0]) >> 4, V_STAGE = sizeof(shared.V[0]) >> 4;  // to the next buffer
    Ring<1> Q_ring;
    Ring<STAGES> K_ring, V_ring;
#if KEY_MAPS
    const Descriptor Z_smem = describe_inner_columns<D>(shared.Z);
    Ring<1> Z_ring;
    MappedQueries QZ;
#endif
#if RAGGED
    // Rows of other sequences: queries that could move the references of a warp, and values, of which a weight of zero
    // does not make zeros.
    constexpr int CONSUMER_THREADS = NUM_CONSUMERS * WARPGROUP;
    auto clear_other_values = [&](int tile) {
      const int valid = shared.sequence.M - tile * BLOCK_KV;
      if (valid >= BLOCK_KV) return;
      barrier_wait(shared.V_full[V_ring.stage], V_ring.parity);
      clear_rows<E, BLOCK_KV, WARPGROUP, CONSUMER_THREADS>(shared.V[V_ring.stage], valid);
    };
#else
    auto clear_other_values = [](int) {};  // the copy engine fills up with zeros
#endif

    for_positions([&](bool follows_maximum, int round, const WorkItem& work) {
      const int first_row = work.query_begin + consumer * CONSUMER_ROWS;
      const KeyTiles keys = find_keys(work);
#if OWN_BLOCK
      // The first key that a row scores exactly. Rows that do not exist count as the last one that does.
      const auto own_begin_of = [&](int n) {
#if RAGGED
        const int causal_offset = shared.sequence.causal_offset;
#endif
        return own_block_begin(min(n, work.query_end - 1), causal_offset, key_block_size);
      };
#endif
      // Hides from each row the keys of a tile that it does not see, or that it does not score in the way of the tile.
      auto hide_edge = [&](auto is_own, float (&S)[BLOCK_KV / 2], int tile) {
#if RAGGED
        const int keys_end = shared.sequence.M, causal_offset = shared.sequence.causal_offset;
#else
        const int keys_end = work.keys(M);  // of a split
#endif
        const int row = first_row + row_of_lane(), first_column = thread_index_anew() % 4 * 2;
        int last_seen[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          last_seen[i] = CAUSAL ? min(keys_end - 1, row + 8 * i + causal_offset) : keys_end - 1;
#if OWN_BLOCK
          const int own_begin = own_begin_of(row + 8 * i);
          if (!decltype(is_own)::value) last_seen[i] = min(last_seen[i], own_begin - 1);
          else if (tile * BLOCK_KV < own_begin) last_seen[i] = -1;
#endif
        }
        hide_scores(S, tile * BLOCK_KV + first_column, last_seen);
      };

      float O_rmem[E / 2] = {};
      float S_rmem[BLOCK_KV / 2];
      unsigned P_rmem[BLOCK_KV / MMA_DEPTH][4];
      RunningSoftmax softmax;
      bool is_moved;  // whether the reference is
      int tile = keys.tiles - 1;
      // Tiles from which on some of the keys are hidden from some rows. The tile with the last key of the first row is
      // one of them, so that every row has found a maximum.
      int whole_tiles_end = (first_row + causal_offset) / BLOCK_KV;
#if OWN_BLOCK
      // Before it there are keys that are not of every row's own block.
      const int own_tiles_begin = (own_begin_of(first_row + CONSUMER_ROWS - 1) + BLOCK_KV - 1) / BLOCK_KV;
#endif

#if KEY_MAPS
      // Q Z of a key block, at once
      auto map_queries = [&] {
        float C_rmem[R / 2];
        barrier_wait(shared.Z_full, Z_ring.parity);
        start_map(C_rmem, Q_smem, Z_smem);
        wgmma_wait<0>();
        if (is_speaker) barrier_arrive(shared.Z_empty);
        Z_ring.advance();
        finish_map(QZ, C_rmem, scale_log2);
      };
#endif
      auto start_scores_of = [&](auto is_own) {
#if KEY_MAPS
        if constexpr (!decltype(is_own)::value) start_scores(S_rmem, QZ, K_smem + K_ring.stage * K_STAGE);
#endif
        if constexpr (!KEY_MAPS || decltype(is_own)::value)
          start_scores(S_rmem, Q_smem, whole_K_smem + K_ring.stage * K_STAGE);
      };

      auto rescale_values = [&] {
#pragma unroll
        for (int i = 0; i < E / 2; ++i) O_rmem[i] *= softmax.rescale[i / 2 % 2];
      };

      // ---- the first of several tiles:  S = Q K^T,  P = exp(S - reference) ----
      auto begin_visits = [&](auto is_own, int tile) {
        barrier_wait(shared.K_full[K_ring.stage], K_ring.parity);
        start_scores_of(is_own);
        wgmma_wait<0>();
        pin(S_rmem);
        if (is_speaker) barrier_arrive(shared.K_empty[K_ring.stage]);
        K_ring.advance();
        hide_edge(is_own, S_rmem, tile);
        if (softmax.step_by_maximum(S_rmem, score_scale_of(is_own), false, follows_maximum)) rescale_values();
        pack_operands(P_rmem, S_rmem);
      };

      // ---- the last of them:  O += P V ----
      auto end_visits = [&] {
        barrier_wait(shared.V_full[V_ring.stage], V_ring.parity);
        start_values(O_rmem, P_rmem, V_smem + V_ring.stage * V_STAGE);
        wgmma_wait<0>();
        pin(O_rmem);
        if (is_speaker) barrier_arrive(shared.V_empty[V_ring.stage]);
        V_ring.advance();
      };

      auto visit_tile = [&](auto is_own, auto is_last_of_key_block) {
        constexpr bool MAPS_NEXT = decltype(is_last_of_key_block)::value;
        constexpr bool IS_FOLDED = FOLD_REFERENCE && !decltype(is_own)::value;
        // ---- start S = Q K^T of this tile and, behind it, O += P V of the one before ----
        start_scores_of(is_own);
        barrier_wait(shared.V_full[V_ring.stage], V_ring.parity);
        start_values(O_rmem, P_rmem, V_smem + V_ring.stage * V_STAGE);
#if KEY_MAPS
        float C_rmem[MAPS_NEXT ? R / 2 : 1];
        if constexpr (MAPS_NEXT) {
          barrier_wait(shared.Z_full, Z_ring.parity);
          start_map(C_rmem, Q_smem, Z_smem);
        }
#endif

        // ---- P = exp(S - reference), while P V of the tile before is running ----
        wgmma_wait<MAPS_NEXT ? 2 : 1>();
        pin(S_rmem);
        if (is_speaker) barrier_arrive(shared.K_empty[K_ring.stage]);
        K_ring.advance();
        // K of the next tile has mostly arrived. Asked here, the answer is there behind the exponentials.
        const bool is_next_K_full = barrier_is_over(shared.K_full[K_ring.stage], K_ring.parity);
        bool is_at_edge = CAUSAL && tile >= whole_tiles_end;
#if OWN_BLOCK
        is_at_edge |= decltype(is_own)::value && tile < own_tiles_begin;
#endif
        if (is_at_edge) {
          hide_edge(is_own, S_rmem, tile);
          is_moved = softmax.step_by_maximum(S_rmem, score_scale_of(is_own), IS_FOLDED, false);
        } else {
          is_moved = softmax.step_by_sum<IS_FOLDED>(S_rmem, score_scale_of(is_own));
        }
        pin(S_rmem);
        // This branch also keeps ptxas from moving the wait for P V in front of the exponentials, which are to run
        // beside P V.
        if (!is_next_K_full && tile > (decltype(is_own)::value ? keys.own_begin : 0))
          barrier_wait(shared.K_full[K_ring.stage], K_ring.parity);

        // ---- O is complete up to the tile before: rescale it to the new reference ----
        wgmma_wait<0>();
        pin(O_rmem);
        pin(P_rmem);
        if (is_speaker) barrier_arrive(shared.V_empty[V_ring.stage]);
        V_ring.advance();
        pack_operands(P_rmem, S_rmem);

#if KEY_MAPS
        if constexpr (MAPS_NEXT) {
          if (is_speaker) barrier_arrive(shared.Z_empty);
          Z_ring.advance();
          finish_map(QZ, C_rmem, scale_log2);
        }
#endif
        if (is_moved) rescale_values();
#if FOLD_REFERENCE
        if (IS_FOLDED && (is_moved || MAPS_NEXT)) softmax.fold(QZ);
#endif
        --tile;
      };

      // ---- the tiles, from the last one down ----
      barrier_wait(shared.Q_full, Q_ring.parity);
#if RAGGED
      if (QUERIES < BLOCK_Q) clear_rows<Q_WIDTH, BLOCK_Q, WARPGROUP, CONSUMER_THREADS>(shared.Q, QUERIES);
#endif
#if OWN_BLOCK
      begin_visits(Bool<true>(), tile--);
      clear_other_values(tile + 1);
      if (follows_maximum) {
#pragma unroll 1
        while (tile >= keys.own_begin) {
          end_visits();
          begin_visits(Bool<true>(), tile--);
        }
      } else {
        if (tile >= keys.own_begin) barrier_wait(shared.K_full[K_ring.stage], K_ring.parity);
#pragma unroll 1
        while (tile >= keys.own_begin) visit_tile(Bool<true>(), Bool<false>());
      }
      end_visits();
      tile = keys.mapped_end - 1;
      whole_tiles_end = min(own_begin_of(first_row), M - 1) / BLOCK_KV;
      barrier_wait(shared.mean_scores_full, Q_ring.parity);
      {
        const float* const mean_scores = shared.mean_scores + consumer * CONSUMER_ROWS + row_of_lane();
        softmax.lower_scores(mean_scores[0], mean_scores[8], scale_log2, follows_maximum);
        if (FOLD_REFERENCE) rescale_values();
      }
#endif
      if (!OWN_BLOCK || tile >= 0) {
#if KEY_MAPS
        map_queries();
        auto map_next_block = [&] {  // of the tile above, the first of its block
          if (tile >= 0 && (tile + 1) % tiles_per_key_block() == 0) map_queries();
        };
#else
        auto map_next_block = [] {};
#endif
        begin_visits(Bool<false>(), tile--);
        clear_other_values(tile + 1);
        if (follows_maximum) {
#pragma unroll 1
          while (tile >= 0) {
            end_visits();
            map_next_block();
            begin_visits(Bool<false>(), tile--);
          }
        } else {
          map_next_block();
#if FOLD_REFERENCE
          softmax.fold(QZ);
#endif
          if (tile >= 0) barrier_wait(shared.K_full[K_ring.stage], K_ring.parity);
#if KEY_MAPS
#pragma unroll 1
          while (tile >= 0) {
            const int last_of_key_block = tile - tile % tiles_per_key_block();
#pragma unroll 1
            while (tile > last_of_key_block) visit_tile(Bool<false>(), Bool<false>());
            if (MAP_AHEAD && last_of_key_block > 0) {
              visit_tile(Bool<false>(), Bool<true>());
            } else {
              visit_tile(Bool<false>(), Bool<false>());
              if (last_of_key_block > 0) {
                map_queries();
#if FOLD_REFERENCE
                softmax.fold(QZ);
#endif
              }
            }
          }
#else
#pragma unroll 1
          while (tile >= 0) visit_tile(Bool<false>(), Bool<false>());
#endif
        }
        end_visits();
      }

      if (is_speaker) barrier_arrive(shared.Q_empty);

      // ---- O / row_sum and lse, rows n < query_end ----
      int done_round = round;
      asm volatile("" : "+r"(done_round));  // or what follows from it takes registers of the main loop
      const WorkItem done = find_position(done_round);
#if KEY_MAPS
      if (mean) barrier_wait(shared.mean_scores_full, Q_ring.parity);
#endif
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float sum = softmax.row_sum[i];
        sum += __shfl_xor_sync(~0u, sum, 1);
        sum += __shfl_xor_sync(~0u, sum, 2);

        const int place = consumer * CONSUMER_ROWS + row_of_lane() + 8 * i, lane = thread_index_anew() % WARP_SIZE;
        const int n = done.query_begin + place;
        if (n >= done.query_end) continue;
#if SPLITS_KEYS
        if (done.split >= 0) {
          const long long row = ((long long)done.b * H + done.h) * N + n - first_split_row;
          const long long part = (long long)done.split * split_rows + row;
#pragma unroll
          for (int t = 0; t < E / 8; ++t)
            *reinterpret_cast<float2*>(partial_O + part * E + 8 * t + lane % 4 * 2) =
                make_float2(O_rmem[4 * t + 2 * i], O_rmem[4 * t + 2 * i + 1]);
          if (lane % 4 == 0)
            *reinterpret_cast<float2*>(partial_stats + 2 * part) = make_float2(softmax.finite_reference(i), sum);
          continue;
        }
#endif
        const float inverse = __fdividef(1.0f, sum);
        element_t* const O_row = O + done.b * stride_o_b + done.h * stride_o_h + n * stride_o_n;
#pragma unroll
        for (int t = 0; t < E / 8; ++t) {
          const float* const pair = O_rmem + 4 * t + 2 * i;
          const unsigned packed = pack(pair[0] * inverse, pair[1] * inverse);
          *reinterpret_cast<unsigned*>(O_row + 8 * t + lane % 4 * 2) = sum == 0.0f ? 0 : packed;
        }
        float shift = softmax.finite_reference(i) * score_scale_of(Bool<false>());  // powers of two
#if KEY_MAPS
        if (mean) shift += shared.mean_scores[place] * scale_log2;
#endif
        if (lane % 4 == 0) lse[((long long)done.b * H + done.h) * N + n] = LN_2 * (shift + __log2f(sum));
      }
#if KEY_MAPS
      __syncwarp();
      if (thread_index_anew() % WARP_SIZE == 0) barrier_arrive(shared.mean_scores_empty);
#endif
      if (softmax.is_lost) atomicOr(&shared.lost_rounds, 1u << done_round);
      Q_ring.advance();
    });
  }
}
