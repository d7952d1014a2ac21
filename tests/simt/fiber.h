// Fibers, and what the sanitizers must be told about them.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <new>

#if defined(SIMT_TSAN)  // the instrumented part is elsewhere, so the compiler does not say it
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_set_fiber_name(void* fiber, const char* name);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
void __tsan_read_range(void* address, unsigned long size);
void __tsan_write_range(void* address, unsigned long size);
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}
#elif defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace simt {

#if !defined(__x86_64__)
#error "the emulator switches stacks on x86-64 only"
#endif
// Saves the callee-saved registers on the stack, the stack pointer in *from, and goes on where `to` was saved.
extern "C" void simt_switch(void** from, void* to);

// One stack, and the host's way back from it.
class Fiber {
 public:
#if defined(__SANITIZE_ADDRESS__)
  static constexpr std::size_t kStack = 512 << 10;
#else
  static constexpr std::size_t kStack = 128 << 10;
#endif

  Fiber() : stack_(new_stack()) {}
  ~Fiber() {
    end();
    munmap(stack_, kStack);
  }
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // `entry` never returns: it leaves for good with leave(true).
  void begin(void (*entry)(), [[maybe_unused]] const char* name) {
    end();
#if defined(SIMT_TSAN)
    munmap(stack_, kStack);  // or what one thread's stack held would race with the next one's
    stack_ = new_stack();
    tsan_ = __tsan_create_fiber(0);
    __tsan_set_fiber_name(tsan_, name);
#elif defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(stack_, kStack);  // of frames that a fault left behind
#endif
    for (std::size_t i = 0; i < sizeof(kCanary); ++i) stack_[i] = kCanary[i];
    void** sp = reinterpret_cast<void**>((reinterpret_cast<std::uintptr_t>(stack_) + kStack) & ~std::uintptr_t{15});
    *--sp = nullptr;  // the alignment that a call leaves
    *--sp = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; ++i) *--sp = nullptr;
    sp_ = sp;
  }

  void end() {
#if defined(SIMT_TSAN)
    if (tsan_) __tsan_destroy_fiber(tsan_);
    tsan_ = nullptr;
#endif
  }

  // Host to fiber.
  void enter() {
#if defined(SIMT_TSAN)
    host_tsan_ = __tsan_get_current_fiber();
    __tsan_switch_to_fiber(tsan_, 1);
#elif defined(__SANITIZE_ADDRESS__)
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(&fake, stack_, kStack);
#endif
    simt_switch(&host_sp_, sp_);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
  }

  // First thing on a new fiber.
  void entered() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &host_bottom_, &host_size_);
#endif
  }

  // Fiber to host.
  void leave([[maybe_unused]] bool for_good) {
#if defined(SIMT_TSAN)
    __tsan_switch_to_fiber(host_tsan_, 1);
#elif defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(for_good ? nullptr : &fake_, host_bottom_, host_size_);
#endif
    simt_switch(&sp_, host_sp_);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake_, &host_bottom_, &host_size_);
#endif
  }

  bool overflowed() const {
    for (std::size_t i = 0; i < sizeof(kCanary); ++i)
      if (stack_[i] != kCanary[i]) return true;
    return false;
  }

 private:
  static unsigned char* new_stack() {
    void* memory = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    return static_cast<unsigned char*>(memory);
  }

  static constexpr unsigned char kCanary[8] = {0xc0, 0xde, 0xca, 0xfe, 0xba, 0xbe, 0xfa, 0xce};
  unsigned char* stack_;
  void* sp_ = nullptr;
  void* host_sp_ = nullptr;
#if defined(SIMT_TSAN)
  void *tsan_ = nullptr, *host_tsan_ = nullptr;
#elif defined(__SANITIZE_ADDRESS__)
  void* fake_ = nullptr;
  const void* host_bottom_ = nullptr;
  std::size_t host_size_ = 0;
#endif
};

}  // namespace simt
