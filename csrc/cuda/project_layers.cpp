#include "project_layers.cuh"

#include <algorithm>
#include <array>
#include <limits>
#include <memory>
#include <stdexcept>
#include <string>

#include "gram_cosine.cuh"
#include "plan.h"
#include "project_cluster.cuh"

namespace safelora::cuda {
namespace {

#if !defined(SAFELORA_PROJECT_WORKSPACE)
#define SAFELORA_PROJECT_WORKSPACE 128 << 20
#endif
constexpr std::int64_t kWorkspace = SAFELORA_PROJECT_WORKSPACE;  // of the layers that are worked on at a time
constexpr std::int64_t kUnitBytes = 64 << 10;                    // of both weights that one task reads
constexpr std::int64_t kEnoughTasks = 32;                        // between two that add to the same sums
constexpr std::int64_t kMaxChunk = 1024;                         // rows whose products a tensor core adds up
constexpr int kBlocksPerProcessor = 3;                           // more would spread the tasks over more of L2
constexpr int kMaxLag = 4;

std::int64_t round_up(std::int64_t n, std::int64_t unit) { return ceil_div(n, unit) * unit; }

// Hands out pieces of one allocation. Without memory it only measures.
class Arena {
 public:
  explicit Arena(void* base = nullptr) : base_(static_cast<char*>(base)) {}

  template <class T>
  T* take(std::int64_t count) {
    const std::int64_t at = used_;
    used_ += round_up(count * static_cast<std::int64_t>(sizeof(T)), 256);
    return base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + at);
  }
  std::int64_t used() const { return used_; }

