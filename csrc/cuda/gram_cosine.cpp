#include "gram_cosine.cuh"

#include <algorithm>

#include "plan.h"
#include "safelora/cuda.h"

namespace safelora::cuda {
namespace {

constexpr std::int64_t kShared = kGramShared * sizeof(double) + sizeof(unsigned);
constexpr std::size_t kMaxPartials = std::size_t(256) << 20;  // bytes of workspace in one launch, if items allow

std::int64_t tiles_of(const CosineTask& task) {
  return std::max<std::int64_t>(1, ceil_div(task.lora_B.cols, kGramTile));
}

// Depends on the shape alone, so that the order of summation does.
std::int64_t chunks_of(const CosineTask& task) {
  const std::int64_t depth = std::max(task.lora_B.rows, task.lora_A.cols), tiles = tiles_of(task);
  return std::clamp<std::int64_t>(ceil_div(depth, tiles * tiles >= 64 ? 4096 : 512), 1, 32);
}

std::int64_t blocks_of(const CosineTask& task) { return tiles_of(task) * tiles_of(task) * chunks_of(task); }

CosineEntry entry_of(const CosineTask& task, std::int64_t first_block) {
  const std::int64_t rank = task.lora_B.cols;
  return {strided(task.lora_B_new),
          strided(task.lora_B),
          strided(task.lora_A),
          task.v_norm,
          task.cosine,
          static_cast<std::int32_t>(task.lora_B.rows),
          static_cast<std::int32_t>(task.lora_A.cols),
          static_cast<std::int32_t>(rank),
          static_cast<std::int32_t>(first_block),
          static_cast<std::int32_t>(chunks_of(task)),
          rank > 0 && task.lora_A.rows == 0};
}

}  // namespace

void launch_cosines(const std::vector<CosineTask>& tasks, const Stream& stream) {
  constexpr std::size_t kBlockBytes = 4 * kThreads * sizeof(double);
  for (std::size_t i = 0; i < tasks.size();) {
    GramCosineParams params = {};
    std::int64_t blocks = 0;
    for (; i < tasks.size() && params.num_items < kCosineItems; ++i) {
      const std::int64_t more = blocks_of(tasks[i]);
      if (blocks > 0 && (blocks + more) * kBlockBytes > kMaxPartials) break;
      params.items[params.num_items++] = entry_of(tasks[i], blocks);
      blocks += more;
    }
    const std::size_t counters = blocks + params.num_items;
    params.partials = allocate<double>(blocks * 4 * kThreads, stream);
    params.counters = allocate<unsigned>(counters, stream);
    params.num_blocks = static_cast<std::int32_t>(blocks);
    memset_zero(params.counters, counters * sizeof(unsigned), stream);
    Shape shape;
    shape.grid_x = static_cast<unsigned>(blocks);
    shape.block = kThreads;
    shape.shared = kShared;
    launch("gram_cosine", shape, params, stream);
  }
}

void update_cosine(const std::vector<CosineItem>& items, double* cosines, const Stream& stream) {
  std::vector<CosineTask> tasks;
  for (std::size_t i = 0; i < items.size(); ++i)
    tasks.push_back({items[i].lora_B_new, items[i].lora_B, items[i].lora_A, nullptr, cosines + i});
  launch_cosines(tasks, stream);
}

OpPlan plan_update_cosine(const std::vector<CosineItem>& items) {
  OpPlan plan;
  for (const CosineItem& item : items) {
    const CosineTask task = {item.lora_B_new, item.lora_B, item.lora_A};
    const std::int64_t d_out = item.lora_B.rows, d_in = item.lora_A.cols, rank = item.lora_B.cols;
    const std::int64_t tiles = tiles_of(task), partials = blocks_of(task) * 4 * kThreads * sizeof(double);
    const std::int64_t factors = bytes_of(item.lora_B_new) + bytes_of(item.lora_B) + bytes_of(item.lora_A);
    plan.compulsory_bytes += factors + sizeof(double);
    plan.dram_bytes += factors + sizeof(double);
    // A tile off the diagonal needs the columns of both of its edges.
    plan.l2_bytes += (2 * tiles - 1) * factors + 2 * partials;
    plan.flops += 2 * rank * rank * (3 * d_out + d_in);
    plan.mma_flops += 2 * tiles * tiles * kGramTile * kGramTile * (3 * d_out + d_in);
    plan.workspace_bytes += partials;
  }
  plan.shared_bytes = kShared;
  return plan;
}

extern "C" void safelora_plan_update_cosine(std::int64_t d_out, std::int64_t d_in, std::int64_t rank, DType factor,
                                            OpPlan* plan) {
  const ConstMatrix lora_B = {nullptr, factor, d_out, rank, rank, 1};
  *plan = plan_update_cosine({{lora_B, lora_B, {nullptr, factor, rank, d_in, d_in, 1}}});
}

}  // namespace safelora::cuda
