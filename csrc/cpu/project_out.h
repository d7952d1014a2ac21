#pragma once

#include "panels.h"

namespace safelora::detail {

// X (rows×16 of leading dimension ld, in place) −= U(UᵀX) with U (rows×k) dense.
template <class T>
void project_out_panel(T* x, std::int64_t ld, std::int64_t rows, const T* basis, std::int64_t k, Buffer<T>& scratch) {
  scratch.reserve(k * kLanes);
  T* coefficients = scratch.get();
  kernels<T>().gemm16(k, rows, basis, 1, k, x, ld, coefficients, kLanes, false);
  for (std::int64_t i = 0; i < k * kLanes; ++i) coefficients[i] = -coefficients[i];
  kernels<T>().gemm16(rows, k, basis, k, 1, coefficients, kLanes, x, ld, true);
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