 private:
  char* base_;
  std::int64_t used_ = 0;
};

bool needs_f64(const ProjectLayer& layer) {
  bool any = wide(layer.aligned) || wide(layer.base);
  for (const ProjectFactor& f : layer.factors) any = any || wide(f.lora_B) || wide(f.lora_A);
  return any;
}

bool exact(const ProjectLayer& layer) {
  return needs_f64(layer) || layer.aligned.rows < kSmallLayer || layer.aligned.cols < kSmallLayer;
}

std::int64_t total_rank(const ProjectLayer& layer) {
  std::int64_t rank = 0;
  for (const ProjectFactor& f : layer.factors) rank += f.lora_B.cols;
  return rank;
}

// A layer without factors still has a norm, and one panel of zeros to go with it.
std::vector<int> panel_widths(std::int64_t rank) {
  std::vector<int> widths(static_cast<std::size_t>(rank / kMaxPanel), kMaxPanel);
  const std::int64_t rest = rank % kMaxPanel;
  if (rest > 0 || widths.empty()) widths.push_back(rest <= 16 ? 16 : rest <= 32 ? 32 : kMaxPanel);
  return widths;
}

enum class WeightKind { bf16, f16, f32 };

WeightKind weight_kind(const ProjectLayer& layer) {
  if (layer.aligned.dtype != layer.base.dtype) return WeightKind::f32;
  return layer.aligned.dtype == DType::bf16  ? WeightKind::bf16
         : layer.aligned.dtype == DType::f16 ? WeightKind::f16
                                             : WeightKind::f32;
}

const char* ticket_kernel(WeightKind kind, int panel) {
  static constexpr const char* kNames[3][3] = {{"project_bf16_16", "project_bf16_32", "project_bf16_64"},
                                               {"project_f16_16", "project_f16_32", "project_f16_64"},
                                               {"project_f32_16", "project_f32_32", "project_f32_64"}};
  return kNames[static_cast<int>(kind)][panel / 32];
}

std::int64_t pair_bytes(const ProjectLayer& layer) { return size_of(layer.aligned.dtype) + size_of(layer.base.dtype); }

// A strip and the ones whose second reads are still to come share L2 with everything else.
std::int64_t strip_bytes(std::int64_t l2_bytes) { return l2_bytes / 5; }

bool direct(const ProjectLayer& layer) {
  return layer.aligned.dtype == layer.base.dtype && strided(layer.aligned).lines == Lines::rows &&
         strided(layer.base).lines == Lines::rows;
}

// One panel of a layer: columns [first, first + width) of its factors side by side.
struct Panel {
  std::int64_t first;
  int width;
  std::uint32_t* factor;
  float* accumulators;
  std::int64_t slots;
  bool cluster;
};

struct LayerPlan {
  const ProjectLayer* layer;
  bool exact, f64;
  TicketShape shape;
  std::vector<Panel> panels;   // empty if exact
  std::vector<void*> y, sums;  // of each factor, exact only
  std::vector<void*> wide;     // B' before it is rounded, of each factor, where the cosine needs it
  double *squares, *scale;
  std::int64_t parts;
};

bool needs_wide(const ProjectFactor& f, bool f64) {
  if (f.cosine == nullptr || f.lora_A.rows == 0) return false;
  return f.projected.dtype != (f64 ? DType::f64 : DType::f32);
}

// `wide` is for what may have to last longer than the rest.
LayerPlan plan_layer(const ProjectLayer& layer, const Device& device, Arena& arena, Arena& wide) {
  LayerPlan plan = {};
  const std::int64_t rows = layer.aligned.rows, cols = layer.aligned.cols;
  plan.layer = &layer;
  plan.exact = exact(layer);
  plan.f64 = needs_f64(layer);
  plan.scale = arena.take<double>(1);
  const std::int64_t size = plan.f64 ? 8 : 4;
  if (plan.exact) {
    plan.parts = ceil_div(cols, 32);
    for (const ProjectFactor& f : layer.factors) {
      plan.y.push_back(arena.take<char>(cols * f.lora_B.cols * size));
      plan.sums.push_back(arena.take<char>(rows * f.lora_B.cols * size));
    }
  } else {
    plan.shape = ticket_shape(layer, device);
    std::int64_t first = 0;
    for (const int width : panel_widths(total_rank(layer))) {
      const ClusterShape cluster = cluster_fits(layer, width, device);
      Panel panel = {first, width, nullptr, nullptr, cluster.slots, cluster.slots > 0};
      if (first == 0) plan.parts = panel.cluster ? cluster.squares : plan.shape.squares;
      panel.factor = arena.take<std::uint32_t>(factor_bytes(rows, width) / 4);
      if (!panel.cluster) panel.slots = plan.shape.slots;
      panel.accumulators = arena.take<float>(panel.slots * sums_size(rows, width));
      plan.panels.push_back(panel);
      first += width;
    }
  }
  plan.squares = arena.take<double>(plan.parts);
  for (const ProjectFactor& f : layer.factors)
    plan.wide.push_back(needs_wide(f, plan.f64) ? wide.take<char>(rows * f.lora_B.cols * size) : nullptr);
  return plan;
}

// Calls visit(count, fill) for runs of at most `capacity` items, where fill(table) copies them.
template <std::size_t N, class Item, class Visit>
void in_tables(const std::vector<Item>& items, Item (&table)[N], Visit visit) {
  for (std::size_t i = 0; i < items.size(); i += N) {
    const std::size_t count = std::min(N, items.size() - i);
    std::copy_n(items.begin() + static_cast<std::ptrdiff_t>(i), count, table);
    visit(static_cast<std::int32_t>(count));
  }
}

// Applies visit(factor, its index, first column in the panel, columns, first column of the factor) to what of a
// layer's factors lies in a panel.
template <class Visit>
void for_each_overlap(const ProjectLayer& layer, const Panel& panel, Visit visit) {
  std::int64_t start = 0;
  for (std::size_t i = 0; i < layer.factors.size(); ++i) {
    const std::int64_t rank = layer.factors[i].lora_B.cols;
    const std::int64_t from = std::max(start, panel.first), to = std::min(start + rank, panel.first + panel.width);
    if (from < to) visit(layer.factors[i], i, from - panel.first, to - from, from - start);
    start += rank;
  }
}

ConstMatrix columns(const ConstMatrix& m, std::int64_t first, std::int64_t count) {
  const char* data = static_cast<const char*>(m.data) + first * m.col_stride * size_of(m.dtype);
  return {data, m.dtype, m.rows, count, m.row_stride, m.col_stride};
}

void pack(const std::vector<LayerPlan>& plans, const Stream& stream) {
  std::vector<PackItem> items;
  std::int64_t most = 0;
  for (const LayerPlan& plan : plans)
    for (const Panel& panel : plan.panels) {
      const auto rows = static_cast<std::int32_t>(plan.layer->aligned.rows);
      const auto add = [&](const Strided& from, std::int64_t first, std::int64_t count) {
        items.push_back({from, panel.factor, rows, static_cast<std::int32_t>(first), static_cast<std::int32_t>(count),
                         panel.width});
        most = std::max(most, round_up(rows, kBlockRows) / 2 * count);
      };
      std::int64_t used = 0;
      for_each_overlap(*plan.layer, panel,
                       [&](const ProjectFactor& f, std::size_t, std::int64_t at, std::int64_t n, std::int64_t from) {
                         add(strided(columns(f.lora_B, from, n)), at, n);
                         used = at + n;
                       });
      if (used < panel.width) add({}, used, panel.width - used);
    }
  auto params = std::make_unique<PackParams>();
  const auto blocks = static_cast<unsigned>(std::clamp<std::int64_t>(ceil_div(most, 4 * kProjectThreads), 1, 1024));
  in_tables(items, params->items, [&](std::int32_t count) {
    launch("project_pack", {.grid_x = blocks, .grid_y = static_cast<unsigned>(count), .block = kProjectThreads},
           *params, stream);
  });
}

std::int64_t strip_tasks(std::int64_t rows, std::int64_t chunks, std::int64_t strip_cols, std::int64_t unit_cols,
                         int panel) {
  return strip_cols / kBlockRows * (chunks + panel / 16) + strip_cols / unit_cols * ceil_div(rows, kBlockRows);
}

// Between a strip's two phases come the tasks of so many others: enough for its last block to be done.
std::int64_t strips_between(std::int64_t blocks, std::int64_t strips, std::int64_t tasks) {
  return std::clamp<std::int64_t>(ceil_div(9 * blocks * strips, 10 * tasks), 1, kMaxLag);
}

struct Schedule {
  Shape shape;
  std::int64_t strips = 0, lag = 1, part_size = 0, y_size = 0;
};

Schedule schedule(const TicketItem* items, int count, const char* kernel, int panel, const Stream& stream) {
  Schedule result;
  std::int64_t tasks = 0;
  for (int i = 0; i < count; ++i) {
    const TicketItem& item = items[i];
    result.strips += item.strips;
    tasks += item.strips * strip_tasks(item.rows, item.chunks, item.strip_cols, item.unit_cols, panel);
    result.part_size = std::max(result.part_size, std::int64_t{item.chunks} * item.strip_cols * panel);
    result.y_size = std::max(result.y_size, factor_bytes(item.strip_cols, panel) / 4);
  }
  if (tasks >= std::numeric_limits<std::int32_t>::max())
    throw std::invalid_argument("project_layers: the weights of one call are too large; pass fewer layers at a time");
  result.shape = {.block = kProjectThreads, .shared = kTicketShared};
  const std::int64_t resident = std::min<std::int64_t>(resident_blocks(kernel, result.shape, stream),
                                                       std::int64_t{kBlocksPerProcessor} * stream.device.sm_count);
  result.shape.grid_x = static_cast<unsigned>(std::clamp<std::int64_t>(resident, 1, tasks));
  result.lag = strips_between(resident, result.strips, tasks);
  return result;
}

void run_tickets(const std::vector<LayerPlan>& plans, const Stream& stream) {
  std::array<std::vector<TicketItem>, 9> groups;
  std::vector<PanelPlan> clusters;
  for (const LayerPlan& plan : plans)
    for (const Panel& panel : plan.panels) {
      const ProjectLayer& layer = *plan.layer;
      double* squares = panel.first == 0 ? plan.squares : nullptr;
      if (panel.cluster) {
        clusters.push_back({&layer, panel.width, panel.factor, panel.accumulators, squares});
        continue;
      }
      const TicketShape& s = plan.shape;
      const auto narrow = [](std::int64_t n) { return static_cast<std::int32_t>(n); };
      const TicketItem item = {.aligned = strided(layer.aligned),
                               .base = strided(layer.base),
                               .factor = panel.factor,
                               .accumulators = panel.accumulators,
                               .squares = squares,
                               .chain = nullptr,
                               .rows = narrow(layer.aligned.rows),
                               .cols = narrow(layer.aligned.cols),
                               .chunk_rows = narrow(s.chunk_rows),
                               .chunks = narrow(s.chunks),
                               .strip_cols = narrow(s.strip_cols),
                               .strips = narrow(s.strips),
                               .unit_cols = narrow(s.unit_cols),
                               .slots = narrow(s.slots),
                               .direct = direct(layer)};
      groups[static_cast<std::size_t>(weight_kind(layer)) * 3 + static_cast<std::size_t>(panel.width / 32)].push_back(
          item);
    }
  if (!clusters.empty()) launch_project_cluster(clusters, stream);

  auto params = std::make_unique<TicketParams>();
  for (std::size_t g = 0; g < groups.size(); ++g) {
    const int panel = 16 << g % 3;
    const char* kernel = ticket_kernel(static_cast<WeightKind>(g / 3), panel);
    in_tables(groups[g], params->items, [&](std::int32_t count) {
      const Schedule plan = schedule(params->items, count, kernel, panel, stream);
      std::int64_t counters = 1 + 3 * plan.strips;
      for (int i = 0; i < count; ++i) counters += params->items[i].slots * ceil_div(params->items[i].rows, kBlockRows);
      auto* counter = allocate<std::uint32_t>(static_cast<std::size_t>(counters), stream);
      memset_zero(counter, static_cast<std::size_t>(counters) * sizeof(std::uint32_t), stream);
      params->num_items = count;
      params->lag = static_cast<std::int32_t>(plan.lag);
      params->strips = static_cast<std::uint32_t>(plan.strips);
      params->ticket = counter;
      params->counters = counter + 1;
      counter += 1 + 3 * plan.strips;
      for (int i = 0; i < count; ++i) {
        params->items[i].chain = counter;
        counter += params->items[i].slots * ceil_div(params->items[i].rows, kBlockRows);
      }
      params->part_size = plan.part_size;
      params->y_parts = allocate<float>(static_cast<std::size_t>((plan.lag + 1) * plan.part_size), stream);
      params->y_size = plan.y_size;
      params->y = allocate<std::uint32_t>(static_cast<std::size_t>(kFactorBuffers * plan.y_size), stream);
      launch(kernel, plan.shape, *params, stream);
    });
  }
}

void run_exact(const std::vector<LayerPlan>& plans, bool f64, const Stream& stream) {
  std::vector<ExactItem> items;
  for (const LayerPlan& plan : plans) {
    if (!plan.exact || plan.f64 != f64) continue;
    const ProjectLayer& layer = *plan.layer;
    ExactItem item = {};
    item.aligned = strided(layer.aligned);
    item.base = strided(layer.base);
    item.squares = plan.squares;
    item.rows = static_cast<std::int32_t>(layer.aligned.rows);
    item.cols = static_cast<std::int32_t>(layer.aligned.cols);
    for (std::size_t i = 0; i < std::max<std::size_t>(layer.factors.size(), 1); ++i) {
      if (!layer.factors.empty()) {
        item.factor = strided(layer.factors[i].lora_B);
        item.rank = static_cast<std::int32_t>(layer.factors[i].lora_B.cols);
        item.y = plan.y[i];
        item.accumulators = plan.sums[i];
      }
      items.push_back(item);
      item.squares = nullptr;
    }
  }
  auto params = std::make_unique<ExactParams>();
  in_tables(items, params->items, [&](std::int32_t count) {
    std::int64_t column_blocks = 0, row_blocks = 0;
    for (int i = 0; i < count; ++i) {
      ExactItem& item = params->items[i];
      item.first_column_block = static_cast<std::int32_t>(column_blocks);
      item.first_row_block = static_cast<std::int32_t>(row_blocks);
      column_blocks += ceil_div(item.cols, 32);
      row_blocks += ceil_div(item.rows, kProjectThreads / 32);
    }
    if (std::max(column_blocks, row_blocks) > std::numeric_limits<std::int32_t>::max())
      throw std::invalid_argument("project_layers: the weights of one call are too large; pass fewer layers at a time");
    params->num_items = count;
    launch(f64 ? "project_exact_first_f64" : "project_exact_first_f32",
           {.grid_x = static_cast<unsigned>(column_blocks), .block = kProjectThreads, .shared = kExactShared}, *params,
           stream);
    launch(f64 ? "project_exact_second_f64" : "project_exact_second_f32",
           {.grid_x = static_cast<unsigned>(row_blocks), .block = kProjectThreads}, *params, stream);
  });
}

void norms(const std::vector<LayerPlan>& plans, Normalize normalize, const Stream& stream) {
  std::vector<NormItem> items;
  for (const LayerPlan& plan : plans) {
    const ProjectLayer& layer = *plan.layer;
    items.push_back({strided(layer.aligned), strided(layer.base), plan.squares, layer.v_norm, plan.scale,
                     static_cast<std::int32_t>(layer.aligned.rows), static_cast<std::int32_t>(layer.aligned.cols),
                     static_cast<std::int32_t>(plan.parts)});
  }
  auto params = std::make_unique<NormParams>();
  params->frobenius = normalize == Normalize::frobenius;
  in_tables(items, params->items, [&](std::int32_t count) {
    launch("project_norm",
           {.grid_x = static_cast<unsigned>(count), .block = kProjectThreads, .shared = sizeof(double) * 4}, *params,
           stream);
  });
}

void finish(const std::vector<LayerPlan>& plans, const Stream& stream) {
  std::vector<FinishItem> items;
  std::int64_t most = 0;
  for (const LayerPlan& plan : plans) {
    const std::int64_t rows = plan.layer->aligned.rows;
    const auto item = [&](const ProjectFactor& f, std::size_t i, std::int64_t from, std::int64_t n) {
      FinishItem out = {};
      out.scale = plan.scale;
      out.out = static_cast<char*>(f.projected.data) + from * f.projected.col_stride * size_of(f.projected.dtype);
      out.out_row = f.projected.row_stride;
      out.out_col = f.projected.col_stride;
      out.out_dtype = f.projected.dtype;
      out.wide_stride = f.lora_B.cols;
      if (plan.wide[i] != nullptr) out.wide = static_cast<char*>(plan.wide[i]) + from * (plan.f64 ? 8 : 4);
      out.rows = static_cast<std::int32_t>(rows);
      out.columns = static_cast<std::int32_t>(n);
      most = std::max(most, ceil_div(rows, kBlockRows));
      return out;
    };
    if (plan.exact)
      for (std::size_t i = 0; i < plan.layer->factors.size(); ++i) {
        const ProjectFactor& f = plan.layer->factors[i];
        if (f.lora_B.cols == 0) continue;
        FinishItem out = item(f, i, 0, f.lora_B.cols);
        out.accumulators = plan.sums[i];
        out.slots = 1;
        out.panel = static_cast<std::int32_t>(f.lora_B.cols);
        out.sums = plan.f64 ? Sums::rows_f64 : Sums::rows_f32;
        items.push_back(out);
      }
    for (const Panel& panel : plan.panels)
      for_each_overlap(*plan.layer, panel,
                       [&](const ProjectFactor& f, std::size_t i, std::int64_t at, std::int64_t n, std::int64_t from) {
                         FinishItem out = item(f, i, from, n);
                         out.accumulators = panel.accumulators;
                         out.slots = static_cast<std::int32_t>(panel.slots);
                         out.slot_size = sums_size(rows, panel.width);
                         out.panel = panel.width;
                         out.first_column = static_cast<std::int32_t>(at);
                         out.sums = Sums::fragments;
                         items.push_back(out);
                       });
  }
  auto params = std::make_unique<FinishParams>();
  in_tables(items, params->items, [&](std::int32_t count) {
    launch("project_finish",
           {.grid_x = static_cast<unsigned>(most), .grid_y = static_cast<unsigned>(count), .block = kProjectThreads},
           *params, stream);
  });
}

void cosines(const std::vector<LayerPlan>& plans, const Stream& stream) {
  std::vector<CosineTask> tasks;
  for (const LayerPlan& plan : plans)
    for (std::size_t i = 0; i < plan.layer->factors.size(); ++i) {
      const ProjectFactor& f = plan.layer->factors[i];
      if (f.cosine == nullptr) continue;
      CosineTask task = {f.projected, f.lora_B, f.lora_A, plan.layer->v_norm, f.cosine};
      if (plan.wide[i] != nullptr)
        task.lora_B_new = {
            plan.wide[i], plan.f64 ? DType::f64 : DType::f32, f.lora_B.rows, f.lora_B.cols, f.lora_B.cols, 1};
      tasks.push_back(task);
    }
  if (!tasks.empty()) launch_cosines(tasks, stream);
}

void check(const ProjectLayer& layer) {
  constexpr std::int64_t kMost = std::numeric_limits<std::int32_t>::max() - kMaxPanel;
  if (std::max({layer.aligned.rows, layer.aligned.cols, total_rank(layer)}) > kMost)
    throw std::invalid_argument("project_layers: a weight of " + std::to_string(layer.aligned.rows) + "×" +
                                std::to_string(layer.aligned.cols) + " is too large; expected at most " +
                                std::to_string(kMost) + " rows, columns and adapter columns");
}

// What an item costs besides its weights, in bytes.
struct Traffic {
  std::int64_t packed, y, y_parts, sums, operands;
};

Traffic traffic(const ProjectLayer& layer, const TicketShape& s, int panel) {
  const std::int64_t rows = round_up(layer.aligned.rows, kBlockRows), cols = round_up(layer.aligned.cols, kBlockRows);
  Traffic t = {};
  t.packed = factor_bytes(rows, panel);
  t.y = factor_bytes(cols, panel);
  t.y_parts = 2 * s.chunks * cols * panel * 4;
  t.sums = ceil_div(cols, s.unit_cols) * sums_size(rows, panel) * 4;
  t.operands = cols / kBlockRows * t.packed + rows / kBlockRows * t.y;
  return t;
}

// An adapter whose result waits for the selection.
struct Undecided {
  const ProjectFactor* factor;
  const void* wide;  // B' before it is rounded, or nullptr where `projected` has it
  bool f64;
};

void project(const std::vector<ProjectLayer>& layers, Normalize normalize, const Stream& stream,
             std::vector<Undecided>* undecided) {
  for (const ProjectLayer& layer : layers) check(layer);
  const Device& device = stream.device;
  // Layers go in runs that share one workspace; what is undecided outlives them.
  std::vector<std::pair<std::size_t, std::size_t>> runs;
  std::int64_t most = 0;
  Arena kept;
  for (std::size_t i = 0; i < layers.size();) {
    Arena arena;
    const std::size_t first = i;
    do plan_layer(layers[i++], device, arena, undecided ? kept : arena);
    while (i < layers.size() && arena.used() < kWorkspace);
    runs.emplace_back(first, i);
    most = std::max(most, arena.used());
  }
  void* workspace = runs.empty() ? nullptr : allocate<char>(static_cast<std::size_t>(most), stream);
  if (kept.used() > 0) kept = Arena(allocate<char>(static_cast<std::size_t>(kept.used()), stream));
  for (const auto& [first, last] : runs) {
    Arena arena(workspace);
    std::vector<LayerPlan> plans;
    for (std::size_t i = first; i < last; ++i)
      plans.push_back(plan_layer(layers[i], device, arena, undecided ? kept : arena));
    pack(plans, stream);
    run_tickets(plans, stream);
    run_exact(plans, false, stream);
    run_exact(plans, true, stream);
    norms(plans, normalize, stream);
    finish(plans, stream);
    cosines(plans, stream);
    if (undecided)
      for (const LayerPlan& plan : plans)
        for (std::size_t i = 0; i < plan.wide.size(); ++i)
          if (plan.layer->factors[i].lora_B.cols > 0)
            undecided->push_back({&plan.layer->factors[i], plan.wide[i], plan.f64});
  }
}

}  // namespace

