// Thin products at twice the rate of FMA, where activations are bf16 and CPUs have AVX512-BF16 and VNNI.
//
// A contraction with factors that are bf16 too multiplies pairs of them, exactly (VDPBF16PS). With fp32 factors, split
// into hi + lo, that would be no faster than FMA and less accurate.
//
// An expansion takes 16-bit integers (VPDPWSSD). Every row of the coefficients and every column of P becomes integers
// times a number of its own, whose squares add up to no more than kNorm²: by Cauchy and Schwarz no sum of their
// products leaves 32 bits, whatever the depth. An entry is off by half a unit, a product of vectors u, v of length r by
// √r·2⁻¹⁵·‖u‖‖v‖ at most, which the rounding of the result to bf16 hides. Pairs of bf16 would be as fast, and up to 128
// times less accurate.
#include <cmath>
#include <cstring>
#include <limits>

#include "thin_rows.h"

namespace safelora::detail {
namespace {

constexpr std::int64_t kPairColumns = 128;  // staged at a time

void pack_pairs(const float* panel, std::int64_t cols, std::uint32_t* pairs) {
  for (std::int64_t j = 0; j < cols; j += 2, pairs += kLanes) {
    const __m512i even = _mm512_loadu_si512(panel + j * kLanes);
    const __m512i odd = j + 1 < cols ? _mm512_loadu_si512(panel + (j + 1) * kLanes) : _mm512_setzero_si512();
    _mm512_storeu_si512(pairs, _mm512_or_si512(_mm512_srli_epi32(even, 16), odd));  // lower halves are zero
  }
}

// M rows of out (+)= staged rows of pairs times a panel.
template <int M>
void multiply_pairs(std::int64_t depth, const std::uint32_t* x, std::int64_t row, const std::uint32_t* panel,
                    float* out, std::int64_t ld, bool accumulate, Wanted& lines) {
  Wanted wanted = lines;
  __m512 sum[M];
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i) sum[i] = _mm512_setzero_ps();
  for (std::int64_t l = 0; l < depth; ++l, ++x, panel += kLanes) {
    wanted.next();
    const __m512i v = _mm512_loadu_si512(panel);
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i)
      sum[i] = _mm512_dpbf16_ps(sum[i], (__m512bh)_mm512_set1_epi32(static_cast<int>(x[i * row])), (__m512bh)v);
  }
  lines = wanted;
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i)
    _mm512_storeu_ps(out + i * ld, accumulate ? _mm512_add_ps(_mm512_loadu_ps(out + i * ld), sum[i]) : sum[i]);
}

void contract_pairs(const ThinContraction& c, const std::uint32_t* pairs) {
  constexpr std::int64_t kLd = kPairColumns / 2 + kLanes;  // an odd number of cache lines
  alignas(64) std::uint32_t x[kThinRows * kLd];
  const char* data = static_cast<const char*>(c.x);
  const std::int64_t ld = c.panels * kLanes, all = (c.cols + 1) / 2;
  for (std::int64_t j = 0; j < c.cols; j += kPairColumns) {
    const std::int64_t cols = c.cols - j < kPairColumns ? c.cols - j : kPairColumns, depth = (cols + 1) / 2;
    for (std::int64_t i = 0; i < c.rows; ++i)
      for (std::int64_t q = 0; q < cols; q += 32)
        _mm512_store_si512(x + i * kLd + q / 2,
                           _mm512_maskz_loadu_epi16(lanes(cols - q), data + 2 * (i * c.row_stride + j + q)));
    Wanted wanted(c, j, kPairColumns);
    for (std::int64_t p = 0; p < c.panels; ++p) {
      const std::uint32_t* panel = pairs + (p * all + j / 2) * kLanes;
      float* out = c.rows_out + p * kLanes;
      std::int64_t i = 0;
      for (; i + 16 <= c.rows; i += 16)
        multiply_pairs<16>(depth, x + i * kLd, kLd, panel, out + i * ld, ld, j > 0, wanted);
      for (; i + 4 <= c.rows; i += 4)
        multiply_pairs<4>(depth, x + i * kLd, kLd, panel, out + i * ld, ld, j > 0, wanted);
      for (; i < c.rows; ++i) multiply_pairs<1>(depth, x + i * kLd, kLd, panel, out + i * ld, ld, j > 0, wanted);
    }
  }
}

constexpr float kNorm = 46000;  // below √2³¹ by more than rounding adds
constexpr float kMax = 32767;

