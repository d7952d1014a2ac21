// launch.h on the CUDA runtime. No device code: kernels are known by their host-side stubs.
#include <cuda.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

#include "launch.h"

#define KERNEL(name) extern "C" void safelora_##name();
#include "kernels.def"
#undef KERNEL

namespace safelora::cuda {
namespace {

constexpr std::size_t kSharedByDefault = 48 << 10;
constexpr unsigned kPortableCluster = 8;

void check(cudaError_t error, const std::string& what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // or a later, unrelated call would report it
  throw std::runtime_error(what + ": " + cudaGetErrorName(error) + ", " + cudaGetErrorString(error));
}

const void* find(const char* kernel) {
  static const std::unordered_map<std::string, const void*> known = {
#define KERNEL(name) {#name, reinterpret_cast<const void*>(&safelora_##name)},
#include "kernels.def"
#undef KERNEL
  };
  const auto found = known.find(kernel);
  if (found == known.end()) throw std::runtime_error(std::string("no CUDA kernel is called ") + kernel);
  return found->second;
}

// The caller's runtime may be another copy than this library's, whose idea of the current device is its own.
void use(const Device& device) {
  int current = -1;
  check(cudaGetDevice(&current), "cudaGetDevice");
  if (current != device.index) check(cudaSetDevice(device.index), "cudaSetDevice");
}

// A launch configuration, and the attributes it points to.
class Config {
 public:
  Config(const char* kernel, const Shape& shape, const Stream& stream) : kernel_(find(kernel)) {
    use(stream.device);
    config_.gridDim = dim3(shape.grid_x, shape.grid_y, shape.grid_z);
    config_.blockDim = dim3(shape.block);
    config_.dynamicSmemBytes = shape.shared;
    config_.stream = static_cast<cudaStream_t>(stream.handle);
    if (shape.shared > kSharedByDefault)
      check(cudaFuncSetAttribute(kernel_, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shape.shared)),
            kernel);
    if (shape.cluster > 1) {
      if (shape.cluster > kPortableCluster)
        check(cudaFuncSetAttribute(kernel_, cudaFuncAttributeNonPortableClusterSizeAllowed, 1), kernel);
      cluster_.id = cudaLaunchAttributeClusterDimension;
      cluster_.val.clusterDim.x = shape.cluster;
      cluster_.val.clusterDim.y = cluster_.val.clusterDim.z = 1;
      config_.attrs = &cluster_;
      config_.numAttrs = 1;
    }
  }
  Config(const Config&) = delete;
  Config& operator=(const Config&) = delete;

  const void* kernel() const { return kernel_; }
  const cudaLaunchConfig_t* get() const { return &config_; }

 private:
  const void* kernel_;
  cudaLaunchConfig_t config_ = {};
  cudaLaunchAttribute cluster_ = {};
};

int attribute(cudaDeviceAttr which, int index) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, index), "cudaDeviceGetAttribute");
  return value;
}

// Memory of a stream's pool that goes back behind the work of the stream.
struct PoolMemory {
  int device;
  cudaStream_t stream;
  std::vector<void*> pieces;

  ~PoolMemory() {
    int current = -1;
    if (cudaGetDevice(&current) == cudaSuccess && current != device) cudaSetDevice(device);
    for (void* piece : pieces) cudaFreeAsync(piece, stream);
  }
};

int active_clusters(const char* kernel, const Shape& shape, const Stream& stream) {
  Shape one = shape;
  one.grid_x = shape.cluster;
  one.grid_y = one.grid_z = 1;
  const Config config(kernel, one, stream);
  int clusters = 0;
  const cudaError_t error = cudaOccupancyMaxActiveClusters(&clusters, config.kernel(), config.get());
  if (error != cudaSuccess) cudaGetLastError();
  return error == cudaSuccess ? clusters : 0;
}

using Encode = decltype(&cuTensorMapEncodeTiled);

Encode tensor_map_encoder() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
  check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result),
        "cuTensorMapEncodeTiled");
  if (result != cudaDriverEntryPointSuccess || function == nullptr)
    throw std::runtime_error("this CUDA driver has no cuTensorMapEncodeTiled: update it to one for CUDA 12");
  return reinterpret_cast<Encode>(function);
}

}  // namespace

