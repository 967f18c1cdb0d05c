// sum_segments.cu - adds up what was summed segment by segment: over all segments, or over those that meet each block.
//
//   out_c = factor * sum over the segments s that meet block c of sums_s         docs/math.md (eq. 11, 12)
//
// Block c is made of the segments c * segments_per_block and on. DIRECTION says which of all segments meet it:
//   OWN  : those that it is made of
//   ALL  : every one; there is one result, not one for each block
//   UP_TO: its own and those before, as keys that a block of queries sees in a causal call
//   FROM : its own and those behind, as queries that see a block of keys
//
// Launcher  : distrattn_np/backends/cupy_backend.py      Tests : tests/agreement/test_gpu_subspace.py
//
// RAGGED: there is a segment for every piece (segments.cuh), segments_per_block is 1, and all of this holds within a
// sequence. Where DIRECTION is ALL the results are [B, H, width], B counting sequences, and with TO_ELEMENT means: of the
// keys that SampledKeys has.
//
// Grid      : (B * H * ceil_div(width, THREADS)), places in a row of sums fastest; RAGGED: H * S in the place of B * H
// Block     : THREADS, one number of the sum each
// Assumes   : segments_per_block divides S. Sums run in float32 (float64 for float64), in the order of the segments
//             (FROM: backwards). TO_ELEMENT: the results are rounded to the element type
// Alone     : nvcc -cubin -arch=sm_80 raw_kernels/sum_segments.cu

#include "element.cuh"
#include "segments.cuh"

// ---- the launcher sets these with -D; the defaults let the file compile alone ----
#ifndef DIRECTION
#define DIRECTION ALL
#endif
#ifndef TO_ELEMENT
#define TO_ELEMENT 0
#endif
#ifndef THREADS
#define THREADS 128
#endif
constexpr int SEGMENTS_AT_ONCE = 16;  // loads of a thread that are on their way together
static_assert(DIRECTION >= OWN && DIRECTION <= FROM, "DIRECTION is OWN, ALL, UP_TO or FROM");

extern "C" __global__ __launch_bounds__(THREADS)
void sum_segments(const accumulate_t* __restrict__ sums,  // [B * H, S, width]
                  accumulate_t* __restrict__ out,         // [B * H, C, width], C = S / segments_per_block; ALL: C = 1
                  int S, int width, int segments_per_block, accumulate_t factor
#if RAGGED
                  ,
                  const Piece* __restrict__ pieces,  // [S]
                  int piece_rows, int H
#endif
) {
  const int blocks_per_head = (width + THREADS - 1) / THREADS, head = blockIdx.x / blocks_per_head;
  const int i = blockIdx.x % blocks_per_head * THREADS + threadIdx.x;
  if (i >= width) return;
#if RAGGED
  const int p = head % S, h = head / S;
  if (pieces[p].rows == 0 || pieces[p].index > 0) return;
  const long long first_sum = head, first_result = DIRECTION == ALL ? sequence_row(pieces, p, 0, h, H) : head;
  S = pieces_of_sequence(pieces[p], piece_rows);
  if (TO_ELEMENT) factor /= SampledKeys{pieces, piece_rows}.count(p);
#else
  const long long first_sum = static_cast<long long>(head) * S;
  const long long first_result = static_cast<long long>(head) * (DIRECTION == ALL ? 1 : S / segments_per_block);
#endif
  const accumulate_t* const column = sums + first_sum * width + i;
  accumulate_t* const result = out + first_result * width + i;
  accumulate_t sum = 0;
#pragma unroll 1
  for (int first = 0; first < S; first += SEGMENTS_AT_ONCE) {
    accumulate_t next[SEGMENTS_AT_ONCE];
#pragma unroll
    for (int i = 0; i < SEGMENTS_AT_ONCE; ++i) {
      const int step = min(first + i, S - 1), s = DIRECTION == FROM ? S - 1 - step : step;
      next[i] = column[static_cast<long long>(s) * width];
    }
#pragma unroll
    for (int i = 0; i < SEGMENTS_AT_ONCE; ++i) {
      const int step = first + i, s = DIRECTION == FROM ? S - 1 - step : step;
      if (step >= S) break;
      const int place = s % segments_per_block;  // within its block
      if (DIRECTION == OWN && place == 0) sum = 0;
      sum += next[i];
      const bool is_complete = DIRECTION == ALL    ? step == S - 1
                               : DIRECTION == FROM ? place == 0
                                                   : place == segments_per_block - 1;
      if (is_complete) {
        const accumulate_t scaled = factor * sum;
        const int c = DIRECTION == ALL ? 0 : s / segments_per_block;
        result[static_cast<long long>(c) * width] = TO_ELEMENT ? to_accumulate(to_element(scaled)) : scaled;
      }
    }
  }
}
