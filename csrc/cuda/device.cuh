// Device functions that CUDA C++ has no name for: what the kernels (<op>.cu) include.
//
//   SAFELORA_KERNEL(foo, FooParams, 128) { ... }      __launch_bounds__(128), or (128, 2) with min. blocks; the body
//                                                     sees `params`, a const FooParams&
//   DYN_SHARED(float, tile);                          float* to the block's dynamic shared memory, 1024-byte aligned
//
// Kernels also run on an emulator (no nvcc), so: no static __shared__ (many blocks share one address space: use
// DYN_SHARED), no asm outside of this file, no <<<>>>, no texture, no static variable; loops that wait for another
// block must contain load_acquire, mbar_wait or a barrier, where the emulator lets the others run. The rest of the
// language is there: threadIdx, __syncthreads, *_sync warp functions, atomics on integers, bf16 and fp16 types.
// Code that only sm_90 can run stands behind #if SAFELORA_SM90, and its kernel ends in unsupported_arch() otherwise.
//
// Ordering between blocks: results in global memory, __syncthreads(), then one thread's add_release; the reader's one
// thread add_acq_rel or load_acquire, __syncthreads(), then plain loads (not __ldg, whose cache may be stale).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "launch.h"

#if !defined(__CUDACC__)

#define SAFELORA_SM90 1
#include "simt/device.h"

#else

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define SAFELORA_SM90 1
#else
#define SAFELORA_SM90 0
#endif

#define SAFELORA_DEVICE __device__ __forceinline__
#define SAFELORA_KERNEL(name, Params, ...) \
  extern "C" __global__ void __launch_bounds__(__VA_ARGS__) safelora_##name(const __grid_constant__ Params params)
#define DYN_SHARED(T, name)                                                  \
  extern __shared__ __align__(1024) unsigned char safelora_dynamic_shared[]; \
  T* name = reinterpret_cast<T*>(safelora_dynamic_shared)

namespace safelora::cuda {

SAFELORA_DEVICE unsigned shared_address(const void* shared) {
  return static_cast<unsigned>(__cvta_generic_to_shared(shared));
}

SAFELORA_DEVICE void unsupported_arch() { __trap(); }

// ---- counters and flags in global memory, at the scope of the GPU

// The old value. acq_rel: orders this thread's earlier writes before it, and what others did before theirs.
SAFELORA_DEVICE unsigned add_acq_rel(unsigned* p, unsigned v) {
  unsigned old;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;" : "=r"(old) : "l"(p), "r"(v) : "memory");
  return old;
}
SAFELORA_DEVICE unsigned add_relaxed(unsigned* p, unsigned v) {
  unsigned old;
  asm volatile("atom.relaxed.gpu.global.add.u32 %0, [%1], %2;" : "=r"(old) : "l"(p), "r"(v) : "memory");
  return old;
}
SAFELORA_DEVICE void add_release(unsigned* p, unsigned v) {
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}
SAFELORA_DEVICE void store_release(unsigned* p, unsigned v) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}
SAFELORA_DEVICE unsigned load_acquire(const unsigned* p) {
  unsigned v;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}
// Between two looks at a flag.
SAFELORA_DEVICE void spin_pause() { __nanosleep(64); }

// ---- global memory, 16 bytes: read once (keeps out of L1), read again soon by other blocks (L2), written

template <class T>
SAFELORA_DEVICE T load_once(const T* p) {
  static_assert(sizeof(T) == 16);
  uint4 v;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return *reinterpret_cast<T*>(&v);
}
template <class T>
SAFELORA_DEVICE T load_l2(const T* p) {
  static_assert(sizeof(T) == 16);
  uint4 v;
  asm volatile("ld.global.cg.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
  return *reinterpret_cast<T*>(&v);
}

// ---- cp.async: 16 bytes from global to shared memory, both 16-byte aligned; `bytes` of them, then zeros

SAFELORA_DEVICE void cp_async16(void* shared, const void* global, int bytes = 16) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(bytes)
               : "memory");
}
SAFELORA_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most N of this thread's groups are under way.
template <int N>
SAFELORA_DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// ---- tensor cores: fragments as PTX defines them

