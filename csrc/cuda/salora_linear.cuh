// The two products that SaLoRA's linear update and its gradients consist of.
//
// reduce: one reading of M (tokens×cols) gives both P = M W (tokens×rank) and Q = MᵀH (cols×rank). A block takes a
// group of tokens and a range of columns; its parts of P and Q go to a workspace, and the last block to arrive at a
// group, or at a range, adds them in order. h = xAᵀ; t = s·dy·B̃ with G = s·dyᵀh; dA = tᵀx; UᵀB and UᵀG. expand: out =
// in + scale·L·R with L (tokens×rank), R (rank×cols). y = base_output + s·h·B̃ᵀ; dx = t·A; dU.
#pragma once

#include <cstdint>

#include "launch.h"
#include "safelora/cuda.h"
#include "strided.h"

namespace safelora::cuda {

constexpr int kEdge = 64;  // of the tiles of M
constexpr int kRangeCols = 256;
constexpr int kExpandRows = 64, kExpandCols = 64, kExpandDepth = 32;

// A block's work for panels of RANKS ranks.
template <int RANKS, bool FP64>
struct ReduceShape {
  static constexpr int kTiles = FP64 || RANKS == 64 ? 2 : 4;  // of tokens, in a group
  static constexpr int kTokens = kTiles * kEdge;
  // With few ranks, half of the warps take half of a tile's columns or tokens, and keep sums of their own.
  static constexpr int kSplits = RANKS == 16 ? 2 : 1;
  // Entries of shared memory: tiles of M and W, then H and P of the group, then one word.
  static constexpr int kShared = kEdge * (kEdge + RANKS) + kTokens * RANKS * (1 + kSplits);
};

constexpr int kExpandShared = kExpandRows * kExpandCols;  // the operands' tiles, then the result's
static_assert(kExpandShared >= (kExpandRows + kExpandCols) * kExpandDepth);

struct ReduceParams {
  Strided m, w, h;             // (tokens, cols), (cols, rank), (tokens, rank); w: (rank, cols) for kernels ending in _t
  Strided row_sums, col_sums;  // P and Q
  double row_scale, col_scale;
  void *row_parts, *col_parts;  // (ranges, groups·…, padded rank), (chunks, ranges·kRangeCols, padded rank)
  unsigned* counters;           // zeros; for each group and panel, then for each range and panel
  std::int64_t tokens;
  std::int32_t cols, rank;
  std::int32_t panels, ranges, groups, groups_per_chunk, chunks;
  bool want_rows, want_cols;
};

struct ExpandParams {
  Strided left, right, in, out;  // right: (cols, rank) for kernels ending in _t; in.data may be nullptr
  double scale;
  std::int64_t tokens;
  std::int32_t cols, rank;
};

}  // namespace safelora::cuda
