// Between the operators of the regularizers (regularizer.cpp) and their kernel on a GPU.

#pragma once

#include <ATen/ATen.h>

#include "regularizer_values.h"

namespace immunize_ext {

// What regularizer_of reads and writes, flat over the batch.
struct RegularizerTensors {
  at::Tensor extreme, squared_frobenius;  // [batch] float64
  at::Tensor rank;                        // [batch] int64
  at::Tensor multiplicity;                // [batch] int64, becomes 0 where D vanishes
  at::Tensor value;                       // [batch] float64, or float32 on a GPU
  at::Tensor coefficients;                // [batch, 4] float64
};

// Only where it is compiled. Where |S|_F^2 is outside [least, most] multiplicity becomes -1.
void regularizer_on_device(
    const RegularizerTensors& t, const RegularizerRules& rules, double least, double most);

}  // namespace immunize_ext
