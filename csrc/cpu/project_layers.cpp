// B' = V(VᵀB)/‖V‖_F for many layers.
//
// With AVX-512 and AMX, Y = VᵀB and V·Y are two passes over the rows: each part of a layer is a run of rows, read in
// order, which is what hardware prefetchers follow. On AVX2 and below each weight is read once: V VᵀB = Σ_s V_s(V_sᵀB)
// over column strips s; a strip of both weights is subtracted once and V_s stays in cache for both products. There each
// part is a run of strips with an accumulator of its own; the parts are added in order when the last one is done.
// Arithmetic hides the strips' slower loads on AVX2, but not on the wider units. Parts and their order depend on the
// shapes and the instruction set alone.
#include <atomic>
#include <mutex>
#include <thread>

#include "panels.h"
#include "parallel.h"

namespace safelora {
namespace {

using namespace detail;

constexpr std::int64_t kStripBytes = 1 << 20;        // V_s of one strip: half of a common L2 cache
constexpr std::int64_t kMaxStrip = 64;               // columns
constexpr std::int64_t kAccumulatorBytes = 8 << 20;  // all partial sums of a layer
constexpr std::int64_t kMaxParts = 8;

template <class T>
struct Pools {
  Pool<T> panels;
  Pool<std::uint32_t> words;
};

template <class T>
class Layer {
 public:
  Layer(const ProjectLayer& layer, Normalize normalize, Pools<T>& pools)
      : layer_(layer), normalize_(normalize), pools_(pools) {
    for (const ProjectFactor& f : layer.factors) ranks_ += f.lora_B.cols;
    panels_ = ceil_div(ranks_, kLanes);
    rows_ = layer.aligned.rows;
    rows_padded_ = round_up(std::max<std::int64_t>(rows_, 1), 16);
    width_ = kMaxStrip;
    while (width_ > 16 && rows_padded_ * width_ * static_cast<std::int64_t>(sizeof(T)) > kStripBytes) width_ /= 2;
    while (width_ > 16 && width_ / 2 >= layer.aligned.cols) width_ /= 2;
    strips_ = ceil_div(layer.aligned.cols, width_);
    std::int64_t size = accumulator_size(), units = strips_;
#ifdef SAFELORA_X86
    by_rows_ = row_kernels();
    if (by_rows_ != nullptr) {
      row_layer_ = {layer.aligned, layer.base, rows_padded_ / kLanes, panels_, nullptr};
      size = by_rows_->y_size(row_layer_);
      units = row_layer_.row_blocks;
    }
#endif
    const std::int64_t by_memory = kAccumulatorBytes / std::max<std::int64_t>(size * sizeof(T), 1);
    parts_ = std::clamp<std::int64_t>(std::min(kMaxParts, by_memory), 1, std::max<std::int64_t>(units, 1));
    pending_[0] = pending_[1] = parts_;
  }

  std::int64_t parts() const { return parts_; }
  std::int64_t phases() const { return by_rows_ != nullptr ? 2 : 1; }

  struct Scratch {
    Buffer<T> v, y;
    Buffer<std::uint32_t> b;
  };

  // One part of one phase; whoever finishes the last part of the last phase also finishes the layer. Phase 1 waits for
  // phase 0, whose parts were all handed out before: `abandoned` tells that one of them failed.
  void run(std::int64_t phase, std::int64_t part, Scratch& scratch, const std::atomic<bool>& abandoned) {
    std::call_once(prepared_, [&] { prepare(); });
#ifdef SAFELORA_X86
    if constexpr (std::is_same_v<T, float>)
      if (by_rows_ != nullptr) return run_rows(phase, part, scratch, abandoned);
#endif
    const std::int64_t first = part * strips_ / parts_, last = (part + 1) * strips_ / parts_;
    squares_[part] = run_panels(first, last, accumulators_.get() + part * accumulator_size(), scratch);
    if (pending_[phase].fetch_sub(1) == 1) finish(parts_);
  }

 private:
  std::int64_t accumulator_size() const { return panels_ * rows_padded_ * kLanes; }
#ifdef SAFELORA_X86
  // In a small layer the errors of AMX's split do not average out, and there is nothing to gain.
  const RowKernels* row_kernels() const {
    if (!std::is_same_v<T, float> || rows_ < 128 || layer_.aligned.cols < 128) return nullptr;
    switch (active_isa()) {
      case Isa::amx: return &amx_rows();
      case Isa::avx512_bf16:
      case Isa::avx512: return &avx512_rows();
      default: return nullptr;
    }
  }
#endif

