// Between the operators on symmetric matrices (symmetric.cpp) and what is particular to the CPU.

#pragma once

#include <ATen/ATen.h>

namespace immunize_ext {

// Extremes of a batch: [batch], and vectors [batch, p].
struct SymmetricBatch {
  at::Tensor lambda_max, lambda_min;              // float64
  at::Tensor multiplicity_max, multiplicity_min;  // int64
  at::Tensor v_max, v_min;                        // float64
};

// Flat over the batch, as the forward pass returned them.
struct SymmetricGradient {
  at::Tensor grad_max, grad_min;                  // [batch] float64
  at::Tensor multiplicity_max, multiplicity_min;  // [batch] int64
  at::Tensor v_max, v_min;                        // [batch, p] float64
};

// h: [batch, p, p], float32 or float64, contiguous.
struct SymmetricEngine {
  // Refuses what is not finite or not symmetric; asymmetry as far as that is `allowed` times the
  // largest entry is rounding.
  SymmetricBatch (*extremes)(
      const char* op, const at::Tensor& h, double allowed, double cluster_rtol);
  at::Tensor (*gradient)(
      const char* op, const at::Tensor& h, const SymmetricGradient& in, double cluster_rtol);
};

extern const SymmetricEngine cpu_symmetric;

// The side of h, [*, p, p].
int64_t check_square(const char* op, const at::Tensor& h);

// How far h may be from symmetric, relative to its largest entry: sums of p products in another
// order differ by about sqrt(p) eps; 8 for the bad cases.
double allowed_asymmetry(const at::Tensor& h);

void refuse_infinite(const char* op, int64_t batch_index);
void refuse_asymmetric(const char* op, double difference, int64_t batch_index);

// By a full decomposition of h [batch, p, p], float64, exactly symmetric and scaled.
SymmetricBatch decomposed_extremes(const at::Tensor& h, double cluster_rtol);

// sum over both extremes of grad times the mean of v v^T over its cluster, [batch, p, p] float64,
// for h [batch, p, p] of any scale, grads [batch].
at::Tensor cluster_gradient(
    const at::Tensor& h,
    const at::Tensor& grad_max,
    const at::Tensor& grad_min,
    double cluster_rtol);

}  // namespace immunize_ext
