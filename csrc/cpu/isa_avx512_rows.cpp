// The projection in two passes over the weights, row by row, in fp32 on AVX-512.
//
// Pass 1, Yᵀ = BᵀV: V never leaves its registers, 16 columns of it times 16 entries of B add to 16 vectors of Yᵀ.
// Pass 2, out = V·Y: the entries of V are the scalars, so a cell of it lies in L1; the next cell is converted between
// the products of this one, because a core does not look far enough ahead to overlap the two by itself.
#include <cstddef>
#include <type_traits>

#include "difference_rows.h"

namespace safelora::detail {
namespace {

constexpr int kTile = 256;           // floats of a block of 16×16
constexpr int kTiles = 2 * kGroups;  // of a cell

std::int64_t y_size(const RowLayer& layer) { return layer.panels * Cells::count(layer) * kTiles * kTile; }

struct Squares {
  __m512d sum = _mm512_setzero_pd();
  void add(__m512 v) {
    sum = _mm512_add_pd(
        sum, _mm512_add_pd(_mm512_cvtps_pd(_mm512_castps512_ps256(v)), _mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1))));
  }
};

// One tile of Yᵀ += 16 rows of B, transposed, times 16 columns of V: half of a group of 32.
template <bool Second, class Rows>
__m512 multiply1(const Rows& rows, std::int64_t column, const float* b, float* y, bool accumulate) {
  __m512 sum[16], squares = _mm512_setzero_ps();
#pragma GCC unroll 16
  for (int k = 0; k < 16; ++k) sum[k] = accumulate ? _mm512_loadu_ps(y + k * 16) : _mm512_setzero_ps();
  for (int r = 0; r < 16; ++r) {
    const auto row = rows(r);
    const Pair pair = row(column);
    const __m512 v = Second ? pair.second : pair.first;
    if constexpr (Second) row.ask_ahead(column);
    squares = _mm512_fmadd_ps(v, v, squares);
#pragma GCC unroll 16
    for (int k = 0; k < 16; ++k) sum[k] = _mm512_fmadd_ps(_mm512_set1_ps(b[r * 16 + k]), v, sum[k]);
  }
#pragma GCC unroll 16
  for (int k = 0; k < 16; ++k) _mm512_storeu_ps(y + k * 16, sum[k]);
  return squares;
}

double pass1(const RowLayer& layer, std::int64_t first, std::int64_t last, std::uint32_t*, float* y) {
  const std::int64_t cells = Cells::count(layer);
  Cells cell(layer, first);
  Squares squares;
  for (std::int64_t block = first; block < last; ++block)
    for (std::int64_t c = 0; c < cells; ++c, cell.next()) {
      cell.begin();
      cell.visit([&](auto rows) {
        for (int g = 0; g < kGroups; ++g)
          for (std::int64_t p = 0; p < layer.panels; ++p) {
            const float* b = layer.b + (p * layer.row_blocks + block) * kTile;
            float* tile = y + ((p * cells + c) * kTiles + 2 * g) * kTile;
            const __m512 one = multiply1<false>(rows, g * kPairColumns, b, tile, block > first);
            const __m512 two = multiply1<true>(rows, g * kPairColumns, b, tile + kTile, block > first);
            if (p == 0) squares.add(_mm512_add_ps(one, two));
          }
      });
    }
  return _mm512_reduce_add_pd(squares.sum);
}

void join(const RowLayer& layer, const float* parts, std::int64_t count, std::uint32_t* y) {
  const std::int64_t size = y_size(layer);
  alignas(64) float sum[kTile];
  for (std::int64_t at = 0; at < size; at += kTile, y += kTile) {
    for (int i = 0; i < kTile; i += 16) {
      __m512 total = _mm512_loadu_ps(parts + at + i);
      for (std::int64_t q = 1; q < count; ++q) total = _mm512_add_ps(total, _mm512_loadu_ps(parts + q * size + at + i));
      _mm512_store_ps(sum + i, total);
    }
    for (int j = 0; j < 16; ++j)
      for (int k = 0; k < 16; ++k) std::memcpy(y + j * 16 + k, sum + k * 16 + j, 4);
  }
}

// 32 columns of one row of the cell that comes next.
template <class Rows>
void convert(const Rows& rows, int part, float* v) {
  const int r = part / kGroups, g = part % kGroups;
  const auto row = rows(r);
  const Pair pair = row(g * kPairColumns);
  row.ask_ahead(g * kPairColumns);
  _mm512_store_ps(v + r * kCell + g * kPairColumns, pair.first);
  _mm512_store_ps(v + r * kCell + g * kPairColumns + 16, pair.second);
}

// 16 rows of out (+)= a cell of V times its 128 rows of Y; `fresh` receives the cell of `rows` meanwhile.
template <class Rows>
void multiply2(const float* v, const std::uint32_t* y, float* out, bool accumulate, const Rows& rows, float* fresh) {
  constexpr int kColumns = kCell / (16 * kGroups);  // multiplied per converted part
  __m512 sum[16];
#pragma GCC unroll 16
  for (int r = 0; r < 16; ++r) sum[r] = accumulate ? _mm512_loadu_ps(out + r * 16) : _mm512_setzero_ps();
  for (int part = 0; part < 16 * kGroups; ++part) {
    if constexpr (!std::is_same_v<Rows, std::nullptr_t>) convert(rows, part, fresh);
#pragma GCC unroll 2
    for (int c = part * kColumns; c < (part + 1) * kColumns; ++c) {
      const __m512 y_row = _mm512_castsi512_ps(_mm512_loadu_si512(y + c * 16));
#pragma GCC unroll 16
      for (int r = 0; r < 16; ++r) sum[r] = _mm512_fmadd_ps(_mm512_set1_ps(v[r * kCell + c]), y_row, sum[r]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < 16; ++r) _mm512_storeu_ps(out + r * 16, sum[r]);
}

void pass2(const RowLayer& layer, std::int64_t first, std::int64_t last, const std::uint32_t* y, float* out) {
  const std::int64_t cells = Cells::count(layer), total = (last - first) * cells;
  if (total == 0) return;
  alignas(64) float v[2][16 * kCell];
  Cells cell(layer, first);
  cell.begin();
  cell.visit([&](auto rows) {
    for (int part = 0; part < 16 * kGroups; ++part) convert(rows, part, v[0]);
  });
  for (std::int64_t c = 0; c < total; ++c) {
    const std::int64_t block = first + c / cells, column = c % cells;
    for (std::int64_t p = 0; p < layer.panels; ++p) {
      const auto multiply = [&](auto rows) {
        multiply2(v[c % 2], y + (p * cells + column) * kTiles * kTile, out + (p * layer.row_blocks + block) * kTile,
                  column > 0, rows, v[(c + 1) % 2]);
      };
      if (p > 0 || c + 1 == total) {
        multiply(nullptr);
        continue;
      }
      cell.next();
      cell.begin();
      cell.visit(multiply);
    }
  }
}

}  // namespace

const RowKernels& avx512_rows() {
  static const RowKernels kernels = {y_size, pass1, join, pass2};
  return kernels;
}

}  // namespace safelora::detail
