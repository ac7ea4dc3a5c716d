// Extremal singular values on CUDA: forward and backward (spectrum_double_backward.cpp has the
// rest).
//
// Matrices whose thin side fits the shared memory of a block (t <= 116 with 163 KiB, 136 with 227
// KiB) are decomposed by one block each, larger ones by the blocked route. From a side of 1024 on
// Krylov spaces of the thin Gram matrix are tried first (krylov.h), for simple extremes and full
// rank; the blocked route takes what they cannot prove. Everything runs on the current stream of
// the tensor's device and allocates through torch's allocator.
//
// What waits for the GPU. The forward operators read one integer back, to raise for NaN and
// infinity as the CPU operators do. On the blocked route they also look after the sixth sweep and
// every second one whether the work is done, and the backward pass looks once whether any matrix
// has a cluster: either saves thousands of launches that would find nothing to do. While a CUDA
// graph is captured nothing waits: all sweeps are recorded, and matrices that are not finite give
// NaN. Krylov spaces wait once a round, and are left out of a capture.

#include <ATen/ATen.h>
#include <ATen/cuda/CUDAContext.h>
#include <c10/core/DeviceGuard.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include <algorithm>
#include <climits>
#include <tuple>
#include <vector>

#include "../checks.h"
#include "krylov.h"
#include "power_of_two.h"
#include "spectrum_launchers.h"

namespace immunize_ext::spectrum {

IMMUNIZE_EXT_SPECTRUM_LAUNCHERS(extern, float);
IMMUNIZE_EXT_SPECTRUM_LAUNCHERS(extern, double);

}  // namespace immunize_ext::spectrum

namespace immunize_ext {
namespace {

using at::Tensor;
using spectrum::Incoming;
using spectrum::LargePlan;
using spectrum::LargeSpace;
using spectrum::Outputs;
using spectrum::Policy;
using spectrum::SmallPlan;

// A batch of matrices as the kernels take it.
struct Batch {
  Tensor matrices;  // [batch, n, p] float32 or float64, contiguous
  int64_t batch, n, p;

  int64_t thin() const {
    return std::min(n, p);
  }
  at::IntArrayRef shape_of(const Tensor& original) const {
    return original.sizes().slice(0, original.dim() - 2);
  }
  at::TensorOptions float64() const {
    return matrices.options().dtype(at::kDouble);
  }
};

Batch as_batch(const char* op, const char* name, const Tensor& a) {
  check_floating_matrix(op, name, a);
  Batch result;
  result.n = a.size(-2);
  result.p = a.size(-1);
  result.batch = a.numel() / (result.n * result.p);
  TORCH_CHECK_VALUE(
      result.batch < INT_MAX && result.thin() <= (1 << 15), op, ": ", name,
      " must have less than 2^31 matrices with a thin side of at most 32768, got ", a.sizes(),
      "; split it");
  // Half types are exact in float32; the arithmetic is float64 whatever comes.
  const bool wide = a.scalar_type() == at::kDouble;
  result.matrices = a.to(wide ? at::kDouble : at::kFloat)
                        .reshape({result.batch, result.n, result.p})
                        .contiguous();
  return result;
}

std::vector<int64_t> with_sides(at::IntArrayRef batch, std::initializer_list<int64_t> sides) {
  std::vector<int64_t> shape(batch.begin(), batch.end());
  shape.insert(shape.end(), sides.begin(), sides.end());
  return shape;
}

// f(type) for the dtype of a batch, as float or double.
template <typename F>
void dispatch(const Tensor& matrices, const F& f) {
  if (matrices.scalar_type() == at::kDouble) {
    f(double{});
  } else {
    f(float{});
  }
}

// Workspace of the large route for `batch` matrices.
struct LargeBuffers {
  Tensor work, partial, rotation, sigma, largest, flags;

  LargeBuffers(const LargePlan& plan, int64_t batch, const at::TensorOptions& float64)
      : work(at::empty({batch, plan.work_doubles()}, float64)),
        partial(at::empty({batch, plan.partial_doubles()}, float64)),
        rotation(at::empty({batch, plan.rotation_doubles()}, float64)),
        sigma(at::empty({batch, plan.side}, float64)),
        largest(at::zeros({batch}, float64.dtype(at::kLong))),
        flags(at::zeros({batch, plan.flags()}, float64.dtype(at::kInt))) {}

