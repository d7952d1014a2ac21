// The operators of schemas.py over a target: what turns their tensors into views and runs the kernels.
//
// A target is made for each call, from one of its tensors (nullptr: there is none). It derives from Views, and its
// `context`, the kernels' last argument, decides which kernels run.
#pragma once

#include <torch/csrc/stable/library.h>

#include <string>
#include <tuple>

#include "views.h"

namespace safelora::binding {

// h and B̃ have the precision of the sums.
inline ScalarType compute_type(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline void check_salora(const ConstMatrix& x, const ConstMatrix& output, const char* output_name,
                         const ConstMatrix& lora_A, const ConstMatrix& lora_B, const ConstMatrix& basis) {
  check_shape(output, output_name, x.rows, output.cols);
  check_shape(lora_A, "lora_A", lora_A.rows, x.cols);
  check_shape(lora_B, "lora_B", output.cols, lora_A.rows);
  check_shape(basis, "basis", output.cols, basis.cols);
}

inline Normalize normalization(const std::string& name) {
  STD_TORCH_CHECK(name == "frobenius" || name == "none", "normalize must be 'frobenius' or 'none', got '", name, "'");
  return name == "none" ? Normalize::none : Normalize::frobenius;
}

inline SelectRule selection_rule(const std::optional<double>& threshold, const std::optional<std::int64_t>& num_layers,
                                 const std::string& name) {
  STD_TORCH_CHECK(threshold.has_value() != num_layers.has_value(), "give threshold or num_layers, and only one");
  STD_TORCH_CHECK(!num_layers || *num_layers >= 0, "num_layers must be 0 or more, got ", num_layers.value_or(0));
  STD_TORCH_CHECK(name == "strict" || name == "authors", "rule must be 'strict' or 'authors', got '", name, "'");
  return name == "strict" ? SelectRule::strict : SelectRule::authors;
}

// The layers of a projection, and where its results go.
struct Projection {
  std::vector<ProjectLayer> layers;
  Tensors projected;
  Tensor v_norm, cosine;
};

template <class Target>
Projection projection(const Target& target, const Tensors& aligned, const Tensors& base, const Tensors& lora_B,
                      const Tensors& lora_A, const std::vector<std::int64_t>& layer_of,
                      const std::optional<ScalarType>& out_dtype) {
  check_length(base.size(), aligned.size(), "base");
  check_length(lora_A.size(), lora_B.size(), "lora_A");
  check_length(layer_of.size(), lora_B.size(), "layer_of");
  Projection p;
  p.v_norm = target.fp64_vector(aligned, aligned.size());
  p.cosine = target.fp64_vector(aligned, lora_B.size());
  p.layers.resize(aligned.size());
  for (std::size_t i = 0; i < p.layers.size(); ++i) {
    ProjectLayer& layer = p.layers[i];
    layer.aligned = target.view(aligned[i], "aligned");
    layer.base = target.view(base[i], "base");
    check_shape(layer.base, "base", layer.aligned.rows, layer.aligned.cols);
    layer.v_norm = p.v_norm.template mutable_data_ptr<double>() + i;
  }
  p.projected.reserve(lora_B.size());
  for (std::size_t f = 0; f < lora_B.size(); ++f) {
    const std::int64_t l = layer_of[f];
    STD_TORCH_CHECK(l >= 0 && l < static_cast<std::int64_t>(p.layers.size()), "layer_of[", f, "] = ", l,
                    " is no layer; there are ", p.layers.size());
    ProjectLayer& layer = p.layers[static_cast<std::size_t>(l)];
    p.projected.push_back(target.new_results(lora_B[f], {lora_B[f].size(0), lora_B[f].size(1)},
                                             out_dtype ? *out_dtype : lora_B[f].scalar_type()));
    ProjectFactor factor = {target.view(lora_B[f], "lora_B"), target.view(lora_A[f], "lora_A"),
                            target.mutable_view(p.projected[f], "the result"),
                            p.cosine.template mutable_data_ptr<double>() + f};
    check_shape(factor.lora_B, "lora_B", layer.aligned.rows, factor.lora_B.cols);
    if (factor.lora_A.rows > 0) check_shape(factor.lora_A, "lora_A", factor.lora_B.cols, layer.aligned.cols);
    layer.factors.push_back(factor);
  }
  return p;
}

template <class Target>
std::tuple<Tensors, Tensor, Tensor> project_layers_op(Tensors aligned, Tensors base, Tensors lora_B, Tensors lora_A,
                                                      std::vector<std::int64_t> layer_of, std::string normalize,
                                                      std::optional<ScalarType> out_dtype) {
  const Target target(aligned.empty() ? nullptr : &aligned[0]);
  Projection p = projection(target, aligned, base, lora_B, lora_A, layer_of, out_dtype);
  project_layers(p.layers, normalization(normalize), target.context);
  return {std::move(p.projected), p.v_norm, p.cosine};
}

template <class Target>
Tensor update_cosine_op(Tensors lora_B_new, Tensors lora_B, Tensors lora_A) {
  check_length(lora_B.size(), lora_B_new.size(), "lora_B");
  check_length(lora_A.size(), lora_B_new.size(), "lora_A");
  const Target target(lora_B_new.empty() ? nullptr : &lora_B_new[0]);
  std::vector<CosineItem> items(lora_B.size());
  for (std::size_t i = 0; i < items.size(); ++i) {
    items[i] = {target.view(lora_B_new[i], "lora_B_new"), target.view(lora_B[i], "lora_B"),
                target.view(lora_A[i], "lora_A")};
    check_shape(items[i].lora_B_new, "lora_B_new", items[i].lora_B.rows, items[i].lora_B.cols);
    check_shape(items[i].lora_A, "lora_A", items[i].lora_B.cols, items[i].lora_A.cols);
  }
  Tensor cosines = target.fp64_vector(lora_B_new, items.size());
  update_cosine(items, cosines.mutable_data_ptr<double>(), target.context);
  return cosines;
}

template <class Target>
Tensor select_layers_op(Tensor cosines, std::optional<double> threshold, std::optional<std::int64_t> num_layers,
                        std::string rule) {
  STD_TORCH_CHECK(cosines.dim() == 1, "cosines must be 1-D, got ", cosines.dim(), "-D");
  const SelectRule selection = selection_rule(threshold, num_layers, rule);
  const std::int64_t n = cosines.size(0);
  const Tensor values = torch::stable::contiguous(torch::stable::to(cosines, ScalarType::Double));
  const Target target(&values);
  target.admit(values, "cosines");
  Tensor selected = target.new_results(cosines, {n}, ScalarType::Bool);
  bool* out = static_cast<bool*>(selected.mutable_data_ptr());
  if (threshold)
    select_by_threshold(values.const_data_ptr<double>(), n, *threshold, selection, out, target.context);
  else
    select_lowest(values.const_data_ptr<double>(), n, *num_layers, selection, out, target.context);
  return selected;
}

template <class Target>
void project_out_into(const Target& target, const Tensors& xs, const Tensors& bases, const std::string& side,
                      Tensors& out) {
  check_length(bases.size(), xs.size(), "bases");
  STD_TORCH_CHECK(side == "left" || side == "right", "side must be 'left' or 'right', got '", side, "'");
  std::vector<ProjectOutItem> items(xs.size());
  for (std::size_t i = 0; i < items.size(); ++i) {
    items[i] = {target.view(xs[i], "x"), target.view(bases[i], "basis"), target.mutable_view(out[i], "the result")};
    const std::int64_t d = side == "left" ? items[i].x.rows : items[i].x.cols;
    check_shape(items[i].basis, "basis", d, items[i].basis.cols);
  }
  project_out(items, side == "left" ? Side::left : Side::right, target.context);
}

template <class Target>
Tensors project_out_layers_op(Tensors xs, Tensors bases, std::string side) {
  const Target target(xs.empty() ? nullptr : &xs[0]);
  Tensors out;
  for (const Tensor& x : xs) {
    STD_TORCH_CHECK(x.dim() == 2, "x must be 2-D, got ", x.dim(), "-D");
    out.push_back(target.new_results(x, {x.size(0), x.size(1)}));
  }
  project_out_into(target, xs, bases, side, out);
  return out;
}

template <class Target>
void project_out_layers_inplace_op(Tensors xs, Tensors bases, std::string side) {
  const Target target(xs.empty() ? nullptr : &xs[0]);
  project_out_into(target, xs, bases, side, xs);
}

template <class Target>
Tensors gram_apply_layers_op(Tensors xs, Tensors zs, Tensors weights) {
  check_length(zs.size(), xs.size(), "zs");
  check_length(weights.size(), xs.size(), "weights");
  const Target target(xs.empty() ? nullptr : &xs[0]);
  std::vector<GramItem> items(xs.size());
  Tensors out;
  out.reserve(items.size());
  for (std::size_t i = 0; i < items.size(); ++i) {
    GramItem& item = items[i];
    item.x = target.view(xs[i], "x");
    item.z = target.view(zs[i], "z");
    check_shape(item.z, "z", item.x.cols, item.z.cols);
    item.weights = target.column(weights[i], "weights");
    const bool wide = item.x.dtype == DType::f64 || item.z.dtype == DType::f64 || item.weights.dtype == DType::f64;
    if (item.weights.rows == 0)
      item.weights = {};  // an empty tensor stands for ones
    else
      check_shape(item.weights, "weights", item.x.rows, 1);
    out.push_back(target.new_results(zs[i], {item.z.rows, item.z.cols}, wide ? ScalarType::Double : ScalarType::Float));
    item.out = target.mutable_view(out[i], "the result");
  }
  gram_apply(items, target.context);
  return out;
}

template <class Target>
std::tuple<Tensor, Tensor, Tensor> salora_linear_op(Tensor x, Tensor base_output, Tensor lora_A, Tensor lora_B,
                                                    Tensor basis, double scaling) {
  const Target target(&x);
  SaloraForward f;
  f.x = target.view(x, "x");
  f.base_output = target.view(base_output, "base_output");
  f.lora_A = target.view(lora_A, "lora_A");
  f.lora_B = target.view(lora_B, "lora_B");
  f.basis = target.view(basis, "basis");
  f.scaling = scaling;
  const std::int64_t tokens = f.x.rows, d_out = f.base_output.cols, rank = f.lora_A.rows;
  check_salora(f.x, f.base_output, "base_output", f.lora_A, f.lora_B, f.basis);
  Tensor y = target.new_results(base_output, {tokens, d_out});
  Tensor h = target.new_results(x, {tokens, rank}, compute_type(x));
  Tensor projected_B = target.new_results(lora_B, {d_out, rank}, compute_type(x));
  f.y = target.mutable_view(y, "y");
  f.h = target.mutable_view(h, "h");
  f.projected_B = target.mutable_view(projected_B, "projected_B");
  salora_forward(f, target.context);
  return {y, h, projected_B};
}

template <class Target>
std::tuple<Tensor, Tensor, Tensor, Tensor> salora_linear_backward_op(Tensor dy, Tensor x, Tensor h, Tensor lora_A,
                                                                     Tensor lora_B, Tensor projected_B, Tensor basis,
                                                                     double scaling, std::vector<bool> needs) {
  check_length(needs.size(), 4, "needs");
  const Target target(&x);
  SaloraBackward b;
  b.grad_y = target.view(dy, "dy");
  b.x = target.view(x, "x");
  b.h = target.view(h, "h");
  b.lora_A = target.view(lora_A, "lora_A");
  b.lora_B = target.view(lora_B, "lora_B");
  b.projected_B = target.view(projected_B, "projected_B");
  b.basis = target.view(basis, "basis");
  b.scaling = scaling;
  check_salora(b.x, b.grad_y, "dy", b.lora_A, b.lora_B, b.basis);
  check_shape(b.h, "h", b.x.rows, b.lora_A.rows);
  check_shape(b.projected_B, "projected_B", b.lora_B.rows, b.lora_B.cols);
  const Tensor* owners[] = {&x, &lora_A, &lora_B, &basis};
  Matrix* views[] = {&b.grad_x, &b.grad_A, &b.grad_B, &b.grad_basis};
  Tensors grads;
  for (std::size_t i = 0; i < 4; ++i) {
    const Tensor& owner = *owners[i];
    grads.push_back(needs[i] ? target.new_results(owner, {owner.size(0), owner.size(1)})
                             : target.new_results(owner, {0}));
    if (needs[i]) *views[i] = target.mutable_view(grads[i], "a gradient");
  }
  salora_backward(b, target.context);
  return {grads[0], grads[1], grads[2], grads[3]};
}

template <class Target, class Library>
void implement(Library& m) {
  m.impl("project_layers", TORCH_BOX(&project_layers_op<Target>));
  m.impl("update_cosine", TORCH_BOX(&update_cosine_op<Target>));
  m.impl("select_layers", TORCH_BOX(&select_layers_op<Target>));
  m.impl("project_out_layers", TORCH_BOX(&project_out_layers_op<Target>));
  m.impl("project_out_layers_", TORCH_BOX(&project_out_layers_inplace_op<Target>));
  m.impl("gram_apply_layers", TORCH_BOX(&gram_apply_layers_op<Target>));
  m.impl("salora_linear", TORCH_BOX(&salora_linear_op<Target>));
  m.impl("salora_linear_backward", TORCH_BOX(&salora_linear_backward_op<Target>));
}

}  // namespace safelora::binding
