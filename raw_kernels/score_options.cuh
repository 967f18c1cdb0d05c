// score_options.cuh - what happens to scaled scores before the softmax: cap, bias, mask (docs/math.md, eq. 21 to 24).
//
// The launcher switches on what a call has; where it has nothing, a forward's machine code is the same as without this.
#pragma once
#include "element.cuh"

#ifndef WINDOW
#define WINDOW 0  // 1: query n sees no key before n + window_offset
#endif
#ifndef SOFTCAP
#define SOFTCAP 0
#endif
#ifndef BIAS
#define BIAS 0  // 1: in the type of the elements, 2: in float
#endif
#ifndef MASK
#define MASK 0
#endif
static_assert(BIAS >= 0 && BIAS <= 2, "BIAS is 0, 1 or 2");
constexpr bool CHANGES_SCORES = SOFTCAP || BIAS || MASK;

typedef unsigned char mask_t;  // a bool: true where a query may attend
#if BIAS == 2
typedef float bias_t;
#else
typedef element_t bias_t;
#endif

// What broadcasts to [B, H, N, M], as a kernel argument: the stride of an axis that repeats is zero.
template <class T>
struct Table {
  const T* start;
  long long stride_b, stride_h, stride_n, stride_m;

  __device__ __forceinline__ const T* row(int b, int h, int n) const {
    return start + b * stride_b + h * stride_h + n * stride_n;
  }
};

__device__ __forceinline__ accumulate_t bias_to_accumulate(bias_t x) {
#if BIAS == 2
  return x;
#else
  return to_accumulate(x);
#endif
}
