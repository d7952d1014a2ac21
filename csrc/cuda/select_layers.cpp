#include "select_layers.cuh"

#include "safelora/cuda.h"

namespace safelora::cuda {

void select_by_threshold(const double* cosines, std::int64_t n, double threshold, SelectRule rule, bool* selected,
                         const Stream& stream) {
  const SelectParams params = {cosines, selected, threshold, n, 0, rule == SelectRule::authors};
  Shape shape;
  shape.grid_x = static_cast<unsigned>((n + kSelectThreads - 1) / kSelectThreads);
  shape.block = kSelectThreads;
  launch("threshold_layers", shape, params, stream);
}

void select_lowest(const double* cosines, std::int64_t n, std::int64_t num_layers, SelectRule rule, bool* selected,
                   const Stream& stream) {
  if (n == 0) return;
  const SelectParams params = {cosines, selected, 0.0, n, num_layers, rule == SelectRule::authors};
  Shape shape;
  shape.block = kSelectThreads;
  shape.shared = kSelectShared;
  launch("lowest_layers", shape, params, stream);
}

}  // namespace safelora::cuda
