// Between the operator on resolvents (resolvent.cpp) and what is particular to the CPU.

#pragma once

#include <ATen/ATen.h>

namespace immunize_ext {

// a = basis^T T basis, T tridiagonal: [batch, p], [batch, p] with a zero at the end, [batch, p, p].
struct TridiagonalForm {
  at::Tensor diagonal, offdiagonal, basis;
};

// [batch, s], [batch, s], [batch, s, m].
struct ResolventValues {
  at::Tensor first, second, energies;
};

// [batch, p, p] exactly symmetric, [batch, s], [batch, p, m].
struct ResolventGradient {
  at::Tensor matrix, shifts, vectors;
};

// All float64 and contiguous; a [batch, p, p] exactly symmetric and, like shifts [batch, s], with no
// entry beyond 2; vectors [batch, p, m].
TridiagonalForm cpu_tridiagonal_form(const at::Tensor& a);

// definite [batch, s] int64: 0 where a + shift I has no Cholesky factor.
ResolventValues cpu_resolvent_values(
    const TridiagonalForm& form,
    const at::Tensor& shifts,
    const at::Tensor& vectors,
    const at::Tensor& definite);

ResolventGradient cpu_resolvent_gradient(
    const ResolventValues& grad,
    const TridiagonalForm& form,
    const at::Tensor& shifts,
    const at::Tensor& vectors);

}  // namespace immunize_ext
