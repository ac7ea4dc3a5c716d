// Regularised key/value merge on a GPU: checks, allocations, launches. The mathematics stands in
// csrc/cpu/merge.cpp, the kernels in merge.cuh (per layer) and merge_solve.cuh (shared part).
//
// What waits for the GPU. The operators raise the same errors as on the CPU, and an error needs to
// know the values: merge_solve reads one number at its end (with `average` the ranks before), and
// merge_apply one small tensor at its end, and more only where rows of C repeat or something is not
// finite. merge_apply_backward never waits. While a CUDA graph is captured nothing can be read, so
// these checks are left out: check the inputs once before capturing.

#include <ATen/ATen.h>
#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <tuple>
#include <vector>

#include "../checks.h"
#include "../merge_problem.h"
#include "merge_launchers.h"
#include "merge_solve.cuh"

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

bool is_capturing() {
  return c10::cuda::currentStreamCaptureStatusMayInitCtx() != c10::cuda::CaptureStatus::None;
}

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

// E = T^+ and I - E T for the problems of the batch whose T is singular.
void average_repeated_rows(
    const Tensor& t,
    const Tensor& factor,
    const Tensor& scale,
    const Tensor& rank,
    Tensor& e,
    Tensor& defect) {
  const int64_t s = t.size(-1);
  const Tensor ranks = rank.cpu();
  for (int64_t i = 0; i < t.size(0); ++i) {
    const int64_t r = ranks.const_data_ptr<int64_t>()[i];
    if (r == s || r == 0)
      continue;
    // T = (D F)(D F)^T, so T^+ = H^+T H^+ with H = D F of full column rank.
    const Tensor h = factor[i].slice(0, 0, r).mT() * scale[i].unsqueeze(1);
    const Tensor pinv = at::linalg_pinv(h);  // [r, s]
    e[i].copy_(pinv.mT().mm(pinv));
    defect[i].copy_(-e[i].mm(t[i]));
    defect[i].diagonal().add_(1.0);
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> merge_solve(
    const Tensor& chol,              // [*, d, d] float64, lower
    const Tensor& c,                 // [*, s, d] float64
    const Tensor& inverse_hardness,  // [*, s] float64
    double rank_rtol,
    bool average) {
  constexpr const char* op = "merge_solve";
  check_dtype(op, "chol", chol, at::kDouble);
  check_dtype(op, "c", c, at::kDouble);
  check_dtype(op, "inverse_hardness", inverse_hardness, at::kDouble);
  check_matrix(op, "c", c);
  const int64_t s = c.size(-2), d = c.size(-1);
  check_matrix(op, "chol", chol, d, d);
  const auto batch_shape = c.sizes().slice(0, c.dim() - 2);
  check_batch(op, "chol", chol, batch_shape);
  check_same_device(op, "chol", chol, "c", c);
  check_same_device(op, "inverse_hardness", inverse_hardness, "c", c);
  const c10::cuda::CUDAGuard guard(c.device());
  const auto stream = at::cuda::getCurrentCUDAStream();
  TORCH_CHECK_VALUE(
      !average || !is_capturing(), op,
      ": average must be false while a CUDA graph is captured, got true; averaging reads the rank "
      "of T on the host, so solve before capturing");

  const int64_t batch = c10::multiply_integers(batch_shape);
  const Tensor chol_flat = chol.reshape({batch, d, d}).contiguous();
  const Tensor c_flat = c.reshape({batch, s, d}).contiguous();
  const Tensor inverse_flat = inverse_hardness.reshape({batch, s}).contiguous();
  Tensor a = at::empty({batch, d, s}, c.options());
  Tensor e = at::empty({batch, s, s}, c.options());
  Tensor defect = at::empty({batch, s, s}, c.options());
  Tensor rank = at::zeros({batch}, c.options().dtype(at::kLong));
  if (batch > 0 && s > 0) {
    const Tensor factor = at::empty({batch, s, s}, c.options());
    const Tensor scale = at::empty({batch, s}, c.options());
    const merge::Inverse inverse{
        mutable_pointer<double>(e),
        mutable_pointer<double>(defect),
        mutable_pointer<double>(factor),
        mutable_pointer<double>(scale),
        mutable_pointer<int64_t>(rank),
        s,
        rank_rtol};
    Tensor t;
    if (merge::is_small(d, s, stream)) {
      t = at::empty({batch, s, s}, c.options());
      const Tensor z = at::empty({batch, s, d}, c.options());
      merge::launch_solve_small(
          {pointer<double>(chol_flat), pointer<double>(c_flat), pointer<double>(inverse_flat),
           mutable_pointer<double>(a), mutable_pointer<double>(z), mutable_pointer<double>(t),
           batch, d},
          inverse, stream);
    } else {
      // T as the Gram matrix of Z = L^-1 C^T, as on the CPU.
      const Tensor z = at::linalg_solve_triangular(chol_flat, c_flat.mT(), /*upper=*/false);
      t = z.mT().matmul(z);
      t.diagonal(0, -2, -1).add_(inverse_flat);
      t = t.contiguous();
      a.copy_(at::linalg_solve_triangular(chol_flat.mT(), z, /*upper=*/true));
      merge::launch_invert(inverse, pointer<double>(t), batch, stream);
    }
    if (average)
      average_repeated_rows(t, factor, scale, rank, e, defect);
  }
  if (!is_capturing()) {
    TORCH_CHECK_VALUE(
        c.isfinite().all().item<bool>(), op, ": embeddings must be finite, got NaN or infinity");
  }
  const auto shaped = [&](const Tensor& flat) {
    std::vector<int64_t> shape(batch_shape.begin(), batch_shape.end());
    for (int64_t k = 1; k < flat.dim(); ++k)
      shape.push_back(flat.size(k));
    return flat.reshape(shape);
  };
  return {shaped(a), shaped(e), shaped(defect), shaped(rank)};
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

std::tuple<std::vector<Tensor>, std::vector<Tensor>> merge_apply(
    TensorList base,     // L x [*, o_l, d]
    TensorList targets,  // N L x [*, o_l, d] or L x [*, o_l, s]
    at::IntArrayRef rows,
    bool targets_are_values,
    const Tensor& c,       // [*, s, d]
    const Tensor& b,       // [*, s, d]
    const Tensor& defect,  // [*, s, s]
    double rank_rtol,
    bool check) {
  const MergeProblem p =
      make_merge_problem("merge_apply", base, targets, rows, targets_are_values, c, b);
  check_same_device("merge_apply", "defect", defect, "c", c);
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
  const int64_t layers = p.layers();
  const Tensor not_finite = at::zeros({layers}, c.options().dtype(at::kInt));
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
        targets_are_values ? pointer<double>(p.token_norm) : nullptr,
        mutable_pointer<int>(not_finite), mutable_pointer<std::uint64_t>(table), stream);
  });
  if (is_capturing())
    return {merged, residual};
  const Tensor dropped = defect.ne(0).any().to(at::kInt).reshape({1});
  const Tensor flags = at::cat({not_finite, dropped}).cpu();  // the one wait of the usual case
  for (int64_t l = 0; l < layers; ++l)
    if (flags.const_data_ptr<int>()[l] != 0)
      refuse_layer("merge_kv", p, l);
  if (check && flags.const_data_ptr<int>()[layers] != 0)
    check_contradictions("merge_kv", p, defect, rank_rtol, residual);
  return {merged, residual};
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
  TORCH_CHECK_VALUE(
      grad.size() == base.size() && residual.size() == base.size(), op,
      ": grad and residual must hold one tensor a layer, ", p.layers(), ", got ", grad.size(),
      " and ", residual.size());
  const std::vector<Tensor> g = contiguous(grad);
  const std::vector<Tensor> r = contiguous(residual);
  for (int64_t l = 0; l < p.layers(); ++l) {
    check_same_device(op, "grad", g[l], "c", c);
    check_shape(op, "grad", g[l], p.base[l].sizes());
    check_dtype(op, "grad", g[l], p.dtype);
    check_same_device(op, "residual", r[l], "c", c);
    check_matrix(op, "residual", r[l], p.base[l].size(-2), p.s);
    check_dtype(op, "residual", r[l], p.accumulate);
  }
  std::vector<Tensor> grad_base, grad_targets, dr;
  if (need_base)
    grad_base = allocate(p.base, p.d, p.dtype);
  // dV is dR itself.
  if (need_c || (need_targets && targets_are_values))
    dr = allocate(p.base, p.s, p.accumulate);
  if (need_targets && targets_are_values)
    grad_targets = dr;
  if (need_targets && !targets_are_values)
    for (const Tensor& t : p.targets)
      grad_targets.push_back(at::empty_like(t));
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
  m.impl("merge_apply", &merge_apply);
  m.impl("merge_apply_backward", &merge_apply_backward);
}

}  // namespace immunize_ext
