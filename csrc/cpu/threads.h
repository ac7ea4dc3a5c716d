// Threads of the operators on the CPU, but for the merge: it waits for memory and not for cores.
//
// at::parallel_for gives each call as many threads as torch.set_num_threads says, and where several
// threads of a program call at once each of them gets its own: more than there are cores, which then
// wait for each other at the end of every region. Calls that are under way share them instead; what
// they compute does not depend on how many they get.

#pragma once

#include <ATen/Parallel.h>
#include <pthread.h>

#include <algorithm>
#include <atomic>

namespace immunize_ext {

inline std::atomic<int64_t> calls_under_way{0};

// A fork has none of the threads whose calls were under way.
inline const int forgotten_in_forks = pthread_atfork(nullptr, nullptr, [] { calls_under_way = 0; });

// One call of an operator, while it stands.
class Call {
 public:
  Call() {
    ++calls_under_way;
  }
  ~Call() {
    --calls_under_way;
  }
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;
};

// f(begin, end) over [0, count) in slices of at least `grain`; in place within a parallel region.
template <typename F>
void parallel_for(int64_t count, int64_t grain, const F& f) {
  const int64_t calls = std::max<int64_t>(1, calls_under_way);
  const int64_t threads = std::max<int64_t>(1, at::get_num_threads() / calls);
  at::parallel_for(0, count, std::max(grain, (count + threads - 1) / threads), f);
}

// How the torch-free kernels spread work over threads.
struct Threads {
  template <typename F>
  void operator()(int64_t count, int64_t grain, const F& f) const {
    parallel_for(count, grain, f);
  }
};

}  // namespace immunize_ext