  void prepare() {
    b_ = pools_.panels.take(accumulator_size());
    accumulators_ = pools_.panels.take((by_rows_ != nullptr ? 1 : parts_) * accumulator_size());
    T* dense = b_.get();
    std::fill(dense, dense + accumulator_size(), T(0));
    std::int64_t column = 0;
    for (const ProjectFactor& f : layer_.factors)
      for (std::int64_t j = 0; j < f.lora_B.cols; ++column) {  // factors share panels: ranks are packed without gaps
        const std::int64_t lane = column % kLanes, n = std::min(kLanes - lane, f.lora_B.cols - j);
        kernels<T>().load(f.lora_B, 0, rows_, j, n, dense + column / kLanes * rows_padded_ * kLanes + lane, kLanes);
        j += n;
        column += n - 1;
      }
#ifdef SAFELORA_X86
    if constexpr (std::is_same_v<T, float>)
      if (by_rows_ != nullptr) {
        row_layer_.b = dense;
        y_parts_ = pools_.panels.take(parts_ * by_rows_->y_size(row_layer_));
        y_words_ = pools_.words.take(by_rows_->y_size(row_layer_));
      }
#endif
  }

#ifdef SAFELORA_X86
  void run_rows(std::int64_t phase, std::int64_t part, Scratch& scratch, const std::atomic<bool>& abandoned) {
    if (phase == 0) {
      scratch.b.reserve(panels_ * 512);
      squares_[part] = by_rows_->pass1(row_layer_, first_block(part), first_block(part + 1), scratch.b.get(),
                                       y_parts_.get() + part * by_rows_->y_size(row_layer_));
      if (pending_[0].fetch_sub(1) != 1) return;
      by_rows_->join(row_layer_, y_parts_.get(), parts_, y_words_.get());
      joined_ = true;
      return;
    }
    while (!joined_) {
      if (abandoned) return;
      std::this_thread::yield();
    }
    const std::int64_t backwards = parts_ - 1 - part;  // the rows read last are still in a shared cache
    by_rows_->pass2(row_layer_, first_block(backwards), first_block(backwards + 1), y_words_.get(),
                    accumulators_.get());
    if (pending_[1].fetch_sub(1) == 1) finish(1);
  }
  std::int64_t first_block(std::int64_t part) const { return part * row_layer_.row_blocks / parts_; }
#endif

  double run_panels(std::int64_t first, std::int64_t last, T* accumulator, Scratch& scratch) {
    constexpr std::int64_t kRows = 64;  // rows of V and B that stay in L1 between conversion and first product
    const Kernels<T>& k = kernels<T>();
    scratch.v.reserve(rows_ * width_);
    scratch.y.reserve(panels_ * width_ * kLanes);
    T *v = scratch.v.get(), *y = scratch.y.get();
    double squares = 0;
    for (std::int64_t s = first; s < last; ++s) {
      const std::int64_t j = s * width_, cols = std::min(width_, layer_.aligned.cols - j);
      for (std::int64_t i = 0; i < rows_; i += kRows) {
        const std::int64_t n = std::min(kRows, rows_ - i);
        squares += k.load_difference(layer_.aligned, layer_.base, i, n, j, cols, v + i * width_, width_);
        for (std::int64_t p = 0; p < panels_; ++p)
          k.gemm16(cols, n, v + i * width_, 1, width_, b_.get() + (p * rows_padded_ + i) * kLanes, kLanes,
                   y + p * width_ * kLanes, kLanes, i > 0);
      }
      for (std::int64_t p = 0; p < panels_; ++p)
        k.gemm16(rows_, cols, v, width_, 1, y + p * width_ * kLanes, kLanes, accumulator + p * rows_padded_ * kLanes,
                 kLanes, s > first);
    }
    return squares;
  }

  // fp32 squares leave the range of fp32 long before the weights do: beyond it, sum them again in fp64.
  double exact_squares() const {
    double squares = 0;
    Buffer<double> row(layer_.aligned.cols);
    for (std::int64_t i = 0; i < rows_; ++i)
      squares += kernels<double>().load_difference(layer_.aligned, layer_.base, i, 1, 0, layer_.aligned.cols, row.get(),
                                                   layer_.aligned.cols);
    return squares;
  }

