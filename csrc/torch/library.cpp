// The CPU kernels as PyTorch operators. Schemas and fakes live in safelora_kernels/schemas.py; this file only turns
// tensors into views, checks what a raw call could get wrong, and lends PyTorch's threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <limits>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "safelora/kernels.h"

namespace {

using safelora::ConstMatrix;
using safelora::Matrix;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

safelora::DType dtype_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return safelora::DType::f32;
    case ScalarType::BFloat16: return safelora::DType::bf16;
    case ScalarType::Half: return safelora::DType::f16;
    case ScalarType::Double: return safelora::DType::f64;
    default: break;
  }
  STD_TORCH_CHECK(false, name, " must be float32, bfloat16, float16 or float64");
  return safelora::DType::f32;
}

ConstMatrix view(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.dim() == 2, name, " must be 2-D, got ", t.dim(), "-D");
  STD_TORCH_CHECK(t.is_cpu(), name, " must be a CPU tensor");
  return {t.const_data_ptr(), dtype_of(t, name), t.size(0), t.size(1), t.stride(0), t.stride(1)};
}

Matrix mutable_view(Tensor& t, const char* name) {
  const ConstMatrix m = view(t, name);
  return {t.mutable_data_ptr(), m.dtype, m.rows, m.cols, m.row_stride, m.col_stride};
}

void check_shape(const ConstMatrix& m, const char* name, std::int64_t rows, std::int64_t cols) {
  STD_TORCH_CHECK(m.rows == rows && m.cols == cols, name, " must have shape (", rows, ", ", cols, "), got (", m.rows,
                  ", ", m.cols, ")");
}

void check_length(std::size_t got, std::size_t expected, const char* name) {
  STD_TORCH_CHECK(got == expected, name, " must have ", expected, " entries, got ", got);
}

Tensor empty_like_rows(const Tensor& like, std::vector<std::int64_t> shape, std::optional<ScalarType> dtype = {}) {
  Tensor result = torch::stable::new_empty(like, shape, dtype);
  if (safelora::debug()) torch::stable::fill_(result, std::numeric_limits<double>::quiet_NaN());
  return result;
}

Tensor fp64_vector(const Tensors& like, std::size_t n) {
  const std::int64_t size = static_cast<std::int64_t>(n);
  return like.empty() ? torch::stable::empty({size}, ScalarType::Double)
                      : torch::stable::new_empty(like[0], {size}, ScalarType::Double);
}

safelora::Threads torch_threads() {
  return {static_cast<int>(torch::stable::get_num_threads()), [](int n, const std::function<void(int)>& task) {
            torch::stable::parallel_for(0, n, 1, [&](std::int64_t begin, std::int64_t end) {
              for (std::int64_t i = begin; i < end; ++i) task(static_cast<int>(i));
            });
          }};
}

std::tuple<Tensors, Tensor, Tensor> project_layers(Tensors aligned, Tensors base, Tensors lora_B, Tensors lora_A,
                                                   std::vector<std::int64_t> layer_of, std::string normalize,
                                                   std::optional<ScalarType> out_dtype) {
  check_length(base.size(), aligned.size(), "base");
  check_length(lora_A.size(), lora_B.size(), "lora_A");
  check_length(layer_of.size(), lora_B.size(), "layer_of");
  STD_TORCH_CHECK(normalize == "frobenius" || normalize == "none", "normalize must be 'frobenius' or 'none', got '",
                  normalize, "'");
  Tensor v_norm = fp64_vector(aligned, aligned.size()), cosine = fp64_vector(aligned, lora_B.size());
  std::vector<safelora::ProjectLayer> layers(aligned.size());
  for (std::size_t i = 0; i < layers.size(); ++i) {
    layers[i].aligned = view(aligned[i], "aligned");
    layers[i].base = view(base[i], "base");
    check_shape(layers[i].base, "base", layers[i].aligned.rows, layers[i].aligned.cols);
    layers[i].v_norm = v_norm.mutable_data_ptr<double>() + i;
  }
  Tensors projected;
  projected.reserve(lora_B.size());
  for (std::size_t f = 0; f < lora_B.size(); ++f) {
    const std::int64_t l = layer_of[f];
    STD_TORCH_CHECK(l >= 0 && l < static_cast<std::int64_t>(layers.size()), "layer_of[", f, "] = ", l,
                    " is no layer; there are ", layers.size());
    safelora::ProjectLayer& layer = layers[static_cast<std::size_t>(l)];
    projected.push_back(empty_like_rows(lora_B[f], {lora_B[f].size(0), lora_B[f].size(1)},
                                        out_dtype ? *out_dtype : lora_B[f].scalar_type()));
    safelora::ProjectFactor factor = {view(lora_B[f], "lora_B"), view(lora_A[f], "lora_A"),
                                      mutable_view(projected[f], "the result"), cosine.mutable_data_ptr<double>() + f};
    check_shape(factor.lora_B, "lora_B", layer.aligned.rows, factor.lora_B.cols);
    if (factor.lora_A.rows > 0) check_shape(factor.lora_A, "lora_A", factor.lora_B.cols, layer.aligned.cols);
    layer.factors.push_back(factor);
  }
  safelora::project_layers(layers, normalize == "none" ? safelora::Normalize::none : safelora::Normalize::frobenius,
                           torch_threads());
  return {std::move(projected), v_norm, cosine};
}

