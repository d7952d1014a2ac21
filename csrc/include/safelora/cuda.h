// C++ API of the CUDA kernels: that of kernels.h with device pointers (`v_norm`, `cosine` and `cosines` too).
//
// Every call only launches kernels on the stream it is given: it neither waits, nor copies from or to the host, nor
// touches the current device, so it can be captured into a CUDA graph. Make `stream.device` the current device first.
// Throws std::runtime_error where CUDA refuses a launch, std::invalid_argument where an argument makes no sense.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <optional>
#include <vector>

#include "safelora/kernels.h"

namespace safelora::cuda {

// What the kernels want to know about a GPU. Results depend on `arch` and `shared_bytes`, which decide the kernel that
// a layer takes, and on nothing else in here.
struct Device {
  int index = 0;
  int arch = 80;  // 10·major + minor of the compute capability
  int sm_count = 1;
  std::int64_t l2_bytes = 0;
  std::int64_t shared_bytes = 0;  // that one block can have when it asks for them
};

// Asked of the driver once per device and process.
SAFELORA_API Device device(int index);

struct Stream {
  void* handle = nullptr;  // a cudaStream_t
  Device device;
  // At least `bytes` of device memory, 256-byte aligned, that nobody else uses until the work launched on this stream
  // during the call is done.
  std::function<void*(std::size_t bytes)> allocate;
};

// A stream whose memory comes from the device's default pool, and returns there, in stream order, when the last copy of
// the result is gone.
SAFELORA_API Stream stream_with_pool(void* handle, int device_index);

SAFELORA_API void project_layers(const std::vector<ProjectLayer>& layers, Normalize normalize, const Stream& stream);

// Among all adapters of a call: those whose cosine falls under the threshold or, without one, the num_layers smallest.
struct Selection {
  std::optional<double> threshold;
  std::int64_t num_layers = 0;
  SelectRule rule = SelectRule::strict;
};

// project_layers, and the selection from its n cosines, into which every adapter's `cosine` must point; `projected` is
// lora_B wherever selected[f.cosine - cosines] comes out false.
SAFELORA_API void project_selected_layers(const std::vector<ProjectLayer>& layers, Normalize normalize,
                                          const Selection& selection, const double* cosines, std::int64_t n,
                                          bool* selected, const Stream& stream);
SAFELORA_API void update_cosine(const std::vector<CosineItem>& items, double* cosines, const Stream& stream);
SAFELORA_API void select_by_threshold(const double* cosines, std::int64_t n, double threshold, SelectRule rule,
                                      bool* selected, const Stream& stream);
SAFELORA_API void select_lowest(const double* cosines, std::int64_t n, std::int64_t num_layers, SelectRule rule,
                                bool* selected, const Stream& stream);
SAFELORA_API void project_out(const std::vector<ProjectOutItem>& items, Side side, const Stream& stream);
SAFELORA_API void gram_apply(const std::vector<GramItem>& items, const Stream& stream);
SAFELORA_API void salora_forward(const SaloraForward& args, const Stream& stream);
SAFELORA_API void salora_backward(const SaloraBackward& args, const Stream& stream);

}  // namespace safelora::cuda
