#include "salora_linear.cuh"

#include <algorithm>
#include <initializer_list>
#include <string>

#include "plan.h"

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

std::int64_t reduce_shared(int ranks, bool fp64) {
  return sizes(ranks, fp64).shared * (fp64 ? sizeof(double) : sizeof(float)) + sizeof(unsigned);
}

// row_sums = row_scale·M W and col_sums = col_scale·MᵀH; one without entries is left out.
struct Reduction {
  ConstMatrix m, w, h;
  Matrix row_sums, col_sums;
  double row_scale = 1.0, col_scale = 1.0;
};

// How it is cut. All of this depends on the shape alone, so that the order of summation does.
struct ReducePlan {
  bool want_rows, want_cols;
  int ranks;
  std::int64_t rank, tokens, panels, ranges, groups, per_chunk, chunks;

  std::int64_t padded_rank() const { return panels * ranks; }
  std::int64_t row_entries() const { return want_rows ? ranges * groups * tokens * padded_rank() : 0; }
  std::int64_t col_entries() const { return want_cols ? chunks * ranges * kRangeCols * padded_rank() : 0; }
};

ReducePlan plan_of(const Reduction& r, bool fp64) {
  ReducePlan p = {};
  p.want_rows = r.row_sums.rows * r.row_sums.cols > 0;
  p.want_cols = r.col_sums.rows * r.col_sums.cols > 0;
  p.rank = p.want_rows ? r.w.cols : r.h.cols;
  p.ranks = fp64 || p.rank <= 16 ? 16 : p.rank <= 32 ? 32 : 64;
  p.tokens = sizes(p.ranks, fp64).tokens;
  p.panels = std::max<std::int64_t>(1, ceil_div(p.rank, p.ranks));
  p.ranges = std::max<std::int64_t>(1, ceil_div(r.m.cols, kRangeCols));
  p.groups = std::max<std::int64_t>(1, ceil_div(r.m.rows, p.tokens));
  p.per_chunk = ceil_div(p.groups, std::max<std::int64_t>(4, kMaxChunks / p.panels));
  p.chunks = ceil_div(p.groups, p.per_chunk);
  return p;
}

