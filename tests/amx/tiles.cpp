// LDTILECFG, TILERELEASE, TILEZERO, TILELOADD, TILESTORED and TDPBF16PS as the Intel 64 and IA-32 Architectures
// Software Developer's Manual defines them (volume 2), palette 1. What raises an exception there is noted as a fault
// here, and the instruction does nothing. Stricter than hardware in two points: a tile must be written before it is
// read, and configured tiles must be released before they are configured again.
#include "tiles.h"

#include <immintrin.h>

#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

constexpr int kTiles = 8, kRows = 16, kRowBytes = 64;

std::atomic<const char*> first_fault{nullptr};
std::atomic<long> products{0};

bool fault(const char* what) {
  const char* none = nullptr;
  first_fault.compare_exchange_strong(none, what);
  return false;
}

struct Tile {
  int rows = 0, row_bytes = 0;
  bool written = false;
  alignas(64) unsigned char data[kRows][kRowBytes] = {};
};

struct State {
  bool configured = false;
  Tile tiles[kTiles];
};
thread_local State state;

// The tile, if it exists and has a shape; null after a fault.
Tile* shaped(int tile) {
  if (!state.configured) return fault("a tile is used while none is configured"), nullptr;
  if (tile < 0 || tile >= kTiles) return fault("there are tiles 0 to 7"), nullptr;
  if (state.tiles[tile].rows == 0) return fault("a tile is used that has no shape"), nullptr;
  return &state.tiles[tile];
}

Tile* readable(int tile) {
  Tile* found = shaped(tile);
  if (found != nullptr && !found->written) return fault("a tile is read before it is written"), nullptr;
  return found;
}

void clear(Tile& tile) { std::memset(tile.data, 0, sizeof tile.data); }

float widened(std::uint32_t upper_half) {
  float value;
  std::memcpy(&value, &upper_half, 4);
  return value;
}

// Inputs and results below the normal range are zero, and rounding goes to nearest even, whatever the caller set.
class TileArithmetic {
 public:
  TileArithmetic() { _mm_setcsr(0x9FC0); }
  ~TileArithmetic() { _mm_setcsr(before_); }

 private:
  const unsigned before_ = _mm_getcsr();
};

// Not inlined, so that no operation leaves the scope in which the rounding is set.
__attribute__((noinline)) void multiply(Tile& sum, const Tile& a, const Tile& b) {
  const int pairs = a.row_bytes / 4, columns = sum.row_bytes / 4;
  std::uint32_t left[kRows], right[kRows];
  float out[kRows];
  for (int m = 0; m < sum.rows; ++m) {
    std::memcpy(left, a.data[m], kRowBytes);
    float even[kRows] = {}, odd[kRows] = {};
    for (int k = 0; k < pairs; ++k) {
      std::memcpy(right, b.data[k], kRowBytes);
      const float left_even = widened(left[k] << 16), left_odd = widened(left[k] & 0xFFFF0000u);
      for (int n = 0; n < kRows; ++n) {
        even[n] = std::fma(left_even, widened(right[n] << 16), even[n]);
        odd[n] = std::fma(left_odd, widened(right[n] & 0xFFFF0000u), odd[n]);
      }
    }
    std::memcpy(out, sum.data[m], kRowBytes);
    for (int n = 0; n < columns; ++n) out[n] += even[n] + odd[n];
    std::memcpy(sum.data[m], out, kRowBytes);
  }
}

bool all_zero(const unsigned char* bytes, int first, int last) {
  for (int i = first; i < last; ++i)
    if (bytes[i] != 0) return false;
  return true;
}

}  // namespace

extern "C" {

// 0: palette, 1: row to start from, 16: bytes per row, two bytes each, 48: rows; everything else must be zero.
void emulated_loadconfig(const void* config) {
  unsigned char bytes[64];
  std::memcpy(bytes, config, 64);
  if (state.configured) fault("tiles are configured again before they were released");
  if (bytes[0] == 0) return emulated_release();
  if (bytes[0] != 1) return void(fault("a palette that does not exist"));
  if (!all_zero(bytes, 2, 16) || !all_zero(bytes, 32, 48) || !all_zero(bytes, 56, 64))
    return void(fault("reserved bytes of the configuration are not zero"));
  if (bytes[1] != 0) return void(fault("starting from a later row is not emulated"));
  State fresh;
  fresh.configured = true;
  for (int t = 0; t < kTiles; ++t) {
    Tile& tile = fresh.tiles[t];
    tile.row_bytes = bytes[16 + 2 * t] | bytes[17 + 2 * t] << 8;
    tile.rows = bytes[48 + t];
    if (tile.row_bytes > kRowBytes || tile.rows > kRows) return void(fault("a tile has at most 16 rows of 64 bytes"));
    if ((tile.row_bytes == 0) != (tile.rows == 0)) return void(fault("a tile has rows without bytes, or the reverse"));
  }
  state = fresh;
}

void emulated_release() { state = State(); }

void emulated_zero(int tile) {
  Tile* const t = shaped(tile);
  if (t == nullptr) return;
  clear(*t);
  t->written = true;
}

void emulated_loadd(int tile, const void* base, long stride) {
  Tile* const t = shaped(tile);
  if (t == nullptr) return;
  clear(*t);
  for (int r = 0; r < t->rows; ++r)
    std::memcpy(t->data[r], static_cast<const unsigned char*>(base) + r * stride, t->row_bytes);
  t->written = true;
}

void emulated_stored(int tile, void* base, long stride) {
  const Tile* const t = readable(tile);
  if (t == nullptr) return;
  for (int r = 0; r < t->rows; ++r)
    std::memcpy(static_cast<unsigned char*>(base) + r * stride, t->data[r], t->row_bytes);
}

void emulated_dpbf16ps(int sum, int a, int b) {
  Tile *const c = readable(sum), *const left = readable(a), *const right = readable(b);
  if (c == nullptr || left == nullptr || right == nullptr) return;
  if (sum == a || sum == b || a == b) return void(fault("a product needs three different tiles"));
  if (c->row_bytes % 4 != 0 || left->row_bytes % 4 != 0 || right->row_bytes % 4 != 0)
    return void(fault("a row of a factor or sum is no whole number of dwords"));
  if (left->rows != c->rows || right->row_bytes != c->row_bytes || left->row_bytes != 4 * right->rows)
    return void(fault("the shapes of a product do not fit"));
  ++products;
  const TileArithmetic arithmetic;
  multiply(*c, *left, *right);
}

const char* emulated_fault() { return first_fault.exchange(nullptr); }
long emulated_products() { return products.exchange(0); }
}
