// B' = V(VᵀB)/‖V‖_F with V = aligned − base, in one pass over DRAM.
//
// The columns of a layer are cut into super-strips of which a few fit in L2. In the first phase tasks form partial sums
// of Y = VᵀB over chunks of rows; reductions add the chunks in order and split Y for the second phase, whose tasks
// read the strip again, from L2, and add V·Y of 64 rows to what the strips before have left there. Y's buffers go
// round: a reduction waits until the strip that had its buffer before is done with it. Blocks take tasks by ticket, in
// an order in which every task needs only tasks with smaller tickets: those are finished or held by a block that runs,
// whatever number of blocks does.
//
// V is split into two bf16 in registers, V ≈ high + low; of the four products with a factor split likewise, low·low is
// left out. A tensor core truncates while it sums, so its sums stay short: one task each.
#include <type_traits>

#include "device.cuh"
#include "project_layers.cuh"

namespace safelora::cuda {
namespace {

constexpr int kWarps = kProjectThreads / 32;
constexpr int kStages = kTicketStages;
constexpr int kStageBytes = kTicketStageBytes;
constexpr int kQueue = 4;

enum class Weights { bf16, f16, f32 };  // f32 stands for any mixture, too

SAFELORA_DEVICE float2 widen_bf16(std::uint32_t v) {
  return {__uint_as_float(v << 16), __uint_as_float(v & 0xffff0000u)};
}

SAFELORA_DEVICE void split(float2 v, std::uint32_t& high, std::uint32_t& low) {
  high = pack_bf16(v.x, v.y);
  const float2 h = widen_bf16(high);
  low = pack_bf16(v.x - h.x, v.y - h.y);
}

// high + low == a − b exactly: Knuth's two-sum, two bf16 at a time.
SAFELORA_DEVICE void split_bf16_difference(std::uint32_t a, std::uint32_t b, std::uint32_t& high, std::uint32_t& low) {
  const auto pair = [](std::uint32_t v) { return *reinterpret_cast<const __nv_bfloat162*>(&v); };
  const __nv_bfloat162 x = pair(a), y = pair(b), difference = __hsub2(x, y), minus_y = __hsub2(difference, x);
  const __nv_bfloat162 rest = __hsub2(__hsub2(x, __hsub2(difference, minus_y)), __hadd2(y, minus_y));
  high = *reinterpret_cast<const std::uint32_t*>(&difference);
  low = *reinterpret_cast<const std::uint32_t*>(&rest);
}

template <Weights kW, int kN>
struct Config {
  static SAFELORA_DEVICE float2 widen(std::uint32_t v) {
    return kW == Weights::bf16 ? widen_bf16(v) : __half22float2(*reinterpret_cast<const __half2*>(&v));
  }
  static SAFELORA_DEVICE float2 difference(std::uint32_t a, std::uint32_t b) {
    const float2 x = widen(a), y = widen(b);
    return {x.x - y.x, x.y - y.y};
  }
  static SAFELORA_DEVICE void split_difference(std::uint32_t a, std::uint32_t b, std::uint32_t& high,
                                               std::uint32_t& low) {
    if constexpr (kW == Weights::bf16)
      split_bf16_difference(a, b, high, low);
    else
      split(difference(a, b), high, low);
  }
  static constexpr int kPanel = kN;
  static constexpr int kBytes = kW == Weights::f32 ? 4 : 2;
  static constexpr int kDepth = kStageBytes / 2 / kBlockRows / kBytes;  // of a tile along the contraction
  static constexpr int kAlong = kDepth == 64 && kPanel == 16 ? 4 : 2;   // warps along the contraction
  static constexpr int kAcross = kWarps / kAlong;                       // and across it
  static constexpr int kSteps = kDepth / 16 / kAlong;
  static constexpr int kTilesM = kBlockRows / 16 / kAcross;
  static constexpr int kTilesN = kPanel / 8;
  static constexpr int kPairs = kPanel / 16;
};

template <class T>
SAFELORA_DEVICE T load_entry(const Strided& m, std::int64_t row, std::int64_t col) {
  const std::int64_t at = row * m.row + col * m.col;
  if constexpr (std::is_same_v<T, double>)
    return load_double(m.data, m.dtype, at);
  else
    return load_float(m.data, m.dtype, at);
}

enum class Kind : std::int32_t { first, reduce, second, end };

struct Task {
  const std::uint32_t* wait[2];
  std::uint32_t* signal[2];
  float* sums;
  std::uint32_t* y;  // of the strip
  std::uint32_t target[2];
  Kind kind;
  std::int32_t item, row, col, tiles;
  std::int32_t detail;  // first: index of its squares; reduce: pair of n-tiles; second: units before
  std::int32_t strip_col;
};

// Where the ticket order stands. Round g holds the first phase of strip g and the second of strip g − lag.
struct Walk {
  std::uint32_t round, first_ticket;
  std::int32_t front_item, front, back_item, back;  // strips of the two phases, counted within their items
  std::uint32_t freed;                              // reductions of strip g − lag − 1, whose buffer strip g takes over
  std::uint32_t applied[kFactorBuffers];            // second-phase tasks of the strips before g − lag, the latest first
};

struct Shared {
  Task queue[kQueue];
  Walk walk;
  double squares[kWarps];
};

static_assert(kStages * kStageBytes + sizeof(Shared) <= kTicketShared);

SAFELORA_DEVICE int column_blocks(const TicketItem& item, int strip) {
  const std::int64_t rest = item.cols - static_cast<std::int64_t>(strip) * item.strip_cols;
  return static_cast<int>((min(rest, static_cast<std::int64_t>(item.strip_cols)) + kBlockRows - 1) / kBlockRows);
}

SAFELORA_DEVICE int units(const TicketItem& item, int strip) {
  return (column_blocks(item, strip) * kBlockRows + item.unit_cols - 1) / item.unit_cols;
}

SAFELORA_DEVICE int row_blocks(const TicketItem& item) { return (item.rows + kBlockRows - 1) / kBlockRows; }

// The task behind the next ticket. Tasks beyond the last column are passed over.
template <class C>
__device__ void next_task(const TicketParams& p, std::uint32_t& next_ticket, Walk& walk, Task& task) {
  for (;;) {
    const std::uint32_t ticket = next_ticket;
    next_ticket = add_relaxed(p.ticket, 1u);  // known by the time it is needed
    for (;;) {
      const bool front = walk.round < p.strips, back = walk.round >= static_cast<std::uint32_t>(p.lag);
      if (walk.round >= p.strips + p.lag) {
        task.kind = Kind::end;
        task.tiles = 0;
        return;
      }
      const TicketItem& f = p.items[min(walk.front_item, p.num_items - 1)];
      const TicketItem& b = p.items[walk.back_item];
      const int strip_blocks = f.strip_cols / kBlockRows, back_blocks = b.strip_cols / kBlockRows;
      const std::uint32_t firsts = front ? strip_blocks * f.chunks : 0;
      const std::uint32_t reductions = back ? back_blocks * C::kPairs : 0;
      const std::uint32_t seconds = back ? b.strip_cols / b.unit_cols * row_blocks(b) : 0;
      std::uint32_t i = ticket - walk.first_ticket;
      if (i >= firsts + reductions + seconds) {
        walk.first_ticket += firsts + reductions + seconds;
        ++walk.round;
        if (front && ++walk.front == f.strips) {
          ++walk.front_item;
          walk.front = 0;
        }
        if (back) {
          walk.freed = column_blocks(b, walk.back) * C::kPairs;
          for (int k = kFactorBuffers - 1; k > 0; --k) walk.applied[k] = walk.applied[k - 1];
          walk.applied[0] = units(b, walk.back) * row_blocks(b);
          if (++walk.back == b.strips) {
            ++walk.back_item;
            walk.back = 0;
          }
        }
        continue;
      }
      const std::uint32_t half = firsts / 2, round = walk.round, old = round - p.lag;
      const std::uint32_t buffers = p.lag + 1;
      task.wait[0] = task.wait[1] = nullptr;
      task.signal[1] = nullptr;
      task.y = p.y + old % kFactorBuffers * p.y_size;
      task.strip_col = walk.back * b.strip_cols;
      if (i < half || (i >= half + reductions && i < firsts + reductions)) {
        if (i >= half) i -= reductions;
        const int chunk = i / strip_blocks, block = i % strip_blocks;
        if (block >= column_blocks(f, walk.front)) break;
        task.kind = Kind::first;
        task.item = walk.front_item;
        task.row = chunk * f.chunk_rows;
        task.col = walk.front * f.strip_cols + block * kBlockRows;
        task.tiles = (min(f.chunk_rows, f.rows - task.row) + C::kDepth - 1) / C::kDepth;
        task.detail = chunk * ((f.cols + kBlockRows - 1) / kBlockRows) + task.col / kBlockRows;
        task.sums = p.y_parts + round % buffers * p.part_size +
                    static_cast<std::int64_t>(chunk * strip_blocks + block) * kBlockRows * C::kPanel;
        task.signal[0] = p.counters + 3 * round;
        if (round >= buffers) {
          task.wait[0] = p.counters + 3 * (round - buffers) + 1;
          task.target[0] = walk.freed;
        }
      } else if (i < half + reductions) {
        i -= half;
        const int block = i / C::kPairs;
        if (block >= column_blocks(b, walk.back)) break;
        task.kind = Kind::reduce;
        task.item = walk.back_item;
        task.col = walk.back * b.strip_cols + block * kBlockRows;
        task.tiles = 0;
        task.detail = i % C::kPairs;
        task.sums = p.y_parts + old % buffers * p.part_size + static_cast<std::int64_t>(block) * kBlockRows * C::kPanel;
        task.wait[0] = p.counters + 3 * old;
        task.target[0] = column_blocks(b, walk.back) * b.chunks;
        if (old >= kFactorBuffers) {
          task.wait[1] = p.counters + 3 * (old - kFactorBuffers) + 2;
          task.target[1] = walk.applied[kFactorBuffers - 1];
        }
        task.signal[0] = p.counters + 3 * old + 1;
      } else {
        i -= firsts + reductions;
        const int block = i % row_blocks(b), unit = walk.back * (b.strip_cols / b.unit_cols) + i / row_blocks(b);
        task.col = unit * b.unit_cols;
        if (task.col >= b.cols) break;
        task.kind = Kind::second;
        task.item = walk.back_item;
        task.row = block * kBlockRows;
        task.tiles = (min(b.unit_cols, b.cols - task.col) + C::kDepth - 1) / C::kDepth;
        task.detail = unit / b.slots;
        const int place = unit % b.slots * row_blocks(b) + block;
        task.sums = b.accumulators + static_cast<std::int64_t>(place) * kBlockRows * C::kPanel;
        task.wait[0] = p.counters + 3 * old + 1;
        task.target[0] = column_blocks(b, walk.back) * C::kPairs;
        task.wait[1] = b.chain + place;
        task.target[1] = task.detail;
        task.signal[0] = b.chain + place;
        task.signal[1] = p.counters + 3 * old + 2;
      }
      return;
    }
  }
}

// ---- tiles: `rows` lines of 16-byte groups, permuted so that neither copies nor fragment loads meet in a bank

template <class C, bool kSecond>
struct Tile {
  static constexpr int kRows = kSecond ? kBlockRows : C::kDepth;
  static constexpr int kGroups = kStageBytes / 2 / kRows / 16;
  static constexpr int kPerGroup = 16 / C::kBytes;

