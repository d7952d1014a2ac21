// SaLoRA's linear update and its gradients. Nothing of size d_out×d_out exists: C = I − UUᵀ acts on B and on its
// gradient, (d_out×rank) matrices, and the activations meet plain low-rank factors.

#include "parallel.h"
#include "project_out.h"

namespace safelora {
namespace {

using namespace detail;

constexpr std::int64_t kTokens = kThinRows;  // used at a time
constexpr std::int64_t kColumns = 64;        // of them: the block stays in L1 between what makes and what uses it
constexpr std::int64_t kBlock = kColumns + kLanes;  // its leading dimension: a power of two would share cache sets
constexpr std::int64_t kMaxSplits = 8;              // partial sums over tokens, joined in order

std::int64_t panel_count(std::int64_t rank) { return ceil_div(rank, kLanes); }

// C = I − UUᵀ applied to each panel of m, in place. basis: dense (d, k).
template <class T>
void complement(T* panels, std::int64_t count, std::int64_t d, const T* basis, std::int64_t k, const Threads& threads) {
  parallel_for(threads, k > 0 ? count : 0, [&](std::int64_t p) {
    Buffer<T> scratch;
    project_out_panel(panels + p * d * kLanes, kLanes, d, basis, k, scratch);
  });
}

template <class T>
void store_panels(const T* panels, std::int64_t rows_padded, const Matrix& m) {
  for (std::int64_t j = 0; j < m.cols; j += kLanes)
    kernels<T>().store(panels + j * rows_padded, kLanes, m, 0, m.rows, j, std::min(kLanes, m.cols - j));
}

// Rows i … i+n, columns j … j+cols of m, zero-padded to whole panels of columns: dst (n, ld).
template <class T>
void load_block(const ConstMatrix& m, std::int64_t i, std::int64_t n, std::int64_t j, std::int64_t cols, T* dst,
                std::int64_t ld) {
  const std::int64_t padded = round_up(cols, kLanes);
  for (std::int64_t l = 0; l < n && cols < padded; ++l) std::fill(dst + l * ld + cols, dst + l * ld + padded, T(0));
  kernels<T>().load(m, i, n, j, cols, dst, ld);
}

// The columns of a row of `count`, kColumns at a time.
template <class F>
void for_columns(std::int64_t count, F&& f) {
  for (std::int64_t j = 0; j < count; j += kColumns) f(j, std::min(kColumns, count - j));
}

// Whether rows of m lie in memory as the thin kernels take them.
bool is_bf16_rows(const ConstMatrix& m) { return m.dtype == DType::bf16 && m.col_stride == 1; }

const void* row(const ConstMatrix& m, std::int64_t i) {
  return static_cast<const char*>(m.data) + i * m.row_stride * size_of(m.dtype);
}
void* row(const Matrix& m, std::int64_t i) { return const_cast<void*>(row(ConstMatrix(m), i)); }

Buffer<std::uint32_t> expansion(const ThinKernels& kernel, const float* panels, std::int64_t cols, std::int64_t depth,
                                double scale) {
  Buffer<std::uint32_t> words(kernel.expansion_size(cols, depth));
  kernel.pack_expansion(panels, cols, depth, static_cast<float>(scale), words.get());
  return words;
}

// The rest of the forward pass on bf16 activations, from panels of A and B̃.
void forward_bf16(const SaloraForward& f, const ThinKernels& kernel, const float* a, const float* b,
                  const Threads& threads) {
  const std::int64_t tokens = f.x.rows, d_in = f.x.cols, d_out = f.y.cols, rank = f.lora_A.rows;
  const std::int64_t panels = panel_count(rank), r = panels * kLanes;
  const Buffer<std::uint32_t> bt = expansion(kernel, b, d_out, r, f.scaling);
  const std::int64_t pairs = ceil_div(d_in, 2) * kLanes;
  Buffer<std::uint32_t> a_pairs(f.lora_A.dtype == DType::bf16 && kernel.contract_pairs != nullptr ? panels * pairs : 0);
  for (std::int64_t p = 0; p < panels && a_pairs.size() > 0; ++p)
    kernel.pack_pairs(a + p * d_in * kLanes, d_in, a_pairs.get() + p * pairs);
  run_tasks(threads, ceil_div(tokens, kTokens), [&](const NextTask& next) {
    Buffer<float> h(kTokens * r);
    Buffer<std::uint32_t> scratch(kTokens * r / 2);
    for (std::int64_t task; (task = next()) >= 0;) {
      const std::int64_t i = task * kTokens, n = std::min(kTokens, tokens - i);
      ThinContraction c;
      c.x = row(f.x, i);
      c.row_stride = f.x.row_stride;
      c.rows = n;
      c.cols = d_in;
      c.panels = panels;
      c.rows_panels = a;
      c.rows_out = h.get();
      c.next = row(f.base_output, i);
      c.next_stride = f.base_output.row_stride;
      a_pairs.size() > 0 ? kernel.contract_pairs(c, a_pairs.get()) : kernel.contract(c);
      kernels<float>().store(h.get(), r, f.h, i, n, 0, rank);
      kernel.expand({row(f.base_output, i), f.base_output.row_stride, row(f.y, i), f.y.row_stride, n, d_out, r, h.get(),
                     bt.get(), scratch.get()});
    }
  });
}

template <class T>
void forward(const SaloraForward& f, const Threads& threads) {
  const Kernels<T>& kernel = kernels<T>();
  const std::int64_t tokens = f.x.rows, d_in = f.x.cols, d_out = f.base_output.cols, rank = f.lora_A.rows;
  const std::int64_t panels = panel_count(rank), r = panels * kLanes;
  Buffer<T> basis_copy, b = panels_of<T>(f.lora_B);
  complement(b.get(), panels, d_out, dense(f.basis, basis_copy), f.basis.cols, threads);
  store_panels(b.get(), d_out, f.projected_B);

  const Buffer<T> a = panels_of<T>(transposed(f.lora_A));  // (d_in, 16) each
  if constexpr (std::is_same_v<T, float>)
    if (const ThinKernels* thin = thin_kernels();
        thin != nullptr && is_bf16_rows(f.x) && is_bf16_rows(f.base_output) && is_bf16_rows(f.y))
      return forward_bf16(f, *thin, a.get(), b.get(), threads);
  Buffer<T> bt(r * round_up(d_out, kLanes));  // B̃ᵀ: (r, 16) for each 16 columns of y
  std::fill(bt.get(), bt.get() + bt.size(), T(0));
  for (std::int64_t p = 0; p < panels; ++p)
    for (std::int64_t i = 0; i < d_out; ++i)
      for (std::int64_t q = 0; q < kLanes; ++q)
        bt.get()[(i / kLanes * r + p * kLanes + q) * kLanes + i % kLanes] =
            static_cast<T>(f.scaling) * b.get()[(p * d_out + i) * kLanes + q];

  run_tasks(threads, ceil_div(tokens, kTokens), [&](const NextTask& next) {
    Buffer<T> block(kTokens * kBlock), h(kTokens * r);
    for (std::int64_t task; (task = next()) >= 0;) {
      const std::int64_t i = task * kTokens, n = std::min(kTokens, tokens - i);
      for_columns(d_in, [&](std::int64_t j, std::int64_t cols) {
        kernel.load(f.x, i, n, j, cols, block.get(), kBlock);
        for (std::int64_t p = 0; p < panels; ++p)
          kernel.gemm16(n, cols, block.get(), kBlock, 1, a.get() + (p * d_in + j) * kLanes, kLanes,
                        h.get() + p * kLanes, r, j > 0);
      });
      kernel.store(h.get(), r, f.h, i, n, 0, rank);
      for_columns(d_out, [&](std::int64_t j, std::int64_t cols) {
        load_block(f.base_output, i, n, j, cols, block.get(), kBlock);
        for (std::int64_t c = 0; c < cols; c += kLanes)
          kernel.gemm16(n, r, h.get(), r, 1, bt.get() + (j + c) * r, kLanes, block.get() + c, kBlock, true);
        kernel.store(block.get(), kBlock, f.y, i, n, j, cols);
      });
    }
  });
}

// What a block of tokens adds to S = G_yᵀh and s·xᵀt, with t = G_y·B̃, and its rows of grad_x = s·t·A. Sums: panels
// [p][d_out][16] and [p][d_in][16], nullptr where not wanted.
template <class T>
struct Sums {
  T *weight, *grad_a;
  bool accumulate;
};

// From blocks widened to the compute type.
template <class T>
class WidenedBlocks {
 public:
  explicit WidenedBlocks(const SaloraBackward& b) : b_(b), projected_(panels_of<T>(b.projected_B)) {
    if (b.grad_x.data == nullptr) return;
    a_.reserve(r_ * round_up(b.x.cols, kLanes));
    load_panels(b.lora_A, a_.get(), r_);
  }

