// group_channels.cu - sorts the channels of every block by the Gray rank of their hash words; every G neighbours of the
// result are a group.
//
//   rank = word ^ (word >> 1) ^ ... ^ (word >> 15),   channels sorted stably by rank     docs/math.md (eq. 6, 7)
//
// Reference : reference/group_channels.py     Numba : distrattn_np/numba_kernels/group_channels.py
// Launcher  : distrattn_np/backends/cupy_backend.py
//
// Grid      : (B * H * C)     one thread block per block of rows
// Block     : MAX_D threads, one per channel
// Shared    : MAX_D ints, static
// Assumes   : 1 <= D <= MAX_D
// Alone     : nvcc -cubin -arch=sm_80 raw_kernels/group_channels.cu

constexpr int MAX_D = 256;

extern "C" __global__ __launch_bounds__(MAX_D)
void group_channels(const unsigned short* __restrict__ words, // [B, H, C, D]
                    int* __restrict__ channels,               // [B, H, C, D]
                    int D) {
  __shared__ int keys_smem[MAX_D];
  const int channel = threadIdx.x;
  const long long block_offset = static_cast<long long>(blockIdx.x) * D;

  // ---- sort key: the rank, then the channel, so that no two are equal and the order is stable ----
  int key = 0;
  if (channel < D) {
    int rank = words[block_offset + channel];
    for (int shift = 1; shift < 16; shift *= 2) rank ^= rank >> shift;  // doubling covers all 15 shifts
    key = rank * MAX_D + channel;
    keys_smem[channel] = key;
  }
  __syncthreads();  // all keys are written before they are compared

  // ---- a channel's place is the number of smaller keys ----
  if (channel < D) {
    int place = 0;
    for (int i = 0; i < D; i++) place += keys_smem[i] < key;
    channels[block_offset + place] = channel;
  }
}