  // kSecond with fp32 reads pairs of columns from 4 rows at a time, everything else a column from 8 rows.
  static SAFELORA_DEVICE int at(int row, int group) {
    const int turn = C::kBytes == 4 && kSecond ? (row & 3) << 1 | (row >> 2 & 1) : row & 7;
    return row * kGroups * 16 + ((group ^ turn) << 4);
  }
};

template <class C>
SAFELORA_DEVICE void gather_group(char* to, const Strided& m, int rows, int cols, int row, int col) {
  std::uint32_t words[4] = {};
#pragma unroll
  for (int e = 0; e < 16 / C::kBytes; ++e) {
    if (row >= rows || col + e >= cols) continue;
    if constexpr (C::kBytes == 4)
      words[e] = __float_as_uint(load_entry<float>(m, row, col + e));
    else
      words[e / 2] |= static_cast<const std::uint16_t*>(m.data)[row * m.row + (col + e) * m.col] << e % 2 * 16;
  }
  *reinterpret_cast<uint4*>(to) = make_uint4(words[0], words[1], words[2], words[3]);
}

// 16 bytes, of which `bytes` are there. The second phase is the last to read them, and offers their place in L2 first.
template <bool kLast>
SAFELORA_DEVICE void copy_group(char* to, const char* from, int bytes) {
#if defined(__CUDACC__)
  if constexpr (kLast) {
    std::uint64_t policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2, %3;" ::"r"(shared_address(to)),
                 "l"(from), "r"(bytes), "l"(policy)
                 : "memory");
    return;
  }
#endif
  cp_async16(to, from, bytes);
}

// Starts the copies of a tile: zeros beyond the edges of the weights.
template <class C, bool kSecond>
SAFELORA_DEVICE void copy_tile(char* stage, const TicketItem& item, int row, int col) {
  using T = Tile<C, kSecond>;
  constexpr int kStep = kProjectThreads / T::kGroups, kCopies = T::kRows / kStep;
  const int group = threadIdx.x % T::kGroups, first = threadIdx.x / T::kGroups;
  const int i = row + first, j = col + group * T::kPerGroup;
  if (!item.direct) {
#pragma unroll 1
    for (int r = 0; r < T::kRows; r += kStep) {
      char* to = stage + T::at(first + r, group);
      gather_group<C>(to, item.aligned, item.rows, item.cols, i + r, j);
      gather_group<C>(to + kStageBytes / 2, item.base, item.rows, item.cols, i + r, j);
    }
    return;
  }
  const char* a = static_cast<const char*>(item.aligned.data) + (i * item.aligned.row + j) * C::kBytes;
  const char* b = static_cast<const char*>(item.base.data) + (i * item.base.row + j) * C::kBytes;
  const std::int64_t step_a = kStep * item.aligned.row * C::kBytes, step_b = kStep * item.base.row * C::kBytes;
  char* to = stage + T::at(first, group);
  static_assert(kStep % 8 == 0);  // so that all lines of a thread are permuted alike
  if (row + T::kRows <= item.rows && col + T::kGroups * T::kPerGroup <= item.cols) {
#pragma unroll
    for (int r = 0; r < kCopies; ++r, a += step_a, b += step_b, to += kStep * T::kGroups * 16) {
      copy_group<kSecond>(to, a, 16);
      copy_group<kSecond>(to + kStageBytes / 2, b, 16);
    }
    return;
  }
  const int bytes = max(0, min(16, (item.cols - j) * C::kBytes));
#pragma unroll 1
  for (int r = 0; r < kCopies; ++r, a += step_a, b += step_b, to += kStep * T::kGroups * 16) {
    const int n = i + r * kStep < item.rows ? bytes : 0;
    copy_group<kSecond>(to, static_cast<const char*>(n > 0 ? a : item.aligned.data), n);
    copy_group<kSecond>(to + kStageBytes / 2, static_cast<const char*>(n > 0 ? b : item.base.data), n);
  }
}

// ---- fragments of V

// A 16×16 fragment of V, m × k, at (m, k) of a tile. The first phase also adds up its squares.
template <class C, bool kSecond>
SAFELORA_DEVICE void load_fragment(std::uint32_t (&high)[4], std::uint32_t (&low)[4], float (&squares)[4],
                                   const char* stage, int m, int k) {
  using T = Tile<C, kSecond>;
  const int lane = threadIdx.x % 32;
  const auto finish = [&](int i, float2 v) {
    if constexpr (!kSecond) squares[i] = fmaf(v.y, v.y, fmaf(v.x, v.x, squares[i]));
    split(v, high[i], low[i]);
  };
  if constexpr (C::kBytes == 2) {
    const int row = kSecond ? m + lane % 16 : k + lane % 8 + lane / 16 * 8;
    const int group = kSecond ? k / 8 + lane / 16 : m / 8 + lane / 8 % 2;
    const char* at = stage + T::at(row, group);
    std::uint32_t a[4], b[4];
    if constexpr (kSecond) {
      ldmatrix_x4(a, at);
      ldmatrix_x4(b, at + kStageBytes / 2);
    } else {
      ldmatrix_x4_trans(a, at);
      ldmatrix_x4_trans(b, at + kStageBytes / 2);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if constexpr (kSecond)
        C::split_difference(a[i], b[i], high[i], low[i]);
      else
        finish(i, C::difference(a[i], b[i]));
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = m + lane / 4 + i % 2 * 8, depth = k + lane % 4 * 2 + i / 2 * 8;
      const char* at = stage + (kSecond ? T::at(row, depth / 4) + depth % 4 * 4 : T::at(depth, row / 4) + row % 4 * 4);
      const char* next = kSecond ? at + 4 : stage + T::at(depth + 1, row / 4) + row % 4 * 4;
      const auto difference = [](const char* p) {
        return *reinterpret_cast<const float*>(p) - *reinterpret_cast<const float*>(p + kStageBytes / 2);
      };
      finish(i, {difference(at), difference(next)});
    }
  }
}

template <class C>
using Factor = uint4[C::kTilesN];  // of 16 rows: high and low of each pair of n-tiles
template <class C>
using Sum = float[C::kTilesM][C::kTilesN][4];

template <class C>
SAFELORA_DEVICE void load_factor(Factor<C>& f, const std::uint32_t* factor, int k) {
  const uint4* at = reinterpret_cast<const uint4*>(factor) + static_cast<std::int64_t>(k / 16) * C::kPanel * 4;
#pragma unroll
  for (int i = 0; i < C::kTilesN; ++i) f[i] = at[i * 32 + threadIdx.x % 32];
}

// sum += (16·kTilesM × 16 of the tile at (m, k)) · factor
template <class C, bool kSecond>
SAFELORA_DEVICE void multiply(Sum<C>& sum, float (&squares)[4], const char* stage, int m, int k, const Factor<C>& f) {
#pragma unroll
  for (int i = 0; i < C::kTilesM; ++i) {
    std::uint32_t high[4], low[4];
    load_fragment<C, kSecond>(high, low, squares, stage, m + i * 16, k);
#pragma unroll
    for (int j = 0; j < C::kTilesN; ++j) {
      const uint4 h = f[j / 2 * 2];
      const std::uint32_t b[2] = {j % 2 ? h.z : h.x, j % 2 ? h.w : h.y};
      mma_bf16_16816(sum[i][j], low, b);
    }
#pragma unroll
    for (int j = 0; j < C::kTilesN; ++j) {
      const uint4 l = f[j / 2 * 2 + 1];
      const std::uint32_t b[2] = {j % 2 ? l.z : l.x, j % 2 ? l.w : l.y};
      mma_bf16_16816(sum[i][j], high, b);
    }
#pragma unroll
    for (int j = 0; j < C::kTilesN; ++j) {
      const uint4 h = f[j / 2 * 2];
      const std::uint32_t b[2] = {j % 2 ? h.z : h.x, j % 2 ? h.w : h.y};
      mma_bf16_16816(sum[i][j], high, b);
    }
  }
}

// One block's way through the tickets. Every thread keeps the same counts.
template <class C>
class Worker {
 public:
  __device__ Worker(const TicketParams& p, char* stages, Shared& shared) : p_(p), stages_(stages), shared_(shared) {}