  LargeSpace space() const {
    return {
        work.mutable_data_ptr<double>(),
        partial.mutable_data_ptr<double>(),
        rotation.mutable_data_ptr<double>(),
        sigma.mutable_data_ptr<double>(),
        reinterpret_cast<spectrum::Bits*>(largest.mutable_data_ptr<int64_t>()),
        flags.mutable_data_ptr<int>()};
  }
};

// Matrices that the large route takes at a time, so that its workspace stays near 1 GiB.
int64_t large_step(const LargePlan& plan, int64_t batch) {
  constexpr int64_t kWorkspaceDoubles = int64_t{1} << 27;
  const int64_t each = plan.work_doubles() + plan.partial_doubles() + plan.rotation_doubles();
  const int64_t affordable = std::max<int64_t>(1, kWorkspaceDoubles / each);
  return std::min({batch, affordable, spectrum::large_most_batch(plan)});
}

bool is_capturing() {
  return c10::cuda::currentStreamCaptureStatusMayInitCtx() != c10::cuda::CaptureStatus::None;
}

// Stops a decomposition when no matrix was rotated in a sweep.
spectrum::Watch watch(const LargeBuffers& buffers) {
  if (is_capturing()) {
    return {};
  }
  const auto rotated = [](const void* flags, int sweep) {
    return static_cast<const Tensor*>(flags)->select(1, 2 + sweep).any().item<bool>();
  };
  return {rotated, &buffers.flags};
}

Tensor small_workspace(const SmallPlan& plan, unsigned grid, const at::TensorOptions& float64) {
  return at::empty({static_cast<int64_t>(grid), plan.work_doubles()}, float64);
}

// Raises if a matrix was not finite. first_bad: one batch index for each step of `step` matrices.
// Waits for the kernels.
void check_finite_batch(const char* op, const char* name, const Tensor& first_bad, int64_t step) {
  if (is_capturing()) {
    return;
  }
  const Tensor on_host = first_bad.cpu();
  for (int64_t i = 0; i < on_host.numel(); ++i) {
    const int found = on_host.const_data_ptr<int>()[i];
    TORCH_CHECK_VALUE(
        found == INT_MAX, op, ": ", name, " must be finite, got NaN or infinity at batch index ",
        i * step + found, "; look for an overflow upstream, float16 features for instance");
  }
}

// What a forward operator returns, flat over the batch.
struct Results {
  Tensor value_max, value_min, rank, multiplicity_max, multiplicity_min;
  Tensor u_max, v_max, u_min, v_min;
  Tensor squared_frobenius, thin_gram;  // undefined unless of_gram
  bool of_gram;

  Results(const Batch& a, bool of_gram) : of_gram(of_gram) {
    const auto numbers = a.float64();
    const auto counts = numbers.dtype(at::kLong);
    value_max = at::empty({a.batch}, numbers);
    value_min = at::empty({a.batch}, numbers);
    rank = at::empty({a.batch}, counts);
    multiplicity_max = at::empty({a.batch}, counts);
    multiplicity_min = at::empty({a.batch}, counts);
    u_max = at::empty({a.batch, a.n}, numbers);
    v_max = at::empty({a.batch, a.p}, numbers);
    u_min = at::empty({a.batch, a.n}, numbers);
    v_min = at::empty({a.batch, a.p}, numbers);
    if (of_gram) {
      squared_frobenius = at::empty({a.batch}, numbers);
      thin_gram = at::empty({a.batch, a.thin(), a.thin()}, numbers);
    }
  }

