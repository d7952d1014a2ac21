// acc = V(VᵀB) on thread-block clusters; project_cluster.cuh has the plan.
//
// Products are those of bf16 tensor cores with both factors split into high + low: high·high + high·low + low·high.
// Tensor cores truncate when they add, so their sums are short (64 rows, or the columns of a strip) and fp32 additions,
// rounded to nearest, put them together.
//
// Who waits for whom; all are mbarriers, s counts strips, and of staged, inbox and ready two alternate:
//   full, empty: a slot of the ring holds its boxes of both weights; every warp is done with them.
//   gathered, free: the partial Y(s) of all warps are written; they have been added.
//   staged: the block's partial Y(s) is there. The exchanging warp sends each quad to the block that owns it.
//   inbox: the partial Y(s) of all blocks are there. It adds them in the order of the blocks and sends the sum to all.
//   ready: Y(s) is there.
// Products alternate as VᵀB of strip s + 1, V·Y of strip s, so an exchange has a strip's time. That also keeps two
// buffers apart: a block sends partial Y(s + 2) after it has got Y(s), for which every owner has read its inbox of s,
// and an owner sends Y(s + 2) after it has got partial Y(s + 2) from every block, each of which is done with Y(s).
#include "device.cuh"
#include "project_cluster.cuh"

namespace safelora::cuda {
namespace {

#if !defined(__CUDACC__) || !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL) || \
    defined(__CUDA_ARCH_FEAT_SM100_ALL)
#define SAFELORA_CLUSTER 1
#else
#define SAFELORA_CLUSTER 0
#endif

#if SAFELORA_CLUSTER

// Registers of each thread of this warpgroup.
template <int Count, bool More>
SAFELORA_DEVICE void set_registers() {
#if defined(__CUDA_ARCH__)
  if constexpr (More)
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Count));
  else
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Count));
#endif
}

enum class Weights { f32, bf16, f16, mixed };

template <Weights kWeights>
constexpr bool kSixteenBits = kWeights == Weights::bf16 || kWeights == Weights::f16;
template <Weights kWeights>
constexpr DType kDType = kWeights == Weights::bf16  ? DType::bf16
                         : kWeights == Weights::f16 ? DType::f16
                                                    : DType::f32;

using Bytes = const unsigned char*;

SAFELORA_DEVICE unsigned bits(__nv_bfloat162 v) { return *reinterpret_cast<unsigned*>(&v); }
SAFELORA_DEVICE __nv_bfloat162 pair(unsigned v) { return *reinterpret_cast<__nv_bfloat162*>(&v); }

// x ≈ high + low, y likewise, each two bf16 in a register.
SAFELORA_DEVICE void split(unsigned& high, unsigned& low, float x, float y) {
  high = pack_bf16(x, y);
  low = pack_bf16(x - __uint_as_float(high << 16), y - __uint_as_float(high & 0xffff0000u));
}

// high + low = a − b exactly: what rounding leaves of a sum of two bf16 is a bf16.
SAFELORA_DEVICE void split_difference(unsigned& high, unsigned& low, unsigned a, unsigned b) {
  const __nv_bfloat162 rounded = __hsub2_rn(pair(a), pair(b)), minus_b = __hsub2_rn(rounded, pair(a));
  const __nv_bfloat162 of_a = __hsub2_rn(pair(a), __hsub2_rn(rounded, minus_b));
  high = bits(rounded);
  low = bits(__hsub2_rn(of_a, __hadd2_rn(pair(b), minus_b)));
}

// Two entries of a 16-bit type.
SAFELORA_DEVICE float2 widen(DType dtype, unsigned v) {
  if (dtype == DType::bf16) return {__uint_as_float(v << 16), __uint_as_float(v & 0xffff0000u)};
  return __half22float2(*reinterpret_cast<__half2*>(&v));
}

