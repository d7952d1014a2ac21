// Driver: kernels compiled by nvcc to PTX, run by a PTX interpreter that Python holds.
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>

#include "simt/emulated.h"

namespace {

// Returns nullptr, or what went wrong.
using Launcher = const char* (*)(const emulated::Launch*);
Launcher launcher = nullptr;
simt::Settings device_settings;

// The interpreter's own encoding of a tensor map.
struct __attribute__((packed)) PtxMap {
  std::uint64_t address;
  std::uint8_t rank, type, interleave, swizzle, fill, magic;
  std::uint16_t padding;
  std::uint32_t extent[5];
  std::uint16_t box[5];
  std::uint8_t element_stride[5], padding2;
  std::uint64_t stride[4];
};

}  // namespace

namespace simt {
Settings& settings() { return device_settings; }
}  // namespace simt

extern "C" {
__attribute__((visibility("default"))) void emulated_set_launcher(Launcher l) { launcher = l; }
__attribute__((visibility("default"))) void emulated_for_each_piece(void (*visit)(const void*, std::size_t, void*),
                                                                    void* context) {
  emulated::for_each_piece(visit, context);
}
}

namespace safelora::cuda {

void launch(const char* kernel, const Shape& shape, const void* params, std::size_t bytes, const Stream&) {
  if (shape.grid_x == 0 || shape.grid_y == 0 || shape.grid_z == 0) return;
  if (!launcher) throw std::runtime_error("no launcher is set");
  const emulated::Launch l = {
      kernel, {shape.grid_x, shape.grid_y, shape.grid_z}, shape.block, shape.cluster, shape.shared, params, bytes};
  if (const char* error = launcher(&l)) throw std::runtime_error(error);
}

TensorMap tensor_map(const ConstMatrix& m, unsigned box_rows, unsigned box_cols, int swizzle, const Stream&) {
  if (!tensor_map_fits(m)) throw std::runtime_error("tensor_map: TMA cannot read this matrix");
  const std::uint8_t type = m.dtype == DType::f64 ? 9 : m.dtype == DType::f32 ? 7 : m.dtype == DType::bf16 ? 10 : 6;
  const std::uint64_t size = m.dtype == DType::f64 ? 8 : m.dtype == DType::f32 ? 4 : 2;
  PtxMap map = {};
  map.address = reinterpret_cast<std::uintptr_t>(m.data);
  map.rank = 2;
  map.type = type;
  map.swizzle = static_cast<std::uint8_t>(swizzle == 128 ? 3 : swizzle == 64 ? 2 : swizzle == 32 ? 1 : 0);
  map.magic = 0x5a;
  map.extent[0] = static_cast<std::uint32_t>(m.cols);
  map.extent[1] = static_cast<std::uint32_t>(m.rows);
  map.box[0] = static_cast<std::uint16_t>(box_cols);
  map.box[1] = static_cast<std::uint16_t>(box_rows);
  for (std::uint8_t& stride : map.element_stride) stride = 1;
  map.stride[0] = static_cast<std::uint64_t>(m.row_stride) * size;
  TensorMap out = {};
  static_assert(sizeof map <= sizeof out);
  std::memcpy(&out, &map, sizeof map);
  return out;
}

}  // namespace safelora::cuda