TicketShape ticket_shape(const ProjectLayer& layer, const Device& device) {
  const std::int64_t rows = layer.aligned.rows, cols = layer.aligned.cols, bytes = pair_bytes(layer);
  const std::int64_t padded_cols = round_up(cols, kBlockRows), row_blocks = ceil_div(rows, kBlockRows);
  const std::int64_t column = row_blocks * kBlockRows * bytes;
  TicketShape s = {};
  const std::int64_t task = kUnitBytes / bytes / kBlockRows / kBlockRows * kBlockRows;  // 256 for 16-bit weights
  s.chunk_rows = std::clamp(round_up(ceil_div(rows, 32), kBlockRows), task, kMaxChunk);
  s.chunks = ceil_div(rows, s.chunk_rows);
  // A unit must not be wider than the strips of the smallest L2 of an architecture.
  const std::int64_t smallest_l2 = std::int64_t{device.arch == 86 ? 6 : 40} << 20;
  s.unit_cols = std::clamp(strip_bytes(smallest_l2) / column / kBlockRows * kBlockRows, std::int64_t{kBlockRows}, task);
  s.unit_cols = std::min(s.unit_cols, padded_cols);
  const std::int64_t units = ceil_div(cols, s.unit_cols);
  s.slots = std::clamp<std::int64_t>(ceil_div(kEnoughTasks, row_blocks), 1, std::min<std::int64_t>(units, 16));
  const std::int64_t most = std::max<std::int64_t>(strip_bytes(l2_size(device)) / (column * s.unit_cols), 1);
  s.strips = ceil_div(units, most);
  s.strip_cols = ceil_div(units, s.strips) * s.unit_cols;
  s.strips = ceil_div(padded_cols, s.strip_cols);
  s.squares = s.chunks * (padded_cols / kBlockRows);
  return s;
}

