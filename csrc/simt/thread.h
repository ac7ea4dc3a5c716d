// What is known of the running kernel: its threads, its block, its launch; and how errors name
// them.
#pragma once

#include <array>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "common.h"
#include "fiber.h"

struct uint3 {
  unsigned x = 0, y = 0, z = 0;
};

struct dim3 {
  unsigned x, y, z;
  // Implicit, as in CUDA: a launch may be given a plain number.
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

namespace simt {

namespace detail {

constexpr unsigned kWarpSize = 32;
// What no kernel of ours comes near: a thread that spins would never let the others run, and a loop
// around a barrier need not end.
constexpr std::uint64_t kMostAccesses = std::uint64_t{1} << 24;  // of a thread between two waits
constexpr std::uint32_t kMostBarriers = std::uint32_t{1} << 22;  // of a block

// A place in the source.
struct Site {
  const char* file = "";
  int line = 0;
  bool operator==(const Site& other) const {
    return line == other.line && std::strcmp(file, other.file) == 0;
  }
};

inline std::string base_name(const std::string& path) {
  return path.substr(path.find_last_of('/') + 1);
}

inline std::string text(const uint3& v) {
  return "(" + std::to_string(v.x) + ", " + std::to_string(v.y) + ", " + std::to_string(v.z) + ")";
}
inline std::string text(const dim3& v) {
  return text(uint3{v.x, v.y, v.z});
}
inline std::string text(const Site& site) {
  return base_name(site.file) + ":" + std::to_string(site.line);
}

// Operations at which threads wait for each other.
enum class Collective : std::uint8_t {
  kNone,
  kSyncthreads,
  kSyncthreadsOr,
  kSyncthreadsAnd,
  kSyncthreadsCount,
  kSyncwarp,
  kShuffle,
  kBallot,
  kAny,
  kAll,
};

inline const char* text(Collective kind) {
  constexpr const char* names[] = {"nothing",           "__syncthreads",       "__syncthreads_or",
                                   "__syncthreads_and", "__syncthreads_count", "__syncwarp",
                                   "a warp shuffle",    "__ballot_sync",       "__any_sync",
                                   "__all_sync"};
  return names[static_cast<int>(kind)];
}

inline bool is_block_wide(Collective kind) {
  return kind >= Collective::kSyncthreads && kind <= Collective::kSyncthreadsCount;
}

// What a thread brings to a collective and takes from it.
struct Arrival {
  Collective kind = Collective::kNone;
  unsigned mask = 0;        // lanes that take part; unused by block-wide collectives
  unsigned source = 0;      // lane whose value a shuffle returns
  std::uint64_t value = 0;  // predicate, or the bits to shuffle
  Site site;
  std::uint64_t result = 0;

  bool meets(const Arrival& other) const {
    return kind == other.kind && mask == other.mask && site == other.site;
  }
};

struct Thread {
  Fiber fiber;
  uint3 index;
  unsigned linear = 0;  // position in the block
  bool exited = false;
  Arrival arrival;  // kind is kNone unless the thread waits

  // Order among the threads of a warp between two block barriers. Time of a thread is cut into
  // segments by its __syncwarp calls; everything that lane l did in segments below ordered[l]
  // happened before what this thread does now. Never reset: segments only grow.
  std::uint32_t segment = 0;
  std::array<std::uint32_t, kWarpSize> ordered{};

  unsigned lane() const {
    return linear % kWarpSize;
  }
};

// The running launch. One at a time: the executor is single-threaded.
struct Launch {
  std::string kernel;
  dim3 grid, block;
  Thread* current = nullptr;  // null outside kernels
  uint3 block_index;
  std::uint32_t first_serial = 1;  // blocks are numbered through all launches, from 1
  std::uint32_t serial = 0;        // the running block
  std::uint32_t epoch = 0;         // block barriers that the running block has passed
  bool acquired = false;           // the running block has done an atomic on global memory
  std::uint64_t accesses = 0;      // of the running thread since another one ran
  // Per block run so far in this launch: 1 + the epoch of its last __threadfence, or 0.
  std::vector<std::uint32_t> fences;
};

inline Launch active;

inline std::string where(const Thread& thread) {
  return active.kernel + ", block " + text(active.block_index) + ", thread " + text(thread.index);
}

// Throws from the running thread; the host sees it leave launch().
[[noreturn]] inline void fail(const std::string& message) {
  throw Error(active.current != nullptr ? where(*active.current) + ": " + message : message);
}

}  // namespace detail
}  // namespace simt
