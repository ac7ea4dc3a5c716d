// What every route to the extremes of a spectrum is asked for, and what it hands back. Torch-free.

#pragma once

#include <cstdint>

namespace immunize_ext {

struct Policy {
  double rank_rtol;
  double cluster_rtol;
  bool full_rank;
};

// Which extremes are asked for, and whether the vector on the long side is, too.
struct Wanted {
  bool max = true;
  bool min = true;  // implies the rank
  bool long_vectors = true;
};

// Extremes of one matrix. The vectors point to zeroed memory (null where not wanted) and stay zero
// where the gradient is.
struct Extremes {
  double sigma_max = 0.0;
  double sigma_min = 0.0;
  int64_t rank = 0;
  int64_t multiplicity_max = 0;
  int64_t multiplicity_min = 0;
  double *thin_max = nullptr, *long_max = nullptr;
  double *thin_min = nullptr, *long_min = nullptr;
};

}  // namespace immunize_ext
