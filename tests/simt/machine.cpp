// Blocks and fibers: who is resident, who runs next, and where they meet. See machine.h.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "simt/state.h"

asm(R"(.text
.globl simt_switch
.hidden simt_switch
.type simt_switch,@function
simt_switch:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp,(%rdi); movq %rsi,%rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp; ret
.size simt_switch,.-simt_switch
)");

namespace simt {

Machine machine;

namespace {

constexpr int kIdleRounds = 2000;  // of nothing but spinning, until the machine gives up
// Bytes behind a block's shared memory, where no sanitizer watches over its end.
#if defined(SIMT_TSAN) || defined(__SANITIZE_ADDRESS__)
constexpr std::size_t kGuard = 0;
#else
constexpr std::size_t kGuard = 64;
#endif

struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Made before any kernel registers, and never destroyed.
std::map<std::string, Program>& programs() {
  static auto* known = new std::map<std::string, Program>;
  return *known;
}

std::string where(const Place& p) {
  char text[96];
  std::snprintf(text, sizeof text, " [block %u,%u,%u thread %u]", p.block.x, p.block.y, p.block.z, p.thread.x);
  return text;
}

// ---- switching

void stop(State state) {
  Thread& t = self();
  t.state = state;
  if (state != State::ready) ++machine.progress;
  t.fiber->leave(false);
}

void release_block(Block& b) {
  b.waiting = 0;
  ++b.generation;
  b.votes = b.votes_next;
  b.votes_next = 0;
  for (Thread& t : b.threads)
    if (t.state == State::barrier) t.state = State::ready;
}

void release_cluster(Cluster& c) {
  c.arrived = 0;
  ++c.generation;
  for (Block* b : c.blocks) {
    b->ready_for_remote = true;
    for (Thread& t : b->threads) {
      t.cluster_arrived = false;
      if (t.state == State::cluster) t.state = State::ready;
    }
  }
}

void leave_for_good() {
  Thread& t = self();
  Block& b = *t.block;
  Cluster& c = *b.cluster;
  release(&machine.order);
  t.state = State::done;
  ++machine.progress;
  --c.live;
  if (t.cluster_arrived) --c.arrived;
  if (--b.live > 0 && b.waiting == b.live) release_block(b);
  if (c.live > 0 && c.arrived == c.live) release_cluster(c);
}

void fiber_entry() {
  self().fiber->entered();
  try {
    machine.program->kernel(machine.params);
  } catch (const std::exception& e) {
    machine.fault = e.what();
  }
  leave_for_good();
  self().fiber->leave(true);
  std::abort();
}

void resume(Thread& t) {
  machine.running = &t;
  t.spun = false;
  t.fiber->enter();
  machine.running = nullptr;
  if (machine.fault.empty() && t.fiber->overflowed()) machine.fault = "stack overflow of a fiber" + where(t.place);
}

// ---- residency

Fiber* take_fiber() {
  if (machine.free_fibers.empty()) {
    machine.fibers.push_back(std::make_unique<Fiber>());
    return machine.fibers.back().get();
  }
  Fiber* fiber = machine.free_fibers.back();
  machine.free_fibers.pop_back();
  return fiber;
}

unsigned char* new_shared(std::size_t bytes) {
  void* memory = nullptr;
  if (posix_memalign(&memory, 1024, std::max<std::size_t>(bytes + kGuard, 1))) throw std::bad_alloc();
  std::memset(memory, 0xff, bytes);
  std::memset(static_cast<unsigned char*>(memory) + bytes, 0x5a, kGuard);
  return static_cast<unsigned char*>(memory);
}

struct Launch {
  uint3 grid;
  unsigned block;
  std::size_t shared;
  unsigned cluster;
};

std::unique_ptr<Block> start_block(const Launch& l, Cluster& c, std::uint64_t number, unsigned rank) {
  auto b = std::make_unique<Block>();
  b->cluster = &c;
  b->rank = rank;
  b->live = l.block;
  b->shared = new_shared(l.shared);
  b->shared_bytes = l.shared;
  b->warp_order.resize((l.block + kWarp - 1) / kWarp);
  b->threads.resize(l.block);
  const uint3 index = {static_cast<unsigned>(number % l.grid.x), static_cast<unsigned>(number / l.grid.x % l.grid.y),
                       static_cast<unsigned>(number / l.grid.x / l.grid.y)};
  for (unsigned i = 0; i < l.block; ++i) {
    Thread& t = b->threads[i];
    t.place = {{i, 0, 0}, index, dim3(l.block), dim3(l.grid.x, l.grid.y, l.grid.z), i % kWarp, rank, l.cluster};
    t.block = b.get();
    t.warp = i / kWarp;
    t.fiber = take_fiber();
    char name[48];
    std::snprintf(name, sizeof name, "block %u,%u,%u thread %u", index.x, index.y, index.z, i);
    t.fiber->begin(&fiber_entry, name);
  }
  c.live += l.block;
  c.blocks.push_back(b.get());
  return b;
}

void end_block(Block& b) {
  for (std::size_t i = 0; i < kGuard; ++i)
    if (b.shared[b.shared_bytes + i] != 0x5a && machine.fault.empty())
      machine.fault = "a write past the end of shared memory" + where(b.threads[0].place);
  for (Thread& t : b.threads) {
    t.fiber->end();
    machine.free_fibers.push_back(t.fiber);
  }
  const auto from = machine.mbars.lower_bound(b.shared);
  machine.mbars.erase(from, machine.mbars.lower_bound(b.shared + b.shared_bytes));
#if defined(SIMT_TSAN)
  machine.retired_shared.push_back(b.shared);
#else
  std::free(b.shared);
#endif
}

struct Resident {
  Cluster cluster;
  std::vector<std::unique_ptr<Block>> blocks;
};

// ---- scheduling

using Residents = std::vector<std::unique_ptr<Resident>>;

// One pass over everything resident; says whether anything ran that did not merely spin.
bool run_round(Residents& residents) {
  const Order order = static_cast<Order>(machine.settings.order);
  std::vector<Thread*> threads;
  for (auto& r : residents)
    for (auto& b : r->blocks)
      for (Thread& t : b->threads)
        if (t.state != State::done) threads.push_back(&t);
  if (order == Order::reverse || order == Order::greedy_reverse) std::reverse(threads.begin(), threads.end());
  if (order == Order::random) std::shuffle(threads.begin(), threads.end(), machine.random);
  const std::uint64_t before = machine.progress;
  if (order != Order::greedy && order != Order::greedy_reverse) {
    for (Thread* t : threads) {
      if (t->state == State::ready) resume(*t);
      if (!machine.fault.empty()) return true;
    }
    return machine.progress != before;
  }
  // A warp runs until it is stuck; then the next one has its turn.
  for (std::size_t first = 0; first < threads.size();) {
    std::size_t last = first;
    while (last < threads.size() && threads[last]->block == threads[first]->block &&
           threads[last]->warp == threads[first]->warp)
      ++last;
    for (bool again = true; again;) {
      again = false;
      for (std::size_t i = first; i < last; ++i) {
        Thread& t = *threads[i];
        if (t.state != State::ready) continue;
        resume(t);
        if (!machine.fault.empty()) return true;
        again |= !t.spun && t.state != State::done;
      }
    }
    first = last;
  }
  return machine.progress != before;
}

std::string stuck(const Residents& residents) {
  unsigned at[5] = {};
  const Thread* waiting = nullptr;
  for (const auto& r : residents)
    for (const auto& b : r->blocks)
      for (const Thread& t : b->threads) {
        ++at[static_cast<int>(t.state)];
        if (t.state != State::done && (!waiting || t.state != State::ready)) waiting = &t;
      }
  char text[200];
  std::snprintf(text, sizeof text,
                "deadlock: %u threads wait for a flag or copy, %u at a barrier, %u in a warp function, %u at a cluster "
                "barrier, %u have ended",
                at[0], at[1], at[2], at[3], at[4]);
  return text + (waiting ? where(waiting->place) : std::string());
}

void run_grid(const Launch& l) {
  const std::uint64_t clusters = std::uint64_t{l.grid.x} * l.grid.y * l.grid.z / l.cluster;
  const Order order = static_cast<Order>(machine.settings.order);
  std::vector<std::uint64_t> queue(clusters);
  for (std::uint64_t i = 0; i < clusters; ++i) queue[i] = i;
  if (order == Order::reverse || order == Order::greedy_reverse) std::reverse(queue.begin(), queue.end());
  if (order == Order::random) std::shuffle(queue.begin(), queue.end(), machine.random);
  std::size_t next = 0;
  Residents residents;
  const std::size_t room = static_cast<std::size_t>(std::max(1, machine.settings.concurrent));
  for (int idle = 0; machine.fault.empty();) {
    while (residents.size() < room && next < queue.size()) {
      residents.push_back(std::make_unique<Resident>());
      for (unsigned rank = 0; rank < l.cluster; ++rank)
        residents.back()->blocks.push_back(
            start_block(l, residents.back()->cluster, queue[next] * l.cluster + rank, rank));
      ++next;
    }
    if (residents.empty()) break;
    idle = run_round(residents) ? 0 : idle + 1;
    if (machine.fault.empty() && idle > kIdleRounds) machine.fault = stuck(residents);
    bool runnable = false;
    for (auto& r : residents)
      for (auto& b : r->blocks)
        for (Thread& t : b->threads) runnable |= t.state == State::ready;
    for (auto& r : residents)
      if (r->cluster.live == 0) {
        for (auto& b : r->blocks) end_block(*b);
        r.reset();
        runnable = true;
      }
    residents.erase(std::remove(residents.begin(), residents.end(), nullptr), residents.end());
    if (machine.fault.empty() && !runnable) machine.fault = stuck(residents);
  }
  for (auto& r : residents)
    for (auto& b : r->blocks) end_block(*b);
}

}  // namespace

Settings& settings() { return machine.settings; }

Registered::Registered(const char* name, Kernel kernel, std::size_t params, unsigned max_threads) {
  programs()[name] = {kernel, params, max_threads};
}

void launch(const char* kernel, const uint3& grid, unsigned block, std::size_t shared, unsigned cluster,
            const void* params, std::size_t bytes) {
  const auto refuse = [&](const char* why) { throw std::runtime_error(std::string(kernel) + ": " + why); };
  const auto known = programs().find(kernel);
  if (known == programs().end()) refuse("no such kernel is linked in");
  const Settings& s = machine.settings;
  if (known->second.params != bytes) refuse("the size of the parameters differs between host and kernel");
  if (block == 0 || block > std::min(1024u, known->second.max_threads)) refuse("more threads than __launch_bounds__");
  if (shared > static_cast<std::size_t>(s.shared_bytes)) refuse("more shared memory than a block can have");
  if (grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) refuse("the grid is too large");
  if (cluster == 0 || cluster > 16 || grid.x % cluster) refuse("the cluster does not divide the grid");
  if (cluster > 1 && s.arch < 90) refuse("clusters need sm_90");
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  if (machine.running) refuse("launched from a kernel");

  const Quiet quiet;
  void* copy = nullptr;
  if (posix_memalign(&copy, 64, bytes)) throw std::bad_alloc();
  std::memcpy(copy, params, bytes);
  machine.program = &known->second;
  machine.params = copy;
  machine.fault.clear();
  machine.random.seed(static_cast<unsigned>(s.seed));
  run_grid({grid, block, shared, cluster});
  acquire(&machine.order);
  for (unsigned char* memory : machine.retired_shared) std::free(memory);
  machine.retired_shared.clear();
  machine.mbars.clear();
  std::free(copy);
  if (!machine.fault.empty()) refuse(machine.fault.c_str());
}

const Place& place() { return self().place; }
unsigned char* dynamic_shared() { return self().block->shared; }

void fail(const char* what) { throw Fault(what + where(self().place)); }
void require(bool condition, const char* what) {
  if (!condition) fail(what);
}
void require_sm90() { require(machine.settings.arch >= 90, "this instruction needs sm_90"); }

void spin() {
  self().spun = true;
  stop(State::ready);
}

// ---- barriers

void block_barrier() {
  Block& b = *self().block;
  const unsigned generation = b.generation % 2;
  release(&b.order[generation]);
  self().state = State::barrier;
  if (++b.waiting == b.live) release_block(b);
  ++machine.progress;
  self().fiber->leave(false);
  acquire(&b.order[generation]);
}

int block_reduce(int predicate, int op) {
  Block& b = *self().block;
  b.votes_next += predicate != 0;
  const int live = static_cast<int>(b.live);
  block_barrier();
  return op == 0 ? b.votes == live : op == 1 ? b.votes > 0 : b.votes;
}

void cluster_barrier_arrive() {
  require_sm90();
  Thread& t = self();
  Cluster& c = *t.block->cluster;
  require(!t.cluster_pending, "a second cluster_arrive without a cluster_wait");
  release(&c.order[c.generation % 2]);
  t.cluster_arrived = t.cluster_pending = true;
  t.cluster_generation = c.generation;
  if (++c.arrived == c.live) release_cluster(c);
}

void cluster_barrier_wait() {
  Thread& t = self();
  Cluster& c = *t.block->cluster;
  require(t.cluster_pending, "cluster_wait without cluster_arrive");
  t.cluster_pending = false;
  if (t.cluster_generation == c.generation) stop(State::cluster);
  acquire(&c.order[t.cluster_generation % 2]);
}

void check_shared(const void* p, std::size_t bytes, std::size_t alignment, const char* what) {
  const Block& b = *self().block;
  const auto at = static_cast<const unsigned char*>(p);
  if (at < b.shared || at + bytes > b.shared + b.shared_bytes)
    fail((std::string(what) + ": outside of this block's shared memory").c_str());
  if (reinterpret_cast<std::uintptr_t>(p) % alignment)
    fail((std::string(what) + ": shared address not aligned").c_str());
}

void* map_to_rank(const void* shared, unsigned rank, std::size_t bytes) {
  require_sm90();
  check_shared(shared, bytes, 1, "address in the cluster");
  const Block& here = *self().block;
  const Cluster& c = *here.cluster;
  require(rank < c.blocks.size(), "no block of this rank in the cluster");
  const Block& there = *c.blocks[rank];
  require(here.ready_for_remote || rank == here.rank, "another block's memory before any cluster barrier");
  require(there.live > 0, "the memory of a block that has ended");
  return there.shared + (static_cast<const unsigned char*>(shared) - here.shared);
}

// ---- warps

void collective(unsigned mask, void* operand, Combine combine, bool ordered) {
  Thread& t = self();
  Block& b = *t.block;
  require(mask >> t.place.lane & 1, "a warp function whose mask lacks the calling lane");
  if (ordered) release(&b.warp_order[t.warp]);
  t.operand = operand;
  t.mask = mask;
  t.combine = combine;
  t.state = State::collective;
  Thread* lanes = &b.threads[t.warp * kWarp];
  const unsigned count = std::min<unsigned>(kWarp, static_cast<unsigned>(b.threads.size()) - t.warp * kWarp);
  bool complete = true;
  void* operands[32] = {};
  for (unsigned l = 0; l < kWarp; ++l) {
    if (!(mask >> l & 1)) continue;
    if (l >= count || lanes[l].state == State::done) fail("a warp function whose mask names a lane that has ended");
    if (lanes[l].state == State::collective && lanes[l].mask == mask) {
      if (lanes[l].combine != combine) fail("lanes of a warp meet in different warp functions");
      operands[l] = lanes[l].operand;
    } else {
      complete = false;
    }
  }
  if (complete) {
    combine(operands, mask);
    for (unsigned l = 0; l < kWarp; ++l)
      if (mask >> l & 1) lanes[l].state = State::ready;
  }
  ++machine.progress;
  if (!complete) t.fiber->leave(false);
  if (ordered) acquire(&b.warp_order[t.warp]);
}

unsigned active_lanes() {
  const Thread& t = self();
  const Block& b = *t.block;
  unsigned lanes = 0;
  for (unsigned l = 0; l < kWarp && t.warp * kWarp + l < b.threads.size(); ++l)
    if (b.threads[t.warp * kWarp + l].state != State::done) lanes |= 1u << l;
  return lanes;
}

// ---- ordering

#if defined(SIMT_TSAN)
void release(const void* what) { __tsan_release(const_cast<void*>(what)); }
void acquire(const void* what) { __tsan_acquire(const_cast<void*>(what)); }
void touch(const void* p, std::size_t bytes, bool write) {
  (write ? __tsan_write_range : __tsan_read_range)(const_cast<void*>(p), bytes);
}
#else
void release(const void*) {}
void acquire(const void*) {}
void touch(const void*, std::size_t, bool) {}
#endif

}  // namespace simt