OpPlan plan_project(const std::vector<ProjectLayer>& layers, const Device& device) {
  OpPlan plan;
  for (const ProjectLayer& layer : layers) {
    const std::int64_t rows = layer.aligned.rows, cols = layer.aligned.cols, rank = total_rank(layer);
    const std::int64_t weights = rows * cols * pair_bytes(layer);
    std::int64_t factors = 0;
    for (const ProjectFactor& f : layer.factors)
      factors += rows * f.lora_B.cols * (size_of(f.lora_B.dtype) + size_of(f.projected.dtype));
    plan.compulsory_bytes += weights + factors;
    plan.flops += 4 * rows * cols * rank;
    Arena arena;
    plan_layer(layer, device, arena, arena);
    plan.workspace_bytes = std::min(plan.workspace_bytes + arena.used(), std::max(kWorkspace, arena.used()));
    plan.shared_bytes = std::max<std::int64_t>(plan.shared_bytes, exact(layer) ? kExactShared : kTicketShared);
    if (exact(layer)) {
      plan.dram_bytes += 2 * weights + factors;
      continue;
    }
    const TicketShape s = ticket_shape(layer, device);
    plan.dram_bytes += factors;
    for (const int panel : panel_widths(rank)) {
      plan.mma_flops += 3 * 4 * round_up(rows, kBlockRows) * round_up(cols, kBlockRows) * panel;
      if (cluster_fits(layer, panel, device).slots > 0) {
        const std::int64_t moved = cluster_traffic(layer, panel) + factor_bytes(rows, panel);  // which pack wrote
        plan.dram_bytes += moved;
        plan.l2_bytes += moved + (ceil_div(panel, 32) - 1) * weights;
        plan.shared_bytes = kClusterShared;
        continue;
      }
      const Traffic t = traffic(layer, s, panel);
      const std::int64_t tasks = strip_tasks(rows, s.chunks, s.strip_cols, s.unit_cols, panel);
      const std::int64_t between = strips_between(std::int64_t{kBlocksPerProcessor} * device.sm_count, 1, tasks);
      const std::int64_t window = (between + 1) * s.strip_cols * round_up(rows, kBlockRows) * pair_bytes(layer);
      const std::int64_t kept = s.slots * sums_size(rows, panel) * 4;  // read once more by finish
      plan.l2_window = std::max(plan.l2_window, window);
      plan.dram_bytes += (window <= l2_size(device) ? 1 : 2) * weights + 2 * t.packed + 2 * kept;
      plan.l2_bytes += 2 * weights + t.operands + t.y_parts + t.y + 2 * t.sums;
    }
  }
  return plan;
}

