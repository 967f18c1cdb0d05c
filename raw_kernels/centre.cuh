// centre.cuh - subtracting the key mean from 16-bit operands of tensor-core products, two at a time.
//
// The difference of two 16-bit numbers may be out of range, half of it is not: operands are halved, and whoever uses
// them puts the factor back in float32.
#pragma once
#include "mma.cuh"

#if ELEMENT == BFLOAT16
#define PAIR_OF_HALVES 0x3f003f00u  // 0.5, 0.5
#define PAIR_TYPE "bf16x2"
#else
#define PAIR_OF_HALVES 0x38003800u
#define PAIR_TYPE "f16x2"
#endif

// x / 2 + y of both elements of a register, rounded once.
__device__ inline unsigned add_to_half(unsigned x, unsigned y) {
  unsigned result;
  asm("fma.rn." PAIR_TYPE " %0, %1, %2, %3;" : "=r"(result) : "r"(x), "r"(PAIR_OF_HALVES), "r"(y));
  return result;
}