Tensor update_cosine(Tensors lora_B_new, Tensors lora_B, Tensors lora_A) {
  check_length(lora_B.size(), lora_B_new.size(), "lora_B");
  check_length(lora_A.size(), lora_B_new.size(), "lora_A");
  std::vector<safelora::CosineItem> items(lora_B.size());
  for (std::size_t i = 0; i < items.size(); ++i) {
    items[i] = {view(lora_B_new[i], "lora_B_new"), view(lora_B[i], "lora_B"), view(lora_A[i], "lora_A")};
    check_shape(items[i].lora_B_new, "lora_B_new", items[i].lora_B.rows, items[i].lora_B.cols);
    check_shape(items[i].lora_A, "lora_A", items[i].lora_B.cols, items[i].lora_A.cols);
  }
  Tensor cosines = fp64_vector(lora_B_new, items.size());
  safelora::update_cosine(items, cosines.mutable_data_ptr<double>(), torch_threads());
  return cosines;
}

Tensor select_layers(Tensor cosines, std::optional<double> threshold, std::optional<std::int64_t> num_layers,
                     std::string rule) {
  STD_TORCH_CHECK(cosines.dim() == 1, "cosines must be 1-D, got ", cosines.dim(), "-D");
  STD_TORCH_CHECK(threshold.has_value() != num_layers.has_value(), "give threshold or num_layers, and only one");
  STD_TORCH_CHECK(!num_layers || *num_layers >= 0, "num_layers must be 0 or more, got ", num_layers.value_or(0));
  STD_TORCH_CHECK(rule == "strict" || rule == "authors", "rule must be 'strict' or 'authors', got '", rule, "'");
  const safelora::SelectRule selection =
      rule == "strict" ? safelora::SelectRule::strict : safelora::SelectRule::authors;
  const std::int64_t n = cosines.size(0);
  const Tensor values = torch::stable::contiguous(torch::stable::to(cosines, ScalarType::Double));
  Tensor selected = torch::stable::new_empty(cosines, {n}, ScalarType::Bool);
  bool* out = static_cast<bool*>(selected.mutable_data_ptr());
  if (threshold)
    safelora::select_by_threshold(values.const_data_ptr<double>(), n, *threshold, selection, out);
  else
    safelora::select_lowest(values.const_data_ptr<double>(), n, *num_layers, selection, out);
  return selected;
}

void project_out_into(const Tensors& xs, const Tensors& bases, const std::string& side, Tensors& out) {
  check_length(bases.size(), xs.size(), "bases");
  STD_TORCH_CHECK(side == "left" || side == "right", "side must be 'left' or 'right', got '", side, "'");
  std::vector<safelora::ProjectOutItem> items(xs.size());
  for (std::size_t i = 0; i < items.size(); ++i) {
    items[i] = {view(xs[i], "x"), view(bases[i], "basis"), mutable_view(out[i], "the result")};
    const std::int64_t d = side == "left" ? items[i].x.rows : items[i].x.cols;
    check_shape(items[i].basis, "basis", d, items[i].basis.cols);
  }
  safelora::project_out(items, side == "left" ? safelora::Side::left : safelora::Side::right, torch_threads());
}