OpPlan& OpPlan::operator+=(const OpPlan& other) {
  compulsory_bytes += other.compulsory_bytes;
  dram_bytes += other.dram_bytes;
  l2_bytes += other.l2_bytes;
  flops += other.flops;
  mma_flops += other.mma_flops;
  l2_window = std::max(l2_window, other.l2_window);
  workspace_bytes += other.workspace_bytes;
  shared_bytes = std::max(shared_bytes, other.shared_bytes);
  return *this;
}

extern "C" void safelora_plan_project(std::int64_t d_out, std::int64_t d_in, std::int64_t rank, DType weight,
                                      DType factor, int arch, int sm_count, std::int64_t l2_bytes, OpPlan* plan) {
  ProjectLayer layer;
  layer.aligned = layer.base = {nullptr, weight, d_out, d_in, d_in, 1};
  layer.factors.resize(1);
  layer.factors[0].lora_B = {nullptr, factor, d_out, rank, rank, 1};
  layer.factors[0].projected = {nullptr, factor, d_out, rank, rank, 1};
  Device device;
  device.arch = arch;
  device.sm_count = sm_count;
  device.l2_bytes = l2_bytes;
  device.shared_bytes = (arch == 90 || arch == 100 ? 227 : 99) << 10;
  *plan = plan_project({layer}, device);
}

