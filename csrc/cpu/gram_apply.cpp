// Xᵀ diag(w) X Z for many layers, X tall and Z thin.
//
// The dual of project_layers.cpp: a block of rows of X is widened once and stays in cache for both products,
// Y = X_b Z and acc += X_bᵀ (w ∘ Y), while the next block is on its way. 32 to 64 FLOP for each number of X at rank 8
// to 16 keep the FMA units busy for longer than memory takes. Each part of a layer is a run of blocks with an
// accumulator of its own; the parts are added in order when the last one is done. Parts and their order depend on the
// shapes alone.
#include <atomic>
#include <mutex>

#include "panels.h"
#include "parallel.h"

namespace safelora {
namespace {

using namespace detail;

constexpr std::int64_t kBlockBytes = 512 << 10;       // widened rows of X, half of a common L2 cache
constexpr std::int64_t kMinRows = 16, kMaxRows = 64;  // of a block: their sums are what the accumulator is read for
constexpr std::int64_t kDepth = 256;                  // columns of X at a time: so much of Z stays in L1
constexpr std::int64_t kPartRows = 256;               // fewest rows of a part
constexpr std::int64_t kMaxParts = 8;
constexpr std::int64_t kAccumulatorBytes = 64 << 20;  // all partial sums of a layer

template <class T>
class Layer {
 public:
  Layer(const GramItem& item, Pool<T>& pool) : item_(item), pool_(pool) {
    tokens_ = item.x.rows;
    d_ = item.x.cols;
    panels_ = ceil_div(item.z.cols, kLanes);
    // An odd number of cache lines: rows a power of two apart would share the sets of a cache.
    ld_ = (ceil_div(d_, kLanes) | 1) * kLanes;
    rows_ = std::clamp(kBlockBytes / (ld_ * static_cast<std::int64_t>(sizeof(T))) / kMinRows * kMinRows, kMinRows,
                       kMaxRows);
    const std::int64_t by_memory = kAccumulatorBytes / (accumulator_size() * static_cast<std::int64_t>(sizeof(T)));
    parts_ = std::clamp<std::int64_t>(std::min({kMaxParts, by_memory, tokens_ / kPartRows}), 1, kMaxParts);
    pending_ = parts_;
  }

  std::int64_t parts() const { return parts_; }

  struct Scratch {
    Buffer<T> x, y, weights;
  };

  void run(std::int64_t part, Scratch& scratch) {
    std::call_once(prepared_, [&] {
      z_ = pool_.take(accumulator_size());
      load_panels(item_.z, z_.get(), d_);
      accumulators_ = pool_.take(parts_ * accumulator_size());
    });
    const std::int64_t blocks = ceil_div(tokens_, rows_);
    run_blocks(part * blocks / parts_, (part + 1) * blocks / parts_, accumulators_.get() + part * accumulator_size(),
               scratch);
    if (pending_.fetch_sub(1) == 1) finish();
  }

 private:
  std::int64_t accumulator_size() const { return panels_ * d_ * kLanes; }

  // The last panel of a rank that is not a multiple of 16 may need only half of its lanes.
  Gemm16Ahead<T> product(std::int64_t panel) const {
    return item_.z.cols - panel * kLanes <= kLanes / 2 ? kernels<T>().gemm8_ahead : kernels<T>().gemm16_ahead;
  }

  // Half of a block's memory, where its rows stand close together.
  Ahead half_of(std::int64_t block, std::int64_t half) const {
    const std::int64_t i = block * rows_ + half * (rows_ / 2), end = std::min(i + rows_ / 2, tokens_);
    if (item_.x.row_stride != d_ || item_.x.col_stride != 1 || i >= end) return {};
    const std::int64_t row = d_ * size_of(item_.x.dtype);
    return {static_cast<const char*>(item_.x.data) + i * row, (end - i) * row};
  }

  // What the first product asks for at depth j.
  Ahead share(const Ahead& all, std::int64_t j) const {
    const std::int64_t begin = all.bytes * j / d_, end = all.bytes * std::min(j + kDepth, d_) / d_;
    return {static_cast<const char*>(all.first) + begin, end - begin};
  }

