#include "salora_linear.cuh"

#include <algorithm>
#include <initializer_list>
#include <string>

namespace safelora::cuda {
namespace {

constexpr std::int64_t kMaxChunks = 32;

bool any_wide(std::initializer_list<const ConstMatrix*> inputs) {
  return std::any_of(inputs.begin(), inputs.end(), [](const ConstMatrix* m) { return wide(*m); });
}

Matrix scratch(std::int64_t rows, std::int64_t cols, bool fp64, const Stream& stream) {
  const std::size_t size = fp64 ? sizeof(double) : sizeof(float);
  void* data = stream.allocate(std::max<std::int64_t>(1, rows * cols) * size);
  return {data, fp64 ? DType::f64 : DType::f32, rows, cols, cols, 1};
}

// A factor in the orientation in which its lines can be read 16 bytes at a time, and the kernel's suffix for that.
struct Factor {
  Strided view;
  const char* suffix;
};

Factor factor(const ConstMatrix& m) {
  const Strided view = strided(m);
  return view.lines == Lines::cols ? Factor{strided(transposed(m)), "_t"} : Factor{view, ""};
}

struct Sizes {
  std::int64_t tokens, shared;  // of a group; entries
};

Sizes sizes(int ranks, bool fp64) {
  if (fp64) return {ReduceShape<16, true>::kTokens, ReduceShape<16, true>::kShared};
  if (ranks == 16) return {ReduceShape<16, false>::kTokens, ReduceShape<16, false>::kShared};
  if (ranks == 32) return {ReduceShape<32, false>::kTokens, ReduceShape<32, false>::kShared};
  return {ReduceShape<64, false>::kTokens, ReduceShape<64, false>::kShared};
}

// row_sums = row_scale·M W and col_sums = col_scale·MᵀH; data == nullptr skips one.
struct Reduction {
  ConstMatrix m, w, h;
  Matrix row_sums, col_sums;
  double row_scale = 1.0, col_scale = 1.0;
};

void reduce(const Reduction& r, bool fp64, const Stream& stream) {
  ReduceParams p = {};
  p.want_rows = r.row_sums.data != nullptr && r.m.rows > 0;
  p.want_cols = r.col_sums.data != nullptr && r.m.cols > 0;
  if (!p.want_rows && !p.want_cols) return;
  const std::int64_t rank = p.want_rows ? r.w.cols : r.h.cols;
  const int ranks = fp64 || rank <= 16 ? 16 : rank <= 32 ? 32 : 64;
  const Factor w = factor(r.w);
  p.m = strided(r.m);
  p.w = w.view;
  p.h = strided(r.h);
  p.row_sums = strided(r.row_sums);
  p.col_sums = strided(r.col_sums);
  p.row_scale = r.row_scale;
  p.col_scale = r.col_scale;
  p.tokens = r.m.rows;
  p.cols = static_cast<std::int32_t>(r.m.cols);
  p.rank = static_cast<std::int32_t>(rank);
  // All of this depends on the shape alone, so that the order of summation does.
  const std::int64_t tokens = sizes(ranks, fp64).tokens;
  const std::int64_t panels = std::max<std::int64_t>(1, ceil_div(rank, ranks));
  const std::int64_t ranges = std::max<std::int64_t>(1, ceil_div(r.m.cols, kRangeCols));
  const std::int64_t groups = std::max<std::int64_t>(1, ceil_div(r.m.rows, tokens));
  const std::int64_t per_chunk = ceil_div(groups, std::max<std::int64_t>(4, kMaxChunks / panels));
  const std::int64_t chunks = ceil_div(groups, per_chunk);
  p.panels = static_cast<std::int32_t>(panels);
  p.ranges = static_cast<std::int32_t>(ranges);
  p.groups = static_cast<std::int32_t>(groups);
  p.groups_per_chunk = static_cast<std::int32_t>(per_chunk);
  p.chunks = static_cast<std::int32_t>(chunks);
  const std::int64_t padded_rank = panels * ranks;
  if (p.want_rows) p.row_parts = scratch(ranges * groups * tokens, padded_rank, fp64, stream).data;
  if (p.want_cols) p.col_parts = scratch(chunks * ranges * kRangeCols, padded_rank, fp64, stream).data;
  const std::size_t counters = (groups + ranges) * panels;
  p.counters = allocate<unsigned>(counters, stream);
  memset_zero(p.counters, counters * sizeof(unsigned), stream);
  Shape shape;
  shape.grid_x = static_cast<unsigned>(chunks * ranges * panels);
  shape.block = kThreads;
  shape.shared = sizes(ranks, fp64).shared * (fp64 ? sizeof(double) : sizeof(float)) + sizeof(unsigned);
  const std::string kernel = "reduce" + std::to_string(ranks) + (fp64 ? "_f64" : "_f32") + w.suffix;
  launch(kernel.c_str(), shape, p, stream);
}

// out = in + scale·left·right
void expand(const ConstMatrix& left, const ConstMatrix& right, const ConstMatrix& in, double scale, const Matrix& out,
            bool fp64, const Stream& stream) {
  if (out.rows == 0 || out.cols == 0) return;
  const Factor factor_right = factor(right);
  ExpandParams p = {};
  p.left = strided(left);
  p.right = factor_right.view;
  p.in = strided(in);
  p.out = strided(out);
  p.scale = scale;
  p.tokens = out.rows;
  p.cols = static_cast<std::int32_t>(out.cols);
  p.rank = static_cast<std::int32_t>(left.cols);
  Shape shape;
  shape.grid_x = static_cast<unsigned>(ceil_div(out.rows, kExpandRows) * ceil_div(out.cols, kExpandCols));
  shape.block = kThreads;
  shape.shared = kExpandShared * (fp64 ? sizeof(double) : sizeof(float));
  const std::string kernel = std::string(fp64 ? "expand_f64" : "expand_f32") + factor_right.suffix;
  launch(kernel.c_str(), shape, p, stream);
}

}  // namespace

void salora_forward(const SaloraForward& f, const Stream& stream) {
  const bool fp64 = any_wide({&f.x, &f.base_output, &f.lora_A, &f.lora_B, &f.basis});
  project_out({{f.lora_B, f.basis, f.projected_B}}, Side::left, stream);
  Reduction h;
  h.m = f.x;
  h.w = transposed(f.lora_A);
  h.row_sums = f.h;
  reduce(h, fp64, stream);
  expand(f.h, transposed(f.projected_B), f.base_output, f.scaling, f.y, fp64, stream);
}

void salora_backward(const SaloraBackward& b, const Stream& stream) {
  const bool fp64 = any_wide({&b.grad_y, &b.x, &b.h, &b.lora_A, &b.lora_B, &b.projected_B, &b.basis});
  const std::int64_t tokens = b.x.rows, d_out = b.grad_y.cols, rank = b.lora_A.rows, k = b.basis.cols;
  const bool want_t = b.grad_x.data != nullptr || b.grad_A.data != nullptr;
  const bool want_basis = b.grad_basis.data != nullptr && k > 0, want_G = b.grad_B.data != nullptr || want_basis;

  Reduction outputs;
  outputs.m = b.grad_y;
  outputs.w = b.projected_B;
  outputs.h = b.h;
  outputs.row_scale = outputs.col_scale = b.scaling;
  if (want_t) outputs.row_sums = scratch(tokens, rank, fp64, stream);
  if (want_G) outputs.col_sums = scratch(d_out, rank, fp64, stream);
  reduce(outputs, fp64, stream);
  const Matrix &t = outputs.row_sums, &G = outputs.col_sums;

  if (b.grad_A.data != nullptr) {
    Reduction inputs;
    inputs.m = b.x;
    inputs.h = t;
    inputs.col_sums = transposed(b.grad_A);
    reduce(inputs, fp64, stream);
  }
  if (b.grad_x.data != nullptr) expand(t, b.lora_A, {}, 1.0, b.grad_x, fp64, stream);
  if (b.grad_B.data != nullptr) project_out({{G, b.basis, b.grad_B}}, Side::left, stream);
  if (!want_basis) return;
  // −G(UᵀB)ᵀ, and −B(UᵀG)ᵀ added to it
  Matrix sum = scratch(d_out, k, fp64, stream);
  const auto add = [&](const ConstMatrix& left, const ConstMatrix& right, const ConstMatrix& in, const Matrix& out) {
    Reduction coefficients;
    coefficients.m = b.basis;
    coefficients.h = right;
    coefficients.col_sums = scratch(k, rank, fp64, stream);
    reduce(coefficients, fp64, stream);
    expand(left, transposed(coefficients.col_sums), in, -1.0, out, fp64, stream);
  };
  add(G, b.lora_B, {}, sum);
  add(b.lora_B, G, sum, b.grad_basis);
}

}  // namespace safelora::cuda
