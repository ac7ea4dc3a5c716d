// The per-layer merge as both devices see it: checked arguments, and the refusals that read
// results. Device-independent; the mathematics stands in cpu/merge.cpp.
#pragma once

#include <ATen/ATen.h>
#include <c10/util/accumulate.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "checks.h"

namespace immunize_ext {

inline std::vector<at::Tensor> contiguous(at::TensorList tensors) {
  std::vector<at::Tensor> result;
  result.reserve(tensors.size());
  for (const at::Tensor& t : tensors)
    result.push_back(t.contiguous());
  return result;
}

// One uninitialised tensor for each of `like`, with another last side and dtype.
inline std::vector<at::Tensor> allocate(
    const std::vector<at::Tensor>& like, int64_t columns, at::ScalarType dtype) {
  std::vector<at::Tensor> result;
  for (const at::Tensor& t : like) {
    std::vector<int64_t> shape = t.sizes().vec();
    shape.back() = columns;
    result.push_back(at::empty(shape, t.options().dtype(dtype)));
  }
  return result;
}

// Contiguous tensors on one device, C and B in the type that the kernels compute in.
struct MergeProblem {
  std::vector<at::Tensor> base, targets;
  std::vector<int64_t> first_token;  // [N + 1], where the tokens of each concept start in C
  bool targets_are_values;
  at::Tensor c, b;        // [batch, s, d]
  at::Tensor token_norm;  // [batch, s] float64, |c_j|; defined for values only
  int64_t batch, s, d;
  at::ScalarType dtype, accumulate;

  int64_t layers() const {
    return static_cast<int64_t>(base.size());
  }
  int64_t concepts() const {
    return static_cast<int64_t>(first_token.size()) - 1;
  }
  int64_t tokens(int64_t concept_index) const {
    return first_token[concept_index + 1] - first_token[concept_index];
  }
  const at::Tensor& target(int64_t concept_index, int64_t layer) const {
    return targets[concept_index * layers() + layer];
  }
};

inline MergeProblem make_merge_problem(
    const char* op,
    at::TensorList base,     // L x [*, o_l, d]
    at::TensorList targets,  // N L x [*, o_l, d], concept-major, or L x [*, o_l, s]
    at::IntArrayRef rows,    // N, tokens of each concept
    bool targets_are_values,
    const at::Tensor& c,    // [*, s, d] float64
    const at::Tensor& b) {  // [*, s, d] float64
  MergeProblem p;
  TORCH_CHECK_VALUE(!base.empty(), op, ": base must hold at least one layer, got an empty list");
  check_dtype(op, "c", c, at::kDouble);
  check_dtype(op, "b", b, at::kDouble);
  check_matrix(op, "c", c);
  check_same_device(op, "b", b, "c", c);
  check_shape(op, "b", b, c.sizes());
  p.s = c.size(-2);
  p.d = c.size(-1);
  const auto batch_shape = c.sizes().slice(0, c.dim() - 2);
  p.batch = c10::multiply_integers(batch_shape);
  p.dtype = base[0].scalar_type();
  check_real_floating(op, "base[0]", base[0]);
  p.accumulate = p.dtype == at::kDouble ? at::kDouble : at::kFloat;
  p.targets_are_values = targets_are_values;
  p.first_token.push_back(0);
  for (const int64_t n : rows)
    p.first_token.push_back(p.first_token.back() + n);
  TORCH_CHECK_VALUE(
      p.first_token.back() == p.s, op, ": rows must add up to the rows of c, ", p.s, ", got ",
      rows);
  const size_t expected = targets_are_values ? base.size() : base.size() * rows.size();
  TORCH_CHECK_VALUE(
      targets.size() == expected, op, ": targets must hold ", expected, " tensors, got ",
      targets.size());
  for (size_t l = 0; l < base.size(); ++l) {
    check_same_device(op, "base", base[l], "c", c);
    check_matrix(op, "base", base[l], -1, p.d);
    check_batch(op, "base", base[l], batch_shape);
    check_dtype(op, "base", base[l], p.dtype);
    for (size_t k = l; k < targets.size(); k += base.size()) {
      check_same_device(op, "targets", targets[k], "c", c);
      check_matrix(op, "targets", targets[k], base[l].size(-2), targets_are_values ? p.s : p.d);
      check_batch(op, "targets", targets[k], batch_shape);
      check_dtype(op, "targets", targets[k], targets_are_values ? p.accumulate : p.dtype);
    }
  }
  p.base = contiguous(base);
  p.targets = contiguous(targets);
  p.c = c.reshape({p.batch, p.s, p.d}).to(p.accumulate).contiguous();
  p.b = b.reshape({p.batch, p.s, p.d}).to(p.accumulate).contiguous();
  if (targets_are_values)
    p.token_norm = c.reshape({p.batch, p.s, p.d}).square().sum(-1).sqrt().contiguous();
  return p;
}

// Raises for a layer whose residual R is not finite. Every entry of W0 and of every target meets a
// product in R, so R is finite only if they are: looking at R alone costs s numbers a row instead
// of another pass over the weights.
inline void refuse_layer(const char* op, const MergeProblem& p, int64_t layer) {
  TORCH_CHECK_VALUE(
      p.base[layer].isfinite().all().item<bool>(), op, ": base[", layer,
      "] must be finite, got NaN or infinity");
  for (size_t k = layer; k < p.targets.size(); k += p.base.size())
    TORCH_CHECK_VALUE(
        p.targets[k].isfinite().all().item<bool>(), op, ": ",
        p.targets_are_values ? "values" : "concepts", "[",
        p.targets_are_values ? "" : std::to_string(k / p.base.size()) + "][", layer,
        "] must be finite, got NaN or infinity");
  TORCH_CHECK_VALUE(
      false, op, ": the outputs asked of layer ", layer, " overflow ", p.accumulate,
      "; scale the embeddings down or use float64 weights");
}

// Raises for a layer whose merged weights their dtype cannot hold. R B is at most s max|R| max|B|;
// as long as that stays below half a unit in the last place of the largest number, no finite weight
// can be pushed over it, and the weights need not be looked at.
inline void refuse_overflow(
    const char* op,
    const MergeProblem& p,
    const std::vector<at::Tensor>& residual,
    const std::vector<at::Tensor>& merged) {
  double harmless = 0.0;
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, p.dtype, "refuse_overflow", [&] {
    harmless = static_cast<double>(std::numeric_limits<scalar_t>::max()) / 4.0 *
               static_cast<double>(std::numeric_limits<scalar_t>::epsilon());
  });
  if (p.b.numel() == 0)
    return;
  const double largest_b = p.b.abs().amax().to(at::kDouble).item<double>();
  for (int64_t l = 0; l < p.layers(); ++l) {
    if (residual[l].numel() == 0)
      continue;
    const double largest_r = residual[l].abs().amax().to(at::kDouble).item<double>();
    if (static_cast<double>(p.s) * largest_r * largest_b <= harmless)
      continue;
    // A NaN, as of an infinite B, is not harmless either.
    TORCH_CHECK_VALUE(
        merged[l].isfinite().all().item<bool>(), op, ": the merged weights of layer ", l,
        " overflow ", p.dtype,
        "; raise the ridge, soften the targets with a finite hardness, or "
        "use weights of a wider dtype");
  }
}

