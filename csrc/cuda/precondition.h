// The preconditioned gradient with a small factor of K, in one kernel.
#pragma once

#include <ATen/ATen.h>

namespace immunize_ext {

// to = rows K^-1 from the Cholesky factor of K; rows and `to` [r, p] of one type, `to` contiguous.
// False, and nothing done, where that is not for the kernel: it takes p <= 128 on CUDA.
bool precondition_small(const at::Tensor& rows, const at::Tensor& factor, const at::Tensor& to);

}  // namespace immunize_ext
