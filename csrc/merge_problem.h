// A merge as both devices see it: its checked arguments. Device-independent; the mathematics stands
// in cpu/merge.cpp. Kernels refuse nothing that depends on the numbers: they return statuses, which
// immunize_ext/ops/merge_problem.py names.
#pragma once

#include <ATen/ATen.h>
#include <c10/util/accumulate.h>

#include <cstdint>
#include <vector>

#include "checks.h"
#include "merge_status.h"

namespace immunize_ext {

// flat [batch, ...] with the leading dimensions it came from.
inline at::Tensor with_batch(const at::Tensor& flat, at::IntArrayRef batch) {
  std::vector<int64_t> shape = batch.vec();
  for (int64_t k = 1; k < flat.dim(); ++k)
    shape.push_back(flat.size(k));
  return flat.reshape(shape);
}

// The part shared by all layers: contiguous, the batch flattened.
struct SolveProblem {
  at::Tensor chol, c, inverse_hardness;  // [batch, d, d], [batch, s, d], [batch, s]
  std::vector<int64_t> batch_shape;
  int64_t batch, s, d;

  at::Tensor shaped(const at::Tensor& flat) const {
    return with_batch(flat, batch_shape);
  }
};

inline SolveProblem make_solve_problem(
    const at::Tensor& chol,                // [*, d, d] float64, lower
    const at::Tensor& c,                   // [*, s, d] float64
    const at::Tensor& inverse_hardness) {  // [*, s] float64
  constexpr const char* op = "merge_solve";
  check_dtype(op, "chol", chol, at::kDouble);
  check_dtype(op, "c", c, at::kDouble);
  check_dtype(op, "inverse_hardness", inverse_hardness, at::kDouble);
  check_matrix(op, "c", c);
  SolveProblem p;
  p.s = c.size(-2);
  p.d = c.size(-1);
  check_matrix(op, "chol", chol, p.d, p.d);
  p.batch_shape = c.sizes().slice(0, c.dim() - 2).vec();
  check_batch(op, "chol", chol, p.batch_shape);
  check_shape(op, "inverse_hardness", inverse_hardness, c.sizes().slice(0, c.dim() - 1));
  check_same_device(op, "chol", chol, "c", c);
  check_same_device(op, "inverse_hardness", inverse_hardness, "c", c);
  p.batch = c10::multiply_integers(p.batch_shape);
  p.chol = chol.reshape({p.batch, p.d, p.d}).contiguous();
  p.c = c.reshape({p.batch, p.s, p.d}).contiguous();
  p.inverse_hardness = inverse_hardness.reshape({p.batch, p.s}).contiguous();
  return p;
}

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

// The part per layer: contiguous tensors on one device, C and B in the type that the kernels
// compute in.
struct MergeProblem {
  std::vector<at::Tensor> base, targets;
  std::vector<int64_t> first_token;  // [N + 1], where the tokens of each concept start in C
  bool targets_are_values;
  at::Tensor c, b;        // [batch, s, d]
  at::Tensor token_norm;  // [batch, s] float64, |c_j|; defined for values only
  std::vector<int64_t> batch_shape;
  int64_t batch, s, d;
  at::ScalarType dtype, accumulate;

  at::Tensor shaped(const at::Tensor& flat) const {
    return with_batch(flat, batch_shape);
  }
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
  p.batch_shape = c.sizes().slice(0, c.dim() - 2).vec();
  const at::IntArrayRef batch_shape = p.batch_shape;
  p.batch = c10::multiply_integers(batch_shape);
  p.dtype = base[0].scalar_type();
  check_real_floating(op, "base[0]", base[0]);
  p.accumulate = p.dtype == at::kDouble ? at::kDouble : at::kFloat;
  p.targets_are_values = targets_are_values;
  p.first_token.push_back(0);
  bool fits = true;
  for (const int64_t n : rows) {
    fits = fits && n >= 0 && n <= p.s - p.first_token.back();
    p.first_token.push_back(p.first_token.back() + (fits ? n : 0));
  }
  TORCH_CHECK_VALUE(
      fits && p.first_token.back() == p.s, op, ": rows must add up to the rows of c, ", p.s,
      ", none of them negative, got ", rows);
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

// One tensor a layer, [*, o_l, columns], contiguous.
inline std::vector<at::Tensor> checked_layers(
    const char* op,
    const char* argument,
    at::TensorList tensors,
    const MergeProblem& p,
    int64_t columns,
    at::ScalarType dtype) {
  TORCH_CHECK_VALUE(
      tensors.size() == p.base.size(), op, ": ", argument, " must hold one tensor a layer, ",
      p.layers(), ", got ", tensors.size());
  for (size_t l = 0; l < tensors.size(); ++l) {
    std::vector<int64_t> shape = p.base[l].sizes().vec();
    shape.back() = columns;
    check_same_device(op, argument, tensors[l], "c", p.c);
    check_shape(op, argument, tensors[l], shape);
    check_dtype(op, argument, tensors[l], dtype);
  }
  return contiguous(tensors);
}

}  // namespace immunize_ext
