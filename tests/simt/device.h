// csrc/cuda/device.cuh on the emulator: the same functions, and the CUDA language that kernels use besides.
#pragma once

#include <math.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "simt/machine.h"

#undef __global__
#undef __device__
#undef __host__
#undef __constant__
#undef __shared__
#undef __forceinline__
#undef __noinline__
#undef __launch_bounds__
#undef __grid_constant__
#define __global__
#define __device__
#define __host__
#define __constant__ static const
#define __shared__ static_assert(false, "the emulator runs many blocks in one address space: use DYN_SHARED");
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __grid_constant__

#define SAFELORA_DEVICE inline
#define SAFELORA_FIRST(first, ...) first
#define SAFELORA_KERNEL(name, Params, ...)                                                                       \
  static void name##_body(const Params& params);                                                                 \
  static void name(const void* params) { name##_body(*static_cast<const Params*>(params)); }                     \
  static const simt::Registered name##_registered(#name, &name, sizeof(Params), SAFELORA_FIRST(__VA_ARGS__, 0)); \
  static void name##_body(const Params& params)
#define DYN_SHARED(T, name) T* name = reinterpret_cast<T*>(simt::dynamic_shared())

#define threadIdx (simt::place().thread)
#define blockIdx (simt::place().block)
#define blockDim (simt::place().block_dim)
#define gridDim (simt::place().grid_dim)
#define warpSize 32

inline void __syncthreads() { simt::block_barrier(); }
inline int __syncthreads_and(int predicate) { return simt::block_reduce(predicate, 0); }
inline int __syncthreads_or(int predicate) { return simt::block_reduce(predicate, 1); }
inline int __syncthreads_count(int predicate) { return simt::block_reduce(predicate, 2); }
inline void __syncwarp(unsigned mask = 0xffffffffu) {
  simt::collective(mask, nullptr, [](void* const(&)[32], unsigned) {}, true);
}
inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void __threadfence_block() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void __trap() { simt::fail("__trap"); }

// ---- warps

namespace simt {

template <class T>
T shuffled(unsigned mask, T value, int source) {
  static_assert(sizeof(T) <= 8);
  Shuffle operand = {0, source, false};
  __builtin_memcpy(&operand.value, &value, sizeof(T));
  collective(mask, &operand, shuffle, false);
  require(!operand.missing, "a shuffle reads a lane outside of its mask");
  __builtin_memcpy(&value, &operand.value, sizeof(T));
  return value;
}

}  // namespace simt

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  const int lane = static_cast<int>(simt::place().lane);
  return simt::shuffled(mask, value, (lane & ~(width - 1)) | (source & (width - 1)));
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int other, int width = 32) {
  const int lane = static_cast<int>(simt::place().lane), source = lane ^ other;
  return simt::shuffled(mask, value, source / width > lane / width ? lane : source);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned distance, int width = 32) {
  const int lane = static_cast<int>(simt::place().lane), source = lane + static_cast<int>(distance);
  return simt::shuffled(mask, value, source / width != lane / width ? lane : source);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned distance, int width = 32) {
  const int lane = static_cast<int>(simt::place().lane), source = lane - static_cast<int>(distance);
  return simt::shuffled(mask, value, source < (lane & ~(width - 1)) ? lane : source);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  std::uint64_t operand = predicate != 0;
  simt::collective(mask, &operand, simt::ballot, false);
  return static_cast<unsigned>(operand);
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) == mask; }
template <class T>
unsigned __match_any_sync(unsigned mask, T value) {
  std::uint64_t operand = 0;
  __builtin_memcpy(&operand, &value, sizeof(T));
  simt::collective(mask, &operand, simt::match, false);
  return static_cast<unsigned>(operand);
}
inline unsigned __activemask() { return simt::active_lanes(); }

// ---- atomics, relaxed as CUDA's are

