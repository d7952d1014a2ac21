// Cosines between low-rank updates, from rank×rank Gram matrices in fp64.
#pragma once

#include <cstdint>
#include <vector>

#include "launch.h"
#include "strided.h"

namespace safelora::cuda {

// *cosine = ⟨B'A, BA⟩ / (‖B'A‖·‖BA‖) in [−1, 1]; 0 for a zero update; NaN where lora_A is absent (rows == 0) or
// *v_norm is 0. lora_B_new, lora_B: (d_out, rank); lora_A: (rank, d_in); any dtypes and strides, on the device.
// lora_B_new may be a slice of a padded panel, and wider than the result that is stored.
struct CosineTask {
  ConstMatrix lora_B_new, lora_B, lora_A;
  const double* v_norm = nullptr;  // ‖V‖_F on the device; nullptr: known not to be 0
  double* cosine = nullptr;
};

// One launch for up to kCosineItems tasks, in stream order.
void launch_cosines(const std::vector<CosineTask>& tasks, const Stream& stream);

constexpr int kGramTile = 16;                            // edge of a tile of the rank×rank Grams
constexpr int kGramDepth = 64;                           // entries of the contraction that are staged at a time
constexpr int kGramShared = 4 * kGramDepth * kGramTile;  // doubles, before one word more
constexpr int kCosineItems = 238;

// A block's work: tile (i, j) of BᵀB', BᵀB, B'ᵀB' and AAᵀ over one chunk of the two contractions.
struct CosineEntry {
  Strided lora_B_new, lora_B, lora_A;
  const double* v_norm;
  double* cosine;
  std::int32_t d_out, d_in, rank, first_block, chunks;
  bool absent;
};

struct GramCosineParams {
  CosineEntry items[kCosineItems];
  double* partials;    // 4 tiles for each block
  unsigned* counters;  // zeros; one for each block (the first of a tile uses its own), then one for each item
  std::int32_t num_items, num_blocks;
};

}  // namespace safelora::cuda
