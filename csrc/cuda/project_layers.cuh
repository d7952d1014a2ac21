// The projection's parameter tables and workspace, shared by the host planning and the kernels.
//
// A layer's adapters stand side by side along the rank, cut into panels of 16, 32 or 64 columns; each panel of each
// layer ("item") is one pass over the two weights, and leaves behind what finish_kernel puts together:
//   accumulators [slot][tile of 64 rows of V][fragment order]   fp32, V VᵀB summed over the slots in order
//   squares      [part]                                         fp64, of panel 0 only, ‖V‖² summed in order
//
// Fragment order is that of mma.m16n8k16, so that every access is 16 bytes a lane and needs no index arithmetic:
//   sums     [m / 16][n / 8][lane][4]                  lane = m % 8 * 4 + n % 8 / 2, entry = n % 2 + 2 * (m % 16 >= 8)
//   factors  [k / 16][n / 16][high, low][lane][8]      lane = n % 8 * 4 + k % 8 / 2,
//                                                      entry = k % 2 + 2 * (k % 16 >= 8) + 4 * (n % 16 >= 8)
// Factors (B, and Y = VᵀB) are split into two bf16, x ≈ high + low, with zeros in the padding.
#pragma once

#include <cstdint>
#include <vector>

#include "launch.h"
#include "safelora/cuda.h"
#include "strided.h"

namespace safelora::cuda {

constexpr int kProjectThreads = 128;
constexpr int kBlockRows = 64;    // both edges of the blocks of V: a multiple of every fragment
constexpr int kSmallLayer = 128;  // below this in d_out or d_in the errors of the split do not average out
constexpr int kMaxPanel = 64;

constexpr int kTicketStages = 3;
constexpr int kTicketStageBytes = 16384;  // a tile of both weights
constexpr int kTicketShared = kTicketStages * kTicketStageBytes + 448;
constexpr int kFactorBuffers = 2;  // of Y: few, so that they are written over in L2 instead of going to memory
constexpr int kExactShared = kProjectThreads * 8 * 8;

constexpr int kPackItems = 256;
constexpr int kTicketItems = 176;
constexpr int kExactItems = 224;
constexpr int kNormItems = 256;
constexpr int kFinishItems = 224;
constexpr int kKeepItems = 320;

// Bytes of a factor's fragments for `k` (padded to 64) rows and a panel of `n` columns.
inline std::int64_t factor_bytes(std::int64_t k, int n) { return ceil_div(k, kBlockRows) * kBlockRows * n * 4; }
// Floats of the sums of one slot.
inline std::int64_t sums_size(std::int64_t m, int n) { return ceil_div(m, kBlockRows) * kBlockRows * n; }

// ---- pack: columns of lora_B, fp64 to fp32 and bf16, into fragments
struct PackItem {
  Strided from;  // data == nullptr: zeros
  std::uint32_t* to;
  std::int32_t rows, first_column, columns, panel;  // of `from` to columns [first_column, + columns) of the panel
};
struct PackParams {
  PackItem items[kPackItems];
};

// ---- the pass over the weights in tickets
struct TicketItem {
  Strided aligned, base;
  const std::uint32_t* factor;  // packed B
  float* accumulators;
  double* squares;       // nullptr: not wanted
  std::uint32_t* chain;  // [slot][row block]: units added so far
  std::int32_t rows, cols;
  std::int32_t chunk_rows, chunks;  // of a first-phase task
  std::int32_t strip_cols, strips;  // of a super-strip
  std::int32_t unit_cols, slots;    // of a second-phase task; unit u is added to slot u % slots
  bool direct;                      // 16-byte copies of both weights are possible
};
struct TicketParams {
  TicketItem items[kTicketItems];
  std::int32_t num_items, lag;
  std::uint32_t strips;     // of all items
  std::uint32_t* ticket;    // zero, as all counters
  std::uint32_t* counters;  // [strip][first phase, reductions, second phase]
  float* y_parts;           // lag + 1 buffers of part_size floats: sums of VᵀB, [chunk][column block][fragment order]
  std::uint32_t* y;         // kFactorBuffers of y_size words: packed Y = VᵀB of a strip
  std::int64_t part_size, y_size;
};

// ---- small layers and fp64: plain fused multiply-adds, T = float or double
struct ExactItem {
  Strided aligned, base, factor;
  void* y;             // T[cols][rank]
  void* accumulators;  // T[rows][rank]
  double* squares;     // one for each block of 32 columns; nullptr: not wanted
  std::int32_t rows, cols, rank;
  std::int32_t first_column_block, first_row_block;  // blocks of 32 columns, of 4 rows, of the items before
};
struct ExactParams {
  ExactItem items[kExactItems];
  std::int32_t num_items;
};

// ---- ‖V‖_F, and the factor that B' is multiplied by
struct NormItem {
  Strided aligned, base;
  const double* squares;
  double* v_norm;
  double* scale;
  std::int32_t rows, cols, parts;
};
struct NormParams {
  NormItem items[kNormItems];
  bool frobenius;
};

// ---- scaling and rounding of the columns of one factor that lie in one panel
enum class Sums : std::uint8_t { fragments, rows_f32, rows_f64 };
struct FinishItem {
  const void* accumulators;
  const double* scale;
  void* out;   // (rows, columns), already moved to its first column
  void* wide;  // the same before rounding, for the cosine: fp32 or fp64, wide_stride columns; nullptr: not wanted
  std::int64_t out_row, out_col, wide_stride, slot_size;
  std::int32_t rows, columns, first_column, panel, slots;
  DType out_dtype;
  Sums sums;
};
struct FinishParams {
  FinishItem items[kFinishItems];
};

// ---- the result of the adapters that were not selected, and the rounded one of those that were
struct KeepItem {
  Strided lora_B;
  const bool* selected;
  const void* wide;  // contiguous, fp32 or fp64; nullptr: `out` holds B' already
  void* out;
  std::int64_t out_row, out_col;
  std::int32_t rows, columns;
  DType out_dtype;
  bool f64;
};
struct KeepParams {
  KeepItem items[kKeepItems];
};

static_assert(sizeof(PackParams) <= 32764 && sizeof(TicketParams) <= 32764 && sizeof(ExactParams) <= 32764 &&
              sizeof(NormParams) <= 32764 && sizeof(FinishParams) <= 32764 && sizeof(KeepParams) <= 32764);

// ---- planning
// How a layer is cut. Only the strips, which decide about no sum, follow the true size of L2.
struct TicketShape {
  std::int64_t chunk_rows, chunks, strip_cols, strips, unit_cols, slots, squares;
};
TicketShape ticket_shape(const ProjectLayer& layer, const Device& device);

// The same for the thread-block-cluster kernel (sm_90 and later): slots == 0 where it does not take the item.
struct ClusterShape {
  std::int64_t slots = 0, squares = 0;
};

// One panel of one layer on its way through a call. `accumulators`, `squares` and `factor` are in the workspace.
struct PanelPlan {
  const ProjectLayer* layer;
  int panel;  // 16, 32 or 64
  const std::uint32_t* factor;
  float* accumulators;
  double* squares;  // nullptr for every panel of a layer but its first
};

// The cluster kernel (project_cluster.cpp). fits() may look at shape, strides, alignment and dtypes; launch() runs
// after pack_kernel and before finish_kernel on the same stream, and may allocate through the stream.
ClusterShape cluster_fits(const ProjectLayer& layer, int panel, const Device& device);
void launch_project_cluster(const std::vector<PanelPlan>& panels, const Stream& stream);

}  // namespace safelora::cuda
