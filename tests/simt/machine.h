// The emulated GPU: blocks of fibers, one fiber per CUDA thread, on one host thread.
//
// Up to Settings::concurrent clusters (blocks, where there are none) are resident at a time. A fiber runs until it must
// wait: at a barrier, in a warp collective, at a flag another block sets. What runs next depends on Settings::order.
// Asynchronous copies take effect as late as they may, as early, or at random, and shared memory starts as NaN, so that
// a missing wait or barrier changes results in some order. Whatever the hardware leaves undefined and the machine
// notices is an error. Under -fsanitize=thread the fibers are threads to the race detector, and only the order that
// CUDA guarantees counts as order; under -fsanitize=address each block's shared memory is a heap block of its own.
//
// This interface is free of containers: kernels are compiled with sanitizers, the machine is not with TSan.
#pragma once

#include <vector_types.h>

#include <cstddef>
#include <cstdint>

namespace simt {

enum class Order : int { forward, reverse, random, greedy, greedy_reverse };
enum class Copies : int { lazy, eager, random };
// How a tensor core adds: exactly, with one rounding; or as the A100 is known to, cutting off what lies below the
// largest addend's 25 bits.
enum class Adder : int { exact, truncating };

// The emulated device, and how it behaves. One per process, set from Python: keep in step with emulated.py.
struct Settings {
  int arch = 80;
  int sm_count = 2;
  std::int64_t l2_bytes = 40 << 20;
  std::int64_t shared_bytes = 163 << 10;
  int resident = 0;    // blocks that resident_blocks() reports; 0: sm_count
  int concurrent = 1;  // clusters that do run at the same time
  int order = 0;
  int seed = 0;
  int copies = 0;
  int adder = 1;
};
Settings& settings();

using Kernel = void (*)(const void* params);
struct Registered {
  Registered(const char* name, Kernel kernel, std::size_t params, unsigned max_threads);
};

// Throws std::runtime_error with the fault, and where it happened.
void launch(const char* kernel, const uint3& grid, unsigned block, std::size_t shared, unsigned cluster,
            const void* params, std::size_t bytes);

// ---- what the running thread sees

struct Place {
  uint3 thread, block;
  dim3 block_dim, grid_dim;
  unsigned lane, cluster_rank, cluster_size;
};
const Place& place();
unsigned char* dynamic_shared();

[[noreturn]] void fail(const char* what);
void require(bool condition, const char* what);
void require_sm90();
// Lets the others run; the machine gives up when nobody does anything but this.
void spin();

void block_barrier();
int block_reduce(int predicate, int op);  // 0 and, 1 or, 2 count
void cluster_barrier_arrive();
void cluster_barrier_wait();
// This block's shared address in block `rank` of its cluster.
void* map_to_rank(const void* shared, unsigned rank, std::size_t bytes);
void check_shared(const void* p, std::size_t bytes, std::size_t alignment, const char* what);

// All lanes of `mask` meet; `combine` sees the operand of each once, and they go on. `ordered`: as __syncwarp orders.
using Combine = void (*)(void* const (&operands)[32], unsigned mask);
void collective(unsigned mask, void* operand, Combine combine, bool ordered);
struct Shuffle {
  std::uint64_t value;
  int source;
  bool missing;
};
void shuffle(void* const (&lanes)[32], unsigned mask);
void ballot(void* const (&lanes)[32], unsigned mask);
void match(void* const (&lanes)[32], unsigned mask);
unsigned active_lanes();

// ---- ordering, for the race detector

void release(const void* what);
void acquire(const void* what);
void touch(const void* p, std::size_t bytes, bool write);

// ---- asynchronous copies

void copy16(void* shared, const void* global, int bytes);
void copy_commit();
void copy_wait(unsigned groups);

struct Box {  // what a tensor map says
  std::uint64_t magic;
  const unsigned char* data;
  std::int64_t rows, cols, pitch;
  std::int32_t size, box_rows, box_cols, swizzle;
};
constexpr std::uint64_t kBoxMagic = 0x626f785f74656e73;

void mbar_init(unsigned long long* bar, unsigned arrivals);
void mbar_arrive(unsigned long long* bar, unsigned bytes);
void mbar_wait(unsigned long long* bar, unsigned parity);
void bulk_copy(void* to, const void* from, unsigned bytes, unsigned long long* bar);
void box_copy(void* shared, const void* map, int row, int col, unsigned long long* bar);

// ---- tensor cores

void load_matrices(unsigned* r, const void* row, int matrices, bool transposed);
void mma_bf16_16816(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]);
void mma_tf32_1688(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]);

}  // namespace simt
