// The scale that brings matrices into the range where their squares neither over- nor underflow.
#pragma once

#include <ATen/ATen.h>

#include <tuple>

namespace immunize_ext {

// A power of two for each largest magnitude, which it brings into [1, 2); 1 for zero. Dividing by
// it is exact. One less than the exponent of [0.5, 1): finite for the largest number there is.
inline at::Tensor power_of_two_scale(const at::Tensor& largest) {
  const at::Tensor exponent = std::get<1>(at::frexp(largest)), one = at::ones_like(largest);
  return at::where(largest > 0, at::ldexp(one, exponent - 1), one);
}

}  // namespace immunize_ext
