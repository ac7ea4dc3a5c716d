// Eigenpairs of a thin Gram matrix whose small end is as accurate as the matrix it comes from.
//
// Let S (t x k, t <= k) be the features, G = S S^T = U diag(lambda) U^T by the library. Each lambda
// is known to noise = 4 max(t, 16) eps lambda_max, and nothing is known of singular values of S below
// its root, 4e-7 sigma_max and more: their condition number was squared. They are found in images of
// the vectors that belong to them, whose size they have. Of the t eigenvalues let b lie below a cut
// with a gap of 16 noise, among them all below 8 noise, and let Z (t x b, orthonormal) span their
// vectors, H the others, W = S^T Z.
//
// 1. Subspace. Z is off by noise / gap. A step of Newton's method with residuals of S,
//      R = S W - Z (Z^T S W),  Z <- Z - H ((H^T R)_ij / (lambda_i - lambda_j)),
//    multiplies that by noise / gap, 1/16 or less and mostly much less; Z <- Z (3 - Z^T Z) / 2 then
//    makes Z orthonormal to the fourth power of the step. There is no decomposition in it.
// 2. Zeros. |S^T Z|_F <= threshold / 2: that many singular values are at most the threshold (Courant
//    and Fischer). Half: the rest is for rounding in the product. Features that are short of rank and
//    otherwise well conditioned end here.
// 3. Proof. Let P project on the range of S^T H', H' being H made orthogonal to Z, orthonormal. Then
//      S~ = H' (S^T H')^T + Z ((I - P) W)^T
//    has the singular values of its two parts, and |S - S~| = |P W|. The columns of S^T H' are
//    orthogonal to 1/16 and of length lambda^(1/2), so that this is |diag(lambda^(-1/2)) H^T R|. It
//    is accepted up to the rounding that a product with S has, 4 sqrt(t + k) eps sigma_max: backward
//    stable, as gesdd is.
// 4. Values. Those of M = W^T W are known to 4 max(b, 16) eps |M|, and |M| is lambda_b, not
//    lambda_max. Those that this cannot tell apart from the threshold take the same steps again: each
//    level reaches singular values smaller by a factor of 1e6 or so, and ends at eps sigma_max. A
//    value counts as zero if it is below half the threshold, as counting if it is beyond it by twice
//    the rounding; what lies between is refused.
#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>
#include <vector>

namespace immunize_ext::thin_gram {

using at::Tensor;

// What an eigenvalue of a computed Gram matrix of `side` vectors may be off by.
inline double gram_noise(int64_t side, double largest) {
  return 4.0 * static_cast<double>(std::max<int64_t>(side, 16)) *
         std::numeric_limits<double>::epsilon() * std::max(largest, 0.0);
}

struct Eigenpairs {
  Tensor lambda, u;           // [t] ascending, [t, t] columns
  std::vector<double> value;  // lambda on the host
  std::vector<double> error;  // of each value