  void finish(std::int64_t accumulators) {
    constexpr double nan = std::numeric_limits<double>::quiet_NaN();
    double squares = 0;
    for (std::int64_t p = 0; p < parts_; ++p) squares += squares_[p];
    if (!(squares > 1e-24 && squares < 1e36)) squares = exact_squares();
    const double norm = std::isfinite(squares) ? std::sqrt(squares) : nan;
    *layer_.v_norm = norm;
    const double scale = norm == 0 ? 0 : normalize_ == Normalize::frobenius ? 1 / norm : norm == norm ? 1 : nan;

    T* sum = accumulators_.get();
    for (std::int64_t p = 1; p < accumulators; ++p) {
      const T* part = accumulators_.get() + p * accumulator_size();
      for (std::int64_t i = 0; i < accumulator_size(); ++i) sum[i] += part[i];
    }
    for (std::int64_t i = 0; i < accumulator_size(); ++i) sum[i] = static_cast<T>(sum[i] * scale);

    std::int64_t column = 0;
    for (const ProjectFactor& f : layer_.factors) {
      const std::int64_t rank = f.lora_B.cols, panels = ceil_div(rank, kLanes);
      const auto store = [&](std::int64_t first, std::int64_t count, double* projected) {
        for (std::int64_t j = 0; j < panels * kLanes; ++j) {
          const T* from = sum + ((column + j) / kLanes * rows_padded_ + first) * kLanes + (column + j) % kLanes;
          double* to = projected + j / kLanes * count * kLanes + j % kLanes;
          for (std::int64_t i = 0; i < count; ++i) to[i * kLanes] = j < rank ? from[i * kLanes] : 0.0;
        }
        for (std::int64_t p = 0; p < panels; ++p)
          kernels<double>().store(projected + p * count * kLanes, kLanes, f.projected, first, count, p * kLanes,
                                  std::min(kLanes, rank - p * kLanes));
      };
      if (f.cosine != nullptr && f.lora_A.rows > 0 && norm > 0) {
        *f.cosine = cosine(rows_, f.lora_A, [&](std::int64_t first, std::int64_t count, double* b_new, double* b) {
          store(first, count, b_new);
          load_panels(rows_of(f.lora_B, first, count), b, count);
        });
      } else {
        Buffer<double> block(kCosineRows * panels * kLanes);
        for (std::int64_t i = 0; i < rows_; i += kCosineRows) store(i, std::min(kCosineRows, rows_ - i), block.get());
        if (f.cosine != nullptr) *f.cosine = nan;
      }
      column += rank;
    }
    pools_.panels.give(std::move(b_));
    pools_.panels.give(std::move(accumulators_));
    pools_.panels.give(std::move(y_parts_));
    pools_.words.give(std::move(y_words_));
  }

  const ProjectLayer& layer_;
  const Normalize normalize_;
  Pools<T>& pools_;
  std::int64_t ranks_ = 0, panels_ = 0, rows_ = 0, rows_padded_ = 0, width_ = 0, strips_ = 0, parts_ = 0;
  Buffer<T> b_, accumulators_, y_parts_;
  Buffer<std::uint32_t> y_words_;
  const RowKernels* by_rows_ = nullptr;
  RowLayer row_layer_ = {};
  std::atomic<bool> joined_{false};
  double squares_[kMaxParts] = {};
  std::once_flag prepared_;
  std::atomic<std::int64_t> pending_[2] = {};
};

bool needs_f64(const ProjectLayer& layer) {
  bool any = has_f64(layer.aligned) || has_f64(layer.base);
  for (const ProjectFactor& f : layer.factors) any = any || has_f64(f.lora_B) || has_f64(f.lora_A);
  return any;
}

template <class T>
void run_layers(const std::vector<ProjectLayer>& layers, Normalize normalize, const Threads& threads) {
  struct Task {
    Layer<T>* layer;
    std::int64_t phase, part;
  };
  Pools<T> pools;
  std::vector<std::unique_ptr<Layer<T>>> plans;
  std::vector<Task> tasks;
  const auto push = [&](Layer<T>& layer, std::int64_t phase) {
    for (std::int64_t p = 0; phase < layer.phases() && p < layer.parts(); ++p) tasks.push_back({&layer, phase, p});
  };
  // A second phase comes after the first of the next layer: nobody waits for the end of its own first phase.
  for (const ProjectLayer& layer : layers) {
    if (needs_f64(layer) != std::is_same_v<T, double>) continue;
    plans.push_back(std::make_unique<Layer<T>>(layer, normalize, pools));
    push(*plans.back(), 0);
    if (plans.size() > 1) push(*plans[plans.size() - 2], 1);
  }
  if (!plans.empty()) push(*plans.back(), 1);
  std::atomic<bool> abandoned{false};
  run_tasks(threads, static_cast<std::int64_t>(tasks.size()), [&](const NextTask& next) {
    typename Layer<T>::Scratch scratch;
    try {
      for (std::int64_t i; (i = next()) >= 0;) tasks[i].layer->run(tasks[i].phase, tasks[i].part, scratch, abandoned);
    } catch (...) {
      abandoned = true;
      throw;
    }
  });
}

}  // namespace

void project_layers(const std::vector<ProjectLayer>& layers, Normalize normalize, const Threads& threads) {
  run_layers<float>(layers, normalize, threads);
  run_layers<double>(layers, normalize, threads);
}

}  // namespace safelora
