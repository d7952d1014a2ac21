// Driver: kernels compiled for the host, run by the machine.
#include <cstring>
#include <stdexcept>

#include "simt/emulated.h"

namespace safelora::cuda {

void launch(const char* kernel, const Shape& shape, const void* params, std::size_t bytes, const Stream&) {
  const uint3 grid = {shape.grid_x, shape.grid_y, shape.grid_z};
  simt::launch(kernel, grid, shape.block, shape.shared, shape.cluster, params, bytes);
}

TensorMap tensor_map(const ConstMatrix& m, unsigned box_rows, unsigned box_cols, int swizzle, const Stream&) {
  const std::int32_t size = m.dtype == DType::f64 ? 8 : m.dtype == DType::f32 ? 4 : 2;
  const unsigned width = box_cols * static_cast<unsigned>(size);
  if (!tensor_map_fits(m)) throw std::runtime_error("tensor_map: TMA cannot read this matrix");
  if (box_rows == 0 || box_rows > 256 || box_cols == 0 || box_cols > 256 || width % 16 ||
      (swizzle && width > static_cast<unsigned>(swizzle)))
    throw std::runtime_error("tensor_map: no such box");
  const simt::Box box = {simt::kBoxMagic,
                         static_cast<const unsigned char*>(m.data),
                         m.rows,
                         m.cols,
                         m.row_stride * size,
                         size,
                         static_cast<std::int32_t>(box_rows),
                         static_cast<std::int32_t>(box_cols),
                         swizzle};
  TensorMap map = {};
  static_assert(sizeof box <= sizeof map);
  std::memcpy(&map, &box, sizeof box);
  return map;
}

}  // namespace safelora::cuda
