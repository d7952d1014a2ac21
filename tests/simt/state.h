// What the machine's parts share; kernels do not see it.
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "simt/fiber.h"
#include "simt/machine.h"

namespace simt {

constexpr unsigned kWarp = 32;

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
extern Machine machine;

inline Thread& self() { return *machine.running; }

}  // namespace simt
