// Which layers to project, decided on the device. n doubles in, n bools out; NaN is never selected.
#pragma once

#include <cstdint>

#include "launch.h"

namespace safelora::cuda {

constexpr int kSelectThreads = 1024;
constexpr int kDigitBits = 8, kDigits = 1 << kDigitBits;
constexpr int kSelectShared = (kDigits + kSelectThreads / 32 + 2) * 4;  // bytes

struct SelectParams {
  const double* cosines;
  bool* selected;
  double threshold;
  std::int64_t n, num_layers;
  bool authors;  // round to five decimals first, and select whatever ties with the last one
};

}  // namespace safelora::cuda