  void run_blocks(std::int64_t first, std::int64_t last, T* accumulator, Scratch& scratch) const {
    scratch.x.reserve(rows_ * ld_);
    scratch.y.reserve(panels_ * rows_ * kLanes);
    scratch.weights.reserve(rows_);
    T *x = scratch.x.get(), *y = scratch.y.get();
    if (first == last) std::fill(accumulator, accumulator + accumulator_size(), T(0));
    for (std::int64_t b = first; b < last; ++b) {
      const std::int64_t i = b * rows_, rows = std::min(rows_, tokens_ - i);
      const Ahead early = b + 1 < last ? half_of(b + 1, 0) : Ahead{}, late = b + 1 < last ? half_of(b + 1, 1) : Ahead{};
      for (std::int64_t j = 0; j < d_; j += kDepth) {
        const std::int64_t depth = std::min(kDepth, d_ - j);
        kernels<T>().load(item_.x, i, rows, j, depth, x + j, ld_);
        for (std::int64_t p = 0; p < panels_; ++p)
          product(p)(rows, depth, x + j, ld_, 1, z_.get() + (p * d_ + j) * kLanes, kLanes, y + p * rows_ * kLanes,
                     kLanes, j > 0, p == 0 ? share(early, j) : Ahead{});
      }
      if (item_.weights.data != nullptr) weigh(i, rows, y, scratch.weights.get());
      for (std::int64_t p = 0; p < panels_; ++p)
        product(p)(d_, rows, x, 1, ld_, y + p * rows_ * kLanes, kLanes, accumulator + p * d_ * kLanes, kLanes,
                   b > first, p == 0 ? late : Ahead{});
    }
  }

  void weigh(std::int64_t i, std::int64_t rows, T* y, T* weights) const {
    kernels<T>().load(item_.weights, i, rows, 0, 1, weights, 1);
    for (std::int64_t p = 0; p < panels_; ++p)
      for (std::int64_t l = 0; l < rows; ++l)
        for (std::int64_t q = 0; q < kLanes; ++q) y[(p * rows_ + l) * kLanes + q] *= weights[l];
  }

  void finish() {
    T* sum = accumulators_.get();
    for (std::int64_t part = 1; part < parts_; ++part) {
      const T* other = accumulators_.get() + part * accumulator_size();
      for (std::int64_t i = 0; i < accumulator_size(); ++i) sum[i] += other[i];
    }
    for (std::int64_t p = 0; p < panels_; ++p)
      kernels<T>().store(sum + p * d_ * kLanes, kLanes, item_.out, 0, d_, p * kLanes,
                         std::min(kLanes, item_.z.cols - p * kLanes));
    pool_.give(std::move(z_));
    pool_.give(std::move(accumulators_));
  }

  const GramItem& item_;
  Pool<T>& pool_;
  std::int64_t tokens_ = 0, d_ = 0, panels_ = 0, ld_ = 0, rows_ = 0, parts_ = 0;
  Buffer<T> z_, accumulators_;
  std::once_flag prepared_;
  std::atomic<std::int64_t> pending_{0};
};

template <class T>
void run_items(const std::vector<GramItem>& items, const Threads& threads) {
  struct Task {
    Layer<T>* layer;
    std::int64_t part;
  };
  Pool<T> pool;
  std::vector<std::unique_ptr<Layer<T>>> layers;
  std::vector<Task> tasks;
  for (const GramItem& item : items) {
    const bool wide = has_f64(item.x) || has_f64(item.z) || has_f64(item.weights);
    if (wide != std::is_same_v<T, double> || item.z.rows == 0 || item.z.cols == 0) continue;
    layers.push_back(std::make_unique<Layer<T>>(item, pool));
    for (std::int64_t p = 0; p < layers.back()->parts(); ++p) tasks.push_back({layers.back().get(), p});
  }
  run_tasks(threads, static_cast<std::int64_t>(tasks.size()), [&](const NextTask& next) {
    typename Layer<T>::Scratch scratch;
    for (std::int64_t i; (i = next()) >= 0;) tasks[i].layer->run(tasks[i].part, scratch);
  });
}

}  // namespace

void gram_apply(const std::vector<GramItem>& items, const Threads& threads) {
  run_items<float>(items, threads);
  run_items<double>(items, threads);
}

}  // namespace safelora