  __device__ void run() {
    if (threadIdx.x == 0) {
      shared_.walk = {};
      next_ticket_ = add_relaxed(p_.ticket, 1u);
    }
#pragma unroll 1
    for (int i = 0; i < 2; ++i) fill();
    __syncthreads();
    visible_ = filled_;
    for (;; ++task_) {
      const Task& task = shared_.queue[task_ % kQueue];
      if (task.kind == Kind::end) break;
      if (threadIdx.x < (task.kind == Kind::second ? 1 : 2)) wait(task, threadIdx.x);
      if (task.kind == Kind::first)
        run_tiles<false>(task);
      else if (task.kind == Kind::second)
        run_tiles<true>(task);
      else
        reduce(task);
      __syncthreads();
      const unsigned end = threadIdx.x - (kProjectThreads - 32);
      if (end < 2 && task.signal[end] != nullptr) add_release(task.signal[end], 1u);
    }
  }

 private:
  SAFELORA_DEVICE void fill() {
    if (threadIdx.x == 0) next_task<C>(p_, next_ticket_, shared_.walk, shared_.queue[filled_ % kQueue]);
    ++filled_;
  }

  // A barrier. Tasks written to the queue before it may be read behind it.
  SAFELORA_DEVICE void sync() {
    __syncthreads();
    visible_ = filled_;
    if (filled_ - task_ < kQueue - 1) fill();
  }

