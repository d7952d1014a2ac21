// Panels: (rows, 16) blocks of the compute type, the common currency of the kernels; and what is built from them.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
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
    if (n > size_) allocate(n);
    if (debug() && size_ > 0) std::memset(data_.get(), 0xFF, size_ * sizeof(T));  // NaN in every floating type
  }
  std::int64_t size() const { return size_; }
  T* get() { return data_.get(); }
  const T* get() const { return data_.get(); }

 private:
  void allocate(std::int64_t n) {
    data_.reset(static_cast<T*>(std::aligned_alloc(64, static_cast<std::size_t>(round_up(n * sizeof(T), 64)))));
    if (!data_) throw std::bad_alloc();
    size_ = n;
  }
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

inline std::int64_t size_of(DType dtype) {
  switch (dtype) {
    case DType::bf16:
    case DType::f16: return 2;
    case DType::f64: return 8;
    case DType::f32: break;
  }
  return 4;
}

inline ConstMatrix rows_of(const ConstMatrix& m, std::int64_t first, std::int64_t count) {
  return {static_cast<const char*>(m.data) + first * m.row_stride * size_of(m.dtype),
          m.dtype,
          count,
          m.cols,
          m.row_stride,
          m.col_stride};
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

// XᵀY, (16·panels)², or += when accumulate, from (rows, 16) panels in fp64.
// X == Y makes the Gram matrix symmetric: half of its blocks are enough.
inline void gram(const double* x, const double* y, std::int64_t panels, std::int64_t rows, double* out,
                 bool accumulate) {
  constexpr std::int64_t kRows = 128;  // of both operands in L1
  const std::int64_t n = panels * kLanes;
  for (std::int64_t p = 0; p < panels; ++p)
    for (std::int64_t q = x == y ? p : 0; q < panels; ++q) {
      double* block = out + p * kLanes * n + q * kLanes;
      for (std::int64_t i = 0; i < rows; i += kRows)
        kernels<double>().gemm16(kLanes, std::min(kRows, rows - i), x + (p * rows + i) * kLanes, 1, kLanes,
                                 y + (q * rows + i) * kLanes, kLanes, block, n, accumulate || i > 0);
      if (x != y || p == q) continue;
      for (std::int64_t a = 0; a < kLanes; ++a)
        for (std::int64_t b = 0; b < kLanes; ++b) out[(q * kLanes + b) * n + p * kLanes + a] = block[a * n + b];
    }
}

constexpr std::int64_t kCosineRows = 256;  // of the factors in fp64 at a time

// ⟨B'A, BA⟩ / (‖B'A‖·‖BA‖), where rows(first, count, b_new, b) writes panels of B' and of B; 0 where either product
// vanishes, NaN where one is not finite.
template <class Rows>
double cosine(std::int64_t d_out, const ConstMatrix& lora_A, Rows&& rows) {
  const std::int64_t panels = ceil_div(lora_A.rows, kLanes), n = panels * kLanes;
  const ConstMatrix columns = transposed(lora_A);
  Buffer<double> b_new(kCosineRows * n), b(kCosineRows * n), g(4 * n * n);
  double *const k = g.get(), *const cross = k + n * n, *const norm_new = cross + n * n, *const norm = norm_new + n * n;
  std::fill(k, k + 4 * n * n, 0.0);
  for (std::int64_t i = 0; i < columns.rows; i += kCosineRows) {
    const std::int64_t count = std::min(kCosineRows, columns.rows - i);
    load_panels(rows_of(columns, i, count), b.get(), count);
    gram(b.get(), b.get(), panels, count, k, i > 0);
  }
  for (std::int64_t i = 0; i < d_out; i += kCosineRows) {
    const std::int64_t count = std::min(kCosineRows, d_out - i);
    rows(i, count, b_new.get(), b.get());
    gram(b_new.get(), b.get(), panels, count, cross, i > 0);
    gram(b_new.get(), b_new.get(), panels, count, norm_new, i > 0);
    gram(b.get(), b.get(), panels, count, norm, i > 0);
  }
  const auto product = [&](const double* m) {
    double sum = 0;
    for (std::int64_t i = 0; i < n * n; ++i) sum += m[i] * k[i];
    return sum;
  };
  const double mixed = product(cross), square_new = product(norm_new), square = product(norm);
  if (!std::isfinite(mixed) || !std::isfinite(square_new) || !std::isfinite(square))
    return std::numeric_limits<double>::quiet_NaN();
  if (square_new <= 0 || square <= 0) return 0;
  return std::clamp(mixed / (std::sqrt(square_new) * std::sqrt(square)), -1.0, 1.0);
}

inline bool has_f64(const ConstMatrix& m) { return m.dtype == DType::f64; }

}  // namespace safelora::detail
