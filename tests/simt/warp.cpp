// What the lanes of a warp compute together: shuffles and votes, ldmatrix, and tensor cores.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "simt/state.h"

namespace simt {

void shuffle(void* const (&lanes)[32], unsigned mask) {
  std::uint64_t values[32] = {};
  for (unsigned l = 0; l < kWarp; ++l)
    if (lanes[l]) values[l] = static_cast<const Shuffle*>(lanes[l])->value;
  for (unsigned l = 0; l < kWarp; ++l) {
    if (!lanes[l]) continue;
    Shuffle& operand = *static_cast<Shuffle*>(lanes[l]);
    operand.missing = !(mask >> operand.source & 1);
    operand.value = values[operand.source];
  }
}

void ballot(void* const (&lanes)[32], unsigned) {
  std::uint64_t votes = 0;
  for (unsigned l = 0; l < kWarp; ++l)
    if (lanes[l] && *static_cast<const std::uint64_t*>(lanes[l])) votes |= std::uint64_t{1} << l;
  for (void* lane : lanes)
    if (lane) *static_cast<std::uint64_t*>(lane) = votes;
}

void match(void* const (&lanes)[32], unsigned) {
  std::uint64_t values[32] = {};
  for (unsigned l = 0; l < kWarp; ++l)
    if (lanes[l]) values[l] = *static_cast<const std::uint64_t*>(lanes[l]);
  for (unsigned l = 0; l < kWarp; ++l) {
    if (!lanes[l]) continue;
    std::uint64_t same = 0;
    for (unsigned k = 0; k < kWarp; ++k)
      if (lanes[k] && values[k] == values[l]) same |= std::uint64_t{1} << k;
    *static_cast<std::uint64_t*>(lanes[l]) = same;
  }
}

namespace {

struct Rows {
  unsigned* r;
  const void* row;
  int matrices;
  bool transposed;
};

void exchange_rows(void* const (&lanes)[32], unsigned) {
  const Rows& first = *static_cast<const Rows*>(lanes[0]);
  for (unsigned l = 0; l < kWarp; ++l)
    for (int m = 0; m < first.matrices; ++m) {
      unsigned value = 0;
      for (unsigned half = 0; half < 2; ++half) {
        unsigned row = l / 4, col = l % 4 * 2 + half;
        if (first.transposed) std::swap(row, col);
        const auto source =
            static_cast<const unsigned char*>(static_cast<const Rows*>(lanes[static_cast<unsigned>(m) * 8 + row])->row);
        std::uint16_t entry;
        std::memcpy(&entry, source + 2 * col, 2);
        value |= static_cast<unsigned>(entry) << 16 * half;
      }
      static_cast<const Rows*>(lanes[l])->r[m] = value;
    }
}

struct Fragments {
  float* c;
  const unsigned *a, *b;
};

float from_bits(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// Cut off below the 25 bits of the largest addend, add, and cut off to fp32.
float add_truncating(float c, const double* products, int count) {
  double largest = std::fabs(static_cast<double>(c)), sum = c;
  for (int i = 0; i < count; ++i) {
    largest = std::max(largest, std::fabs(products[i]));
    sum += products[i];
  }
  if (!(largest > 0) || !std::isfinite(sum)) return static_cast<float>(sum);
  int exponent;
  std::frexp(largest, &exponent);
  const double unit = std::ldexp(1.0, exponent - 25);
  sum = std::trunc(c / unit);
  for (int i = 0; i < count; ++i) sum += std::trunc(products[i] / unit);
  sum *= unit;
  const float nearest = static_cast<float>(sum);
  if (std::fabs(static_cast<double>(nearest)) > std::fabs(sum)) return std::nextafterf(nearest, 0.0f);
  return nearest;
}

float accumulate(float c, const double* products, int count) {
  if (static_cast<Adder>(machine.settings.adder) == Adder::truncating) {
    for (int i = 0; i < count; i += 8) c = add_truncating(c, products + i, std::min(8, count - i));
    return c;
  }
  double sum = 0;
  for (int i = 0; i < count; ++i) sum += products[i];
  return static_cast<float>(c + sum);
}

// PTX's maps from lanes and registers to entries: a row has 4 lanes, each with kPer neighbouring entries.
template <int K>
void multiply(void* const (&lanes)[32], float (&a)[16][K], float (&b)[8][K]) {
  for (unsigned l = 0; l < kWarp; ++l) {
    const Fragments& f = *static_cast<const Fragments*>(lanes[l]);
    for (unsigned i = 0; i < 4; ++i) {
      const unsigned row = l / 4 + i / 2 * 8, col = l % 4 * 2 + i % 2;
      double products[K];
      for (int k = 0; k < K; ++k) products[k] = static_cast<double>(a[row][k]) * b[col][k];
      f.c[i] = accumulate(f.c[i], products, K);
    }
  }
}

void multiply_bf16(void* const (&lanes)[32], unsigned) {
  float a[16][16], b[8][16];
  for (unsigned l = 0; l < kWarp; ++l) {
    const Fragments& f = *static_cast<const Fragments*>(lanes[l]);
    for (unsigned half = 0; half < 2; ++half) {
      const auto entry = [&](unsigned bits) { return from_bits(half ? bits & 0xffff0000u : bits << 16); };
      for (unsigned r = 0; r < 4; ++r) a[l / 4 + r % 2 * 8][l % 4 * 2 + half + r / 2 * 8] = entry(f.a[r]);
      for (unsigned r = 0; r < 2; ++r) b[l / 4][l % 4 * 2 + half + r * 8] = entry(f.b[r]);
    }
  }
  multiply(lanes, a, b);
}

void multiply_tf32(void* const (&lanes)[32], unsigned) {
  float a[16][8], b[8][8];
  const auto entry = [](unsigned bits) { return from_bits(bits & 0xffffe000u); };
  for (unsigned l = 0; l < kWarp; ++l) {
    const Fragments& f = *static_cast<const Fragments*>(lanes[l]);
    for (unsigned r = 0; r < 4; ++r) a[l / 4 + r % 2 * 8][l % 4 + r / 2 * 4] = entry(f.a[r]);
    for (unsigned r = 0; r < 2; ++r) b[l / 4][l % 4 + r * 4] = entry(f.b[r]);
  }
  multiply(lanes, a, b);
}

}  // namespace

void load_matrices(unsigned* r, const void* row, int matrices, bool transposed) {
  if (static_cast<int>(place().lane) < 8 * matrices) {
    check_shared(row, 16, 16, "ldmatrix");
    touch(row, 16, false);
  }
  Rows operand = {r, row, matrices, transposed};
  collective(0xffffffffu, &operand, exchange_rows, false);
}

void mma_bf16_16816(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  Fragments operand = {c, a, b};
  collective(0xffffffffu, &operand, multiply_bf16, false);
}

void mma_tf32_1688(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  Fragments operand = {c, a, b};
  collective(0xffffffffu, &operand, multiply_tf32, false);
}

}  // namespace simt
