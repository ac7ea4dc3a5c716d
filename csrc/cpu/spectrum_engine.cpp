// Extremes of a batch on the CPU, and their gradient.
//
// d sigma_i = u_i^T dA v_i for a simple singular value, so grad_A = g u_i v_i^T. At an extreme of
// multiplicity m any u_i v_i^T of the cluster is a subgradient, and which one depends on the basis
// that a solver happened to return; their mean does not, and is the element of least norm of the
// Clarke subdifferential. The forward keeps one pair (u, v) an extreme, which is all a simple
// extreme needs; the backward decomposes again only the matrices whose extreme is a cluster.
//
// K = x^T x: lambda_i = sigma_i(x)^2, d lambda_i = 2 sigma_i u_i^T dx v_i, and
// |K|_F^2 = |x x^T|_F^2 with d|K|_F^2/dx = 4 x K = 4 (x x^T) x. With A^T u_i = sigma_i v_i all of
// it is one product on the thin side, for n <= p
//   grad_x = (4 g_F x x^T + 2 g_max u_1 u_1^T + 2 g_min u_k u_k^T) x,
// and for p < n the same with v on the right.
//
// Routes: the thin Gram matrix, reduced (gram_route.inl) or searched (gram_krylov.inl), and a
// singular value decomposition for what these refuse. Which one a matrix takes depends on this
// matrix alone.

#include "spectrum_engine.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <vector>

#include "spectrum_common.h"
#include "spectrum_kernels.h"