void project_layers(const std::vector<ProjectLayer>& layers, Normalize normalize, const Stream& stream) {
  project(layers, normalize, stream, nullptr);
}

void project_selected_layers(const std::vector<ProjectLayer>& layers, Normalize normalize, const Selection& selection,
                             const double* cosines, std::int64_t n, bool* selected, const Stream& stream) {
  for (const ProjectLayer& layer : layers)
    for (const ProjectFactor& f : layer.factors)
      if (f.cosine < cosines || f.cosine >= cosines + n)
        throw std::invalid_argument("project_selected_layers: an adapter's cosine is not one of those selected from");
  std::vector<Undecided> undecided;
  project(layers, normalize, stream, &undecided);
  if (selection.threshold)
    select_by_threshold(cosines, n, *selection.threshold, selection.rule, selected, stream);
  else
    select_lowest(cosines, n, selection.num_layers, selection.rule, selected, stream);
  std::vector<KeepItem> items;
  std::int64_t most = 0;
  for (const Undecided& u : undecided) {
    const Matrix& out = u.factor->projected;
    items.push_back({strided(u.factor->lora_B), selected + (u.factor->cosine - cosines), u.wide, out.data,
                     out.row_stride, out.col_stride, static_cast<std::int32_t>(out.rows),
                     static_cast<std::int32_t>(out.cols), out.dtype, u.f64});
    most = std::max(most, ceil_div(out.rows, kBlockRows));
  }
  auto params = std::make_unique<KeepParams>();
  in_tables(items, params->items, [&](std::int32_t count) {
    launch("project_keep",
           {.grid_x = static_cast<unsigned>(most), .grid_y = static_cast<unsigned>(count), .block = kProjectThreads},
           *params, stream);
  });
}

}  // namespace safelora::cuda
