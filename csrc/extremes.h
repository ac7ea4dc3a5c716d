// What every route to the extremes of a spectrum is asked for. Torch-free, for every compiler.

#pragma once

#include <cstdint>

namespace immunize_ext {

struct Policy {
  double rank_rtol;        // sigma_i counts iff sigma_i > rank_rtol sigma_max
  double cluster_rtol;     // sigma_i belongs to an extreme within cluster_rtol sigma_max of it
  bool full_rank;          // sigma_min is that of number full_side, 0 if it does not count
  std::int64_t full_side;  // p for a Gram matrix, which may be more than there are in x
};

// Which extremes are asked for, and whether the vector on the long side is, too.
struct Wanted {
  bool max = true;
  bool min = true;  // implies the rank
  bool long_vectors = true;
};

}  // namespace immunize_ext