namespace immunize_ext {
namespace {

using namespace spectrum;

enum class Route : char { settled, decompose, not_finite };

// Entries between 2^-200 and 2^200 can be squared twice and summed without over- or underflow that
// matters; the trace of the thin Gram matrix, the sum of all squares, tells.
const double kSmallestTrace = std::ldexp(1.0, -400);
const double kLargestTrace = std::ldexp(1.0, 400);

// Slices of the tiles of one symmetric product: enough for the threads, few enough to pay.
template <typename T>
void thin_gram(const Thin<T>& thin, double* g) {
  const int64_t t = thin.side(), ld = padded(t), tiles = symmetric_tiles(t);
  std::fill(g, g + ld * ld, 0.0);
  // 2 * 12 * 4 flops a tile and depth: a slice below about 2e6 is not worth a thread.
  const int64_t grain = std::max<int64_t>(1, 20000 / thin.length());
  at::parallel_for(0, tiles, grain, [&](int64_t begin, int64_t end) {
    std::vector<double> packed(ld * kDepth);
    IMMUNIZE_EXT_SPECTRUM(add_symmetric_product(thin, begin, end, packed.data(), g));
  });
  mirror(g, t, ld);
}

struct Outcome {
  Route route = Route::settled;
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
void settle(
    const Thin<T>& thin,
    int64_t full_side,
    Policy policy,
    Wanted wanted,
    double* thin_gram_out,
    Outcome& out) {
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
      out.extremes.multiplicity_max = out.extremes.multiplicity_min = full_side;
      if (thin_gram_out != nullptr)
        std::fill(thin_gram_out, thin_gram_out + t * t, 0.0);
      return;
    }
    out.scale = power_of_two_scale(largest);
    std::vector<double> scaled(thin.n * thin.p);
    for (size_t i = 0; i < scaled.size(); ++i)
      scaled[i] = static_cast<double>(thin.a[i]) / out.scale;
    settle<double>({scaled.data(), thin.n, thin.p}, full_side, policy, wanted, thin_gram_out, out);
    if (thin_gram_out != nullptr)
      for (int64_t i = 0; i < t * t; ++i)
        thin_gram_out[i] *= out.scale * out.scale;
    return;
  }
  for (int64_t i = 0; i < t; ++i)
    for (int64_t j = 0; j < t; ++j)
      out.squared_frobenius += g[i * ld + j] * g[i * ld + j];
  if (thin_gram_out != nullptr)
    for (int64_t i = 0; i < t; ++i)
      std::copy(g.data() + i * ld, g.data() + i * ld + t, thin_gram_out + i * t);
  const auto searched = [&] {
    return t >= kKrylovSide &&
           IMMUNIZE_EXT_SPECTRUM(
               large_extremes(thin, g.data(), full_side, policy, wanted, Threads{}, out.extremes));
  };
  const auto reduced = [&] {
    if (t > kLargestSide)
      return false;
    Workspace work(thin.n, thin.p);
    return IMMUNIZE_EXT_SPECTRUM(
        extremes(thin, g.data(), full_side, policy, wanted, work, Threads{}, out.extremes));
  };
  out.route = searched() || reduced() ? Route::settled : Route::decompose;
}

// The same by a full decomposition.
void decompose(
    const Tensor& matrix, int64_t full_side, Policy policy, Wanted wanted, Outcome& out) {
  const Decomposition d = decompose_one(matrix.to(at::kDouble) / out.scale, full_side, policy);
  const Clusters& found = d.clusters;
  const bool has_min = found.min_end > found.min_begin;
  Extremes& x = out.extremes;
  x.rank = found.rank;
  x.sigma_max = d.sigma[0].item<double>();
  x.sigma_min = has_min ? d.sigma[found.rank - 1].item<double>() : 0.0;
  x.multiplicity_max = found.rank > 0 ? found.max_end : full_side;
  x.multiplicity_min = has_min ? found.min_end - found.min_begin : full_side - found.rank;
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

}  // namespace

ExtremesBatch extremes_of(
    const char* op,
    const char* name,
    const Tensor& a,
    int64_t full_side,
    Policy policy,
    Wanted wanted,
    bool of_gram) {
  check_real_floating(op, name, a);
  TORCH_CHECK_VALUE(
      a.dim() >= 2 && a.size(-2) > 0 && a.size(-1) > 0, op, ": ", name,
      " must have shape [*, n, p] with n >= 1 and p >= 1, got ", a.sizes());
  const int64_t n = a.size(-2), p = a.size(-1), batch = a.numel() / (n * p), t = std::min(n, p);
  const bool left = n <= p;
  const Tensor flat = readable(a).view({batch, n, p});
  const auto options = flat.options().dtype(at::kDouble);
  ExtremesBatch out;
  out.sigma_max = at::empty({batch}, options);
  out.sigma_min = at::empty({batch}, options);
  out.lambda_max = at::empty({batch}, options);
  out.lambda_min = at::empty({batch}, options);
  out.squared_frobenius = at::empty({batch}, options);
  out.rank = at::empty({batch}, options.dtype(at::kLong));
  out.multiplicity_max = at::empty({batch}, options.dtype(at::kLong));
  out.multiplicity_min = at::empty({batch}, options.dtype(at::kLong));
  Tensor thin_max = at::zeros({batch, t}, options), thin_min = at::zeros({batch, t}, options);
  Tensor long_max, long_min;
  if (wanted.long_vectors) {
    long_max = at::zeros({batch, std::max(n, p)}, options);
    long_min = at::zeros({batch, std::max(n, p)}, options);
  }
  out.u_max = left ? thin_max : long_max;
  out.v_max = left ? long_max : thin_max;
  out.u_min = left ? thin_min : long_min;
  out.v_min = left ? long_min : thin_min;
  if (of_gram)
    out.thin_gram = at::empty({batch, t, t}, options);

  std::vector<Outcome> outcomes(batch);
  const auto settle_one = [&](int64_t b) {
    Outcome& outcome = outcomes[b];
    outcome.extremes.thin_max = row_of(thin_max, b);
    outcome.extremes.thin_min = row_of(thin_min, b);
    outcome.extremes.long_max = row_of(long_max, b);
    outcome.extremes.long_min = row_of(long_min, b);
    double* gram = of_gram ? out.thin_gram.mutable_data_ptr<double>() + b * t * t : nullptr;
    const auto run = [&](auto* data) {
      settle<std::remove_const_t<std::remove_pointer_t<decltype(data)>>>(
          {data + b * n * p, n, p}, full_side, policy, wanted, gram, outcome);
    };
    if (flat.scalar_type() == at::kDouble)
      run(flat.const_data_ptr<double>());
    else
      run(flat.const_data_ptr<float>());
  };
  for_each_matrix(batch, settle_one);

  for (int64_t b = 0; b < batch; ++b) {
    Outcome& outcome = outcomes[b];
    TORCH_CHECK_VALUE(
        outcome.route != Route::not_finite, op, ": ", name,
        " must be finite, got NaN or infinity at batch index ", b,
        "; look for an overflow upstream, float16 features for instance");
    if (outcome.route == Route::decompose)
      decompose(flat[b], full_side, policy, wanted, outcome);
    const Extremes& x = outcome.extremes;
    const double scale = outcome.scale, square = scale * scale;
    out.sigma_max.mutable_data_ptr<double>()[b] = x.sigma_max * scale;
    out.sigma_min.mutable_data_ptr<double>()[b] = x.sigma_min * scale;
    // Scaled before they are squared: the square of a large scale is infinite, and 0 of it no number.
    out.lambda_max.mutable_data_ptr<double>()[b] = (x.sigma_max * scale) * (x.sigma_max * scale);
    out.lambda_min.mutable_data_ptr<double>()[b] = (x.sigma_min * scale) * (x.sigma_min * scale);
    out.squared_frobenius.mutable_data_ptr<double>()[b] =
        outcome.squared_frobenius * square * square;
    out.rank.mutable_data_ptr<int64_t>()[b] = x.rank;
    out.multiplicity_max.mutable_data_ptr<int64_t>()[b] = x.multiplicity_max;
    out.multiplicity_min.mutable_data_ptr<int64_t>()[b] = x.multiplicity_min;
  }
  return out;
}

namespace {

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

// out = m x or x m with m = 4 g_F gram + 2 g_max z z^T + 2 g_min z z^T, z the thin vectors.
template <typename T>
void thin_product(
    const Thin<T>& x,
    Weights weights,
    const double* gram,
    const double* z_max,
    const double* z_min,
    T* out) {
  const int64_t t = x.side(), ld = padded(t);
  std::vector<double> m(ld * ld);
  for (int64_t i = 0; i < t; ++i) {
    const double first = 2.0 * weights.max * z_max[i], second = 2.0 * weights.min * z_min[i];
    const double factor = 4.0 * weights.frobenius;
    for (int64_t j = 0; j < t; ++j)
      m[i * ld + j] = (first * z_max[j] + second * z_min[j]) + factor * gram[i * t + j];
  }
  if (x.left()) {
    const int64_t grain = std::max<int64_t>(1, 100000 / (t * t));
    at::parallel_for(0, panels_of(x.p), grain, [&](int64_t begin, int64_t end) {
      IMMUNIZE_EXT_SPECTRUM(multiply_left(m.data(), ld, x.a, t, x.p, begin, end, out));
    });
    return;
  }
  std::vector<double> packed(panels_of(t) * kPanel * t);
  pack_columns(m.data(), ld, t, packed.data());
  const int64_t blocks = (x.n + kRowBlock - 1) / kRowBlock;
  const int64_t grain = std::max<int64_t>(1, 1000000 / (t * t * kRowBlock));
  at::parallel_for(0, blocks, grain, [&](int64_t begin, int64_t end) {
    IMMUNIZE_EXT_SPECTRUM(multiply_right(
        x.a, packed.data(), t, begin * kRowBlock, std::min(end * kRowBlock, x.n), out));
  });
}

// A cluster: the mean over it, from a full decomposition.
Tensor cluster_gradient(
    const Tensor& matrix, Weights weights, const Tensor& gram, bool of_gram, Policy policy) {
  const Tensor wide = matrix.to(at::kDouble);
  const int64_t n = wide.size(0), p = wide.size(1);
  const double scale = power_of_two_scale(wide.abs().max().item<double>());
  const Decomposition d = decompose_one(wide / scale, of_gram ? p : std::min(n, p), policy);
  const Clusters& found = d.clusters;
  const double factor = of_gram ? 2.0 * scale : 1.0;
  Tensor grad = cluster_mean(d, 0, found.max_end, weights.max * factor, of_gram) +
                cluster_mean(d, found.min_begin, found.min_end, weights.min * factor, of_gram);
  if (weights.frobenius != 0.0) {
    const Tensor weighted = gram * (4.0 * weights.frobenius);
    grad.add_(n <= p ? weighted.mm(wide) : wide.mm(weighted));
  }
  return grad;
}

}  // namespace

Tensor gradient_of(
    const Tensor& grad_max,
    const Tensor& grad_min,
    const Tensor& grad_squared_frobenius,
    const Tensor& a,
    const Saved& saved,
    Policy policy) {
  const int64_t n = a.size(-2), p = a.size(-1), batch = a.numel() / (n * p), t = std::min(n, p);
  const bool left = n <= p, of_gram = grad_squared_frobenius.defined();
  const auto flatten = [batch](const Tensor& x) {
    return x.defined() ? x.to(at::kDouble).reshape({batch}).contiguous() : x;
  };
  const auto rows = [batch](const Tensor& x) {
    return x.defined() ? x.reshape({batch, x.size(-1)}).contiguous() : x;
  };
  const Tensor g_max = flatten(grad_max), g_min = flatten(grad_min);
  const Tensor g_frobenius = flatten(grad_squared_frobenius);
  const Tensor sigma_max = flatten(saved.sigma_max), sigma_min = flatten(saved.sigma_min);
  const Tensor m_max = saved.multiplicity_max.reshape({batch}).contiguous();
  const Tensor m_min = saved.multiplicity_min.reshape({batch}).contiguous();
  const Tensor u_max = rows(saved.u_max), v_max = rows(saved.v_max);
  const Tensor u_min = rows(saved.u_min), v_min = rows(saved.v_min);
  const Tensor thin_max = left ? u_max : v_max, thin_min = left ? u_min : v_min;
  const Tensor gram = of_gram ? saved.thin_gram.reshape({batch, t, t}).contiguous() : Tensor();
  const Tensor flat = readable(a).view({batch, n, p});
  const Tensor grad = at::empty({batch, n, p}, flat.options());

  const auto weights_of = [&](int64_t b) {
    return Weights{
        g_max.const_data_ptr<double>()[b], g_min.const_data_ptr<double>()[b],
        of_gram ? g_frobenius.const_data_ptr<double>()[b] : 0.0};
  };
  const auto is_cluster = [&](int64_t b) {
    const Weights w = weights_of(b);
    return (m_max.const_data_ptr<int64_t>()[b] > 1 && w.max != 0.0) ||
           (m_min.const_data_ptr<int64_t>()[b] > 1 && w.min != 0.0);
  };
  const auto fill = [&](int64_t b, auto* x, auto* out) {
    using T = std::remove_pointer_t<decltype(out)>;
    const Weights w = weights_of(b);
    const bool whole = u_max.defined() && v_max.defined();
    if (whole && w.frobenius == 0.0) {
      const double weight[2] = {
          of_gram ? 2.0 * sigma_max.const_data_ptr<double>()[b] * w.max : w.max,
          of_gram ? 2.0 * sigma_min.const_data_ptr<double>()[b] * w.min : w.min};
      const double* const u[2] = {row_of(u_max, b), row_of(u_min, b)};
      const double* const v[2] = {row_of(v_max, b), row_of(v_min, b)};
      rank_two<T>(n, p, weight, u, v, out + b * n * p);
      return;
    }
    thin_product<T>(
        {x + b * n * p, n, p}, w, gram.const_data_ptr<double>() + b * t * t, row_of(thin_max, b),
        row_of(thin_min, b), out + b * n * p);
  };
  for_each_matrix(batch, [&](int64_t b) {
    if (is_cluster(b))
      return;
    if (flat.scalar_type() == at::kDouble)
      fill(b, flat.const_data_ptr<double>(), grad.mutable_data_ptr<double>());
    else
      fill(b, flat.const_data_ptr<float>(), grad.mutable_data_ptr<float>());
  });
  for (int64_t b = 0; b < batch; ++b)
    if (is_cluster(b))
      grad[b].copy_(
          cluster_gradient(flat[b], weights_of(b), of_gram ? gram[b] : Tensor(), of_gram, policy));
  return grad.view(a.sizes()).to(a.scalar_type());
}

}  // namespace immunize_ext
