// Products of SaLoRA's linear update. See salora_linear.cuh.
#include "salora_linear.cuh"
#include "tile.cuh"

namespace safelora::cuda {
namespace {

template <class T>
SAFELORA_DEVICE void store(const Strided& m, std::int64_t row, std::int64_t col, T value) {
  void* data = const_cast<void*>(m.data);
  const std::int64_t index = row * m.row + col * m.col;
  if constexpr (sizeof(T) == 8)
    store_double(data, m.dtype, index, value);
  else
    store_float(data, m.dtype, index, value);
}

// RANKS: of a panel. TRANSPOSED: how W is stored.
template <class T, int RANKS, bool TRANSPOSED>
SAFELORA_DEVICE void reduce_block(const ReduceParams& p) {
  using Sizes = ReduceShape<RANKS, sizeof(T) == 8>;
  constexpr int kTiles = Sizes::kTiles, kTokens = Sizes::kTokens, kSplits = Sizes::kSplits;
  constexpr int kAcross = RANKS * kSplits / 2, NT = kAcross / 8, kDepth = kEdge / kSplits;
  DYN_SHARED(T, shared);
  T *m = shared, *w = m + kEdge * kEdge, *h = w + kEdge * RANKS, *rows = h + kTokens * RANKS;
  unsigned* word = reinterpret_cast<unsigned*>(shared + Sizes::kShared);
  T *row_parts = static_cast<T*>(p.row_parts), *col_parts = static_cast<T*>(p.col_parts);

  const int block = static_cast<int>(blockIdx.x), panel = block % p.panels, range = block / p.panels % p.ranges;
  const int chunk = block / p.panels / p.ranges, rank0 = panel * RANKS, padded_rank = p.panels * RANKS;
  const int warp = static_cast<int>(threadIdx.x) / 32, half = warp / 4, r0 = warp % 4 * 16;
  const int n0 = kSplits == 2 ? 0 : half * kAcross, k0 = kSplits == 2 ? half * kDepth : 0;
  const int first_col = range * kRangeCols;
  const int last_col = p.cols - first_col < kRangeCols ? p.cols : first_col + kRangeCols;
  const bool split_m = needs_split(p.m.dtype), split_w = needs_split(p.w.dtype), split_h = needs_split(p.h.dtype);
  T* own_rows = rows + (kSplits == 2 ? half * kTokens * RANKS : 0);
  T* own_cols = col_parts + (static_cast<std::int64_t>(chunk) * p.ranges + range) * kRangeCols * padded_rank;

  const int first_group = chunk * p.groups_per_chunk;
  const int last_group = p.groups - first_group < p.groups_per_chunk ? p.groups : first_group + p.groups_per_chunk;
  for (int group = first_group; group < last_group; ++group) {
    const std::int64_t token0 = static_cast<std::int64_t>(group) * kTokens;
    __syncthreads();
    for (int e = fresh_thread_index(); e < kSplits * kTokens * RANKS; e += kThreads) rows[e] = 0;
    if (p.want_cols)
#pragma unroll 1
      for (int tile = 0; tile < kTiles && token0 + tile * kEdge < p.tokens; ++tile)
        stage<T, kEdge, RANKS>(h + tile * kEdge * RANKS, p.h, token0 + tile * kEdge, rank0, p.tokens, p.rank);
#pragma unroll 1
    for (int col = first_col; col < last_col; col += kEdge) {
      T cols[1][NT][4] = {};
#pragma unroll 1
      for (int tile = 0; tile < kTiles && token0 + tile * kEdge < p.tokens; ++tile) {
        __syncthreads();
        if (tile == 0 && p.want_rows) {
          if constexpr (TRANSPOSED)
            stage<T, RANKS, kEdge>(w, p.w, rank0, col, p.rank, p.cols);
          else
            stage<T, kEdge, RANKS>(w, p.w, col, rank0, p.cols, p.rank);
        }
        stage<T, kEdge, kEdge>(m, p.m, token0 + tile * kEdge, col, p.tokens, p.cols);
        __syncthreads();
        if (p.want_rows) {
          const Lane lane = fresh_lane();
#pragma unroll 1
          for (int n = n0; n < n0 + kAcross; n += 16) {
            T acc[1][2][4] = {};
            const Tile<T, kEdge> left = {m};
            if constexpr (TRANSPOSED)
              multiply<1, 2, kDepth>(acc, left, TransposedTile<T, kEdge>{w}, r0, n, k0, split_m, split_w);
            else
              multiply<1, 2, kDepth>(acc, left, Tile<T, RANKS>{w}, r0, n, k0, split_m, split_w);
#pragma unroll
            for (int j = 0; j < 2; ++j)
#pragma unroll
              for (int q = 0; q < 4; ++q)
                own_rows[place<RANKS>(tile * kEdge + r0 + lane.row(q), n + j * 8 + lane.col(q))] += acc[0][j][q];
          }
        }
        if (p.want_cols)
          multiply<1, NT, kDepth>(cols, TransposedTile<T, kEdge>{m}, Tile<T, RANKS>{h + tile * kEdge * RANKS}, r0, n0,
                                  k0, split_m, split_h);
      }
      if (!p.want_cols) continue;
      const Lane lane = fresh_lane();
      if constexpr (kSplits == 2) {
        __syncthreads();
        if (half == 1)
#pragma unroll
          for (int j = 0; j < NT; ++j)
#pragma unroll
            for (int q = 0; q < 4; ++q) m[place<RANKS>(r0 + lane.row(q), j * 8 + lane.col(q))] = cols[0][j][q];
        __syncthreads();
        if (half == 1) continue;
#pragma unroll
        for (int j = 0; j < NT; ++j)
#pragma unroll
          for (int q = 0; q < 4; ++q) cols[0][j][q] += m[place<RANKS>(r0 + lane.row(q), j * 8 + lane.col(q))];
      }
#pragma unroll
      for (int j = 0; j < NT; ++j)
#pragma unroll
        for (int q = 0; q < 4; ++q) {
          T* sum = own_cols + static_cast<std::int64_t>(col - first_col + r0 + lane.row(q)) * padded_rank + rank0 + n0 +
                   j * 8 + lane.col(q);
          *sum = group == first_group ? cols[0][j][q] : *sum + cols[0][j][q];
        }
    }
    if (!p.want_rows) continue;
    __syncthreads();
    const std::int64_t group_size = static_cast<std::int64_t>(kTokens) * padded_rank, all = p.groups * group_size;
    T* parts = row_parts + group * group_size + rank0;
    for (int e = fresh_thread_index(); e < kTokens * RANKS; e += kThreads) {
      const int i = e / RANKS, r = e % RANKS;
      T sum = rows[place<RANKS>(i, r)];
      if constexpr (kSplits == 2) sum += rows[kTokens * RANKS + place<RANKS>(i, r)];
      parts[range * all + static_cast<std::int64_t>(i) * padded_rank + r] = sum;
    }
    if (!arrives_last(p.counters + group * p.panels + panel, static_cast<unsigned>(p.ranges), word)) continue;
    for (int e = fresh_thread_index(); e < kTokens * RANKS; e += kThreads) {
      const int i = e / RANKS, r = e % RANKS;
      if (token0 + i >= p.tokens || rank0 + r >= p.rank) continue;
      T sum = 0;
#pragma unroll 4
      for (int other = 0; other < p.ranges; ++other)
        sum += parts[other * all + static_cast<std::int64_t>(i) * padded_rank + r];
      store<T>(p.row_sums, token0 + i, rank0 + r, static_cast<T>(p.row_scale) * sum);
    }
  }
  if (!p.want_cols) return;
  unsigned* arrival = p.counters + (p.groups + range) * p.panels + panel;
  if (!arrives_last(arrival, static_cast<unsigned>(p.chunks), word)) return;
  const std::int64_t all = static_cast<std::int64_t>(p.ranges) * kRangeCols * padded_rank;
  const T* parts = col_parts + static_cast<std::int64_t>(range) * kRangeCols * padded_rank + rank0;
  for (int e = fresh_thread_index(); e < (last_col - first_col) * RANKS; e += kThreads) {
    const int i = e / RANKS, r = e % RANKS;
    if (rank0 + r >= p.rank) continue;
    T sum = 0;
#pragma unroll 4
    for (int other = 0; other < p.chunks; ++other)
      sum += parts[other * all + static_cast<std::int64_t>(i) * padded_rank + r];
    store<T>(p.col_sums, first_col + i, rank0 + r, static_cast<T>(p.col_scale) * sum);
  }
}

template <class T, bool TRANSPOSED>
SAFELORA_DEVICE void expand_block(const ExpandParams& p) {
  constexpr int MT = 2, NT = 2, kWarpsAcross = kExpandCols / (8 * NT);
  static_assert(kExpandRows / (16 * MT) * kWarpsAcross * 32 == kThreads);
  DYN_SHARED(T, shared);
  T *left = shared, *right = left + kExpandRows * kExpandDepth;
  const int across = (p.cols + kExpandCols - 1) / kExpandCols, warp = static_cast<int>(threadIdx.x) / 32;
  const std::int64_t token0 = static_cast<std::int64_t>(blockIdx.x) / across * kExpandRows;
  const int col0 = static_cast<int>(blockIdx.x) % across * kExpandCols;
  const int r0 = warp / kWarpsAcross * 16 * MT, n0 = warp % kWarpsAcross * 8 * NT;
  T acc[MT][NT][4] = {};
  for (int k0 = 0; k0 < p.rank; k0 += kExpandDepth) {
    __syncthreads();
    stage<T, kExpandRows, kExpandDepth>(left, p.left, token0, k0, p.tokens, p.rank);
    if constexpr (TRANSPOSED)
      stage<T, kExpandCols, kExpandDepth>(right, p.right, col0, k0, p.cols, p.rank);
    else
      stage<T, kExpandDepth, kExpandCols>(right, p.right, k0, col0, p.rank, p.cols);
    __syncthreads();
    const Tile<T, kExpandDepth> a = {left};
    const bool split_left = needs_split(p.left.dtype), split_right = needs_split(p.right.dtype);
    if constexpr (TRANSPOSED)
      multiply<MT, NT, kExpandDepth>(acc, a, TransposedTile<T, kExpandDepth>{right}, r0, n0, 0, split_left,
                                     split_right);
    else
      multiply<MT, NT, kExpandDepth>(acc, a, Tile<T, kExpandCols>{right}, r0, n0, 0, split_left, split_right);
  }
  __syncthreads();
  const Lane lane = fresh_lane();
#pragma unroll
  for (int i = 0; i < MT; ++i)
#pragma unroll
    for (int j = 0; j < NT; ++j)
#pragma unroll
      for (int q = 0; q < 4; ++q)
        shared[place<kExpandCols>(r0 + i * 16 + lane.row(q), n0 + j * 8 + lane.col(q))] =
            static_cast<T>(p.scale) * acc[i][j][q];
  __syncthreads();
  add_tile<T, kExpandRows, kExpandCols>(shared, p.in, p.out, token0, col0, p.tokens, p.cols);
}

}  // namespace

SAFELORA_KERNEL(reduce16_f32, ReduceParams, kThreads, 2) { reduce_block<float, 16, false>(params); }
SAFELORA_KERNEL(reduce16_f32_t, ReduceParams, kThreads, 2) { reduce_block<float, 16, true>(params); }
SAFELORA_KERNEL(reduce32_f32, ReduceParams, kThreads, 2) { reduce_block<float, 32, false>(params); }
SAFELORA_KERNEL(reduce32_f32_t, ReduceParams, kThreads, 2) { reduce_block<float, 32, true>(params); }
SAFELORA_KERNEL(reduce64_f32, ReduceParams, kThreads, 2) { reduce_block<float, 64, false>(params); }
SAFELORA_KERNEL(reduce64_f32_t, ReduceParams, kThreads, 2) { reduce_block<float, 64, true>(params); }
SAFELORA_KERNEL(reduce16_f64, ReduceParams, kThreads, 1) { reduce_block<double, 16, false>(params); }
SAFELORA_KERNEL(reduce16_f64_t, ReduceParams, kThreads, 1) { reduce_block<double, 16, true>(params); }
SAFELORA_KERNEL(expand_f32, ExpandParams, kThreads, 2) { expand_block<float, false>(params); }
SAFELORA_KERNEL(expand_f32_t, ExpandParams, kThreads, 2) { expand_block<float, true>(params); }
SAFELORA_KERNEL(expand_f64, ExpandParams, kThreads, 1) { expand_block<double, false>(params); }
SAFELORA_KERNEL(expand_f64_t, ExpandParams, kThreads, 1) { expand_block<double, true>(params); }

}  // namespace safelora::cuda
