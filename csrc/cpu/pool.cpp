#include "pool.h"

#include <pthread.h>
#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <string>
#include <utility>
#include <vector>

namespace immunize_ext::pool {
namespace {

constexpr int64_t kCalls = 32;
// Sizes are rounded up, so that layers of nearly the same size share blocks.
constexpr int64_t kGranule = int64_t{1} << 16;
constexpr int64_t kHugePage = int64_t{1} << 21;

void* map_memory(int64_t bytes) {
  void* const memory =
      mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED)
    throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
  if (bytes >= kHugePage)
    madvise(memory, bytes, MADV_HUGEPAGE);  // nothing is lost where the advice is not taken
#endif
  return memory;
}

void discard(Block* block) {
  munmap(block->memory, block->bytes);
  delete block;
}

class Pool {
 public:
  void begin_call() {
    const std::lock_guard<std::mutex> lock(mutex_);
    ++call_;
    peak() = in_use_;
    for (auto& [bytes, blocks] : free_) {
      // The one used last stands last.
      const auto kept = std::find_if(blocks.begin(), blocks.end(), [&](const Block* block) {
        return block->call + kCalls > call_;
      });
      std::for_each(blocks.begin(), kept, discard);
      waiting_ -= bytes * (kept - blocks.begin());
      blocks.erase(blocks.begin(), kept);
    }
  }

  Block* acquire(int64_t bytes) {
    bytes = (bytes + kGranule - 1) / kGranule * kGranule;
    const std::lock_guard<std::mutex> lock(mutex_);
    std::vector<Block*>& blocks = free_[bytes];
    Block* block = nullptr;
    if (blocks.empty()) {
      block = new Block{map_memory(bytes), bytes, call_};
    } else {
      block = blocks.back();
      blocks.pop_back();
      waiting_ -= bytes;
    }
    in_use_ += bytes;
    peak() = std::max(peak(), in_use_);
    make_room(0);
    return block;
  }

  void release(Block* block) {
    const std::lock_guard<std::mutex> lock(mutex_);
    in_use_ -= block->bytes;
    make_room(block->bytes);
    block->call = call_;
    free_[block->bytes].push_back(block);
    waiting_ += block->bytes;
  }

  int64_t waiting() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return waiting_;
  }

  int64_t empty() {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (auto& [bytes, blocks] : free_)
      std::for_each(blocks.begin(), blocks.end(), discard);
    free_.clear();
    peak_.fill(in_use_);
    return std::exchange(waiting_, 0);
  }

  void lock() {
    mutex_.lock();
  }
  void unlock() {
    mutex_.unlock();
  }

 private:
  int64_t& peak() {
    return peak_[call_ % kCalls];
  }

  // All memory together, with `bytes` more that will wait, is to be no more than was in use at once:
  // of what waits, that which was used longest ago goes.
  void make_room(int64_t bytes) {
    const int64_t most = *std::max_element(peak_.begin(), peak_.end());
    while (waiting_ > 0 && waiting_ + in_use_ + bytes > most) {
      std::vector<Block*>* oldest = nullptr;
      for (auto& [size, blocks] : free_)
        if (!blocks.empty() && (!oldest || blocks.front()->call < oldest->front()->call))
          oldest = &blocks;
      waiting_ -= oldest->front()->bytes;
      discard(oldest->front());
      oldest->erase(oldest->begin());
    }
  }

  std::mutex mutex_;
  std::map<int64_t, std::vector<Block*>> free_;  // by size
  std::array<int64_t, kCalls> peak_{};           // bytes in use at once, of each of the last calls
  int64_t call_ = 0, in_use_ = 0, waiting_ = 0;
};

// Never destroyed: tensors may be released after static objects are.
Pool& the_pool() {
  static Pool* const pool = [] {
    Pool* const made = new Pool;
    // A child that is forked while another thread holds the lock must not find it held.
    pthread_atfork(
        [] { the_pool().lock(); }, [] { the_pool().unlock(); }, [] { the_pool().unlock(); });
    return made;
  }();
  return *pool;
}

}  // namespace

bool enabled() {
  static const bool on = [] {
    const char* const asked = std::getenv("IMMUNIZE_EXT_POOL");
    return asked == nullptr || std::string(asked) != "0";
  }();
  return on;
}

void begin_call() {
  the_pool().begin_call();
}

Block* acquire(int64_t bytes) {
  return the_pool().acquire(bytes);
}

void release(Block* block) {
  the_pool().release(block);
}

int64_t waiting() {
  return the_pool().waiting();
}

int64_t empty() {
  return the_pool().empty();
}

}  // namespace immunize_ext::pool
