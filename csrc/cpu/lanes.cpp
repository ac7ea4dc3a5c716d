// lanes.inl for each instruction set, and which of them runs.

#include "lanes.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "instructions.h"

#if defined(IMMUNIZE_EXT_X86)
#include <immintrin.h>
#endif

namespace immunize_ext::lanes {

#define IMMUNIZE_EXT_LANES 2
namespace baseline {
#include "lanes.inl"
}  // namespace baseline
#undef IMMUNIZE_EXT_LANES

#if defined(IMMUNIZE_EXT_X86)
#define IMMUNIZE_EXT_LANES 4
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
namespace avx2 {
#include "lanes.inl"
}  // namespace avx2
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#undef IMMUNIZE_EXT_LANES

#define IMMUNIZE_EXT_LANES 8
#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx2,fma,avx512f,avx512dq,avx512bw,avx512vl"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512dq,avx512bw,avx512vl")
#endif
namespace avx512 {
#include "lanes.inl"
}  // namespace avx512
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#undef IMMUNIZE_EXT_LANES

#define IMMUNIZE_EXT_CHOSEN(what)         \
  (instructions() == Instructions::avx512 \
       ? avx512::what                     \
       : (instructions() == Instructions::avx2 ? avx2::what : baseline::what))
#else
#define IMMUNIZE_EXT_CHOSEN(what) (baseline::what)
#endif

int64_t width() {
  return IMMUNIZE_EXT_CHOSEN(kWidth);
}

void extremes(const SingularBatch<double>& batch, int64_t begin, int64_t end) {
  IMMUNIZE_EXT_CHOSEN(extremes(batch, begin, end));
}

void extremes(const SingularBatch<float>& batch, int64_t begin, int64_t end) {
  IMMUNIZE_EXT_CHOSEN(extremes(batch, begin, end));
}

void extremes(const SymmetricBatch<double>& batch, int64_t begin, int64_t end) {
  IMMUNIZE_EXT_CHOSEN(extremes(batch, begin, end));
}

void extremes(const SymmetricBatch<float>& batch, int64_t begin, int64_t end) {
  IMMUNIZE_EXT_CHOSEN(extremes(batch, begin, end));
}

}  // namespace immunize_ext::lanes