// Boxes lie as TMA swizzles them: 16-byte groups of a row change places with the row's number, so that the eight rows
// of an ldmatrix, and the lanes of the loads below, fall into different banks.
SAFELORA_DEVICE int in_row64(int row, int group) { return row * 64 + ((group ^ (row >> 1 & 3)) << 4); }
SAFELORA_DEVICE int in_row32(int row, int group) { return row * 32 + ((group ^ (row >> 2 & 1)) << 4); }

// Which row of 16 is the contraction's index 2t, 2t + 1, 2t + 8, 2t + 9 (for j = 0 … 3). Loads of fp32 pick rows of
// different banks.
template <Weights kWeights>
SAFELORA_DEVICE int row_of(int t, int j) {
  return kSixteenBits<kWeights> ? 2 * t + (j & 1) + (j >> 1) * 8 : (t & 1) + (j & 1) * 2 + (t >> 1) * 4 + (j >> 1) * 8;
}

// What a lane has of 16 rows from `row` on of a box of 16 columns: two neighbours in each of four rows, or four in each
// of two.
SAFELORA_DEVICE void load_twos(float2 (&v)[4], Bytes box, DType dtype, int row) {
  const int t = threadIdx.x & 3, index = (threadIdx.x & 31) / 4;
  if (dtype == DType::f32) {
#pragma unroll
    for (int j = 0; j < 4; ++j)
      v[j] = *reinterpret_cast<const float2*>(box + in_row64(row + row_of<Weights::f32>(t, j), index >> 1) +
                                              (index & 1) * 8);
    return;
  }
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const Bytes at = box + in_row32(row + row_of<Weights::f32>(t, j), index >> 2) + (index & 3) * 4;
    v[j] = widen(dtype, *reinterpret_cast<const unsigned*>(at));
  }
}
SAFELORA_DEVICE void load_fours(float4 (&v)[2], Bytes box, DType dtype, int row) {
  const int g = (threadIdx.x & 31) / 4, index = threadIdx.x & 3;
  if (dtype == DType::f32) {
#pragma unroll
    for (int h = 0; h < 2; ++h) v[h] = *reinterpret_cast<const float4*>(box + in_row64(row + h * 8 + g, index));
    return;
  }
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const Bytes at = box + in_row32(row + h * 8 + g, index >> 1) + (index & 1) * 8;
    const uint2 both = *reinterpret_cast<const uint2*>(at);
    const float2 x = widen(dtype, both.x), y = widen(dtype, both.y);
    v[h] = {x.x, x.y, y.x, y.y};
  }
}

// V of 16 rows from `row` on and 16 columns, `group` groups of 8 into the box, as the first factor of VᵀB: v[2r + h] is
// half h of register r. Rows are contracted in the order of row_of. Index m of the product is a column, and columns
// are numbered so that quad q holds m = 2q, 2q + 8, 2q + 1, 2q + 9: for fp32, columns 4q … 4q + 3.
template <Weights kWeights>
SAFELORA_DEVICE void load_transposed(float (&v)[8], Bytes aligned, Bytes base, DType aligned_dtype, DType base_dtype,
                                     int row, int group) {
  const int lane = threadIdx.x & 31;
  if constexpr (kSixteenBits<kWeights>) {
    const int at = in_row64(row + (lane >> 4) * 8 + (lane & 7), group + (lane >> 3 & 1));
    unsigned a[4], b[4];
    ldmatrix_x4_trans(a, aligned + at);
    ldmatrix_x4_trans(b, base + at);
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const float2 x = widen(kDType<kWeights>, a[r]), y = widen(kDType<kWeights>, b[r]);
      v[2 * r] = x.x - y.x;
      v[2 * r + 1] = x.y - y.y;
    }
  } else {
    float2 x[4], y[4];
    load_twos(x, aligned, aligned_dtype, row);
    load_twos(y, base, base_dtype, row);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      v[(j >> 1) * 4 + (j & 1)] = x[j].x - y[j].x;
      v[(j >> 1) * 4 + (j & 1) + 2] = x[j].y - y[j].y;
    }
  }
}

