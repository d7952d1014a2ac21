// The table of ISA-specific kernels: one instance per translation unit isa_*.cpp, chosen at run time.
#pragma once

#include <cstdint>

#include "safelora/kernels.h"

namespace safelora::detail {

constexpr std::int64_t kLanes = 16;  // ranks per panel: every panel is (rows, 16), zero-padded

// C (m×16) = A (m×k)·B (k×16), or += when accumulate. a[i*a_row + l*a_col], b[l*ldb + j], c[i*ldc + j].
template <class T>
using Gemm16 = void (*)(std::int64_t m, std::int64_t k, const T* a, std::int64_t a_row, std::int64_t a_col, const T* b,
                        std::int64_t ldb, T* c, std::int64_t ldc, bool accumulate);

// dst[i*ld + j] = block(i, j), or aligned(i, j) − base(i, j); the second returns the sum of squares.
template <class T>
using LoadBlock = void (*)(const ConstMatrix& m, std::int64_t i0, std::int64_t rows, std::int64_t j0, std::int64_t cols,
                           T* dst, std::int64_t ld);
template <class T>
using LoadDifference = double (*)(const ConstMatrix& aligned, const ConstMatrix& base, std::int64_t i0,
                                  std::int64_t rows, std::int64_t j0, std::int64_t cols, T* dst, std::int64_t ld);
template <class T>
using StoreBlock = void (*)(const T* src, std::int64_t ld, const Matrix& m, std::int64_t i0, std::int64_t rows,
                            std::int64_t j0, std::int64_t cols);

// The same, while asking for `bytes` from `first` on, evenly over the steps of the inner loop: memory and arithmetic
// overlap only when the requests are spread over the arithmetic.
struct Ahead {
  const void* first = nullptr;
  std::int64_t bytes = 0;
};
template <class T>
using Gemm16Ahead = void (*)(std::int64_t m, std::int64_t k, const T* a, std::int64_t a_row, std::int64_t a_col,
                             const T* b, std::int64_t ldb, T* c, std::int64_t ldc, bool accumulate, Ahead ahead);

template <class T>
struct Kernels {
  Gemm16<T> gemm16;
  Gemm16Ahead<T> gemm16_ahead;
  Gemm16Ahead<T> gemm8_ahead;  // of each row of 16 only the first 8
  LoadBlock<T> load;
  LoadDifference<T> load_difference;
  StoreBlock<T> store;
};

struct IsaTable {
  Kernels<float> f32;
  Kernels<double> f64;
};

// Two passes over a layer, a range of blocks of 16 rows at a time: isa_amx.cpp, isa_avx512_rows.cpp.
struct RowLayer {
  ConstMatrix aligned, base;
  std::int64_t row_blocks, panels;
  const float* b;  // [panel][row block][16][16]
};
struct RowKernels {
  std::int64_t (*y_size)(const RowLayer& layer);  // entries of Y = VᵀB
  // The blocks' part of Y, in an order of its own; returns their part of ‖V‖². b_scratch: 512 words per panel.
  double (*pass1)(const RowLayer& layer, std::int64_t first, std::int64_t last, std::uint32_t* b_scratch, float* y);
  // Adds the parts of Y in order, into the y_size words that the second pass multiplies by.
  void (*join)(const RowLayer& layer, const float* parts, std::int64_t count, std::uint32_t* y);
  // The blocks' rows of V·Y: out[panel][row block][16][16].
  void (*pass2)(const RowLayer& layer, std::int64_t first, std::int64_t last, const std::uint32_t* y, float* out);
};

// Products of a block of rows of bf16 with thin fp32 matrices: isa_avx512_thin.cpp, isa_avx512_bf16.cpp. Depths are
// multiples of 16.
constexpr std::int64_t kThinRows = 64;     // of a block at most
constexpr std::int64_t kThinColumns = 64;  // widened at a time
constexpr std::int64_t kThinWidth = 32;    // columns of a panel that expands

// X (rows×cols), read once, for two products, each left out where its result is null.
struct ThinContraction {
  const void* x = nullptr;
  std::int64_t row_stride = 0, rows = 0, cols = 0, panels = 0;
  const float* rows_panels = nullptr;     // P as [panel][cols][16]
  float* rows_out = nullptr;              // (rows, 16·panels) = X·P
  const float* columns_panels = nullptr;  // Q (rows, 16·panels)
  float* columns_out = nullptr;           // [panel][cols][16] = Xᵀ·Q, or += when accumulate
  bool accumulate = false;
  const void* next = nullptr;  // rows of bf16 that are worked on after this, or null
  std::int64_t next_stride = 0;
};

// out (rows×cols) = base + coefficients (rows, depth) · P; base null: nothing added.
struct ThinExpansion {
  const void* base;
  std::int64_t base_stride;
  void* out;
  std::int64_t out_stride, rows, cols, depth;
  const float* coefficients;
  const std::uint32_t* panels;  // P, packed
  std::uint32_t* scratch;       // kThinRows·depth/2 words
};

struct ThinKernels {
  void (*contract)(const ThinContraction& contraction);
  // The product by P alone, with all of P bf16: pairs of its rows [panel][(cols+1)/2][16]. Null where it gains nothing.
  void (*pack_pairs)(const float* panel, std::int64_t cols, std::uint32_t* pairs);
  void (*contract_pairs)(const ThinContraction& contraction, const std::uint32_t* pairs);
  std::int64_t (*expansion_size)(std::int64_t cols, std::int64_t depth);  // words of P, packed
  // P = scale·Mᵀ from M as [depth/16][cols][16]
  void (*pack_expansion)(const float* m, std::int64_t cols, std::int64_t depth, float scale, std::uint32_t* words);
  void (*expand)(const ThinExpansion& expansion);
};

const ThinKernels* thin_kernels();  // null where the active path has none

const IsaTable& scalar_table();
#ifdef SAFELORA_X86
const IsaTable& avx2_table();
const IsaTable& avx512_table();
const RowKernels& avx512_rows();
const RowKernels& amx_rows();
const ThinKernels& avx512_thin();
const ThinKernels& avx512_bf16_thin();
#endif

template <class T>
const Kernels<T>& kernels();
template <>
const Kernels<float>& kernels<float>();
template <>
const Kernels<double>& kernels<double>();

}  // namespace safelora::detail
