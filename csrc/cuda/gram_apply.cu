// Xᵀ diag(w) X Z. See gram_apply.cuh.
#include "gram_apply.cuh"
#include "tile.cuh"

namespace safelora::cuda {
namespace {

SAFELORA_DEVICE int pieces(std::int64_t length, int of) { return static_cast<int>((length + of - 1) / of); }

// One task. `number` counts those of its span: by block, chunk and panel, or by block of columns and panel.
struct Work {
  const GramEntry* item;
  int span, number;
  bool first;
};

template <int RANKS>
struct Cut {
  int blocks, spans, chunks, panels, columns;

  SAFELORA_DEVICE explicit Cut(const GramEntry& e)
      : blocks(e.tokens > 0 ? pieces(e.tokens, kGramEdge) : 1),  // the result is written even so
        spans(pieces(blocks, e.span_blocks)),
        chunks(pieces(e.d, kGramLength)),
        panels(pieces(e.rank, RANKS)),
        columns(pieces(e.d, kGramEdge)) {}
  SAFELORA_DEVICE int blocks_of(const GramEntry& e, int span) const {
    return span + 1 < spans ? e.span_blocks : blocks - span * e.span_blocks;
  }
  SAFELORA_DEVICE int firsts(const GramEntry& e, int span) const { return blocks_of(e, span) * chunks * panels; }
  SAFELORA_DEVICE int seconds() const { return columns * panels; }
};

template <int RANKS>
SAFELORA_DEVICE Work work_of(const GramParams& p, int ticket) {
  if (ticket >= p.last_tasks) {
    const GramEntry& last = p.items[p.num_items - 1];
    return {&last, Cut<RANKS>(last).spans - 1, ticket - p.last_tasks, false};
  }
  const int number = item_of(p.items, p.num_items, ticket);
  const GramEntry& item = p.items[number];
  const Cut<RANKS> cut(item);
  int order = ticket - item.first_block;
  if (order < cut.firsts(item, 0)) return {&item, 0, order, true};
  order -= cut.firsts(item, 0);
  if (number > 0) {
    const GramEntry& before = p.items[number - 1];
    const Cut<RANKS> cut_before(before);
    if (order < cut_before.seconds()) return {&before, cut_before.spans - 1, order, false};
    order -= cut_before.seconds();
  }
  const int both = cut.firsts(item, 0) + cut.seconds(), span = order / both, rest = order % both;
  const int firsts = cut.firsts(item, span + 1);
  return rest < firsts ? Work{&item, span + 1, rest, true} : Work{&item, span, rest - firsts, false};
}

// The halves of the block's warps take halves of a contraction over kGramEdge (RANKS == 16) or of the ranks.
template <class T, int RANKS>
struct Product {
  static constexpr bool kHalves = RANKS == 16;
  static constexpr int kDepth = kHalves ? kGramEdge / 2 : kGramEdge;
  T acc[1][2][4] = {};

  template <class Left>
  SAFELORA_DEVICE void add(const Left& left, const T* right, bool split_left, bool split_right) {
    const int warp = static_cast<int>(threadIdx.x) / 32, half = warp / 4;
    multiply<1, 2, kDepth>(acc, left, Tile<T, RANKS>{right}, warp % 4 * 16, kHalves ? 0 : half * 16,
                           kHalves ? half * kDepth : 0, split_left, split_right);
  }

