// What the memory accesses of a launch cost: 32-byte sectors of global memory and wavefronts of
// shared memory, beside the least that the same data could have cost.
//
// The lanes of a warp reach an instruction one after the other here. Between two barriers or shuffles,
// the n-th time that one lane reaches it is taken for the same access as the n-th time of the others:
// what a warp does where its lanes do not diverge inside of a loop.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <map>
#include <set>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "../launch_bounds.h"
#include "../thread.h"

namespace simt::ptx {

struct Traffic {
  std::uint64_t moved = 0, least = 0;
};

// What one launch did.
struct Record {
  std::string kernel;
  std::uint64_t blocks = 0, threads = 0, dynamic_shared = 0;
  Traffic global, shared;
  std::uint64_t barriers = 0;  // the most that a block passed
};

class Counters {
 public:
  bool enabled = false;
  std::vector<Record> records;

  void add(int instruction, bool is_shared, std::uint64_t address, std::size_t size) {
    if (!enabled) {
      return;
    }
    if (serial_ != detail::active.serial || epoch_ != detail::active.epoch) {
      settle_all();
    }
    const detail::Thread& thread = *detail::active.current;
    const unsigned warp = thread.linear / detail::kWarpSize;
    Pending& pending = pending_[{instruction, warp, shuffles_[thread.linear]}];
    pending.is_shared = is_shared;
    pending.size = size;
    const std::size_t n = pending.reached[thread.lane()]++ - pending.settled;
    if (n >= pending.requests.size()) {
      pending.requests.resize(n + 1);
    }
    pending.requests[n].emplace_back(thread.lane(), address);
    std::size_t full = 0;
    while (full < pending.requests.size() && pending.requests[full].size() == detail::kWarpSize) {
      settle(pending, pending.requests[full++]);
    }
    pending.settled += full;
    pending.requests.erase(
        pending.requests.begin(), pending.requests.begin() + static_cast<std::ptrdiff_t>(full));
  }

  // The running thread has passed a barrier of its block.
  void passed_barrier() {
    launch_.barriers = std::max<std::uint64_t>(launch_.barriers, detail::active.epoch);
  }

  void passed_shuffle() {
    ++shuffles_[detail::active.current->linear];
  }

  // Begins a launch, and ends it.
  void begin(Record launch) {
    pending_.clear();
    shuffles_.fill(0);
    launch_ = std::move(launch);
  }
  void end() {
    settle_all();
    if (enabled) {
      records.push_back(launch_);
    }
  }

 private:
  using Request = std::vector<std::pair<unsigned, std::uint64_t>>;  // lane, address
  struct Pending {
    bool is_shared = false;
    std::size_t size = 0, settled = 0;
    std::array<std::size_t, detail::kWarpSize> reached{};
    std::vector<Request> requests;
  };

  void settle(const Pending& pending, const Request& request) {
    if (pending.is_shared) {
      settle_shared(pending.size, request);
    } else {
      settle_global(pending.size, request);
    }
  }

  void settle_global(std::size_t size, const Request& request) {
    constexpr std::uint64_t kSector = 32;
    std::set<std::uint64_t> sectors, distinct;
    for (const auto& [lane, address] : request) {
      sectors.insert(address / kSector);
      sectors.insert((address + size - 1) / kSector);
      distinct.insert(address);
    }
    launch_.global.moved += sectors.size();
    launch_.global.least += (distinct.size() * size + kSector - 1) / kSector;
  }

  // 32 banks of 4 bytes; of wide accesses half or a quarter of the warp goes at a time. Lanes that
  // want the same word share it.
  void settle_shared(std::size_t size, const Request& request) {
    constexpr std::uint64_t kBanks = 32, kWord = 4;
    const unsigned together = size >= 16 ? 8 : size == 8 ? 16 : 32;
    std::map<unsigned, std::map<std::uint64_t, std::set<std::uint64_t>>> words;
    for (const auto& [lane, address] : request) {
      for (std::uint64_t word = address / kWord; word * kWord < address + size; ++word) {
        words[lane / together][word % kBanks].insert(word);
      }
    }
    for (const auto& [group, banks] : words) {
      std::size_t wavefronts = 1;
      for (const auto& [bank, wanted] : banks) {
        wavefronts = std::max(wavefronts, wanted.size());
      }
      launch_.shared.moved += wavefronts;
    }
    launch_.shared.least += words.size();
  }

  void settle_all() {
    for (const auto& [key, pending] : pending_) {
      for (const Request& request : pending.requests) {
        settle(pending, request);
      }
    }
    pending_.clear();
    serial_ = detail::active.serial;
    epoch_ = detail::active.epoch;
  }

  Record launch_;
  std::uint32_t serial_ = 0, epoch_ = 0;                       // those of the pending accesses
  std::array<std::uint32_t, detail::kMaxThreads> shuffles_{};  // of each thread in this launch
  // By instruction, warp and shuffles.
  std::map<std::tuple<int, unsigned, std::uint32_t>, Pending> pending_;
};

inline Counters counters;

}  // namespace simt::ptx
