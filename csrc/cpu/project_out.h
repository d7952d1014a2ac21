#pragma once

#include "panels.h"

namespace safelora::detail {

// A row-major matrix whose memory will be wanted soon.
template <class T>
struct Wanted {
  const T* data = nullptr;
  std::int64_t row = 0;  // entries between rows
  Ahead lines(std::int64_t i, std::int64_t rows) const {
    if (data == nullptr || rows <= 0) return {};
    return {data + i * row, rows * row * static_cast<std::int64_t>(sizeof(T))};
  }
};

// What the same thread works on next, if its shapes are the same.
template <class T>
struct Next {
  Wanted<T> x, basis;
};

// X (rows×16 of leading dimension ld, in place) −= U(UᵀX) with U (rows×k) dense. The rows of X and U come from memory
// once, a block at a time that stays in L1 for all of k; the second product goes backwards, to find the last ones in
// L2. Memory is kept busy all the while: the first product asks for the second half of X and U, the second for the
// first half of the next ones.
template <class T>
void project_out_panel(T* x, std::int64_t ld, std::int64_t rows, const T* basis, std::int64_t k, Buffer<T>& scratch,
                       const Next<T>& next = {}) {
  constexpr std::int64_t kRows = 128;
  const Kernels<T>& kernel = kernels<T>();
  scratch.reserve(k * kLanes);
  T* coefficients = scratch.get();
  const std::int64_t blocks = ceil_div(rows, kRows), half = blocks / 2 * kRows;
  if (blocks == 0) return;
  const Next<T> here = {{x, ld}, {basis, k}};
  // two blocks of steps ask for one block of rows: the basis in one, X in the other
  const auto ahead = [&](const Next<T>& n, std::int64_t first, std::int64_t step) {
    const std::int64_t i = first + step / 2 * kRows, count = std::min(kRows, rows - i);
    return step % 2 == 0 ? n.basis.lines(i, count) : n.x.lines(i, count);
  };
  for (std::int64_t b = 0; b < blocks; ++b) {
    const std::int64_t i = b * kRows;
    kernel.gemm16_ahead(k, std::min(kRows, rows - i), basis + i * k, 1, k, x + i * ld, ld, coefficients, kLanes, b > 0,
                        ahead(here, half, b));
  }
  for (std::int64_t i = 0; i < k * kLanes; ++i) coefficients[i] = -coefficients[i];
  for (std::int64_t b = blocks - 1; b >= 0; --b) {
    const std::int64_t i = b * kRows;
    kernel.gemm16_ahead(std::min(kRows, rows - i), k, basis + i * k, k, 1, coefficients, kLanes, x + i * ld, ld, true,
                        ahead(next, 0, blocks - 1 - b));
  }
}

// m as a dense row-major block of the compute type: m's own memory where it already is one, else a copy in `copy`.
template <class T>
const T* dense(const ConstMatrix& m, Buffer<T>& copy) {
  if (m.dtype == (sizeof(T) == 8 ? DType::f64 : DType::f32) && m.col_stride == 1 && m.row_stride == m.cols)
    return static_cast<const T*>(m.data);
  copy.reserve(m.rows * m.cols);
  kernels<T>().load(m, 0, m.rows, 0, m.cols, copy.get(), m.cols);
  return copy.get();
}

}  // namespace safelora::detail
