// Extremes of a batch on the CPU, and their gradient; the formulas stand in ../spectrum.cpp.
//
// Routes: many tiny matrices at once (lanes.h); the thin Gram matrix, reduced (gram_route.inl); the
// singular values that it cannot see from the matrix itself (small_end.h); and a singular value
// decomposition for what these refuse. Which one a matrix takes depends on this matrix alone.
//
// Rows of the thin side that hold nothing but zeros, pixels that are never set, have singular value
// zero and add nothing to the others or to any vector: they are left out from the start.

#include "../spectrum.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "../tensors.h"
#include "full_decomposition.h"
#include "lanes.h"
#include "small_end.h"
#include "spectrum_kernels.h"

namespace immunize_ext {
namespace {

using namespace spectrum;

enum class Route : char { settled, decompose, not_finite };

// Entries between 2^-200 and 2^200 can be squared twice and summed without over- or underflow that
// matters; the trace of the thin Gram matrix, the sum of all squares, tells.
const double kSmallestTrace = std::ldexp(1.0, -400);
const double kLargestTrace = std::ldexp(1.0, 400);

// Slices of the units of one symmetric product: enough for the threads, few enough to pay.
template <typename T>
void thin_gram(const Thin<T>& thin, double* g) {
  const int64_t t = thin.side(), ld = padded(t), units = symmetric_units(t);
  std::fill(g, g + ld * ld, 0.0);
  // 2 * 24 * 4 flops a unit and depth: a slice below about 2e6 is not worth a thread.
  const int64_t grain = std::max<int64_t>(1, 10000 / thin.length());
  parallel_for(units, grain, [&](int64_t begin, int64_t end) {
    std::vector<double> packed(ld * kDepth);
    IMMUNIZE_EXT_CHOSEN(add_symmetric_product(thin, begin, end, packed.data(), g));
  });
  mirror(g, t, ld);
}

struct Outcome {
  Route route = Route::settled;
  bool postponed = false;  // what would settle it calls torch, and this is a parallel region
  double scale = 1.0;
  double squared_frobenius = 0.0;  // of the scaled matrix
  Extremes extremes;
};

template <typename T>
double largest_magnitude(const T* a, int64_t count) {
  double largest = 0.0;
  for (int64_t i = 0; i < count; ++i) {
    const double x = std::abs(static_cast<double>(a[i]));
    if (!(x <= largest))  // NaN gets in, and stays
      largest = x;
    if (std::isnan(largest))
      return largest;
  }
  return largest;
}

// Everything about one matrix. thin_gram_out ([t, t], contiguous) may be null.
template <typename T>
void settle_occupied(
    const Thin<T>& thin, const Policy& policy, Wanted wanted, double* thin_gram_out, Outcome& out) {
  const int64_t t = thin.side(), ld = padded(t);
  std::vector<double> g(ld * ld);
  thin_gram(thin, g.data());
  double trace = 0.0;
  for (int64_t i = 0; i < t; ++i)
    trace += g[i * ld + i];
  if (!(trace >= kSmallestTrace && trace <= kLargestTrace)) {
    const double largest = largest_magnitude(thin.a, thin.n * thin.p);
    if (!std::isfinite(largest)) {
      out.route = Route::not_finite;
      return;
    }
    if (largest == 0.0) {
      out.extremes.multiplicity_max = out.extremes.multiplicity_min = policy.full_side;
      if (thin_gram_out != nullptr)
        std::fill(thin_gram_out, thin_gram_out + t * t, 0.0);
      return;
    }
    out.scale = power_of_two_scale(largest);
    std::vector<double> scaled(thin.n * thin.p);
    for (size_t i = 0; i < scaled.size(); ++i)
      scaled[i] = static_cast<double>(thin.a[i]) / out.scale;
    settle_occupied<double>({scaled.data(), thin.n, thin.p}, policy, wanted, thin_gram_out, out);
    if (thin_gram_out != nullptr)
      for (int64_t i = 0; i < t * t; ++i)
        thin_gram_out[i] = thin_gram_out[i] * out.scale * out.scale;  // the square may overflow
    return;
  }
  for (int64_t i = 0; i < t; ++i)
    for (int64_t j = 0; j < t; ++j)
      out.squared_frobenius += g[i * ld + j] * g[i * ld + j];
  if (thin_gram_out != nullptr)
    for (int64_t i = 0; i < t; ++i)
      std::copy(g.data() + i * ld, g.data() + i * ld + t, thin_gram_out + i * t);
  Workspace work(thin.n, thin.p);
  const auto resolve = [&](SmallEnd& end) {
    out.postponed = at::in_parallel_region();
    return !out.postponed && resolve_small_end(thin, g.data(), ld, policy, end, out.extremes);
  };
  const bool settled = IMMUNIZE_EXT_CHOSEN(
      extremes(thin, g.data(), policy, wanted, work, Threads{}, resolve, out.extremes));
  out.route = settled ? Route::settled : Route::decompose;
}

// Rows of the thin side that are not all zeros, ascending. Dense matrices show in a row or two that
// all of them are kept.
template <typename T>
std::vector<int64_t> occupied_rows(const Thin<T>& thin) {
  const auto is_set = [](T x) { return x != T(0); };
  std::vector<int64_t> kept, empty;
  for (int64_t i = 0; i < thin.side(); ++i) {
    const T* row = thin.a + i * thin.p;
    const bool set = thin.left() ? std::any_of(row, row + thin.p, is_set) : is_set(thin.a[i]);
    (set ? kept : empty).push_back(i);
  }
  if (thin.left() || empty.empty())
    return kept;
  for (int64_t i = 1; i < thin.n && !empty.empty(); ++i)
    empty.erase(
        std::remove_if(
            empty.begin(), empty.end(), [&](int64_t j) { return is_set(thin.a[i * thin.p + j]); }),
        empty.end());
  kept.clear();
  for (int64_t i = 0, next = 0; i < thin.side(); ++i) {
    if (next < static_cast<int64_t>(empty.size()) && empty[next] == i)
      ++next;
    else
      kept.push_back(i);
  }
  return kept;
}

// The same for the whole matrix.
template <typename T>
void settle(
    const Thin<T>& thin, const Policy& policy, Wanted wanted, double* thin_gram_out, Outcome& out) {
  const std::vector<int64_t> kept = occupied_rows(thin);
  const int64_t t = thin.side(), rows = static_cast<int64_t>(kept.size());
  if (rows == 0 || rows == t)
    return settle_occupied(thin, policy, wanted, thin_gram_out, out);
  const Thin<T> shape{
      nullptr, thin.left() ? rows : thin.n, thin.left() ? thin.p : rows, thin.columns};
  const std::unique_ptr<T[]> entries(new T[shape.n * shape.p]);
  const int64_t grain = std::max<int64_t>(1, kWorthAThread / shape.p);
  parallel_for(shape.n, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      T* to = entries.get() + i * shape.p;
      const T* from = thin.a + (thin.left() ? kept[i] : i) * thin.p;
      for (int64_t j = 0; j < shape.p; ++j)
        to[j] = from[thin.left() ? j : kept[j]];
    }
  });
  std::vector<double> vectors(2 * rows), gram(thin_gram_out != nullptr ? rows * rows : 0);
  double *const thin_max = out.extremes.thin_max, *const thin_min = out.extremes.thin_min;
  out.extremes.thin_max = vectors.data();
  out.extremes.thin_min = vectors.data() + rows;
  settle_occupied<T>(
      {entries.get(), shape.n, shape.p, shape.columns}, policy, wanted,
      thin_gram_out != nullptr ? gram.data() : nullptr, out);
  out.extremes.thin_max = thin_max;
  out.extremes.thin_min = thin_min;
  for (int64_t i = 0; i < rows; ++i) {
    thin_max[kept[i]] = vectors[i];
    thin_min[kept[i]] = vectors[rows + i];
  }
  if (thin_gram_out == nullptr)
    return;
  std::fill(thin_gram_out, thin_gram_out + t * t, 0.0);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < rows; ++j)
      thin_gram_out[kept[i] * t + kept[j]] = gram[i * rows + j];
}

