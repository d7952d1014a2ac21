#include "project_cluster.cuh"

#include <algorithm>
#include <array>
#include <string>

namespace safelora::cuda {
namespace {

constexpr std::array<const char*, 4> kNames = {"f32", "bf16", "f16", "mixed"};

std::size_t kernel_index(const ProjectLayer& layer) {
  return layer.aligned.dtype == layer.base.dtype ? static_cast<std::size_t>(layer.aligned.dtype) : 3;
}

// Columns of B that one unit of work takes.
int unit_panel(int panel) { return std::min(panel, 32); }

int ring_offset(int strip_cols, int panel) {
  if (strip_cols == 32) return panel == 16 ? ClusterLayout<32, 16>::ring : ClusterLayout<32, 32>::ring;
  return panel == 16 ? ClusterLayout<16, 16>::ring : ClusterLayout<16, 32>::ring;
}

bool taken(const ConstMatrix& m) { return m.dtype != DType::f64 && tensor_map_fits(m) && m.row_stride >= m.cols; }

// The launches of one call: units of one kernel and one size of cluster.
struct Group {
  std::size_t kernel;
  int panel;  // 16 or 32
  ClusterPlan plan;
  std::vector<PanelPlan> panels;
};

void launch_group(const Group& group, std::size_t begin, std::size_t end, const Stream& stream) {
  ClusterParams params = {};
  std::vector<FoldItem> folds;
  const auto count_units = [&](bool split) {
    std::int64_t units = 0;
    for (std::size_t i = begin; i < end; ++i) {
      const ClusterPlan plan = cluster_plan(*group.panels[i].layer, group.panels[i].panel);
      units += static_cast<std::int64_t>(split ? plan.segments : plan.units) * (group.panels[i].panel / group.panel);
    }
    return units;
  };
  // Too few for every multiprocessor to have one.
  const bool split = count_units(false) * group.plan.blocks < stream.device.sm_count;
  std::int32_t units = 0;
  for (std::size_t i = begin; i < end; ++i) {
    const PanelPlan& panel = group.panels[i];
    const ProjectLayer& layer = *panel.layer;
    const ClusterPlan plan = cluster_plan(layer, panel.panel);
    const auto box_cols = static_cast<unsigned>(plan.strip_cols);
    const auto map = [&](const ConstMatrix& m) {
      return tensor_map(m, kClusterBoxRows, box_cols, static_cast<int>(plan.strip_cols * size_of(m.dtype)), stream);
    };
    ClusterItem& item = params.items[params.num_items++];
    item.aligned = map(layer.aligned);
    item.base = map(layer.base);
    item.factor = panel.factor;
    item.sums = panel.accumulators;
    item.squares = panel.squares;
    item.slot_size = sums_size(layer.aligned.rows, panel.panel);
    item.rows = static_cast<std::int32_t>(layer.aligned.rows);
    item.first_unit = units;
    item.strips = plan.strips;
    item.segment_strips = plan.segment_strips;
    item.unit_strips = split ? plan.segment_strips : kClusterSegments * plan.segment_strips;
    item.panel = static_cast<std::uint8_t>(panel.panel);
    item.halves = static_cast<std::uint8_t>(panel.panel / group.panel);
    item.boxes = static_cast<std::uint8_t>(plan.boxes);
    item.slots = static_cast<std::uint8_t>(plan.slots);
    item.aligned_dtype = layer.aligned.dtype;
    item.base_dtype = layer.base.dtype;
    if (split && plan.segments > 1) {
      item.sums = allocate<float>(static_cast<std::size_t>(plan.segments * item.slot_size), stream);
      folds.push_back({item.sums, panel.accumulators, item.slot_size, plan.segments});
    }
    units += (split ? plan.segments : plan.units) * item.halves;
  }
  const std::string name = std::string("project_cluster_") + kNames[group.kernel] + (group.panel == 16 ? "_16" : "_32");
  Shape shape;
  shape.grid_x = static_cast<unsigned>(units) * static_cast<unsigned>(group.plan.blocks);
  shape.block = group.panel == 16 ? ClusterLayout<32, 16>::threads : ClusterLayout<32, 32>::threads;
  shape.shared = kClusterShared;
  shape.cluster = static_cast<unsigned>(group.plan.blocks);
  launch(name.c_str(), shape, params, stream);

  for (std::size_t first = 0; first < folds.size(); first += kFoldItems) {
    FoldParams fold = {};
    const std::size_t count = std::min<std::size_t>(kFoldItems, folds.size() - first);
    std::copy_n(folds.begin() + static_cast<std::ptrdiff_t>(first), count, fold.items);
    std::int64_t most = 0;
    for (std::size_t i = 0; i < count; ++i)
      most = std::max(most, ceil_div(fold.items[i].segments, kClusterSegments) * fold.items[i].size / 4);
    Shape fold_shape;
    fold_shape.grid_x = static_cast<unsigned>(ceil_div(most, kFoldThreads));
    fold_shape.grid_y = static_cast<unsigned>(count);
    fold_shape.block = kFoldThreads;
    launch("project_cluster_fold", fold_shape, fold, stream);
  }
}

}  // namespace

ClusterPlan cluster_plan(const ProjectLayer& layer, int panel) {
  const std::int64_t rows = layer.aligned.rows, cols = layer.aligned.cols;
  ClusterPlan plan = {};
  if (std::min(rows, cols) < kSmallLayer || !taken(layer.aligned) || !taken(layer.base)) return plan;
  const bool sixteen_bits = layer.aligned.dtype == layer.base.dtype && layer.aligned.dtype != DType::f32;
  plan.strip_cols = sixteen_bits ? 32 : 16;
  const std::int64_t bytes = size_of(layer.aligned.dtype) + size_of(layer.base.dtype);
  plan.box_bytes = bytes * plan.strip_cols * kClusterBoxRows;
  const std::int64_t boxes = ceil_div(rows, kClusterBoxRows);
  int blocks = 2;
  while (blocks < kClusterBlocks && ceil_div(boxes, blocks) > kClusterBoxes) blocks *= 2;
  if (ceil_div(boxes, blocks) > kClusterBoxes) return plan;
  plan.blocks = blocks;
  plan.boxes = static_cast<int>(ceil_div(boxes, blocks));
  plan.slots = static_cast<int>(std::min<std::int64_t>(
      kClusterSlots, (kClusterShared - ring_offset(plan.strip_cols, unit_panel(panel))) / plan.box_bytes));

  // A unit has so many columns that its sums, written and read once, are 1/32 of the bytes of its weights.
  plan.strips = static_cast<int>(ceil_div(cols, plan.strip_cols));
  const std::int64_t unit_cols = 256 * panel / bytes;
  const std::int64_t units = std::max<std::int64_t>(1, (cols + unit_cols / 2) / unit_cols);
  plan.segment_strips = static_cast<int>(ceil_div(plan.strips, units * kClusterSegments));
  plan.segments = static_cast<int>(ceil_div(plan.strips, plan.segment_strips));
  plan.units = static_cast<int>(ceil_div(plan.segments, kClusterSegments));
  return plan;
}

std::int64_t cluster_traffic(const ProjectLayer& layer, int panel) {
  const ClusterPlan plan = cluster_plan(layer, panel);
  const std::int64_t rows = layer.aligned.rows, cols = layer.aligned.cols;
  const std::int64_t weights = rows * cols * (size_of(layer.aligned.dtype) + size_of(layer.base.dtype));
  const std::int64_t sums = 2 * 4 * plan.units * sums_size(rows, panel);
  const std::int64_t squares = 2 * 8 * plan.segments * plan.blocks * kClusterWarps;
  return weights + sums + squares + factor_bytes(rows, panel);
}

ClusterShape cluster_fits(const ProjectLayer& layer, int panel, const Device& device) {
  ClusterShape shape;
  // Registers move between warps, which code for one architecture alone can ask for.
  if ((device.arch != 90 && device.arch != 100) || device.shared_bytes < kClusterShared) return shape;
  const ClusterPlan plan = cluster_plan(layer, panel);
  if (plan.blocks == 0) return shape;
  shape.slots = plan.units;
  shape.squares = static_cast<std::int64_t>(plan.segments) * plan.blocks * kClusterWarps;
  return shape;
}

void launch_project_cluster(const std::vector<PanelPlan>& panels, const Stream& stream) {
  std::vector<Group> groups;
  for (const PanelPlan& panel : panels) {
    const std::size_t kernel = kernel_index(*panel.layer);
    const ClusterPlan plan = cluster_plan(*panel.layer, panel.panel);
    const auto fits = [&](const Group& group) {
      return group.kernel == kernel && group.panel == unit_panel(panel.panel) && group.plan.blocks == plan.blocks;
    };
    auto group = std::find_if(groups.begin(), groups.end(), fits);
    if (group == groups.end()) group = groups.insert(group, {kernel, unit_panel(panel.panel), plan, {}});
    group->panels.push_back(panel);
  }
  for (const Group& group : groups)
    for (std::size_t begin = 0; begin < group.panels.size(); begin += kClusterItems)
      launch_group(group, begin, std::min(group.panels.size(), begin + kClusterItems), stream);
}

}  // namespace safelora::cuda
