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

#define IMMUNIZE_EXT_LANES (IMMUNIZE_EXT_REGISTER_BYTES / 8)
#define IMMUNIZE_EXT_KERNELS "lanes.inl"
#include "every_set.inl"

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