// `blocks` times 16 numbers, `stride` apart, as pairs of 16 bits, `pair_stride` words apart; returns what they are to
// be multiplied by. NaN if one is not finite, 0 if all lie below the normal numbers.
float quantize(const float* v, std::int64_t blocks, std::int64_t stride, std::uint32_t* pairs,
               std::int64_t pair_stride) {
  __m512 most = _mm512_setzero_ps();
  for (std::int64_t p = 0; p < blocks; ++p) most = _mm512_max_ps(_mm512_abs_ps(_mm512_loadu_ps(v + p * stride)), most);
  const float largest = _mm512_reduce_max_ps(most);
  const __m512 unit = _mm512_set1_ps(largest >= std::numeric_limits<float>::min() ? largest : 1.0f);
  __m512 squares = _mm512_setzero_ps();
  for (std::int64_t p = 0; p < blocks; ++p) {
    const __m512 u = _mm512_div_ps(_mm512_loadu_ps(v + p * stride), unit);
    squares = _mm512_fmadd_ps(u, u, squares);
  }
  const float norm = std::sqrt(_mm512_reduce_add_ps(squares)), limit = kNorm / norm;
  const float steps = limit < kMax ? limit : kMax;
  const __m256i at =
      _mm256_mullo_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_set1_epi32(static_cast<int>(pair_stride)));
  for (std::int64_t p = 0; p < blocks; ++p) {
    const __m512 u = _mm512_div_ps(_mm512_loadu_ps(v + p * stride), unit);
    const __m256i words = _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(_mm512_mul_ps(u, _mm512_set1_ps(steps))));
    if (pair_stride == 1)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(pairs + p * 8), words);
    else
      _mm256_i32scatter_epi32(reinterpret_cast<int*>(pairs + p * 8 * pair_stride), at, words, 4);
  }
  return std::isfinite(norm) ? _mm512_cvtss_f32(unit) / steps : std::numeric_limits<float>::quiet_NaN();
}

// [cols/32][depth/2 pairs, and the factors][32]
std::int64_t block_size(std::int64_t depth) { return (depth / 2 + 1) * kThinWidth; }

std::int64_t expansion_size(std::int64_t cols, std::int64_t depth) {
  return (cols + kThinWidth - 1) / kThinWidth * block_size(depth);
}

void pack_expansion(const float* panels, std::int64_t cols, std::int64_t depth, float scale, std::uint32_t* words) {
  for (std::int64_t j = 0; j < cols; j += kThinWidth, words += block_size(depth)) {
    if (cols - j < kThinWidth) std::memset(words, 0, block_size(depth) * sizeof(*words));
    for (std::int64_t c = 0; c < kThinWidth && j + c < cols; ++c) {
      const float factor =
          scale * quantize(panels + (j + c) * kLanes, depth / kLanes, cols * kLanes, words + c, kThinWidth);
      std::memcpy(words + depth / 2 * kThinWidth + c, &factor, sizeof(factor));
    }
  }
}

struct Quantized {
  const std::uint32_t* pairs;  // (rows, depth/2)
  const float* factors;        // of the rows
};

// M rows of 32 columns.
template <int M, bool Add>
void expand_tile(const ThinExpansion& e, const Quantized& q, std::int64_t i, std::int64_t j) {
  const std::int64_t pairs = e.depth / 2;
  const std::uint32_t *panel = e.panels + j / kThinWidth * block_size(e.depth), *h = q.pairs + i * pairs;
  Target<M, Add> target(e, i, j);
  __m512i left[M], right[M];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) left[m] = right[m] = _mm512_setzero_si512();
  for (std::int64_t l = 0; l < pairs; ++l, panel += kThinWidth) {
    const __m512i panel_left = _mm512_loadu_si512(panel), panel_right = _mm512_loadu_si512(panel + 16);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const __m512i pair = _mm512_set1_epi32(static_cast<int>(h[m * pairs + l]));
      left[m] = _mm512_dpwssd_epi32(left[m], pair, panel_left);
      right[m] = _mm512_dpwssd_epi32(right[m], pair, panel_right);
    }
  }
  const __m512 factor_left = _mm512_loadu_ps(panel), factor_right = _mm512_loadu_ps(panel + 16);
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
    const __m512 factor = _mm512_set1_ps(q.factors[i + m]);
    target.put(m, {_mm512_mul_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(left[m]), factor_left), factor),
                   _mm512_mul_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(right[m]), factor_right), factor)});
  }
}

template <bool Add>
void expand_all(const ThinExpansion& e) {
  float factors[kThinRows];
  for (std::int64_t i = 0; i < e.rows; ++i)
    factors[i] = quantize(e.coefficients + i * e.depth, e.depth / kLanes, kLanes, e.scratch + i * (e.depth / 2), 1);
  const Quantized q = {e.scratch, factors};
  for (std::int64_t j = 0; j < e.cols; j += kThinWidth) {
    std::int64_t i = 0;
    for (; i + 8 <= e.rows; i += 8) expand_tile<8, Add>(e, q, i, j);
    for (; i < e.rows; ++i) expand_tile<1, Add>(e, q, i, j);
  }
}

void expand(const ThinExpansion& e) { e.base != nullptr ? expand_all<true>(e) : expand_all<false>(e); }

}  // namespace

const ThinKernels& avx512_bf16_thin() {
  static const ThinKernels kernels = {avx512_thin().contract, pack_pairs,     contract_pairs,
                                      expansion_size,         pack_expansion, expand};
  return kernels;
}

}  // namespace safelora::detail