// The same by a full decomposition.
void decompose(const Tensor& matrix, const Policy& policy, Wanted wanted, Outcome& out) {
  const OneThread one;
  const Decomposition d =
      decompose_one(matrix.to(at::kDouble) / out.scale, policy, wanted.long_vectors);
  const Clusters& found = d.clusters;
  const bool has_min = found.min_end > found.min_begin;
  Extremes& x = out.extremes;
  x.rank = found.rank;
  x.sigma_max = d.sigma[0].item<double>();
  x.sigma_min = has_min ? d.sigma[found.rank - 1].item<double>() : 0.0;
  x.multiplicity_max = found.rank > 0 ? found.max_end : policy.full_side;
  x.multiplicity_min = has_min ? found.min_end - found.min_begin : policy.full_side - found.rank;
  const bool left = matrix.size(0) <= matrix.size(1);
  const auto fill = [&](const Tensor& columns, int64_t index, double* to) {
    const Tensor column = columns.select(1, index).contiguous();
    const double* from = column.const_data_ptr<double>();
    std::copy(from, from + column.size(0), to);
  };
  const auto fill_pair = [&](int64_t index, double* thin, double* along) {
    fill(left ? d.u : d.v, index, thin);
    if (wanted.long_vectors)
      fill(left ? d.v : d.u, index, along);
  };
  if (found.rank > 0 && wanted.max)
    fill_pair(0, x.thin_max, x.long_max);
  if (has_min && wanted.min)
    fill_pair(found.rank - 1, x.thin_min, x.long_min);
}

