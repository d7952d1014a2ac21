// The projection on AMX tiles, at fp32-class accuracy from bf16 products: two passes over the weights, row by row.
//
// Every fp32 value v is split into hi + lo, both bf16. Pass 1, Yᵀ = BᵀV: V is kept as one dword per element, its two
// halves, and contracted over rows and halves with B, which carries the same bf16 in both halves, once its hi and once
// its lo part. Pass 2, out = V·Y: the hi and lo parts of V are separate tiles of 32 columns, in pairs. All four
// products are taken in both. Rows are read in order, which is what hardware prefetchers follow; V lives in L1 for one
// cell.
#include <immintrin.h>

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "isa.h"

namespace safelora::detail {
namespace {

constexpr int kTile = 256;                    // dwords of a tile: 16 rows × 64 bytes
constexpr int kGroups = 4;                    // groups of 32 columns in a cell
constexpr std::int64_t kCell = 32 * kGroups;  // columns of a cell; its rows are 16
constexpr std::int64_t kPrefetchBytes = 256;  // ahead along the row
constexpr int kCellTiles = 2 * kGroups;

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

class Tiles {
 public:
  Tiles() {
    static const TileConfig config;
    _tile_loadconfig(&config);
  }
  ~Tiles() { _tile_release(); }
};

// a function: a constant of vector type would be initialised at load time, on CPUs without AVX-512 too
__m512i high_half() { return _mm512_set1_epi32(static_cast<int>(0xFFFF0000u)); }
__m512i bits_of(__m512 v) { return _mm512_castps_si512(v); }

// v − its upper half, ready to be cut to bf16. A difference of two bf16 numbers rarely has more than 16 significant
// bits, so cutting is enough for them; other differences need rounding.
template <bool Round>
__m512i low_part(__m512 v, __m512i high) {
  const __m512i low = bits_of(_mm512_sub_ps(v, _mm512_castsi512_ps(high)));
  return Round ? _mm512_add_epi32(low, _mm512_set1_epi32(0x8000)) : low;
}

// 32 columns of V in two vectors, whose lanes are the pairs of pass 2. Which columns make a pair is free: neighbours
// where both weights are bf16 (one load and two shifts), columns 16 apart otherwise.
struct Pair {
  __m512 first, second;
};

struct Bf16Row {
  static constexpr bool kRound = false;
  const std::uint16_t *a, *b;
  Pair operator()(std::int64_t j) const {
    const __m512i x = _mm512_loadu_si512(a + j), y = _mm512_loadu_si512(b + j);
    return {_mm512_sub_ps(_mm512_castsi512_ps(_mm512_slli_epi32(x, 16)), _mm512_castsi512_ps(_mm512_slli_epi32(y, 16))),
            _mm512_sub_ps(_mm512_castsi512_ps(_mm512_and_si512(x, high_half())),
                          _mm512_castsi512_ps(_mm512_and_si512(y, high_half())))};
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
  Pair operator()(std::int64_t j) const {
    return {_mm512_sub_ps(load16(a + j), load16(b + j)), _mm512_sub_ps(load16(a + j + 16), load16(b + j + 16))};
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
};

// Pass 1: hi | lo of each element, a tile per vector; and the squares of V.
struct Pass1 {
  __m512 squares = _mm512_setzero_ps();
  template <bool Round>
  void put(Pair v, std::uint32_t* tiles) {
    squares = _mm512_fmadd_ps(v.first, v.first, squares);
    squares = _mm512_fmadd_ps(v.second, v.second, squares);
    for (const __m512 x : {v.first, v.second}) {
      const __m512i high = _mm512_and_si512(bits_of(x), high_half());
      _mm512_store_si512(tiles, _mm512_or_si512(high, _mm512_srli_epi32(low_part<Round>(x, high), 16)));
      tiles += kTile;
    }
  }
};

// Pass 2: the hi parts of a pair in one dword, the lo parts in another.
struct Pass2 {
  template <bool Round>
  void put(Pair v, std::uint32_t* tiles) {
    const __m512i high1 = _mm512_and_si512(bits_of(v.first), high_half());
    const __m512i high2 = _mm512_and_si512(bits_of(v.second), high_half());
    const __m512i low1 = low_part<Round>(v.first, high1), low2 = low_part<Round>(v.second, high2);
    _mm512_store_si512(tiles, _mm512_or_si512(high2, _mm512_srli_epi32(high1, 16)));
    _mm512_store_si512(tiles + kTile,
                       _mm512_or_si512(_mm512_and_si512(low2, high_half()), _mm512_srli_epi32(low1, 16)));
  }
};

// Cells of 16 rows × 128 columns, in the order of memory.
class Cells {
 public:
  Cells(const AmxLayer& layer, std::int64_t first_block) : layer_(layer), block_(first_block) {
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

  // Row r of the cell into row r of its tiles.
  template <class Pass>
  void convert(int r, std::uint32_t* tiles, Pass& pass) const {
    if (!inner_) return convert_row(BlockRow{edge_[r], neighbours_}, nullptr, nullptr, tiles + r * 16, pass);
    const std::int64_t row = block_ * 16 + r;
    const std::int64_t a = row * layer_.aligned.row_stride + column_, b = row * layer_.base.row_stride + column_;
    switch (layer_.aligned.dtype) {
      case DType::bf16:
        return convert_row(Bf16Row{at<std::uint16_t>(layer_.aligned, a), at<std::uint16_t>(layer_.base, b)},
                           tiles + r * 16, pass);
      case DType::f16:
        return convert_row(
            PlainRow<std::uint16_t>{at<std::uint16_t>(layer_.aligned, a), at<std::uint16_t>(layer_.base, b)},
            tiles + r * 16, pass);
      default:
        return convert_row(PlainRow<float>{at<float>(layer_.aligned, a), at<float>(layer_.base, b)}, tiles + r * 16,
                           pass);
    }
  }

 private:
  template <class S>
  static const S* at(const ConstMatrix& m, std::int64_t offset) {
    return static_cast<const S*>(m.data) + offset;
  }
  template <class Row, class Pass>
  static void convert_row(const Row& row, std::uint32_t* tiles, Pass& pass) {
    convert_row(row, reinterpret_cast<const char*>(row.a), reinterpret_cast<const char*>(row.b), tiles, pass);
  }
  template <class Row, class Pass>
  static void convert_row(const Row& row, const char* a, const char* b, std::uint32_t* tiles, Pass& pass) {
#pragma GCC unroll 4
    for (int g = 0; g < kGroups; ++g) {
      if constexpr (!std::is_same_v<Row, BlockRow>) {
        constexpr int kBytes = 32 * sizeof(*row.a);
#pragma GCC unroll 2
        for (int line = 0; line < kBytes; line += 64) {
          _mm_prefetch(a + g * kBytes + line + kPrefetchBytes, _MM_HINT_T1);
          _mm_prefetch(b + g * kBytes + line + kPrefetchBytes, _MM_HINT_T1);
        }
      }
      pass.template put<Row::kRound>(row(g * 32), tiles + g * 2 * kTile);
    }
  }

  const AmxLayer& layer_;
  std::int64_t block_, column_ = 0;
  bool plain_ = false, neighbours_ = false, inner_ = false;
  alignas(64) float edge_[16][kCell];
};

// hi rounded to nearest, lo = v − hi rounded; both in the upper half of a dword
void split(float v, std::uint32_t& high, std::uint32_t& low) {
  std::memcpy(&high, &v, 4);
  high = (high + 0x7fff + ((high >> 16) & 1)) & 0xFFFF0000u;
  float rest;
  std::memcpy(&rest, &high, 4);
  rest = v - rest;
  std::memcpy(&low, &rest, 4);
  low = (low + 0x8000) & 0xFFFF0000u;
}

// 16 rows of a panel of B as the two operands of pass 1: [rank][row], each bf16 doubled.
void pack_b(const float* rows, std::uint32_t* tiles) {
  for (int i = 0; i < 16; ++i)
    for (int m = 0; m < 16; ++m) {
      std::uint32_t high, low;
      split(rows[i * kLanes + m], high, low);
      tiles[m * 16 + i] = high | high >> 16;
      tiles[kTile + m * 16 + i] = low | low >> 16;
    }
}

// Yᵀ += BᵀV for one tile of 16 columns; tiles 4 and 5 hold B.
void multiply1(const std::uint32_t* v, float* y, bool accumulate) {
  if (accumulate)
    _tile_loadd(0, y, 64);
  else
    _tile_zero(0);
  _tile_loadd(6, v, 64);
  _tile_dpbf16ps(0, 4, 6);
  _tile_dpbf16ps(0, 5, 6);
  _tile_stored(0, y, 64);
}

// out += V·Y for one group of 32 columns; tile 0 holds out.
void multiply2(const std::uint32_t* v, const std::uint32_t* y) {
  _tile_loadd(1, v, 64);
  _tile_loadd(2, y, 64);
  _tile_dpbf16ps(0, 1, 2);
  _tile_loadd(3, y + kTile, 64);
  _tile_dpbf16ps(0, 1, 3);
  _tile_loadd(4, v + kTile, 64);
  _tile_dpbf16ps(0, 4, 2);
  _tile_dpbf16ps(0, 4, 3);
}

std::int64_t cells_of(const AmxLayer& layer) { return (layer.aligned.cols + kCell - 1) / kCell; }

}  // namespace

std::int64_t amx_y_size(const AmxLayer& layer) { return layer.panels * cells_of(layer) * kCellTiles * kTile; }

double amx_pass1(const AmxLayer& layer, std::int64_t first, std::int64_t last, std::uint32_t* b_tiles, float* y) {
  const Tiles tiles;
  const std::int64_t cells = cells_of(layer), total = (last - first) * cells;
  alignas(64) std::uint32_t v[2][kCellTiles * kTile];
  Cells cell(layer, first);
  double squares = 0;
  // The products of a cell are issued between the conversions of the next one's rows: tile unit, vector units and
  // memory work at the same time, and stores have retired before their tiles are loaded.
  for (std::int64_t c = 0; c <= total; ++c) {
    const std::int64_t done = c - 1, block = first + done / cells, column = done % cells;
    std::uint32_t *fresh = v[c % 2], *ready = v[(c + 1) % 2];
    Pass1 pass;
    if (c < total) cell.begin();
    for (std::int64_t p = 0; c > 0 && column == 0 && p < layer.panels; ++p)
      pack_b(layer.b + (p * layer.row_blocks + block) * kTile, b_tiles + p * 2 * kTile);
    for (std::int64_t p = 0; p < (c > 0 ? layer.panels : 1); ++p) {
      float* y_cell = y + (p * cells + column) * kCellTiles * kTile;
      const std::uint32_t* b = b_tiles + p * 2 * kTile;
      if (c > 0 && (column == 0 || layer.panels > 1)) {
        _tile_loadd(4, b, 64);
        _tile_loadd(5, b + kTile, 64);
      }
      for (int n = 0; n < kCellTiles; ++n) {
        if (c > 0) multiply1(ready + n * kTile, y_cell + n * kTile, block > first);
        if (p > 0 || c == total) continue;
        cell.convert(2 * n, fresh, pass);
        cell.convert(2 * n + 1, fresh, pass);
      }
    }
    if (c == total) break;
    squares += _mm512_reduce_add_pd(_mm512_cvtps_pd(_mm512_castps512_ps256(pass.squares))) +
               _mm512_reduce_add_pd(_mm512_cvtps_pd(_mm512_extractf32x8_ps(pass.squares, 1)));
    cell.next();
  }
  return squares;
}

void amx_join(const AmxLayer& layer, const float* parts, std::int64_t count, std::uint32_t* y_tiles) {
  const std::int64_t size = amx_y_size(layer);
  alignas(64) float sum[2 * kTile];
  for (std::int64_t at = 0; at < size; at += 2 * kTile, y_tiles += 2 * kTile) {
    for (int i = 0; i < 2 * kTile; i += 16) {
      __m512 total = _mm512_loadu_ps(parts + at + i);
      for (std::int64_t q = 1; q < count; ++q) total = _mm512_add_ps(total, _mm512_loadu_ps(parts + q * size + at + i));
      _mm512_store_ps(sum + i, total);
    }
    for (int j = 0; j < 16; ++j)
      for (int m = 0; m < 16; ++m) {
        std::uint32_t high1, low1, high2, low2;
        split(sum[m * 16 + j], high1, low1);
        split(sum[kTile + m * 16 + j], high2, low2);
        y_tiles[j * 16 + m] = high2 | high1 >> 16;
        y_tiles[kTile + j * 16 + m] = low2 | low1 >> 16;
      }
  }
}

void amx_pass2(const AmxLayer& layer, std::int64_t first, std::int64_t last, const std::uint32_t* y_tiles, float* out) {
  const Tiles tiles;
  const std::int64_t cells = cells_of(layer), total = (last - first) * cells;
  alignas(64) std::uint32_t v[2][kCellTiles * kTile];
  Cells cell(layer, first);
  for (std::int64_t c = 0; c <= total; ++c) {
    const std::int64_t done = c - 1, block = first + done / cells, column = done % cells;
    std::uint32_t *fresh = v[c % 2], *ready = v[(c + 1) % 2];
    Pass2 pass;
    if (c < total) cell.begin();
    for (std::int64_t p = 0; p < (c > 0 ? layer.panels : 1); ++p) {
      const std::uint32_t* y = y_tiles + (p * cells + column) * kCellTiles * kTile;
      float* out_block = out + (p * layer.row_blocks + block) * kTile;
      if (c > 0) {
        if (column == 0)
          _tile_zero(0);
        else
          _tile_loadd(0, out_block, 64);
      }
      for (int g = 0; g < kGroups; ++g) {
        if (c > 0) multiply2(ready + g * 2 * kTile, y + g * 2 * kTile);
        if (p > 0 || c == total) continue;
        for (int r = 4 * g; r < 4 * g + 4; ++r) cell.convert(r, fresh, pass);
      }
      if (c > 0) _tile_stored(0, out_block, 64);
    }
    if (c < total) cell.next();
  }
}

}  // namespace safelora::detail
