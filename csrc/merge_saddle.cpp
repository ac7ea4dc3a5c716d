// What the derivatives of B are made of (ops/merge_saddle.py): B itself, E G and, on the CPU, S F.
// Library calls alone. The solve with a GPU's own kernels stands in cuda/merge.cpp.

#include <ATen/ATen.h>
#include <torch/library.h>

#include "merge_solve.h"

namespace immunize_ext {
namespace {

using at::Tensor;

// The saddle is c, inverse_hardness, source, ridge, chol, root, basis, b.

Tensor merge_constraint_map(
    const Tensor&,
    const Tensor&,
    const Tensor&,
    const Tensor&,
    const Tensor&,
    const Tensor&,
    const Tensor&,
    const Tensor& b) {
  return b.clone(at::MemoryFormat::Contiguous);
}

Tensor merge_constraint_solve(
    const Tensor& g,  // [*, s, k]
    const Tensor&,
    const Tensor&,
    const Tensor&,
    const Tensor&,
    const Tensor&,
    const Tensor& root,
    const Tensor&,
    const Tensor&) {
  return root.matmul(root.mT().matmul(g)).contiguous();
}

Tensor merge_free_solve(
    const Tensor& f,  // [*, d, k]
    const Tensor&,
    const Tensor&,
    const Tensor&,
    const Tensor&,
    const Tensor& chol,
    const Tensor&,
    const Tensor& basis,
    const Tensor&) {
  return solve_free(f, basis, [&](const Tensor& right, bool transposed) {
    return at::linalg_solve_triangular(transposed ? chol.mT() : chol, right, /*upper=*/transposed);
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(immunize_ext, CPU, m) {
  m.impl("merge_constraint_map", &merge_constraint_map);
  m.impl("merge_constraint_solve", &merge_constraint_solve);
  m.impl("merge_free_solve", &merge_free_solve);
}

#ifdef IMMUNIZE_EXT_WITH_CUDA
TORCH_LIBRARY_IMPL(immunize_ext, CUDA, m) {
  m.impl("merge_constraint_map", &merge_constraint_map);
  m.impl("merge_constraint_solve", &merge_constraint_solve);
}
#endif

}  // namespace immunize_ext