// The same as the first factor of V·Y, split. Columns are contracted in the order of the quads.
template <Weights kWeights>
SAFELORA_DEVICE void load_straight(unsigned (&high)[4], unsigned (&low)[4], Bytes aligned, Bytes base,
                                   DType aligned_dtype, DType base_dtype, int row, int group) {
  const int lane = threadIdx.x & 31;
  if constexpr (kSixteenBits<kWeights>) {
    const int at = in_row64(row + (lane & 15), group + (lane >> 4));
    unsigned a[4], b[4];
    ldmatrix_x4(a, aligned + at);
    ldmatrix_x4(b, base + at);
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      if constexpr (kWeights == Weights::bf16) {
        split_difference(high[r], low[r], a[r], b[r]);
      } else {
        const float2 x = widen(kDType<kWeights>, a[r]), y = widen(kDType<kWeights>, b[r]);
        split(high[r], low[r], x.x - y.x, x.y - y.y);
      }
    }
  } else {
    float4 x[2], y[2];
    load_fours(x, aligned, aligned_dtype, row);
    load_fours(y, base, base_dtype, row);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      split(high[h], low[h], x[h].x - y[h].x, x[h].z - y[h].z);
      split(high[h + 2], low[h + 2], x[h].y - y[h].y, x[h].w - y[h].w);
    }
  }
}

// c += a·b with b = {high, high, low, low}; the products of one sum stand far apart.
template <int NT>
SAFELORA_DEVICE void multiply(float (&c)[NT][4], const unsigned (&high)[4], const unsigned (&low)[4],
                              const uint4 (&b)[NT]) {
#pragma unroll
  for (int n = 0; n < NT; ++n) mma_bf16_16816(c[n], high, {b[n].x, b[n].y});
#pragma unroll
  for (int n = 0; n < NT; ++n) mma_bf16_16816(c[n], high, {b[n].z, b[n].w});
#pragma unroll
  for (int n = 0; n < NT; ++n) mma_bf16_16816(c[n], low, {b[n].x, b[n].y});
}

SAFELORA_DEVICE void add(float4& sum, const float4& v) {
  sum.x += v.x;
  sum.y += v.y;
  sum.z += v.z;
  sum.w += v.w;
}

// The packed factor of 16 rows and 16 columns, as the second factor of VᵀB, for 8 columns each.
template <Weights kWeights>
SAFELORA_DEVICE void load_factor(uint4& first, uint4& second, const std::uint32_t* packed) {
  const int lane = threadIdx.x & 31;
  uint4 parts[2];
#pragma unroll
  for (int part = 0; part < 2; ++part) {
    if constexpr (kSixteenBits<kWeights>) {
      parts[part] = reinterpret_cast<const uint4*>(packed)[part * 32 + lane];
    } else {
      const unsigned short* entries = reinterpret_cast<const unsigned short*>(packed + part * 128);
      unsigned v[8];
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const int k = row_of<kWeights>(lane & 3, j & 3);
        v[j] = entries[((lane & ~3) + (k & 7) / 2) * 8 + (k & 1) + (k >> 3) * 2 + (j >> 2) * 4];
      }
      parts[part] = {v[0] | v[1] << 16, v[2] | v[3] << 16, v[4] | v[5] << 16, v[6] | v[7] << 16};
    }
  }
  first = {parts[0].x, parts[0].y, parts[1].x, parts[1].y};
  second = {parts[0].z, parts[0].w, parts[1].z, parts[1].w};
}

// A slot of the ring, and the parity of the phase its barrier is in.
struct Cursor {
  int slot = 0;
  unsigned parity = 0;
  SAFELORA_DEVICE void advance(int slots) {
    if (++slot == slots) {
      slot = 0;
      parity ^= 1;
    }
  }
};

// The unit of work of this block's cluster. Every role looks it up for itself, after it has got its registers.
template <Weights kWeights>
struct Task {
  static constexpr int kCols = kSixteenBits<kWeights> ? 32 : 16;  // of a strip

  const ClusterItem& item;
  const int blocks, rank, part, half, first_strip, strips, boxes, slots;
  const DType aligned_dtype, base_dtype;
  const int aligned_bytes, slot_bytes;