void reduce(const Reduction& r, bool fp64, const Stream& stream) {
  const ReducePlan plan = plan_of(r, fp64);
  if (!plan.want_rows && !plan.want_cols) return;
  const Factor w = factor(r.w);
  ReduceParams p = {};
  p.want_rows = plan.want_rows;
  p.want_cols = plan.want_cols;
  p.m = strided(r.m);
  p.w = w.view;
  p.h = strided(r.h);
  p.row_sums = strided(r.row_sums);
  p.col_sums = strided(r.col_sums);
  p.row_scale = r.row_scale;
  p.col_scale = r.col_scale;
  p.tokens = r.m.rows;
  p.cols = static_cast<std::int32_t>(r.m.cols);
  p.rank = static_cast<std::int32_t>(plan.rank);
  p.panels = static_cast<std::int32_t>(plan.panels);
  p.ranges = static_cast<std::int32_t>(plan.ranges);
  p.groups = static_cast<std::int32_t>(plan.groups);
  p.groups_per_chunk = static_cast<std::int32_t>(plan.per_chunk);
  p.chunks = static_cast<std::int32_t>(plan.chunks);
  if (p.want_rows) p.row_parts = scratch(plan.row_entries(), 1, fp64, stream).data;
  if (p.want_cols) p.col_parts = scratch(plan.col_entries(), 1, fp64, stream).data;
  const std::size_t counters = (plan.groups + plan.ranges) * plan.panels;
  p.counters = allocate<unsigned>(counters, stream);
  memset_zero(p.counters, counters * sizeof(unsigned), stream);
  Shape shape;
  shape.grid_x = static_cast<unsigned>(plan.chunks * plan.ranges * plan.panels);
  shape.block = kThreads;
  shape.shared = reduce_shared(plan.ranks, fp64);
  const std::string kernel = "reduce" + std::to_string(plan.ranks) + (fp64 ? "_f64" : "_f32") + w.suffix;
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

// Runs an op.
struct Launches {
  const Stream& stream;

  Matrix memory(std::int64_t rows, std::int64_t cols, bool fp64) { return scratch(rows, cols, fp64, stream); }
  void project_out(const ProjectOutItem& item) { cuda::project_out({item}, Side::left, stream); }
  void reduce(const Reduction& r, bool fp64) { cuda::reduce(r, fp64, stream); }
  void expand(const ConstMatrix& left, const ConstMatrix& right, const ConstMatrix& in, double scale, const Matrix& out,
              bool fp64) {
    cuda::expand(left, right, in, scale, out, fp64, stream);
  }
};

// Counts what the same op costs.
struct Counts {
  const Device& device;
  OpPlan plan = {};

  Matrix memory(std::int64_t rows, std::int64_t cols, bool fp64) {
    plan.workspace_bytes += rows * cols * (fp64 ? 8 : 4);
    return {nullptr, fp64 ? DType::f64 : DType::f32, rows, cols, cols, 1};
  }

  void project_out(const ProjectOutItem& item) {
    OpPlan cost = plan_project_out({item}, Side::left, device);
    cost.compulsory_bytes = 0;  // those of the whole op are counted for it
    plan += cost;
  }

  void reduce(const Reduction& r, bool fp64) {
    const ReducePlan p = plan_of(r, fp64);
    if (!p.want_rows && !p.want_cols) return;
    const std::int64_t size = fp64 ? 8 : 4, m = bytes_of(r.m), w = p.want_rows ? bytes_of(r.w) : 0;
    const std::int64_t h = p.want_cols ? bytes_of(r.h) : 0, results = bytes_of(r.row_sums) + bytes_of(r.col_sums);
    const std::int64_t kept = (p.row_entries() + p.col_entries()) * size;
    const std::int64_t padded = ceil_div(r.m.rows, kEdge) * kEdge * ceil_div(r.m.cols, kEdge) * kEdge;
    const auto products = [&](const ConstMatrix& factor) { return fp64 ? 1 : parts(r.m) + parts(factor) - 1; };
    OpPlan cost;
    cost.l2_window = kept;
    cost.dram_bytes = m + w + h + results + (kept <= l2_size(device) ? 0 : 2 * kept);
    // Each panel reads M. Sums over tokens are read and written once for every group.
    cost.l2_bytes = p.panels * m + p.groups * w + p.ranges * h + results + 2 * p.row_entries() * size +
                    (p.want_cols ? 2 * p.groups * p.ranges * kRangeCols * p.padded_rank() * size : 0);
    cost.flops = 2 * r.m.rows * r.m.cols * p.rank * (p.want_rows + p.want_cols);
    cost.mma_flops =
        2 * padded * p.padded_rank() * ((p.want_rows ? products(r.w) : 0) + (p.want_cols ? products(r.h) : 0));
    cost.workspace_bytes = kept;
    cost.shared_bytes = reduce_shared(p.ranks, fp64);
    plan += cost;
  }

  void expand(const ConstMatrix& left, const ConstMatrix& right, const ConstMatrix& in, double, const Matrix& out,
              bool fp64) {
    const std::int64_t down = ceil_div(out.rows, kExpandRows), across = ceil_div(out.cols, kExpandCols);
    const std::int64_t depth = ceil_div(left.cols, kExpandDepth) * kExpandDepth;
    OpPlan cost;
    cost.dram_bytes = bytes_of(left) + bytes_of(right) + bytes_of(in) + bytes_of(out);
    cost.l2_bytes = across * bytes_of(left) + down * bytes_of(right) + bytes_of(in) + bytes_of(out);
    cost.flops = 2 * out.rows * out.cols * left.cols;
    cost.mma_flops =
        2 * down * kExpandRows * across * kExpandCols * depth * (fp64 ? 1 : parts(left) + parts(right) - 1);
    cost.shared_bytes = kExpandShared * (fp64 ? 8 : 4);
    plan += cost;
  }
};

template <class Run>
void forward(const SaloraForward& f, Run& run) {
  const bool fp64 = any_wide({&f.x, &f.base_output, &f.lora_A, &f.lora_B, &f.basis});
  run.project_out({f.lora_B, f.basis, f.projected_B});
  Reduction h;
  h.m = f.x;
  h.w = transposed(f.lora_A);
  h.row_sums = f.h;
  run.reduce(h, fp64);
  run.expand(f.h, transposed(f.projected_B), f.base_output, f.scaling, f.y, fp64);
}

template <class Run>
void backward(const SaloraBackward& b, Run& run) {
  const bool fp64 = any_wide({&b.grad_y, &b.x, &b.h, &b.lora_A, &b.lora_B, &b.projected_B, &b.basis});
  const std::int64_t tokens = b.x.rows, d_out = b.grad_y.cols, rank = b.lora_A.rows, k = b.basis.cols;
  const bool want_t = b.grad_x.data != nullptr || b.grad_A.data != nullptr;
  const bool want_basis = b.grad_basis.data != nullptr && k > 0, want_G = b.grad_B.data != nullptr || want_basis;

  Reduction outputs;
  outputs.m = b.grad_y;
  outputs.w = b.projected_B;
  outputs.h = b.h;
  outputs.row_scale = outputs.col_scale = b.scaling;
  if (want_t) outputs.row_sums = run.memory(tokens, rank, fp64);
  if (want_G) outputs.col_sums = run.memory(d_out, rank, fp64);
  run.reduce(outputs, fp64);
  const Matrix &t = outputs.row_sums, &G = outputs.col_sums;

  if (b.grad_A.data != nullptr) {
    Reduction inputs;
    inputs.m = b.x;
    inputs.h = t;
    inputs.col_sums = transposed(b.grad_A);
    run.reduce(inputs, fp64);
  }
  if (b.grad_x.data != nullptr) run.expand(t, b.lora_A, {}, 1.0, b.grad_x, fp64);
  if (b.grad_B.data != nullptr) run.project_out({G, b.basis, b.grad_B});
  if (!want_basis) return;
  // −G(UᵀB)ᵀ, and −B(UᵀG)ᵀ added to it
  Matrix sum = run.memory(d_out, k, fp64);
  const auto add = [&](const ConstMatrix& left, const ConstMatrix& right, const ConstMatrix& in, const Matrix& out) {
    Reduction coefficients;
    coefficients.m = b.basis;
    coefficients.h = right;
    coefficients.col_sums = run.memory(k, rank, fp64);
    run.reduce(coefficients, fp64);
    run.expand(left, transposed(coefficients.col_sums), in, -1.0, out, fp64);
  };
  add(G, b.lora_B, {}, sum);
  add(b.lora_B, G, sum, b.grad_basis);
}

}  // namespace

