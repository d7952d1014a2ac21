// Copies that take effect later: cp.async, and bulk copies and tensor maps, which mbarriers count.
#include <algorithm>
#include <cstring>

#include "simt/state.h"

namespace simt {
namespace {

constexpr unsigned char kZeros[16] = {};

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

}  // namespace simt
