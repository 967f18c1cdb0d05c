// element.cuh - the type of the elements of Q, K, V and O, and the type that their sums are kept in.
//
// 16-bit values travel as unsigned short and are converted by PTX: no CUDA header is needed, so NVRTC compiles the
// kernels without include paths.

#pragma once

#define FLOAT16 1
#define BFLOAT16 2
#define FLOAT32 3
#define FLOAT64 4

#ifndef ELEMENT
#define ELEMENT FLOAT16
#endif
static_assert(ELEMENT >= FLOAT16 && ELEMENT <= FLOAT64, "ELEMENT is FLOAT16, BFLOAT16, FLOAT32 or FLOAT64");

#if ELEMENT == FLOAT64
typedef double element_t;
typedef double accumulate_t;
#elif ELEMENT == FLOAT32
typedef float element_t;
typedef float accumulate_t;
#else
typedef unsigned short element_t;
typedef float accumulate_t;
#endif

// COUNT neighbouring elements that are loaded or stored at once.
template <int COUNT>
struct alignas(COUNT * sizeof(element_t)) Elements {
  element_t at[COUNT];
};

__device__ __forceinline__ accumulate_t to_accumulate(element_t x) {
#if ELEMENT == FLOAT16
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(x));
  return wide;
#elif ELEMENT == BFLOAT16
  return __uint_as_float(static_cast<unsigned>(x) << 16);
#else
  return x;
#endif
}

// Rounds to nearest, ties to even.
__device__ __forceinline__ element_t to_element(accumulate_t x) {
#if ELEMENT == FLOAT16
  element_t narrow;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(narrow) : "f"(x));
  return narrow;
#elif ELEMENT == BFLOAT16 && __CUDA_ARCH__ >= 800
  element_t narrow;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(narrow) : "f"(x));
  return narrow;
#elif ELEMENT == BFLOAT16
  // no such instruction before sm_80: add half of the last kept bit, less one where that bit is even
  const unsigned bits = __float_as_uint(x);
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  return is_nan ? 0x7fff : static_cast<element_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
#else
  return x;
#endif
}

// As a function: NVRTC before 13.5 has no constant expression for it.
__device__ __forceinline__ float minus_infinity() { return __int_as_float(0xff800000); }