  SAFELORA_DEVICE explicit Task(const ClusterParams& params)
      : item(find(params, blockIdx.x / cluster_size())),
        blocks(cluster_size()),
        rank(cluster_rank()),
        part((blockIdx.x / blocks - item.first_unit) / item.halves),
        half((blockIdx.x / blocks - item.first_unit) % item.halves),
        first_strip(part * item.unit_strips),
        strips(min(item.unit_strips, item.strips - first_strip)),
        boxes(item.boxes),
        slots(item.slots),
        aligned_dtype(kWeights == Weights::mixed ? item.aligned_dtype : kDType<kWeights>),
        base_dtype(kWeights == Weights::mixed ? item.base_dtype : kDType<kWeights>),
        aligned_bytes(box_bytes(aligned_dtype)),
        slot_bytes(aligned_bytes + box_bytes(base_dtype)) {}

  SAFELORA_DEVICE static const ClusterItem& find(const ClusterParams& params, int unit) {
    int index = 0;
    for (int step = 64; step > 0; step /= 2)
      if (index + step < params.num_items && params.items[index + step].first_unit <= unit) index += step;
    return params.items[index];
  }
  SAFELORA_DEVICE static int box_bytes(DType dtype) { return kClusterBoxRows * kCols * (dtype == DType::f32 ? 4 : 2); }
};

struct Barriers {
  Mbarrier full[kClusterSlots], empty[kClusterSlots];
  Mbarrier staged[2], inbox[2], ready[2];
  Mbarrier gathered, free;
};

// Boxes of both weights into the ring; one thread.
template <Weights kWeights, int N>
SAFELORA_DEVICE void load_boxes(unsigned char* shared, Barriers& bar, const ClusterParams& params) {
  const Task<kWeights> task(params);
  Cursor at;
  for (int s = 0; s < task.strips; ++s)
    for (int box = 0; box < task.boxes; ++box) {
      mbar_wait(&bar.empty[at.slot], at.parity ^ 1);
      mbar_arrive_expect(&bar.full[at.slot], task.slot_bytes);
      unsigned char* const to = shared + ClusterLayout<task.kCols, N>::ring + at.slot * task.slot_bytes;
      const int row = (task.rank * task.boxes + box) * kClusterBoxRows, col = (task.first_strip + s) * task.kCols;
      tma_load(to, &task.item.aligned, row, col, &bar.full[at.slot]);
      tma_load(to + task.aligned_bytes, &task.item.base, row, col, &bar.full[at.slot]);
      at.advance(task.slots);
    }
}

// Partial sums of Y to the blocks that own them, sums to all; one warp. Quad q belongs to block q % blocks.
template <Weights kWeights, int N>
SAFELORA_DEVICE void exchange(unsigned char* shared, Barriers& bar, const ClusterParams& params) {
  using Layout = ClusterLayout<Task<kWeights>::kCols, N>;
  const Task<kWeights> task(params);
  const int lane = threadIdx.x & 31, blocks = task.blocks, rank = task.rank;
  const int most_owned = max(1, Layout::quads / blocks), owned = rank < Layout::quads ? most_owned : 0;
  for (int s = 0; s < task.strips; ++s) {
    const int buffer = s & 1;
    const unsigned parity = s >> 1 & 1;
    unsigned char* const staged = shared + Layout::staged + buffer * Layout::partial_bytes;
    unsigned char* const inbox = shared + Layout::inbox + buffer * Layout::inbox_bytes;
    unsigned char* const outbox = shared + Layout::outbox + buffer * Layout::outbox_bytes;
    unsigned char* const y = shared + Layout::y + buffer * Layout::y_bytes;
    mbar_wait(&bar.staged[buffer], parity);
    if (lane == 0) {
      if (owned > 0) mbar_arrive_expect(&bar.inbox[buffer], blocks * owned * N * 16);
      mbar_arrive_expect(&bar.ready[buffer], Layout::quads * N * 16);
    }
    if (lane < Layout::quads)
      bulk_send(inbox + (rank * most_owned + lane / blocks) * N * 16, staged + lane * Layout::partial_pitch, N * 16,
                &bar.inbox[buffer], lane % blocks);
    if (owned == 0) continue;
    mbar_wait_cluster(&bar.inbox[buffer], parity);
    for (int i = lane; i < owned * N; i += 32) {
      float4 sum = {0, 0, 0, 0};
      for (int block = 0; block < blocks; ++block)
        add(sum, reinterpret_cast<const float4*>(inbox)[block * most_owned * N + i]);
      uint4 parts;
      split(parts.x, parts.z, sum.x, sum.z);
      split(parts.y, parts.w, sum.y, sum.w);
      reinterpret_cast<uint4*>(outbox)[i] = parts;
    }
    fence_async_shared();
    __syncwarp();
    if (lane < owned * blocks)
      bulk_send(y + (lane / blocks * blocks + rank) * Layout::y_pitch, outbox + lane / blocks * N * 16, N * 16,
                &bar.ready[buffer], lane % blocks);
  }
}

