// The executor: runs a kernel block by block, the threads of a block as fibers.
//
// A thread runs until it exits or waits at a collective operation; then a thread drawn at random
// from those that can run goes on. Blocks are run one after the other in random order. All
// randomness comes from the seed of the stream, so a run can be repeated.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <map>
#include <memory>
#include <numeric>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "common.h"
#include "launch_bounds.h"
#include "memory.h"
#include "thread.h"

namespace simt {

// Stands for cudaStream_t in a launch.
using Stream = Device;

namespace detail {

constexpr std::size_t kStaticSharedLimit = std::size_t{48} * 1024;
constexpr std::size_t kMaxBlocks = std::size_t{1} << 24;  // of ours: a test beyond is a mistake

// splitmix64 (Steele, Lea and Flood 2014).
class Random {
 public:
  explicit Random(std::uint64_t seed) : state_(seed) {}

  // A number in [0, n).
  std::size_t below(std::size_t n) {
    std::uint64_t z = state_ += 0x9E3779B97F4A7C15;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB;
    z ^= z >> 31;
    return static_cast<std::size_t>((static_cast<unsigned __int128>(z) * n) >> 64);
  }

 private:
  std::uint64_t state_;
};

class Executor {
 public:
  struct Body {
    void (*call)(void*);
    void* data;
  };

  void launch(
      const char* name,
      const void* kernel,
      const dim3& grid,
      const dim3& block,
      std::size_t shared_bytes,
      const Stream& stream,
      Body body) {
    if (active.current != nullptr) {
      fail("a kernel cannot launch a kernel");
    }
    check_launch(name, kernel, grid, block, shared_bytes, stream);
    body_ = body;
    random_ = Random(stream.seed);
    const std::uint32_t next_serial = active.serial + 1;
    active = Launch{};
    active.kernel = name;
    active.grid = grid;
    active.block = block;
    active.first_serial = next_serial;
    active.serial = next_serial - 1;
    while (threads_.size() < thread_count()) {
      threads_.push_back(std::make_unique<Thread>());
    }
    static_shared_.clear();
    dynamic_shared_ = std::make_unique<Region>(
        "dynamic shared memory", Space::kShared, static_cast<std::int64_t>(shared_bytes), 4);

    const std::size_t all = std::size_t{grid.x} * grid.y * grid.z;
    std::vector<std::size_t> order(std::min(all, stream.blocks));
    std::iota(order.begin(), order.end(), all - order.size());
    for (std::size_t i = order.size(); i > 1; --i) {
      std::swap(order[i - 1], order[random_.below(i)]);
    }
    for (const std::size_t i : order) {
      run_block(
          uint3{
              static_cast<unsigned>(i % grid.x), static_cast<unsigned>(i / grid.x % grid.y),
              static_cast<unsigned>(i / grid.x / grid.y)});
    }
  }

  // Called by the running thread: waits for the threads it must meet, returns what came of it.
  std::uint64_t arrive(const Arrival& arrival) {
    Thread& self = *active.current;
    self.arrival = arrival;
    if (is_block_wide(arrival.kind)) {
      complete_block();
    } else {
      if ((arrival.mask >> self.lane() & 1) == 0) {
        fail(
            std::string("the mask of ") + text(arrival.kind) + " at " + text(arrival.site) +
            " lacks the calling lane");
      }
      complete_warp(self);
    }
    yield(self);
    return self.arrival.result;
  }

  Region* dynamic_shared() const {
    return dynamic_shared_.get();
  }

  // The shared array that is declared at `key`, the same for all threads of a block.
  Region* static_shared(const void* key, const char* name, std::size_t bytes, std::size_t granule) {
    for (const auto& [known, region] : static_shared_) {
      if (known == key) {
        return region.get();
      }
    }
    std::size_t static_bytes = bytes;
    for (const auto& [known, region] : static_shared_) {
      static_bytes += static_cast<std::size_t>(region->bytes);
    }
    const auto dynamic_bytes = static_cast<std::size_t>(dynamic_shared_->bytes);
    if (static_bytes > kStaticSharedLimit || static_bytes + dynamic_bytes > block_shared_limit_) {
      fail(
          std::string("shared array ") + name + ": " + std::to_string(static_bytes) +
          " bytes of static and " + std::to_string(dynamic_bytes) +
          " of dynamic shared memory, allowed are " + std::to_string(kStaticSharedLimit) +
          " static, " + std::to_string(block_shared_limit_) + " together");
    }
    static_shared_.emplace_back(
        key,
        std::make_unique<Region>(name, Space::kShared, static_cast<std::int64_t>(bytes), granule));
    return static_shared_.back().second.get();
  }

