// segments.cuh - rows cut into segments, whose sums are made apart: in a causal call every block meets other rows.
//
// Segment s of S holds the rows from edge(s) to edge(s + 1) - 1, where
//
//   edge(s) = min(max(s * rows + shift, lower), upper),   edge(0) = lower,   edge(S) = upper

#pragma once

struct Segments {
  int S, rows, shift, lower, upper;

  __device__ __forceinline__ int edge(int s) const {
    if (s == 0) return lower;
    if (s == S) return upper;
    const long long row = static_cast<long long>(s) * rows + shift;
    return row < lower ? lower : row > upper ? upper : static_cast<int>(row);
  }
};
