// What the spectrum operators share on the CPU: threads, clusters of a full spectrum, and the full
// decomposition of one matrix, for clusters and for matrices that no cheaper route settles.

#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "../extremes.h"
#include "../tensors.h"
#include "lanes.h"
#include "threads.h"

namespace immunize_ext {

// Below about this many operations a thread costs more than it saves; nor is there one to wait for
// in a forked child, whose OpenMP has lost its threads.
constexpr int64_t kWorthAThread = 100000;

// Over matrices where there are enough of them, else one after the other with threads inside.
// cost: operations on one matrix, about.
template <typename F>
void for_each_matrix(int64_t batch, int64_t cost, const F& f) {
  const auto range = [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b)
      f(b);
  };
  if (batch > 1 && batch >= at::get_num_threads())
    parallel_for(batch, std::max<int64_t>(1, kWorthAThread / cost), range);
  else
    range(0, batch);
}

// The same in slices of whole vectors of lanes: f(begin, end).
template <typename F>
void for_each_lanes(int64_t batch, int64_t cost, const F& f) {
  const int64_t width = lanes::width(), groups = (batch + width - 1) / width;
  // A tiny matrix costs more than its products.
  const int64_t grain = std::max<int64_t>(1, kWorthAThread / (width * (cost + 100)));
  parallel_for(groups, grain, [&](int64_t begin, int64_t end) {
    f(begin * width, std::min(end * width, batch));
  });
}

// Index ranges [begin, end) into descending singular values; empty where the gradient is zero.
struct Clusters {
  int64_t rank = 0;
  int64_t max_end = 0;
  int64_t min_begin = 0;
  int64_t min_end = 0;
};

inline Clusters find_clusters(const double* sigma, int64_t side, const Policy& policy) {
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
  if (policy.full_rank && found.rank < policy.full_side)
    return found;
  found.min_begin = found.min_end = found.rank;
  const double last = sigma[found.rank - 1];
  while (found.min_begin > 0 && sigma[found.min_begin - 1] - last <= near)
    --found.min_begin;
  return found;
}

// One matrix decomposed again in the backward pass.
struct Decomposition {
  Tensor u, sigma, v;  // [n, t], [t], [p, t]; undefined on the long side unless wanted
  Clusters clusters;
};

inline Decomposition decompose_one(
    const Tensor& scaled, const Policy& policy, bool long_vectors = true) {
  Decomposition d;
  const bool left = scaled.size(0) <= scaled.size(1);
  if (long_vectors || scaled.size(0) == scaled.size(1)) {
    const auto [u, sigma, vh] = at::linalg_svd(scaled, /*full_matrices=*/false);
    d.u = u;
    d.sigma = sigma.contiguous();
    d.v = vh.mH();
  } else {
    // Thin vectors alone: those of R, for S^T = Q R. What costs most, Q, is not formed.
    const Tensor r = std::get<1>(at::linalg_qr(left ? scaled.mT() : scaled, "r"));
    const auto [_, sigma, vh] = at::linalg_svd(r);
    d.sigma = sigma.contiguous();
    (left ? d.u : d.v) = vh.mH();
  }
  d.clusters = find_clusters(d.sigma.const_data_ptr<double>(), d.sigma.size(0), policy);
  return d;
}

// weight * mean over [begin, end) of u_i v_i^T.
inline Tensor cluster_mean(
    const Tensor& u, const Tensor& v, int64_t begin, int64_t end, double weight) {
  if (end <= begin)
    return at::zeros({u.size(0), v.size(0)}, u.options());
  return u.slice(1, begin, end)
      .mm(v.slice(1, begin, end).mT())
      .mul_(weight / static_cast<double>(end - begin));
}

}  // namespace immunize_ext
