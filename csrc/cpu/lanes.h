// Extremes of many tiny matrices at once, one matrix a lane of a vector register (lanes.inl).
// Torch-free.
//
// Every matrix of a batch goes through the same instructions, the last few beside copies of one of
// them, and no lane looks at another. So the bits of a result depend neither on the batch it stands
// in, nor on its place there, nor on threads.

#pragma once

#include <cstdint>

#include "../extremes.h"

namespace immunize_ext::lanes {

// Beyond these one matrix fills the vectors of the routes that take them one at a time, and a single
// matrix would wait longer for seven copies of itself than it would take there.
constexpr int64_t kLargestSide = 32;
constexpr int64_t kLargestSize = 1024;

inline bool serves(int64_t n, int64_t p) {
  return (n < p ? n : p) <= kLargestSide && n * p <= kLargestSize;
}

// Matrices solved together; a thread is best given a multiple.
int64_t width();

// Extremes of a [batch, n, p], row-major, of no scale in particular. Outputs are flat over the
// batch, vectors [batch, side]. `settled` [batch]: 1 where everything was written; 0 where nothing
// was: zero, not finite, beyond 2^+-900, short of full rank where the smallest value is wanted, or
// not within the accuracy of the class.
template <typename T>
struct SingularBatch {
  const T* a;
  int64_t n, p;
  Policy policy;
  Wanted wanted;
  double *value_max, *value_min;
  int64_t *rank, *multiplicity_max, *multiplicity_min;
  double *thin_max, *thin_min, *long_max, *long_min;  // the long ones null where not wanted
  double *squared_frobenius, *thin_gram;              // null: no Gram matrix
  char* settled;
};

// The matrices [begin, end) of a batch.
void extremes(const SingularBatch<double>& batch, int64_t begin, int64_t end);
void extremes(const SingularBatch<float>& batch, int64_t begin, int64_t end);

// Algebraic extremes of symmetric h [batch, t, t]; asymmetry beyond `allowed` times the largest
// entry is not settled.
template <typename T>
struct SymmetricBatch {
  const T* h;
  int64_t t;
  double allowed, cluster_rtol;
  double *lambda_max, *lambda_min;
  int64_t *multiplicity_max, *multiplicity_min;
  double *v_max, *v_min;
  char* settled;
};

void extremes(const SymmetricBatch<double>& batch, int64_t begin, int64_t end);
void extremes(const SymmetricBatch<float>& batch, int64_t begin, int64_t end);

}  // namespace immunize_ext::lanes
