// Kernels written once and compiled once per ISA; include only from isa_*.cpp, each built with its own flags.
// Everything here has internal linkage: an inline function shared between translation units of different flags would
// let the linker pick the copy a plain CPU cannot run.
#pragma once

#include <cmath>
#include <cstring>
#include <type_traits>

#if defined(__F16C__)
#include <immintrin.h>
#endif

#include "isa.h"

namespace {
using namespace safelora;
using namespace safelora::detail;

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class T, int LANES = kLanes>
struct Simd {
  static constexpr int bytes = LANES * sizeof(T) < kVectorBytes ? LANES * sizeof(T) : kVectorBytes;
  static constexpr int width = bytes / sizeof(T);
  static constexpr int per_row = LANES / width;
  // rows of C held in registers: about half of the register file, so that loads of B and broadcasts of A fit beside
  static constexpr int row_tile =
      (kVectorBytes == 64 ? 16 : 12) / per_row > 0 ? (kVectorBytes == 64 ? 16 : 12) / per_row : 1;
  typedef T type __attribute__((vector_size(bytes), aligned(sizeof(T)), may_alias));
};

struct NoAhead {
  void next() {}
};

struct EvenlyAhead {
  const char* at;
  std::int64_t step;
  void next() {
    __builtin_prefetch(at, 0, 2);
    at += step;
  }
};

// The first LANES of 16 columns. Strides known to be 1 spare the addresses of A an instruction each.
template <class T, int LANES, int M, class RowStride, class ColStride, class Lines>
void gemm_tile(std::int64_t k, const T* a, RowStride a_row, ColStride a_col, const T* b, std::int64_t ldb, T* c,
               std::int64_t ldc, bool accumulate, Lines& lines) {
  using V = typename Simd<T, LANES>::type;
  constexpr int n = Simd<T, LANES>::per_row, w = Simd<T, LANES>::width;
  // A sum of its own, added to C at the end: its terms lose less than they would on top of C.
  V acc[M][n] = {};
  // A pointer for every four rows: one for each would leave none for the rest.
  const T* rows[(M + 3) / 4];
#pragma GCC unroll 4
  for (int g = 0; g < (M + 3) / 4; ++g) rows[g] = a + 4 * g * a_row;
  Lines here = lines;
  for (std::int64_t l = 0; l < k; ++l, b += ldb) {
    here.next();
    V row[n];
#pragma GCC unroll 8
    for (int j = 0; j < n; ++j) row[j] = *reinterpret_cast<const V*>(b + j * w);
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i) {
      const T scale = rows[i / 4][i % 4 * a_row];
#pragma GCC unroll 8
      for (int j = 0; j < n; ++j) acc[i][j] += scale * row[j];
    }
#pragma GCC unroll 4
    for (int g = 0; g < (M + 3) / 4; ++g) rows[g] += a_col;
  }
  lines = here;
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < n; ++j) {
      V& target = *reinterpret_cast<V*>(c + i * ldc + j * w);
      target = accumulate ? target + acc[i][j] : acc[i][j];
    }
}

template <class T, int LANES, class RowStride, class ColStride, class Lines>
void gemm_tiles(std::int64_t m, std::int64_t k, const T* a, RowStride a_row, ColStride a_col, const T* b,
                std::int64_t ldb, T* c, std::int64_t ldc, bool accumulate, [[maybe_unused]] Lines lines) {
  constexpr int tile = Simd<T, LANES>::row_tile;
  std::int64_t i = 0;
  for (; i + tile <= m; i += tile)
    gemm_tile<T, LANES, tile>(k, a + i * a_row, a_row, a_col, b, ldb, c + i * ldc, ldc, accumulate, lines);
  if constexpr (tile > 4)
    for (; i + 4 <= m; i += 4)
      gemm_tile<T, LANES, 4>(k, a + i * a_row, a_row, a_col, b, ldb, c + i * ldc, ldc, accumulate, lines);
  for (; i < m; ++i)
    gemm_tile<T, LANES, 1>(k, a + i * a_row, a_row, a_col, b, ldb, c + i * ldc, ldc, accumulate, lines);
}

using One = std::integral_constant<std::int64_t, 1>;

template <class T, int LANES, class Lines>
void gemm_rows(std::int64_t m, std::int64_t k, const T* a, std::int64_t a_row, std::int64_t a_col, const T* b,
               std::int64_t ldb, T* c, std::int64_t ldc, bool accumulate, Lines lines) {
  if (a_row == 1)
    gemm_tiles<T, LANES>(m, k, a, One{}, a_col, b, ldb, c, ldc, accumulate, lines);
  else if (a_col == 1)
    gemm_tiles<T, LANES>(m, k, a, a_row, One{}, b, ldb, c, ldc, accumulate, lines);
  else
    gemm_tiles<T, LANES>(m, k, a, a_row, a_col, b, ldb, c, ldc, accumulate, lines);
}

