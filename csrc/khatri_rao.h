// Between the operator on per-sample gradients (khatri_rao.cpp) and what is particular to the CPU.

#pragma once

#include <ATen/ATen.h>

#include <tuple>

namespace immunize_ext {

// a [batch, n, t, d] and g [batch, n, t, o], float32 or float64, contiguous. K [batch, n, n] float64,
// exactly symmetric.
at::Tensor cpu_khatri_rao_gram(const at::Tensor& a, const at::Tensor& g, bool bias);

// h [batch, n, n] float64, exactly symmetric: grad + grad^T. Gradients in the shapes of a and g,
// float64; undefined where not needed.
std::tuple<at::Tensor, at::Tensor> cpu_khatri_rao_gradient(
    const at::Tensor& h,
    const at::Tensor& a,
    const at::Tensor& g,
    bool bias,
    bool need_a,
    bool need_g);

}  // namespace immunize_ext
