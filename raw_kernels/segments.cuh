// segments.cuh - rows cut into segments, whose sums are made apart: in a causal call every block meets other rows.
//
// Segment s of S holds the rows from edge(s) to edge(s + 1) - 1, where
//
//   edge(s) = min(max(s * rows + shift, lower), upper),   edge(0) = lower,   edge(S) = upper
//
// RAGGED: there is a segment for every piece of sequences.cuh, pieces of `rows` rows of the side that is cut into blocks.
// Those of a sequence share its rows: those of the pieces themselves (OWN), or those of the other side in equal parts
// (ALL), or as they meet the blocks one after another, `offset` from the diagonal (UP_TO, FROM).

#pragma once
#include "sequences.cuh"

#define OWN 0
#define ALL 1
#define UP_TO 2
#define FROM 3

#if RAGGED
// Part i of `parts` equal ones.
__device__ __forceinline__ RowRange equal_part(int rows, int i, int parts) {
  const int size = rows / parts + (rows % parts > 0);
  return {min(i * size, rows), min((i + 1) * size, rows)};
}

struct Segments {
  const Piece* pieces;
  int rows, offset, direction;

  __device__ __forceinline__ RowRange range(int s) const {
    const Piece piece = pieces[s];
    if (piece.rows == 0) return {0, 0};
    const int parts = pieces_of_sequence(piece, rows), first = piece.index * rows;
    if (direction == OWN) return {piece.begin + first, piece.begin + min(first + rows, piece.rows)};
    RowRange range = {};
    if (direction == ALL) {
      range = equal_part(piece.other_rows, piece.index, parts);
    } else {
      // of queries, blocks see keys up to a limit; of keys, queries from one on
      const int shift = direction == UP_TO ? offset + piece.diagonal : -(offset + piece.diagonal);
      const bool is_first = piece.index == 0, is_last = piece.index == parts - 1;
      const int upper = direction == UP_TO ? min(max(piece.rows + shift, 0), piece.other_rows) : piece.other_rows;
      const int lower = direction == UP_TO ? 0 : min(max(shift, 0), piece.other_rows);
      range.begin = is_first ? lower : min(max(first + shift, lower), upper);
      range.end = is_last ? upper : min(max(first + rows + shift, lower), upper);
    }
    return {piece.other_begin + range.begin, piece.other_begin + range.end};
  }
};

// Of the keys of a sequence those that their mean is taken of (eq. 12), cut into pieces of `rows` keys: every step-th, and
// their parts are counted in steps from the first.
struct SampledKeys {
  const Piece* pieces;
  int rows;

  __device__ __forceinline__ int step(int s) const { return max(pieces[s].rows / 2048, 1); }
  __device__ __forceinline__ int count(int s) const { return (pieces[s].rows + step(s) - 1) / step(s); }
  __device__ __forceinline__ RowRange range(int s) const {
    const Piece piece = pieces[s];
    return piece.rows == 0 ? RowRange{0, 0} : equal_part(count(s), piece.index, pieces_of_sequence(piece, rows));
  }
};
#else
struct Segments {
  int S, rows, shift, lower, upper;

  __device__ __forceinline__ int edge(int s) const {
    if (s == 0) return lower;
    if (s == S) return upper;
    const long long row = static_cast<long long>(s) * rows + shift;
    return row < lower ? lower : row > upper ? upper : static_cast<int>(row);
  }
  __device__ __forceinline__ RowRange range(int s) const { return {edge(s), edge(s + 1)}; }
};
#endif