double* row_of(const Tensor& t, int64_t b) {
  return t.defined() ? t.mutable_data_ptr<double>() + b * t.size(1) : nullptr;
}

// Operations on one matrix, about: the Gram matrix and its reduction.
int64_t cost_of(const MatrixBatch& a) {
  return a.n * a.p * a.thin();
}

double* data_of(const Tensor& t) {
  return t.defined() ? t.mutable_data_ptr<double>() : nullptr;
}

// Writes what the lanes settle, and returns the matrices that are left.
template <typename T>
std::vector<int64_t> left_by_lanes(
    const MatrixBatch& a, const Policy& policy, Wanted wanted, const ExtremesBatch& out) {
  std::vector<char> settled(a.batch, 0);
  if (lanes::serves(a.n, a.p)) {
    const lanes::SingularBatch<T> batch{
        a.matrices.const_data_ptr<T>(),
        a.n,
        a.p,
        policy,
        wanted,
        data_of(out.value_max),
        data_of(out.value_min),
        out.rank.mutable_data_ptr<int64_t>(),
        out.multiplicity_max.mutable_data_ptr<int64_t>(),
        out.multiplicity_min.mutable_data_ptr<int64_t>(),
        data_of(out.thin_max),
        data_of(out.thin_min),
        data_of(out.long_max),
        data_of(out.long_min),
        data_of(out.squared_frobenius),
        data_of(out.thin_gram),
        settled.data()};
    for_each_lanes(a.batch, cost_of(a), [&](int64_t begin, int64_t end) {
      lanes::extremes(batch, begin, end);
    });
  }
  std::vector<int64_t> left;
  for (int64_t b = 0; b < a.batch; ++b)
    if (!settled[b])
      left.push_back(b);
  return left;
}

ExtremesBatch extremes_of(
    const char* op,
    const char* name,
    const MatrixBatch& a,
    const Policy& policy,
    Wanted wanted,
    bool of_gram) {
  const Call call;
  const int64_t n = a.n, p = a.p, t = a.thin();
  ExtremesBatch out(a, wanted, of_gram);
  const std::vector<int64_t> left = a.matrices.scalar_type() == at::kDouble
                                        ? left_by_lanes<double>(a, policy, wanted, out)
                                        : left_by_lanes<float>(a, policy, wanted, out);
  const int64_t count = static_cast<int64_t>(left.size());
  std::vector<Outcome> outcomes(count);
  const auto settle_one = [&](int64_t index) {
    const int64_t b = left[index];
    Outcome& outcome = outcomes[index];
    outcome = {};
    const auto zeroed = [b](const Tensor& rows) {
      double* row = row_of(rows, b);
      if (row != nullptr)
        std::fill(row, row + rows.size(1), 0.0);
      return row;
    };
    outcome.extremes.thin_max = zeroed(out.thin_max);
    outcome.extremes.thin_min = zeroed(out.thin_min);
    outcome.extremes.long_max = zeroed(out.long_max);
    outcome.extremes.long_min = zeroed(out.long_min);
    double* gram = of_gram ? out.thin_gram.mutable_data_ptr<double>() + b * t * t : nullptr;
    const auto run = [&](auto* data) {
      settle<std::remove_const_t<std::remove_pointer_t<decltype(data)>>>(
          {data + b * n * p, n, p}, policy, wanted, gram, outcome);
    };
    if (a.matrices.scalar_type() == at::kDouble)
      run(a.matrices.const_data_ptr<double>());
    else
      run(a.matrices.const_data_ptr<float>());
  };
  for_each_matrix(count, cost_of(a), settle_one);

  for (int64_t index = 0; index < count; ++index) {
    const int64_t b = left[index];
    Outcome& outcome = outcomes[index];
    TORCH_CHECK_VALUE(
        outcome.route != Route::not_finite, op, ": ", name,
        " must be finite, got NaN or infinity at batch index ", b,
        "; look for an overflow upstream, float16 features for instance");
    if (outcome.postponed)
      settle_one(index);
    if (outcome.route == Route::decompose)
      decompose(a.matrices[b], policy, wanted, outcome);
    const Extremes& x = outcome.extremes;
    const double scale = outcome.scale, largest = x.sigma_max * scale;
    const double smallest = x.sigma_min * scale;
    out.value_max.mutable_data_ptr<double>()[b] = of_gram ? largest * largest : largest;
    out.value_min.mutable_data_ptr<double>()[b] = of_gram ? smallest * smallest : smallest;
    if (of_gram)  // in this order: the fourth power of the scale may overflow where F is zero
      out.squared_frobenius.mutable_data_ptr<double>()[b] =
          outcome.squared_frobenius * scale * scale * scale * scale;
    out.rank.mutable_data_ptr<int64_t>()[b] = x.rank;
    out.multiplicity_max.mutable_data_ptr<int64_t>()[b] = x.multiplicity_max;
    out.multiplicity_min.mutable_data_ptr<int64_t>()[b] = x.multiplicity_min;
  }
  return out;
}

