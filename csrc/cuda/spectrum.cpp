// The engine of the spectrum operators on CUDA; the operators stand in ../spectrum.cpp.
//
// Matrices whose thin side fits the shared memory of a block (t <= 116 with 163 KiB, 136 with 227
// KiB) have one block each: up to a side of 128 for their two ends alone (spectrum_tridiagonal.cuh),
// and for a decomposition where those are not proven. Larger ones go through the library's
// eigendecomposition of the thin Gram matrix (thin_gram.h) or, where it proves nothing or there are
// many of a moderate side, by the blocked route (is_for_library). Everything runs on the current
// stream of the tensor's device and allocates through torch's allocator.
//
// What waits for the GPU. The forward operators read one integer back, to raise for NaN and
// infinity as the CPU operators do. On the blocked route they also look after each sweep whether the
// work is done, and the backward pass looks once whether any matrix has a cluster: either saves
// thousands of launches that would find nothing to do. While a CUDA graph is captured nothing waits:
// all sweeps are recorded, and matrices that are not finite give NaN. The library's solver waits,
// and is left out of a capture.

#include <ATen/ATen.h>
#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAFunctions.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "../capture.h"
#include "../checks.h"
#include "../spectrum.h"
#include "../tensors.h"
#include "../thin_gram.h"
#include "spectrum_launchers.h"

namespace immunize_ext::spectrum {

IMMUNIZE_EXT_SPECTRUM_LAUNCHERS(extern, float);
IMMUNIZE_EXT_SPECTRUM_LAUNCHERS(extern, double);

}  // namespace immunize_ext::spectrum