  // Pointers to the results from matrix `first` on.
  Outputs outputs(const Batch& a, int64_t first) const {
    const auto numbers = [first](const Tensor& t, int64_t each) {
      return t.mutable_data_ptr<double>() + first * each;
    };
    const auto counts = [first](const Tensor& t) { return t.mutable_data_ptr<int64_t>() + first; };
    const bool transposed = a.n <= a.p;
    const int64_t m = std::max(a.n, a.p), t = a.thin();
    return {
        numbers(value_max, 1),
        numbers(value_min, 1),
        counts(rank),
        counts(multiplicity_max),
        counts(multiplicity_min),
        numbers(transposed ? v_max : u_max, m),
        numbers(transposed ? u_max : v_max, t),
        numbers(transposed ? v_min : u_min, m),
        numbers(transposed ? u_min : v_min, t),
        of_gram ? numbers(squared_frobenius, 1) : nullptr,
        of_gram ? numbers(thin_gram, t * t) : nullptr,
        of_gram};
  }
};

void set_gram(const Results& results, const Tensor& thin) {
  results.thin_gram.copy_(thin);
  results.squared_frobenius.copy_(thin.square().sum({1, 2}));
}

// Fills in what Krylov spaces prove of large features; returns the indices of the rest.
Tensor search(
    const char* op,
    const char* name,
    const Batch& a,
    const Policy& policy,
    const Results& results) {
  const Tensor wide = a.matrices.to(at::kDouble);
  const Tensor largest = wide.abs().amax({1, 2});
  const Tensor bad = largest.isfinite().logical_not().nonzero().cpu();
  TORCH_CHECK_VALUE(
      bad.numel() == 0, op, ": ", name, " must be finite, got NaN or infinity at batch index ",
      bad.numel() == 0 ? 0 : bad.const_data_ptr<int64_t>()[0],
      "; look for an overflow upstream, float16 features for instance");
  const Tensor scale = power_of_two_scale(largest), usable = largest > 0;
  const bool left = a.n <= a.p;
  Tensor thin = wide / scale.view({-1, 1, 1});
  if (!left)
    thin = thin.mT();
  // What cannot be searched is replaced by what cannot be proven.
  const Tensor cluster = at::eye(thin.size(1), thin.size(2), thin.options());
  thin = at::where(usable.view({-1, 1, 1}), thin, cluster);
  const krylov::Triplets x = krylov::triplets(thin, policy.rank_rtol, policy.cluster_rtol);
  const Tensor proven = x.proven.logical_and(usable);
  const auto put = [&](const Tensor& to, const Tensor& from) {
    to.copy_(krylov::where_each(proven, from, to));
  };
  const bool has_min = !(policy.full_rank && policy.full_side > a.thin());
  const Tensor none = at::zeros_like(largest), count = at::ones_like(results.rank);
  const Tensor sigma_max = x.sigma_max * scale;
  const Tensor sigma_min = has_min ? at::minimum(x.sigma_min * scale, sigma_max) : none;
  put(results.value_max, results.of_gram ? sigma_max.square() : sigma_max);
  put(results.value_min, results.of_gram ? sigma_min.square() : sigma_min);
  put(results.rank, count * a.thin());
  put(results.multiplicity_max, count);
  put(results.multiplicity_min, has_min ? count : count * (policy.full_side - a.thin()));
  const double kept = has_min ? 1.0 : 0.0;
  put(left ? results.u_max : results.v_max, x.thin_max);
  put(left ? results.v_max : results.u_max, x.long_max);
  put(left ? results.u_min : results.v_min, x.thin_min * kept);
  put(left ? results.v_min : results.u_min, x.long_min * kept);
  if (results.of_gram) {
    // That of the replacement where nothing could be searched, but such matrices are zero.
    const Tensor square = (scale * scale).masked_fill(usable.logical_not(), 0.0);
    set_gram(results, x.thin_gram * square.view({-1, 1, 1}));
  }
  return proven.logical_not().nonzero().view({-1});
}

// By one block each, or by the blocked route.
void decompose_by_kernels(
    const char* op,
    const char* name,
    const Batch& a,
    const Policy& policy,
    const Results& results) {
  const auto stream = at::cuda::getCurrentCUDAStream();
  const auto flag = a.matrices.options().dtype(at::kInt);
  if (spectrum::is_small(a.n, a.p, stream)) {
    const SmallPlan plan = spectrum::small_plan(a.n, a.p);
    const unsigned grid = spectrum::small_grid(plan, a.batch, stream);
    const Tensor work = small_workspace(plan, grid, a.float64());
    const Tensor first_bad = at::full({1}, INT_MAX, flag);
    dispatch(a.matrices, [&](auto type) {
      using T = decltype(type);
      spectrum::launch_small_extremes<T>(
          a.matrices.const_data_ptr<T>(), a.batch, plan, policy, results.outputs(a, 0),
          work.mutable_data_ptr<double>(), grid, first_bad.mutable_data_ptr<int>(), stream);
    });
    check_finite_batch(op, name, first_bad, a.batch);
    return;
  }
  if (results.of_gram) {
    const Tensor x = a.matrices.to(at::kDouble);
    set_gram(results, a.n <= a.p ? at::bmm(x, x.mT()) : at::bmm(x.mT(), x));
  }
  const LargePlan plan = spectrum::large_plan(a.n, a.p);
  const int64_t step = large_step(plan, a.batch);
  const int64_t steps = (a.batch + step - 1) / step;
  const Tensor first_bad = at::full({steps}, INT_MAX, flag);
  for (int64_t i = 0; i < steps; ++i) {
    const int64_t first = i * step, count = std::min(step, a.batch - first);
    const LargeBuffers buffers(plan, count, a.float64());
    dispatch(a.matrices, [&](auto type) {
      using T = decltype(type);
      spectrum::launch_large_extremes<T>(
          a.matrices.const_data_ptr<T>() + first * a.n * a.p, count, plan, buffers.space(), policy,
          results.outputs(a, first), first_bad.mutable_data_ptr<int>() + i, watch(buffers), stream);
    });
  }
  check_finite_batch(op, name, first_bad, step);
}

Results decompose(
    const char* op, const char* name, const Batch& a, const Policy& policy, bool of_gram) {
  const Results results(a, of_gram);
  if (a.batch == 0)
    return results;
  // What is composed of torch operators runs on any device, and is tested on the CPU.
  if (a.thin() < krylov::kSide || (a.matrices.is_cuda() && is_capturing())) {
    decompose_by_kernels(op, name, a, policy, results);
    return results;
  }
  const Tensor rest = search(op, name, a, policy, results);
  if (rest.numel() == a.batch) {
    decompose_by_kernels(op, name, a, policy, results);
    return results;
  }
  if (rest.numel() > 0) {
    const Batch unproven{a.matrices.index_select(0, rest), rest.numel(), a.n, a.p};
    const Results found(unproven, of_gram);
    decompose_by_kernels(op, name, unproven, policy, found);
    for (const auto field :
         {&Results::value_max, &Results::value_min, &Results::rank, &Results::multiplicity_max,
          &Results::multiplicity_min, &Results::u_max, &Results::v_max, &Results::u_min,
          &Results::v_min})
      Tensor(results.*field).index_copy_(0, rest, found.*field);
  }
  return results;
}

using Forward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Forward extremal_singular_values(
    const Tensor& a,  // [*, n, p]
    double rank_rtol,
    double cluster_rtol,
    bool full_rank) {
  constexpr const char* op = "extremal_singular_values";
  const c10::OptionalDeviceGuard guard(a.device());
  const Batch batch = as_batch(op, "a", a);
  const Results r =
      decompose(op, "a", batch, {rank_rtol, cluster_rtol, full_rank, batch.thin()}, false);
  const auto shape = batch.shape_of(a);
  return {
      r.value_max.reshape(shape),
      r.value_min.reshape(shape),
      r.rank.reshape(shape),
      r.multiplicity_max.reshape(shape),
      r.multiplicity_min.reshape(shape),
      r.u_max.reshape(with_sides(shape, {batch.n})),
      r.v_max.reshape(with_sides(shape, {batch.p})),
      r.u_min.reshape(with_sides(shape, {batch.n})),
      r.v_min.reshape(with_sides(shape, {batch.p}))};
}

using GramForward = std::
    tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

GramForward gram_extremes(
    const Tensor& x,  // [*, n, p]
    double rank_rtol,
    double cluster_rtol,
    bool full_rank) {
  constexpr const char* op = "gram_extremes";
  const c10::OptionalDeviceGuard guard(x.device());
  const Batch batch = as_batch(op, "x", x);
  const Results r = decompose(op, "x", batch, {rank_rtol, cluster_rtol, full_rank, batch.p}, true);
  const auto shape = batch.shape_of(x);
  return {
      r.value_max.reshape(shape),
      r.value_min.reshape(shape),
      r.squared_frobenius.reshape(shape),
      r.rank.reshape(shape),
      r.multiplicity_max.reshape(shape),
      r.multiplicity_min.reshape(shape),
      r.u_max.reshape(with_sides(shape, {batch.n})),
      r.v_max.reshape(with_sides(shape, {batch.p})),
      r.u_min.reshape(with_sides(shape, {batch.n})),
      r.v_min.reshape(with_sides(shape, {batch.p})),
      r.thin_gram.reshape(with_sides(shape, {batch.thin(), batch.thin()}))};
}

// Tensors of a backward pass, contiguous and flat over the batch.
struct IncomingTensors {
  Tensor grad_max, grad_min, multiplicity_max, multiplicity_min, u_max, v_max, u_min, v_min;
  Tensor lambda_max, lambda_min, grad_squared_frobenius, thin_gram;  // undefined unless of_gram
  const char* op;
  const Batch& a;

