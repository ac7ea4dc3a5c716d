// Whether a backward pass in C++ may call its kernel, or has to be differentiable itself.

#pragma once

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>

namespace immunize_ext {

// Nothing but the numbers of the gradient: no graph of it, no tangents in the incoming gradients,
// no transform of torch.func or batch of vmap around them.
inline bool wants_numbers_only(const torch::autograd::variable_list& grads) {
  if (at::GradMode::is_enabled() || c10::impl::tls_local_dispatch_key_set().included_.has(
                                        c10::DispatchKey::FuncTorchDynamicLayerFrontMode))
    return false;
  for (const at::Tensor& grad : grads)
    if (grad.defined() && (grad.key_set().has(c10::DispatchKey::FuncTorchBatched) ||
                           grad._fw_grad(/*level=*/0).defined()))
      return false;
  return true;
}

}  // namespace immunize_ext
