// The torch-free numerical core of the spectrum operators, compiled for every instruction set
// (every_set.inl) and chosen at run time: the build names no architecture, so one binary serves
// every machine.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#include "../extremes.h"
#include "instructions.h"

namespace immunize_ext::spectrum {

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

// Singular values that a thin Gram matrix cannot tell from zero: what it knows of them, and what the
// matrix itself says (small_end.h).
struct SmallEnd {
  int64_t below = 0;   // eigenvalues of the Gram matrix below the edge, none within its noise of it
  double edge = 0.0;   // in units of eigenvalues
  int64_t block = 0;   // those that its noise is not small beside, and all below the edge
  double noise = 0.0;  // of all of them
  double sigma_max = 0.0;
  // Found:
  int64_t missing = 0;       // singular values that do not count
  double sigma = 0.0;        // the smallest that counts, 0 if it lies beyond the edge
  int64_t multiplicity = 0;  // its own
};

// Where the thin side of a (n x p, row-major) lies: its rows if n <= p, its columns otherwise, or
// whatever the matrix is if `columns`.
template <typename T>
struct Thin {
  const T* a;
  int64_t n, p;
  bool columns = false;

  bool left() const {
    return !columns && n <= p;
  }
  int64_t side() const {
    return left() ? n : p;
  }
  int64_t length() const {
    return left() ? p : n;
  }
};

constexpr int64_t kRows = 4;
constexpr int64_t kPanel = 12;
constexpr int64_t kDepth = 128;

inline int64_t panels_of(int64_t side) {
  return (side + kPanel - 1) / kPanel;
}

// Leading dimension of a padded t x t matrix.
inline int64_t padded(int64_t side) {
  return panels_of(side) * kPanel;
}

// Units of a symmetric product: for each pair of panels the groups of 4 rows on or below it.
inline int64_t symmetric_units(int64_t side) {
  const int64_t panels = panels_of(side), pairs = (panels + 1) / 2;
  return 3 * pairs * (panels - pairs + 1);
}

// Copy the lower triangle to the upper one.
inline void mirror(double* g, int64_t side, int64_t ld) {
  constexpr int64_t block = 16;
  for (int64_t i0 = 0; i0 < side; i0 += block)
    for (int64_t j0 = 0; j0 <= i0; j0 += block)
      for (int64_t i = i0; i < std::min(i0 + block, side); ++i)
        for (int64_t j = j0; j < std::min(j0 + block, i); ++j)
          g[j * ld + i] = g[i * ld + j];
}

// m (p x p, leading dimension ldm) as panels of 12 columns: packed[(panel * p + k) * 12 + j].
inline void pack_columns(const double* m, int64_t ldm, int64_t p, double* packed) {
  for (int64_t panel = 0; panel < panels_of(p); ++panel)
    for (int64_t k = 0; k < p; ++k)
      std::memcpy(
          packed + (panel * p + k) * kPanel, m + k * ldm + panel * kPanel, sizeof(double) * kPanel);
}

constexpr int64_t kRowBlock = 64;

// From this side on a symmetric matrix becomes tridiagonal in two stages (band.inl).
constexpr int64_t kBandSide = 192;

// Of products of per-sample gradients (khatri_rao.inl): columns and rows of a block.
constexpr int64_t kTwoPanels = 2 * kPanel;
constexpr int64_t kPairRows = 96;

inline int64_t widened(int64_t side) {
  return (side + kTwoPanels - 1) / kTwoPanels * kTwoPanels;
}

// Samples of t tokens, a multiple of 12, that make up a block of rows or more.
inline int64_t samples_of_unit(int64_t t) {
  return kPanel * std::max<int64_t>(1, kPairRows / kPanel / t);
}

// One operand of their gradients: its rows packed and wide, null where the other gradient is not
// wanted or its own; and where its gradient goes (wide, zero before), null where not wanted.
struct PairOperand {
  const double *packed, *wide;
  double* gradient;
  int64_t side;
};

// Columns of a resolvent that are solved for together (resolvent.inl).
constexpr int64_t kColumns = 16;

constexpr double kEps = std::numeric_limits<double>::epsilon();
constexpr int kRefinements = 3;

// What forming a Gram matrix of side t, or reducing a symmetric matrix, may do to its eigenvalues.
inline double noise_bound(int64_t t, double size) {
  return 4.0 * static_cast<double>(std::max<int64_t>(t, 16)) * kEps * size;
}

// Scratch of one thread for matrices n x p.
class Workspace {
 public:
  Workspace(int64_t n, int64_t p)
      : ld_(padded(std::min(n, p))), memory_(2 * ld_ * ld_ + 20 * ld_ + 3 * std::max(n, p)) {}
  double* take(int64_t count) {
    double* from = memory_.data() + used_;
    used_ += count;
    return from;
  }
  void reset() {
    used_ = 0;
  }
  int64_t ld() const {
    return ld_;
  }

 private:
  int64_t ld_;
  int64_t used_ = 0;
  std::vector<double> memory_;
};

// Extremes of one symmetric matrix; v_max and v_min of unit length.
struct SymmetricPair {
  double lambda_max = 0.0, lambda_min = 0.0;
  int64_t multiplicity_max = 0, multiplicity_min = 0;
  double *v_max = nullptr, *v_min = nullptr;
};

// What a cold call leaves for warm ones: H = Q T Q^T and what is proven about both ends of it.
// [0] is the top, [1] the bottom.
struct Reference {
  int64_t t, ld;
  double *d, *e, *tau, *v;  // [ld] each and [t, ld]: T and Q
  double lambda[2];         // extreme
  double next[2];           // the eigenvalue beside it
};

// In gcc from version 12 on.
#if __has_builtin(__builtin_shufflevector)
#define IMMUNIZE_EXT_SHUFFLES 1
#else
#define IMMUNIZE_EXT_SHUFFLES 0
#endif
#define IMMUNIZE_EXT_VEC8 (IMMUNIZE_EXT_SHUFFLES && IMMUNIZE_EXT_REGISTER_BYTES == 64)

#define IMMUNIZE_EXT_KERNELS "spectrum_bodies.inl"
#include "every_set.inl"

}  // namespace immunize_ext::spectrum
