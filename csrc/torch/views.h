// Tensors as the kernels see them, and what a raw operator call could get wrong.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <limits>
#include <optional>
#include <vector>

#include "safelora/kernels.h"

namespace safelora::binding {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

inline DType dtype_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return DType::f32;
    case ScalarType::BFloat16: return DType::bf16;
    case ScalarType::Half: return DType::f16;
    case ScalarType::Double: return DType::f64;
    default: break;
  }
  STD_TORCH_CHECK(false, name, " must be float32, bfloat16, float16 or float64");
  return DType::f32;
}

inline void check_shape(const ConstMatrix& m, const char* name, std::int64_t rows, std::int64_t cols) {
  STD_TORCH_CHECK(m.rows == rows && m.cols == cols, name, " must have shape (", rows, ", ", cols, "), got (", m.rows,
                  ", ", m.cols, ")");
}

inline void check_length(std::size_t got, std::size_t expected, const char* name) {
  STD_TORCH_CHECK(got == expected, name, " must have ", expected, " entries, got ", got);
}

// Views of an operator's tensors, and its results: new and contiguous.
class Views {
 public:
  // Called for every tensor that a kernel will touch. Throws for one that is not on the target's device.
  virtual void admit(const Tensor& t, const char* name) const = 0;

  ConstMatrix view(const Tensor& t, const char* name) const {
    STD_TORCH_CHECK(t.dim() == 2, name, " must be 2-D, got ", t.dim(), "-D");
    admit(t, name);
    return {t.const_data_ptr(), dtype_of(t, name), t.size(0), t.size(1), t.stride(0), t.stride(1)};
  }

  // A vector, as a matrix of one column.
  ConstMatrix column(const Tensor& t, const char* name) const {
    STD_TORCH_CHECK(t.dim() == 1, name, " must be 1-D, got ", t.dim(), "-D");
    admit(t, name);
    return {t.const_data_ptr(), dtype_of(t, name), t.size(0), 1, t.stride(0), 1};
  }

  Matrix mutable_view(Tensor& t, const char* name) const {
    const ConstMatrix m = view(t, name);
    return {t.mutable_data_ptr(), m.dtype, m.rows, m.cols, m.row_stride, m.col_stride};
  }

  Tensor new_results(const Tensor& like, std::vector<std::int64_t> shape, std::optional<ScalarType> dtype = {}) const {
    Tensor result = torch::stable::new_empty(like, shape, dtype);
    if (debug()) torch::stable::fill_(result, std::numeric_limits<double>::quiet_NaN());
    admit(result, "the result");
    return result;
  }

  Tensor fp64_vector(const Tensors& like, std::size_t n) const {
    const std::int64_t size = static_cast<std::int64_t>(n);
    return like.empty() ? torch::stable::empty({size}, ScalarType::Double)
                        : new_results(like[0], {size}, ScalarType::Double);
  }

 protected:
  ~Views() = default;
};

}  // namespace safelora::binding