Device device(int index) {
  static std::mutex mutex;
  static std::unordered_map<int, Device> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(index);
  if (found != known.end()) return found->second;
  Device d;
  d.index = index;
  d.arch =
      10 * attribute(cudaDevAttrComputeCapabilityMajor, index) + attribute(cudaDevAttrComputeCapabilityMinor, index);
  d.sm_count = attribute(cudaDevAttrMultiProcessorCount, index);
  d.l2_bytes = attribute(cudaDevAttrL2CacheSize, index);
  d.shared_bytes = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, index);
  return known[index] = d;
}

Stream stream_with_pool(void* handle, int device_index) {
  auto memory = std::make_shared<PoolMemory>();
  memory->device = device_index;
  memory->stream = static_cast<cudaStream_t>(handle);
  Stream stream;
  stream.handle = handle;
  stream.device = device(device_index);
  stream.allocate = [memory, device = stream.device](std::size_t bytes) {
    use(device);
    void* piece = nullptr;
    check(cudaMallocAsync(&piece, std::max<std::size_t>(bytes, 1), memory->stream), "cudaMallocAsync");
    memory->pieces.push_back(piece);
    return piece;
  };
  return stream;
}

void launch(const char* kernel, const Shape& shape, const void* params, std::size_t, const Stream& stream) {
  if (shape.grid_x == 0 || shape.grid_y == 0 || shape.grid_z == 0) return;
  const Config config(kernel, shape, stream);
  void* arguments[] = {const_cast<void*>(params)};
  check(cudaLaunchKernelExC(config.get(), config.kernel(), arguments), kernel);
}

unsigned resident_blocks(const char* kernel, const Shape& shape, const Stream& stream) {
  if (shape.cluster > 1)
    return static_cast<unsigned>(std::max(1, active_clusters(kernel, shape, stream))) * shape.cluster;
  const Config config(kernel, shape, stream);
  int blocks = 0;
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, config.kernel(), static_cast<int>(shape.block),
                                                      shape.shared),
        kernel);
  return static_cast<unsigned>(std::max(1, blocks) * std::max(1, stream.device.sm_count));
}

bool fits_cluster(const char* kernel, const Shape& shape, const Stream& stream) {
  return stream.device.arch >= 90 && shape.shared <= static_cast<std::size_t>(stream.device.shared_bytes) &&
         active_clusters(kernel, shape, stream) > 0;
}

void memset_zero(void* data, std::size_t bytes, const Stream& stream) {
  if (bytes == 0) return;
  use(stream.device);
  check(cudaMemsetAsync(data, 0, bytes, static_cast<cudaStream_t>(stream.handle)), "cudaMemsetAsync");
}

TensorMap tensor_map(const ConstMatrix& m, unsigned box_rows, unsigned box_cols, int swizzle, const Stream& stream) {
  if (!tensor_map_fits(m)) throw std::runtime_error("tensor_map: TMA cannot read this matrix");
  static const Encode encode = tensor_map_encoder();
  use(stream.device);
  const CUtensorMapDataType type = m.dtype == DType::f64    ? CU_TENSOR_MAP_DATA_TYPE_FLOAT64
                                   : m.dtype == DType::f32  ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32
                                   : m.dtype == DType::bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                                            : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const std::uint64_t size = m.dtype == DType::f64 ? 8 : m.dtype == DType::f32 ? 4 : 2;
  const cuuint64_t extents[] = {static_cast<cuuint64_t>(m.cols), static_cast<cuuint64_t>(m.rows)};
  const cuuint64_t pitches[] = {static_cast<cuuint64_t>(m.row_stride) * size};
  const cuuint32_t box[] = {box_cols, box_rows}, steps[] = {1, 1};
  const CUtensorMapSwizzle swizzled = swizzle == 128  ? CU_TENSOR_MAP_SWIZZLE_128B
                                      : swizzle == 64 ? CU_TENSOR_MAP_SWIZZLE_64B
                                      : swizzle == 32 ? CU_TENSOR_MAP_SWIZZLE_32B
                                                      : CU_TENSOR_MAP_SWIZZLE_NONE;
  TensorMap map;
  static_assert(sizeof map == sizeof(CUtensorMap));
  const CUresult result = encode(reinterpret_cast<CUtensorMap*>(map.bytes), type, 2, const_cast<void*>(m.data), extents,
                                 pitches, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzled,
                                 CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS)
    throw std::runtime_error("tensor_map: cuTensorMapEncodeTiled says " + std::to_string(static_cast<int>(result)));
  return map;
}

}  // namespace safelora::cuda