namespace immunize_ext {
namespace {

using spectrum::EndsPlan;
using spectrum::Incoming;
using spectrum::LargePlan;
using spectrum::LargeSpace;
using spectrum::Outputs;
using spectrum::SmallPlan;

at::TensorOptions float64(const MatrixBatch& a) {
  return a.matrices.options().dtype(at::kDouble);
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

// Where kernels leave the batch index of the first matrix that is not finite, one for each step of
// `step` matrices.
class FirstBad {
 public:
  FirstBad(int* device, int64_t steps, int64_t step, cudaStream_t stream)
      : device_(device), step_(step), stream_(stream), found_(static_cast<size_t>(steps)) {
    C10_CUDA_CHECK(cudaMemsetAsync(device, kNoneByte, found_.size() * sizeof(int), stream));
  }
  int* device(int64_t i = 0) const {
    return device_ + i;
  }
  // Raises if there is one. Waits for the kernels.
  void check(const char* op, const char* name) {
    if (is_capturing()) {
      return;
    }
    const auto bytes = static_cast<int64_t>(found_.size() * sizeof(int));
    c10::cuda::memcpy_and_sync(found_.data(), device_, bytes, cudaMemcpyDeviceToHost, stream_);
    for (size_t i = 0; i < found_.size(); ++i) {
      TORCH_CHECK_VALUE(
          found_[i] == kNone, op, ": ", name,
          " must be finite, got NaN or infinity at batch index ",
          static_cast<int64_t>(i) * step_ + found_[i],
          "; look for an overflow upstream, float16 features for instance");
    }
  }

  // Larger than any index, and what cudaMemset can write.
  static constexpr int kNone = 0x7F7F7F7F;

 private:
  static constexpr int kNoneByte = 0x7F;
  int* device_;
  int64_t step_;
  cudaStream_t stream_;
  std::vector<int> found_;
};

void check_limits(const char* op, const char* name, const MatrixBatch& a) {
  TORCH_CHECK_VALUE(
      a.batch < FirstBad::kNone && a.thin() <= (1 << 15), op, ": ", name, " must have less than ",
      FirstBad::kNone, " matrices with a thin side of at most 32768, got ", a.matrices.sizes(),
      "; split it");
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

// What the library's eigendecomposition of the thin Gram matrix could not prove.
struct Unproven {
  std::vector<int64_t> index;          // in the batch
  std::vector<Tensor> rotated, basis;  // of each, with S the scaled thin side: U^T S [t, k], U
  std::vector<double> scale;
};

// Numbers of a whole batch, gathered on the host: a copy each at the end.
struct Numbers {
  Tensor values, counts;  // [2, batch], [3, batch]

  explicit Numbers(int64_t batch)
      : values(at::zeros({2, batch}, at::kDouble)), counts(at::zeros({3, batch}, at::kLong)) {}
  void give(const ExtremesBatch& results) const {
    results.value_max.copy_(values[0]);
    results.value_min.copy_(values[1]);
    results.rank.copy_(counts[0]);
    results.multiplicity_max.copy_(counts[1]);
    results.multiplicity_min.copy_(counts[2]);
  }
};

// The powers of two to divide the matrices by: all 1 where none comes near the ends of the range.
std::vector<double> scales(const double* largest, int64_t count) {
  std::vector<double> out(count);
  bool plain = true;
  for (int64_t b = 0; b < count; ++b) {
    out[b] = power_of_two_scale(largest[b]);
    plain = plain && std::abs(std::ilogb(out[b])) <= 100;
  }
  if (plain)
    std::fill(out.begin(), out.end(), 1.0);
  return out;
}

// Some matrices of a batch from number `first` on: s [count, t, k] in float64, divided by `scale`.
void decompose_some(
    const Tensor& s,
    const std::vector<double>& scale,
    int64_t first,
    const Policy& policy,
    const Wanted& wanted,
    const ExtremesBatch& results,
    const Numbers& numbers,
    Unproven& unproven) {
  const int64_t count = s.size(0), t = s.size(1);
  const bool of_gram = results.thin_gram.defined();
  auto value = numbers.values.accessor<double, 2>();
  auto number = numbers.counts.accessor<int64_t, 2>();
  const bool plain = std::all_of(scale.begin(), scale.end(), [](double x) { return x == 1.0; });
  Tensor gram;
  if (of_gram && plain) {
    gram = results.thin_gram.narrow(0, first, count);
    at::bmm_out(gram, s, s.mT());
  } else {
    gram = at::bmm(s, s.mT());
  }
  if (of_gram && !plain) {
    const Tensor factors = at::tensor(scale, at::kDouble).to(s.device()).view({count, 1, 1});
    // One after another: the square of a factor may overflow.
    results.thin_gram.narrow(0, first, count).copy_(gram * factors * factors);
  }
  const auto go_on = [&](int64_t b, const Tensor& basis) {
    unproven.index.push_back(first + b);
    unproven.rotated.push_back(basis.mT().matmul(s[b]));
    unproven.basis.push_back(basis);
    unproven.scale.push_back(scale[b]);
  };
  Tensor lambda, u;
  try {
    std::tie(lambda, u) = at::linalg_eigh(gram);
  } catch (const c10::LinAlgError&) {  // the library did not converge
    for (int64_t b = 0; b < count; ++b)
      go_on(b, at::eye(t, s.options()));
    return;
  }
  const Tensor on_host = lambda.cpu();
  std::vector<thin_gram::Eigenpairs> pairs;
  std::vector<int64_t> ends;
  for (int64_t b = 0; b < count; ++b) {
    pairs.emplace_back(lambda[b], u[b], on_host.const_data_ptr<double>() + b * t);
    ends.push_back(t - 1);
    if (wanted.min)
      ends.push_back(std::clamp<int64_t>(thin_gram::missing_by_gram(pairs[b], policy), 0, t - 1));
  }
  const thin_gram::Look look(s, lambda, u, pairs, ends);
  const auto some = [&](const Tensor& all) { return all.narrow(0, first, count); };
  some(results.thin_max).copy_(look.u.select(2, 0));
  some(results.long_max).copy_(look.v.select(2, 0));
  if (wanted.min) {
    some(results.thin_min).copy_(look.u.select(2, 1));
    some(results.long_min).copy_(look.v.select(2, 1));
  }
  for (int64_t b = 0; b < count; ++b) {
    thin_gram::Extremes found;
    try {
      found = thin_gram::extremes(s[b], pairs[b], look, b, policy, wanted);
    } catch (const c10::LinAlgError&) {
      found.proven = false;
    }
    if (!found.proven) {
      go_on(b, u[b].flip(1));  // descending, as Jacobi's method brings them
      continue;
    }
    const auto valued = [&](double sigma) {
      return of_gram ? (sigma * scale[b]) * (sigma * scale[b]) : sigma * scale[b];
    };
    const int64_t to = first + b;
    value[0][to] = valued(found.max.sigma);
    value[1][to] = found.has_min ? valued(found.min.sigma) : 0.0;
    number[0][to] = found.rank;
    number[1][to] = found.multiplicity_max;
    number[2][to] = found.multiplicity_min;
    const auto put = [to](const Tensor& all, const Tensor& vector) {
      if (vector.defined())
        all[to].copy_(vector);
    };
    put(results.thin_max, found.max.u);
    put(results.long_max, found.max.v);
    put(results.thin_min, found.min.u);
    put(results.long_min, found.min.v);
    if (!found.has_min) {
      results.thin_min[to].zero_();
      results.long_min[to].zero_();
    }
  }
}

Unproven decompose_by_library(
    const char* op,
    const char* name,
    const MatrixBatch& a,
    const Policy& policy,
    const Wanted& wanted,
    const ExtremesBatch& results) {
  constexpr int64_t kDoubles = int64_t{1} << 26;  // of matrices at a time
  const Tensor largest =
      at::linalg_vector_norm(a.matrices, std::numeric_limits<double>::infinity(), {1, 2}, false)
          .to(at::kDouble)
          .cpu();
  const double* entry = largest.const_data_ptr<double>();
  for (int64_t b = 0; b < a.batch; ++b)
    TORCH_CHECK_VALUE(
        std::isfinite(entry[b]), op, ": ", name,
        " must be finite, got NaN or infinity at batch index ", b,
        "; look for an overflow upstream, float16 features for instance");
  Unproven out;
  const Numbers numbers(a.batch);
  const int64_t step = std::clamp<int64_t>(kDoubles / (a.n * a.p), 1, a.batch);
  for (int64_t first = 0; first < a.batch; first += step) {
    const int64_t count = std::min(step, a.batch - first);
    const std::vector<double> scale = scales(entry + first, count);
    Tensor s = a.matrices.narrow(0, first, count).to(at::kDouble);
    s = a.wide() ? s : s.mT();
    if (std::any_of(scale.begin(), scale.end(), [](double x) { return x != 1.0; })) {
      // In two steps: the inverse may be infinite.
      std::vector<double> half(count), rest(count);
      for (int64_t b = 0; b < count; ++b) {
        const int exponent = std::ilogb(scale[b]);
        half[b] = std::ldexp(1.0, -exponent / 2);
        rest[b] = std::ldexp(1.0, exponent / 2 - exponent);
      }
      const auto factors = [&](const std::vector<double>& x) {
        return at::tensor(x, at::kDouble).to(s.device()).view({count, 1, 1});
      };
      s = s * factors(half) * factors(rest);
    }
    decompose_some(s, scale, first, policy, wanted, results, numbers, out);
  }
  if (results.thin_gram.defined())
    at::sum_out(const_cast<Tensor&>(results.squared_frobenius), results.thin_gram.square(), {1, 2});
  numbers.give(results);
  return out;
}

// By one block each, or by the blocked route.
void decompose_by_kernels(
    const char* op,
    const char* name,
    const MatrixBatch& a,
    const Policy& policy,
    const ExtremesBatch& results) {
  const auto stream = at::cuda::getCurrentCUDAStream();
  if (spectrum::is_small(a.n, a.p, stream)) {
    const SmallPlan plan = spectrum::small_plan(a.n, a.p);
    const EndsPlan ends = spectrum::ends_plan(a.n, a.p);
    const unsigned grid = spectrum::small_grid(plan, a.batch, stream);
    // One after the other, so that both find room in the same place; a number more for FirstBad.
    const int64_t doubles = std::max(
        static_cast<int64_t>(grid) * plan.work_doubles(),
        spectrum::ends_fit(ends, stream) ? spectrum::ends_step(ends, a.batch) * ends.work_doubles()
                                         : 0);
    const Tensor workspace = at::empty({doubles + 1}, float64(a));
    double* work = workspace.mutable_data_ptr<double>();
    FirstBad bad(reinterpret_cast<int*>(work + doubles), 1, a.batch, stream);
    dispatch(a.matrices, [&](auto type) {
      using T = decltype(type);
      const T* matrices = a.matrices.const_data_ptr<T>();
      const Outputs out = outputs(results, a, 0);
      const bool tried = spectrum::launch_small_ends<T>(
          matrices, a.batch, ends, policy, out, work, bad.device(), stream);
      spectrum::launch_small_extremes<T>(
          matrices, a.batch, plan, policy, out, /*refused_only=*/tried, work, grid, bad.device(),
          stream);
    });
    bad.check(op, name);
    return;
  }
  if (results.thin_gram.defined()) {
    const Tensor x = a.matrices.to(at::kDouble);
    set_gram(results, a.wide() ? at::bmm(x, x.mT()) : at::bmm(x.mT(), x));
  }
  const LargePlan plan = spectrum::large_plan(a.n, a.p);
  const int64_t step = large_step(plan, a.batch);
  const int64_t steps = (a.batch + step - 1) / step;
  const Tensor flags = at::empty({steps}, a.matrices.options().dtype(at::kInt));
  FirstBad bad(flags.mutable_data_ptr<int>(), steps, step, stream);
  for (int64_t i = 0; i < steps; ++i) {
    const int64_t first = i * step, count = std::min(step, a.batch - first);
    const LargeBuffers buffers(plan, count, float64(a));
    dispatch(a.matrices, [&](auto type) {
      using T = decltype(type);
      spectrum::launch_large_extremes<T>(
          a.matrices.const_data_ptr<T>() + first * a.n * a.p, count, plan, buffers.space(), policy,
          outputs(results, a, first), bad.device(i), watch(buffers), stream);
    });
  }
  bad.check(op, name);
}

// The rest by Jacobi's method, which has little to do: the rows of U^T S = L D V^T are all but
// orthogonal, and S = (U L) D V^T.
void go_on_by_kernels(
    const char* op,
    const char* name,
    const MatrixBatch& a,
    const Unproven& unproven,
    const Policy& policy,
    Wanted wanted,
    const ExtremesBatch& results) {
  const int64_t count = static_cast<int64_t>(unproven.index.size());
  const MatrixBatch rotated{at::stack(unproven.rotated), count, a.thin(), std::max(a.n, a.p)};
  ExtremesBatch found(rotated, wanted, /*of_gram=*/false);
  if (a.matrices.is_cuda())
    decompose_by_kernels(op, name, rotated, policy, found);
  else
    found = cpu_spectrum.extremes(op, name, rotated, policy, wanted, /*of_gram=*/false);
  const Tensor basis = at::stack(unproven.basis), scale = at::tensor(unproven.scale, float64(a));
  const Tensor index = at::tensor(unproven.index, results.rank.options());
  const auto put = [&index](Tensor to, const Tensor& from) { to.index_copy_(0, index, from); };
  const auto value = [&](const Tensor& sigma) {
    const Tensor scaled = sigma * scale;
    return results.thin_gram.defined() ? scaled.square() : scaled;
  };
  const auto back = [&basis](const Tensor& thin) {
    return at::bmm(basis, thin.unsqueeze(2)).squeeze(2);
  };
  put(results.value_max, value(found.value_max));
  put(results.value_min, value(found.value_min));
  put(results.rank, found.rank);
  put(results.multiplicity_max, found.multiplicity_max);
  put(results.multiplicity_min, found.multiplicity_min);
  put(results.thin_max, back(found.thin_max));
  put(results.thin_min, back(found.thin_min));
  put(results.long_max, found.long_max);
  put(results.long_min, found.long_min);
}

// Whether the library's decomposition, one matrix after another, takes less time than the blocked
// route, which works on as many as the card has room for. Milliseconds on an H100:
//   side                                     256       784     1000
//   the library's decomposition of one       2.2       8.9     11.6    about side / 100; 2 beside it
//   blocked route, one                       35        185     221     about 5 r (1 + r / 60)
//   rounds of a sweep r, pairs in a round    7, 4      25, 13  31, 16
// A pair of column blocks keeps a multiprocessor busy: 33 matrices of side 256 take the time of one
// (17 took 38 ms). At larger sides the library is ahead whatever their number.
bool is_for_library(const MatrixBatch& a, int64_t multiprocessors) {
  const LargePlan plan = spectrum::large_plan(a.n, a.p);
  const double r = plan.rounds(), batch = static_cast<double>(a.batch);
  const int64_t turns = (a.batch * plan.pairs() + multiprocessors - 1) / multiprocessors;
  const double library = 2.0 + batch * static_cast<double>(a.thin()) / 100.0;
  return library <= 5.0 * r * (1.0 + r / 60.0) * static_cast<double>(turns);
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
  // What is composed of torch operators runs on any device, and is tested on the CPU, whose own
  // engine then stands in for the kernels.
  const bool on_card = a.matrices.is_cuda();
  if (on_card &&
      (is_capturing() || spectrum::is_small(a.n, a.p, at::cuda::getCurrentCUDAStream()) ||
       !is_for_library(a, at::cuda::getCurrentDeviceProperties()->multiProcessorCount))) {
    decompose_by_kernels(op, name, a, policy, results);
    return results;
  }
  const Unproven unproven = decompose_by_library(op, name, a, policy, wanted, results);
  if (!unproven.index.empty())
    go_on_by_kernels(op, name, a, unproven, policy, wanted, results);
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
  if (!a.matrices.is_cuda())
    return cpu_spectrum.gradient(op, a, in, policy);
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
        const Tensor work =
            at::empty({static_cast<int64_t>(grid) * plan.work_doubles()}, float64(a));
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