  struct Scratch {
    Buffer<T> block, t, h;
    explicit Scratch(std::int64_t r) : block(kTokens * kBlock), t(kTokens * r), h(kTokens * r) {}
  };

  void run(std::int64_t i, std::int64_t n, std::int64_t, const Sums<T>& sums, Scratch& scratch) const {
    const Kernels<T>& kernel = kernels<T>();
    const std::int64_t d_in = b_.x.cols, d_out = b_.grad_y.cols, panels = r_ / kLanes;
    T *block = scratch.block.get(), *t = scratch.t.get(), *h = scratch.h.get();
    const bool want_x = b_.grad_x.data != nullptr, want_t = want_x || sums.grad_a != nullptr;
    load_block(b_.h, i, n, 0, b_.h.cols, h, r_);
    for_columns(d_out, [&](std::int64_t j, std::int64_t cols) {
      kernel.load(b_.grad_y, i, n, j, cols, block, kBlock);
      for (std::int64_t p = 0; p < panels; ++p) {
        const std::int64_t at = (p * d_out + j) * kLanes;
        if (want_t) kernel.gemm16(n, cols, block, kBlock, 1, projected_.get() + at, kLanes, t + p * kLanes, r_, j > 0);
        if (sums.weight != nullptr)
          kernel.gemm16(cols, n, block, 1, kBlock, h + p * kLanes, r_, sums.weight + at, kLanes, sums.accumulate);
      }
    });
    if (!want_t) return;
    for (std::int64_t l = 0; l < n * r_; ++l) t[l] *= static_cast<T>(b_.scaling);
    for_columns(d_in, [&](std::int64_t j, std::int64_t cols) {
      if (sums.grad_a != nullptr) {
        kernel.load(b_.x, i, n, j, cols, block, kBlock);
        for (std::int64_t p = 0; p < panels; ++p)
          kernel.gemm16(cols, n, block, 1, kBlock, t + p * kLanes, r_, sums.grad_a + (p * d_in + j) * kLanes, kLanes,
                        sums.accumulate);
      }
      if (!want_x) return;
      for (std::int64_t c = 0; c < cols; c += kLanes)
        kernel.gemm16(n, r_, t, r_, 1, a_.get() + (j + c) * r_, kLanes, block + c, kBlock, false);
      kernel.store(block, kBlock, b_.grad_x, i, n, j, cols);
    });
  }

