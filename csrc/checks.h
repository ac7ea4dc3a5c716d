// Argument checks of the operators: one message form, one exception type.
//
//   "<op>: <argument> must <expected>, got <what>"        ValueError in Python
//
// Torch's macro builds the message only on failure, so a check that holds costs a comparison.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>
#include <c10/util/ArrayRef.h>
#include <c10/util/Exception.h>

#include <cmath>
#include <cstdint>
#include <string>

// The general form. `expected` reads on from "must"; everything after it is streamed after "got":
//   IMMUNIZE_CHECK(s > 0, "merge_solve", "c", "have at least one row", c.sizes());
#define IMMUNIZE_CHECK(condition, op, argument, expected, ...) \
  TORCH_CHECK_VALUE(condition, op, ": ", argument, " must ", expected, ", got ", __VA_ARGS__)

namespace immunize_ext {

// t must have shape [*, rows, columns]; -1 stands for any size.
inline void check_matrix(
    const char* op,
    const char* argument,
    const at::Tensor& t,
    int64_t rows = -1,
    int64_t columns = -1) {
  const bool ok =
      t.dim() >= 2 && (rows < 0 || t.size(-2) == rows) && (columns < 0 || t.size(-1) == columns);
  if (ok) {
    return;
  }
  const auto name = [](int64_t size, const char* any) {
    return size < 0 ? std::string(any) : std::to_string(size);
  };
  IMMUNIZE_CHECK(
      false, op, argument,
      "have shape [*, " + name(rows, "any") + ", " + name(columns, "any") + "]", t.sizes());
}

// t must have exactly this shape.
inline void check_shape(
    const char* op, const char* argument, const at::Tensor& t, at::IntArrayRef shape) {
  TORCH_CHECK_VALUE(
      t.sizes() == shape, op, ": ", argument, " must have shape ", shape, ", got ", t.sizes());
}

inline void check_dtype(
    const char* op, const char* argument, const at::Tensor& t, at::ScalarType dtype) {
  TORCH_CHECK_VALUE(
      t.scalar_type() == dtype, op, ": ", argument, " must have dtype ", dtype, ", got ",
      t.scalar_type());
}

// float16, bfloat16, float32 or float64.
inline void check_real_floating(const char* op, const char* argument, const at::Tensor& t) {
  IMMUNIZE_CHECK(
      at::isFloatingType(t.scalar_type()), op, argument, "have a real floating-point dtype",
      t.scalar_type());
}

// What every spectrum operator asks of its input: a real floating-point [*, n, p], n and p > 0.
inline void check_floating_matrix(const char* op, const char* argument, const at::Tensor& t) {
  check_real_floating(op, argument, t);
  check_matrix(op, argument, t);
  IMMUNIZE_CHECK(
      t.size(-2) > 0 && t.size(-1) > 0, op, argument, "have at least one row and one column",
      t.sizes());
}

// value stands for matrix `batch_index` of the (flattened) batch: a sum or maximum over its
// entries that is NaN or infinite if one of them is.
inline void check_finite(
    const char* op, const char* argument, double value, int64_t batch_index = 0) {
  IMMUNIZE_CHECK(
      std::isfinite(value), op, argument, "be finite", "NaN or infinity in matrix ", batch_index,
      " of the batch");
}

// t must live where `other` does.
inline void check_same_device(
    const char* op,
    const char* argument,
    const at::Tensor& t,
    const char* other_argument,
    const at::Tensor& other) {
  TORCH_CHECK_VALUE(
      t.device() == other.device(), op, ": ", argument, " must be on the device of ",
      other_argument, " (", other.device(), "), got ", t.device());
}

// t must have the leading (batch) dimensions `batch` in front of its last two.
inline void check_batch(
    const char* op, const char* argument, const at::Tensor& t, at::IntArrayRef batch) {
  const bool ok = t.dim() >= 2 && t.sizes().slice(0, t.dim() - 2) == batch;
  TORCH_CHECK_VALUE(
      ok, op, ": ", argument, " must have the leading dimensions ", batch, ", got shape ",
      t.sizes());
}

}  // namespace immunize_ext
