// How the host side of an op (<op>.cpp, plain C++) reaches its kernels (<op>.cu).
//
//   <op>.cuh     struct FooParams { ... };              trivially copyable, at most kMaxParams bytes, tables included
//   <op>.cu      SAFELORA_KERNEL(foo, FooParams, 128) { ... params.x ... DYN_SHARED(float, tile); ... }
//   <op>.def     KERNEL(foo)                            and kernels.def includes it
//   <op>.cpp     Shape shape;  shape.grid_x = 7;  shape.block = 128;  shape.shared = 4096;
//                launch("foo", shape, params, stream);
//
// The functions below have one implementation for CUDA (driver.cpp) and others for the tests, which run the same host
// code over emulated devices. So host code must not include cuda_runtime.h or read device memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <type_traits>

#include "safelora/cuda.h"

namespace safelora::cuda {

constexpr std::size_t kMaxParams = 32764;  // what a kernel can take since CUDA 12.1

// Blocks are one-dimensional; the cluster lies along x and divides grid_x.
struct Shape {
  unsigned grid_x = 1, grid_y = 1, grid_z = 1;
  unsigned block = 1;
  std::size_t shared = 0;  // dynamic shared memory of a block in bytes
  unsigned cluster = 1;
};

// Nothing happens for an empty grid. Throws std::runtime_error if the kernel is unknown or CUDA refuses.
void launch(const char* kernel, const Shape& shape, const void* params, std::size_t bytes, const Stream& stream);

template <class Params>
void launch(const char* kernel, const Shape& shape, const Params& params, const Stream& stream) {
  static_assert(std::is_trivially_copyable_v<Params> && sizeof(Params) <= kMaxParams);
  launch(kernel, shape, &params, sizeof(Params), stream);
}

// How many blocks of this shape (its grid aside) the whole device runs at the same time, at least one cluster; the
// grid of a persistent kernel.
unsigned resident_blocks(const char* kernel, const Shape& shape, const Stream& stream);

// Whether the device can run one cluster of this shape, which needs sm_90.
bool fits_cluster(const char* kernel, const Shape& shape, const Stream& stream);

void memset_zero(void* data, std::size_t bytes, const Stream& stream);

template <class T>
T* allocate(std::size_t count, const Stream& stream) {
  return static_cast<T*>(stream.allocate(count * sizeof(T)));
}

// Opaque: a CUtensorMap under CUDA. Belongs into Params; kernels pass its address there to tma_load.
struct TensorMap {
  alignas(64) unsigned char bytes[128];
};

// For tma_load of boxes of box_rows × box_cols elements; entries outside the matrix read as zero. swizzle: 0, 32, 64 or
// 128 bytes, which box_cols elements may not exceed unless it is 0. Requires what tensor_map_fits checks.
TensorMap tensor_map(const ConstMatrix& matrix, unsigned box_rows, unsigned box_cols, int swizzle,
                     const Stream& stream);

// TMA wants a 16-byte aligned base, unit column stride, rows a multiple of 16 bytes apart, and 32-bit extents.
inline bool tensor_map_fits(const ConstMatrix& m) {
  const std::int64_t size = m.dtype == DType::f64 ? 8 : m.dtype == DType::f32 ? 4 : 2;
  const std::int64_t limit = std::int64_t{1} << 32, pitch = m.row_stride * size;
  return reinterpret_cast<std::uintptr_t>(m.data) % 16 == 0 && m.col_stride == 1 && pitch % 16 == 0 && pitch > 0 &&
         pitch < (std::int64_t{1} << 40) && m.rows > 0 && m.rows < limit && m.cols > 0 && m.cols < limit;
}

}  // namespace safelora::cuda
