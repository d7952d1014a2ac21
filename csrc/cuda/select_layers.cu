// Selection by threshold, and of the lowest. See select_layers.cuh.
#include <cstring>

#include "device.cuh"
#include "select_layers.cuh"

namespace safelora::cuda {
namespace {

using Key = unsigned long long;

constexpr int kWarpCount = kSelectThreads / 32;

// What is compared, as torch.round(decimals=5) rounds.
SAFELORA_DEVICE double compared(double cosine, bool authors) { return authors ? rint(cosine * 1e5) / 1e5 : cosine; }

// In the order of the numbers; −0 and 0 are one.
SAFELORA_DEVICE Key key_of(double value) {
  const double number = value + 0.0;
  Key bits;
  memcpy(&bits, &number, sizeof(bits));
  return bits >> 63 ? ~bits : bits | Key{1} << 63;
}

// The rank of the last of the `wanted` smallest among the numbers, digit by digit from the top: at every step the
// candidates share the digits found so far, and their next digits are counted. One block; integers only.
SAFELORA_DEVICE void select_lowest_block(const SelectParams& p) {
  DYN_SHARED(unsigned, shared);
  unsigned *counts = shared, *warp_sums = counts + kDigits, *found = warp_sums + kWarpCount;
  const unsigned thread = threadIdx.x, lane = thread & 31, warp = thread / 32;

  unsigned numbers = 0;
  for (std::int64_t i = thread; i < p.n; i += kSelectThreads) numbers += p.cosines[i] == p.cosines[i];
  if (thread == 0) found[0] = 0;
  __syncthreads();
  atomicAdd(found, numbers);
  __syncthreads();
  const unsigned valid = found[0];
  unsigned wanted = p.num_layers < static_cast<std::int64_t>(valid) ? static_cast<unsigned>(p.num_layers) : valid;
  if (wanted == 0) {
    for (std::int64_t i = thread; i < p.n; i += kSelectThreads) p.selected[i] = false;
    return;
  }

  Key prefix = 0;
  for (int shift = 64 - kDigitBits; shift >= 0; shift -= kDigitBits) {
    __syncthreads();
    if (thread < kDigits) counts[thread] = 0;
    __syncthreads();
    for (std::int64_t i = thread; i < p.n; i += kSelectThreads) {
      const double value = p.cosines[i];
      const Key key = key_of(compared(value, p.authors));
      const bool candidate = shift == 64 - kDigitBits || key >> (shift + kDigitBits) == prefix >> (shift + kDigitBits);
      if (value == value && candidate) atomicAdd(counts + (key >> shift) % kDigits, 1u);
    }
    __syncthreads();
    if (thread == 0) {
      unsigned digit = 0, below = 0;
      while (below + counts[digit] < wanted) below += counts[digit++];
      found[0] = digit;
      found[1] = below;
    }
    __syncthreads();
    prefix |= static_cast<Key>(found[0]) << shift;
    wanted -= found[1];
  }

  // All below the cutoff, and of those that tie with it the first `wanted`, or all.
  unsigned ties = 0;
  for (std::int64_t begin = 0; begin < p.n; begin += kSelectThreads) {
    const std::int64_t i = begin + thread;
    const double value = i < p.n ? p.cosines[i] : nan("");
    const Key key = key_of(compared(value, p.authors));
    const bool tie = value == value && key == prefix;
    const unsigned tied = __ballot_sync(0xffffffffu, tie);
    if (lane == 0) warp_sums[warp] = __popc(tied);
    __syncthreads();
    unsigned before = ties, total = ties;
    for (unsigned w = 0; w < kWarpCount; ++w) {
      before += w < warp ? warp_sums[w] : 0;
      total += warp_sums[w];
    }
    before += __popc(tied & ((1u << lane) - 1));
    if (i < p.n) p.selected[i] = value == value && (key < prefix || (tie && (p.authors || before < wanted)));
    ties = total;
    __syncthreads();
  }
}

}  // namespace

SAFELORA_KERNEL(threshold_layers, SelectParams, kSelectThreads) {
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kSelectThreads + threadIdx.x;
  if (i < params.n) params.selected[i] = compared(params.cosines[i], params.authors) <= params.threshold;
}

SAFELORA_KERNEL(lowest_layers, SelectParams, kSelectThreads) { select_lowest_block(params); }

}  // namespace safelora::cuda
