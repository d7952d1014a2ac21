#include "project_out.cuh"

#include <algorithm>
#include <map>
#include <string>
#include <utility>

#include "plan.h"

namespace safelora::cuda {
namespace {

constexpr std::int64_t kMaxChunks = 64;

struct Plan {
  std::int64_t width, units, chunk_rows, chunks, padded_k;
  std::int64_t tasks() const { return units * chunks; }
  std::int64_t workspace() const { return (units + tasks()) * padded_k * width; }  // entries
};

// Depends on the shape alone, so that the order of summation does.
Plan plan_of(const ProjectOutItem& item) {
  const std::int64_t d = item.x.rows, m = item.x.cols, k = item.basis.cols;
  Plan plan;
  plan.width = m > 2 * kNarrow ? kWide : kNarrow;
  plan.units = ceil_div(m, plan.width);
  plan.chunk_rows = std::max<std::int64_t>(2 * kChunkRows, ceil_div(ceil_div(d, kMaxChunks), kChunkRows) * kChunkRows);
  plan.chunks = ceil_div(d, plan.chunk_rows);
  plan.padded_k = ceil_div(k, kBasisPanel) * kBasisPanel;
  return plan;
}

// The right side is the left side of the transpose.
ProjectOutItem left_of(const ProjectOutItem& item, Side side) {
  if (side == Side::left) return item;
  return {transposed(item.x), item.basis, transposed(item.out)};
}

// What one kernel is for.
struct Kind {
  bool fp64, wide, transposed;
  std::string kernel() const {
    return std::string("project_out") + (wide ? "_wide" : "_narrow") + (fp64 ? "_f64" : "_f32") +
           (transposed ? "_t" : "");
  }
};

Kind kind_of(const ProjectOutItem& item) {
  return {wide(item.x) || wide(item.basis) || wide(item.out), plan_of(item).width == kWide,
          strided(item.x).lines == Lines::cols};
}

void launch_items(const std::vector<ProjectOutItem>& items, std::size_t begin, std::size_t end, const Kind& kind,
                  const Stream& stream) {
  ProjectOutParams params = {};
  std::int64_t tasks = 0, units = 0, entries = 0, chunks = 0;
  for (std::size_t i = begin; i < end; ++i) {
    const ProjectOutItem& item = items[i];
    const Plan plan = plan_of(item);
    ProjectOutEntry& entry = params.items[params.num_items++];
    entry.x = strided(item.x);
    entry.basis = strided(item.basis);
    entry.out = strided(item.out);
    entry.partials = entries;
    entry.d = static_cast<std::int32_t>(item.x.rows);
    entry.m = static_cast<std::int32_t>(item.x.cols);
    entry.k = static_cast<std::int32_t>(item.basis.cols);
    entry.first_block = static_cast<std::int32_t>(tasks);
    entry.first_unit = static_cast<std::int32_t>(units);
    entry.chunk_rows = static_cast<std::int32_t>(plan.chunk_rows);
    tasks += plan.tasks();
    units += plan.units;
    entries += plan.workspace();
    chunks = std::max(chunks, plan.chunks);
  }
  const std::size_t entry_size = kind.fp64 ? sizeof(double) : sizeof(float), counters = 1 + 2 * units;
  const std::string kernel = kind.kernel();
  Shape shape;
  shape.block = kThreads;
  shape.shared = kProjectOutShared * entry_size + 2 * sizeof(unsigned);
  shape.grid_x = static_cast<unsigned>(2 * tasks);
  params.workspace = stream.allocate(std::max<std::int64_t>(1, entries) * entry_size);
  params.counters = allocate<unsigned>(counters, stream);
  params.num_tasks = static_cast<std::int32_t>(tasks);
  // A unit's first tasks are out before any of its second ones, and done if blocks keep step.
  params.lag =
      static_cast<std::int32_t>(std::min<std::int64_t>(tasks, chunks + resident_blocks(kernel.c_str(), shape, stream)));
  memset_zero(params.counters, counters * sizeof(unsigned), stream);
  launch(kernel.c_str(), shape, params, stream);
}

}  // namespace

void project_out(const std::vector<ProjectOutItem>& all, Side side, const Stream& stream) {
  std::map<std::string, std::pair<Kind, std::vector<ProjectOutItem>>> groups;
  for (const ProjectOutItem& given : all) {
    const bool empty = given.x.rows == 0 || given.x.cols == 0;
    const bool unchanged = given.basis.cols == 0 && given.out.data == given.x.data;
    if (empty || unchanged) continue;
    const ProjectOutItem item = left_of(given, side);
    const Kind kind = kind_of(item);
    auto& group = groups[kind.kernel()];
    group.first = kind;
    group.second.push_back(item);
  }
  for (const auto& [name, group] : groups) {
    const std::vector<ProjectOutItem>& items = group.second;
    for (std::size_t i = 0; i < items.size(); i += kProjectOutItems)
      launch_items(items, i, std::min(items.size(), i + kProjectOutItems), group.first, stream);
  }
}

OpPlan plan_project_out(const std::vector<ProjectOutItem>& items, Side side, const Device& device) {
  OpPlan plan;
  for (const ProjectOutItem& given : items) {
    const ProjectOutItem item = left_of(given, side);
    const std::int64_t d = item.x.rows, m = item.x.cols, k = item.basis.cols;
    if (d == 0 || m == 0) continue;
    const Plan p = plan_of(item);
    const bool fp64 = kind_of(item).fp64;
    const std::int64_t x = bytes_of(item.x), basis = bytes_of(item.basis), out = bytes_of(item.out);
    const std::int64_t size = fp64 ? sizeof(double) : sizeof(float), block = p.padded_k * p.width * size;
    plan.compulsory_bytes += x + basis + out;
    // First tasks run ahead of second ones by as many chunks of X and U as there are blocks, and those of a unit.
    const std::int64_t ahead = std::min(p.tasks(), p.chunks + 2 * device.sm_count);
    const std::int64_t window = ahead * (x + p.units * basis + 2 * p.tasks() * block) / p.tasks();
    plan.l2_window = std::max(plan.l2_window, window);
    plan.dram_bytes += x + basis + out + (window <= l2_size(device) ? 0 : x + basis);
    // Both readings; parts written and added up; the sums written, and read by every chunk.
    plan.l2_bytes += 2 * (x + p.units * basis) + out + 2 * p.tasks() * block + (p.units + p.tasks()) * block;
    plan.flops += 4 * d * m * k;
    const std::int64_t product = 2 * ceil_div(d, kChunkRows) * kChunkRows * p.padded_k * p.units * p.width;
    const int basis_parts = parts(item.basis), x_parts = parts(item.x);
    plan.mma_flops += product * (fp64 ? 2 : basis_parts + x_parts - 1 + basis_parts + 1);
    plan.workspace_bytes += p.workspace() * size;
    plan.shared_bytes = std::max<std::int64_t>(plan.shared_bytes, kProjectOutShared * size + 2 * sizeof(unsigned));
  }
  return plan;
}

extern "C" void safelora_plan_project_out(std::int64_t d, std::int64_t m, std::int64_t k, DType x, DType basis,
                                          int arch, int sm_count, std::int64_t l2_bytes, OpPlan* plan) {
  Device device;
  device.arch = arch;
  device.sm_count = sm_count;
  device.l2_bytes = l2_bytes;
  const Matrix matrix = {nullptr, x, d, m, m, 1};
  *plan = plan_project_out({{matrix, {nullptr, basis, d, k, k, 1}, matrix}}, Side::left, device);
}

}  // namespace safelora::cuda