  Tensor flat(const char* name, const Tensor& t, at::ScalarType dtype, int64_t each) const {
    check_same_device(op, name, t, "the matrices", a.matrices);
    TORCH_CHECK_VALUE(
        t.numel() == a.batch * each, op, ": ", name, " must have ", a.batch * each,
        " elements, got shape ", t.sizes());
    return t.to(dtype).contiguous();
  }

  IncomingTensors(
      const char* op,
      const Batch& a,
      const Tensor& grad_max,
      const Tensor& grad_min,
      const Tensor& multiplicity_max,
      const Tensor& multiplicity_min,
      const Tensor& u_max,
      const Tensor& v_max,
      const Tensor& u_min,
      const Tensor& v_min)
      : op(op), a(a) {
    this->grad_max = flat("grad_max", grad_max, at::kDouble, 1);
    this->grad_min = flat("grad_min", grad_min, at::kDouble, 1);
    this->multiplicity_max = flat("multiplicity_max", multiplicity_max, at::kLong, 1);
    this->multiplicity_min = flat("multiplicity_min", multiplicity_min, at::kLong, 1);
    this->u_max = flat("u_max", u_max, at::kDouble, a.n);
    this->v_max = flat("v_max", v_max, at::kDouble, a.p);
    this->u_min = flat("u_min", u_min, at::kDouble, a.n);
    this->v_min = flat("v_min", v_min, at::kDouble, a.p);
  }