 private:
  const SaloraBackward& b_;
  const std::int64_t r_ = panel_count(b_.lora_A.rows) * kLanes;
  Buffer<T> projected_, a_;  // A as (r, 16) for each 16 columns of x
};

// From bf16 rows as they lie in memory.
class Bf16Blocks {
 public:
  Bf16Blocks(const SaloraBackward& b, const ThinKernels& kernel)
      : b_(b), kernel_(kernel), projected_(panels_of<float>(b.projected_B)) {
    if (b.grad_x.data == nullptr) return;
    a_ = expansion(kernel, panels_of<float>(transposed(b.lora_A)).get(), b.x.cols, r_, 1);
  }

  static bool fit(const SaloraBackward& b) {
    return is_bf16_rows(b.grad_y) && (b.grad_A.data == nullptr || is_bf16_rows(b.x)) &&
           (b.grad_x.data == nullptr || is_bf16_rows(b.grad_x));
  }

  struct Scratch {
    Buffer<float> t, h;
    Buffer<std::uint32_t> words;
    explicit Scratch(std::int64_t r) : t(kTokens * r), h(kTokens * r), words(kTokens * r / 2) {}
  };

  // `last`: where the tokens end that come after these.
  void run(std::int64_t i, std::int64_t n, std::int64_t last, const Sums<float>& sums, Scratch& scratch) const {
    float* t = scratch.t.get();
    ThinContraction c;
    c.x = row(b_.grad_y, i);
    c.row_stride = b_.grad_y.row_stride;
    c.rows = n;
    c.cols = b_.grad_y.cols;
    c.panels = r_ / kLanes;
    c.accumulate = sums.accumulate;
    const bool want_x = b_.grad_x.data != nullptr, want_t = want_x || sums.grad_a != nullptr;
    if (want_t) {
      c.rows_panels = projected_.get();
      c.rows_out = t;
    }
    if (sums.weight != nullptr) {
      load_block(b_.h, i, n, 0, b_.h.cols, scratch.h.get(), r_);
      c.columns_panels = scratch.h.get();
      c.columns_out = sums.weight;
    }
    if (sums.grad_a != nullptr) {
      c.next = row(b_.x, i);
      c.next_stride = b_.x.row_stride;
    }
    kernel_.contract(c);
    if (!want_t) return;
    for (std::int64_t l = 0; l < n * r_; ++l) t[l] *= static_cast<float>(b_.scaling);
    if (sums.grad_a != nullptr) {
      c.x = c.next;
      c.row_stride = c.next_stride;
      c.cols = b_.x.cols;
      c.rows_out = nullptr;
      c.columns_panels = t;
      c.columns_out = sums.grad_a;
      c.next = i + n < last ? row(b_.grad_y, i + n) : nullptr;
      c.next_stride = b_.grad_y.row_stride;
      kernel_.contract(c);
    }
    if (want_x)
      kernel_.expand(
          {nullptr, 0, row(b_.grad_x, i), b_.grad_x.row_stride, n, b_.x.cols, r_, t, a_.get(), scratch.words.get()});
  }