SAFELORA_DEVICE void ldmatrix_x4(unsigned (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
SAFELORA_DEVICE void ldmatrix_x4_trans(unsigned (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
SAFELORA_DEVICE void ldmatrix_x2(unsigned (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
}
SAFELORA_DEVICE void ldmatrix_x2_trans(unsigned (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
}
// c += a·b, m16n8k16
SAFELORA_DEVICE void mma_bf16_16816(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// c += a·b, m16n8k8; the operands' bits are those of fp32, of which the low 13 are cut off
SAFELORA_DEVICE void mma_tf32_1688(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

#if SAFELORA_SM90

// ---- mbarriers: 8 bytes of shared memory each

using Mbarrier = unsigned long long;

// By one thread; mbar_fence_init(), then __syncthreads() or cluster_sync() before anyone uses it.
SAFELORA_DEVICE void mbar_init(Mbarrier* bar, unsigned arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(bar)), "r"(arrivals) : "memory");
}
SAFELORA_DEVICE void mbar_fence_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
SAFELORA_DEVICE void mbar_arrive(Mbarrier* bar) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(bar)) : "memory");
}
// Arrives, and has the phase wait for `bytes` more bytes of copies.
SAFELORA_DEVICE void mbar_arrive_expect(Mbarrier* bar, unsigned bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(bar)), "r"(bytes)
               : "memory");
}
// Until the phase of this parity is over. Phases count from 0.
SAFELORA_DEVICE void mbar_wait(Mbarrier* bar, unsigned parity) {
  unsigned done;
  do {
    asm volatile(
        "{\n.reg .pred p;\nmbarrier.try_wait.parity.acquire.cta.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(shared_address(bar)), "r"(parity)
        : "memory");
  } while (!done);
}
// The same, also ordered behind what other blocks of the cluster wrote before they arrived.
SAFELORA_DEVICE void mbar_wait_cluster(Mbarrier* bar, unsigned parity) {
  unsigned done;
  do {
    asm volatile(
        "{\n.reg .pred p;\nmbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(shared_address(bar)), "r"(parity)
        : "memory");
  } while (!done);
}

// ---- bulk copies, each by one thread; `bar` counts the bytes that have arrived

// Orders ordinary accesses to shared memory before later bulk copies from or to it.
SAFELORA_DEVICE void fence_async_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
// The box of `map` at (row, col) of the matrix; destination 128-byte aligned (1024 with a swizzle of 128).
SAFELORA_DEVICE void tma_load(void* shared, const TensorMap* map, int row, int col, Mbarrier* bar) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::
          "r"(shared_address(shared)),
      "l"(map), "r"(shared_address(bar)), "r"(col), "r"(row)
      : "memory");
}
SAFELORA_DEVICE void tma_prefetch(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}
// `bytes` of global memory; all a multiple of 16.
SAFELORA_DEVICE void bulk_load(void* shared, const void* global, unsigned bytes, Mbarrier* bar) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(shared)),
               "l"(global), "r"(bytes), "r"(shared_address(bar))
               : "memory");
}

// ---- clusters and distributed shared memory: `shared` is this block's address of what is meant in block `rank`

