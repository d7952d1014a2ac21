// A matrix as the kernels' parameter tables hold it.
#pragma once

#include <cstdint>

#include "safelora/kernels.h"

namespace safelora::cuda {

// Which lines of a matrix are runs of aligned 16-byte groups.
enum class Lines : std::uint8_t { none, rows, cols };

// Strides count elements. Whoever holds it knows the extents.
struct Strided {
  const void* data;
  std::int64_t row, col;
  DType dtype;
  Lines lines;
};

inline std::int64_t size_of(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }

inline Strided strided(const ConstMatrix& m) {
  const auto grouped = [&](std::int64_t stride) { return stride * size_of(m.dtype) % 16 == 0; };
  const bool aligned = reinterpret_cast<std::uintptr_t>(m.data) % 16 == 0;
  const bool rows = aligned && m.col_stride == 1 && (m.rows <= 1 || grouped(m.row_stride));
  const bool cols = aligned && m.row_stride == 1 && (m.cols <= 1 || grouped(m.col_stride));
  return {m.data, m.row_stride, m.col_stride, m.dtype, rows ? Lines::rows : cols ? Lines::cols : Lines::none};
}

inline ConstMatrix transposed(const ConstMatrix& m) {
  return {m.data, m.dtype, m.cols, m.rows, m.col_stride, m.row_stride};
}

inline Matrix transposed(const Matrix& m) { return {m.data, m.dtype, m.cols, m.rows, m.col_stride, m.row_stride}; }

constexpr int kThreads = 256;  // of every block that works on tiles

inline bool wide(const ConstMatrix& m) { return m.dtype == DType::f64; }

inline std::int64_t bytes_of(const ConstMatrix& m) { return m.rows * m.cols * size_of(m.dtype); }

inline std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

}  // namespace safelora::cuda