  // Starts the copies of tiles up to, not including, number `end`; those of later tasks, too.
  SAFELORA_DEVICE void copy_until(unsigned end) {
    if (copy_task_ < task_) {  // tasks without tiles went by; their places in the queue may be taken
      copy_task_ = task_;
      copy_tile_ = 0;
    }
    while (issued_ < end && copy_task_ < visible_) {
      const Task& task = shared_.queue[copy_task_ % kQueue];
      if (copy_tile_ >= task.tiles) {
        ++copy_task_;
        copy_tile_ = 0;
        continue;
      }
      char* stage = stages_ + issued_ % kStages * kStageBytes;
      const TicketItem& item = p_.items[task.item];
      const int offset = copy_tile_ * C::kDepth;
      if (task.kind == Kind::first)
        copy_tile<C, false>(stage, item, task.row + offset, task.col);
      else
        copy_tile<C, true>(stage, item, task.row, task.col + offset);
      cp_async_commit();
      ++copy_tile_;
      ++issued_;
    }
  }

  template <bool kSecond>
  SAFELORA_DEVICE void run_tiles(const Task& task) {
    const TicketItem& item = p_.items[task.item];
    const int warp = threadIdx.x / 32;
    const int m = warp % C::kAcross * C::kTilesM * 16, k = warp / C::kAcross * C::kSteps * 16;
    const std::uint32_t* factors = kSecond ? task.y : item.factor;
    const int start = (kSecond ? task.col - task.strip_col : task.row) + k;

    Sum<C> sum = {};
    float squares[4] = {};
    Factor<C> factor[2];
    char* stage = nullptr;
    if (kSecond) sync();  // Y is there
#pragma unroll 1
    for (int tile = 0; tile < task.tiles; ++tile, ++done_) {
      load_factor<C>(factor[0], factors, start + tile * C::kDepth);  // under way while the tile is waited for
      const bool late = issued_ == done_;                            // nothing was copied ahead
      if (issued_ >= done_ + kStages - 1)
        cp_async_wait<kStages - 2>();
      else
        cp_async_wait<0>();
      sync();
      copy_until(done_ + kStages);
      if (late) {
        cp_async_wait<0>();
        __syncthreads();
      }
      stage = stages_ + done_ % kStages * kStageBytes;
#pragma unroll
      for (int s = 0; s < C::kSteps; ++s) {
        if (s + 1 < C::kSteps) load_factor<C>(factor[(s + 1) % 2], factors, start + tile * C::kDepth + (s + 1) * 16);
        multiply<C, kSecond>(sum, squares, stage, m, k + s * 16, factor[s % 2]);
      }
    }
    // The last tile's stage is free until the next tile's barrier.
    if (!kSecond && item.squares != nullptr) store_squares(squares, item.squares + task.detail);
    store_sums<kSecond>(task, sum, reinterpret_cast<float4*>(stage));
  }

