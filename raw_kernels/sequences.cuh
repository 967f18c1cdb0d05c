// sequences.cuh - packed sequences (docs/math.md, eq. 29): where the rows lie that a thread block works on.
//
// RAGGED: rows of sequences of lengths of their own lie one after another, in arrays of batch 1. The rows of one side
// are cut into pieces of `step` rows that begin with the first row of each sequence; nothing reaches across two. The
// host does not know how many there are, only that  rows / step + sequences  are enough: so many are launched, and those
// that do not exist have no rows. cut_sequences.cu writes the pieces, once for all kernels that need them.
//
// Without RAGGED nothing of this is left in a kernel: every sequence is a whole head, and `pieces` is empty.
#pragma once

#ifndef RAGGED
#define RAGGED 0
#endif

struct alignas(16) Piece {
  int sequence, index;          // index: of the piece in its sequence
  int begin, rows;              // of the sequence, on the side that is cut: its first row in the array, its length
  int other_begin, other_rows;  // on the other side
  int other_first;              // the sequence's first piece where the other side is cut
  int diagonal;                 // query n of the sequence sees causally its keys m <= n + diagonal
};

#if RAGGED
typedef const Piece* Pieces;  // a kernel's argument `pieces`
#else
enum Pieces { pieces };
#endif

struct RowRange {
  int begin, end;
};

#if RAGGED
// How many pieces of `rows` rows its sequence has.
__device__ __forceinline__ int pieces_of_sequence(const Piece& piece, int rows) {
  return piece.rows / rows + (piece.rows % rows > 0);
}
#endif

// Rows of block c of the side that is cut into blocks of `block_rows`, of the `rows` of a head; RAGGED: of piece c.
__device__ __forceinline__ RowRange rows_of_block(Pieces pieces, int c, int block_rows, int rows) {
#if RAGGED
  const Piece piece = pieces[c];
  const int first = piece.index * block_rows;
  return {piece.begin + first, piece.begin + min(first + block_rows, piece.rows)};
#else
  const int begin = c * block_rows;
  return {begin, begin + min(block_rows, rows - begin)};
#endif
}

// Of the `rows` of a head on the other side, those that no row of block c is after: up to the last that a row below
// x_rows sees, row x seeing rows up to x + offset; RAGGED: of the sequence of piece c, offset from its diagonal.
__device__ __forceinline__ RowRange rows_seen_by_block(Pieces pieces, int c, int block_rows, int x_rows, int rows,
                                                       int offset) {
  const RowRange block = rows_of_block(pieces, c, block_rows, x_rows);
#if RAGGED
  const Piece piece = pieces[c];
  const long long seen = block.end - piece.begin + 0LL + offset + piece.diagonal;
  return {piece.other_begin,
          piece.other_begin + static_cast<int>(max(0LL, min(static_cast<long long>(piece.other_rows), seen)))};
#else
  return {0, static_cast<int>(min(static_cast<long long>(rows), block.end + 0LL + offset))};
#endif
}

// Where row h of H is, in an array that has them for each batch, or, RAGGED, for the sequence of piece p.
__device__ __forceinline__ long long sequence_row(Pieces pieces, int p, int b, int h, int H) {
#if RAGGED
  b = max(pieces[p].sequence, 0);
#endif
  return static_cast<long long>(b) * H + h;
}
