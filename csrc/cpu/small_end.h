// The singular values that a thin Gram matrix cannot tell from zero, from the matrix itself.
//
// Let `below` eigenvalues of G = S S^T lie below an edge and the others above it, as far as the noise
// in G lets one see. The numbers of the latter are then proven; of the former nothing is but their
// number. With an orthonormal Z that spans their vectors, the singular values of W = S^T Z are the
// ones that are missing, and no condition number was squared: W is formed from S, and decomposed.
//
// 1. Subspace. Inverse iteration with G + delta, delta = 2 noise, finds Z up to noise over the next
//    eigenvalue. Z takes in all eigenvalues up to 1e5 noise, so that the next one is far. Newton's
//    method with the residual from S, column by column of a Z that diagonalises W^T W,
//      Z <- Z - (G + delta)^-1 (S W - Z (Z^T S W)),
//    multiplies the error by (noise + delta + sigma^2) / next, 1e-4 or less.
// 2. Zeros. |S^T z| <= threshold / 2 for `missing` orthonormal z: that many singular values are at
//    most the threshold (Courant and Fischer). Half: the rest is for rounding in the product.
// 3. Those that count: S^T U = V Sigma, with Sigma above the threshold. Rounding in W is eps / sigma
//    in V, which
//      V <- V - S^T (G + delta)^-1 (S V - U Sigma)
//    takes back where it matters. Both residuals below 4 sqrt(n + p) eps sigma_max make (Sigma, U, V)
//    triplets of a matrix that close to S: backward stable, as gesdd is. U and V being orthonormal,
//    they are so many different singular values (Kahan 1967), next to those beyond the edge.
//
// Together these are all of them: rank and order are proven. What does not come out that way is
// refused, for a decomposition to settle.

#pragma once

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>

#include <cmath>
#include <limits>

#include "../tensors.h"
#include "spectrum_kernels.h"
#include "threads.h"

