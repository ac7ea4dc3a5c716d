// How many threads __launch_bounds__ allows a kernel, found by its address.
//
// The macro lets g++ put as many one-byte instructions that do nothing in front of the kernel, and
// list where they begin in a section of its own: patchable_function_entry was made for tracing.
#pragma once

#include <algorithm>
#include <cstdint>

#define __launch_bounds__(threads, ...) \
  __attribute__((patchable_function_entry((threads), (threads))))

extern "C" {
// The linker's names for the two ends of that section; null where no kernel has bounds.
[[gnu::weak,
  gnu::visibility("hidden")]] extern const std::uintptr_t __start___patchable_function_entries[];
[[gnu::weak,
  gnu::visibility("hidden")]] extern const std::uintptr_t __stop___patchable_function_entries[];
}

namespace simt::detail {

constexpr unsigned kMaxThreads = 1024;

// kMaxThreads without __launch_bounds__.
inline unsigned launch_bound(const void* kernel) {
  constexpr unsigned char kNothing = 0x90;
  const auto* const code = static_cast<const unsigned char*>(kernel);
  const auto end = reinterpret_cast<std::uintptr_t>(code);
  for (const std::uintptr_t* begin = __start___patchable_function_entries;
       begin != __stop___patchable_function_entries; ++begin) {
    const std::uintptr_t threads = end - *begin;
    // What lies before a kernel without bounds may be another one's code.
    if (threads > 0 && threads <= kMaxThreads &&
        std::all_of(code - threads, code, [](unsigned char c) { return c == kNothing; })) {
      return static_cast<unsigned>(threads);
    }
  }
  return kMaxThreads;
}

}  // namespace simt::detail
