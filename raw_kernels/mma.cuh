// mma.cuh - the warp-level instructions of sm_80 that the tensor-core kernels are made of, as functions.
// Older devices have the copies and the reductions too, in other instructions.
//
// Fragment maps (PTX ISA, "Matrix fragments for mma.m16n8k16"), lane = 4 * group + member:
//   C, D : [0], [1] are row group, columns 2 member and 2 member + 1; [2], [3] the same columns of row group + 8
//   A    : two neighbouring 16-bit columns a register; rows group, group + 8, then the same eight columns on
//   B    : two neighbouring rows (of K) a register, column group; then eight rows on
// So two accumulator tiles side by side, packed to 16 bits, are the A fragment of a following product.
#pragma once
#include "element.cuh"

constexpr int WARP_SIZE = 32;

// threadIdx.x, hidden from the compiler so that it does not keep what follows from it in registers of the main loop.
__device__ inline int thread_index_anew() {
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
}

__device__ inline unsigned shared_address(const void* pointer) {
  return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}

__device__ inline void prefetch_to_l2(const void* global) { asm volatile("prefetch.global.L2 [%0];" ::"l"(global)); }

#if __CUDA_ARCH__ >= 800
// Copies 16 bytes from global to shared memory in the background, or writes 16 zero bytes.
__device__ inline void copy_async_or_zero(void* shared, const void* global, bool is_valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
               "r"(is_valid ? 16 : 0)
               : "memory");
}

__device__ inline void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most LEFT of the groups that this thread committed are on their way.
template <int LEFT>
__device__ inline void copy_async_wait_all_but() {
  asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
}

__device__ inline void copy_async_wait_all() { copy_async_wait_all_but<0>(); }

// The largest of the warp's numbers.
__device__ inline unsigned max_of_warp(unsigned x) { return __reduce_max_sync(~0u, x); }
#else
__device__ inline void copy_async_or_zero(void* shared, const void* global, bool is_valid) {
  const uint4 zeros = make_uint4(0, 0, 0, 0);
  *static_cast<uint4*>(shared) = is_valid ? *static_cast<const uint4*>(global) : zeros;
}

__device__ inline void copy_async_commit() {}

template <int LEFT>
__device__ inline void copy_async_wait_all_but() {}

__device__ inline void copy_async_wait_all() {}

__device__ inline unsigned max_of_warp(unsigned x) {
  for (int lanes = WARP_SIZE / 2; lanes > 0; lanes /= 2) x = max(x, __shfl_xor_sync(~0u, x, lanes));
  return x;
}
#endif

__device__ inline unsigned long long max_of_warp(unsigned long long x) {
  for (int lanes = WARP_SIZE / 2; lanes > 0; lanes /= 2) x = max(x, __shfl_xor_sync(~0u, x, lanes));
  return x;
}

// Loads four 8 x 8 matrices of 16-bit elements; lanes 8 i to 8 i + 7 give the row addresses of matrix i.
__device__ inline void load_matrices(unsigned (&fragment)[4], unsigned row_address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
               : "r"(row_address)
               : "memory");
}

// The same, each matrix transposed.
__device__ inline void load_matrices_transposed(unsigned (&fragment)[4], unsigned row_address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
               : "r"(row_address)
               : "memory");
}

#if ELEMENT == BFLOAT16
#define MMA_OPERANDS "bf16.bf16"
#define PACK_OPERANDS "bf16x2"
#else
#define MMA_OPERANDS "f16.f16"
#define PACK_OPERANDS "f16x2"
#endif

// accumulator [16, 8] += A [16, 16] B [16, 8]
__device__ inline void multiply_add(float (&accumulator)[4], const unsigned (&a)[4], unsigned b_low, unsigned b_high) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." MMA_OPERANDS
               ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(accumulator[0]), "+f"(accumulator[1]), "+f"(accumulator[2]), "+f"(accumulator[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b_low), "r"(b_high));
}

#if __CUDA_ARCH__ >= 800
// accumulator [16, 8] += A [16, 8] B [8, 8], of whose numbers the upper 19 bits count. Lane = 4 * group + member holds
//   A : rows group and group + 8 of column member, then of column member + 4
//   B : rows member and member + 4 of column group
__device__ inline void multiply_add(float (&accumulator)[4], const float (&a)[4], const float (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(accumulator[0]), "+f"(accumulator[1]), "+f"(accumulator[2]), "+f"(accumulator[3])
               : "r"(__float_as_uint(a[0])), "r"(__float_as_uint(a[1])), "r"(__float_as_uint(a[2])),
                 "r"(__float_as_uint(a[3])), "r"(__float_as_uint(b[0])), "r"(__float_as_uint(b[1])));
}
#endif

// Two floats as two 16-bit elements of one register, the first in the low half.
__device__ inline unsigned pack(float low, float high) {
  unsigned packed;
  asm("cvt.rn." PACK_OPERANDS ".f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

// 2^x
__device__ inline float exp2_approximate(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}