SAFELORA_DEVICE unsigned cluster_rank() {
  unsigned v;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(v));
  return v;
}
SAFELORA_DEVICE unsigned cluster_size() {
  unsigned v;
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(v));
  return v;
}
// All threads of all blocks; arrive releases, wait acquires. A block must not end while others read its memory.
SAFELORA_DEVICE void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
SAFELORA_DEVICE void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
SAFELORA_DEVICE void cluster_sync() {
  cluster_arrive();
  cluster_wait();
}
SAFELORA_DEVICE unsigned cluster_address(const void* shared, unsigned rank) {
  unsigned remote;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(shared_address(shared)), "r"(rank));
  return remote;
}
SAFELORA_DEVICE float cluster_load(const float* shared, unsigned rank) {
  float v;
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(v) : "r"(cluster_address(shared, rank)) : "memory");
  return v;
}
SAFELORA_DEVICE float4 cluster_load(const float4* shared, unsigned rank) {
  float4 v;
  asm volatile("ld.shared::cluster.v4.f32 {%0,%1,%2,%3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "r"(cluster_address(shared, rank))
               : "memory");
  return v;
}
SAFELORA_DEVICE double cluster_load(const double* shared, unsigned rank) {
  double v;
  asm volatile("ld.shared::cluster.f64 %0, [%1];" : "=d"(v) : "r"(cluster_address(shared, rank)) : "memory");
  return v;
}
SAFELORA_DEVICE void cluster_store(float* shared, unsigned rank, float v) {
  asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(cluster_address(shared, rank)), "f"(v) : "memory");
}
SAFELORA_DEVICE void cluster_store(float4* shared, unsigned rank, float4 v) {
  asm volatile("st.shared::cluster.v4.f32 [%0], {%1,%2,%3,%4};" ::"r"(cluster_address(shared, rank)), "f"(v.x),
               "f"(v.y), "f"(v.z), "f"(v.w)
               : "memory");
}
SAFELORA_DEVICE void cluster_store(uint4* shared, unsigned rank, uint4 v) {
  asm volatile("st.shared::cluster.v4.u32 [%0], {%1,%2,%3,%4};" ::"r"(cluster_address(shared, rank)), "r"(v.x),
               "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
}
SAFELORA_DEVICE void cluster_store(double* shared, unsigned rank, double v) {
  asm volatile("st.shared::cluster.f64 [%0], %1;" ::"r"(cluster_address(shared, rank)), "d"(v) : "memory");
}
// Arrives at block `rank`'s barrier; pair with mbar_wait_cluster there.
SAFELORA_DEVICE void mbar_arrive_remote(Mbarrier* bar, unsigned rank) {
  asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(cluster_address(bar, rank))
               : "memory");
}
// `bytes` of this block's shared memory to `shared` and `bar` of block `rank`; by one thread, all a multiple of 16.
SAFELORA_DEVICE void bulk_send(void* shared, const void* from, unsigned bytes, Mbarrier* bar, unsigned rank) {
  asm volatile("cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   cluster_address(shared, rank)),
               "r"(shared_address(from)), "r"(bytes), "r"(cluster_address(bar, rank))
               : "memory");
}

#endif  // SAFELORA_SM90

}  // namespace safelora::cuda

#endif  // __CUDACC__

namespace safelora::cuda {

// ---- conversions

SAFELORA_DEVICE float to_float(float v) { return v; }
SAFELORA_DEVICE float to_float(double v) { return static_cast<float>(v); }
SAFELORA_DEVICE float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }
SAFELORA_DEVICE float to_float(__half v) { return __half2float(v); }

// Entry `index` of memory whose type is known at run time.
SAFELORA_DEVICE float load_float(const void* data, DType dtype, std::int64_t index) {
  switch (dtype) {
    case DType::bf16: return to_float(static_cast<const __nv_bfloat16*>(data)[index]);
    case DType::f16: return to_float(static_cast<const __half*>(data)[index]);
    case DType::f64: return to_float(static_cast<const double*>(data)[index]);
    default: return static_cast<const float*>(data)[index];
  }
}
SAFELORA_DEVICE double load_double(const void* data, DType dtype, std::int64_t index) {
  return dtype == DType::f64 ? static_cast<const double*>(data)[index] : load_float(data, dtype, index);
}
// Rounds to nearest even.
SAFELORA_DEVICE void store_double(void* data, DType dtype, std::int64_t index, double v) {
  switch (dtype) {
    case DType::bf16: static_cast<__nv_bfloat16*>(data)[index] = __double2bfloat16(v); break;
    case DType::f16: static_cast<__half*>(data)[index] = __double2half(v); break;
    case DType::f64: static_cast<double*>(data)[index] = v; break;
    default: static_cast<float*>(data)[index] = static_cast<float>(v);
  }
}
SAFELORA_DEVICE void store_float(void* data, DType dtype, std::int64_t index, float v) {
  switch (dtype) {
    case DType::bf16: static_cast<__nv_bfloat16*>(data)[index] = __float2bfloat16_rn(v); break;
    case DType::f16: static_cast<__half*>(data)[index] = __float2half_rn(v); break;
    case DType::f64: static_cast<double*>(data)[index] = v; break;
    default: static_cast<float*>(data)[index] = v;
  }
}

// Two neighbours, the first in the low half.
SAFELORA_DEVICE unsigned pack_bf16(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const unsigned*>(&pair);
}

}  // namespace safelora::cuda