  // Ends the running thread with a message, without unwinding its stack.
  [[noreturn]] void abort_thread(const std::string& message) {
    error_ = std::make_exception_ptr(Error(where(*active.current) + ": " + message));
    _longjmp(host_, 1);
  }

  // What a thread's fiber runs: the kernel, once for every block.
  [[noreturn]] void thread_main() {
    for (;;) {
      try {
        body_.call(body_.data);
        finish();
      } catch (const Error&) {
        error_ = std::current_exception();
      } catch (const std::exception& other) {
        error_ = std::make_exception_ptr(Error(where(*active.current) + ": " + other.what()));
      }
      Thread& self = *active.current;
      if (error_ != nullptr) {
        switch_context(self.fiber.context, host_);
      }
      yield(self);
    }
  }

 private:
  std::size_t thread_count() const {
    return std::size_t{active.block.x} * active.block.y * active.block.z;
  }

  void check_launch(
      const char* name,
      const void* kernel,
      const dim3& grid,
      const dim3& block,
      std::size_t shared_bytes,
      const Stream& stream) {
    const auto refuse = [name](const std::string& what) {
      throw LaunchError(std::string(name) + ": " + what);
    };
    if (grid.x < 1 || grid.y < 1 || grid.z < 1 || grid.x > 0x7FFFFFFF || grid.y > 65535 ||
        grid.z > 65535) {
      refuse("grid must be in 1..(2147483647, 65535, 65535), got " + text(grid));
    }
    if (block.x < 1 || block.y < 1 || block.z < 1 || block.x > 1024 || block.y > 1024 ||
        block.z > 64) {
      refuse("block must be in 1..(1024, 1024, 64), got " + text(block));
    }
    if (std::size_t{block.x} * block.y * block.z > kMaxThreads) {
      refuse("block must have at most 1024 threads, got " + text(block));
    }
    if (const unsigned bound = launch_bound(kernel); block.x * block.y * block.z > bound) {
      refuse(
          "block " + text(block) + " has more threads than the " + std::to_string(bound) +
          " of __launch_bounds__");
    }
    if (std::min(std::size_t{grid.x} * grid.y * grid.z, stream.blocks) > kMaxBlocks) {
      refuse("grid " + text(grid) + " is valid, but too large to be run on the CPU");
    }
    if (shared_bytes > stream.shared_limit) {
      refuse(
          std::to_string(shared_bytes) + " bytes of dynamic shared memory, the device has " +
          std::to_string(stream.shared_limit));
    }
    block_shared_limit_ = stream.shared_limit;
  }

  void run_block(const uint3& index) {
    const std::size_t count = thread_count();
    active.block_index = index;
    ++active.serial;
    active.epoch = 0;
    active.acquired = false;
    active.fences.push_back(0);
    dynamic_shared_->poison();
    for (const auto& [key, region] : static_shared_) {
      region->poison();
    }
    exited_ = 0;
    runnable_.clear();
    for (std::size_t i = 0; i < count; ++i) {
      Thread& thread = *threads_[i];
      const auto linear = static_cast<unsigned>(i);
      const dim3& block = active.block;
      thread.linear = linear;
      thread.index =
          uint3{linear % block.x, linear / block.x % block.y, linear / block.x / block.y};
      thread.exited = false;
      thread.arrival = Arrival{};
      runnable_.push_back(&thread);
    }
    run_threads();
    if (error_ == nullptr && exited_ < count) {
      error_ = std::make_exception_ptr(Error(describe_stuck()));
    }
    active.current = nullptr;
    if (error_ != nullptr) {
      for (const auto& thread : threads_) {
        thread->fiber.abandon();
      }
      std::rethrow_exception(std::exchange(error_, nullptr));
    }
  }

  // Returns when no thread can run.
  void run_threads();

  Thread* draw() {
    if (runnable_.empty()) {
      return nullptr;
    }
    std::swap(runnable_[random_.below(runnable_.size())], runnable_.back());
    Thread* thread = runnable_.back();
    runnable_.pop_back();
    return thread;
  }

