// Xᵀ diag(w) X Z over many items, X tall and Z thin, in one launch.
//
// The rows of an X are cut into blocks, and blocks are put together to spans. There are two kinds of tasks: the first
// forms a part of Y = X Z for a block of rows, a chunk of columns and a panel of ranks, and the last of a block's to
// arrive adds the parts in order and weighs the rows; the second waits for a span of Y and forms X_spanᵀ (w ∘ Y_span)
// for a block of columns and a panel, and the last span of these to arrive adds the sums in order. Tasks are taken in
// order from one counter: the first ones of a span, then the second ones of the span before it, whichever item that
// belongs to. Every task depends on tasks that are done or running, whatever the number of blocks, and the second
// reading of a span follows the first closely enough to come from L2.
#pragma once

#include <cstdint>

#include "launch.h"
#include "safelora/cuda.h"
#include "strided.h"

namespace safelora::cuda {

constexpr int kGramEdge = 64;     // of the tiles of X: rows of a block, columns of a block
constexpr int kGramLength = 512;  // columns of a chunk
constexpr int kGramItems = 128;

// Entries of shared memory for panels of so many ranks: a tile of X and one of Z or Y, before one word more.
template <int RANKS>
constexpr int kGramShared = kGramEdge * (kGramEdge + RANKS);

struct GramEntry {
  Strided x, z, weights, out;         // (tokens, d), (d, rank), (tokens, 1) or data == nullptr, (d, rank)
  std::int64_t parts, applied, sums;  // indices in the workspace: by block and chunk, by block, by span
  std::int64_t tokens;
  std::int32_t d, rank;
  std::int32_t first_block;    // ticket of its first task
  std::int32_t first_counter;  // readiness of each span, arrivals at each block of rows, at each block of columns
  std::int32_t span_blocks;    // blocks of rows in a span
};

// For items of one kind: fp64 or not, panels of 16 or 32 ranks.
struct GramParams {
  GramEntry items[kGramItems];
  void* workspace;
  unsigned* counters;  // zeros: tickets, then those of each item
  std::int32_t num_items;
  std::int32_t last_tasks;  // ticket of the second tasks of the last span
};

}  // namespace safelora::cuda
