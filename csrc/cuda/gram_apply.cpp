#include "gram_apply.cuh"

#include <algorithm>
#include <map>
#include <string>
#include <utility>

namespace safelora::cuda {
namespace {

constexpr std::int64_t kSpanBlocks = 8;       // at least: enough rows for their sums to be few
constexpr std::int64_t kMaxSpans = 64;        // whose sums the last to arrive adds
constexpr std::int64_t kSumBytes = 64 << 20;  // of one item
constexpr std::int64_t kWorkspace = 256 << 20;

struct Kind {
  bool fp64;
  std::int64_t ranks;
  std::int64_t entry_size() const { return fp64 ? sizeof(double) : sizeof(float); }
  std::string kernel() const { return "gram_apply" + std::to_string(ranks) + (fp64 ? "_f64" : "_f32"); }
};

Kind kind_of(const GramItem& item) {
  const bool fp64 = wide(item.x) || wide(item.z) || wide(item.weights);
  return {fp64, fp64 || item.z.cols <= 16 ? 16 : 32};
}

// Depends on the shape alone, so that the order of summation does.
struct Plan {
  std::int64_t blocks, span_blocks, spans, chunks, panels, columns;
  std::int64_t parts, applied, sums;  // entries of the workspace

  Plan(const GramItem& item, const Kind& kind) {
    blocks = std::max<std::int64_t>(1, ceil_div(item.x.rows, kGramEdge));
    chunks = ceil_div(item.x.cols, kGramLength);
    panels = ceil_div(item.z.cols, kind.ranks);
    columns = ceil_div(item.x.cols, kGramEdge);
    const std::int64_t tile = kGramEdge * kind.ranks * panels, sum = columns * tile * kind.entry_size();
    const std::int64_t most = std::clamp<std::int64_t>(kSumBytes / sum, 1, kMaxSpans);
    span_blocks = std::max(kSpanBlocks, ceil_div(blocks, most));
    spans = ceil_div(blocks, span_blocks);
    parts = blocks * chunks * tile;
    applied = blocks * tile;
    sums = spans * columns * tile;
  }
  std::int64_t entries() const { return parts + applied + sums; }
  std::int64_t firsts() const { return blocks * chunks * panels; }
  std::int64_t seconds() const { return columns * panels; }
  std::int64_t counters() const { return spans + blocks + columns; }
};

void launch_items(const std::vector<GramItem>& items, std::size_t begin, std::size_t end, const Kind& kind,
                  const Stream& stream) {
  GramParams params = {};
  std::int64_t tickets = 0, entries = 0, counters = 0, seconds_before = 0;
  for (std::size_t i = begin; i < end; ++i) {
    const GramItem& item = items[i];
    const Plan plan(item, kind);
    GramEntry& entry = params.items[params.num_items++];
    entry.x = strided(item.x);
    entry.z = strided(item.z);
    entry.weights = strided(item.weights);
    entry.out = strided(item.out);
    entry.tokens = item.x.rows;
    entry.d = static_cast<std::int32_t>(item.x.cols);
    entry.rank = static_cast<std::int32_t>(item.z.cols);
    entry.first_block = static_cast<std::int32_t>(tickets);
    entry.first_counter = static_cast<std::int32_t>(counters);
    entry.span_blocks = static_cast<std::int32_t>(plan.span_blocks);
    entry.parts = entries;
    entry.applied = entry.parts + plan.parts;
    entry.sums = entry.applied + plan.applied;
    entries += plan.entries();
    counters += plan.counters();
    tickets += plan.firsts() + (plan.spans - 1) * plan.seconds() + seconds_before;
    seconds_before = plan.seconds();
  }
  Shape shape;
  shape.block = kThreads;
  shape.shared = (kind.ranks == 16 ? kGramShared<16> : kGramShared<32>)*kind.entry_size() + sizeof(unsigned);
  shape.grid_x = static_cast<unsigned>(tickets + seconds_before);
  params.last_tasks = static_cast<std::int32_t>(tickets);
  params.workspace = stream.allocate(entries * kind.entry_size());
  params.counters = allocate<unsigned>(1 + counters, stream);
  memset_zero(params.counters, (1 + counters) * sizeof(unsigned), stream);
  launch(kind.kernel().c_str(), shape, params, stream);
}

}  // namespace

void gram_apply(const std::vector<GramItem>& all, const Stream& stream) {
  std::map<std::string, std::pair<Kind, std::vector<GramItem>>> groups;
  for (const GramItem& item : all) {
    if (item.z.rows == 0 || item.z.cols == 0) continue;
    const Kind kind = kind_of(item);
    auto& group = groups[kind.kernel()];
    group.first = kind;
    group.second.push_back(item);
  }
  for (const auto& [name, group] : groups) {
    const auto& [kind, items] = group;
    std::int64_t bytes = 0;
    std::size_t begin = 0;
    for (std::size_t i = 0; i < items.size(); ++i) {
      const std::int64_t size = Plan(items[i], kind).entries() * kind.entry_size();
      if (i > begin && (i - begin == kGramItems || bytes + size > kWorkspace)) {
        launch_items(items, begin, i, kind, stream);
        begin = i;
        bytes = 0;
      }
      bytes += size;
    }
    launch_items(items, begin, items.size(), kind, stream);
  }
}

}  // namespace safelora::cuda