  // Hands over from `self` to the next thread, or to the host when none can run.
  void yield(Thread& self);

  void release(Thread& thread, std::uint64_t result) {
    thread.arrival.result = result;
    thread.arrival.kind = Collective::kNone;
    runnable_.push_back(&thread);
  }

  // Releases the block when all its threads stand at the same barrier. Threads that exited never
  // arrive: CUDA lets a block go on without them, we do not.
  void complete_block() {
    const std::size_t count = thread_count();
    const Arrival& first = threads_[0]->arrival;
    std::uint64_t number = 0;
    for (std::size_t i = 0; i < count; ++i) {
      if (!is_block_wide(first.kind) || !threads_[i]->arrival.meets(first)) {
        return;
      }
      number += threads_[i]->arrival.value;
    }
    std::uint64_t result = number;
    if (first.kind == Collective::kSyncthreadsOr) {
      result = number > 0 ? 1 : 0;
    } else if (first.kind == Collective::kSyncthreadsAnd) {
      result = number == count ? 1 : 0;
    }
    if (++active.epoch > kMostBarriers) {
      fail("no end after " + std::to_string(kMostBarriers) + " barriers");
    }
    for (std::size_t i = 0; i < count; ++i) {
      release(*threads_[i], result);
    }
  }

  Thread* lane_of_warp(const Thread& thread, unsigned lane) const {
    const std::size_t i = thread.linear - thread.lane() + lane;
    return i < thread_count() ? threads_[i].get() : nullptr;
  }

  // Releases the lanes that `self` waits for when they all stand at the same place. Lanes that
  // exited, or that a block of fewer threads never had, are not waited for.
  void complete_warp(Thread& self) {
    const Arrival common = self.arrival;
    Thread* lanes[kWarpSize] = {};
    for (unsigned lane = 0; lane < kWarpSize; ++lane) {
      Thread* thread = lane_of_warp(self, lane);
      if ((common.mask >> lane & 1) == 0 || thread == nullptr || thread->exited) {
        continue;
      }
      if (!thread->arrival.meets(common)) {
        return;
      }
      lanes[lane] = thread;
    }
    if (common.kind == Collective::kSyncwarp) {
      join_order(lanes);
    }
    std::uint64_t ballot = 0;
    bool all = true;
    for (unsigned lane = 0; lane < kWarpSize; ++lane) {
      if (lanes[lane] != nullptr) {
        const bool vote = lanes[lane]->arrival.value != 0;
        ballot |= std::uint64_t{vote} << lane;
        all = all && vote;
      }
    }
    for (Thread* thread : lanes) {
      if (thread == nullptr) {
        continue;
      }
      std::uint64_t result = 0;
      switch (common.kind) {
        case Collective::kShuffle:
          result = shuffled(*thread, lanes);
          break;
        case Collective::kBallot:
          result = ballot;
          break;
        case Collective::kAny:
          result = ballot != 0 ? 1 : 0;
          break;
        case Collective::kAll:
          result = all ? 1 : 0;
          break;
        default:
          break;
      }
      release(*thread, result);
    }
  }

  static std::uint64_t shuffled(const Thread& thread, Thread* const (&lanes)[kWarpSize]) {
    const Arrival& arrival = thread.arrival;
    const Thread* source = lanes[arrival.source];
    if (source == nullptr) {
      throw Error(
          where(thread) + ": the shuffle at " + text(arrival.site) + " reads lane " +
          std::to_string(arrival.source) + ", which does not take part");
    }
    return source->arrival.value;
  }

  // __syncwarp: whatever happened before for one of the lanes happened before for all.
  static void join_order(Thread* const (&lanes)[kWarpSize]) {
    std::array<std::uint32_t, kWarpSize> joined{};
    for (Thread* thread : lanes) {
      if (thread != nullptr) {
        thread->ordered[thread->lane()] = ++thread->segment;
        for (unsigned i = 0; i < kWarpSize; ++i) {
          joined[i] = std::max(joined[i], thread->ordered[i]);
        }
      }
    }
    for (Thread* thread : lanes) {
      if (thread != nullptr) {
        thread->ordered = joined;
      }
    }
  }