template <class T>
T atomicAdd(T* p, T v) {
  static_assert(std::is_integral_v<T>, "sums of floats in the order of arrival are not reproducible");
  return __atomic_fetch_add(p, v, __ATOMIC_RELAXED);
}
template <class T>
T atomicExch(T* p, T v) {
  return __atomic_exchange_n(p, v, __ATOMIC_RELAXED);
}
template <class T>
T atomicCAS(T* p, T expected, T v) {
  __atomic_compare_exchange_n(p, &expected, v, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
  return expected;
}
template <class T>
T atomicMax(T* p, T v) {
  T old = __atomic_load_n(p, __ATOMIC_RELAXED);
  while (old < v && !__atomic_compare_exchange_n(p, &old, v, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  return old;
}
template <class T>
T atomicMin(T* p, T v) {
  T old = __atomic_load_n(p, __ATOMIC_RELAXED);
  while (v < old && !__atomic_compare_exchange_n(p, &old, v, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  return old;
}
template <class T>
T atomicOr(T* p, T v) {
  return __atomic_fetch_or(p, v, __ATOMIC_RELAXED);
}

// ---- arithmetic

template <class T>
T __ldg(const T* p) {
  return *p;
}
inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline int __clz(int v) { return v ? __builtin_clz(static_cast<unsigned>(v)) : 32; }
inline float __uint_as_float(unsigned v) {
  float f;
  __builtin_memcpy(&f, &v, 4);
  return f;
}
inline unsigned __float_as_uint(float v) {
  unsigned u;
  __builtin_memcpy(&u, &v, 4);
  return u;
}
inline float __int_as_float(int v) { return __uint_as_float(static_cast<unsigned>(v)); }
inline int __float_as_int(float v) { return static_cast<int>(__float_as_uint(v)); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dmul_rn(double a, double b) { return a * b; }
using std::max;
using std::min;

// ---- device.cuh

namespace safelora::cuda {

inline unsigned shared_address(const void* shared) {
  simt::check_shared(shared, 1, 1, "shared_address");
  return static_cast<unsigned>(static_cast<const unsigned char*>(shared) - simt::dynamic_shared());
}
inline void unsupported_arch() { simt::fail("this kernel is not for this architecture"); }

inline unsigned add_acq_rel(unsigned* p, unsigned v) { return __atomic_fetch_add(p, v, __ATOMIC_ACQ_REL); }
inline unsigned add_relaxed(unsigned* p, unsigned v) { return __atomic_fetch_add(p, v, __ATOMIC_RELAXED); }
inline void add_release(unsigned* p, unsigned v) { __atomic_fetch_add(p, v, __ATOMIC_RELEASE); }
inline void store_release(unsigned* p, unsigned v) { __atomic_store_n(p, v, __ATOMIC_RELEASE); }
inline unsigned load_acquire(const unsigned* p) {
  simt::spin();
  return __atomic_load_n(p, __ATOMIC_ACQUIRE);
}
inline void spin_pause() {}

template <class T>
T load_once(const T* p) {
  static_assert(sizeof(T) == 16);
  simt::require(reinterpret_cast<std::uintptr_t>(p) % 16 == 0, "load_once: address not 16-byte aligned");
  return *p;
}
template <class T>
T load_l2(const T* p) {
  static_assert(sizeof(T) == 16);
  simt::require(reinterpret_cast<std::uintptr_t>(p) % 16 == 0, "load_l2: address not 16-byte aligned");
  return *p;
}

inline void cp_async16(void* shared, const void* global, int bytes = 16) { simt::copy16(shared, global, bytes); }
inline void cp_async_commit() { simt::copy_commit(); }
template <int N>
void cp_async_wait() {
  simt::copy_wait(N);
}

inline void ldmatrix_x4(unsigned (&r)[4], const void* row) { simt::load_matrices(r, row, 4, false); }
inline void ldmatrix_x4_trans(unsigned (&r)[4], const void* row) { simt::load_matrices(r, row, 4, true); }
inline void ldmatrix_x2(unsigned (&r)[2], const void* row) { simt::load_matrices(r, row, 2, false); }
inline void ldmatrix_x2_trans(unsigned (&r)[2], const void* row) { simt::load_matrices(r, row, 2, true); }
using simt::mma_bf16_16816;
using simt::mma_tf32_1688;

using Mbarrier = unsigned long long;
inline void mbar_init(Mbarrier* bar, unsigned arrivals) { simt::mbar_init(bar, arrivals); }
inline void mbar_fence_init() {}
inline void mbar_arrive(Mbarrier* bar) { simt::mbar_arrive(bar, 0); }
inline void mbar_arrive_expect(Mbarrier* bar, unsigned bytes) { simt::mbar_arrive(bar, bytes); }
inline void mbar_wait(Mbarrier* bar, unsigned parity) { simt::mbar_wait(bar, parity); }
inline void mbar_wait_cluster(Mbarrier* bar, unsigned parity) { simt::mbar_wait(bar, parity); }

inline void fence_async_shared() {}
inline void tma_load(void* shared, const TensorMap* map, int row, int col, Mbarrier* bar) {
  simt::box_copy(shared, map, row, col, bar);
}
inline void tma_prefetch(const TensorMap*) {}
inline void bulk_load(void* shared, const void* global, unsigned bytes, Mbarrier* bar) {
  simt::check_shared(shared, bytes, 16, "bulk_load");
  simt::bulk_copy(shared, global, bytes, bar);
}
inline void bulk_send(void* shared, const void* from, unsigned bytes, Mbarrier* bar, unsigned rank) {
  simt::check_shared(from, bytes, 16, "bulk_send");
  simt::bulk_copy(simt::map_to_rank(shared, rank, bytes), from, bytes,
                  static_cast<Mbarrier*>(simt::map_to_rank(bar, rank, sizeof(Mbarrier))));
}

inline unsigned cluster_rank() { return simt::place().cluster_rank; }
inline unsigned cluster_size() { return simt::place().cluster_size; }
inline void cluster_arrive() { simt::cluster_barrier_arrive(); }
inline void cluster_wait() { simt::cluster_barrier_wait(); }
inline void cluster_sync() {
  cluster_arrive();
  cluster_wait();
}
template <class T>
T cluster_load(const T* shared, unsigned rank) {
  return *static_cast<const T*>(simt::map_to_rank(shared, rank, sizeof(T)));
}
template <class T>
void cluster_store(T* shared, unsigned rank, T v) {
  *static_cast<T*>(simt::map_to_rank(shared, rank, sizeof(T))) = v;
}
inline void mbar_arrive_remote(Mbarrier* bar, unsigned rank) {
  simt::mbar_arrive(static_cast<Mbarrier*>(simt::map_to_rank(bar, rank, sizeof(Mbarrier))), 0);
}

}  // namespace safelora::cuda
