// What the spectrum operators share on the CPU: scaling of a batch, clusters of a full spectrum,
// and the full decomposition of one matrix, for clusters and for matrices that no cheaper route
// settles.

#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "../checks.h"
#include "extremes.h"

namespace immunize_ext {

using at::Tensor;

// float32 and float64 pass as they are, half types as float32; contiguous.
inline Tensor readable(const Tensor& a) {
  const bool native = a.scalar_type() == at::kDouble || a.scalar_type() == at::kFloat;
  return (native ? a : a.to(at::kFloat)).contiguous();
}

// How the torch-free kernels spread work over threads: run(count, grain, f). Within a parallel
// region it runs in place.
struct Threads {
  template <typename F>
  void operator()(int64_t count, int64_t grain, const F& f) const {
    at::parallel_for(0, count, grain, f);
  }
};

// Over matrices where there are enough of them, else one after the other with threads inside.
template <typename F>
void for_each_matrix(int64_t batch, const F& f) {
  const auto range = [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b)
      f(b);
  };
  if (batch > 1 && batch >= at::get_num_threads())
    at::parallel_for(0, batch, 1, range);
  else
    range(0, batch);
}

// Index ranges [begin, end) into descending singular values; empty where the gradient is zero.
struct Clusters {
  int64_t rank = 0;
  int64_t max_end = 0;
  int64_t min_begin = 0;
  int64_t min_end = 0;
};

// full_side: how many singular values the policy full_rank speaks of (p for a p x p Gram matrix).
inline Clusters find_clusters(const double* sigma, int64_t side, int64_t full_side, Policy policy) {
  Clusters found;
  const double top = sigma[0];
  // Strictly greater: the zero matrix has rank 0 although 0 >= rtol * 0.
  while (found.rank < side && sigma[found.rank] > policy.rank_rtol * top)
    ++found.rank;
  if (found.rank == 0)
    return found;
  const double near = policy.cluster_rtol * top;
  while (found.max_end < found.rank && top - sigma[found.max_end] <= near)
    ++found.max_end;
  if (policy.full_rank && found.rank < full_side)
    return found;
  found.min_begin = found.min_end = found.rank;
  const double last = sigma[found.rank - 1];
  while (found.min_begin > 0 && sigma[found.min_begin - 1] - last <= near)
    --found.min_begin;
  return found;
}

// Power of two that brings the largest entry into [1, 2): scaling by it is exact, and it is finite
// for the largest number there is.
inline double power_of_two_scale(double largest) {
  if (largest == 0.0)
    return 1.0;
  int exponent = 0;
  std::frexp(largest, &exponent);
  return std::ldexp(1.0, exponent - 1);
}

inline at::IntArrayRef batch_shape(const Tensor& a) {
  return a.sizes().slice(0, a.dim() - 2);
}

inline std::vector<int64_t> with_side(at::IntArrayRef batch, int64_t side) {
  std::vector<int64_t> shape(batch.begin(), batch.end());
  shape.push_back(side);
  return shape;
}

// One matrix decomposed again in the backward pass.
struct Decomposition {
  Tensor u, sigma, v;  // [n, t], [t], [p, t]
  Clusters clusters;
};

inline Decomposition decompose_one(const Tensor& scaled, int64_t full_side, Policy policy) {
  Decomposition d;
  auto [u, sigma, vh] = at::linalg_svd(scaled, /*full_matrices=*/false);
  d.u = u;
  d.sigma = sigma.contiguous();
  d.v = vh.mH();
  d.clusters = find_clusters(d.sigma.const_data_ptr<double>(), d.sigma.size(0), full_side, policy);
  return d;
}

// weight * mean over [begin, end) of f(sigma_i) u_i v_i^T, with f = 1 or f = sigma.
inline Tensor cluster_mean(
    const Decomposition& d, int64_t begin, int64_t end, double weight, bool times_sigma) {
  if (end <= begin)
    return at::zeros({d.u.size(0), d.v.size(0)}, d.u.options());
  Tensor left = d.u.slice(1, begin, end);
  if (times_sigma)
    left = left * d.sigma.slice(0, begin, end);
  return left.mm(d.v.slice(1, begin, end).mT()).mul_(weight / static_cast<double>(end - begin));
}

}  // namespace immunize_ext
