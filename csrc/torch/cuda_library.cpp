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

}  // namespace
}  // namespace safelora

STABLE_TORCH_LIBRARY_IMPL(SAFELORA_NAMESPACE, SAFELORA_KEY, m) { safelora::binding::implement<safelora::Gpu>(m); }
