// Regularised key/value merge on a GPU: checks, allocations, launches. The mathematics stands in
// csrc/cpu/merge.cpp, the kernels in merge.cuh (per layer) and merge_solve.cuh (shared part).
//
// Nothing here waits for the GPU but averaging, which reads the ranks: what depends on the numbers
// are statuses, for the caller to read.

#include <ATen/ATen.h>
#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include <tuple>
#include <vector>

#include "../checks.h"
#include "../merge_problem.h"
#include "../merge_solve.h"
#include "merge_launchers.h"
#include "merge_solve.cuh"
#include "triangular.cuh"

namespace immunize_ext::merge {

IMMUNIZE_EXT_MERGE_LAUNCHERS(extern, float);
IMMUNIZE_EXT_MERGE_LAUNCHERS(extern, double);
IMMUNIZE_EXT_MERGE_LAUNCHERS(extern, Half);
IMMUNIZE_EXT_MERGE_LAUNCHERS(extern, BFloat16);

}  // namespace immunize_ext::merge

namespace immunize_ext {
namespace {

using at::Tensor;
using at::TensorList;

template <typename T>
const T* pointer(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}
template <typename T>
T* mutable_pointer(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

// Calls function(T()) for the storage type T of the kernels that stands for `dtype`.
template <typename Function>
void with_storage_type(at::ScalarType dtype, const Function& function) {
  switch (dtype) {
    case at::kFloat:
      return function(float());
    case at::kDouble:
      return function(double());
    case at::kHalf:
      return function(Half());
    case at::kBFloat16:
      return function(BFloat16());
    default:
      TORCH_CHECK_VALUE(
          false, "merge_apply: base must be float16, bfloat16, float32 or float64, got ", dtype);
  }
}

// ---- solve: the part shared by all layers -------------------------------------------------------

// Y of L Y = F, or of L^T Y = F, as rows: [batch, s, d] for F [batch, d, s] in any layout. A few
// right-hand sides go through the factor in a launch a panel; more are what a library is for.
Tensor solve_rows(const Tensor& chol, const Tensor& f, bool transposed) {
  const int64_t batch = f.size(0), d = f.size(1), s = f.size(2);
  if (s > merge::kFewTokens)
    return at::linalg_solve_triangular(transposed ? chol.mT() : chol, f, /*upper=*/transposed)
        .mT()
        .contiguous();
  const Tensor out = at::empty({batch, s, d}, f.options());
  const Tensor scratch = at::empty({triangular::has_panels(d) ? out.numel() : 0}, f.options());
  triangular::launch_solve_triangular(
      {pointer<double>(chol),
       {pointer<double>(f), f.stride(1), f.stride(2), f.stride(0)},
       mutable_pointer<double>(out),
       mutable_pointer<double>(scratch),
       batch,
       s,
       d},
      transposed, triangular::panel_width(d), at::cuda::getCurrentCUDAStream());
  return out;
}

// t: Z^T Z, to which the diagonal of T is added here.
Pivoted pivoted_cholesky(const SolveProblem& p, const Tensor& t, double rank_rtol) {
  const auto integers = t.options().dtype(at::kLong);
  const Pivoted v{
      at::empty_like(t), at::empty({p.batch, p.s}, integers),
      // No kernel runs for tokens that are not there.
      p.s == 0 ? at::zeros({p.batch}, integers) : at::empty({p.batch}, integers)};
  const Tensor factor = at::empty_like(t);
  merge::launch_pivoted_cholesky(
      {mutable_pointer<double>(t), pointer<double>(p.inverse_hardness),
       mutable_pointer<double>(v.triangle), mutable_pointer<int64_t>(v.order),
       mutable_pointer<int64_t>(v.rank), mutable_pointer<double>(factor), p.batch, p.s, rank_rtol},
      at::cuda::getCurrentCUDAStream());
  return v;
}

// What solve_constraints returns, without averaging and for few tokens. v.rank becomes -1 where T
// is not finite.
std::tuple<Tensor, Tensor, Tensor> solve_few_constraints(
    const SolveProblem& p, const Tensor& z, const Tensor& t, const Pivoted& v) {
  const auto stream = at::cuda::getCurrentCUDAStream();
  const Tensor first = at::empty({p.batch, p.s, p.d + p.s}, t.options());
  const Tensor inverse = at::empty_like(t), correction = at::empty_like(t);
  const Tensor root = at::empty_like(t), defect = at::empty_like(t);
  const Tensor scratch = at::empty({p.batch, 3, p.s, p.s}, t.options());
  merge::launch_orthonormalise(
      {pointer<double>(z), pointer<double>(p.inverse_hardness), pointer<double>(v.triangle),
       pointer<int64_t>(v.order), pointer<int64_t>(v.rank), mutable_pointer<double>(first),
       mutable_pointer<double>(inverse), p.batch, p.s, p.d},
      stream);
  const Tensor gram = first.bmm(first.mT()).contiguous();
  merge::launch_finish_root(
      {pointer<double>(gram), pointer<double>(inverse), pointer<double>(t),
       pointer<int64_t>(v.order), mutable_pointer<int64_t>(v.rank),
       mutable_pointer<double>(correction), mutable_pointer<double>(root),
       mutable_pointer<double>(defect), mutable_pointer<double>(scratch), p.batch, p.s},
      stream);
  return {root, first.narrow(2, 0, p.d).mT().bmm(correction.mT()).contiguous(), defect};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> merge_solve(
    const Tensor& chol,              // [*, d, d] float64, lower
    const Tensor& c,                 // [*, s, d] float64
    const Tensor& inverse_hardness,  // [*, s] float64
    double rank_rtol,
    bool average) {
  const SolveProblem p = make_solve_problem(chol, c, inverse_hardness);
  const c10::cuda::CUDAGuard guard(c.device());
  TORCH_CHECK_VALUE(
      !average ||
          c10::cuda::currentStreamCaptureStatusMayInitCtx() == c10::cuda::CaptureStatus::None,
      "merge_solve: average must be false while a CUDA graph is captured, got true; averaging "
      "reads the rank of T on the host, so solve before capturing");
  // T as the Gram matrix of Z = L^-1 C^T, as on the CPU.
  const Tensor z = solve_rows(p.chol, p.c.mT(), /*transposed=*/false);
  const Tensor t = z.bmm(z.mT()).contiguous();
  const Pivoted v = pivoted_cholesky(p, t, rank_rtol);
  const bool few = p.s > 0 && p.s <= merge::kFewTokens && !average;
  const auto [root, basis, defect] =
      few ? solve_few_constraints(p, z, t, v) : solve_constraints(p, z.mT(), t, v, average);
  const Tensor b = root.bmm(solve_rows(p.chol, basis, /*transposed=*/true)).contiguous();
  const Tensor rank =
      few ? v.rank : v.rank.masked_fill(t.isfinite().flatten(1).all(-1).logical_not(), -1);
  return {p.shaped(b), p.shaped(root), p.shaped(basis), p.shaped(defect), p.shaped(rank)};
}

// S F, see ops/merge_saddle.py.
Tensor merge_free_solve(
    const Tensor& f,  // [*, d, k] float64
    const Tensor&,
    const Tensor&,
    const Tensor&,
    const Tensor&,
    const Tensor& chol,  // [*, d, d]
    const Tensor&,
    const Tensor& basis,  // [*, d, s]
    const Tensor&) {
  constexpr const char* op = "merge_free_solve";
  check_dtype(op, "f", f, at::kDouble);
  check_matrix(op, "f", f);
  const at::IntArrayRef leading = f.sizes().slice(0, f.dim() - 2);
  const int64_t d = f.size(-2), k = f.size(-1), batch = c10::multiply_integers(leading);
  check_dtype(op, "chol", chol, at::kDouble);
  check_matrix(op, "chol", chol, d, d);
  check_batch(op, "chol", chol, leading);
  check_same_device(op, "chol", chol, "f", f);
  const c10::cuda::CUDAGuard guard(f.device());
  const Tensor factor = chol.reshape({batch, d, d}).contiguous();
  return solve_free(
             f.reshape({batch, d, k}), basis.reshape({batch, d, basis.size(-1)}),
             [&](const Tensor& right, bool transposed) {
               return solve_rows(factor, right, transposed).mT();
             })
      .view(f.sizes());
}

// ---- the part per layer -------------------------------------------------------------------------

// Room for the tables of a launch. Launches on one stream may share it.
Tensor table_for(const MergeProblem& p) {
  const int64_t words = merge::table_words(p.layers(), p.concepts(), p.s);
  return at::empty({words}, p.c.options().dtype(at::kLong));
}

template <typename T>
merge::Shared<T> shared_of(const MergeProblem& p) {
  merge::Shared<T> result{};
  result.c = pointer<Accumulate<T>>(p.c);
  result.b = pointer<Accumulate<T>>(p.b);
  result.batch = p.batch;
  result.s = p.s;
  result.d = p.d;
  result.first_token.assign(p.first_token.begin(), p.first_token.end());
  return result;
}

template <typename T>
std::vector<merge::Weight<T>> weights(const std::vector<Tensor>& tensors) {
  std::vector<merge::Weight<T>> result;
  for (const Tensor& t : tensors)
    result.push_back({pointer<T>(t)});
  return result;
}

std::tuple<std::vector<Tensor>, std::vector<Tensor>, Tensor> merge_apply(
    TensorList base,     // L x [*, o_l, d]
    TensorList targets,  // N L x [*, o_l, d] or L x [*, o_l, s]
    at::IntArrayRef rows,
    bool targets_are_values,
    const Tensor& c,    // [*, s, d]
    const Tensor& b) {  // [*, s, d]
  const MergeProblem p =
      make_merge_problem("merge_apply", base, targets, rows, targets_are_values, c, b);
  const c10::cuda::CUDAGuard guard(c.device());
  const auto stream = at::cuda::getCurrentCUDAStream();
  const std::vector<Tensor> merged = allocate(p.base, p.d, p.dtype);
  const std::vector<Tensor> residual = allocate(p.base, p.s, p.accumulate);
  if (p.d == 0) {  // no kernel has anything to read
    for (int64_t l = 0; l < p.layers(); ++l) {
      residual[l].zero_();
      if (targets_are_values)
        residual[l].copy_(p.targets[l]);
    }
  }
  const Tensor status = at::zeros({p.batch, p.layers()}, c.options().dtype(at::kInt));
  const Tensor table = table_for(p);
  with_storage_type(p.dtype, [&](auto type) {
    using T = decltype(type);
    using A = Accumulate<T>;
    std::vector<merge::ApplyLayer<T>> entries;
    for (int64_t l = 0; l < p.layers(); ++l)
      entries.push_back(
          {pointer<T>(p.base[l]), targets_are_values ? pointer<A>(p.targets[l]) : nullptr,
           mutable_pointer<T>(merged[l]), mutable_pointer<A>(residual[l]), p.base[l].size(-2)});
    merge::launch_apply<T>(
        entries, targets_are_values ? std::vector<merge::Weight<T>>() : weights<T>(p.targets),
        targets_are_values, shared_of<T>(p),
        targets_are_values ? pointer<double>(p.token_norm) : nullptr, mutable_pointer<int>(status),
        mutable_pointer<std::uint64_t>(table), stream);
  });
  return {merged, residual, p.shaped(status)};
}

// sign * sum over layers and rows of coefficients^T X, X = W_n - plain or, without targets, plain;
// float64 of the shape of c. first_token groups the tokens by concept.
template <typename T>
Tensor sum_over_rows(
    const MergeProblem& p,
    const std::vector<Tensor>& coefficients,
    const std::vector<Tensor>& plain,
    const std::vector<Tensor>& targets,
    const std::vector<int64_t>& first_token,
    double sign,
    const Tensor& c,
    const Tensor& table,
    cudaStream_t stream) {
  std::vector<merge::SumLayer<T>> layers;
  for (int64_t l = 0; l < p.layers(); ++l)
    layers.push_back(
        {pointer<Accumulate<T>>(coefficients[l]), pointer<T>(plain[l]), plain[l].size(-2)});
  merge::Shared<T> shared = shared_of<T>(p);
  shared.first_token = {first_token.begin(), first_token.end()};
  const merge::SumPlan plan = merge::make_sum_plan(layers, shared.first_token, p.batch, p.d);
  if (plan.groups == 0 || c.numel() == 0)
    return at::zeros(c.sizes(), c.options());
  const Tensor out = at::empty(c.sizes(), c.options());
  const Tensor partial = at::empty({p.batch, plan.splits, p.s, p.d}, c.options());
  merge::launch_sum<T>(
      layers, weights<T>(targets), shared, plan, sign, mutable_pointer<double>(partial),
      mutable_pointer<double>(out), mutable_pointer<std::uint64_t>(table), stream);
  return out;
}

std::tuple<std::vector<Tensor>, std::vector<Tensor>, Tensor, Tensor> merge_apply_backward(
    TensorList grad,     // L x [*, o_l, d]
    TensorList base,     // L x [*, o_l, d]
    TensorList targets,  // N L x [*, o_l, d] or L x [*, o_l, s]
    at::IntArrayRef rows,
    bool targets_are_values,
    const Tensor& c,      // [*, s, d]
    const Tensor& b,      // [*, s, d]
    TensorList residual,  // L x [*, o_l, s]
    bool need_base,
    bool need_targets,
    bool need_c,
    bool need_b) {
  constexpr const char* op = "merge_apply_backward";
  const MergeProblem p = make_merge_problem(op, base, targets, rows, targets_are_values, c, b);
  const c10::cuda::CUDAGuard guard(c.device());
  const cudaStream_t stream = at::cuda::getCurrentCUDAStream();
  const std::vector<Tensor> g = checked_layers(op, "grad", grad, p, p.d, p.dtype);
  const std::vector<Tensor> r = checked_layers(op, "residual", residual, p, p.s, p.accumulate);
  std::vector<Tensor> grad_base, grad_targets, dr;
  if (need_base)
    grad_base = allocate(p.base, p.d, p.dtype);
  // dV is dR itself.
  if (need_c || (need_targets && targets_are_values))
    dr = allocate(p.base, p.s, p.accumulate);
  if (need_targets && targets_are_values)
    grad_targets = dr;
  if (need_targets && !targets_are_values)
    grad_targets = allocate(p.targets, p.d, p.dtype);
  if (p.d == 0)
    for (const Tensor& t : dr)
      t.zero_();
  Tensor grad_c = at::empty({0}, c.options()), grad_b = at::empty({0}, c.options());
  const Tensor table = table_for(p);
  with_storage_type(p.dtype, [&](auto type) {
    using T = decltype(type);
    using A = Accumulate<T>;
    if (need_base || need_targets || need_c) {
      std::vector<merge::BackwardLayer<T>> layers;
      for (int64_t l = 0; l < p.layers(); ++l)
        layers.push_back(
            {pointer<T>(g[l]), need_base ? mutable_pointer<T>(grad_base[l]) : nullptr,
             dr.empty() ? nullptr : mutable_pointer<A>(dr[l]), g[l].size(-2)});
      std::vector<merge::Gradient<T>> gradients;
      if (need_targets && !targets_are_values)
        for (const Tensor& t : grad_targets)
          gradients.push_back({mutable_pointer<T>(t)});
      merge::launch_backward<T>(
          layers, gradients, shared_of<T>(p), mutable_pointer<std::uint64_t>(table), stream);
    }
    if (need_b)
      grad_b = sum_over_rows<T>(p, r, g, {}, {0, p.s}, 1.0, c, table, stream);
    if (need_c && targets_are_values)
      grad_c = sum_over_rows<T>(p, dr, p.base, {}, {0, p.s}, -1.0, c, table, stream);
    else if (need_c)
      grad_c = sum_over_rows<T>(p, dr, p.base, p.targets, p.first_token, 1.0, c, table, stream);
  });
  return {grad_base, grad_targets, grad_c, grad_b};
}

}  // namespace

TORCH_LIBRARY_IMPL(immunize_ext, CUDA, m) {
  m.impl("merge_solve", &merge_solve);
  m.impl("merge_free_solve", &merge_free_solve);
  m.impl("merge_apply", &merge_apply);
  m.impl("merge_apply_backward", &merge_apply_backward);
}

}  // namespace immunize_ext