// Weights of one matrix in the gradient.
struct Weights {
  double max, min, frobenius;
};

// out = sum over the two extremes of weight u v^T.
template <typename T>
void rank_two(
    int64_t n,
    int64_t p,
    const double weight[2],
    const double* const u[2],
    const double* const v[2],
    T* out) {
  for (int64_t i = 0; i < n; ++i) {
    const double first = weight[0] * u[0][i], second = weight[1] * u[1][i];
    for (int64_t j = 0; j < p; ++j)
      out[i * p + j] = static_cast<T>(first * v[0][j] + second * v[1][j]);
  }
}

// out = m x or x m for a symmetric m on the thin side, [t, t].
template <typename T>
void thin_product(const Thin<T>& x, const double* full, T* out) {
  const int64_t side = x.side();
  std::vector<int64_t> kept;  // rows of m that are not zero
  for (int64_t i = 0; i < side; ++i) {
    const double* row = full + i * side;
    if (std::any_of(row, row + side, [](double entry) { return entry != 0.0; }))
      kept.push_back(i);
  }
  const int64_t t = static_cast<int64_t>(kept.size()), ld = padded(t);
  if (t < side)
    std::fill(out, out + x.n * x.p, T(0));
  if (t == 0)
    return;
  std::vector<double> m(ld * ld);
  for (int64_t i = 0; i < t; ++i)
    for (int64_t j = 0; j < t; ++j)
      m[i * ld + j] = full[kept[i] * side + kept[j]];
  if (x.left()) {
    const int64_t grain = std::max<int64_t>(1, 100000 / (t * t));
    parallel_for(panels_of(x.p), grain, [&](int64_t begin, int64_t end) {
      IMMUNIZE_EXT_CHOSEN(multiply_left(m.data(), ld, x.a, kept.data(), t, x.p, begin, end, out));
    });
    return;
  }
  std::vector<double> packed(panels_of(t) * kPanel * t);
  pack_columns(m.data(), ld, t, packed.data());
  const int64_t blocks = (x.n + kRowBlock - 1) / kRowBlock;
  const int64_t grain = std::max<int64_t>(1, 1000000 / (t * t * kRowBlock));
  parallel_for(blocks, grain, [&](int64_t begin, int64_t end) {
    IMMUNIZE_EXT_CHOSEN(multiply_right(
        x.a, x.p, packed.data(), kept.data(), t, begin * kRowBlock, std::min(end * kRowBlock, x.n),
        out));
  });
}

