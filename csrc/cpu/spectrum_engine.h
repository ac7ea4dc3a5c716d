// The engine behind every spectrum operator on the CPU: extremes of a batch, and their gradient.

#pragma once

#include <ATen/core/Tensor.h>

#include "extremes.h"

namespace immunize_ext {

// Of [batch] matrices, in the units of the input; undefined where not asked for.
struct ExtremesBatch {
  at::Tensor sigma_max, sigma_min;                      // [batch] float64
  at::Tensor lambda_max, lambda_min;                    // [batch] float64, their squares
  at::Tensor squared_frobenius;                         // [batch] float64, |K|_F^2
  at::Tensor rank, multiplicity_max, multiplicity_min;  // [batch] int64
  at::Tensor u_max, v_max, u_min, v_min;                // [batch, n] or [batch, p] float64
  at::Tensor thin_gram;                                 // [batch, t, t] float64
};

// full_side: how many singular values the policy full_rank speaks of (p for a p x p Gram matrix).
// of_gram: return the thin Gram matrix and its Frobenius norm as well.
ExtremesBatch extremes_of(
    const char* op,
    const char* name,
    const at::Tensor& a,  // [*, n, p]
    int64_t full_side,
    Policy policy,
    Wanted wanted,
    bool of_gram);

// What a gradient is made of; [*] and [*, side] as the forward returned them.
struct Saved {
  at::Tensor multiplicity_max, multiplicity_min;
  at::Tensor u_max, v_max, u_min, v_min;  // of a Gram matrix: those on the thin side suffice
  at::Tensor sigma_max, sigma_min;        // of a Gram matrix only
  at::Tensor thin_gram;                   // of a Gram matrix only
};

// [*, n, p] in a's dtype. grad_squared_frobenius is undefined unless of a Gram matrix.
at::Tensor gradient_of(
    const at::Tensor& grad_max,
    const at::Tensor& grad_min,
    const at::Tensor& grad_squared_frobenius,
    const at::Tensor& a,
    const Saved& saved,
    Policy policy);

}  // namespace immunize_ext
