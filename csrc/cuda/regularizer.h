// The regularizers of matrices whose extremes lie on a GPU, in one kernel.
#pragma once

#include <ATen/ATen.h>

#include "../regularizer_values.h"

namespace immunize_ext {

// What the kernel reads and writes, flat over the batch.
struct RegularizerTensors {
  at::Tensor extreme, squared_frobenius;  // [batch] float64
  at::Tensor rank;                        // [batch] int64
  at::Tensor multiplicity;                // [batch] int64; -1 where a square is out of range
  at::Tensor value;                       // [batch] float32 or float64
  at::Tensor weights;                     // [batch, 4] float64
};

void regularizer_on_device(
    const RegularizerTensors& t, const RegularizerRules& rules, double least, double most);

}  // namespace immunize_ext