Tensors project_out_layers(Tensors xs, Tensors bases, std::string side) {
  Tensors out;
  for (const Tensor& x : xs) {
    STD_TORCH_CHECK(x.dim() == 2, "x must be 2-D, got ", x.dim(), "-D");
    out.push_back(empty_like_rows(x, {x.size(0), x.size(1)}));
  }
  project_out_into(xs, bases, side, out);
  return out;
}

void project_out_layers_(Tensors xs, Tensors bases, std::string side) { project_out_into(xs, bases, side, xs); }

ScalarType compute_type(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

void check_salora(const ConstMatrix& x, const ConstMatrix& output, const char* output_name, const ConstMatrix& lora_A,
                  const ConstMatrix& lora_B, const ConstMatrix& basis) {
  check_shape(output, output_name, x.rows, output.cols);
  check_shape(lora_A, "lora_A", lora_A.rows, x.cols);
  check_shape(lora_B, "lora_B", output.cols, lora_A.rows);
  check_shape(basis, "basis", output.cols, basis.cols);
}

std::tuple<Tensor, Tensor, Tensor> salora_linear(Tensor x, Tensor base_output, Tensor lora_A, Tensor lora_B,
                                                 Tensor basis, double scaling) {
  safelora::SaloraForward f;
  f.x = view(x, "x");
  f.base_output = view(base_output, "base_output");
  f.lora_A = view(lora_A, "lora_A");
  f.lora_B = view(lora_B, "lora_B");
  f.basis = view(basis, "basis");
  f.scaling = scaling;
  const std::int64_t tokens = f.x.rows, d_out = f.base_output.cols, rank = f.lora_A.rows;
  check_salora(f.x, f.base_output, "base_output", f.lora_A, f.lora_B, f.basis);
  Tensor y = empty_like_rows(base_output, {tokens, d_out});
  Tensor h = empty_like_rows(x, {tokens, rank}, compute_type(x));
  Tensor projected_B = empty_like_rows(lora_B, {d_out, rank}, compute_type(x));
  f.y = mutable_view(y, "y");
  f.h = mutable_view(h, "h");
  f.projected_B = mutable_view(projected_B, "projected_B");
  safelora::salora_forward(f, torch_threads());
  return {y, h, projected_B};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> salora_linear_backward(Tensor dy, Tensor x, Tensor h, Tensor lora_A,
                                                                  Tensor lora_B, Tensor projected_B, Tensor basis,
                                                                  double scaling, std::vector<bool> needs) {
  check_length(needs.size(), 4, "needs");
  safelora::SaloraBackward b;
  b.grad_y = view(dy, "dy");
  b.x = view(x, "x");
  b.h = view(h, "h");
  b.lora_A = view(lora_A, "lora_A");
  b.lora_B = view(lora_B, "lora_B");
  b.projected_B = view(projected_B, "projected_B");
  b.basis = view(basis, "basis");
  b.scaling = scaling;
  check_salora(b.x, b.grad_y, "dy", b.lora_A, b.lora_B, b.basis);
  check_shape(b.h, "h", b.x.rows, b.lora_A.rows);
  check_shape(b.projected_B, "projected_B", b.lora_B.rows, b.lora_B.cols);
  const Tensor* owners[] = {&x, &lora_A, &lora_B, &basis};
  Matrix* views[] = {&b.grad_x, &b.grad_A, &b.grad_B, &b.grad_basis};
  Tensors grads;
  for (std::size_t i = 0; i < 4; ++i) {
    const Tensor& owner = *owners[i];
    grads.push_back(needs[i] ? empty_like_rows(owner, {owner.size(0), owner.size(1)}) : empty_like_rows(owner, {0}));
    if (needs[i]) *views[i] = mutable_view(grads[i], "a gradient");
  }
  safelora::salora_backward(b, torch_threads());
  return {grads[0], grads[1], grads[2], grads[3]};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(safelora, CPU, m) {
  m.impl("project_layers", TORCH_BOX(&project_layers));
  m.impl("update_cosine", TORCH_BOX(&update_cosine));
  m.impl("select_layers", TORCH_BOX(&select_layers));
  m.impl("project_out_layers", TORCH_BOX(&project_out_layers));
  m.impl("project_out_layers_", TORCH_BOX(&project_out_layers_));
  m.impl("salora_linear", TORCH_BOX(&salora_linear));
  m.impl("salora_linear_backward", TORCH_BOX(&salora_linear_backward));
}