  // on_host: lambda, once more.
  Eigenpairs(const Tensor& lambda, const Tensor& u, const double* on_host)
      : lambda(lambda), u(u), value(on_host, on_host + lambda.size(0)) {
    error.assign(value.size(), gram_noise(side(), largest()));
  }
  int64_t side() const {
    return static_cast<int64_t>(value.size());
  }
  double largest() const {
    return value.back();
  }
  // How many of the values from `first` to `last` lie below a bound that may be off by `doubt`; -1 if
  // that or their errors, taken twice, decide.
  int64_t count_below(int64_t first, int64_t last, double bound, double doubt) const {
    int64_t least = 0, most = 0;
    for (int64_t i = first; i < last; ++i) {
      least += value[i] + 2.0 * error[i] + doubt < bound ? 1 : 0;
      most += value[i] - 2.0 * error[i] - doubt < bound ? 1 : 0;
    }
    return least == most ? least : -1;
  }
};

// How many of the values below `limit`, known to `noise`, to look at again: all that may not lie
// above `counted`, and more up to a gap; -1 if there is no gap.
inline int64_t find_cut(const Eigenpairs& e, int64_t limit, double noise, double counted) {
  const auto begin = e.value.begin();
  int64_t cut = std::upper_bound(begin, begin + limit, 8.0 * noise + counted) - begin;
  while (cut > 0 && cut < e.side() &&
         e.value[cut] - std::max(e.value[cut - 1], 0.0) < 16.0 * std::max(noise, e.error[cut]))
    ++cut;
  return cut < e.side() ? cut : -1;
}

enum class Refined { no, zero, yes };

// Finds the b smallest anew, values and vectors, from S, or the vectors alone where none of the values
// counts: `zero`, |S^T Z|_F <= half. rounding: of S times a unit vector.
inline Refined refine(const Tensor& s, Eigenpairs& e, int64_t b, double half, double rounding) {
  constexpr int kSteps = 8;
  const auto norm = [](const Tensor& x) { return at::linalg_vector_norm(x); };
  const int64_t t = e.side();
  const auto above = [&](const Tensor& x, int64_t dim) { return x.narrow(dim, b, t - b); };
  const Tensor high = above(e.u, 1), lambda = above(e.lambda, 0).unsqueeze(1);
  const Tensor gaps = lambda - e.lambda.narrow(0, 0, b).clamp_min(0.0), sigma = lambda.sqrt();
  Tensor z = e.u.narrow(1, 0, b), w;
  double before = std::numeric_limits<double>::infinity();
  for (int step = 0;; ++step) {
    w = s.mT().matmul(z);
    const Tensor image = s.matmul(w);
    const Tensor residual = at::addmm(image, z, z.mT().matmul(image), 1.0, -1.0);
    const Tensor coupling = high.mT().matmul(residual);
    const Tensor numbers = at::stack({norm(w), norm(coupling / sigma)}).cpu();
    const double length = numbers.const_data_ptr<double>()[0];
    const double off = numbers.const_data_ptr<double>()[1];
    if (length <= half || off <= rounding) {
      if (step > 0)
        e.u = at::cat({z, at::addmm(high, z, z.mT().matmul(high), 1.0, -1.0)}, 1);
      if (length <= half)
        return Refined::zero;
      break;
    }
    if (step == kSteps || !(off <= 0.5 * before))
      return Refined::no;
    before = off;
    z = at::addmm(z, high, coupling / gaps, 1.0, -1.0);
    z = at::addmm(z, z, z.mT().matmul(z), 1.5, -0.5);
  }
  const auto [mu, rotation] = at::linalg_eigh(w.mT().matmul(w));
  const Tensor on_host = mu.cpu();
  const double* values = on_host.const_data_ptr<double>();
  if (!(values[b - 1] < e.value[b] - e.error[b]))
    return Refined::no;
  e.u = at::cat({z.matmul(rotation), above(e.u, 1)}, 1);
  e.lambda = at::cat({mu, above(e.lambda, 0)});
  std::copy_n(values, b, e.value.begin());
  std::fill_n(e.error.begin(), b, gram_noise(b, values[b - 1]));
  return Refined::yes;
}

// How many singular values do not count (are not above `threshold`), -1 if that is not proven; what
// the Gram matrix cannot tell from zero is refined.
inline int64_t resolve_small_end(
    const Tensor& s, Eigenpairs& e, double threshold, double rounding) {
  constexpr int kLevels = 4;
  const double half = 0.5 * threshold, counts = threshold + 2.0 * rounding;
  int64_t limit = e.side();
  for (int level = 0; level < kLevels; ++level) {
    const double noise = e.error[0];
    const int64_t b = find_cut(e, limit, noise, counts * counts);
    if (b <= 0)
      return b;
    const Refined found = refine(s, e, b, half, rounding);
    if (found != Refined::yes)
      return found == Refined::zero ? b : -1;
    int64_t missing = 0;
    while (missing < b && e.value[missing] + e.error[0] <= half * half)
      ++missing;
    if (missing == b || e.value[missing] - e.error[0] > counts * counts)
      return missing;
    if (!(e.error[0] <= 0.1 * noise))
      return -1;
    limit = b;
  }
  return -1;
}

}  // namespace immunize_ext::thin_gram
