// Products of bf16 activations with thin fp32 matrices (rank columns) on AVX-512, for SaLoRA's linear layer.
//
// A few columns of a block of rows are widened into L1, where they serve both products of a contraction; the result of
// an expansion goes from registers to memory, base added and rounded on the way. Activations therefore pass through no
// fp32 copy of a row, and the lines that come next are asked for with every step of the arithmetic.
#include "thin_rows.h"

namespace safelora::detail {
namespace {

// M rows of C (+)= scalars a[i*row + l*step] times the rows of a panel.
template <int M>
void multiply(std::int64_t depth, const float* a, std::int64_t row, std::int64_t step, const float* panel,
              std::int64_t panel_ld, float* c, std::int64_t ldc, bool accumulate, Wanted& lines) {
  Wanted wanted = lines;
  __m512 sum[M];
  const float* rows[(M + 3) / 4];  // one for each row would leave no registers for the rest
#pragma GCC unroll 4
  for (int g = 0; g < (M + 3) / 4; ++g) rows[g] = a + 4 * g * row;
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i) sum[i] = _mm512_setzero_ps();
  for (std::int64_t l = 0; l < depth; ++l, panel += panel_ld) {
    if (l % 2 == 0) wanted.next();
    const __m512 v = _mm512_loadu_ps(panel);
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i) sum[i] = _mm512_fmadd_ps(_mm512_set1_ps(rows[i / 4][i % 4 * row]), v, sum[i]);
#pragma GCC unroll 4
    for (int g = 0; g < (M + 3) / 4; ++g) rows[g] += step;
  }
  lines = wanted;
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i)
    _mm512_storeu_ps(c + i * ldc, accumulate ? _mm512_add_ps(_mm512_loadu_ps(c + i * ldc), sum[i]) : sum[i]);
}

void multiply_rows(std::int64_t rows, std::int64_t depth, const float* a, std::int64_t row, std::int64_t step,
                   const float* panel, std::int64_t panel_ld, float* c, std::int64_t ldc, bool accumulate,
                   Wanted& lines) {
  std::int64_t i = 0;
  for (; i + 16 <= rows; i += 16)
    multiply<16>(depth, a + i * row, row, step, panel, panel_ld, c + i * ldc, ldc, accumulate, lines);
  for (; i + 4 <= rows; i += 4)
    multiply<4>(depth, a + i * row, row, step, panel, panel_ld, c + i * ldc, ldc, accumulate, lines);
  for (; i < rows; ++i)
    multiply<1>(depth, a + i * row, row, step, panel, panel_ld, c + i * ldc, ldc, accumulate, lines);
}

void contract(const ThinContraction& c) {
  constexpr std::int64_t kLd = kThinColumns + kLanes;  // an odd number of cache lines: rows share no sets of L1
  alignas(64) float x[kThinRows * kLd];
  const char* data = static_cast<const char*>(c.x);
  const std::int64_t row_bytes = 2 * c.row_stride, ld = c.panels * kLanes;
  for (std::int64_t j = 0; j < c.cols; j += kThinColumns) {
    const std::int64_t cols = c.cols - j < kThinColumns ? c.cols - j : kThinColumns;
    for (std::int64_t i = 0; i < c.rows; ++i)
      for (std::int64_t q = 0; q < cols; q += kThinWidth) {
        const Wide v = widened(_mm512_maskz_loadu_epi16(lanes(cols - q), data + i * row_bytes + 2 * (j + q)));
        _mm512_store_ps(x + i * kLd + q, v.left);
        _mm512_store_ps(x + i * kLd + q + 16, v.right);
      }
    Wanted wanted(c, j, kThinColumns);
    for (std::int64_t p = 0; p < c.panels; ++p) {
      const std::int64_t at = (p * c.cols + j) * kLanes;
      if (c.rows_out != nullptr)
        multiply_rows(c.rows, cols, x, kLd, 1, c.rows_panels + at, kLanes, c.rows_out + p * kLanes, ld, j > 0, wanted);
      if (c.columns_out != nullptr)
        multiply_rows(cols, c.rows, x, 1, kLd, c.columns_panels + p * kLanes, ld, c.columns_out + at, kLanes,
                      c.accumulate, wanted);
    }
  }
}

// `rows` ≤ 16 rows of 16, times scale, as 16 rows of `ld`; zero beyond.
void transpose16(const float* from, std::int64_t rows, float scale, float* to, std::int64_t ld) {
  const __m512i index = _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                                           _mm512_set1_epi32(kLanes));
  const __mmask16 mask = static_cast<__mmask16>((1u << rows) - 1);
  for (std::int64_t q = 0; q < kLanes; ++q)
    _mm512_storeu_ps(
        to + q * ld,
        _mm512_mul_ps(_mm512_set1_ps(scale), _mm512_mask_i32gather_ps(_mm512_setzero_ps(), mask, index, from + q, 4)));
}

std::int64_t expansion_size(std::int64_t cols, std::int64_t depth) {
  return (cols + kThinWidth - 1) / kThinWidth * kThinWidth * depth;
}

// [cols/32][depth][32]
void pack_expansion(const float* panels, std::int64_t cols, std::int64_t depth, float scale, std::uint32_t* words) {
  for (std::int64_t j = 0; j < cols; j += kThinWidth)
    for (std::int64_t p = 0; p < depth; p += kLanes)
      for (std::int64_t half = 0; half < kThinWidth; half += 16) {
        const std::int64_t left = cols - j - half, rows = left < 0 ? 0 : left < 16 ? left : 16;
        float* to = reinterpret_cast<float*>(words) + j * depth + p * kThinWidth + half;
        transpose16(panels + p * cols + (j + half) * kLanes, rows, scale, to, kThinWidth);
      }
}

// M rows of 32 columns.
template <int M, bool Add>
void expand_tile(const ThinExpansion& e, std::int64_t i, std::int64_t j) {
  const float *panel = reinterpret_cast<const float*>(e.panels) + j * e.depth, *h = e.coefficients + i * e.depth;
  Target<M, Add> target(e, i, j);
  __m512 left[M], right[M];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) left[m] = right[m] = _mm512_setzero_ps();
  for (std::int64_t l = 0; l < e.depth; ++l, panel += kThinWidth) {
    const __m512 panel_left = _mm512_loadu_ps(panel), panel_right = _mm512_loadu_ps(panel + 16);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const __m512 scalar = _mm512_set1_ps(h[m * e.depth + l]);
      left[m] = _mm512_fmadd_ps(scalar, panel_left, left[m]);
      right[m] = _mm512_fmadd_ps(scalar, panel_right, right[m]);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) target.put(m, {left[m], right[m]});
}

template <bool Add>
void expand_all(const ThinExpansion& e) {
  for (std::int64_t j = 0; j < e.cols; j += kThinWidth) {
    std::int64_t i = 0;
    for (; i + 8 <= e.rows; i += 8) expand_tile<8, Add>(e, i, j);
    for (; i < e.rows; ++i) expand_tile<1, Add>(e, i, j);
  }
}

void expand(const ThinExpansion& e) { e.base != nullptr ? expand_all<true>(e) : expand_all<false>(e); }

}  // namespace

const ThinKernels& avx512_thin() {
  static const ThinKernels kernels = {contract, nullptr, nullptr, expansion_size, pack_expansion, expand};
  return kernels;
}

}  // namespace safelora::detail
