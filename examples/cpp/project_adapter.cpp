// Safe LoRA's projection of one small layer, in C++ alone: B' = V(VᵀB)/‖V‖ with V = aligned − base.
#include <safelora/kernels.h>

#include <cstdint>
#include <cstdio>
#include <vector>

namespace {

using Values = std::vector<float>;

// A row-major matrix whose entry (i, j) is value(i, j).
template <class Function>
Values fill(int rows, int cols, Function value) {
  Values values;
  for (int i = 0; i < rows; ++i)
    for (int j = 0; j < cols; ++j) values.push_back(value(i, j));
  return values;
}

safelora::Matrix view(Values& values, std::int64_t rows, std::int64_t cols) {
  return {values.data(), safelora::DType::f32, rows, cols, cols, 1};
}

}  // namespace

int main() {
  constexpr int d_out = 6, d_in = 5, rank = 2;
  Values base = fill(d_out, d_in, [](int i, int j) { return (3 * i + 5 * j) % 7 / 8.0f; });
  Values aligned = fill(d_out, d_in, [&](int i, int j) { return base[i * d_in + j] + (i + 2 * j) % 5 / 16.0f; });
  Values lora_B = fill(d_out, rank, [](int i, int k) { return (i - 2 * k) / 4.0f; });
  Values lora_A = fill(rank, d_in, [](int k, int j) { return (k + j + 1) / 8.0f; });
  Values projected(d_out * rank);
  double v_norm = 0, cosine = 0;

  safelora::ProjectLayer layer;
  layer.aligned = view(aligned, d_out, d_in);
  layer.base = view(base, d_out, d_in);
  layer.v_norm = &v_norm;
  layer.factors = {{view(lora_B, d_out, rank), view(lora_A, rank, d_in), view(projected, d_out, rank), &cosine}};
  safelora::project_layers({layer}, safelora::Normalize::frobenius, safelora::std_threads());

  std::printf("isa %s\nv_norm %.17g\ncosine %.17g\nB'\n", safelora::isa_name(safelora::active_isa()), v_norm, cosine);
  for (int i = 0; i < d_out; ++i)
    for (int k = 0; k < rank; ++k) std::printf("%.9g%c", projected[i * rank + k], k + 1 < rank ? ' ' : '\n');
}