  // The running thread is done. Lanes of its warp may have waited only for it.
  void finish() {
    Thread& self = *active.current;
    self.exited = true;
    ++exited_;
    for (unsigned lane = 0; lane < kWarpSize; ++lane) {
      Thread* thread = lane_of_warp(self, lane);
      if (thread != nullptr && thread->arrival.kind != Collective::kNone &&
          !is_block_wide(thread->arrival.kind)) {
        complete_warp(*thread);
      }
    }
  }

  // Where everybody stands when nobody can go on.
  std::string describe_stuck() const {
    std::map<std::string, std::vector<unsigned>> places;
    for (std::size_t i = 0; i < thread_count(); ++i) {
      const Thread& thread = *threads_[i];
      const Arrival& arrival = thread.arrival;
      std::string place = "exited";
      if (!thread.exited) {
        place = std::string("wait at ") + text(arrival.kind) + " (" + text(arrival.site) + ")";
        if (!is_block_wide(arrival.kind)) {
          char mask[16];
          std::snprintf(mask, sizeof mask, "%#x", arrival.mask);
          place += std::string(" with mask ") + mask;
        }
      }
      places[place].push_back(thread.linear);
    }
    std::string message = active.kernel + ", block " + text(active.block_index) +
                          ": divergent barrier: the threads do not meet";
    const char* separator = ": ";
    for (const auto& [place, members] : places) {
      message += separator + std::string("threads ") + ranges(members) + " " + place;
      separator = "; ";
    }
    return message;
  }

  // {0, 1, 2, 5} -> "0-2,5"
  static std::string ranges(const std::vector<unsigned>& sorted) {
    std::string result;
    for (std::size_t i = 0; i < sorted.size();) {
      std::size_t last = i;
      while (last + 1 < sorted.size() && sorted[last + 1] == sorted[last] + 1) {
        ++last;
      }
      result += (result.empty() ? "" : ",") + std::to_string(sorted[i]);
      if (last > i) {
        result += "-" + std::to_string(sorted[last]);
      }
      i = last + 1;
    }
    return result;
  }

  Body body_{};
  Random random_{0};
  std::vector<std::unique_ptr<Thread>> threads_;  // of the running block, and spare ones
  std::vector<Thread*> runnable_;
  std::size_t exited_ = 0;
  std::exception_ptr error_;
  Context host_;

  std::size_t block_shared_limit_ = 0;
  std::unique_ptr<Region> dynamic_shared_;
  std::vector<std::pair<const void*, std::unique_ptr<Region>>> static_shared_;
};

inline Executor executor;

inline void fiber_main() {
  executor.thread_main();
}

inline void Executor::run_threads() {
  active.current = draw();
  active.accesses = 0;
  active.current->fiber.enter(host_, fiber_main);
}

inline void Executor::yield(Thread& self) {
  Thread* next = draw();
  active.accesses = 0;
  if (next == &self) {
    return;
  }
  if (next == nullptr) {
    switch_context(self.fiber.context, host_);
    return;
  }
  active.current = next;
  next->fiber.enter(self.fiber.context, fiber_main);
}

}  // namespace detail

// The most shared memory that a block can have on the device of `stream`.
inline std::size_t shared_limit(const Stream& stream) {
  return stream.shared_limit;
}

// How many blocks can run at the same time at least: for kernels whose blocks loop over the work.
inline int multiprocessor_count(const Stream& stream) {
  return stream.multiprocessor_count;
}

// Runs every block of the grid to its end. Throws LaunchError where CUDA would refuse the launch
// and Error for a mistake of the kernel.
template <typename... P, typename... A>
void launch(
    const Kernel<P...>& kernel,
    const dim3& grid,
    const dim3& block,
    std::size_t shared_bytes,
    const Stream& stream,
    const A&... arguments) {
  struct Call {
    void (*function)(P...);
    std::tuple<P...> arguments;
  } call{kernel.function, std::tuple<P...>(arguments...)};
  // Every thread gets its own copy of the arguments, as in CUDA.
  const auto run = [](void* data) {
    const Call& made = *static_cast<const Call*>(data);
    std::apply(made.function, made.arguments);
  };
  detail::executor.launch(
      kernel.name, reinterpret_cast<const void*>(kernel.function), grid, block, shared_bytes,
      stream, detail::Executor::Body{run, &call});
}

}  // namespace simt
