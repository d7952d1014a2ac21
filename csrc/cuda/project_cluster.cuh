// The projection on thread-block clusters: tables, the division of the work, and the layout of shared memory.
//
// The blocks of a cluster share the rows of a strip of columns. Each holds its part of both weights in shared memory,
// where TMA brings them and where both products read them:
//   Y_s = V_sᵀB      summed over warps, then over the blocks of the cluster through distributed shared memory
//   acc += V_s Y_s   in registers, for all strips of a segment of columns
// so memory is read once. A unit of work is kClusterSegments segments (a slot of sums) of one panel, for one cluster,
// which adds the segments to the slot one by one. When there are too few units for the device, segments are units of
// their own and project_cluster_fold adds them, in the same order: the bits are the same.
#pragma once

#include "project_layers.cuh"

namespace safelora::cuda {

constexpr int kClusterBlocks = 8;  // more is not portable
constexpr int kClusterWarps = 8;   // that multiply; then one that loads, one that exchanges
constexpr int kClusterBoxRows = 16 * kClusterWarps;
constexpr int kClusterBoxes = 4;   // of a block, one below the other
constexpr int kClusterSlots = 16;  // at most, of the ring of boxes
constexpr int kClusterSegments = 4;
constexpr int kClusterItems = 102;
constexpr int kFoldItems = 1000;
constexpr int kFoldThreads = 256;
constexpr std::int64_t kClusterShared = 227 * 1024;

// One panel of one layer.
struct ClusterItem {
  TensorMap aligned, base;
  const std::uint32_t* factor;
  float* sums;
  double* squares;  // [segment][block of the cluster][warp]; nullptr: not wanted
  std::int64_t slot_size;
  std::int32_t rows, first_unit, strips, unit_strips, segment_strips;
  std::uint8_t panel, halves;  // a panel of 64 is two units of 32 columns
  std::uint8_t boxes, slots;   // of a block in a strip, and of its ring
  DType aligned_dtype, base_dtype;
};
struct ClusterParams {
  ClusterItem items[kClusterItems];
  std::int32_t num_items;
};

// to[slot] = from[first segment] + … + from[last segment]
struct FoldItem {
  const float* from;
  float* to;
  std::int64_t size;  // of a slot
  std::int32_t segments;
};
struct FoldParams {
  FoldItem items[kFoldItems];
};
static_assert(sizeof(ClusterParams) <= kMaxParams && sizeof(FoldParams) <= kMaxParams);

// Offsets in shared memory for strips of W columns and N columns of B. A quad is the 16 bytes a lane has of a product's
// second factor: four columns of the strip for one column of B.
template <int W, int N>
struct ClusterLayout {
  static constexpr bool moves_registers = N > 16;  // from warpgroup to warpgroup, so that nothing is spilled
  static constexpr int threads = moves_registers ? 384 : 320;
  static constexpr int adding_warps = W / 4 * N / 32;  // that add the partial sums of all warps
  static constexpr int quads = W / 4;
  static constexpr int partial_pitch = N * 16 + 16, y_pitch = N * 16 + 32;  // of a quad, free of bank conflicts
  static constexpr int partial_bytes = quads * partial_pitch;
  static constexpr int inbox_bytes = (quads > kClusterBlocks ? quads : kClusterBlocks) * N * 16;
  static constexpr int outbox_bytes = (quads / 2) * N * 16;  // a cluster has two blocks at least
  static constexpr int y_bytes = quads * y_pitch;
  static constexpr int partials = 0;                                             // of warps 1 …
  static constexpr int staged = partials + (kClusterWarps - 1) * partial_bytes;  // two: of warp 0, then of the block
  static constexpr int inbox = staged + 2 * partial_bytes;                       // two: of the cluster's blocks
  static constexpr int outbox = inbox + 2 * inbox_bytes;                         // two: this block's quads of Y
  static constexpr int y = outbox + 2 * outbox_bytes;                            // two
  static constexpr int barriers = y + 2 * y_bytes;
  static constexpr int ring = (barriers + 8 * (2 * kClusterSlots + 8) + 1023) / 1024 * 1024;
};

// How one panel of a layer is cut; blocks == 0 where the kernel does not take it. Only the shape and the dtypes enter.
struct ClusterPlan {
  int strip_cols, blocks, boxes, slots;
  int strips, segment_strips, segments, units;
  std::int64_t box_bytes;  // of both weights
};
ClusterPlan cluster_plan(const ProjectLayer& layer, int panel);

// Bytes that one panel moves between memory and the device: both weights, the packed factor, and the sums, written
// here and read by the kernel that finishes.
std::int64_t cluster_traffic(const ProjectLayer& layer, int panel);

}  // namespace safelora::cuda