  SAFELORA_DEVICE void wait(const Task& task, unsigned which) {
    if (task.wait[which] == nullptr) return;
    while (load_acquire(task.wait[which]) < task.target[which]) spin_pause();
  }

  // Adds the warps along the contraction, in order, and for the second phase what earlier units have left, which is
  // waited for only now.
  template <bool kSecond>
  SAFELORA_DEVICE void store_sums(const Task& task, const Sum<C>& sum, float4* scratch) {
    constexpr int kUnits = C::kTilesN * kBlockRows / 16;  // fragments of 32 float4
    constexpr int kRound = C::kAlong * kUnits * 512 > kStageBytes ? C::kTilesN / 2 : C::kTilesN;  // n-tiles at a time
    constexpr int kShare = kBlockRows / 16 * kRound / kWarps;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int across = warp % C::kAcross, along = warp / C::kAcross;
    float4* to = reinterpret_cast<float4*>(task.sums);
    if (kSecond) {
      if (threadIdx.x == 0) wait(task, 1);
      __syncthreads();
    }
#pragma unroll
    for (int round = 0; round < C::kTilesN; round += kRound) {
      float4 before[kShare];
      if (kSecond) {
#pragma unroll
        for (int i = 0; i < kShare; ++i) {
          const int unit = warp * kShare + i;
          const int place = (unit / kRound * C::kTilesN + round + unit % kRound) * 32 + lane;
          before[i] = task.detail > 0 ? load_l2(to + place) : make_float4(0, 0, 0, 0);
        }
      }
      __syncthreads();
#pragma unroll
      for (int i = 0; i < C::kTilesM; ++i)
#pragma unroll
        for (int j = 0; j < kRound; ++j) {
          const float (&s)[4] = sum[i][round + j];
          const int unit = (across * C::kTilesM + i) * kRound + j;
          scratch[(along * kBlockRows / 16 * kRound + unit) * 32 + lane] = make_float4(s[0], s[1], s[2], s[3]);
        }
      __syncthreads();
#pragma unroll
      for (int i = 0; i < kShare; ++i) {
        const int unit = warp * kShare + i;
        float4 total = scratch[unit * 32 + lane];
#pragma unroll
        for (int a = 1; a < C::kAlong; ++a) {
          const float4 part = scratch[(a * kBlockRows / 16 * kRound + unit) * 32 + lane];
          total = {total.x + part.x, total.y + part.y, total.z + part.z, total.w + part.w};
        }
        if (kSecond)
          total = {before[i].x + total.x, before[i].y + total.y, before[i].z + total.z, before[i].w + total.w};
        to[(unit / kRound * C::kTilesN + round + unit % kRound) * 32 + lane] = total;
      }
    }
  }

