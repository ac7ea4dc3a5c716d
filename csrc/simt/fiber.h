// Fibers: a stack of its own for every simulated CUDA thread, switched without a system call.
#pragma once

#include <csetjmp>
#include <cstddef>
#include <new>

#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

namespace simt::detail {

using Context = jmp_buf;

// Saves the caller in `from` and goes on where `to` was saved.
[[gnu::noinline]] inline void switch_context(Context& from, Context& to) {
  if (_setjmp(from) == 0) {
    _longjmp(to, 1);
  }
}

// ucontext gives a fiber its stack; every later switch is _setjmp/_longjmp, since swapcontext saves
// the signal mask by a system call (285 ns a switch against 18 ns).
class Fiber {
 public:
  static constexpr std::size_t kStackBytes = 128 * 1024;

  Fiber() {
    // The lowest page is a guard: a kernel whose local arrays overflow the stack faults at once.
    guard_bytes_ = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
    void* memory = mmap(
        nullptr, guard_bytes_ + kStackBytes, PROT_READ | PROT_WRITE,
        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) {
      throw std::bad_alloc();
    }
    memory_ = static_cast<std::byte*>(memory);
    mprotect(memory_, guard_bytes_, PROT_NONE);
  }
  ~Fiber() {
    munmap(memory_, guard_bytes_ + kStackBytes);
  }
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // Saves the caller in `from` and goes on in this fiber: at `main` the first time, later where it
  // was left. `main` must not return.
  [[gnu::noinline]] void enter(Context& from, void (*main)()) {
    if (_setjmp(from) != 0) {
      return;
    }
    if (started_) {
      _longjmp(context, 1);
    }
    started_ = true;
    ucontext_t start;
    getcontext(&start);
    start.uc_stack.ss_sp = memory_ + guard_bytes_;
    start.uc_stack.ss_size = kStackBytes;
    start.uc_link = nullptr;
    makecontext(&start, main, 0);
    setcontext(&start);
  }

  // Forgets where the fiber was left; nothing on its stack is destroyed.
  void abandon() {
    started_ = false;
  }

  Context context;

 private:
  std::byte* memory_ = nullptr;
  std::size_t guard_bytes_ = 0;
  bool started_ = false;
};

}  // namespace simt::detail