template <class T>
void gemm16(std::int64_t m, std::int64_t k, const T* a, std::int64_t a_row, std::int64_t a_col, const T* b,
            std::int64_t ldb, T* c, std::int64_t ldc, bool accumulate) {
  gemm_rows<T, kLanes>(m, k, a, a_row, a_col, b, ldb, c, ldc, accumulate, NoAhead{});
}

template <class T, int LANES>
void gemm_ahead(std::int64_t m, std::int64_t k, const T* a, std::int64_t a_row, std::int64_t a_col, const T* b,
                std::int64_t ldb, T* c, std::int64_t ldc, bool accumulate, Ahead ahead) {
  if (ahead.bytes <= 0 || k == 0)
    return gemm_rows<T, LANES>(m, k, a, a_row, a_col, b, ldb, c, ldc, accumulate, NoAhead{});
  const std::int64_t tile = Simd<T, LANES>::row_tile, steps = (m + tile - 1) / tile * k;
  gemm_rows<T, LANES>(m, k, a, a_row, a_col, b, ldb, c, ldc, accumulate,
                      EvenlyAhead{static_cast<const char*>(ahead.first), ahead.bytes / steps});
}

struct Bf16 {
  std::uint16_t bits;
};
struct F16 {
  std::uint16_t bits;
};

template <class To, class From>
To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

inline float widen(Bf16 x) { return bit_cast<float>(static_cast<std::uint32_t>(x.bits) << 16); }

inline float widen(F16 x) {
#if defined(__F16C__)
  return _cvtsh_ss(x.bits);
#else
  const std::uint32_t sign = static_cast<std::uint32_t>(x.bits & 0x8000) << 16, magnitude = x.bits & 0x7fff;
  if (magnitude >= 0x7c00) return bit_cast<float>(sign | 0x7f800000u | (magnitude << 13));  // Inf, NaN
  // shifting the exponent into place and rescaling by 2^112 is exact, subnormals included
  return bit_cast<float>(sign | bit_cast<std::uint32_t>(bit_cast<float>(magnitude << 13) * 0x1p112f));
#endif
}
inline float widen(float x) { return x; }
inline double widen(double x) { return x; }

inline void narrow(float x, float& out) { out = x; }
inline void narrow(double x, float& out) { out = static_cast<float>(x); }
inline void narrow(float x, double& out) { out = x; }
inline void narrow(double x, double& out) { out = x; }

// round to nearest even; NaN stays NaN
inline void narrow(float x, Bf16& out) {
  const std::uint32_t bits = bit_cast<std::uint32_t>(x);
  const std::uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  out.bits = static_cast<std::uint16_t>(x == x ? rounded : 0x7fc0);
}
inline void narrow(float x, F16& out) {
#if defined(__F16C__)
  out.bits = static_cast<std::uint16_t>(_cvtss_sh(x, 0));
#else
  const std::uint32_t bits = bit_cast<std::uint32_t>(x), sign = (bits >> 16) & 0x8000;
  const float magnitude = bit_cast<float>(bits & 0x7fffffff);
  std::uint32_t half;
  if (!(magnitude < 65520.0f)) {  // the half-way point above the largest finite value
    half = magnitude == magnitude ? 0x7c00 : 0x7e00;
  } else if (magnitude < 0x1p-14f) {  // subnormal: adding 2^-1 · 2^… aligns the last bit, and the addition rounds
    half = bit_cast<std::uint32_t>(magnitude + 0.5f) - 0x3f000000u;
  } else {
    const std::uint32_t m = bit_cast<std::uint32_t>(magnitude);
    half = (m - 0x38000000u + 0xfff + ((m >> 13) & 1)) >> 13;
  }
  out.bits = static_cast<std::uint16_t>(sign | half);
#endif
}
inline void narrow(double x, Bf16& out) { narrow(static_cast<float>(x), out); }
inline void narrow(double x, F16& out) { narrow(static_cast<float>(x), out); }

template <class T, class S>
void widen_row(const S* src, std::int64_t stride, std::int64_t n, T* dst) {
  std::int64_t j = 0;
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<S, F16> && std::is_same_v<T, float>)
    if (stride == 1)
      for (; j + 16 <= n; j += 16)
        _mm512_storeu_ps(dst + j, _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(src + j))));
#elif defined(__F16C__)
  if constexpr (std::is_same_v<S, F16> && std::is_same_v<T, float>)
    if (stride == 1)
      for (; j + 8 <= n; j += 8)
        _mm256_storeu_ps(dst + j, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(src + j))));
#endif
  if (stride == 1)
    for (; j < n; ++j) dst[j] = static_cast<T>(widen(src[j]));
  else
    for (; j < n; ++j) dst[j] = static_cast<T>(widen(src[j * stride]));
}

template <class F>
auto with_type(DType dtype, F&& f) {
  switch (dtype) {
    case DType::bf16: return f(Bf16{});
    case DType::f16: return f(F16{});
    case DType::f64: return f(double{});
    case DType::f32: break;
  }
  return f(float{});
}

// Rows at a time of what is stored by columns: their lines on the other side stay in L1.
constexpr std::int64_t kColumnRows = 64;

