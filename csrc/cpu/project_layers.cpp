// B' = V(VᵀB)/‖V‖_F for many layers, each weight read once.
//
// V VᵀB = Σ_s V_s(V_sᵀB) over column strips s: a strip of both weights is read and subtracted once, V_s stays in cache
// for both products. A layer is cut into parts of whole strips, each with its own accumulator; the parts are added in
// order when the last one is done. Strips, parts and their order depend on the shapes alone.
#include <atomic>
#include <mutex>

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
  Pool<std::uint32_t> tiles;
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
    const std::int64_t by_memory = kAccumulatorBytes / std::max<std::int64_t>(accumulator_size() * sizeof(T), 1);
    parts_ = std::clamp<std::int64_t>(std::min(kMaxParts, by_memory), 1, std::max<std::int64_t>(strips_, 1));
    pending_ = parts_;
  }

  std::int64_t parts() const { return parts_; }

  struct Scratch {
    Buffer<T> v, y;
    Buffer<std::uint32_t> v_tiles;
  };

  // Part `part` into its accumulator; whoever finishes the layer's last part also finishes the layer.
  void run(std::int64_t part, Scratch& scratch) {
    std::call_once(prepared_, [&] { prepare(); });
    const std::int64_t first = part * strips_ / parts_, last = (part + 1) * strips_ / parts_;
    T* accumulator = accumulators_.get() + part * accumulator_size();
    squares_[part] =
        use_amx() ? run_amx(first, last, accumulator, scratch) : run_panels(first, last, accumulator, scratch);
    if (pending_.fetch_sub(1) == 1) finish();
  }

 private:
  std::int64_t accumulator_size() const { return panels_ * rows_padded_ * kLanes; }
  // In a small layer the errors of the split do not average out, and there is nothing to gain.
  bool use_amx() const {
    return std::is_same_v<T, float> && active_isa() == Isa::amx && rows_ >= 64 && layer_.aligned.cols >= 64;
  }

  void prepare() {
    b_ = pools_.panels.take(accumulator_size());
    accumulators_ = pools_.panels.take(parts_ * accumulator_size());
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
      if (use_amx()) {
        const std::int64_t tiles = rows_padded_ * 2 * kLanes;
        b_tiles_ = pools_.tiles.take(panels_ * tiles);
        for (std::int64_t p = 0; p < panels_; ++p)
          amx_pack_b(dense + p * rows_padded_ * kLanes, rows_padded_, b_tiles_.get() + p * tiles);
      }
#endif
  }

  double run_amx([[maybe_unused]] std::int64_t first, [[maybe_unused]] std::int64_t last,
                 [[maybe_unused]] T* accumulator, [[maybe_unused]] Scratch& scratch) {
    double squares = 0;
#ifdef SAFELORA_X86
    if constexpr (std::is_same_v<T, float>) {
      scratch.v_tiles.reserve(rows_padded_ * width_);
      const AmxStrip strip = {layer_.aligned, layer_.base,           rows_padded_ / 16, panels_,
                              b_tiles_.get(), scratch.v_tiles.get(), accumulator};
      amx_begin();
      for (std::int64_t s = first; s < last; ++s)
        squares += amx_strip(strip, s * width_, static_cast<int>(width_ / 16), s > first);
      amx_end();
    }
#endif
    return squares;
  }

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

  void finish() {
    constexpr double nan = std::numeric_limits<double>::quiet_NaN();
    double squares = 0;
    for (std::int64_t p = 0; p < parts_; ++p) squares += squares_[p];
    if (!(squares > 1e-24 && squares < 1e36)) squares = exact_squares();
    const double norm = std::isfinite(squares) ? std::sqrt(squares) : nan;
    *layer_.v_norm = norm;
    const double scale = norm == 0 ? 0 : normalize_ == Normalize::frobenius ? 1 / norm : norm == norm ? 1 : nan;

    T* sum = accumulators_.get();
    for (std::int64_t p = 1; p < parts_; ++p) {
      const T* part = accumulators_.get() + p * accumulator_size();
      for (std::int64_t i = 0; i < accumulator_size(); ++i) sum[i] += part[i];
    }
    for (std::int64_t i = 0; i < accumulator_size(); ++i) sum[i] = static_cast<T>(sum[i] * scale);

    std::int64_t column = 0;
    for (const ProjectFactor& f : layer_.factors) {
      const std::int64_t rank = f.lora_B.cols, panels = ceil_div(rank, kLanes);
      Buffer<double> projected(panels * rows_ * kLanes);
      for (std::int64_t j = 0; j < panels * kLanes; ++j) {
        const T* from = sum + (column + j) / kLanes * rows_padded_ * kLanes + (column + j) % kLanes;
        double* to = projected.get() + j / kLanes * rows_ * kLanes + j % kLanes;
        for (std::int64_t i = 0; i < rows_; ++i) to[i * kLanes] = j < rank ? from[i * kLanes] : 0.0;
      }
      for (std::int64_t p = 0; p < panels; ++p)
        kernels<double>().store(projected.get() + p * rows_ * kLanes, kLanes, f.projected, 0, rows_, p * kLanes,
                                std::min(kLanes, rank - p * kLanes));
      if (f.cosine != nullptr)
        *f.cosine = f.lora_A.rows == 0 || norm == 0 || norm != norm
                        ? nan
                        : cosine(projected.get(), panels_of<double>(f.lora_B).get(), rows_, f.lora_A);
      column += rank;
    }
    pools_.panels.give(std::move(b_));
    pools_.panels.give(std::move(accumulators_));
    pools_.tiles.give(std::move(b_tiles_));
  }

  const ProjectLayer& layer_;
  const Normalize normalize_;
  Pools<T>& pools_;
  std::int64_t ranks_ = 0, panels_ = 0, rows_ = 0, rows_padded_ = 0, width_ = 0, strips_ = 0, parts_ = 0;
  Buffer<T> b_, accumulators_;
  Buffer<std::uint32_t> b_tiles_;
  double squares_[kMaxParts] = {};
  std::once_flag prepared_;
  std::atomic<std::int64_t> pending_{0};
};

bool needs_f64(const ProjectLayer& layer) {
  bool any = has_f64(layer.aligned) || has_f64(layer.base);
  for (const ProjectFactor& f : layer.factors) any = any || has_f64(f.lora_B) || has_f64(f.lora_A);
  return any;
}

template <class T>
void run_layers(const std::vector<ProjectLayer>& layers, Normalize normalize, const Threads& threads) {
  struct Part {
    Layer<T>* layer;
    std::int64_t index;
  };
  Pools<T> pools;
  std::vector<std::unique_ptr<Layer<T>>> plans;
  std::vector<Part> parts;
  for (const ProjectLayer& layer : layers) {
    if (needs_f64(layer) != std::is_same_v<T, double>) continue;
    plans.push_back(std::make_unique<Layer<T>>(layer, normalize, pools));
    for (std::int64_t p = 0; p < plans.back()->parts(); ++p) parts.push_back({plans.back().get(), p});
  }
  run_tasks(threads, static_cast<std::int64_t>(parts.size()), [&](const NextTask& next) {
    typename Layer<T>::Scratch scratch;
    for (std::int64_t i; (i = next()) >= 0;) parts[i].layer->run(parts[i].index, scratch);
  });
}

}  // namespace

void project_layers(const std::vector<ProjectLayer>& layers, Normalize normalize, const Threads& threads) {
  run_layers<float>(layers, normalize, threads);
  run_layers<double>(layers, normalize, threads);
}

}  // namespace safelora
