// Rows of bf16 in registers, for the thin products. Internal linkage: translation units with other flags share it.
#pragma once

#include <immintrin.h>

#include "isa.h"

namespace safelora::detail {
namespace {

struct Wide {
  __m512 left, right;
};

__mmask32 lanes(std::int64_t n) { return n >= 32 ? ~__mmask32{0} : (__mmask32{1} << n) - 1; }

Wide widened(__m512i words) {
  const auto half = [](__m256i h) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16)); };
  return {half(_mm512_castsi512_si256(words)), half(_mm512_extracti64x4_epi64(words, 1))};
}

#if !defined(__AVX512BF16__)
// To nearest even in the upper half of each word; a NaN stays one.
__m512i rounded(__m512 v) {
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i sum = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  return _mm512_mask_mov_epi32(sum, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc00000));
}
#endif

__m512i narrowed(Wide v) {
#if defined(__AVX512BF16__)
  return (__m512i)_mm512_cvtne2ps_pbh(v.right, v.left);
#else
  alignas(64) static constexpr std::uint16_t kUpper[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21,
                                                           23, 25, 27, 29, 31, 33, 35, 37, 39, 41, 43,
                                                           45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
  return _mm512_permutex2var_epi16(rounded(v.left), _mm512_load_si512(kUpper), rounded(v.right));
#endif
}

// The lines that are worked on after columns j … j+cols of a contraction: one is asked for with every step of the
// arithmetic.
class Wanted {
 public:
  Wanted(const ThinContraction& c, std::int64_t j, std::int64_t cols) : lines_(cols / 32) {
    const bool last = j + cols >= c.cols;
    if (last ? c.next == nullptr : j + 2 * cols > c.cols) return;
    at_ = last ? static_cast<const char*>(c.next) : static_cast<const char*>(c.x) + 2 * (j + cols);
    row_bytes_ = 2 * (last ? c.next_stride : c.row_stride);
    rows_ = c.rows;
  }
  void next() {
    if (rows_ == 0) return;
    __builtin_prefetch(at_ + line_ * 64, 0, 2);
    if (++line_ < lines_) return;
    line_ = 0;
    at_ += row_bytes_;
    --rows_;
  }

 private:
  const char* at_ = nullptr;
  std::int64_t row_bytes_ = 0, rows_ = 0, line_ = 0, lines_;
};

// Where M rows of 32 columns of an expansion go: base added, rounded, stored.
template <int M, bool Add>
class Target {
 public:
  Target(const ThinExpansion& e, std::int64_t i, std::int64_t j)
      : base_(static_cast<const char*>(e.base) + 2 * (i * e.base_stride + j)),
        out_(static_cast<char*>(e.out) + 2 * (i * e.out_stride + j)),
        base_row_(2 * e.base_stride),
        out_row_(2 * e.out_stride),
        mask_(lanes(e.cols - j)) {
    constexpr std::int64_t kAhead = 256;  // bytes along the row
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      if constexpr (Add) __builtin_prefetch(base_ + m * base_row_ + kAhead, 0, 2);
      __builtin_prefetch(out_ + m * out_row_ + kAhead, 1, 2);
    }
  }
  void put(int m, Wide v) const {
    if constexpr (Add) {
      const Wide base = widened(_mm512_maskz_loadu_epi16(mask_, base_ + m * base_row_));
      v = {_mm512_add_ps(v.left, base.left), _mm512_add_ps(v.right, base.right)};
    }
    _mm512_mask_storeu_epi16(out_ + m * out_row_, mask_, narrowed(v));
  }

 private:
  const char* base_;
  char* out_;
  std::int64_t base_row_, out_row_;
  __mmask32 mask_;
};

}  // namespace
}  // namespace safelora::detail
