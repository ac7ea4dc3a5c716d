// Operators whose rules stand in Python, at the dispatch key Autograd (ops/derivatives.py). On CPU
// and CUDA a kernel in C++ is asked first, and goes there only where something is differentiated
// that it does not know how to: in a backward pass of first order nothing is.

#pragma once

#include <ATen/ATen.h>
#include <c10/core/DispatchKeySet.h>
#include <c10/core/GradMode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <string>

namespace immunize_ext {

// The alias Autograd stands for AutogradCPU, AutogradCUDA and this key, among others. No kernel in
// C++ takes it, so that a call sent here finds the rules.
inline constexpr c10::DispatchKeySet kRules(c10::DispatchKey::AutogradOther);

inline bool carries_tangent(const at::Tensor& t) {
  return t.defined() && t._fw_grad(/*level=*/0).defined();
}
inline bool is_recorded(const at::Tensor& t) {
  return t.defined() && t.requires_grad() && c10::GradMode::is_enabled();
}

// Transforms of torch.func are active, which functions of autograd in C++ do not serve.
inline bool is_transformed() {
  return c10::impl::tls_local_dispatch_key_set().included_.has(
      c10::DispatchKey::FuncTorchDynamicLayerFrontMode);
}

// On CPU and CUDA calls of this operator reach its rules only where an argument is differentiated.
void ask_before_rules(const std::string& name);

}  // namespace immunize_ext