// m = 4 g_F gram + 2 g_max z z^T + 2 g_min z z^T, z the thin vectors: the gradient is m x or x m.
std::vector<double> thin_weights(
    int64_t side, Weights weights, const double* gram, const double* z_max, const double* z_min) {
  const double factor = 4.0 * weights.frobenius;
  std::vector<double> m(side * side);
  for (int64_t i = 0; i < side; ++i) {
    const double first = 2.0 * weights.max * z_max[i], second = 2.0 * weights.min * z_min[i];
    double* row = m.data() + i * side;
    for (int64_t j = 0; j < side; ++j)
      row[j] = first * z_max[j] + second * z_min[j];
    // A Gram matrix that overflows is no part of a gradient that does not ask for its norm.
    if (factor != 0.0)
      for (int64_t j = 0; j < side; ++j)
        row[j] += factor * gram[i * side + j];
  }
  return m;
}

// The same m where an extreme of K is a cluster: with the mean of z z^T over it.
Tensor cluster_weights(
    const Tensor& matrix, Weights weights, const Tensor& gram, const Policy& policy) {
  const OneThread one;
  const bool left = matrix.size(0) <= matrix.size(1);
  const Tensor wide = matrix.to(at::kDouble);
  const Tensor kept = at::nonzero(wide.ne(0.0).any(left ? 1 : 0)).squeeze(1);
  Tensor m = at::zeros_like(gram);
  if (kept.size(0) > 0) {
    const Tensor rows = wide.index_select(left ? 0 : 1, kept);
    const double scale = power_of_two_scale(rows.abs().max().item<double>());
    const Decomposition d = decompose_one(rows / scale, policy, /*long_vectors=*/false);
    const Clusters& found = d.clusters;
    const Tensor some = left ? d.u : d.v;
    const Tensor z = at::zeros({gram.size(0), some.size(1)}, some.options());
    z.index_copy_(0, kept, some);
    m = cluster_mean(z, z, 0, found.max_end, 2.0 * weights.max) +
        cluster_mean(z, z, found.min_begin, found.min_end, 2.0 * weights.min);
  }
  if (weights.frobenius != 0.0)
    m.add_(gram, 4.0 * weights.frobenius);
  return m.contiguous();
}

// A cluster of singular values: the mean over it, from a full decomposition.
Tensor cluster_gradient(const Tensor& matrix, Weights weights, const Policy& policy) {
  const OneThread one;
  const Tensor wide = matrix.to(at::kDouble);
  const double scale = power_of_two_scale(wide.abs().max().item<double>());
  const Decomposition d = decompose_one(wide / scale, policy);
  const Clusters& found = d.clusters;
  return cluster_mean(d.u, d.v, 0, found.max_end, weights.max) +
         cluster_mean(d.u, d.v, found.min_begin, found.min_end, weights.min);
}

