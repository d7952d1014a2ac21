// Panels: (rows, 16) blocks of the compute type, the common currency of the kernels; and what is built from them.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <memory>
#include <mutex>
#include <new>
#include <utility>
#include <vector>

#include "isa.h"

namespace safelora::detail {

inline std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }
inline std::int64_t round_up(std::int64_t a, std::int64_t b) { return ceil_div(a, b) * b; }

// Uninitialised scratch on cache-line boundaries; it only grows.
template <class T>
class Buffer {
 public:
  explicit Buffer(std::int64_t n = 0) { reserve(n); }
  void reserve(std::int64_t n) {
    if (n <= size_) return;
    data_.reset(static_cast<T*>(std::aligned_alloc(64, static_cast<std::size_t>(round_up(n * sizeof(T), 64)))));
    if (!data_) throw std::bad_alloc();
    size_ = n;
  }
  std::int64_t size() const { return size_; }
  T* get() { return data_.get(); }
  const T* get() const { return data_.get(); }

 private:
  struct Free {
    void operator()(T* p) const { std::free(p); }
  };
  std::unique_ptr<T, Free> data_;
  std::int64_t size_ = 0;
};

// Buffers that outlive one layer: fresh pages cost as much as a tenth of the work on it.
template <class T>
class Pool {
 public:
  Buffer<T> take(std::int64_t n) {
    Buffer<T> buffer;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      const auto fits = std::find_if(free_.begin(), free_.end(), [&](const Buffer<T>& b) { return b.size() >= n; });
      if (fits != free_.end()) {
        buffer = std::move(*fits);
        free_.erase(fits);
      } else if (!free_.empty()) {
        free_.pop_back();
      }
    }
    buffer.reserve(n);
    return buffer;
  }
  void give(Buffer<T> buffer) {
    const std::lock_guard<std::mutex> lock(mutex_);
    free_.push_back(std::move(buffer));
  }

 private:
  std::mutex mutex_;
  std::vector<Buffer<T>> free_;
};

inline ConstMatrix transposed(const ConstMatrix& m) {
  return {m.data, m.dtype, m.cols, m.rows, m.col_stride, m.row_stride};
}

// Columns of m as panels: dst[p][row][16], row < rows_padded; what lies outside m is zero.
template <class T>
void load_panels(const ConstMatrix& m, T* dst, std::int64_t rows_padded) {
  for (std::int64_t j = 0; j < m.cols; j += kLanes, dst += rows_padded * kLanes) {
    const std::int64_t cols = std::min(kLanes, m.cols - j);
    if (cols < kLanes || rows_padded > m.rows) std::fill(dst, dst + rows_padded * kLanes, T(0));
    kernels<T>().load(m, 0, m.rows, j, cols, dst, kLanes);
  }
}

template <class T>
Buffer<T> panels_of(const ConstMatrix& m) {
  Buffer<T> panels(ceil_div(m.cols, kLanes) * kLanes * m.rows);
  load_panels(m, panels.get(), m.rows);
  return panels;
}

// gram = XᵀY, (16·px)×(16·py) in fp64: short sums in the compute type, joined in fp64 in a fixed order.
template <class T>
void gram(const T* x, std::int64_t px, const T* y, std::int64_t py, std::int64_t rows, double* out) {
  constexpr std::int64_t kRows = sizeof(T) == 4 ? 128 : 1024;
  const std::int64_t ld = py * kLanes;
  std::fill(out, out + px * kLanes * ld, 0.0);
  T block[kLanes * kLanes];
  for (std::int64_t p = 0; p < px; ++p)
    for (std::int64_t q = 0; q < py; ++q)
      for (std::int64_t i = 0; i < rows; i += kRows) {
        const T* x_rows = x + (p * rows + i) * kLanes;
        kernels<T>().gemm16(kLanes, std::min(kRows, rows - i), x_rows, 1, kLanes, y + (q * rows + i) * kLanes, kLanes,
                            block, kLanes, false);
        for (std::int64_t a = 0; a < kLanes; ++a)
          for (std::int64_t b = 0; b < kLanes; ++b)
            out[(p * kLanes + a) * ld + q * kLanes + b] += block[a * kLanes + b];
      }
}

// ⟨B'A, BA⟩ / (‖B'A‖·‖BA‖) from panels of B', B and Aᵀ; 0 where either product vanishes, NaN where one is not finite.
template <class T>
double cosine(const T* b_new, const T* b, std::int64_t d_out, const ConstMatrix& lora_A) {
  const std::int64_t panels = ceil_div(lora_A.rows, kLanes), n = panels * kLanes;
  const Buffer<T> a = panels_of<T>(transposed(lora_A));
  Buffer<double> k(n * n), g(n * n);
  gram(a.get(), panels, a.get(), panels, lora_A.cols, k.get());
  const auto product = [&](const T* x, const T* y) {
    gram(x, panels, y, panels, d_out, g.get());
    double sum = 0;
    for (std::int64_t i = 0; i < n * n; ++i) sum += g.get()[i] * k.get()[i];
    return sum;
  };
  const double cross = product(b_new, b), norms = product(b_new, b_new), norm = product(b, b);
  const double value = cross / (std::sqrt(std::max(norms, 0.0)) * std::sqrt(std::max(norm, 0.0)));
  if (norms != norms || norm != norm || cross != cross) return std::numeric_limits<double>::quiet_NaN();
  return norms > 0 && norm > 0 ? std::clamp(value, -1.0, 1.0) : 0.0;
}

inline bool has_f64(const ConstMatrix& m) { return m.dtype == DType::f64; }

}  // namespace safelora::detail
