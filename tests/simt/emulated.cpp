// The parts of a driver that do not depend on who runs the kernels, and the binding's call on CPU tensors.
#include "simt/emulated.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>
#include <new>
#include <string>
#include <vector>

#include "torch/cuda_call.h"

namespace {

std::map<const void*, std::size_t> pieces;
std::vector<void*> owned;
std::string last_error;

}  // namespace

namespace emulated {

void remember(const void* data, std::size_t bytes) {
  if (bytes > 0) pieces[data] = std::max(pieces[data], bytes);
}

void* allocate(std::size_t bytes) {
  void* memory = nullptr;
  if (posix_memalign(&memory, 256, bytes > 0 ? bytes : 1)) throw std::bad_alloc();
  std::memset(memory, 0xff, bytes);
  owned.push_back(memory);
  remember(memory, bytes);
  return memory;
}

void forget_all() {
  for (void* memory : owned) std::free(memory);
  owned.clear();
  pieces.clear();
}

void for_each_piece(void (*visit)(const void*, std::size_t, void*), void* context) {
  for (const auto& [data, bytes] : pieces) visit(data, bytes, context);
}

safelora::cuda::Stream stream() { return {nullptr, safelora::cuda::device(0), allocate}; }

}  // namespace emulated

namespace safelora::cuda {

Device device(int index) {
  const simt::Settings& s = simt::settings();
  return {index, s.arch, s.sm_count, s.l2_bytes, s.shared_bytes};
}

unsigned resident_blocks(const char*, const Shape& shape, const Stream&) {
  const simt::Settings& s = simt::settings();
  const unsigned blocks = static_cast<unsigned>(s.resident > 0 ? s.resident : s.sm_count);
  return std::max(1u, blocks / shape.cluster) * shape.cluster;
}

bool fits_cluster(const char*, const Shape& shape, const Stream& stream) {
  return stream.device.arch >= 90 && shape.cluster <= 8 &&
         shape.shared <= static_cast<std::size_t>(stream.device.shared_bytes);
}

void memset_zero(void* data, std::size_t bytes, const Stream&) { std::memset(data, 0, bytes); }

}  // namespace safelora::cuda

namespace safelora::binding {

struct Call::State {};

Call::Call(const Tensor*) : state_(nullptr) { emulated::forget_all(); }
Call::~Call() { emulated::forget_all(); }
cuda::Stream Call::stream() const { return emulated::stream(); }

void Call::admit(const Tensor& t, const char* name) const {
  STD_TORCH_CHECK(t.is_cpu(), name, " must be a CPU tensor: the device is emulated");
  std::int64_t last = 0;
  for (std::int64_t d = 0; d < t.dim(); ++d) {
    if (t.size(d) == 0) return;
    last += (t.size(d) - 1) * t.stride(d);
  }
  emulated::remember(t.const_data_ptr(), static_cast<std::size_t>((last + 1) * t.element_size()));
}

}  // namespace safelora::binding

// The door. Schemas come from Python (safelora_kernels/schemas.py), which also loads this library with ctypes.
#define DOOR __attribute__((visibility("default")))

extern "C" {

DOOR simt::Settings* emulated_settings() { return &simt::settings(); }

// Launches one kernel; nullptr, or what went wrong.
DOOR const char* emulated_launch(const emulated::Launch* l) {
  try {
    safelora::cuda::Shape shape;
    shape.grid_x = l->grid[0];
    shape.grid_y = l->grid[1];
    shape.grid_z = l->grid[2];
    shape.block = l->block;
    shape.cluster = l->cluster;
    shape.shared = l->shared;
    safelora::cuda::launch(l->kernel, shape, l->params, l->bytes, emulated::stream());
    return nullptr;
  } catch (const std::exception& e) {
    last_error = e.what();
    return last_error.c_str();
  }
}

DOOR void emulated_remember(const void* data, std::size_t bytes) { emulated::remember(data, bytes); }

DOOR void emulated_forget_all() { emulated::forget_all(); }

// The tensor map of a row-major matrix of fp32 (size 4) or bf16 (2), for kernels that Python launches itself.
DOOR void emulated_tensor_map(void* map, const void* data, std::int64_t rows, std::int64_t cols, std::int64_t stride,
                              int size, unsigned box_rows, unsigned box_cols, int swizzle) {
  const safelora::ConstMatrix m = {data, size == 4 ? safelora::DType::f32 : safelora::DType::bf16, rows, cols, stride,
                                   1};
  const safelora::cuda::TensorMap made = safelora::cuda::tensor_map(m, box_rows, box_cols, swizzle, emulated::stream());
  std::memcpy(map, &made, sizeof made);
}

}  // extern "C"
