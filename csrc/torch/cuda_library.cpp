// The CUDA kernels as PyTorch operators: on CUDA tensors, in the current stream of their device, with PyTorch's memory.
// The tests compile this file for emulated devices, too, under another namespace and for CPU tensors.
#include "cuda_call.h"
#include "operators.h"

#ifndef SAFELORA_NAMESPACE
#define SAFELORA_NAMESPACE safelora
#define SAFELORA_KEY CUDA
#endif

namespace safelora {
namespace {

struct Gpu final : binding::Views {
  binding::Call call;
  cuda::Stream context;

  explicit Gpu(const binding::Tensor* on) : call(on), context(call.stream()) {}

  void admit(const binding::Tensor& t, const char* name) const override { call.admit(t, name); }
};

std::tuple<binding::Tensors, binding::Tensor, binding::Tensor, binding::Tensor> project_selected_layers_op(
    binding::Tensors aligned, binding::Tensors base, binding::Tensors lora_B, binding::Tensors lora_A,
    std::vector<std::int64_t> layer_of, std::optional<double> threshold, std::optional<std::int64_t> num_layers,
    std::string rule, std::string normalize, std::optional<binding::ScalarType> out_dtype) {
  const cuda::Selection selection = {threshold, num_layers.value_or(0),
                                     binding::selection_rule(threshold, num_layers, rule)};
  const Gpu target(aligned.empty() ? nullptr : &aligned[0]);
  binding::Projection p = binding::projection(target, aligned, base, lora_B, lora_A, layer_of, out_dtype);
  const auto n = static_cast<std::int64_t>(lora_B.size());
  binding::Tensor selected = target.new_results(p.cosine, {n}, binding::ScalarType::Bool);
  cuda::project_selected_layers(p.layers, binding::normalization(normalize), selection,
                                p.cosine.const_data_ptr<double>(), n, static_cast<bool*>(selected.mutable_data_ptr()),
                                target.context);
  return {std::move(p.projected), p.v_norm, p.cosine, selected};
}

}  // namespace
}  // namespace safelora

STABLE_TORCH_LIBRARY_IMPL(SAFELORA_NAMESPACE, SAFELORA_KEY, m) {
  safelora::binding::implement<safelora::Gpu>(m);
  m.impl("project_selected_layers", TORCH_BOX(&safelora::project_selected_layers_op));
}
