// Between the operators on singular values (spectrum.cpp, regularizer.cpp), which know no
// device, and the engines of the devices, which check nothing.

#pragma once

#include <ATen/ATen.h>

#include <algorithm>

#include "extremes.h"
#include "tensors.h"

namespace immunize_ext {

struct MatrixBatch {
  at::Tensor matrices;  // [batch, n, p] float32 or float64, contiguous
  int64_t batch, n, p;

  bool wide() const {  // the thin side is that of the rows
    return n <= p;
  }
  int64_t thin() const {
    return std::min(n, p);
  }
};

// What a forward pass finds, flat over the batch. Vectors are zero where the gradient is.
struct ExtremesBatch {
  at::Tensor value_max, value_min;                      // [batch] float64, of x^T x if of_gram
  at::Tensor rank, multiplicity_max, multiplicity_min;  // [batch] int64
  at::Tensor thin_max, thin_min, long_max, long_min;    // [batch, side] float64
  at::Tensor squared_frobenius;                         // [batch] float64, |x^T x|_F^2, of_gram
  at::Tensor thin_gram;                                 // [batch, t, t] float64, of_gram

  ExtremesBatch(const MatrixBatch& a, Wanted wanted, bool of_gram) {
    const auto numbers = a.matrices.options().dtype(at::kDouble);
    const auto counts = numbers.dtype(at::kLong);
    const auto vectors = [&](int64_t side) { return at::empty({a.batch, side}, numbers); };
    value_max = at::empty({a.batch}, numbers);
    value_min = at::empty({a.batch}, numbers);
    rank = at::empty({a.batch}, counts);
    multiplicity_max = at::empty({a.batch}, counts);
    multiplicity_min = at::empty({a.batch}, counts);
    thin_max = vectors(a.thin());
    thin_min = vectors(a.thin());
    if (wanted.long_vectors) {
      long_max = vectors(std::max(a.n, a.p));
      long_min = vectors(std::max(a.n, a.p));
    }
    if (of_gram) {
      squared_frobenius = at::empty({a.batch}, numbers);
      thin_gram = at::empty({a.batch, a.thin(), a.thin()}, numbers);
    }
  }
};

// The vectors of both extremes by the side of the matrix that they belong to, [*, n] and [*, p].
struct SidedVectors {
  at::Tensor left_max, right_max, left_min, right_min;

  SidedVectors(const ExtremesBatch& e, const MatrixBatch& m, at::IntArrayRef shape) {
    const auto left = with_sides(shape, {m.n}), right = with_sides(shape, {m.p});
    left_max = shaped(m.wide() ? e.thin_max : e.long_max, left);
    right_max = shaped(m.wide() ? e.long_max : e.thin_max, right);
    left_min = shaped(m.wide() ? e.thin_min : e.long_min, left);
    right_min = shaped(m.wide() ? e.long_min : e.thin_min, right);
  }
};

// What a gradient is made of, flat over the batch and contiguous.
struct GradientInputs {
  at::Tensor grad_max, grad_min;                      // [batch] float64
  at::Tensor multiplicity_max, multiplicity_min;      // [batch] int64
  at::Tensor thin_max, thin_min, long_max, long_min;  // [batch, side] float64
  // Of a Gram matrix only, where the thin vectors suffice: without long ones no lambda is needed.
  at::Tensor grad_squared_frobenius, lambda_max, lambda_min;  // [batch] float64
  at::Tensor thin_gram;                                       // [batch, t, t] float64

  bool of_gram() const {
    return thin_gram.defined();
  }
};

struct SpectrumEngine {
  ExtremesBatch (*extremes)(
      const char* op,
      const char* name,
      const MatrixBatch& a,
      const Policy& policy,
      Wanted wanted,
      bool of_gram);
  // [batch, n, p], of the type of the matrices.
  at::Tensor (*gradient)(
      const char* op, const MatrixBatch& a, const GradientInputs& in, const Policy& policy);
};

extern const SpectrumEngine cpu_spectrum;
extern const SpectrumEngine cuda_spectrum;  // only where it is compiled

MatrixBatch as_batch(const char* op, const char* name, const at::Tensor& a);

// Tensors that go with the batch a as operators exchange them, flat and contiguous; refused where
// the type, the device or the shape [*, sides] is another.
at::Tensor saved_numbers(
    const char* op,
    const char* name,
    const at::Tensor& t,
    const at::Tensor& a,
    at::IntArrayRef sides = {});
at::Tensor saved_counts(const char* op, const char* name, const at::Tensor& t, const at::Tensor& a);
// Gradients [*] may have any real floating-point type.
at::Tensor incoming_gradient(
    const char* op, const char* name, const at::Tensor& t, const at::Tensor& a);

}  // namespace immunize_ext
