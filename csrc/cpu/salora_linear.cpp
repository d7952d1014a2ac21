// SaLoRA's linear update and its gradients. Nothing of size d_out×d_out exists: C = I − UUᵀ acts on B and on its
// gradient, (d_out×rank) matrices, and the activations meet plain low-rank factors.

#include "parallel.h"
#include "project_out.h"

namespace safelora {
namespace {

using namespace detail;

constexpr std::int64_t kTokens = 32;    // tokens converted and used at a time
constexpr std::int64_t kMaxSplits = 8;  // partial sums over tokens, joined in order

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

// Rows i … i+n of m, zero-padded to whole panels of columns: dst (n, ld).
template <class T>
void load_rows(const ConstMatrix& m, std::int64_t i, std::int64_t n, T* dst, std::int64_t ld) {
  if (ld > m.cols) std::fill(dst, dst + n * ld, T(0));
  kernels<T>().load(m, i, n, 0, m.cols, dst, ld);
}

template <class T>
void forward(const SaloraForward& f, const Threads& threads) {
  const Kernels<T>& kernel = kernels<T>();
  const std::int64_t tokens = f.x.rows, d_in = f.x.cols, d_out = f.base_output.cols, rank = f.lora_A.rows;
  const std::int64_t panels = panel_count(rank), r = panels * kLanes, out_ld = round_up(d_out, kLanes);
  Buffer<T> basis_copy, b = panels_of<T>(f.lora_B);
  complement(b.get(), panels, d_out, dense(f.basis, basis_copy), f.basis.cols, threads);
  store_panels(b.get(), d_out, f.projected_B);

  const Buffer<T> a = panels_of<T>(transposed(f.lora_A));  // (d_in, 16) each
  Buffer<T> bt(r * out_ld);                                // B̃ᵀ: (r, 16) for each 16 columns of y
  std::fill(bt.get(), bt.get() + r * out_ld, T(0));
  for (std::int64_t p = 0; p < panels; ++p)
    for (std::int64_t i = 0; i < d_out; ++i)
      for (std::int64_t q = 0; q < kLanes; ++q)
        bt.get()[(i / kLanes * r + p * kLanes + q) * kLanes + i % kLanes] =
            static_cast<T>(f.scaling) * b.get()[(p * d_out + i) * kLanes + q];

  run_tasks(threads, ceil_div(tokens, kTokens), [&](const NextTask& next) {
    Buffer<T> x(kTokens * d_in), y(kTokens * out_ld), h(kTokens * r);
    for (std::int64_t task; (task = next()) >= 0;) {
      const std::int64_t i = task * kTokens, n = std::min(kTokens, tokens - i);
      kernel.load(f.x, i, n, 0, d_in, x.get(), d_in);
      for (std::int64_t p = 0; p < panels; ++p)
        kernel.gemm16(n, d_in, x.get(), d_in, 1, a.get() + p * d_in * kLanes, kLanes, h.get() + p * kLanes, r, false);
      kernel.store(h.get(), r, f.h, i, n, 0, rank);
      load_rows(f.base_output, i, n, y.get(), out_ld);
      for (std::int64_t j = 0; j < out_ld; j += kLanes)
        kernel.gemm16(n, r, h.get(), r, 1, bt.get() + j * r, kLanes, y.get() + j, out_ld, true);
      kernel.store(y.get(), out_ld, f.y, i, n, 0, d_out);
    }
  });
}

// With G_y = grad_y: t = G_y·B̃, S = G_yᵀh;  grad_x = s·t·A, grad_A = s·tᵀx, G = s·S, grad_B = G − U(UᵀG),
// grad_U = −(G(UᵀB)ᵀ + B(UᵀG)ᵀ).
template <class T>
void backward(const SaloraBackward& b, const Threads& threads) {
  const Kernels<T>& kernel = kernels<T>();
  const std::int64_t tokens = b.x.rows, d_in = b.x.cols, d_out = b.grad_y.cols, rank = b.lora_A.rows;
  const std::int64_t panels = panel_count(rank), r = panels * kLanes, in_ld = round_up(d_in, kLanes);
  const std::int64_t splits = std::clamp<std::int64_t>(ceil_div(tokens, 4 * kTokens), 1, kMaxSplits);
  const T scaling = static_cast<T>(b.scaling);
  const bool want_x = b.grad_x.data != nullptr, want_A = b.grad_A.data != nullptr;
  const bool want_weight = b.grad_B.data != nullptr || b.grad_basis.data != nullptr;

  const Buffer<T> projected = panels_of<T>(b.projected_B);
  Buffer<T> a_rows(want_x ? r * in_ld : 0);  // A as (r, 16) for each 16 columns of x
  if (want_x) load_panels(b.lora_A, a_rows.get(), r);
  const std::int64_t weight_size = panels * d_out * kLanes, a_size = panels * d_in * kLanes;
  Buffer<T> weight(want_weight ? splits * weight_size : 0), grad_a(want_A ? splits * a_size : 0);
  std::fill(weight.get(), weight.get() + (want_weight ? splits * weight_size : 0), T(0));
  std::fill(grad_a.get(), grad_a.get() + (want_A ? splits * a_size : 0), T(0));

  run_tasks(threads, splits, [&](const NextTask& next) {
    Buffer<T> g(kTokens * d_out), x(kTokens * in_ld), t(kTokens * r), h(kTokens * r);
    for (std::int64_t split; (split = next()) >= 0;) {
      const std::int64_t blocks = ceil_div(tokens, kTokens);
      const std::int64_t last = std::min(tokens, (split + 1) * blocks / splits * kTokens);
      for (std::int64_t i = split * blocks / splits * kTokens; i < last; i += kTokens) {
        const std::int64_t n = std::min(kTokens, last - i);
        kernel.load(b.grad_y, i, n, 0, d_out, g.get(), d_out);
        load_rows(b.h, i, n, h.get(), r);
        for (std::int64_t p = 0; p < panels; ++p) {
          kernel.gemm16(n, d_out, g.get(), d_out, 1, projected.get() + p * d_out * kLanes, kLanes, t.get() + p * kLanes,
                        r, false);
          if (want_weight)
            kernel.gemm16(d_out, n, g.get(), 1, d_out, h.get() + p * kLanes, r,
                          weight.get() + split * weight_size + p * d_out * kLanes, kLanes, true);
        }
        for (std::int64_t l = 0; l < n * r; ++l) t.get()[l] *= scaling;
        if (want_A) {
          kernel.load(b.x, i, n, 0, d_in, x.get(), d_in);
          for (std::int64_t p = 0; p < panels; ++p)
            kernel.gemm16(d_in, n, x.get(), 1, d_in, t.get() + p * kLanes, r,
                          grad_a.get() + split * a_size + p * d_in * kLanes, kLanes, true);
        }
        if (want_x) {
          for (std::int64_t j = 0; j < in_ld; j += kLanes)
            kernel.gemm16(n, r, t.get(), r, 1, a_rows.get() + j * r, kLanes, x.get() + j, in_ld, false);
          kernel.store(x.get(), in_ld, b.grad_x, i, n, 0, d_in);
        }
      }
    }
  });

  const auto join = [&](Buffer<T>& parts, std::int64_t size) {
    for (std::int64_t s = 1; s < splits; ++s)
      for (std::int64_t i = 0; i < size; ++i) parts.get()[i] += parts.get()[s * size + i];
  };
  if (want_A) {
    join(grad_a, a_size);
    const Matrix grad_A_transposed = {b.grad_A.data, b.grad_A.dtype,      d_in,
                                      rank,          b.grad_A.col_stride, b.grad_A.row_stride};
    store_panels(grad_a.get(), d_in, grad_A_transposed);
  }
  if (!want_weight) return;
  join(weight, weight_size);
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
