// The engine of the spectrum operators on CUDA; the operators stand in ../spectrum.cpp.
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

#include <algorithm>
#include <climits>

#include "../capture.h"
#include "../checks.h"
#include "../krylov.h"
#include "../spectrum.h"
#include "../tensors.h"
#include "spectrum_launchers.h"

namespace immunize_ext::spectrum {

IMMUNIZE_EXT_SPECTRUM_LAUNCHERS(extern, float);
IMMUNIZE_EXT_SPECTRUM_LAUNCHERS(extern, double);

}  // namespace immunize_ext::spectrum

namespace immunize_ext {
namespace {

using spectrum::Incoming;
using spectrum::LargePlan;
using spectrum::LargeSpace;
using spectrum::Outputs;
using spectrum::SmallPlan;

at::TensorOptions float64(const MatrixBatch& a) {
  return a.matrices.options().dtype(at::kDouble);
}

void check_limits(const char* op, const char* name, const MatrixBatch& a) {
  TORCH_CHECK_VALUE(
      a.batch < INT_MAX && a.thin() <= (1 << 15), op, ": ", name,
      " must have less than 2^31 matrices with a thin side of at most 32768, got ",
      a.matrices.sizes(), "; split it");
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

// Pointers to the results from matrix `first` on.
Outputs outputs(const ExtremesBatch& e, const MatrixBatch& a, int64_t first) {
  const auto numbers = [first](const Tensor& t, int64_t each) {
    return t.mutable_data_ptr<double>() + first * each;
  };
  const auto counts = [first](const Tensor& t) { return t.mutable_data_ptr<int64_t>() + first; };
  const bool of_gram = e.thin_gram.defined();
  const int64_t m = std::max(a.n, a.p), t = a.thin();
  return {
      numbers(e.value_max, 1),
      numbers(e.value_min, 1),
      counts(e.rank),
      counts(e.multiplicity_max),
      counts(e.multiplicity_min),
      numbers(e.long_max, m),
      numbers(e.thin_max, t),
      numbers(e.long_min, m),
      numbers(e.thin_min, t),
      of_gram ? numbers(e.squared_frobenius, 1) : nullptr,
      of_gram ? numbers(e.thin_gram, t * t) : nullptr,
      of_gram};
}

void set_gram(const ExtremesBatch& results, const Tensor& thin) {
  results.thin_gram.copy_(thin);
  results.squared_frobenius.copy_(thin.square().sum({1, 2}));
}

// Fills in what Krylov spaces prove of large features; returns the indices of the rest.
Tensor search(
    const char* op,
    const char* name,
    const MatrixBatch& a,
    const Policy& policy,
    const ExtremesBatch& results) {
  const Tensor wide = a.matrices.to(at::kDouble);
  const Tensor largest = wide.abs().amax({1, 2});
  const Tensor bad = largest.isfinite().logical_not().nonzero().cpu();
  TORCH_CHECK_VALUE(
      bad.numel() == 0, op, ": ", name, " must be finite, got NaN or infinity at batch index ",
      bad.numel() == 0 ? 0 : bad.const_data_ptr<int64_t>()[0],
      "; look for an overflow upstream, float16 features for instance");
  const Tensor scale = power_of_two_scale(largest), usable = largest > 0;
  Tensor thin = wide / scale.view({-1, 1, 1});
  if (!a.wide())
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
  put(results.value_max, results.thin_gram.defined() ? sigma_max.square() : sigma_max);
  put(results.value_min, results.thin_gram.defined() ? sigma_min.square() : sigma_min);
  put(results.rank, count * a.thin());
  put(results.multiplicity_max, count);
  put(results.multiplicity_min, has_min ? count : count * (policy.full_side - a.thin()));
  const double kept = has_min ? 1.0 : 0.0;
  put(results.thin_max, x.thin_max);
  put(results.long_max, x.long_max);
  put(results.thin_min, x.thin_min * kept);
  put(results.long_min, x.long_min * kept);
  if (results.thin_gram.defined()) {
    // That of the replacement where nothing could be searched, but such matrices are zero.
    const Tensor factor = scale.masked_fill(usable.logical_not(), 0.0).view({-1, 1, 1});
    set_gram(results, x.thin_gram * factor * factor);  // the square may overflow
  }
  return proven.logical_not().nonzero().view({-1});
}

// By one block each, or by the blocked route.
void decompose_by_kernels(
    const char* op,
    const char* name,
    const MatrixBatch& a,
    const Policy& policy,
    const ExtremesBatch& results) {
  const auto stream = at::cuda::getCurrentCUDAStream();
  const auto flag = a.matrices.options().dtype(at::kInt);
  if (spectrum::is_small(a.n, a.p, stream)) {
    const SmallPlan plan = spectrum::small_plan(a.n, a.p);
    const unsigned grid = spectrum::small_grid(plan, a.batch, stream);
    const Tensor work = small_workspace(plan, grid, float64(a));
    const Tensor first_bad = at::full({1}, INT_MAX, flag);
    dispatch(a.matrices, [&](auto type) {
      using T = decltype(type);
      spectrum::launch_small_extremes<T>(
          a.matrices.const_data_ptr<T>(), a.batch, plan, policy, outputs(results, a, 0),
          work.mutable_data_ptr<double>(), grid, first_bad.mutable_data_ptr<int>(), stream);
    });
    check_finite_batch(op, name, first_bad, a.batch);
    return;
  }
  if (results.thin_gram.defined()) {
    const Tensor x = a.matrices.to(at::kDouble);
    set_gram(results, a.wide() ? at::bmm(x, x.mT()) : at::bmm(x.mT(), x));
  }
  const LargePlan plan = spectrum::large_plan(a.n, a.p);
  const int64_t step = large_step(plan, a.batch);
  const int64_t steps = (a.batch + step - 1) / step;
  const Tensor first_bad = at::full({steps}, INT_MAX, flag);
  for (int64_t i = 0; i < steps; ++i) {
    const int64_t first = i * step, count = std::min(step, a.batch - first);
    const LargeBuffers buffers(plan, count, float64(a));
    dispatch(a.matrices, [&](auto type) {
      using T = decltype(type);
      spectrum::launch_large_extremes<T>(
          a.matrices.const_data_ptr<T>() + first * a.n * a.p, count, plan, buffers.space(), policy,
          outputs(results, a, first), first_bad.mutable_data_ptr<int>() + i, watch(buffers),
          stream);
    });
  }
  check_finite_batch(op, name, first_bad, step);
}

ExtremesBatch extremes_of(
    const char* op,
    const char* name,
    const MatrixBatch& a,
    const Policy& policy,
    Wanted wanted,
    bool of_gram) {
  check_limits(op, name, a);
  const ExtremesBatch results(a, wanted, of_gram);
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
    const MatrixBatch unproven{a.matrices.index_select(0, rest), rest.numel(), a.n, a.p};
    const ExtremesBatch found(unproven, wanted, of_gram);
    decompose_by_kernels(op, name, unproven, policy, found);
    for (const auto field :
         {&ExtremesBatch::value_max, &ExtremesBatch::value_min, &ExtremesBatch::rank,
          &ExtremesBatch::multiplicity_max, &ExtremesBatch::multiplicity_min,
          &ExtremesBatch::thin_max, &ExtremesBatch::thin_min, &ExtremesBatch::long_max,
          &ExtremesBatch::long_min})
      Tensor(results.*field).index_copy_(0, rest, found.*field);
  }
  return results;
}

// Whether any matrix has a repeated extreme with a gradient; waits.
bool any_cluster(const GradientInputs& in) {
  const Tensor max = (in.multiplicity_max > 1).logical_and(in.grad_max != 0);
  const Tensor min = (in.multiplicity_min > 1).logical_and(in.grad_min != 0);
  return max.logical_or(min).any().item<bool>();
}

// Pointers from matrix `first` on.
Incoming pointers(const GradientInputs& in, const MatrixBatch& a, int64_t first) {
  const bool gram = in.of_gram();
  const auto numbers = [first](const Tensor& t, int64_t each) {
    return t.const_data_ptr<double>() + first * each;
  };
  const auto counts = [first](const Tensor& t) { return t.const_data_ptr<int64_t>() + first; };
  return {
      numbers(in.grad_max, 1),
      numbers(in.grad_min, 1),
      counts(in.multiplicity_max),
      counts(in.multiplicity_min),
      numbers(a.wide() ? in.thin_max : in.long_max, a.n),
      numbers(a.wide() ? in.long_max : in.thin_max, a.p),
      numbers(a.wide() ? in.thin_min : in.long_min, a.n),
      numbers(a.wide() ? in.long_min : in.thin_min, a.p),
      gram ? numbers(in.lambda_max, 1) : nullptr,
      gram ? numbers(in.lambda_min, 1) : nullptr,
      gram ? numbers(in.grad_squared_frobenius, 1) : nullptr,
      gram ? numbers(in.thin_gram, a.thin() * a.thin()) : nullptr,
      gram};
}

Tensor gradient_of(
    const char* op, const MatrixBatch& a, const GradientInputs& in, const Policy& policy) {
  check_limits(op, "the matrices", a);
  const Tensor grad = at::empty_like(a.matrices);
  if (a.batch > 0) {
    const auto stream = at::cuda::getCurrentCUDAStream();
    dispatch(a.matrices, [&](auto type) {
      using T = decltype(type);
      const T* matrices = a.matrices.const_data_ptr<T>();
      T* out = grad.mutable_data_ptr<T>();
      spectrum::launch_gradient<T>(pointers(in, a, 0), matrices, a.batch, a.n, a.p, out, stream);
      if (spectrum::is_small(a.n, a.p, stream)) {
        const SmallPlan plan = spectrum::small_plan(a.n, a.p);
        const unsigned grid = spectrum::small_grid(plan, a.batch, stream);
        const Tensor work = small_workspace(plan, grid, float64(a));
        spectrum::launch_small_cluster_gradient<T>(
            pointers(in, a, 0), matrices, a.batch, plan, policy, work.mutable_data_ptr<double>(),
            grid, out, stream);
        return;
      }
      if (!is_capturing() && !any_cluster(in)) {
        return;
      }
      const LargePlan plan = spectrum::large_plan(a.n, a.p);
      const int64_t step = large_step(plan, a.batch);
      for (int64_t first = 0; first < a.batch; first += step) {
        const int64_t count = std::min(step, a.batch - first);
        const LargeBuffers buffers(plan, count, float64(a));
        spectrum::launch_large_cluster_gradient<T>(
            pointers(in, a, first), matrices + first * a.n * a.p, count, plan, buffers.space(),
            policy, out + first * a.n * a.p, watch(buffers), stream);
      }
    });
  }
  return grad;
}

}  // namespace

const SpectrumEngine cuda_spectrum{&extremes_of, &gradient_of};

}  // namespace immunize_ext