template <class T>
void load_block(const ConstMatrix& m, std::int64_t i0, std::int64_t rows, std::int64_t j0, std::int64_t cols, T* dst,
                std::int64_t ld) {
  with_type(m.dtype, [&](auto tag) {
    using S = decltype(tag);
    const S* src = static_cast<const S*>(m.data) + i0 * m.row_stride + j0 * m.col_stride;
    if (m.col_stride != 1 && m.row_stride == 1) {  // stored by columns: walk the memory, scatter into the block
      for (std::int64_t start = 0; start < rows; start += kColumnRows)
        for (std::int64_t j = 0; j < cols; ++j)
          for (std::int64_t i = start; i < rows && i < start + kColumnRows; ++i)
            dst[i * ld + j] = static_cast<T>(widen(src[j * m.col_stride + i]));
    } else {
      for (std::int64_t i = 0; i < rows; ++i) widen_row(src + i * m.row_stride, m.col_stride, cols, dst + i * ld);
    }
  });
}

// 16 lanes whatever the vector width: the order of a sum must not depend on what the compiler vectorizes.
template <class T>
struct Squares {
  T lanes[kLanes] = {};
  double total() const {
    double sum = 0;
    for (T lane : lanes) sum += lane;
    return sum;
  }
};

template <class T>
void subtract_row(T* row, const T* subtrahend, std::int64_t n, Squares<T>& squares) {
  std::int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes)
    for (int q = 0; q < kLanes; ++q) {
      const T v = row[j + q] - subtrahend[j + q];
      row[j + q] = v;
      squares.lanes[q] += v * v;
    }
  for (; j < n; ++j) {
    row[j] -= subtrahend[j];
    squares.lanes[0] += row[j] * row[j];
  }
}

// Rows ahead whose cache lines are asked for: strips of a row-major weight touch a new page per row.
constexpr std::int64_t kPrefetchRows = 16;

template <class T>
double load_difference(const ConstMatrix& aligned, const ConstMatrix& base, std::int64_t i0, std::int64_t rows,
                       std::int64_t j0, std::int64_t cols, T* dst, std::int64_t ld) {
  constexpr std::int64_t kStep = 256;
  double squares = 0;
  with_type(aligned.dtype, [&](auto a_tag) {
    with_type(base.dtype, [&](auto b_tag) {
      using A = decltype(a_tag);
      using B = decltype(b_tag);
      const A* a = static_cast<const A*>(aligned.data) + i0 * aligned.row_stride + j0 * aligned.col_stride;
      const B* b = static_cast<const B*>(base.data) + i0 * base.row_stride + j0 * base.col_stride;
      T subtrahend[kStep];
      for (std::int64_t i = 0; i < rows; ++i, a += aligned.row_stride, b += base.row_stride) {
        if (aligned.col_stride == 1 && base.col_stride == 1)
          for (std::int64_t j = 0; j < cols; j += 64 / static_cast<std::int64_t>(sizeof(A))) {
            __builtin_prefetch(a + kPrefetchRows * aligned.row_stride + j, 0, 2);
            __builtin_prefetch(b + kPrefetchRows * base.row_stride + j, 0, 2);
          }
        Squares<T> row_squares;
        for (std::int64_t j = 0; j < cols; j += kStep) {
          const std::int64_t n = cols - j < kStep ? cols - j : kStep;
          widen_row(a + j * aligned.col_stride, aligned.col_stride, n, dst + i * ld + j);
          widen_row(b + j * base.col_stride, base.col_stride, n, subtrahend);
          subtract_row(dst + i * ld + j, subtrahend, n, row_squares);
        }
        squares += row_squares.total();
      }
    });
  });
  return squares;
}

template <class T>
void store_block(const T* src, std::int64_t ld, const Matrix& m, std::int64_t i0, std::int64_t rows, std::int64_t j0,
                 std::int64_t cols) {
  with_type(m.dtype, [&](auto tag) {
    using S = decltype(tag);
    S* dst = static_cast<S*>(m.data) + i0 * m.row_stride + j0 * m.col_stride;
    if (m.col_stride != 1 && m.row_stride == 1) {
      for (std::int64_t start = 0; start < rows; start += kColumnRows)
        for (std::int64_t j = 0; j < cols; ++j)
          for (std::int64_t i = start; i < rows && i < start + kColumnRows; ++i)
            narrow(src[i * ld + j], dst[j * m.col_stride + i]);
      return;
    }
    for (std::int64_t i = 0; i < rows; ++i) {
      S* row = dst + i * m.row_stride;
      if (m.col_stride == 1)
        for (std::int64_t j = 0; j < cols; ++j) narrow(src[i * ld + j], row[j]);
      else
        for (std::int64_t j = 0; j < cols; ++j) narrow(src[i * ld + j], row[j * m.col_stride]);
    }
  });
}

template <class T>
constexpr Kernels<T> kTable = {gemm16<T>,     gemm_ahead<T, kLanes>, gemm_ahead<T, kLanes / 2>,
                               load_block<T>, load_difference<T>,    store_block<T>};

const IsaTable& this_table() {
  static const IsaTable table = {kTable<float>, kTable<double>};
  return table;
}

}  // namespace