// Both products; the warps from 0 on.
template <Weights kWeights, int N>
SAFELORA_DEVICE void multiply_strips(unsigned char* shared, Barriers& bar, const ClusterParams& params) {
  constexpr int CT = Task<kWeights>::kCols / 16, NT = N / 8;
  using Layout = ClusterLayout<Task<kWeights>::kCols, N>;
  constexpr int kAdding = Layout::adding_warps;
  const Task<kWeights> task(params);
  const ClusterItem& item = task.item;
  const int thread = threadIdx.x, warp = thread / 32, lane = thread & 31, g = lane >> 2, t = lane & 3;
  const int first_row = task.rank * task.boxes * kClusterBoxRows + warp * 16,
            rows = (item.rows + kBlockRows - 1) & -kBlockRows;
  uint4 factor[kClusterBoxes][NT];
#pragma unroll
  for (int i = 0; i < kClusterBoxes; ++i)
#pragma unroll
    for (int n = 0; n < NT; n += 2) {
      const std::int64_t row = first_row + i * kClusterBoxRows;
      factor[i][n] = factor[i][n + 1] = {0, 0, 0, 0};
      if (i < task.boxes && row < rows)
        load_factor<kWeights>(factor[i][n], factor[i][n + 1],
                              item.factor + (row * item.panel + (task.half * N + n * 8) * 16));
    }
  float* const sums = item.sums + task.part * item.slot_size + static_cast<std::int64_t>(first_row) * item.panel +
                      task.half * NT * 128 + lane * 4;

  float sum[kClusterBoxes][NT][4] = {};
  double squares = 0;
  int segment = 0, in_segment = 0;
  bool complete = false;  // strip s - 1 ended a segment
  Cursor first, second;
  for (int s = 0; s <= task.strips; ++s) {
    if (s < task.strips) {
      // VᵀB of strip s.
      float column[CT][NT][4] = {};
      float square = 0;
#pragma unroll
      for (int i = 0; i < kClusterBoxes; ++i)
        if (i < task.boxes) {
          mbar_wait(&bar.full[first.slot], first.parity);
          const Bytes aligned = shared + Layout::ring + first.slot * task.slot_bytes,
                      base = aligned + task.aligned_bytes;
          first.advance(task.slots);
#pragma unroll
          for (int c = 0; c < CT; ++c) {
            float v[8];
            unsigned high[4], low[4];
            load_transposed<kWeights>(v, aligned, base, task.aligned_dtype, task.base_dtype, warp * 16, c * 2);
#pragma unroll
            for (int e = 0; e < 8; ++e) square = fmaf(v[e], v[e], square);
#pragma unroll
            for (int r = 0; r < 4; ++r) split(high[r], low[r], v[2 * r], v[2 * r + 1]);
            multiply(column[c], high, low, factor[i]);
          }
        }
      squares += square;

      unsigned char* const staged = shared + Layout::staged + (s & 1) * Layout::partial_bytes;
      unsigned char* const mine = warp == 0 ? staged : shared + Layout::partials + (warp - 1) * Layout::partial_bytes;
      if (s > 0) mbar_wait(&bar.free, (s - 1) & 1);
#pragma unroll
      for (int c = 0; c < CT; ++c)
#pragma unroll
        for (int n = 0; n < NT; ++n) {
          unsigned char* const to = mine + (c * 4 + g / 2) * Layout::partial_pitch + (n * 8 + 2 * t) * 16 + (g & 1) * 8;
          *reinterpret_cast<float2*>(to) = {column[c][n][0], column[c][n][2]};
          *reinterpret_cast<float2*>(to + 16) = {column[c][n][1], column[c][n][3]};
        }
      __syncwarp();
      if (lane == 0) mbar_arrive(&bar.gathered);
      if (warp < kAdding) {
        mbar_wait(&bar.gathered, s & 1);
        const int at = thread / N * Layout::partial_pitch + thread % N * 16;
        float4 total = *reinterpret_cast<const float4*>(staged + at);
#pragma unroll
        for (int w = 0; w < kClusterWarps - 1; ++w)
          add(total, *reinterpret_cast<const float4*>(shared + Layout::partials + w * Layout::partial_bytes + at));
        *reinterpret_cast<float4*>(staged + at) = total;
        fence_async_shared();
        __syncwarp();
        if (lane == 0) mbar_arrive(&bar.staged[s & 1]);
      }
      if (lane == 0) mbar_arrive(&bar.free);
    }
    if (s > 0) {
      // V·Y of strip s - 1.
      const int buffer = (s - 1) & 1;
      mbar_wait_cluster(&bar.ready[buffer], (s - 1) >> 1 & 1);
      const unsigned char* const from = shared + Layout::y + buffer * Layout::y_bytes;
      uint4 y[CT][NT];
#pragma unroll
      for (int c = 0; c < CT; ++c)
#pragma unroll
        for (int n = 0; n < NT; ++n)
          y[c][n] = *reinterpret_cast<const uint4*>(from + (c * 4 + t) * Layout::y_pitch + (n * 8 + g) * 16);
#pragma unroll
      for (int i = 0; i < kClusterBoxes; ++i)
        if (i < task.boxes) {
          const Bytes aligned = shared + Layout::ring + second.slot * task.slot_bytes,
                      base = aligned + task.aligned_bytes;
          float product[NT][4] = {};
#pragma unroll
          for (int c = 0; c < CT; ++c) {
            unsigned high[4], low[4];
            load_straight<kWeights>(high, low, aligned, base, task.aligned_dtype, task.base_dtype, warp * 16, c * 2);
            multiply(product, high, low, y[c]);
          }
          __syncwarp();
          if (lane == 0) mbar_arrive(&bar.empty[second.slot]);
          second.advance(task.slots);
#pragma unroll
          for (int n = 0; n < NT; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) sum[i][n][e] += product[n][e];
        }
      if (complete) {
#pragma unroll
        for (int i = 0; i < kClusterBoxes; ++i)
          if (i < task.boxes && first_row + i * kClusterBoxRows < rows)
#pragma unroll
            for (int n = 0; n < NT; ++n) {
              float4* const to = reinterpret_cast<float4*>(sums + i * kClusterBoxRows * item.panel + n * 128);
              float4 v = {0, 0, 0, 0};
              if (segment > 0) v = *to;
              *to = {v.x + sum[i][n][0], v.y + sum[i][n][1], v.z + sum[i][n][2], v.w + sum[i][n][3]};
              sum[i][n][0] = sum[i][n][1] = sum[i][n][2] = sum[i][n][3] = 0;
            }
      }
    }
    if (complete) ++segment;
    complete = s < task.strips && (++in_segment == item.segment_strips || s + 1 == task.strips);
    if (complete) {
      in_segment = 0;
      for (int d = 16; d > 0; d /= 2) squares += __shfl_xor_sync(0xffffffffu, squares, d);
      const int at = task.first_strip / item.segment_strips + segment;
      if (lane == 0 && task.half == 0 && item.squares != nullptr)
        item.squares[(at * task.blocks + task.rank) * kClusterWarps + warp] = squares;
      squares = 0;
    }
  }
}

