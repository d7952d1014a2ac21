// X − U(UᵀX) over many small matrices in one launch.
//
// A unit is a block of columns of one X; its rows are cut into chunks. For every chunk there are two tasks: the first
// adds its part of C = UᵀX to a workspace, and the last of a unit's chunks to arrive sums the parts in order; the
// second waits for C and writes X − UC over its rows. Tasks are taken in order from one counter, first tasks `lag`
// ahead of second ones: every task depends on tasks that are done or running, whatever the number of blocks, and the
// second reading of X and U follows the first closely enough to come from L2. Nothing overwrites X before C is known.
#pragma once

#include <cstdint>
#include <vector>

#include "launch.h"
#include "safelora/cuda.h"
#include "strided.h"

namespace safelora::cuda {

constexpr int kChunkRows = 128;                                        // rows staged at a time
constexpr int kBasisPanel = 32;                                        // columns of the basis at a time
constexpr int kNarrow = 16, kWide = 32;                                // columns of a unit
constexpr int kProjectOutShared = kChunkRows * (kBasisPanel + kWide);  // entries, before two words more
constexpr int kProjectOutItems = 240;

struct ProjectOutEntry {
  Strided x, basis, out;  // (d, m), (d, k), (d, m)
  std::int64_t partials;  // index in the workspace: C of each unit, then the parts of each task
  std::int32_t d, m, k;
  std::int32_t first_block;  // index of its first task of either kind
  std::int32_t first_unit;
  std::int32_t chunk_rows;  // a multiple of kChunkRows
};

// For items of one kind: fp64 or not, units of kNarrow or kWide columns, X stored row by row or (_t) column by column.
struct ProjectOutParams {
  ProjectOutEntry items[kProjectOutItems];
  void* workspace;
  unsigned* counters;  // zeros: tickets, then arrivals and readiness of each unit
  std::int32_t num_items, num_tasks, lag;
};

}  // namespace safelora::cuda