  SAFELORA_DEVICE void store_squares(const float (&squares)[4], double* to) {
    double sum = (static_cast<double>(squares[0]) + squares[1]) + (static_cast<double>(squares[2]) + squares[3]);
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    if (threadIdx.x % 32 == 0) shared_.squares[threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x == 0) *to = (shared_.squares[0] + shared_.squares[1]) + (shared_.squares[2] + shared_.squares[3]);
  }

  // Adds the chunks of 64 rows of Y × 16 columns in order, and turns the sums into a factor: a warp has 16 × 16.
  SAFELORA_DEVICE void reduce(const Task& task) {
    sync();
    const TicketItem& item = p_.items[task.item];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const std::int64_t stride = static_cast<std::int64_t>(item.strip_cols) * C::kPanel / 4;
    const float4* from = reinterpret_cast<const float4*>(task.sums) + (warp * C::kTilesN + task.detail * 2) * 32 + lane;
    float4 sum[2] = {};
#pragma unroll 4
    for (int c = 0; c < item.chunks; ++c)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float4 part = load_l2(from + c * stride + i * 32);
        sum[i] = {sum[i].x + part.x, sum[i].y + part.y, sum[i].z + part.z, sum[i].w + part.w};
      }
    std::uint32_t high[4], low[4];
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        // This lane's k = 2·(lane % 4) and the next, n = lane / 4; they lie in the lanes k·4 + n / 2.
        const int source = lane % 4 * 8 + lane / 8;
        float2 y;
        const float even = half ? sum[i].z : sum[i].x, odd = half ? sum[i].w : sum[i].y;
        const float x0 = __shfl_sync(0xffffffffu, even, source), x1 = __shfl_sync(0xffffffffu, odd, source);
        const float y0 = __shfl_sync(0xffffffffu, even, source + 4), y1 = __shfl_sync(0xffffffffu, odd, source + 4);
        y.x = lane / 4 % 2 ? x1 : x0;
        y.y = lane / 4 % 2 ? y1 : y0;
        split(y, high[i * 2 + half], low[i * 2 + half]);
      }
    uint4* to = reinterpret_cast<uint4*>(task.y) +
                static_cast<std::int64_t>((task.col - task.strip_col) / 16 + warp) * C::kPanel * 4 + task.detail * 64 +
                lane;
    to[0] = make_uint4(high[0], high[1], high[2], high[3]);
    to[32] = make_uint4(low[0], low[1], low[2], low[3]);
  }

  const TicketParams& p_;
  char* stages_;
  Shared& shared_;
  unsigned task_ = 0, filled_ = 0, visible_ = 0;    // tasks: current, in the queue, readable there
  unsigned copy_task_ = 0, issued_ = 0, done_ = 0;  // the task whose tiles are being copied; tiles
  int copy_tile_ = 0;
  std::uint32_t next_ticket_ = 0;
};

template <class C>
SAFELORA_DEVICE void run_tickets(const TicketParams& p) {
  DYN_SHARED(char, stages);
  Worker<C>(p, stages, *reinterpret_cast<Shared*>(stages + kStages * kStageBytes)).run();
}

// ---- before and after

// One thread for the two entries of a fragment word: k = 2·(lane % 4) + 8·half and the next.
SAFELORA_DEVICE void pack(const PackItem& item) {
  const int pairs = item.panel / 16;
  const std::int64_t words = (static_cast<std::int64_t>(item.rows) + kBlockRows - 1) / kBlockRows * (kBlockRows / 2);
  const std::int64_t total = words * item.columns;
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < total;
       i += static_cast<std::int64_t>(gridDim.x) * blockDim.x) {
    const int column = static_cast<int>(i % item.columns), n = item.first_column + column;
    const std::int64_t k = i / item.columns * 2;
    float2 v = {0, 0};
    if (item.from.data != nullptr) {
      if (k < item.rows) v.x = load_entry<float>(item.from, k, column);
      if (k + 1 < item.rows) v.y = load_entry<float>(item.from, k + 1, column);
    }
    std::uint32_t high, low;
    split(v, high, low);
    const int lane = n % 8 * 4 + static_cast<int>(k % 8) / 2, word = static_cast<int>(k / 8 % 2) + n / 8 % 2 * 2;
    std::uint32_t* to = item.to + ((k / 16 * pairs + n / 16) * 64 + lane) * 4 + word;
    to[0] = high;
    to[128] = low;
  }
}

// The item of a table that block `block` works on, `first` telling where each one starts.
template <class F>
SAFELORA_DEVICE int find_item(int items, int block, F first) {
  int low = 0, high = items - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (first(middle) <= block)
      low = middle;
    else
      high = middle - 1;
  }
  return low;
}

template <class T>
SAFELORA_DEVICE T load_difference(const ExactItem& item, int i, int j) {
  return load_entry<T>(item.aligned, i, j) - load_entry<T>(item.base, i, j);
}

