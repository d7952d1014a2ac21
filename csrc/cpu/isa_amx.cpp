// The projection on AMX tiles, at fp32-class accuracy from bf16 products.
//
// v is split into hi + lo, both bf16, stored as one dword per element: V is then a tile that serves as the B operand of
// phase 1 (Yᵀ = BᵀV, contracting rows and halves) and as the A operand of phase 2 (V·Y, contracting columns and halves)
// without being laid out twice. The other operand carries the same bf16 in both halves, once for its hi and once for
// its lo part: (v_hi + v_lo)·(b_hi + b_lo), all four products.
#include <immintrin.h>

#include <algorithm>
#include <cstring>

#include "isa.h"

namespace safelora::detail {
namespace {

constexpr int kTile = 256;  // dwords of a tile: 16 rows × 64 bytes

struct alignas(64) TileConfig {
  std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
  std::uint16_t bytes_per_row[16] = {};
  std::uint8_t rows[16] = {};
  TileConfig() {
    for (int t = 0; t < 8; ++t) {
      bytes_per_row[t] = 64;
      rows[t] = 16;
    }
  }
};

// a function: a constant of vector type would be initialised at load time, on CPUs without AVX-512 too
__m512i high_half() { return _mm512_set1_epi32(static_cast<int>(0xFFFF0000u)); }

// hi = v truncated to bf16 in the upper half, lo = v − hi in the lower half: 16 significant bits. A difference of two
// bf16 numbers rarely has more, so truncating lo is enough for them; other differences need it rounded.
template <bool RoundLow>
__m512i split(__m512 v) {
  const __m512i high = _mm512_and_si512(_mm512_castps_si512(v), high_half());
  const __m512 low = _mm512_sub_ps(v, _mm512_castsi512_ps(high));
  __m512i low_bits = _mm512_castps_si512(low);
  if constexpr (RoundLow) low_bits = _mm512_add_epi32(low_bits, _mm512_set1_epi32(0x8000));
  return _mm512_or_si512(high, _mm512_srli_epi32(low_bits, 16));
}

// hi rounded to nearest, lo = v − hi rounded; each doubled into both halves of its dword
void split_doubled(float v, std::uint32_t& high, std::uint32_t& low) {
  std::uint32_t bits;
  std::memcpy(&bits, &v, 4);
  bits = (bits + 0x7fff + ((bits >> 16) & 1)) & 0xFFFF0000u;
  float rest;
  std::memcpy(&rest, &bits, 4);
  rest = v - rest;
  high = bits | bits >> 16;
  std::memcpy(&bits, &rest, 4);
  bits = (bits + 0x8000) & 0xFFFF0000u;
  low = bits | bits >> 16;
}

struct Squares {
  __m512d sum = _mm512_setzero_pd();
  void add(__m512 lanes) {
    sum = _mm512_add_pd(sum, _mm512_cvtps_pd(_mm512_castps512_ps256(lanes)));
    sum = _mm512_add_pd(sum, _mm512_cvtps_pd(_mm512_extractf32x8_ps(lanes, 1)));
  }
};

__m512 load16(const float* p) { return _mm512_loadu_ps(p); }
__m512 load16(const std::uint16_t* p) {  // fp16
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

// One row of N×16 columns of V = a − b, split, into row `r` of N consecutive tiles.
template <int N>
void convert_row_bf16(const std::uint16_t* a, const std::uint16_t* b, std::uint32_t* tiles, __m512& squares) {
#pragma GCC unroll 4
  for (int n = 0; n < N; n += 2) {
    // 32 columns: the even ones go to tile n, the odd ones to n + 1. The order of columns inside a strip is free.
    const __m512i x = _mm512_loadu_si512(a + n * 16), y = _mm512_loadu_si512(b + n * 16);
    const __m512 even =
        _mm512_sub_ps(_mm512_castsi512_ps(_mm512_slli_epi32(x, 16)), _mm512_castsi512_ps(_mm512_slli_epi32(y, 16)));
    const __m512 odd = _mm512_sub_ps(_mm512_castsi512_ps(_mm512_and_si512(x, high_half())),
                                     _mm512_castsi512_ps(_mm512_and_si512(y, high_half())));
    squares = _mm512_fmadd_ps(even, even, squares);
    squares = _mm512_fmadd_ps(odd, odd, squares);
    _mm512_store_si512(tiles + n * kTile, split<false>(even));
    _mm512_store_si512(tiles + (n + 1) * kTile, split<false>(odd));
  }
}

template <int N, class S>
void convert_row(const S* a, const S* b, std::uint32_t* tiles, __m512& squares) {
#pragma GCC unroll 4
  for (int n = 0; n < N; ++n) {
    const __m512 v = _mm512_sub_ps(load16(a + n * 16), load16(b + n * 16));
    squares = _mm512_fmadd_ps(v, v, squares);
    _mm512_store_si512(tiles + n * kTile, split<true>(v));
  }
}

// Rows ahead of the conversion whose cache lines are asked for: far enough for DRAM, near enough that rows 8 KiB apart,
// which share a few cache sets, do not push each other out.
constexpr std::int64_t kPrefetchRows = 16;

template <int N, class S>
void convert_block(const AmxStrip& s, std::int64_t i0, std::int64_t j0, std::uint32_t* tiles, Squares& sum) {
  const S* a = static_cast<const S*>(s.aligned.data) + i0 * s.aligned.row_stride + j0;
  const S* b = static_cast<const S*>(s.base.data) + i0 * s.base.row_stride + j0;
  constexpr int kLine = 64 / sizeof(S);
  __m512 squares = _mm512_setzero_ps();
  for (int r = 0; r < 16; ++r, a += s.aligned.row_stride, b += s.base.row_stride) {
    const S* next_a = a + kPrefetchRows * s.aligned.row_stride;
    const S* next_b = b + kPrefetchRows * s.base.row_stride;
#pragma GCC unroll 4
    for (int c = 0; c < N * 16; c += kLine) {
      _mm_prefetch(reinterpret_cast<const char*>(next_a + c), _MM_HINT_T1);
      _mm_prefetch(reinterpret_cast<const char*>(next_b + c), _MM_HINT_T1);
    }
    if constexpr (N >= 2 && sizeof(S) == 2)
      s.aligned.dtype == DType::bf16 ? convert_row_bf16<N>(a, b, tiles + r * 16, squares)
                                     : convert_row<N>(a, b, tiles + r * 16, squares);
    else
      convert_row<N>(a, b, tiles + r * 16, squares);
  }
  sum.add(squares);
}

// Any strides, dtypes and edges: through a zero-padded fp32 block. `even_odd`: in convert_row_bf16's order of columns.
template <int N>
void convert_block_any(const AmxStrip& s, std::int64_t i0, std::int64_t j0, bool even_odd, std::uint32_t* tiles,
                       double& squares) {
  alignas(64) float block[16][N * 16] = {};
  const std::int64_t rows = std::min<std::int64_t>(16, s.aligned.rows - i0);
  const std::int64_t cols = std::min<std::int64_t>(N * 16, s.aligned.cols - j0);
  squares += avx512_table().f32.load_difference(s.aligned, s.base, i0, rows, j0, cols, block[0], N * 16);
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i step = _mm512_set1_epi32(even_odd ? 2 : 1);
  for (int r = 0; r < 16; ++r)
    for (int n = 0; n < N; ++n) {
      const int first = even_odd ? n / 2 * 32 + n % 2 : n * 16;
      const __m512i index = _mm512_add_epi32(_mm512_mullo_epi32(lane, step), _mm512_set1_epi32(first));
      _mm512_store_si512(tiles + n * kTile + r * 16, split<true>(_mm512_i32gather_ps(index, block[r], 4)));
    }
}

// Tiles 0–3 accumulate Yᵀ for up to 4 column tiles over one block of 16 rows.
template <int N>
void phase1_block(const std::uint32_t* b, const std::uint32_t* v) {
  _tile_loadd(4, b, 64);
  _tile_loadd(5, b + kTile, 64);
  _tile_loadd(6, v, 64);
  _tile_dpbf16ps(0, 4, 6);
  _tile_dpbf16ps(0, 5, 6);
  if constexpr (N > 1) {
    _tile_loadd(7, v + kTile, 64);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(1, 5, 7);
  }
  if constexpr (N > 2) {
    _tile_loadd(6, v + 2 * kTile, 64);
    _tile_dpbf16ps(2, 4, 6);
    _tile_dpbf16ps(2, 5, 6);
    _tile_loadd(7, v + 3 * kTile, 64);
    _tile_dpbf16ps(3, 4, 7);
    _tile_dpbf16ps(3, 5, 7);
  }
}

template <int N>
void phase1_begin() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

// Yᵀ (16 ranks × 16 columns per tile) → the doubled hi and lo operands of phase 2, [column][rank].
template <int N>
void phase1_end(std::uint32_t (*y)[2][kTile]) {
  alignas(64) float transposed[4][kTile];
  _tile_stored(0, transposed[0], 64);
  _tile_stored(1, transposed[1], 64);
  _tile_stored(2, transposed[2], 64);
  _tile_stored(3, transposed[3], 64);
  for (int n = 0; n < N; ++n)
    for (int j = 0; j < 16; ++j)
      for (int m = 0; m < 16; ++m) split_doubled(transposed[n][m * 16 + j], y[n][0][j * 16 + m], y[n][1][j * 16 + m]);
}

template <int N>
void phase2_block(const std::uint32_t (*y)[2][kTile], const std::uint32_t* v, float* c, bool accumulate) {
  if (accumulate)
    _tile_loadd(0, c, 64);
  else
    _tile_zero(0);
  for (int n = 0; n < N; ++n) {
    _tile_loadd(4, y[n][0], 64);
    _tile_loadd(5, y[n][1], 64);
    _tile_loadd(6, v + n * kTile, 64);
    _tile_dpbf16ps(0, 6, 4);
    _tile_dpbf16ps(0, 6, 5);
  }
  _tile_stored(0, c, 64);
}

// Four blocks at once: four independent accumulators, and Y loaded once for the four.
template <int N>
void phase2_blocks(const std::uint32_t (*y)[2][kTile], const std::uint32_t* v, float* c, bool accumulate) {
  if (accumulate) {
    _tile_loadd(0, c, 64);
    _tile_loadd(1, c + kTile, 64);
    _tile_loadd(2, c + 2 * kTile, 64);
    _tile_loadd(3, c + 3 * kTile, 64);
  } else {
    phase1_begin<N>();
  }
  for (int n = 0; n < N; ++n) {
    const std::uint32_t* tile = v + n * kTile;
    _tile_loadd(4, y[n][0], 64);
    _tile_loadd(5, y[n][1], 64);
    _tile_loadd(6, tile, 64);
    _tile_dpbf16ps(0, 6, 4);
    _tile_dpbf16ps(0, 6, 5);
    _tile_loadd(7, tile + N * kTile, 64);
    _tile_dpbf16ps(1, 7, 4);
    _tile_dpbf16ps(1, 7, 5);
    _tile_loadd(6, tile + 2 * N * kTile, 64);
    _tile_dpbf16ps(2, 6, 4);
    _tile_dpbf16ps(2, 6, 5);
    _tile_loadd(7, tile + 3 * N * kTile, 64);
    _tile_dpbf16ps(3, 7, 4);
    _tile_dpbf16ps(3, 7, 5);
  }
  _tile_stored(0, c, 64);
  _tile_stored(1, c + kTile, 64);
  _tile_stored(2, c + 2 * kTile, 64);
  _tile_stored(3, c + 3 * kTile, 64);
}

template <int N>
double strip(const AmxStrip& s, std::int64_t j0, bool accumulate) {
  const bool inner = j0 + N * 16 <= s.aligned.cols && s.aligned.col_stride == 1 && s.base.col_stride == 1 &&
                     s.aligned.dtype == s.base.dtype && !(N == 1 && s.aligned.dtype == DType::bf16);
  const bool even_odd = N >= 2 && inner && s.aligned.dtype == DType::bf16;
  Squares sum;
  double squares = 0;
  phase1_begin<N>();
  // One block behind the conversion, so that the tile loads find its stores retired.
  for (std::int64_t ib = 0; ib <= s.row_blocks; ++ib) {
    if (ib < s.row_blocks) {
      std::uint32_t* tiles = s.v_tiles + ib * N * kTile;
      if (!inner || ib * 16 + 16 > s.aligned.rows)
        convert_block_any<N>(s, ib * 16, j0, even_odd, tiles, squares);
      else if (s.aligned.dtype == DType::f32)
        convert_block<N, float>(s, ib * 16, j0, tiles, sum);
      else
        convert_block<N, std::uint16_t>(s, ib * 16, j0, tiles, sum);
    }
    if (ib > 0) phase1_block<N>(s.b_tiles + (ib - 1) * 2 * kTile, s.v_tiles + (ib - 1) * N * kTile);
  }
  for (std::int64_t p = 0; p < s.panels; ++p) {
    if (p > 0) {
      const std::uint32_t* b = s.b_tiles + p * s.row_blocks * 2 * kTile;
      phase1_begin<N>();
      for (std::int64_t ib = 0; ib < s.row_blocks; ++ib)
        phase1_block<N>(b + ib * 2 * kTile, s.v_tiles + ib * N * kTile);
    }
    alignas(64) std::uint32_t y[4][2][kTile];
    phase1_end<N>(y);
    float* c = s.accumulator + p * s.row_blocks * kTile;
    // backwards: what was converted last is still in L2
    std::int64_t ib = s.row_blocks;
    for (; ib % 4 != 0; --ib) phase2_block<N>(y, s.v_tiles + (ib - 1) * N * kTile, c + (ib - 1) * kTile, accumulate);
    for (; ib > 0; ib -= 4) phase2_blocks<N>(y, s.v_tiles + (ib - 4) * N * kTile, c + (ib - 4) * kTile, accumulate);
  }
  return squares + _mm512_reduce_add_pd(sum.sum);
}

}  // namespace

void amx_begin() {
  static const TileConfig config;
  _tile_loadconfig(&config);
}

void amx_end() { _tile_release(); }

void amx_pack_b(const float* panel, std::int64_t rows, std::uint32_t* tiles) {
  std::memset(tiles, 0, static_cast<std::size_t>((rows + 15) / 16) * 2 * kTile * sizeof *tiles);
  for (std::int64_t i = 0; i < rows; ++i) {
    std::uint32_t* block = tiles + i / 16 * 2 * kTile;
    for (int m = 0; m < 16; ++m)
      split_doubled(panel[i * kLanes + m], block[m * 16 + i % 16], block[kTile + m * 16 + i % 16]);
  }
}

double amx_strip(const AmxStrip& s, std::int64_t j0, int tiles, bool accumulate) {
  switch (tiles) {
    case 1: return strip<1>(s, j0, accumulate);
    case 2: return strip<2>(s, j0, accumulate);
    default: return strip<4>(s, j0, accumulate);
  }
}

}  // namespace safelora::detail
