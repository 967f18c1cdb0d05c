// hopper.cuh - the instructions of sm_90a that the Hopper kernels are made of, as functions.
//
// A warpgroup is four neighbouring warps, the first a multiple of four. Its products (wgmma) take 64 rows of A, 16 a
// warp, and run in the background: fence, issue, commit, then wait before the registers are touched again. Operands in
// shared memory are *panels*: a tile [rows, width] is cut along its contiguous axis into panels [rows, 64, 32 or 16
// columns] that follow each other, each swizzled as wide as its rows (128, 64 or 32 bytes) by the copy engine.
#pragma once
#include "mma.cuh"  // shared_address, pack, exp2_approximate, MMA_OPERANDS

// ---- tiles and how they lie in shared memory ----

template <int WIDTH>
struct Panels {
  static constexpr int COLUMNS = WIDTH % 64 == 0 ? 64 : WIDTH % 32 == 0 ? 32 : 16;
  static constexpr int COUNT = WIDTH / COLUMNS;
  static constexpr int ROW_BYTES = 2 * COLUMNS;
  static_assert(WIDTH % COLUMNS == 0, "a tile is a multiple of 16 elements wide");
};

// Where element (row, column) of a tile [ROWS, WIDTH] lies, in elements from its start. The swizzle moves 16 bytes.
template <int WIDTH, int ROWS>
__device__ __forceinline__ int swizzled_place(int row, int column) {
  constexpr int COLUMNS = Panels<WIDTH>::COLUMNS, ROW_BYTES = Panels<WIDTH>::ROW_BYTES;
  const int byte = row * ROW_BYTES + column % COLUMNS * 2;
  return column / COLUMNS * ROWS * COLUMNS + (byte ^ (byte >> 7 & (ROW_BYTES / 16 - 1)) << 4) / 2;
}

constexpr int SWIZZLE_ALIGNMENT = 1024;  // the swizzle is a function of the address: tiles start at multiples of this
constexpr int MMA_DEPTH = 16;            // inner length of one wgmma of 16-bit elements

// What wgmma knows of an operand in shared memory (PTX ISA, "Matrix descriptor format"): start address, distance
// between panels, distance between groups of eight rows, all in units of 16 bytes, and the swizzle.
using Descriptor = unsigned long long;

template <int WIDTH>
__device__ __forceinline__ Descriptor describe(const void* tile, int panel_distance) {
  constexpr int ROW_BYTES = Panels<WIDTH>::ROW_BYTES;
  constexpr Descriptor SWIZZLE = ROW_BYTES == 128 ? 1 : ROW_BYTES == 64 ? 2 : 3;
  return (shared_address(tile) & 0x3FFFF) >> 4 | Descriptor(panel_distance >> 4) << 16 |
         Descriptor(8 * ROW_BYTES >> 4) << 32 | SWIZZLE << 62;
}

// A tile [rows, WIDTH] whose columns are the inner dimension of the product. One wgmma stays within a panel, so the
// distance between panels does not matter; step k begins `inner_step` further on.
template <int WIDTH>
__device__ __forceinline__ Descriptor describe_inner_columns(const void* tile) {
  return describe<WIDTH>(tile, 16);
}

template <int WIDTH, int ROWS>
__device__ constexpr Descriptor inner_step(int k) {
  constexpr int ROW_BYTES = Panels<WIDTH>::ROW_BYTES;
  const int column_bytes = 2 * MMA_DEPTH * k;
  return (column_bytes / ROW_BYTES * ROWS * ROW_BYTES + column_bytes % ROW_BYTES) >> 4;
}

// A tile [ROWS, WIDTH] whose rows are the inner dimension. One wgmma spans all panels; step k begins 16 rows on.
template <int WIDTH, int ROWS>
__device__ __forceinline__ Descriptor describe_inner_rows(const void* tile) {
  return describe<WIDTH>(tile, ROWS * Panels<WIDTH>::ROW_BYTES);
}

template <int WIDTH>
__device__ constexpr Descriptor inner_row_step(int k) {
  return k * MMA_DEPTH * Panels<WIDTH>::ROW_BYTES >> 4;
}

// ---- barriers in shared memory ----

// A barrier is passed in phases, numbered from 0; a wait names the parity of the phase whose end it waits for. Before
// the first phase ends, a wait for parity 1 passes.
using Barrier = unsigned long long;

__device__ __forceinline__ void barrier_init(Barrier& barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&barrier)), "r"(arrivals) : "memory");
}

// Makes initialised barriers visible to the copy engine; the other threads still need a __syncthreads.
__device__ __forceinline__ void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;" ::: "memory");
}

__device__ __forceinline__ void barrier_arrive(Barrier& barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(&barrier)) : "memory");
}

// Arrives, and holds the phase open until that many bytes have been copied.
__device__ __forceinline__ void barrier_expect(Barrier& barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&barrier)), "r"(bytes)
               : "memory");
}

