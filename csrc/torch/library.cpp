// The CPU kernels as PyTorch operators: on CPU tensors, with PyTorch's threads. Schemas and fakes live in
// safelora_kernels/schemas.py.
#include "operators.h"

#ifndef SAFELORA_NAMESPACE  // the tests load a second build
#define SAFELORA_NAMESPACE safelora
#endif

namespace safelora {

// Too little work for threads.
static void select_by_threshold(const double* cosines, std::int64_t n, double threshold, SelectRule rule,
                                bool* selected, const Threads&) {
  select_by_threshold(cosines, n, threshold, rule, selected);
}
static void select_lowest(const double* cosines, std::int64_t n, std::int64_t num_layers, SelectRule rule,
                          bool* selected, const Threads&) {
  select_lowest(cosines, n, num_layers, rule, selected);
}

namespace {

using binding::Tensor;

struct Cpu final : binding::Views {
  Threads context;

  explicit Cpu(const Tensor*)
      : context{static_cast<int>(torch::stable::get_num_threads()), [](int n, const std::function<void(int)>& task) {
                  torch::stable::parallel_for(0, n, 1, [&](std::int64_t begin, std::int64_t end) {
                    for (std::int64_t i = begin; i < end; ++i) task(static_cast<int>(i));
                  });
                }} {}

  void admit(const Tensor& t, const char* name) const override {
    STD_TORCH_CHECK(t.is_cpu(), name, " must be a CPU tensor");
  }
};

}  // namespace
}  // namespace safelora

STABLE_TORCH_LIBRARY_IMPL(SAFELORA_NAMESPACE, CPU, m) { safelora::binding::implement<safelora::Cpu>(m); }

static std::int64_t cpu_path() { return static_cast<std::int64_t>(safelora::active_isa()); }

// For the doctor: the library exports no symbol, so that a question to it is an operator too.
STABLE_TORCH_LIBRARY_FRAGMENT(SAFELORA_NAMESPACE, m) { m.def("_cpu_path() -> int"); }
STABLE_TORCH_LIBRARY_IMPL(SAFELORA_NAMESPACE, CompositeExplicitAutograd, m) {
  m.impl("_cpu_path", TORCH_BOX(&cpu_path));
}
