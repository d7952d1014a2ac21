// The projection on AMX tiles, at fp32-class accuracy from bf16 products: two passes over the weights, row by row.
//
// Every fp32 value v is split into hi + lo, both bf16. Pass 1, Yᵀ = BᵀV: V is kept as one dword per element, its two
// halves, and contracted over rows and halves with B, which carries the same bf16 in both halves, once its hi and once
// its lo part. Pass 2, out = V·Y: the hi and lo parts of V are separate tiles of 32 columns, in pairs. All four
// products are taken in both, but for those of a low tile of V that is zero. Rows are read in order, which is what
// hardware prefetchers follow; V lives in L1 for one cell.
#include <atomic>
#include <cstring>

#include "difference_rows.h"

namespace safelora::detail {
namespace {

constexpr int kTile = 256;  // dwords of a tile: 16 rows × 64 bytes
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

// GCC is not told that its tile loads read memory: stores to what they load must come before.
void order_stores() { std::atomic_signal_fence(std::memory_order_seq_cst); }

__m512i bits_of(__m512 v) { return _mm512_castps_si512(v); }

// v − its upper half, ready to be cut to bf16. A difference of two bf16 numbers rarely has more than 16 significant
// bits, so cutting is enough for them; other differences need rounding.
template <bool Round>
__m512i low_part(__m512 v, __m512i high) {
  const __m512i low = bits_of(_mm512_sub_ps(v, _mm512_castsi512_ps(high)));
  return Round ? _mm512_add_epi32(low, _mm512_set1_epi32(0x8000)) : low;
}

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

// Row r of a cell into row r of its tiles.
template <class Pass>
void convert(const Cells& cell, int r, std::uint32_t* tiles, Pass& pass) {
  cell.visit([&](auto rows) {
    const auto row = rows(r);
#pragma GCC unroll 4
    for (int g = 0; g < kGroups; ++g) {
      row.ask_ahead(g * kPairColumns);
      pass.template put<decltype(row)::kRound>(row(g * kPairColumns), tiles + r * 16 + g * 2 * kTile);
    }
  });
}

// hi rounded to nearest, lo = v − hi rounded; both in the upper half of a dword. One of them is NaN if v is: rounding
// up would carry the NaN of all ones, which GPUs make, over into zero.
void split(float v, std::uint32_t& high, std::uint32_t& low) {
  std::memcpy(&high, &v, 4);
  high = (v == v ? high + 0x7fff + ((high >> 16) & 1) : high) & 0xFFFF0000u;
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

bool any_bits(const std::uint32_t* tile) {
  __m512i bits = _mm512_setzero_si512();
  for (int i = 0; i < kTile; i += 16) bits = _mm512_or_si512(bits, _mm512_load_si512(tile + i));
  return _mm512_test_epi32_mask(bits, bits) != 0;
}

// out += V·Y for one group of 32 columns; tile 0 holds out. Close bf16 weights differ by one bf16 number: where that
// holds for a whole tile, its low part adds nothing.
void multiply2(const std::uint32_t* v, const std::uint32_t* y, bool low) {
  _tile_loadd(1, v, 64);
  _tile_loadd(2, y, 64);
  _tile_dpbf16ps(0, 1, 2);
  _tile_loadd(3, y + kTile, 64);
  _tile_dpbf16ps(0, 1, 3);
  if (!low) return;
  _tile_loadd(4, v + kTile, 64);
  _tile_dpbf16ps(0, 4, 2);
  _tile_dpbf16ps(0, 4, 3);
}

std::int64_t y_size(const RowLayer& layer) { return layer.panels * Cells::count(layer) * kCellTiles * kTile; }

double pass1(const RowLayer& layer, std::int64_t first, std::int64_t last, std::uint32_t* b_tiles, float* y) {
  const Tiles tiles;
  const std::int64_t cells = Cells::count(layer), total = (last - first) * cells;
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
    order_stores();
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
        convert(cell, 2 * n, fresh, pass);
        convert(cell, 2 * n + 1, fresh, pass);
      }
    }
    if (c == total) break;
    squares += _mm512_reduce_add_pd(_mm512_cvtps_pd(_mm512_castps512_ps256(pass.squares))) +
               _mm512_reduce_add_pd(_mm512_cvtps_pd(_mm512_extractf32x8_ps(pass.squares, 1)));
    cell.next();
  }
  return squares;
}

void join(const RowLayer& layer, const float* parts, std::int64_t count, std::uint32_t* y_tiles) {
  const std::int64_t size = y_size(layer);
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

void pass2(const RowLayer& layer, std::int64_t first, std::int64_t last, const std::uint32_t* y_tiles, float* out) {
  const Tiles tiles;
  const std::int64_t cells = Cells::count(layer), total = (last - first) * cells;
  alignas(64) std::uint32_t v[2][kCellTiles * kTile];
  Cells cell(layer, first);
  for (std::int64_t c = 0; c <= total; ++c) {
    const std::int64_t done = c - 1, block = first + done / cells, column = done % cells;
    std::uint32_t *fresh = v[c % 2], *ready = v[(c + 1) % 2];
    Pass2 pass;
    if (c < total) cell.begin();
    order_stores();
    bool low[kGroups] = {};
    for (int g = 0; c > 0 && g < kGroups; ++g) low[g] = any_bits(ready + (2 * g + 1) * kTile);
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
        if (c > 0) multiply2(ready + g * 2 * kTile, y + g * 2 * kTile, low[g]);
        if (p > 0 || c == total) continue;
        for (int r = 4 * g; r < 4 * g + 4; ++r) convert(cell, r, fresh, pass);
      }
      if (c > 0) _tile_stored(0, out_block, 64);
    }
    if (c < total) cell.next();
  }
}

}  // namespace

const RowKernels& amx_rows() {
  static const RowKernels kernels = {y_size, pass1, join, pass2};
  return kernels;
}

}  // namespace safelora::detail