// Whether a phase has ended: `barrier_is_over` says so at once, `barrier_sleep` when it has or after a while.
#define DEFINE_BARRIER_QUESTION(NAME, KIND)                                                            \
  __device__ __forceinline__ bool NAME(Barrier& barrier, unsigned parity) {                            \
    unsigned is_over;                                                                                  \
    asm volatile("{\n.reg .pred is_over;\nmbarrier." KIND                                              \
                 ".parity.shared::cta.b64 is_over, [%1], %2;\nselp.u32 %0, 1, 0, is_over;\n}"          \
                 : "=r"(is_over)                                                                       \
                 : "r"(shared_address(&barrier)), "r"(parity)                                          \
                 : "memory");                                                                          \
    return is_over;                                                                                    \
  }
DEFINE_BARRIER_QUESTION(barrier_is_over, "test_wait")
DEFINE_BARRIER_QUESTION(barrier_sleep, "try_wait")

// Waits for the end of a phase. A correct kernel never runs out of attempts; the bound turns a hang into a wrong
// result. It does not trap: with a trap ptxas serialises the kernel's products.
__device__ __forceinline__ void barrier_wait(Barrier& barrier, unsigned parity) {
  constexpr int MAX_ATTEMPTS = 1 << 18;
#pragma unroll 1
  for (int attempt = 0; attempt < MAX_ATTEMPTS; ++attempt)
    if (barrier_sleep(barrier, parity)) break;
}

// The place in a ring of buffers, each with a barrier for full and one for empty. Whoever empties buffers waits for
// `parity` of full; whoever fills them waits for `parity ^ 1` of empty.
template <int BUFFERS>
struct Ring {
  unsigned stage = 0;
  unsigned parity = 0;

  __device__ __forceinline__ void advance() {
    if (++stage == BUFFERS) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// ---- the copy engine ----

// A CUtensorMap, passed by value as a __grid_constant__ parameter.
struct alignas(64) TensorMap {
  unsigned char bytes[128];
};

// Copies a tile [ROWS, WIDTH] of a 4-D tensor into panels; `filled` ends its phase when all of it has arrived. Rows and
// columns outside the tensor are filled with zeros. One thread calls this.
template <int WIDTH, int ROWS>
__device__ __forceinline__ void copy_tile(void* tile, const TensorMap& map, Barrier& filled, int row, int head,
                                          int batch) {
  using P = Panels<WIDTH>;
  barrier_expect(filled, P::COUNT * ROWS * P::ROW_BYTES);
#pragma unroll
  for (int panel = 0; panel < P::COUNT; ++panel) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(shared_address(tile) + panel * ROWS * P::ROW_BYTES),
        "l"(&map), "r"(shared_address(&filled)), "r"(panel * P::COLUMNS), "r"(row), "r"(head), "r"(batch)
        : "memory");
  }
}

// Sets the rows of a tile that has arrived from `valid` on to zero, for products that come behind. All THREADS threads
// from FIRST_THREAD on call this.
template <int WIDTH, int ROWS, int FIRST_THREAD, int THREADS>
__device__ __forceinline__ void clear_rows(element_t* tile, int valid) {
  using P = Panels<WIDTH>;
  constexpr int CHUNK = 8;  // elements of 16 bytes
  const int left = (ROWS - valid) * P::COLUMNS / CHUNK;  // chunks of a panel; the swizzle keeps a row in its place
  for (int i = threadIdx.x - FIRST_THREAD; i < P::COUNT * left; i += THREADS)
    *reinterpret_cast<uint4*>(tile + (i / left * ROWS + valid) * P::COLUMNS + i % left * CHUNK) =
        make_uint4(0, 0, 0, 0);
  asm volatile("fence.proxy.async.shared::cta;\nbar.sync 1, %0;" ::"n"(THREADS) : "memory");
}

// ---- warpgroups ----

template <int REGISTERS>
__device__ __forceinline__ void give_up_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

template <int REGISTERS>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

// ---- products of a warpgroup ----

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most PENDING committed groups are still running.
template <int PENDING>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// The compiler does not know that a product uses its registers after the instruction has been issued. Pinned before the
// issue and after the wait, they are neither moved nor computed across.
template <int COUNT>
__device__ __forceinline__ void pin(float (&registers)[COUNT]) {
#pragma unroll
  for (int i = 0; i < COUNT; ++i) asm volatile("" : "+f"(registers[i])::"memory");
}

template <int COUNT>
__device__ __forceinline__ void pin(unsigned (&registers)[COUNT][4]) {
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) asm volatile("" : "+r"(registers[i][j])::"memory");
  }
}

// As `pack`; what is out of range becomes the largest element.
__device__ __forceinline__ unsigned pack_finite(float low, float high) {
  unsigned packed;
  asm("cvt.rn.satfinite." PACK_OPERANDS ".f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

__device__ __forceinline__ float round_to_element(float x) { return to_accumulate(to_element(x)); }

// Accumulators to A operands of a following product whose inner dimension is the accumulators' columns.
template <int COUNT>
__device__ __forceinline__ void pack_operands(unsigned (&operands)[COUNT][4], const float (&accumulators)[8 * COUNT]) {
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      operands[i][j] = pack(accumulators[8 * i + 2 * j], accumulators[8 * i + 2 * j + 1]);
    }
  }
}

