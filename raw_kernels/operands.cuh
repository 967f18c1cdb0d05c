// operands.cuh - 16-bit operands of tensor-core products, made from numbers that may be out of their range.
#pragma once
#include "mma.cuh"

#if ELEMENT == BFLOAT16
#define PAIR_TYPE "bf16x2"
constexpr unsigned PAIR_OF_HALVES = 0x3f003f00u;  // 0.5, 0.5
#else
#define PAIR_TYPE "f16x2"
constexpr unsigned PAIR_OF_HALVES = 0x38003800u;
#endif

// x / 2 + y for both elements of a register, rounded once. The difference of two 16-bit numbers may be out of range,
// half of it is not: what is centred is halved, and whoever uses it puts the factor back in float32.
__device__ inline unsigned add_to_half(unsigned x, unsigned y) {
  unsigned result;
  asm("fma.rn." PAIR_TYPE " %0, %1, %2, %3;" : "=r"(result) : "r"(x), "r"(PAIR_OF_HALVES), "r"(y));
  return result;
}

// The nearest number that 16 bits hold as a finite one; NaN stays.
__device__ inline float limit_to_element(float x) {
#if ELEMENT == FLOAT16
  constexpr float LARGEST = 65504.0f;
  return x > LARGEST ? LARGEST : x < -LARGEST ? -LARGEST : x;
#else
  return x;
#endif
}