  void of_gram(
      const Tensor& lambda_max,
      const Tensor& lambda_min,
      const Tensor& grad_squared_frobenius,
      const Tensor& thin_gram) {
    this->lambda_max = flat("lambda_max", lambda_max, at::kDouble, 1);
    this->lambda_min = flat("lambda_min", lambda_min, at::kDouble, 1);
    this->grad_squared_frobenius =
        flat("grad_squared_frobenius", grad_squared_frobenius, at::kDouble, 1);
    this->thin_gram = flat("thin_gram", thin_gram, at::kDouble, a.thin() * a.thin());
  }

  // Whether any matrix has a repeated extreme with a gradient; waits.
  bool any_cluster() const {
    const Tensor max = (multiplicity_max > 1).logical_and(grad_max != 0);
    const Tensor min = (multiplicity_min > 1).logical_and(grad_min != 0);
    return max.logical_or(min).any().item<bool>();
  }

  // Pointers from matrix `first` on.
  Incoming pointers(int64_t first) const {
    const bool gram = lambda_max.defined();
    const auto numbers = [first](const Tensor& t, int64_t each) {
      return t.const_data_ptr<double>() + first * each;
    };
    const auto counts = [first](const Tensor& t) { return t.const_data_ptr<int64_t>() + first; };
    return {
        numbers(grad_max, 1),
        numbers(grad_min, 1),
        counts(multiplicity_max),
        counts(multiplicity_min),
        numbers(u_max, a.n),
        numbers(v_max, a.p),
        numbers(u_min, a.n),
        numbers(v_min, a.p),
        gram ? numbers(lambda_max, 1) : nullptr,
        gram ? numbers(lambda_min, 1) : nullptr,
        gram ? numbers(grad_squared_frobenius, 1) : nullptr,
        gram ? numbers(thin_gram, a.thin() * a.thin()) : nullptr,
        gram};
  }
};

// The gradient in the shape and dtype of `original`.
Tensor gradient(const IncomingTensors& in, const Policy& policy, const Tensor& original) {
  const Batch& a = in.a;
  const Tensor grad = at::empty_like(a.matrices);
  if (a.batch > 0) {
    const auto stream = at::cuda::getCurrentCUDAStream();
    dispatch(a.matrices, [&](auto type) {
      using T = decltype(type);
      const T* matrices = a.matrices.const_data_ptr<T>();
      T* out = grad.mutable_data_ptr<T>();
      spectrum::launch_gradient<T>(in.pointers(0), matrices, a.batch, a.n, a.p, out, stream);
      if (spectrum::is_small(a.n, a.p, stream)) {
        const SmallPlan plan = spectrum::small_plan(a.n, a.p);
        const unsigned grid = spectrum::small_grid(plan, a.batch, stream);
        const Tensor work = small_workspace(plan, grid, a.float64());
        spectrum::launch_small_cluster_gradient<T>(
            in.pointers(0), matrices, a.batch, plan, policy, work.mutable_data_ptr<double>(), grid,
            out, stream);
        return;
      }
      if (!is_capturing() && !in.any_cluster()) {
        return;
      }
      const LargePlan plan = spectrum::large_plan(a.n, a.p);
      const int64_t step = large_step(plan, a.batch);
      for (int64_t first = 0; first < a.batch; first += step) {
        const int64_t count = std::min(step, a.batch - first);
        const LargeBuffers buffers(plan, count, a.float64());
        spectrum::launch_large_cluster_gradient<T>(
            in.pointers(first), matrices + first * a.n * a.p, count, plan, buffers.space(), policy,
            out + first * a.n * a.p, watch(buffers), stream);
      }
    });
  }
  return grad.reshape(original.sizes()).to(original.scalar_type());
}

Tensor extremal_singular_values_backward(
    const Tensor& grad_max,  // [*] float64
    const Tensor& grad_min,  // [*] float64
    const Tensor& a,         // [*, n, p]
    const Tensor& multiplicity_max,
    const Tensor& multiplicity_min,
    const Tensor& u_max,
    const Tensor& v_max,
    const Tensor& u_min,
    const Tensor& v_min,
    double rank_rtol,
    double cluster_rtol,
    bool full_rank) {
  constexpr const char* op = "extremal_singular_values_backward";
  const c10::cuda::CUDAGuard guard(a.device());
  const Batch batch = as_batch(op, "a", a);
  const IncomingTensors in(
      op, batch, grad_max, grad_min, multiplicity_max, multiplicity_min, u_max, v_max, u_min,
      v_min);
  return gradient(in, {rank_rtol, cluster_rtol, full_rank, batch.thin()}, a);
}

Tensor gram_extremes_backward(
    const Tensor& grad_max,
    const Tensor& grad_min,
    const Tensor& grad_squared_frobenius,
    const Tensor& x,  // [*, n, p]
    const Tensor& lambda_max,
    const Tensor& lambda_min,
    const Tensor& multiplicity_max,
    const Tensor& multiplicity_min,
    const Tensor& u_max,
    const Tensor& v_max,
    const Tensor& u_min,
    const Tensor& v_min,
    const Tensor& thin_gram,  // [*, t, t]
    double rank_rtol,
    double cluster_rtol,
    bool full_rank) {
  constexpr const char* op = "gram_extremes_backward";
  const c10::cuda::CUDAGuard guard(x.device());
  const Batch batch = as_batch(op, "x", x);
  IncomingTensors in(
      op, batch, grad_max, grad_min, multiplicity_max, multiplicity_min, u_max, v_max, u_min,
      v_min);
  in.of_gram(lambda_max, lambda_min, grad_squared_frobenius, thin_gram);
  return gradient(in, {rank_rtol, cluster_rtol, full_rank, batch.p}, x);
}

}  // namespace

TORCH_LIBRARY_IMPL(immunize_ext, CUDA, m) {
  m.impl("extremal_singular_values", &extremal_singular_values);
  m.impl("extremal_singular_values_backward", &extremal_singular_values_backward);
  m.impl("gram_extremes", &gram_extremes);
  m.impl("gram_extremes_backward", &gram_extremes_backward);
}

}  // namespace immunize_ext