Tensor gradient_within(const MatrixBatch& a, const GradientInputs& in, const Policy& policy) {
  const int64_t n = a.n, p = a.p, t = a.thin();
  const bool of_gram = in.of_gram();
  const Tensor grad = at::empty_like(a.matrices);
  // Once: for a tiny matrix as much time as its gradient.
  const auto numbers = [](const Tensor& x) {
    return x.defined() ? x.const_data_ptr<double>() : nullptr;
  };
  const double *grad_max = numbers(in.grad_max), *grad_min = numbers(in.grad_min);
  const double* grad_frobenius = numbers(in.grad_squared_frobenius);
  const double *lambda_max = numbers(in.lambda_max), *lambda_min = numbers(in.lambda_min);
  const double *thin_max = numbers(in.thin_max), *thin_min = numbers(in.thin_min);
  const double *long_max = numbers(in.long_max), *long_min = numbers(in.long_min);
  const double* thin_gram = numbers(in.thin_gram);
  const int64_t* multiplicity_max = in.multiplicity_max.const_data_ptr<int64_t>();
  const int64_t* multiplicity_min = in.multiplicity_min.const_data_ptr<int64_t>();
  const int64_t length = std::max(n, p);
  const auto weights_of = [&](int64_t b) {
    return Weights{grad_max[b], grad_min[b], of_gram ? grad_frobenius[b] : 0.0};
  };
  const auto is_cluster = [&](int64_t b) {
    const Weights w = weights_of(b);
    return (multiplicity_max[b] > 1 && w.max != 0.0) || (multiplicity_min[b] > 1 && w.min != 0.0);
  };
  // Whether u v^T can be had from the vectors kept: lambda = sigma^2 leaves the range before sigma.
  const auto is_whole = [&](int64_t b) {
    return long_max != nullptr &&
           (!of_gram || (std::isnormal(lambda_max[b]) && std::isnormal(lambda_min[b])));
  };
  const auto fill = [&](int64_t b, auto* x, auto* out) {
    using T = std::remove_pointer_t<decltype(out)>;
    const Weights w = weights_of(b);
    const double* thin[2] = {thin_max + b * t, thin_min + b * t};
    if (w.frobenius == 0.0 && is_whole(b)) {
      const double weight[2] = {
          of_gram ? 2.0 * std::sqrt(lambda_max[b]) * w.max : w.max,
          of_gram ? 2.0 * std::sqrt(lambda_min[b]) * w.min : w.min};
      const double* along[2] = {long_max + b * length, long_min + b * length};
      rank_two<T>(n, p, weight, a.wide() ? thin : along, a.wide() ? along : thin, out + b * n * p);
      return;
    }
    const std::vector<double> m = thin_weights(t, w, thin_gram + b * t * t, thin[0], thin[1]);
    thin_product<T>({x + b * n * p, n, p}, m.data(), out + b * n * p);
  };
  const auto fill_all = [&](auto* x, auto* out) {
    using T = std::remove_pointer_t<decltype(out)>;
    for_each_matrix(a.batch, cost_of(a), [&](int64_t b) {
      if (!is_cluster(b))
        fill(b, x, out);
    });
    for (int64_t b = 0; b < a.batch; ++b) {
      if (!is_cluster(b))
        continue;
      if (!of_gram) {
        grad[b].copy_(cluster_gradient(a.matrices[b], weights_of(b), policy));
        continue;
      }
      const Tensor m = cluster_weights(a.matrices[b], weights_of(b), in.thin_gram[b], policy);
      thin_product<T>({x + b * n * p, n, p}, m.const_data_ptr<double>(), out + b * n * p);
    }
  };
  if (a.matrices.scalar_type() == at::kDouble)
    fill_all(a.matrices.const_data_ptr<double>(), grad.mutable_data_ptr<double>());
  else
    fill_all(a.matrices.const_data_ptr<float>(), grad.mutable_data_ptr<float>());
  return grad;
}

// d|K|_F^2 = 4 K dx is of degree 3: sums overflow that should be finite, or cancel to NaN, where the
// thin Gram matrix is as large as this.
bool overflows(const MatrixBatch& a, const GradientInputs& in, int64_t b) {
  const int64_t t = a.thin();
  const double* gram = in.thin_gram.const_data_ptr<double>() + b * t * t;
  bool large = false;
  for (int64_t i = 0; i < t; ++i)
    large |= !(gram[i * (t + 1)] < 0x1p600);
  return large && in.grad_squared_frobenius.const_data_ptr<double>()[b] != 0.0;
}

Tensor gradient_of(
    const char* /*op*/, const MatrixBatch& a, const GradientInputs& in, const Policy& policy) {
  const Call call;
  std::vector<int64_t> index;
  for (int64_t b = 0; in.of_gram() && b < a.batch; ++b)
    if (overflows(a, in, b))
      index.push_back(b);
  if (index.empty())
    return gradient_within(a, in, policy);
  // There that of y = x / s with the weights of the extremes over s^2, times s^3.
  const OneThread one;
  Tensor scale = at::ones({a.batch}, in.grad_max.options());
  MatrixBatch y = a;
  y.matrices = a.matrices.to(at::kDouble);
  GradientInputs scaled = in;
  scaled.thin_gram = in.thin_gram.clone();
  // Vectors go with eigenvalues that have left the range: of 0 they are not used.
  scaled.lambda_max = at::zeros_like(scale);
  scaled.lambda_min = at::zeros_like(scale);
  for (const int64_t b : index) {
    scale[b].copy_(power_of_two_scale(y.matrices[b].abs().max()));
    const Tensor near = y.matrices[b] / scale[b];
    scaled.thin_gram[b].copy_(a.wide() ? near.mm(near.mT()) : near.mT().mm(near));
  }
  const Tensor sides = scale.view({a.batch, 1, 1});
  y.matrices = y.matrices / sides;
  scaled.grad_max = in.grad_max / scale / scale;
  scaled.grad_min = in.grad_min / scale / scale;
  return times_powers(gradient_within(y, scaled, policy), sides, 3);
}

}  // namespace

const SpectrumEngine cpu_spectrum{&extremes_of, &gradient_of};

}  // namespace immunize_ext
