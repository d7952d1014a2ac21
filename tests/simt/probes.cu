// Small kernels that use everything device.cuh has, each with bugs to switch on: what the emulated drivers must run,
// and what they must find.
#include "device.cuh"

namespace safelora::cuda {

struct ProbeParams {
  TensorMap map;
  const void *a, *b;
  float* out;
  unsigned* flags;
  std::int32_t m, n, k;
  std::int32_t bug;  // 0: none
};

// out (m, n) = a (m, k) · b (n, k)ᵀ for bf16, k a multiple of 8, m <= 64, n <= 8: three stages of cp.async, ldmatrix,
// mma. Bugs: 1 no wait for the copies, 2 no barrier behind them, 3 a store past the end of shared memory, 4 no guard at
// the end of a row, 5 a stage refilled before all have read it, 6 a shared address that is not aligned.
SAFELORA_KERNEL(probe_product, ProbeParams, 128) {
  constexpr int kDepth = 16, kStages = 3, kStage = (64 + 8) * kDepth;
  DYN_SHARED(__nv_bfloat16, stages);
  const int tid = static_cast<int>(threadIdx.x), lane = tid % 32, warp = tid / 32;
  const int steps = (params.k + kDepth - 1) / kDepth;
  const auto copy = [&](int step) {
    __nv_bfloat16* const stage = stages + step % kStages * kStage;
    for (int i = tid; i < (64 + 8) * 2; i += 128) {
      const int row = i / 2, col = step * kDepth + i % 2 * 8, line = row < 64 ? row : row - 64;
      const void* const from = row < 64 ? params.a : params.b;
      const bool inside = line < (row < 64 ? params.m : params.n) && (col < params.k || params.bug == 4);
      const std::int64_t at = inside ? static_cast<std::int64_t>(line) * params.k + col : 0;
      cp_async16(stage + row * kDepth + i % 2 * 8 + (params.bug == 6), static_cast<const __nv_bfloat16*>(from) + at,
                 inside ? 16 : 0);
    }
  };
  float sum[4] = {};
  for (int step = 0; step < kStages - 1; ++step) {
    if (step < steps) copy(step);
    cp_async_commit();
  }
  for (int step = 0; step < steps; ++step) {
    if (params.bug == 5) {
      if (step + kStages - 1 < steps) copy(step + kStages);
      cp_async_commit();
    }
    if (params.bug != 1) cp_async_wait<kStages - 2>();
    if (params.bug != 2) __syncthreads();
    const __nv_bfloat16* const stage = stages + step % kStages * kStage;
    unsigned a[4], b[2];
    ldmatrix_x4(a, stage + (warp * 16 + lane % 16) * kDepth + lane / 16 * 8);
    ldmatrix_x2(b, stage + (64 + lane % 8) * kDepth + lane / 8 % 2 * 8);
    mma_bf16_16816(sum, a, b);
    if (params.bug != 5) {
      if (step + kStages - 1 < steps) copy(step + kStages - 1);
      cp_async_commit();
    }
  }
  if (params.bug == 3 && tid == 0) stages[kStages * kStage] = __float2bfloat16_rn(1.0f);
  for (int i = 0; i < 4; ++i) {
    const int row = warp * 16 + lane / 4 + i / 2 * 8, col = lane % 4 * 2 + i % 2;
    if (row < params.m && col < params.n) params.out[row * params.n + col] = sum[i];
  }
}

// out (m, n) = a (m, k) · b (n, k)ᵀ for fp32 cut to tf32; m <= 16, n <= 8, k a multiple of 8.
SAFELORA_KERNEL(probe_tf32, ProbeParams, 32) {
  const int row = static_cast<int>(threadIdx.x) / 4, col = static_cast<int>(threadIdx.x) % 4;
  const auto at = [&](const void* data, int rows, int i, int k) {
    return i < rows ? static_cast<const unsigned*>(data)[i * params.k + k] : 0u;
  };
  float sum[4] = {};
  for (int k = 0; k < params.k; k += 8) {
    unsigned a[4], b[2];
    for (int r = 0; r < 4; ++r) a[r] = at(params.a, params.m, row + r % 2 * 8, k + col + r / 2 * 4);
    for (int r = 0; r < 2; ++r) b[r] = at(params.b, params.n, row, k + col + r * 4);
    mma_tf32_1688(sum, a, b);
  }
  for (int i = 0; i < 4; ++i) {
    const int r = row + i / 2 * 8, c = col * 2 + i % 2;
    if (r < params.m && c < params.n) params.out[r * params.n + c] = sum[i];
  }
}

// out (n, 64): row 0 is a's, each row the one before plus 1, each by whoever draws its ticket (flags[0]). flags[1 + i]:
// row i is there. Bugs: 1 nobody waits, 2 the flag is not a release.
SAFELORA_KERNEL(probe_tickets, ProbeParams, 64) {
  DYN_SHARED(int, ticket);
  for (;;) {
    if (threadIdx.x == 0) *ticket = static_cast<int>(add_relaxed(params.flags, 1));
    __syncthreads();
    const int row = *ticket;
    if (row >= params.n) return;
    if (row > 0 && threadIdx.x == 0 && params.bug != 1)
      while (load_acquire(params.flags + row) == 0) spin_pause();
    __syncthreads();
    float* const to = params.out + row * 64 + threadIdx.x;
    *to = row > 0 ? to[-64] + 1.0f : static_cast<const float*>(params.a)[threadIdx.x];
    __syncthreads();
    if (threadIdx.x == 0) {
      if (params.bug == 2)
        add_relaxed(params.flags + 1 + row, 1);
      else
        add_release(params.flags + 1 + row, 1);
    }
  }
}

// Reverses a's 64 numbers in shared memory. Bugs: 1 no barrier, 2 16 bytes from an address that is not aligned.
SAFELORA_KERNEL(probe_reverse, ProbeParams, 64) {
  DYN_SHARED(float, numbers);
  const unsigned i = threadIdx.x;
  if (params.bug == 2) {
    const float4 v = *reinterpret_cast<const float4*>(static_cast<const float*>(params.a) + 1);
    params.out[i] = (v.x + v.y) * (v.z + v.w);
  }
  numbers[i] = static_cast<const float*>(params.a)[i];
  if (params.bug != 1) __syncthreads();
  params.out[i] = numbers[63 - i];
}

// out (64) = the sum over warps of what each lane's neighbour has. Bugs: 1 a full mask in half a warp, 2 a barrier that
// half of the lanes miss, 3 all blocks add to the same place, 4 a flag that nobody sets.
SAFELORA_KERNEL(probe_warps, ProbeParams, 64) {
  DYN_SHARED(float, partial);
  const unsigned i = threadIdx.x;
  float v = static_cast<const float*>(params.a)[i];
  if (params.bug != 1 || i % 2 == 0) v += __shfl_xor_sync(0xffffffffu, v, 1);
  partial[i] = v;
  if (params.bug != 2 || i % 2)
    __syncthreads();
  else
    __syncwarp();
  if (params.bug == 4)
    while (load_acquire(params.flags) == 0) spin_pause();
  float* const to = params.out + blockIdx.x * 64 + i;
  *(params.bug == 3 ? params.out : to) = partial[i] + partial[i ^ 32];
}

SAFELORA_KERNEL(probe_cluster, ProbeParams, 32) {
#if SAFELORA_SM90
  // out (blocks, 8, 64): the 8 × 64 box of the bf16 matrix at rows 8 · rank, fetched by a block with TMA, handed to the
  // next block of the cluster once by loads and once by a bulk copy, and added up. Bugs: 1 no wait for the box, 2 too
  // many bytes expected, 3 no cluster barrier before the neighbour reads, 4 none before the block ends, 5 no wait for
  // the neighbour's bulk copy, 6 the box before its barrier is made.
  constexpr int kBox = 8 * 64;
  DYN_SHARED(unsigned char, shared);
  __nv_bfloat16* const box = reinterpret_cast<__nv_bfloat16*>(shared);
  __nv_bfloat16* const received = box + kBox;
  Mbarrier* const bars = reinterpret_cast<Mbarrier*>(received + kBox);
  const unsigned rank = cluster_rank(), next = (rank + 1) % cluster_size();
  const int lane = static_cast<int>(threadIdx.x);
  if (lane == 0 && params.bug != 6) {
    mbar_init(bars, 1);
    mbar_init(bars + 1, 1);
    mbar_fence_init();
  }
  cluster_sync();
  if (lane == 0) {
    mbar_arrive_expect(bars, kBox * 2 + (params.bug == 2 ? 16 : 0));
    mbar_arrive_expect(bars + 1, kBox * 2);
    tma_load(box, &params.map, static_cast<int>(blockIdx.x) * 8, 0, bars);
  }
  __syncwarp();
  if (params.bug != 1) mbar_wait(bars, 0);
  if (lane == 0) {
    fence_async_shared();
    bulk_send(received, box, kBox * 2, bars + 1, next);
  }
  if (params.bug != 3) cluster_sync();
  if (params.bug != 5) mbar_wait_cluster(bars + 1, 0);
  // A swizzle of 128 bytes: 16-byte group g of row r lies at g ^ r.
  for (int i = lane; i < kBox; i += 32) {
    const int at = i / 64 * 64 + ((i % 64 / 8) ^ (i / 64)) * 8 + i % 8;
    const unsigned pair = __float_as_uint(cluster_load(reinterpret_cast<const float*>(box) + at / 2, next));
    const float theirs = __uint_as_float(at % 2 ? pair & 0xffff0000u : pair << 16);
    params.out[blockIdx.x * kBox + i] = theirs + 1000.0f * to_float(received[at]);
  }
  if (params.bug != 4) cluster_sync();
#else
  unsupported_arch();
#endif
}

}  // namespace safelora::cuda
