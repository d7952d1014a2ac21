#include "cuda_call.h"

#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>

#include <memory>

// In libtorch_cpu from torch 2.13 on.
extern "C" __attribute__((weak)) AOTITorchError torch_stream_native_handle(StreamHandle stream, void** handle);

namespace safelora::binding {
namespace {

using CurrentStream = AOTITorchError (*)(std::int32_t device, void** stream);

// libtorch_cuda is loaded where there are CUDA tensors, but it is no dependency of this library, which must load
// without it, and Python loads it out of sight of later libraries.
CurrentStream current_stream_of_torch_cuda() {
  void* library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
  void* found = library ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr;
  STD_TORCH_CHECK(found, "this torch has no libtorch_cuda.so with aoti_torch_get_current_cuda_stream");
  return reinterpret_cast<CurrentStream>(found);
}

void* current_stream(std::int32_t device) {
  void* handle = nullptr;
  if (torch_stream_native_handle != nullptr) {
    StreamHandle stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_stream(device, &stream));
    const AOTITorchError error = torch_stream_native_handle(stream, &handle);
    TORCH_ERROR_CODE_CHECK(aoti_torch_delete_stream(stream));
    TORCH_ERROR_CODE_CHECK(error);
  } else {
    static const CurrentStream current = current_stream_of_torch_cuda();
    TORCH_ERROR_CODE_CHECK(current(device, &handle));
  }
  return handle;
}

}  // namespace

struct Call::State {
  explicit State(const Tensor& on) : on(on), guard(on.get_device_index()) {
    stream.device = cuda::device(on.get_device_index());
    stream.handle = current_stream(on.get_device_index());
    // Freed when the call returns, and given out again only behind the work of this stream.
    stream.allocate = [this](std::size_t bytes) {
      const std::int64_t size = static_cast<std::int64_t>(bytes);
      memory.push_back(torch::stable::new_empty(this->on, {size}, ScalarType::Byte));
      if (debug()) torch::stable::fill_(memory.back(), 255.0);  // NaN in every floating type
      return memory.back().mutable_data_ptr();
    };
  }

  Tensor on;
  torch::stable::accelerator::DeviceGuard guard;
  cuda::Stream stream;
  Tensors memory;
};

Call::Call(const Tensor* on) : state_(on ? new State(*on) : nullptr) {}
Call::~Call() { delete state_; }

cuda::Stream Call::stream() const { return state_ ? state_->stream : cuda::Stream{}; }

void Call::admit(const Tensor& t, const char* name) const {
  STD_TORCH_CHECK(t.is_cuda(), name, " must be a CUDA tensor");
  STD_TORCH_CHECK(
      state_ && t.get_device_index() == state_->on.get_device_index(), name, " is on cuda:", t.get_device_index(),
      ", but the call runs on cuda:", state_ ? state_->on.get_device_index() : -1, ": move all tensors to one device");
}

}  // namespace safelora::binding
