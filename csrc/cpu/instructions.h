// Which instruction set the kernels of this process use: the best that the processor has, or a
// lesser one that IMMUNIZE_EXT_INSTRUCTIONS names (baseline, avx2, avx512). Torch-free.
//
// A kernel that wants vectors is written once, in an .inl file that every_set.inl includes for each
// set; IMMUNIZE_EXT_CHOSEN(call) calls the one of this process.

#pragma once

#include <cstdlib>
#include <stdexcept>
#include <string>

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define IMMUNIZE_EXT_X86 1
#endif

namespace immunize_ext {

// In the order of what they can do.
enum class Instructions { baseline, avx2, avx512 };

inline const char* name_of(Instructions set) {
  constexpr const char* names[] = {"baseline", "avx2", "avx512"};
  return names[static_cast<int>(set)];
}

inline Instructions best_instructions() {
#if defined(IMMUNIZE_EXT_X86)
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma"))
    return Instructions::baseline;
  // What every processor with 64-byte vectors from Skylake-SP and Zen 4 on has.
  const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                    __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw");
  return wide ? Instructions::avx512 : Instructions::avx2;
#else
  return Instructions::baseline;
#endif
}

inline Instructions find_instructions() {
  const char* const asked = std::getenv("IMMUNIZE_EXT_INSTRUCTIONS");
  const Instructions best = best_instructions();
  if (asked == nullptr || *asked == '\0')
    return best;
  for (const Instructions set : {Instructions::baseline, Instructions::avx2, Instructions::avx512})
    if (std::string(asked) == name_of(set)) {
      if (set <= best)
        return set;
      throw std::invalid_argument(
          std::string("IMMUNIZE_EXT_INSTRUCTIONS must name what this processor has, at most ") +
          name_of(best) + ", got " + asked);
    }
  throw std::invalid_argument(
      std::string("IMMUNIZE_EXT_INSTRUCTIONS must be baseline, avx2 or avx512, got ") + asked);
}

// Read once: one process computes with one set.
inline Instructions instructions() {
  static const Instructions found = find_instructions();
  return found;
}

}  // namespace immunize_ext

#if defined(IMMUNIZE_EXT_X86)
#define IMMUNIZE_EXT_CHOSEN(call)                                                       \
  (immunize_ext::instructions() == immunize_ext::Instructions::avx512                   \
       ? avx512::call                                                                   \
       : (immunize_ext::instructions() == immunize_ext::Instructions::avx2 ? avx2::call \
                                                                           : baseline::call))
#else
#define IMMUNIZE_EXT_CHOSEN(call) (baseline::call)
#endif
