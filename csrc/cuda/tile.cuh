// Tiles in shared memory: staging from global memory with conversion, products of two tiles, and the way back.
//
// Products are fp32-accurate on tensor cores: each operand is split into two tf32 numbers, v = high + low, and
// high·high + low·high + high·low is taken, which leaves out 2⁻²² of a product; what bf16 and fp16 hold is one tf32
// number, and its low part is not multiplied. Tensor cores truncate when they add, so at most kPromote entries of a
// contraction are summed there; from then on sums are rounded to nearest.
#pragma once

#include <type_traits>

#include "device.cuh"
#include "strided.h"

namespace safelora::cuda {

constexpr int kPromote = 32;

SAFELORA_DEVICE Strided transposed(const Strided& m) {
  const Lines lines = m.lines == Lines::rows ? Lines::cols : m.lines == Lines::cols ? Lines::rows : Lines::none;
  return {m.data, m.col, m.row, m.dtype, lines};
}

// v, as a value that the compiler knows nothing of: what is computed from it is computed anew, rather than kept in a
// register from one use to the next.
SAFELORA_DEVICE int fresh(int v) {
#ifdef __CUDACC__
  asm volatile("" : "+r"(v));
#endif
  return v;
}

SAFELORA_DEVICE int fresh_thread_index() { return fresh(static_cast<int>(threadIdx.x)); }

// Where entry (row, col) of a tile with LD columns lies. The columns of a row are permuted in groups of four so that a
// warp's 8 rows × 4 columns, and its 4 rows × 8 columns, fall into 32 different banks.
template <int LD>
SAFELORA_DEVICE int place(int row, int col) {
  static_assert(LD % 16 == 0);
  const int permuted = LD % 32 == 0 ? col ^ ((row & 3) << 3 | (row & 4)) : col ^ ((row & 2) << 2 | (row & 4));
  return row * LD + permuted;
}

// Entry (i, j) of a staged matrix, and of the transpose of one.
template <class T, int LD>
struct Tile {
  const T* data;
  SAFELORA_DEVICE T operator()(int i, int j) const { return data[place<LD>(i, j)]; }
};

template <class T, int LD>
struct TransposedTile {
  const T* data;
  SAFELORA_DEVICE T operator()(int i, int j) const { return data[place<LD>(j, i)]; }
};

// bf16 or fp16: one kind of code reads and writes both, which keeps the kernels small.
struct Half {
  unsigned short bits;
};

// Exactly. fp16: what a Half is.
template <class T, class S>
SAFELORA_DEVICE T widen(S v, bool fp16) {
  if constexpr (std::is_same_v<S, Half>)
    return static_cast<T>(fp16 ? __half2float(__half_raw{v.bits})
                               : __uint_as_float(static_cast<unsigned>(v.bits) << 16));
  else
    return static_cast<T>(v);
}

// To nearest even.
template <class S, class T>
SAFELORA_DEVICE S narrow(T v, bool fp16) {
  if constexpr (!std::is_same_v<S, Half>) {
    return static_cast<S>(v);
  } else if constexpr (sizeof(T) == 8) {
    if (fp16) return {static_cast<__half_raw>(__double2half(v)).x};
    return {static_cast<__nv_bfloat16_raw>(__double2bfloat16(v)).x};
  } else {
    if (fp16) return {static_cast<__half_raw>(__float2half_rn(v)).x};
    return {static_cast<__nv_bfloat16_raw>(__float2bfloat16_rn(v)).x};
  }
}

// 16 bytes of a matrix.
template <class S>
struct alignas(16) Group {
  static constexpr int kSize = 16 / sizeof(S);
  S at[kSize];
};

template <class T, class S, int ROWS, int COLS>
SAFELORA_DEVICE void stage_as(T* tile, const Strided& m, std::int64_t r0, std::int64_t c0, int rows, int cols) {
  constexpr int V = Group<S>::kSize, W = Group<T>::kSize, kGroups = ROWS * COLS / V,
                kEach = (kGroups + kThreads - 1) / kThreads;
  static_assert(COLS % V == 0);
  const S* source = static_cast<const S*>(m.data) + r0 * m.row + c0 * m.col;
  const int tid = fresh_thread_index();
  const bool fp16 = m.dtype == DType::f16;
  if (m.lines == Lines::rows) {
    // as many at a time as registers allow
    constexpr int kBatch = kEach < 2 ? kEach : 2;
#pragma unroll 1
    for (int start = 0; start < kEach; start += kBatch) {
      Group<S> groups[kBatch];
#pragma unroll
      for (int n = 0; n < kBatch; ++n) {
        const int index = tid + (start + n) * kThreads, r = index / (COLS / V), c = index % (COLS / V) * V;
        if (index < kGroups && r < rows && c + V <= cols)
          groups[n] = *reinterpret_cast<const Group<S>*>(source + r * m.row + c);
      }
#pragma unroll
      for (int n = 0; n < kBatch; ++n) {
        const int index = tid + (start + n) * kThreads, r = index / (COLS / V), c = index % (COLS / V) * V;
        if (index >= kGroups) continue;
        const bool whole = r < rows && c + V <= cols;
#pragma unroll
        for (int v = 0; v < V; v += W) {
          Group<T> values;
#pragma unroll
          for (int w = 0; w < W; ++w) {
            values.at[w] = widen<T>(groups[n].at[v + w], fp16);
            if (!whole)
              values.at[w] = r < rows && c + v + w < cols ? widen<T>(source[r * m.row + c + v + w], fp16) : T(0);
          }
          *reinterpret_cast<Group<T>*>(tile + place<COLS>(r, c + v)) = values;
        }
      }
    }
    return;
  }
  const bool down = m.row < m.col;  // neighbouring threads take neighbouring addresses
#pragma unroll 1
  for (int index = tid; index < ROWS * COLS; index += kThreads) {
    const int r = down ? index % ROWS : index / COLS, c = down ? index / ROWS : index % COLS;
    tile[place<COLS>(r, c)] = r < rows && c < cols ? widen<T>(source[r * m.row + c * m.col], fp16) : T(0);
  }
}

// tile = m[r0 : r0+ROWS, c0 : c0+COLS], zero outside of m's (rows, cols). r0 and c0: multiples of 16.
template <class T, int ROWS, int COLS>
SAFELORA_DEVICE void stage(T* tile, const Strided& m, std::int64_t r0, std::int64_t c0, std::int64_t rows,
                           std::int64_t cols) {
  const int r = static_cast<int>(rows - r0 < ROWS ? rows - r0 : ROWS);
  const int c = static_cast<int>(cols - c0 < COLS ? cols - c0 : COLS);
  if (m.dtype == DType::f32) return stage_as<T, float, ROWS, COLS>(tile, m, r0, c0, r, c);
  if constexpr (sizeof(T) == 8)
    if (m.dtype == DType::f64) return stage_as<T, double, ROWS, COLS>(tile, m, r0, c0, r, c);
  stage_as<T, Half, ROWS, COLS>(tile, m, r0, c0, r, c);
}

constexpr int kRun = 8;  // entries of a row that one thread reads and writes at a time

template <class T, class S>
SAFELORA_DEVICE void read_run(T (&values)[kRun], const void* data, std::int64_t at, std::int64_t stride, int count,
                              bool grouped, bool fp16) {
  const S* source = static_cast<const S*>(data) + at;
  constexpr int V = Group<S>::kSize;
  if (grouped && count == kRun) {
#pragma unroll
    for (int n = 0; n < kRun / V; ++n) {
      const Group<S> group = reinterpret_cast<const Group<S>*>(source)[n];
#pragma unroll
      for (int v = 0; v < V; ++v) values[n * V + v] = widen<T>(group.at[v], fp16);
    }
  } else {
#pragma unroll
    for (int v = 0; v < kRun; ++v) values[v] = v < count ? widen<T>(source[v * stride], fp16) : T(0);
  }
}

template <class T, class S>
SAFELORA_DEVICE void write_run(const T (&values)[kRun], const void* data, std::int64_t at, std::int64_t stride,
                               int count, bool grouped, bool fp16) {
  S* target = static_cast<S*>(const_cast<void*>(data)) + at;
  constexpr int V = Group<S>::kSize;
  if (grouped && count == kRun) {
#pragma unroll
    for (int n = 0; n < kRun / V; ++n) {
      Group<S> group;
#pragma unroll
      for (int v = 0; v < V; ++v) group.at[v] = narrow<S>(values[n * V + v], fp16);
      reinterpret_cast<Group<S>*>(target)[n] = group;
    }
  } else {
#pragma unroll
    for (int v = 0; v < kRun; ++v)
      if (v < count) target[v * stride] = narrow<S>(values[v], fp16);
  }
}

// out = in + tile, rounded once, for the part of the tile at (r0, c0) that lies within (rows, cols); in.data may be
// nullptr, for zeros, and may be out.data.
template <class T, int ROWS, int COLS>
SAFELORA_DEVICE void add_tile(const T* tile, const Strided& in, const Strided& out, std::int64_t r0, std::int64_t c0,
                              std::int64_t rows, std::int64_t cols) {
#pragma unroll 1
  for (int index = fresh_thread_index(); index < ROWS * COLS / kRun; index += kThreads) {
    const int i = index / (COLS / kRun), j = index % (COLS / kRun) * kRun;
    const std::int64_t r = r0 + i, c = c0 + j;
    if (r >= rows || c >= cols) continue;
    const int count = static_cast<int>(cols - c < kRun ? cols - c : kRun);
    T values[kRun];
    const std::int64_t from = r * in.row + c * in.col, to = r * out.row + c * out.col;
    if (in.data == nullptr) {
#pragma unroll
      for (int v = 0; v < kRun; ++v) values[v] = T(0);
    } else {
      const bool grouped = in.lines == Lines::rows, fp16 = in.dtype == DType::f16;
      if (in.dtype == DType::f32)
        read_run<T, float>(values, in.data, from, in.col, count, grouped, fp16);
      else if (sizeof(T) == 8 && in.dtype == DType::f64)
        read_run<T, double>(values, in.data, from, in.col, count, grouped, fp16);
      else
        read_run<T, Half>(values, in.data, from, in.col, count, grouped, fp16);
    }
#pragma unroll
    for (int v = 0; v < kRun; ++v) values[v] += tile[place<COLS>(i, j + v)];
    const bool grouped = out.lines == Lines::rows, fp16 = out.dtype == DType::f16;
    if (out.dtype == DType::f32)
      write_run<T, float>(values, out.data, to, out.col, count, grouped, fp16);
    else if (out.dtype == DType::f64)
      write_run<T, double>(values, out.data, to, out.col, count, grouped, fp16);
    else
      write_run<T, Half>(values, out.data, to, out.col, count, grouped, fp16);
  }
}

// v = high + low up to 2⁻²² |v|; high is rounded to tf32, low is cut to it by the tensor core. NaN and Inf make low
// NaN.
struct Parts {
  unsigned high, low;
};

SAFELORA_DEVICE Parts split(float v) {
  const unsigned high = (__float_as_uint(v) + 0x1000u) & 0xffffe000u;
  return {high, __float_as_uint(v - __uint_as_float(high))};
}

// Whether a matrix of this type needs its low part.
SAFELORA_DEVICE bool needs_split(DType dtype) { return dtype == DType::f32; }

// Where a lane's entries of a 16×8 tile of a warp's product are.
struct Lane {
  int index;
  SAFELORA_DEVICE int row(int q) const { return index / 4 + q / 2 * 8; }
  SAFELORA_DEVICE int col(int q) const { return index % 4 * 2 + (q & 1); }
};

SAFELORA_DEVICE Lane fresh_lane() { return {fresh_thread_index() & 31}; }

// acc += A B over k0 … k0+DEPTH, for rows m0 … m0+16·MT of A(m, k) and columns n0 … n0+8·NT of B(k, n); by one warp.
template <int MT, int NT, int DEPTH, class A, class B>
SAFELORA_DEVICE void multiply(float (&acc)[MT][NT][4], const A& a, const B& b, int m0, int n0, int k0, bool split_a,
                              bool split_b) {
  const int g = static_cast<int>(threadIdx.x & 31) / 4, t = static_cast<int>(threadIdx.x & 3);
  constexpr int STEP = DEPTH < kPromote ? DEPTH : kPromote, ACROSS = MT == 1 && NT > 1 ? 2 : 1;
#pragma unroll 1
  for (int part = k0; part < k0 + DEPTH; part += STEP)
#pragma unroll
    for (int first = 0; first < NT; first += ACROSS) {
      float sum[MT][ACROSS][4] = {};
#pragma unroll(MT > 1 ? 1 : 2)
      for (int k = part; k < part + STEP; k += 8) {
        Parts left[MT][4];
#pragma unroll
        for (int i = 0; i < MT; ++i)
#pragma unroll
          for (int q = 0; q < 4; ++q) left[i][q] = split(a(m0 + i * 16 + g + (q & 1) * 8, k + t + (q >> 1) * 4));
#pragma unroll
        for (int j = 0; j < ACROSS; ++j) {
          const int n = n0 + (first + j) * 8 + g;
          const Parts right[2] = {split(b(k + t, n)), split(b(k + t + 4, n))};
          const unsigned b_high[2] = {right[0].high, right[1].high}, b_low[2] = {right[0].low, right[1].low};
#pragma unroll
          for (int i = 0; i < MT; ++i) {
            const unsigned a_high[4] = {left[i][0].high, left[i][1].high, left[i][2].high, left[i][3].high};
            const unsigned a_low[4] = {left[i][0].low, left[i][1].low, left[i][2].low, left[i][3].low};
            if (split_a) mma_tf32_1688(sum[i][j], a_low, b_high);
            if (split_b) mma_tf32_1688(sum[i][j], a_high, b_low);
            mma_tf32_1688(sum[i][j], a_high, b_high);
          }
        }
      }
#pragma unroll
      for (int i = 0; i < MT; ++i)
#pragma unroll
        for (int j = 0; j < ACROSS; ++j)
#pragma unroll
          for (int q = 0; q < 4; ++q) acc[i][first + j][q] += sum[i][j][q];
    }
}

template <int MT, int NT, int DEPTH, class A, class B>
SAFELORA_DEVICE void multiply(double (&acc)[MT][NT][4], const A& a, const B& b, int m0, int n0, int k0, bool, bool) {
  const Lane lane = {static_cast<int>(threadIdx.x & 31)};
#pragma unroll 1
  for (int k = k0; k < k0 + DEPTH; ++k)
#pragma unroll
    for (int i = 0; i < MT; ++i)
#pragma unroll
      for (int j = 0; j < NT; ++j)
#pragma unroll
        for (int q = 0; q < 4; ++q) acc[i][j][q] += a(m0 + i * 16 + lane.row(q), k) * b(k, n0 + j * 8 + lane.col(q));
}

// True in every thread of the block that arrives last of `count` at a counter that started as zero: it sees what the
// others wrote before they arrived. `word`: in shared memory.
SAFELORA_DEVICE bool arrives_last(unsigned* counter, unsigned count, unsigned* word) {
  __syncthreads();
  if (threadIdx.x == 0) *word = add_acq_rel(counter, 1u) + 1u;
  __syncthreads();
  return *word == count;
}

// The last item whose first block is not after `block`.
template <class Item>
SAFELORA_DEVICE int item_of(const Item* items, int count, std::int64_t block) {
  int low = 0, high = count - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (items[middle].first_block <= block)
      low = middle;
    else
      high = middle - 1;
  }
  return low;
}

}  // namespace safelora::cuda