  // target[i * RANKS + r]
  SAFELORA_DEVICE void store(T* target, T* shared) const {
    const int warp = static_cast<int>(threadIdx.x) / 32, half = warp / 4, r0 = warp % 4 * 16;
    const Lane lane = fresh_lane();
    __syncthreads();
    T* own = shared + (kHalves ? half * kGramEdge * RANKS : 0);
#pragma unroll
    for (int j = 0; j < 2; ++j)
#pragma unroll
      for (int q = 0; q < 4; ++q)
        own[place<RANKS>(r0 + lane.row(q), (kHalves ? 0 : half * 16) + j * 8 + lane.col(q))] = acc[0][j][q];
    __syncthreads();
    for (int e = fresh_thread_index(); e < kGramEdge * RANKS; e += kThreads) {
      T sum = shared[place<RANKS>(e / RANKS, e % RANKS)];
      if constexpr (kHalves) sum += shared[kGramEdge * RANKS + place<RANKS>(e / RANKS, e % RANKS)];
      target[e] = sum;
    }
  }
};

template <class T, int RANKS>
SAFELORA_DEVICE void apply_block(const GramParams& p, const Work& work, T* shared, unsigned* word) {
  constexpr int kTile = kGramEdge * RANKS;
  const GramEntry& e = *work.item;
  const Cut<RANKS> cut(e);
  T *x = shared, *z = shared + kGramEdge * kGramEdge, *workspace = static_cast<T*>(p.workspace);
  const int panel = work.number % cut.panels, chunk = work.number / cut.panels % cut.chunks;
  const int block = work.span * e.span_blocks + work.number / cut.panels / cut.chunks;
  const std::int64_t row = static_cast<std::int64_t>(block) * kGramEdge;
  const int begin = chunk * kGramLength, end = e.d - begin < kGramLength ? e.d : begin + kGramLength;
  Product<T, RANKS> product;
#pragma unroll 1
  for (int col = begin; col < end; col += kGramEdge) {
    __syncthreads();
    stage<T, kGramEdge, kGramEdge>(x, e.x, row, col, e.tokens, end);
    stage<T, kGramEdge, RANKS>(z, e.z, col, panel * RANKS, end, e.rank);
    __syncthreads();
    product.add(Tile<T, kGramEdge>{x}, z, needs_split(e.x.dtype), needs_split(e.z.dtype));
  }
  const std::int64_t of_chunk = static_cast<std::int64_t>(cut.panels) * kTile;
  T* parts = workspace + e.parts + block * cut.chunks * of_chunk;
  product.store(parts + chunk * of_chunk + panel * kTile, shared);
  unsigned* counters = p.counters + 1 + e.first_counter;
  if (!arrives_last(counters + cut.spans + block, static_cast<unsigned>(cut.chunks * cut.panels), word)) return;
  T* applied = workspace + e.applied + block * of_chunk;
  for (int i = fresh_thread_index(); i < cut.panels * kTile; i += kThreads) {
    T sum = 0;
#pragma unroll 4
    for (int c = 0; c < cut.chunks; ++c) sum += parts[c * of_chunk + i];
    const std::int64_t token = row + i % kTile / RANKS;
    if (token >= e.tokens) {
      sum = 0;  // even where Z is not finite
    } else if (e.weights.data != nullptr) {
      if constexpr (sizeof(T) == 8)
        sum *= load_double(e.weights.data, e.weights.dtype, token * e.weights.row);
      else
        sum *= load_float(e.weights.data, e.weights.dtype, token * e.weights.row);
    }
    applied[i] = sum;
  }
  __syncthreads();
  if (threadIdx.x == 0) add_release(counters + work.span, 1u);
}

template <class T, int RANKS>
SAFELORA_DEVICE void gather_block(const GramParams& p, const Work& work, T* shared, unsigned* word) {
  constexpr int kTile = kGramEdge * RANKS;
  const GramEntry& e = *work.item;
  const Cut<RANKS> cut(e);
  T *x = shared, *y = shared + kGramEdge * kGramEdge, *workspace = static_cast<T*>(p.workspace);
  const int panel = work.number % cut.panels, column = work.number / cut.panels;
  const int first = work.span * e.span_blocks, count = cut.blocks_of(e, work.span);
  unsigned* counters = p.counters + 1 + e.first_counter;
  if (threadIdx.x == 0)
    while (load_acquire(counters + work.span) < static_cast<unsigned>(count)) spin_pause();
  __syncthreads();
  Product<T, RANKS> product;
#pragma unroll 1
  for (int block = first; block < first + count; ++block) {
    const T* applied = workspace + e.applied + (static_cast<std::int64_t>(block) * cut.panels + panel) * kTile;
    __syncthreads();
    stage<T, kGramEdge, kGramEdge>(x, e.x, static_cast<std::int64_t>(block) * kGramEdge, column * kGramEdge, e.tokens,
                                   e.d);
    stage<T, kGramEdge, RANKS>(y, {applied, RANKS, 1, sizeof(T) == 8 ? DType::f64 : DType::f32, Lines::rows}, 0, 0,
                               kGramEdge, RANKS);
    __syncthreads();
    product.add(TransposedTile<T, kGramEdge>{x}, y, needs_split(e.x.dtype), true);
  }
  const std::int64_t of_column = static_cast<std::int64_t>(cut.panels) * kTile, of_span = cut.columns * of_column;
  T* sums = workspace + e.sums + column * of_column;
  product.store(sums + work.span * of_span + panel * kTile, shared);
  unsigned* arrivals = counters + cut.spans + cut.blocks + column;
  if (!arrives_last(arrivals, static_cast<unsigned>(cut.spans * cut.panels), word)) return;
  for (int i = fresh_thread_index(); i < cut.panels * kTile; i += kThreads) {
    const int row = column * kGramEdge + i % kTile / RANKS, rank = i / kTile * RANKS + i % RANKS;
    if (row >= e.d || rank >= e.rank) continue;
    T sum = 0;
#pragma unroll 4
    for (int s = 0; s < cut.spans; ++s) sum += sums[s * of_span + i];
    const std::int64_t index = row * e.out.row + rank * e.out.col;
    if constexpr (sizeof(T) == 8)
      store_double(const_cast<void*>(e.out.data), e.out.dtype, index, sum);
    else
      store_float(const_cast<void*>(e.out.data), e.out.dtype, index, sum);
  }
}

template <class T, int RANKS>
SAFELORA_DEVICE void gram_block(const GramParams& p) {
  DYN_SHARED(T, shared);
  unsigned* word = reinterpret_cast<unsigned*>(shared + kGramShared<RANKS>);
  if (threadIdx.x == 0) *word = add_relaxed(p.counters, 1u);
  __syncthreads();
  const Work work = work_of<RANKS>(p, static_cast<int>(*word));
  __syncthreads();
  if (work.first)
    apply_block<T, RANKS>(p, work, shared, word);
  else
    gather_block<T, RANKS>(p, work, shared, word);
}

}  // namespace

SAFELORA_KERNEL(gram_apply16_f32, GramParams, kThreads, 2) { gram_block<float, 16>(params); }
SAFELORA_KERNEL(gram_apply32_f32, GramParams, kThreads, 2) { gram_block<float, 32>(params); }
SAFELORA_KERNEL(gram_apply16_f64, GramParams, kThreads, 1) { gram_block<double, 16>(params); }

}  // namespace safelora::cuda
