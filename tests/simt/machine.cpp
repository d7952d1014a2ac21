#include "simt/machine.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "simt/fiber.h"

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
namespace {

constexpr unsigned kWarp = 32;
constexpr int kIdleRounds = 2000;  // of nothing but spinning, until the machine gives up
// Bytes behind a block's shared memory, where no sanitizer watches over its end.
#if defined(SIMT_TSAN) || defined(__SANITIZE_ADDRESS__)
constexpr std::size_t kGuard = 0;
#else
constexpr std::size_t kGuard = 64;
#endif

// While it lives, the race detector does not look at the machine's own memory, of which fibers share much.
class Quiet {
 public:
  Quiet() { begin(); }
  ~Quiet() { end(); }
  Quiet(const Quiet&) = delete;
  Quiet& operator=(const Quiet&) = delete;
#if defined(SIMT_TSAN)
  static void begin() {
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
  }
  static void end() {
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
  }
#else
  static void begin() {}
  static void end() {}
#endif
};

constexpr unsigned char kZeros[16] = {};

struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

enum class State : std::uint8_t { ready, barrier, collective, cluster, done };

struct Block;
using Copy = std::function<void()>;

struct Thread {
  Place place;
  Block* block;
  unsigned warp;
  State state = State::ready;
  bool spun = false;
  bool cluster_arrived = false, cluster_pending = false;  // in this generation; without its cluster_wait
  unsigned cluster_generation = 0;
  unsigned mask = 0;
  void* operand = nullptr;
  Combine combine = nullptr;
  std::deque<std::vector<Copy>> groups;
  std::vector<Copy> open;
  Fiber* fiber;
};

struct Cluster {
  std::vector<Block*> blocks;
  unsigned live = 0, arrived = 0, generation = 0;
  char order[2] = {};  // addresses that stand for the barrier's two generations
};

struct Block {
  Cluster* cluster;
  unsigned rank;
  bool ready_for_remote = false;  // has passed a cluster barrier
  std::vector<Thread> threads;
  unsigned live = 0, waiting = 0, generation = 0;
  int votes = 0, votes_next = 0;
  unsigned char* shared = nullptr;
  std::size_t shared_bytes = 0;
  char order[2] = {};
  std::vector<char> warp_order;
};

struct Mbar {
  unsigned count, pending;
  std::int64_t bytes = 0;
  unsigned phase = 0;
  std::vector<Copy> copies;
};

struct Program {
  Kernel kernel;
  std::size_t params;
  unsigned max_threads;
};

// Made before any kernel registers, and never destroyed.
std::map<std::string, Program>& programs() {
  static auto* known = new std::map<std::string, Program>;
  return *known;
}

struct Machine {
  Settings settings;
  std::mt19937 random;
  const Program* program = nullptr;
  const void* params = nullptr;
  Thread* running = nullptr;
  std::string fault;
  std::uint64_t progress = 0;
  std::map<const void*, Mbar> mbars;
  std::vector<std::unique_ptr<Fiber>> fibers;  // a pool
  std::vector<Fiber*> free_fibers;
  std::vector<unsigned char*> retired_shared;  // kept under TSan, so that no address means two things
  char order = 0;                              // stands for the end of the launch
};
Machine machine;

Thread& self() { return *machine.running; }

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

bool late() {
  const Copies copies = static_cast<Copies>(machine.settings.copies);
  return copies == Copies::lazy || (copies == Copies::random && machine.random() % 2);
}

// On the machine's behalf, as if the running thread did it.
void transfer(void* to, const void* from, std::size_t bytes) {
  Quiet::end();
  touch(from, bytes, false);
  touch(to, bytes, true);
  Quiet::begin();
  std::memcpy(to, from, bytes);
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

// ---- asynchronous copies

void copy16(void* shared, const void* global, int bytes) {
  const Quiet quiet;
  check_shared(shared, 16, 16, "cp.async");
  require(reinterpret_cast<std::uintptr_t>(global) % 16 == 0, "cp.async: global address not 16-byte aligned");
  require(bytes >= 0 && bytes <= 16, "cp.async: more than 16 bytes");
  const auto copy = [=] {
    if (bytes > 0) transfer(shared, global, static_cast<std::size_t>(bytes));
    if (bytes < 16) transfer(static_cast<unsigned char*>(shared) + bytes, kZeros, static_cast<std::size_t>(16 - bytes));
  };
  if (late())
    self().open.push_back(copy);
  else
    copy();
}

void copy_commit() {
  const Quiet quiet;
  Thread& t = self();
  t.groups.push_back(std::move(t.open));
  t.open.clear();
}

void copy_wait(unsigned groups) {
  const Quiet quiet;
  auto& waiting = self().groups;
  for (; waiting.size() > groups; waiting.pop_front())
    for (const Copy& copy : waiting.front()) copy();
}

namespace {

Mbar& mbar_at(const unsigned long long* bar) {
  require_sm90();
  const auto found = machine.mbars.find(bar);
  require(found != machine.mbars.end(), "an mbarrier that was not initialised");
  touch(bar, sizeof *bar, false);
  return found->second;
}

const void* phase_order(const unsigned long long* bar, unsigned phase) {
  return reinterpret_cast<const char*>(bar) + phase * 4;
}

void complete_phase(Mbar& m) {
  if (m.pending != 0 || m.bytes != 0) return;
  m.phase ^= 1;
  m.pending = m.count;
  ++machine.progress;
}

// `copy` at some time between now and the end of the barrier's phase.
void when_waited_for(unsigned long long* bar, std::int64_t bytes, Copy copy) {
  Mbar& m = mbar_at(bar);
  auto token = std::make_shared<char>();
  release(token.get());
  const Copy run = [=, copy = std::move(copy)] {
    acquire(token.get());
    copy();
    Mbar& then = machine.mbars.at(bar);
    release(phase_order(bar, then.phase));
    then.bytes -= bytes;
    complete_phase(then);
  };
  if (late())
    m.copies.push_back(run);
  else
    run();
}

void run_copies(Mbar& m) {
  const Quiet quiet;
  std::vector<Copy> copies = std::move(m.copies);
  m.copies.clear();
  if (static_cast<Order>(machine.settings.order) == Order::random)
    std::shuffle(copies.begin(), copies.end(), machine.random);
  for (const Copy& copy : copies) copy();
}

}  // namespace

void mbar_init(unsigned long long* bar, unsigned arrivals) {
  require_sm90();
  check_shared(bar, sizeof *bar, 8, "mbarrier");
  require(arrivals > 0 && arrivals < 1u << 20, "an mbarrier must expect between 1 and 2^20 - 1 arrivals");
  touch(bar, sizeof *bar, true);
  const Quiet quiet;
  machine.mbars[bar] = {arrivals, arrivals, 0, 0, {}};
}

void mbar_arrive(unsigned long long* bar, unsigned bytes) {
  Mbar& m = mbar_at(bar);
  require(m.pending > 0, "more arrivals at an mbarrier than it expects");
  release(phase_order(bar, m.phase));
  m.bytes += bytes;
  --m.pending;
  complete_phase(m);
}

void mbar_wait(unsigned long long* bar, unsigned parity) {
  check_shared(bar, sizeof *bar, 8, "mbarrier");
  require(parity < 2, "the parity of an mbarrier's phase is 0 or 1");
  for (;;) {
    Mbar& m = mbar_at(bar);
    if (m.phase != parity) break;
    run_copies(m);
    if (m.phase != parity) break;
    spin();
  }
  acquire(phase_order(bar, parity));
}

void bulk_copy(void* to, const void* from, unsigned bytes, unsigned long long* bar) {
  const Quiet quiet;
  require(bytes % 16 == 0 && reinterpret_cast<std::uintptr_t>(from) % 16 == 0 &&
              reinterpret_cast<std::uintptr_t>(to) % 16 == 0,
          "bulk copy: size or address not a multiple of 16");
  when_waited_for(bar, bytes, [=] { transfer(to, from, bytes); });
}

void box_copy(void* shared, const void* map, int row, int col, unsigned long long* bar) {
  const Quiet quiet;
  Box box;
  std::memcpy(&box, map, sizeof box);
  require(box.magic == kBoxMagic, "tma_load: not a tensor map");
  const std::int64_t width = std::int64_t{box.box_cols} * box.size;
  check_shared(shared, static_cast<std::size_t>(width * box.box_rows), box.swizzle == 128 ? 1024 : 128, "tma_load");
  const std::size_t offset = static_cast<std::size_t>(static_cast<unsigned char*>(shared) - dynamic_shared());
  unsigned char* base = dynamic_shared();
  when_waited_for(bar, width * box.box_rows, [=] {
    for (std::int64_t r = 0; r < box.box_rows; ++r)
      for (std::int64_t c = 0; c < box.box_cols; ++c) {
        // The swizzle exchanges 16-byte groups according to address bits 7 and up.
        const std::size_t at = offset + static_cast<std::size_t>(r * width + c * box.size);
        unsigned char* to = base + (at ^ (at >> 3 & static_cast<std::size_t>(box.swizzle ? box.swizzle - 16 : 0)));
        const std::int64_t i = row + r, j = col + c;
        const bool inside = i >= 0 && i < box.rows && j >= 0 && j < box.cols;
        transfer(to, inside ? box.data + i * box.pitch + j * box.size : kZeros, static_cast<std::size_t>(box.size));
      }
  });
}

// ---- what warps compute together

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
