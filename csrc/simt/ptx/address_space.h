// The memory that PTX addresses: global memory at its addresses on the host, shared memory in
// windows of 1 MiB as parse.py lays them out. Every access goes through the checks of ../memory.h,
// and through the counters where these are wanted.
#pragma once

#include <cstdint>
#include <cstring>
#include <map>
#include <memory>

#include "counters.h"
#include "program.h"

namespace simt::ptx {

// All global buffers, by the address of their end.
inline std::map<std::uint64_t, std::unique_ptr<detail::Region>> buffers;

struct Place {
  detail::Region* region;
  std::int64_t offset;
};

inline std::uint64_t address_of(const detail::Region& region) {
  return reinterpret_cast<std::uint64_t>(region.base);
}

inline Place global_place(std::uint64_t address, const Instruction& i) {
  const auto inside = [address](const detail::Region& region) {
    return address - address_of(region) < static_cast<std::uint64_t>(region.bytes);
  };
  if (i.region == nullptr || !inside(*i.region)) {
    const auto found = buffers.upper_bound(address);
    if (found == buffers.end() || !inside(*found->second)) {
      detail::fail("out of bounds: an address in no buffer (" + detail::text(site(i)) + ")");
    }
    i.region = found->second.get();
  }
  return {i.region, static_cast<std::int64_t>(address - address_of(*i.region))};
}

inline Place shared_place(std::uint64_t address, const Instruction& i, const Program& program) {
  constexpr std::uint64_t kWindow = std::uint64_t{1} << 20;
  const std::uint64_t window = (address & 0xFFFFFFFF) / kWindow;
  const auto offset = static_cast<std::int64_t>(address & (kWindow - 1));
  if (window == 1) {
    return {detail::executor.dynamic_shared(), offset};
  }
  if (window < 2 || window - 2 >= program.shared.size()) {
    detail::fail("out of bounds: a shared address in no array (" + detail::text(site(i)) + ")");
  }
  const auto& [name, bytes] = program.shared[window - 2];
  constexpr std::size_t kGranule = 4;
  return {
      detail::executor.static_shared(
          &name, name.c_str(), static_cast<std::size_t>(bytes), kGranule),
      offset};
}

enum class Where { kGlobal, kShared, kReadOnly };

template <Where where>
Place place(std::uint64_t address, const Frame& f, const Instruction& i) {
  return where == Where::kShared ? shared_place(address, i, f.program) : global_place(address, i);
}

template <Where where>
void load(const Frame& f, const Instruction& i, std::uint64_t address, std::size_t size, void* to) {
  const Place at = place<where>(address, f, i);
  constexpr auto kind =
      where == Where::kReadOnly ? detail::AccessKind::kReadOnly : detail::AccessKind::kRead;
  detail::AccessCheck(at.region, at.offset, size, size, i.number + 1).run(kind, nullptr);
  counters.add(i.number, where == Where::kShared, address, size);
  std::memcpy(to, at.region->base + at.offset, size);
}

template <Where where>
void store(
    const Frame& f,
    const Instruction& i,
    std::uint64_t address,
    std::size_t size,
    const void* from) {
  const Place at = place<where>(address, f, i);
  if (at.region->cells == nullptr) {
    detail::fail(at.region->name + " is written, which is const (" + detail::text(site(i)) + ")");
  }
  detail::AccessCheck(at.region, at.offset, size, size, i.number + 1)
      .run(detail::AccessKind::kWrite, from);
  counters.add(i.number, where == Where::kShared, address, size);
  std::memcpy(at.region->base + at.offset, from, size);
}

// The old value; the new one is update(old).
template <Where where, typename T, typename Update>
T atomic(const Frame& f, const Instruction& i, std::uint64_t address, Update update) {
  const Place at = place<where>(address, f, i);
  detail::AccessCheck(at.region, at.offset, sizeof(T), sizeof(T), i.number + 1)
      .run(detail::AccessKind::kAtomic, nullptr);
  detail::active.acquired = detail::active.acquired || where == Where::kGlobal;
  T old;
  std::memcpy(&old, at.region->base + at.offset, sizeof(T));
  const T value = update(old);
  std::memcpy(at.region->base + at.offset, &value, sizeof(T));
  return old;
}

}  // namespace simt::ptx
