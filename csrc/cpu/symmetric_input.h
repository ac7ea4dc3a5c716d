// Reading of symmetric matrices: scaled, made exactly symmetric, refused where they are not.

#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "../checks.h"
#include "spectrum_common.h"

namespace immunize_ext {

// h (t x t) as the padded, scaled, exactly symmetric g. Asymmetry beyond rounding is an error.
struct Loaded {
  double scale = 1.0;
  bool finite = true;
  double largest = 0.0, asymmetry = 0.0;
};

template <typename T>
Loaded load_symmetric(const T* h, int64_t t, int64_t ld, double* g) {
  constexpr int64_t block = 16;
  const int64_t blocks = (t + block - 1) / block;
  Loaded found;
  std::vector<double> of_block(blocks, 0.0);
  const auto largest_of = [&of_block] {
    double largest = 0.0;
    for (const double x : of_block)
      if (!(x <= largest))  // NaN gets in, and stays
        largest = x;
    return largest;
  };
  const int64_t grain = std::max<int64_t>(1, 50000 / (block * t));
  at::parallel_for(0, blocks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const T* from = h + b * block * t;
      const int64_t count = (std::min((b + 1) * block, t) - b * block) * t;
      T lanes[8] = {}, sum[8] = {};
      int64_t i = 0;
      for (; i + 8 <= count; i += 8) {
        for (int s = 0; s < 8; ++s) {
          const T x = std::abs(from[i + s]);
          lanes[s] = x > lanes[s] ? x : lanes[s];
          sum[s] += x * T(0);  // NaN for NaN and infinity alike
        }
      }
      for (; i < count; ++i) {
        lanes[0] = std::max(lanes[0], std::abs(from[i]));
        sum[0] += std::abs(from[i]) * T(0);
      }
      double largest = 0.0;
      for (int s = 0; s < 8; ++s)
        largest = std::max(largest, static_cast<double>(lanes[s])) + static_cast<double>(sum[s]);
      of_block[b] = largest;
    }
  });
  found.largest = largest_of();
  found.finite = std::isfinite(found.largest);
  if (!found.finite)
    return found;
  found.scale = power_of_two_scale(found.largest);
  // Two factors, since the inverse of a subnormal scale would overflow; both are exact.
  const double inverse = found.scale < 0x1p-1000 ? 0x1p1000 : 1.0 / found.scale;
  const double rest = found.scale < 0x1p-1000 ? 0x1p-1000 / found.scale : 1.0;
  at::parallel_for(0, blocks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      double asymmetry = 0.0;
      for (int64_t j0 = 0; j0 < t; j0 += block) {
        for (int64_t i = b * block; i < std::min((b + 1) * block, t); ++i) {
          for (int64_t j = j0; j < std::min(j0 + block, t); ++j) {
            const double here = static_cast<double>(h[i * t + j]) * inverse * rest;
            const double mirrored = static_cast<double>(h[j * t + i]) * inverse * rest;
            asymmetry = std::max(asymmetry, std::abs(here - mirrored));
            g[i * ld + j] = 0.5 * here + 0.5 * mirrored;  // the same at (j, i): a + b = b + a
          }
        }
      }
      of_block[b] = asymmetry;
    }
  });
  found.asymmetry = largest_of() * found.scale;
  return found;
}

inline int64_t check_square(const char* op, const Tensor& h) {
  check_floating_matrix(op, "h", h);
  IMMUNIZE_CHECK(h.size(-1) == h.size(-2), op, "h", "have shape [*, p, p]", h.sizes());
  return h.size(-1);
}

// What load_symmetric found must be finite and symmetric up to rounding.
inline void check_loaded(const char* op, const Tensor& h, const Loaded& loaded, int64_t b) {
  const double eps = h.scalar_type() == at::kDouble  ? 0x1p-52
                     : h.scalar_type() == at::kFloat ? 0x1p-23
                     : h.scalar_type() == at::kHalf  ? 0x1p-10
                                                     : 0x1p-7;
  TORCH_CHECK_VALUE(
      loaded.finite, op, ": h must be finite, got NaN or infinity at batch index ", b,
      "; look for an overflow upstream, float16 features for instance");
  // Sums of p products in another order differ by about sqrt(p) eps; 8 for the bad cases.
  const double allowed = 8.0 * std::sqrt(static_cast<double>(h.size(-1))) * eps * loaded.largest;
  TORCH_CHECK_VALUE(
      loaded.asymmetry <= allowed, op, ": h must be symmetric, got entries that differ by ",
      loaded.asymmetry, " from their mirror image at batch index ", b,
      "; pass (h + h.mT) / 2 if the difference has no meaning");
}

}  // namespace immunize_ext