constexpr int kExactRanks = 8;

// Y = VᵀB of 32 columns: a lane for each, a warp for every fourth row.
template <class T>
SAFELORA_DEVICE void exact_first(const ExactParams& p) {
  DYN_SHARED(T, scratch);
  const int index = find_item(p.num_items, blockIdx.x, [&](int i) { return p.items[i].first_column_block; });
  const ExactItem& item = p.items[index];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int block = blockIdx.x - item.first_column_block, j = block * 32 + lane;
  double squares = 0;
  for (int n0 = 0; n0 == 0 || n0 < item.rank; n0 += kExactRanks) {
    T y[kExactRanks] = {};
    for (int i = warp; i < item.rows; i += kWarps) {
      const T v = j < item.cols ? load_difference<T>(item, i, j) : T(0);
      if (n0 == 0) squares += static_cast<double>(v) * static_cast<double>(v);
      if (item.rank == 0) continue;
#pragma unroll
      for (int n = 0; n < kExactRanks; ++n)  // columns beyond the last are the last once more, and not stored
        y[n] = fma(v, load_entry<T>(item.factor, i, min(n0 + n, item.rank - 1)), y[n]);
    }
    __syncthreads();
#pragma unroll
    for (int n = 0; n < kExactRanks; ++n) scratch[(warp * kExactRanks + n) * 32 + lane] = y[n];
    __syncthreads();
    for (int n = n0 + warp; n < min(n0 + kExactRanks, item.rank); n += kWarps) {
      T sum = 0;
      for (int w = 0; w < kWarps; ++w) sum += scratch[(w * kExactRanks + n - n0) * 32 + lane];
      if (j < item.cols) static_cast<T*>(item.y)[static_cast<std::int64_t>(j) * item.rank + n] = sum;
    }
  }
  if (item.squares == nullptr) return;
  for (int offset = 16; offset > 0; offset /= 2) squares += __shfl_xor_sync(0xffffffffu, squares, offset);
  __syncthreads();
  double* warps = reinterpret_cast<double*>(scratch);
  if (lane == 0) warps[warp] = squares;
  __syncthreads();
  if (threadIdx.x == 0) item.squares[block] = (warps[0] + warps[1]) + (warps[2] + warps[3]);
}

// V·Y: a warp for each row.
template <class T>
SAFELORA_DEVICE void exact_second(const ExactParams& p) {
  const int index = find_item(p.num_items, blockIdx.x, [&](int i) { return p.items[i].first_row_block; });
  const ExactItem& item = p.items[index];
  const int lane = threadIdx.x % 32;
  const int i = (blockIdx.x - item.first_row_block) * kWarps + threadIdx.x / 32;
  if (i >= item.rows) return;
  const T* y = static_cast<const T*>(item.y);
  for (int n0 = 0; n0 < item.rank; n0 += kExactRanks) {
    T sum[kExactRanks] = {};
    for (int j = lane; j < item.cols; j += 32) {
      const T v = load_difference<T>(item, i, j);
#pragma unroll
      for (int n = 0; n < kExactRanks; ++n)
        sum[n] = fma(v, y[static_cast<std::int64_t>(j) * item.rank + min(n0 + n, item.rank - 1)], sum[n]);
    }
#pragma unroll
    for (int n = 0; n < kExactRanks; ++n) {
      for (int offset = 16; offset > 0; offset /= 2) sum[n] += __shfl_xor_sync(0xffffffffu, sum[n], offset);
      if (lane == 0 && n0 + n < item.rank)
        static_cast<T*>(item.accumulators)[static_cast<std::int64_t>(i) * item.rank + n0 + n] = sum[n];
    }
  }
}

// The sum of a value of every thread, in all threads.
SAFELORA_DEVICE double block_sum(double value, double* scratch) {
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
  __syncthreads();
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
  __syncthreads();
  return (scratch[0] + scratch[1]) + (scratch[2] + scratch[3]);
}

SAFELORA_DEVICE void norm(const NormParams& p) {
  DYN_SHARED(double, scratch);
  const NormItem& item = p.items[blockIdx.x];
  double squares = 0;
  for (int i = threadIdx.x; i < item.parts; i += kProjectThreads) squares += item.squares[i];
  squares = block_sum(squares, scratch);
  // fp32 squares leave the range of fp32 long before the weights do: beyond it, sum them again in fp64.
  if (!(squares > 1e-24 && squares < 1e36)) {
    squares = 0;
    for (int i = 0; i < item.rows; ++i)
      for (int j = threadIdx.x; j < item.cols; j += kProjectThreads) {
        const double v = load_entry<double>(item.aligned, i, j) - load_entry<double>(item.base, i, j);
        squares = fma(v, v, squares);
      }
    squares = block_sum(squares, scratch);
  }
  if (threadIdx.x != 0) return;
  const double norm = sqrt(squares) + (squares - squares);  // NaN for an infinite sum, too
  *item.v_norm = norm;
  *item.scale = norm == 0 ? 0 : norm != norm ? norm : p.frobenius ? 1 / norm : 1;
}

