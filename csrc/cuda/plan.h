// What calls cost, counted from the launches that they would make: bytes, operations, memory. No device is asked.
#pragma once

#include <cstdint>
#include <vector>

#include "safelora/cuda.h"

namespace safelora::cuda {

inline std::int64_t l2_size(const Device& device) {
  return device.l2_bytes > 0 ? device.l2_bytes : std::int64_t{40} << 20;
}

// How many tf32 numbers an entry is multiplied as; of two factors in two parts, low·low is left out.
inline int parts(const ConstMatrix& m) { return m.dtype == DType::f32 ? 2 : 1; }

struct OpPlan {
  std::int64_t compulsory_bytes = 0;  // every input once, every result once
  std::int64_t dram_bytes = 0;        // with what is read again soon coming from L2, where l2_window fits
  std::int64_t l2_bytes = 0;          // everything that leaves L2 for a multiprocessor, or comes back
  std::int64_t flops = 0;             // of the formula
  std::int64_t mma_flops = 0;         // of the tensor cores, or in fp64: products of split operands, padding
  std::int64_t l2_window = 0;         // bytes that must stay in L2
  std::int64_t workspace_bytes = 0;   // at a time
  std::int64_t shared_bytes = 0;      // of the block that takes most

  OpPlan& operator+=(const OpPlan& other);
};

OpPlan plan_project(const std::vector<ProjectLayer>& layers, const Device& device);
OpPlan plan_update_cosine(const std::vector<CosineItem>& items);
OpPlan plan_project_out(const std::vector<ProjectOutItem>& items, Side side, const Device& device);
OpPlan plan_salora_forward(const SaloraForward& args, const Device& device);
OpPlan plan_salora_backward(const SaloraBackward& args, const Device& device);

// The same for contiguous arguments, one layer or pair each, for callers without C++.
extern "C" {
SAFELORA_API void safelora_plan_project(std::int64_t d_out, std::int64_t d_in, std::int64_t rank, DType weight,
                                        DType factor, int arch, int sm_count, std::int64_t l2_bytes, OpPlan* plan);
SAFELORA_API void safelora_plan_update_cosine(std::int64_t d_out, std::int64_t d_in, std::int64_t rank, DType factor,
                                              OpPlan* plan);
SAFELORA_API void safelora_plan_project_out(std::int64_t d, std::int64_t m, std::int64_t k, DType x, DType basis,
                                            int arch, int sm_count, std::int64_t l2_bytes, OpPlan* plan);
// All gradients but that of the basis.
SAFELORA_API void safelora_plan_salora(std::int64_t tokens, std::int64_t d_in, std::int64_t d_out, std::int64_t rank,
                                       std::int64_t k, DType activation, DType factor, int arch, int sm_count,
                                       std::int64_t l2_bytes, OpPlan* forward, OpPlan* backward);
}

}  // namespace safelora::cuda
