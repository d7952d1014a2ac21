// Rows of V = aligned − base as vectors, for the kernels that walk the weights row by row: isa_amx.cpp and
// isa_avx512_rows.cpp. Like isa_kernels.h it has internal linkage, because the two are built with different flags.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "isa.h"

namespace {
using namespace safelora;
using namespace safelora::detail;

constexpr std::int64_t kPairColumns = 32;
constexpr int kGroups = 4;                              // groups of 32 columns in a cell
constexpr std::int64_t kCell = kPairColumns * kGroups;  // columns of a cell; its rows are 16

// a function: a constant of vector type would be initialised at load time, on CPUs without AVX-512 too
__m512i high_half() { return _mm512_set1_epi32(static_cast<int>(0xFFFF0000u)); }

// 32 columns of V in two vectors. Which columns make the first is free: the even ones where both weights are bf16 (one
// load and two shifts), the first 16 otherwise.
struct Pair {
  __m512 first, second;
};

// A function that only prefetches looks pure to GCC: a call of it that is not inlined early is dropped.
#define SAFELORA_PREFETCHES __attribute__((always_inline))

// Asks for 32 columns of a row while others are worked on: `step` further along it, or past its end, `wrap` more, in
// the row 16 below. Into L2: rows a power of two apart share the sets of L1.
struct AheadOfRow {
  std::int64_t step, wrap, left;

  template <class S>
  SAFELORA_PREFETCHES void ask(const S* row, std::int64_t j) const {
    const S* at = row + j + step + (j + step < left ? 0 : wrap);
#pragma GCC unroll 2
    for (int line = 0; line < static_cast<int>(kPairColumns * sizeof(S)); line += 64)
      _mm_prefetch(reinterpret_cast<const char*>(at) + line, _MM_HINT_T1);
  }
};

struct Bf16Row {
  static constexpr bool kRound = false;
  const std::uint16_t *a, *b;
  AheadOfRow ahead_a, ahead_b;
  Pair operator()(std::int64_t j) const {
    const __m512i x = _mm512_loadu_si512(a + j), y = _mm512_loadu_si512(b + j);
    return {_mm512_sub_ps(_mm512_castsi512_ps(_mm512_slli_epi32(x, 16)), _mm512_castsi512_ps(_mm512_slli_epi32(y, 16))),
            _mm512_sub_ps(_mm512_castsi512_ps(_mm512_and_si512(x, high_half())),
                          _mm512_castsi512_ps(_mm512_and_si512(y, high_half())))};
  }
  SAFELORA_PREFETCHES void ask_ahead(std::int64_t j) const {
    ahead_a.ask(a, j);
    ahead_b.ask(b, j);
  }
};

__m512 load16(const float* p) { return _mm512_loadu_ps(p); }
__m512 load16(const std::uint16_t* p) {  // fp16
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

template <class S>
struct PlainRow {
  static constexpr bool kRound = true;
  const S *a, *b;
  AheadOfRow ahead_a, ahead_b;
  Pair operator()(std::int64_t j) const {
    return {_mm512_sub_ps(load16(a + j), load16(b + j)), _mm512_sub_ps(load16(a + j + 16), load16(b + j + 16))};
  }
  SAFELORA_PREFETCHES void ask_ahead(std::int64_t j) const {
    ahead_a.ask(a, j);
    ahead_b.ask(b, j);
  }
};

// A row of differences that were formed before: edges, other strides, mixed dtypes.
struct BlockRow {
  static constexpr bool kRound = true;
  const float* v;
  bool neighbours;
  Pair operator()(std::int64_t j) const {
    if (!neighbours) return {_mm512_loadu_ps(v + j), _mm512_loadu_ps(v + j + 16)};
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    return {_mm512_i32gather_ps(even, v + j, 4), _mm512_i32gather_ps(even, v + j + 1, 4)};
  }
  void ask_ahead(std::int64_t) const {}
};

// Cells of 16 rows × 128 columns, in the order of memory.
class Cells {
 public:
  static std::int64_t count(const RowLayer& layer) { return (layer.aligned.cols + kCell - 1) / kCell; }

  Cells(const RowLayer& layer, std::int64_t first_block) : layer_(layer), block_(first_block) {
    const ConstMatrix &a = layer.aligned, &b = layer.base;
    plain_ = a.col_stride == 1 && b.col_stride == 1 && a.dtype == b.dtype;
    neighbours_ = plain_ && a.dtype == DType::bf16;
  }

  void next() {
    column_ += kCell;
    if (column_ >= layer_.aligned.cols) {
      column_ = 0;
      ++block_;
    }
  }

  // Differences of a cell at an edge are formed as a whole, before its rows are asked for.
  void begin() {
    const std::int64_t rows = std::min<std::int64_t>(16, layer_.aligned.rows - block_ * 16);
    const std::int64_t cols = std::min(kCell, layer_.aligned.cols - column_);
    inner_ = plain_ && rows == 16 && cols == kCell;
    if (inner_) return;
    std::memset(edge_, 0, sizeof edge_);
    avx512_table().f32.load_difference(layer_.aligned, layer_.base, block_ * 16, rows, column_, cols, edge_[0], kCell);
  }

  // f(rows), where rows(r) is row r of the cell.
  template <class F>
  void visit(F&& f) const {
    if (!inner_) return f([this](int r) { return BlockRow{edge_[r], neighbours_}; });
    switch (layer_.aligned.dtype) {
      case DType::bf16: return f([this](int r) { return stored<Bf16Row, std::uint16_t>(r); });
      case DType::f16: return f([this](int r) { return stored<PlainRow<std::uint16_t>, std::uint16_t>(r); });
      default: return f([this](int r) { return stored<PlainRow<float>, float>(r); });
    }
  }

 private:
  template <class Row, class S>
  Row stored(int r) const {
    return {at<S>(layer_.aligned, r), at<S>(layer_.base, r), ahead<S>(layer_.aligned), ahead<S>(layer_.base)};
  }
  template <class S>
  const S* at(const ConstMatrix& m, int r) const {
    return static_cast<const S*>(m.data) + (block_ * 16 + r) * m.row_stride + column_;
  }

  // A cell ahead; two lines more where vectors cross lines, or the second line of each would come too late.
  template <class S>
  AheadOfRow ahead(const ConstMatrix& m) const {
    const bool crosses = reinterpret_cast<std::uintptr_t>(m.data) % 64 != 0;
    const std::int64_t lead = crosses ? 128 / static_cast<std::int64_t>(sizeof(S)) : 0;
    return {kCell + lead, 16 * m.row_stride - m.cols, m.cols - column_};
  }

  const RowLayer& layer_;
  std::int64_t block_, column_ = 0;
  bool plain_ = false, neighbours_ = false, inner_ = false;
  alignas(64) float edge_[16][kCell];
};

}  // namespace