 private:
  const SaloraBackward& b_;
  const ThinKernels& kernel_;
  const std::int64_t r_ = panel_count(b_.lora_A.rows) * kLanes;
  Buffer<float> projected_;
  Buffer<std::uint32_t> a_;
};

// parts[0] += parts[1] + …, each of `size` entries, in order.
template <class T>
void join(Buffer<T>& parts, std::int64_t count, std::int64_t size, const Threads& threads) {
  constexpr std::int64_t kEntries = 1 << 14;
  T* sum = parts.get();
  parallel_for(threads, count > 1 ? ceil_div(size, kEntries) : 0, [&](std::int64_t c) {
    for (std::int64_t s = 1; s < count; ++s)
      for (std::int64_t i = c * kEntries; i < std::min(size, (c + 1) * kEntries); ++i) sum[i] += sum[s * size + i];
  });
}

template <class T, class Blocks>
void sum_tokens(const SaloraBackward& b, const Blocks& blocks, std::int64_t splits, Buffer<T>& weight,
                Buffer<T>& grad_a, const Threads& threads) {
  const std::int64_t tokens = b.x.rows, count = ceil_div(tokens, kTokens);
  if (tokens == 0) {
    std::fill(weight.get(), weight.get() + weight.size(), T(0));
    std::fill(grad_a.get(), grad_a.get() + grad_a.size(), T(0));
  }
  run_tasks(threads, splits, [&](const NextTask& next) {
    typename Blocks::Scratch scratch(panel_count(b.lora_A.rows) * kLanes);
    for (std::int64_t split; (split = next()) >= 0;) {
      const auto part = [&](Buffer<T>& m) { return m.size() > 0 ? m.get() + split * (m.size() / splits) : nullptr; };
      const std::int64_t first = split * count / splits * kTokens;
      const std::int64_t last = std::min(tokens, (split + 1) * count / splits * kTokens);
      for (std::int64_t i = first; i < last; i += kTokens)
        blocks.run(i, std::min(kTokens, last - i), last, Sums<T>{part(weight), part(grad_a), i > first}, scratch);
    }
  });
}

// With G_y = grad_y: t = G_y·B̃, S = G_yᵀh;  grad_x = s·t·A, grad_A = s·tᵀx, G = s·S, grad_B = G − U(UᵀG),
// grad_U = −(G(UᵀB)ᵀ + B(UᵀG)ᵀ).
template <class T>
void backward(const SaloraBackward& b, const Threads& threads) {
  const Kernels<T>& kernel = kernels<T>();
  const std::int64_t tokens = b.x.rows, d_in = b.x.cols, d_out = b.grad_y.cols, rank = b.lora_A.rows;
  const std::int64_t panels = panel_count(rank), r = panels * kLanes;
  const std::int64_t splits = std::clamp<std::int64_t>(ceil_div(tokens, 4 * kTokens), 1, kMaxSplits);
  const T scaling = static_cast<T>(b.scaling);
  const bool want_A = b.grad_A.data != nullptr;
  const bool want_weight = b.grad_B.data != nullptr || b.grad_basis.data != nullptr;
  const std::int64_t weight_size = panels * d_out * kLanes, a_size = panels * d_in * kLanes;
  Buffer<T> weight(want_weight ? splits * weight_size : 0), grad_a(want_A ? splits * a_size : 0);
  const auto sum = [&](const auto& blocks) { sum_tokens(b, blocks, splits, weight, grad_a, threads); };
  if constexpr (std::is_same_v<T, float>) {
    const ThinKernels* thin = thin_kernels();
    if (thin != nullptr && Bf16Blocks::fit(b))
      sum(Bf16Blocks(b, *thin));
    else
      sum(WidenedBlocks<T>(b));
  } else {
    sum(WidenedBlocks<T>(b));
  }

  if (want_A) {
    join(grad_a, splits, a_size, threads);
    const Matrix grad_A_transposed = {b.grad_A.data, b.grad_A.dtype,      d_in,
                                      rank,          b.grad_A.col_stride, b.grad_A.row_stride};
    store_panels(grad_a.get(), d_in, grad_A_transposed);
  }
  if (!want_weight) return;
  join(weight, splits, weight_size, threads);
  for (std::int64_t i = 0; i < weight_size; ++i) weight.get()[i] *= scaling;
  Buffer<T> basis_copy;
  const std::int64_t k = b.basis.cols;
  const T* basis = dense(b.basis, basis_copy);
  if (b.grad_basis.data != nullptr && k > 0) {
    const std::int64_t k_ld = round_up(k, kLanes);
    const Buffer<T> lora_B = panels_of<T>(b.lora_B);
    Buffer<T> utb(r * k_ld), utg(r * k_ld), coefficients(k * kLanes), grad(panel_count(k) * d_out * kLanes);
    // −(UᵀB)ᵀ and −(UᵀG)ᵀ as (r, 16) for each 16 columns of the basis
    const auto coefficient_panels = [&](const T* m, Buffer<T>& out) {
      std::fill(out.get(), out.get() + r * k_ld, T(0));
      for (std::int64_t p = 0; p < panels; ++p) {
        kernel.gemm16(k, d_out, basis, 1, k, m + p * d_out * kLanes, kLanes, coefficients.get(), kLanes, false);
        for (std::int64_t c = 0; c < k; ++c)
          for (std::int64_t q = 0; q < kLanes; ++q)
            out.get()[(c / kLanes * r + p * kLanes + q) * kLanes + c % kLanes] = -coefficients.get()[c * kLanes + q];
      }
    };
    coefficient_panels(lora_B.get(), utb);
    coefficient_panels(weight.get(), utg);
    for (std::int64_t j = 0; j < panel_count(k); ++j)
      for (std::int64_t p = 0; p < panels; ++p) {
        T* out = grad.get() + j * d_out * kLanes;
        const std::int64_t at = (j * r + p * kLanes) * kLanes;
        kernel.gemm16(d_out, kLanes, weight.get() + p * d_out * kLanes, kLanes, 1, utb.get() + at, kLanes, out, kLanes,
                      p > 0);
        kernel.gemm16(d_out, kLanes, lora_B.get() + p * d_out * kLanes, kLanes, 1, utg.get() + at, kLanes, out, kLanes,
                      true);
      }
    store_panels(grad.get(), d_out, b.grad_basis);
  }
  if (b.grad_B.data != nullptr) {
    complement(weight.get(), panels, d_out, basis, k, threads);
    store_panels(weight.get(), d_out, b.grad_B);
  }
}

}  // namespace

void salora_forward(const SaloraForward& f, const Threads& threads) {
  const ConstMatrix* inputs[] = {&f.x, &f.base_output, &f.lora_A, &f.lora_B, &f.basis};
  const bool wide = std::any_of(std::begin(inputs), std::end(inputs), [](auto* m) { return has_f64(*m); });
  wide ? forward<double>(f, threads) : forward<float>(f, threads);
}

void salora_backward(const SaloraBackward& b, const Threads& threads) {
  const ConstMatrix* inputs[] = {&b.grad_y, &b.x, &b.h, &b.lora_A, &b.lora_B, &b.projected_B, &b.basis};
  const bool wide = std::any_of(std::begin(inputs), std::end(inputs), [](auto* m) { return has_f64(*m); });
  wide ? backward<double>(b, threads) : backward<float>(b, threads);
}

}  // namespace safelora