template <Weights kWeights, int N>
SAFELORA_DEVICE void project_cluster(const ClusterParams& params) {
  using Layout = ClusterLayout<Task<kWeights>::kCols, N>;
  DYN_SHARED(unsigned char, shared);
  Barriers& bar = *reinterpret_cast<Barriers*>(shared + Layout::barriers);
  const int warp = threadIdx.x / 32;
  if (threadIdx.x == 0) {
    for (int i = 0; i < kClusterSlots; ++i) {
      mbar_init(&bar.full[i], 1);
      mbar_init(&bar.empty[i], kClusterWarps);
    }
    for (int i = 0; i < 2; ++i) {
      mbar_init(&bar.staged[i], Layout::adding_warps);
      mbar_init(&bar.inbox[i], 1);
      mbar_init(&bar.ready[i], 1);
    }
    mbar_init(&bar.gathered, kClusterWarps);
    mbar_init(&bar.free, kClusterWarps);
    mbar_fence_init();
  }
  cluster_sync();
  if (warp < kClusterWarps) {
    if constexpr (Layout::moves_registers) set_registers<232, true>();
    multiply_strips<kWeights, N>(shared, bar, params);
  } else {
    if constexpr (Layout::moves_registers) set_registers<40, false>();
    if (warp == kClusterWarps + 1)
      exchange<kWeights, N>(shared, bar, params);
    else if (threadIdx.x == 32 * kClusterWarps)
      load_boxes<kWeights, N>(shared, bar, params);
  }
  // What this block sends may still be read from here.
  __syncwarp();
  cluster_sync();
}