// The N / 2 accumulators of a thread as operands of an asm statement: their numbers in its text, and their list.
#define OPERANDS_8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define OPERANDS_16 OPERANDS_8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define OPERANDS_24 OPERANDS_16 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define OPERANDS_32 OPERANDS_24 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define OPERANDS_40 OPERANDS_32 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define OPERANDS_48 OPERANDS_40 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define OPERANDS_56 OPERANDS_48 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define OPERANDS_64 OPERANDS_56 ", %56, %57, %58, %59, %60, %61, %62, %63"
#define LIST_4(C, i) "+f"(C[i]), "+f"(C[i + 1]), "+f"(C[i + 2]), "+f"(C[i + 3])
#define LIST_8(C, i) LIST_4(C, i), LIST_4(C, i + 4)
#define LIST_16(C, i) LIST_8(C, i), LIST_8(C, i + 8)
#define LIST_24(C, i) LIST_16(C, i), LIST_8(C, i + 16)
#define LIST_32(C, i) LIST_16(C, i), LIST_16(C, i + 16)
#define LIST_48(C, i) LIST_32(C, i), LIST_16(C, i + 32)
#define LIST_64(C, i) LIST_32(C, i), LIST_32(C, i + 32)

// multiply(C, A, B, accumulate):  C [64, N] = A [64, 16] B [16, N], added to what C holds if `accumulate`.
// A: a descriptor of [64 rows, inner columns], or registers as `pack_operands` makes them. B: a descriptor of [N rows,
// inner columns], or of [inner rows, N columns] where B_INNER_ROWS. multiply_inner_rows: A is a descriptor of [inner
// rows, 64 columns] as well. Lane = 4 * group + member of warp w holds
//   C[4 t + 2 i + j] : row 16 w + group + 8 i, column 8 t + 2 member + j
// X0 to X6 number the inputs, which follow the COUNT = N / 2 accumulators.
#define WGMMA(N, COUNT, A, B, X_ACCUMULATE, TRANSPOSE)                                              \
  "{\n.reg .pred accumulate;\nsetp.ne.b32 accumulate, %" #X_ACCUMULATE ", 0;\n"                     \
  "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." MMA_OPERANDS " {" OPERANDS_##COUNT "}, " A ", " \
  B ", accumulate, 1, 1, " TRANSPOSE ";\n}"
#define DEFINE_MULTIPLY(N, COUNT, X0, X1, X2, X3, X4, X5, X6)                                                       \
  __device__ __forceinline__ void multiply(float (&C)[COUNT], Descriptor A, Descriptor B, bool accumulate) {        \
    asm volatile(WGMMA(N, COUNT, "%" #X0, "%" #X1, X2, "0, 0")                                                      \
                 : LIST_##COUNT(C, 0)                                                                               \
                 : "l"(A), "l"(B), "r"(int(accumulate)));                                                           \
  }                                                                                                                 \
  __device__ __forceinline__ void multiply_inner_rows(float (&C)[COUNT], Descriptor A, Descriptor B,                \
                                                      bool accumulate) {                                            \
    asm volatile(WGMMA(N, COUNT, "%" #X0, "%" #X1, X2, "1, 1")                                                      \
                 : LIST_##COUNT(C, 0)                                                                               \
                 : "l"(A), "l"(B), "r"(int(accumulate)));                                                           \
  }                                                                                                                 \
  template <bool B_INNER_ROWS>                                                                                      \
  __device__ __forceinline__ void multiply(float (&C)[COUNT], const unsigned (&A)[4], Descriptor B,                 \
                                           bool accumulate) {                                                       \
    asm volatile(WGMMA(N, COUNT, "{%" #X0 ", %" #X1 ", %" #X2 ", %" #X3 "}", "%" #X4, X5, "%" #X6)                  \
                 : LIST_##COUNT(C, 0)                                                                               \
                 : "r"(A[0]), "r"(A[1]), "r"(A[2]), "r"(A[3]), "l"(B), "r"(int(accumulate)), "n"(int(B_INNER_ROWS))); \
  }
DEFINE_MULTIPLY(16, 8, 8, 9, 10, 11, 12, 13, 14)
DEFINE_MULTIPLY(32, 16, 16, 17, 18, 19, 20, 21, 22)
DEFINE_MULTIPLY(48, 24, 24, 25, 26, 27, 28, 29, 30)
DEFINE_MULTIPLY(64, 32, 32, 33, 34, 35, 36, 37, 38)
DEFINE_MULTIPLY(96, 48, 48, 49, 50, 51, 52, 53, 54)
DEFINE_MULTIPLY(128, 64, 64, 65, 66, 67, 68, 69, 70)