template <class T>
SAFELORA_DEVICE void finish_item(const FinishItem& item) {
  const T* sums = static_cast<const T*>(item.accumulators);
  const double scale = *item.scale;
  const int rows = min(kBlockRows, item.rows - static_cast<int>(blockIdx.x) * kBlockRows);
  for (int e = threadIdx.x; e < rows * item.columns; e += kProjectThreads) {
    const int m = e / item.columns, column = e % item.columns, n = item.first_column + column;
    const std::int64_t row = static_cast<std::int64_t>(blockIdx.x) * kBlockRows + m;
    std::int64_t at = row * item.panel + n;
    if (item.sums == Sums::fragments)
      at = static_cast<std::int64_t>(blockIdx.x) * kBlockRows * item.panel +
           ((m / 16 * (item.panel / 8) + n / 8) * 32 + m % 8 * 4 + n % 8 / 2) * 4 + n % 2 + m / 8 % 2 * 2;
    T sum = 0;
    for (int s = 0; s < item.slots; ++s) sum += sums[s * item.slot_size + at];
    const T value = static_cast<T>(static_cast<double>(sum) * scale);
    const std::int64_t to = row * item.out_row + column * item.out_col;
    if constexpr (std::is_same_v<T, double>)
      store_double(item.out, item.out_dtype, to, value);
    else
      store_float(item.out, item.out_dtype, to, value);
    if (item.wide != nullptr) static_cast<T*>(item.wide)[row * item.wide_stride + column] = value;
  }
}

SAFELORA_DEVICE void finish(const FinishParams& p) {
  const FinishItem& item = p.items[blockIdx.y];
  if (static_cast<std::int64_t>(blockIdx.x) * kBlockRows >= item.rows) return;
  if (item.sums == Sums::rows_f64)
    finish_item<double>(item);
  else
    finish_item<float>(item);
}

template <class T>
SAFELORA_DEVICE void keep_item(const KeepItem& item) {
  const bool selected = *item.selected;
  if (selected && item.wide == nullptr) return;
  const int rows = min(kBlockRows, item.rows - static_cast<int>(blockIdx.x) * kBlockRows);
  for (int e = threadIdx.x; e < rows * item.columns; e += kProjectThreads) {
    const std::int64_t row = static_cast<std::int64_t>(blockIdx.x) * kBlockRows + e / item.columns;
    const int column = e % item.columns;
    const T value = selected ? static_cast<const T*>(item.wide)[row * item.columns + column]
                             : load_entry<T>(item.lora_B, row, column);
    const std::int64_t to = row * item.out_row + column * item.out_col;
    if constexpr (std::is_same_v<T, double>)
      store_double(item.out, item.out_dtype, to, value);
    else
      store_float(item.out, item.out_dtype, to, value);
  }
}

SAFELORA_DEVICE void keep(const KeepParams& p) {
  const KeepItem& item = p.items[blockIdx.y];
  if (static_cast<std::int64_t>(blockIdx.x) * kBlockRows >= item.rows) return;
  if (item.f64)
    keep_item<double>(item);
  else
    keep_item<float>(item);
}

}  // namespace

SAFELORA_KERNEL(project_pack, PackParams, kProjectThreads) { pack(params.items[blockIdx.y]); }
SAFELORA_KERNEL(project_bf16_16, TicketParams, kProjectThreads, 3) { run_tickets<Config<Weights::bf16, 16>>(params); }
SAFELORA_KERNEL(project_bf16_32, TicketParams, kProjectThreads, 3) { run_tickets<Config<Weights::bf16, 32>>(params); }
SAFELORA_KERNEL(project_bf16_64, TicketParams, kProjectThreads, 2) { run_tickets<Config<Weights::bf16, 64>>(params); }
SAFELORA_KERNEL(project_f16_16, TicketParams, kProjectThreads, 3) { run_tickets<Config<Weights::f16, 16>>(params); }
SAFELORA_KERNEL(project_f16_32, TicketParams, kProjectThreads, 3) { run_tickets<Config<Weights::f16, 32>>(params); }
SAFELORA_KERNEL(project_f16_64, TicketParams, kProjectThreads, 2) { run_tickets<Config<Weights::f16, 64>>(params); }
SAFELORA_KERNEL(project_f32_16, TicketParams, kProjectThreads, 3) { run_tickets<Config<Weights::f32, 16>>(params); }
SAFELORA_KERNEL(project_f32_32, TicketParams, kProjectThreads, 3) { run_tickets<Config<Weights::f32, 32>>(params); }
SAFELORA_KERNEL(project_f32_64, TicketParams, kProjectThreads, 2) { run_tickets<Config<Weights::f32, 64>>(params); }
SAFELORA_KERNEL(project_exact_first_f32, ExactParams, kProjectThreads) { exact_first<float>(params); }
SAFELORA_KERNEL(project_exact_first_f64, ExactParams, kProjectThreads) { exact_first<double>(params); }
SAFELORA_KERNEL(project_exact_second_f32, ExactParams, kProjectThreads) { exact_second<float>(params); }
SAFELORA_KERNEL(project_exact_second_f64, ExactParams, kProjectThreads) { exact_second<double>(params); }
SAFELORA_KERNEL(project_norm, NormParams, kProjectThreads) { norm(params); }
SAFELORA_KERNEL(project_finish, FinishParams, kProjectThreads) { finish(params); }
SAFELORA_KERNEL(project_keep, KeepParams, kProjectThreads) { keep(params); }

}  // namespace safelora::cuda