#endif  // SAFELORA_CLUSTER

SAFELORA_DEVICE void fold(const FoldItem& item) {
  const std::int64_t slots = (item.segments + kClusterSegments - 1) / kClusterSegments, quads = item.size / 4;
  const std::int64_t at = static_cast<std::int64_t>(blockIdx.x) * kFoldThreads + threadIdx.x;
  if (at >= slots * quads) return;
  const int first = static_cast<int>(at / quads) * kClusterSegments, end = min(first + kClusterSegments, item.segments);
  const float4* from = reinterpret_cast<const float4*>(item.from) + at % quads;
  float4 sum = from[first * quads];
  for (int segment = first + 1; segment < end; ++segment) {
    const float4 v = from[segment * quads];
    sum = {sum.x + v.x, sum.y + v.y, sum.z + v.z, sum.w + v.w};
  }
  reinterpret_cast<float4*>(item.to)[at] = sum;
}

}  // namespace

#if SAFELORA_CLUSTER
#define CLUSTER_KERNEL(weights, n)                                                                      \
  SAFELORA_KERNEL(project_cluster_##weights##_##n, ClusterParams, (ClusterLayout<32, n>::threads), 1) { \
    project_cluster<Weights::weights, n>(params);                                                       \
  }
#else
#define CLUSTER_KERNEL(weights, n) \
  SAFELORA_KERNEL(project_cluster_##weights##_##n, ClusterParams, 1) { unsupported_arch(); }
#endif
CLUSTER_KERNEL(bf16, 16)
CLUSTER_KERNEL(bf16, 32)
CLUSTER_KERNEL(f16, 16)
CLUSTER_KERNEL(f16, 32)
CLUSTER_KERNEL(f32, 16)
CLUSTER_KERNEL(f32, 32)
CLUSTER_KERNEL(mixed, 16)
CLUSTER_KERNEL(mixed, 32)
#undef CLUSTER_KERNEL

SAFELORA_KERNEL(project_cluster_fold, FoldParams, kFoldThreads) { fold(params.items[blockIdx.y]); }

}  // namespace safelora::cuda