// R (I - E T) is by how much the constraints that were not kept are missed. Whatever exceeds what
// near-repeats and rounding explain is a contradiction between targets. Each layer is judged by its
// own size: a large edit of one must not hide the contradiction of another.
inline void check_contradictions(
    const char* op,
    const MergeProblem& p,
    const at::Tensor& defect,  // [*, s, s]
    double rank_rtol,
    const std::vector<at::Tensor>& residual) {
  const at::Tensor flat = defect.reshape({p.batch, p.s, p.s});
  const double epsilon = p.accumulate == at::kDouble ? std::numeric_limits<double>::epsilon()
                                                     : std::numeric_limits<float>::epsilon();
  const double tolerance = 10.0 * std::sqrt(rank_rtol) + 1e4 * epsilon;
  at::Tensor missed = at::zeros({p.s}, flat.options().dtype(at::kBool));
  for (int64_t l = 0; l < p.layers(); ++l) {
    if (residual[l].numel() == 0)
      continue;
    const at::Tensor r = residual[l].reshape({p.batch, -1, p.s}).to(at::kDouble);
    at::Tensor scale = r.abs().amax({1, 2});
    if (p.targets_are_values) {
      const at::Tensor values = p.targets[l].reshape({p.batch, -1, p.s}).to(at::kDouble);
      scale = at::maximum(scale, values.abs().amax({1, 2}) * 1e-3);
    }
    const at::Tensor violation = r.matmul(flat).abs().amax(1);  // [batch, s]
    missed.logical_or_((violation > tolerance * scale.unsqueeze(1)).any(0));
  }
  const at::Tensor found = missed.nonzero().flatten().cpu();
  TORCH_CHECK_VALUE(
      found.numel() == 0, op, ": contradictory targets at rows ",
      at::IntArrayRef(found.const_data_ptr<int64_t>(), found.numel()),
      " of the embeddings, which repeat earlier rows but ask for other outputs; drop "
      "the repeated tokens, average them with contradictions='average', or soften "
      "them with a finite hardness");
}

}  // namespace immunize_ext