namespace immunize_ext::spectrum {

// In one order whatever the number of threads.
inline double frobenius_norm(const Tensor& x) {
  const Tensor entries = x.contiguous();
  const double* data = entries.const_data_ptr<double>();
  double square = 0.0;
  for (int64_t i = 0; i < entries.numel(); ++i)
    square += data[i] * data[i];
  return std::sqrt(square);
}

inline Tensor orthonormal(const Tensor& x) {
  return std::get<0>(at::linalg_qr(x));
}

// S z, or S^T z if `transposed`, for vectors z [*, m] as columns.
template <typename T>
Tensor times_thin(const Thin<T>& thin, bool transposed, const Tensor& z) {
  const int64_t m = z.size(1), ld = padded(m), depth = z.size(0);
  const int64_t rows = transposed ? thin.length() : thin.side();
  const Tensor columns = at::constant_pad_nd(z, {0, ld - m}).contiguous();
  const Tensor out = at::empty({rows, ld}, z.options());
  const double* from = columns.const_data_ptr<double>();
  double* to = out.mutable_data_ptr<double>();
  const bool along = thin.left() != transposed;  // rows of A are rows of the matrix
  const int64_t grain = std::max<int64_t>(1, 1000000 / (kRowBlock * depth * ld));
  parallel_for((rows + kRowBlock - 1) / kRowBlock, grain, [&](int64_t begin, int64_t end) {
    IMMUNIZE_EXT_CHOSEN(multiply_vectors(
        thin.a, along ? thin.p : 1, along ? 1 : thin.p, rows, depth, from, ld, begin, end, to));
  });
  return out.narrow(1, 0, m);
}

// g: S S^T up to noise, leading dimension ld. The vectors go to `out`, where they are wanted.
template <typename T>
bool resolve_small_end(
    const Thin<T>& thin,
    const double* g,
    int64_t ld,
    const Policy& policy,
    SmallEnd& end,
    Extremes& out) {
  constexpr int kSteps = 5;
  const OneThread one;
  const int64_t t = thin.side(), below = end.below, block = end.block;
  const double delta = 2.0 * end.noise, threshold = policy.rank_rtol * end.sigma_max;
  const double tolerance =
      4.0 * std::sqrt(static_cast<double>(thin.n + thin.p)) * kEps * end.sigma_max;
  const auto options = at::TensorOptions().dtype(at::kDouble);
  const auto s = [&thin](const Tensor& z) { return times_thin(thin, false, z); };
  const auto s_transposed = [&thin](const Tensor& z) { return times_thin(thin, true, z); };
  Tensor shifted = at::from_blob(const_cast<double*>(g), {t, t}, {ld, 1}, options).clone();
  shifted.diagonal().add_(delta);
  const auto [factor, info] = at::linalg_cholesky_ex(shifted);
  if (info.item<int>() != 0)
    return false;
  // Always the same start; nothing of the caller's random state is touched.
  const Tensor start = at::randn({t, block}, at::detail::createCPUGenerator(20250701), options);
  Tensor z =
      orthonormal(at::cholesky_solve(orthonormal(at::cholesky_solve(start, factor)), factor));
  double before = std::numeric_limits<double>::infinity();
  for (int step = 0; step < kSteps; ++step) {
    Tensor w = s_transposed(z);
    if (block == below && frobenius_norm(w) <= 0.5 * threshold) {
      end.missing = below;
      return true;
    }
    // Columns of w orthogonal, the shortest first.
    const auto [u, lengths, vh] = at::linalg_svd(std::get<1>(at::linalg_qr(w, "r")));
    const Tensor rotation = vh.mT().flip(1), sigmas = lengths.flip(0);
    z = z.mm(rotation);
    w = w.mm(rotation);
    const double* sigma = sigmas.const_data_ptr<double>();
    int64_t missing = 0;
    while (missing < below && sigma[missing] <= 0.5 * threshold)
      ++missing;
    const bool parted = sigma[below - 1] * sigma[below - 1] <= end.edge &&
                        (missing == below || sigma[missing] > threshold + 2.0 * tolerance);
    if (parted && missing == below) {
      end.missing = missing;
      return true;
    }
    if (parted) {
      const Tensor thin_vectors = z.slice(1, missing, below),
                   values = sigmas.slice(0, missing, below);
      Tensor along = w.slice(1, missing, below) / values;
      const Tensor residual = s(along) - thin_vectors * values;
      along = along - s_transposed(at::cholesky_solve(residual, factor));
      const double first = frobenius_norm(s(along) - thin_vectors * values);
      const double second = frobenius_norm(w.slice(1, missing, below) - along * values);
      const Tensor skew = along.mT().mm(along) - at::eye(below - missing, options);
      const double near = sigma[missing] + policy.cluster_rtol * end.sigma_max;
      if (first <= tolerance && second <= tolerance && frobenius_norm(skew) <= 0.1) {
        // A cluster that reaches beyond the edge.
        if (!(near * near < end.edge))
          return false;
        end.missing = missing;
        end.sigma = sigma[missing];
        while (missing + end.multiplicity < below && sigma[missing + end.multiplicity] <= near)
          ++end.multiplicity;
        if (policy.full_rank && t - missing < policy.full_side)
          return true;
        const auto fill = [](const Tensor& column, double* to) {
          const Tensor from = (column / frobenius_norm(column)).contiguous();
          std::copy_n(from.const_data_ptr<double>(), from.size(0), to);
        };
        fill(thin_vectors.select(1, 0), out.thin_min);
        if (out.long_min != nullptr)
          fill(along.select(1, 0), out.long_min);
        return true;
      }
    }
    const Tensor image = s(w), residual = image - z.mm(z.mT().mm(image));
    const double size = frobenius_norm(residual.slice(1, 0, below));
    // What does not shrink are values that count and that no gap tells apart.
    if (!(size <= 0.1 * before))
      return false;
    before = size;
    z = orthonormal(z - at::cholesky_solve(residual, factor));
  }
  return false;
}

}  // namespace immunize_ext::spectrum