void salora_forward(const SaloraForward& args, const Stream& stream) {
  Launches run = {stream};
  forward(args, run);
}

void salora_backward(const SaloraBackward& args, const Stream& stream) {
  Launches run = {stream};
  backward(args, run);
}

OpPlan plan_salora_forward(const SaloraForward& f, const Device& device) {
  Counts run = {device};
  forward(f, run);
  for (const ConstMatrix& m : {f.x, f.base_output, f.lora_A, f.lora_B, f.basis, ConstMatrix(f.y), ConstMatrix(f.h),
                               ConstMatrix(f.projected_B)})
    run.plan.compulsory_bytes += bytes_of(m);
  return run.plan;
}

OpPlan plan_salora_backward(const SaloraBackward& b, const Device& device) {
  Counts run = {device};
  backward(b, run);
  for (const ConstMatrix& m : {b.grad_y, b.x, b.h, b.lora_A, b.lora_B, b.projected_B, b.basis})
    run.plan.compulsory_bytes += bytes_of(m);
  for (const Matrix& m : {b.grad_x, b.grad_A, b.grad_B, b.grad_basis})
    if (m.data != nullptr) run.plan.compulsory_bytes += bytes_of(m);
  return run.plan;
}

extern "C" void safelora_plan_salora(std::int64_t tokens, std::int64_t d_in, std::int64_t d_out, std::int64_t rank,
                                     std::int64_t k, DType activation, DType factor, int arch, int sm_count,
                                     std::int64_t l2_bytes, OpPlan* forward, OpPlan* backward) {
  Device device;
  device.arch = arch;
  device.sm_count = sm_count;
  device.l2_bytes = l2_bytes;
  static char somewhere;  // which the plan does not read, but which says that a gradient is wanted
  const auto matrix = [](DType dtype, std::int64_t rows, std::int64_t cols) {
    return Matrix{&somewhere, dtype, rows, cols, cols, 1};
  };
  const Matrix x = matrix(activation, tokens, d_in), y = matrix(activation, tokens, d_out);
  const Matrix h = matrix(DType::f32, tokens, rank), A = matrix(factor, rank, d_in), B = matrix(factor, d_out, rank);
  const Matrix projected_B = matrix(DType::f32, d_out, rank), basis = matrix(DType::f32, d_out, k);
  *forward = plan_salora_forward({x, y, A, B, basis, 1.0, y, h, projected_B}, device);
  *backward = plan_salora_backward({y, x, h, A, B, projected_B, basis, 1.0, x, A, B, {}}, device);
}

}  // namespace safelora::cuda
