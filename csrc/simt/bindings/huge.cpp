// The launchers on problems of billions of elements, of which only the last blocks are run:
// immunize_ext_simt.huge. Matrices are zero but for their last rows, which tests give and get; what
// an index of 32 bits would reach lies elsewhere.
#include <climits>
#include <memory>

#include "../../cuda/merge_launchers.h"
#include "../../cuda/merge_solve.cuh"
#include "../../cuda/precondition_launchers.h"
#include "../../cuda/spectrum_launchers.h"
#include "../numpy.h"

// merge.cpp, precondition.cpp and spectrum.cpp instantiate them.
namespace immunize_ext::merge {
IMMUNIZE_EXT_MERGE_LAUNCHERS(extern, float);
}
namespace immunize_ext::precondition {
IMMUNIZE_EXT_PRECONDITION_LAUNCHERS(extern, float);
}
namespace immunize_ext::spectrum {
IMMUNIZE_EXT_SPECTRUM_LAUNCHERS(extern, float);
}

namespace {

using simt::Array;
using simt::Buffer;
using simt::Stream;
using simt::py::arg;
namespace py = simt::py;

Stream last_blocks(std::size_t blocks, std::size_t shared_limit = simt::Device{}.shared_limit) {
  simt::Device device{0, shared_limit};
  device.blocks = blocks;
  device.multiprocessor_count = INT_MAX;  // no launcher holds its grid down to what is resident
  return simt::on(device);
}

// What kernels may only read; zero before `tail`.
template <typename T>
std::unique_ptr<Buffer<const T>> ends_with(
    const char* name, std::int64_t size, const Array<T>& tail) {
  auto buffer = std::make_unique<Buffer<const T>>(name, size);
  std::copy_n(tail.data(), tail.size(), buffer->data() + (size - tail.size()));
  return buffer;
}

// The last elements, which the last blocks must have written.
template <typename T>
Array<T> tail(const Buffer<T>& buffer, const std::vector<py::ssize_t>& shape) {
  Array<T> array(shape);
  const std::int64_t first = buffer.size() - array.size();
  for (std::int64_t i = first; i < buffer.size(); ++i) {
    if (!buffer.is_written(i)) {
      throw simt::Error("no kernel wrote " + buffer.name() + "[" + std::to_string(i) + "]");
    }
  }
  std::copy_n(buffer.data() + first, array.size(), array.mutable_data());
  return array;
}

// --- merge: one layer of `rows` rows and one concept; W0 = 0, the tail is that of W or G ----------

namespace mg = immunize_ext::merge;

struct Merge {
  std::int64_t batch, rows, s, d;
  std::unique_ptr<Buffer<const float>> c, b;
  Buffer<std::uint64_t> table;
  mg::Shared<float> shared;

  Merge(
      std::int64_t batch, std::int64_t rows, const Array<float>& c_last, const Array<float>& b_last)
      : batch(batch),
        rows(rows),
        s(c_last.shape(0)),
        d(c_last.shape(1)),
        c(ends_with("c", batch * s * d, c_last)),
        b(ends_with("b", batch * s * d, b_last)),
        table("table", mg::table_words(1, 1, s)) {
    table.fill(0);
    shared.c = c->ptr();
    shared.b = b->ptr();
    shared.batch = batch;
    shared.s = s;
    shared.d = d;
    shared.first_token = {0, s};
  }
};

py::tuple merge_apply(
    std::int64_t batch,
    std::int64_t rows,
    const Array<float>& last,
    const Array<float>& c,
    const Array<float>& b,
    std::size_t blocks) {
  const Merge p(batch, rows, c, b);
  const Buffer<const float> base("base", batch * rows * p.d);
  const auto target = ends_with("target", batch * rows * p.d, last);
  const Buffer<float> merged("merged", batch * rows * p.d),
      residual("residual", batch * rows * p.s);
  Buffer<int> status("status", batch);
  status.fill(0);
  mg::launch_apply<float>(
      {{base.ptr(), nullptr, merged.ptr(), residual.ptr(), rows}}, {{target->ptr()}}, false,
      p.shared, nullptr, status.ptr(), p.table.ptr(), last_blocks(blocks));
  return py::make_tuple(tail(merged, {last.shape(0), p.d}), tail(residual, {last.shape(0), p.s}));
}

py::tuple merge_backward(
    std::int64_t batch,
    std::int64_t rows,
    const Array<float>& last,
    const Array<float>& c,
    const Array<float>& b,
    std::size_t blocks) {
  const Merge p(batch, rows, c, b);
  const auto grad = ends_with("grad", batch * rows * p.d, last);
  const Buffer<float> base("grad_base", batch * rows * p.d);
  const Buffer<float> target("grad_target", batch * rows * p.d);
  const Buffer<float> coefficients("coefficients", batch * rows * p.s);
  mg::launch_backward<float>(
      {{grad->ptr(), base.ptr(), coefficients.ptr(), rows}}, {{target.ptr()}}, p.shared,
      p.table.ptr(), last_blocks(blocks));
  return py::make_tuple(
      tail(base, {last.shape(0), p.d}), tail(target, {last.shape(0), p.d}),
      tail(coefficients, {last.shape(0), p.s}));
}

// The sum over the rows of the last of `batch` problems.
Array<double> merge_sum(
    std::int64_t batch,
    std::int64_t rows,
    const Array<float>& last,
    const Array<float>& coefficients,
    std::size_t blocks) {
  const std::int64_t s = coefficients.shape(1), d = last.shape(1);
  const auto plain = ends_with("plain", batch * rows * d, last);
  const auto factors = ends_with("coefficients", batch * rows * s, coefficients);
  mg::Shared<float> shared;
  shared.batch = batch;
  shared.s = s;
  shared.d = d;
  shared.first_token = {0, s};
  const std::vector<mg::SumLayer<float>> layers{{factors->ptr(), plain->ptr(), rows}};
  const mg::SumPlan plan = mg::make_sum_plan(layers, shared.first_token, batch, d);
  Buffer<std::uint64_t> table("table", mg::table_words(1, 1, s));
  Buffer<double> partial("partial", batch * plan.splits * s * d), out("out", batch * s * d);
  mg::launch_sum<float>(
      layers, {}, shared, plan, 1.0, partial.ptr(), out.ptr(), table.ptr(), last_blocks(blocks));
  return tail(out, {s, d});
}

// --- precondition ---------------------------------------------------------------------------------

Array<float> precondition(
    std::int64_t rows, const Array<float>& last, const Array<double>& factor, std::size_t blocks) {
  const std::int64_t side = last.shape(1);
  const auto grad = ends_with("grad", rows * side, last);
  const Buffer<const double> left = simt::input("factor", factor);
  const Buffer<float> result("result", rows * side);
  immunize_ext::precondition::launch_small_precondition<float>(
      grad->ptr(), left.ptr(), result.ptr(), rows, static_cast<int>(side), last_blocks(blocks));
  return tail(result, {last.shape(0), side});
}

// --- spectrum -------------------------------------------------------------------------------------

namespace sp = immunize_ext::spectrum;

// value_max, value_min, the gradient of value_max and, for the Gram matrix, of |K|_F^2, all of the
// last of `batch` matrices.
py::tuple spectrum(std::int64_t batch, const Array<float>& last, bool of_gram, std::size_t blocks) {
  const std::int64_t n = last.shape(0), p = last.shape(1), t = n < p ? n : p;
  const Stream stream = last_blocks(blocks);
  const auto a = ends_with("a", batch * n * p, last);
  const sp::SmallPlan plan = sp::small_plan(n, p);
  const auto grid = static_cast<unsigned>(batch);  // a block for each matrix
  const Buffer<double> work("work", grid * plan.work_doubles());
  const Buffer<double> value_max("value_max", batch), value_min("value_min", batch);
  const Buffer<double> u_max("u_max", batch * n), u_min("u_min", batch * n);
  const Buffer<double> v_max("v_max", batch * p), v_min("v_min", batch * p);
  const Buffer<double> squares("squared_frobenius", of_gram ? batch : 0);
  const Buffer<double> thin("thin_gram", of_gram ? batch * t * t : 0);
  const Buffer<std::int64_t> rank("rank", batch), max_count("multiplicity_max", batch),
      min_count("multiplicity_min", batch);
  Buffer<int> first_bad("first_bad", 1);
  first_bad.fill(INT_MAX);
  const immunize_ext::Policy policy{1e-6, 1e-6, false, t};
  const bool transposed = n <= p;
  const sp::Outputs out{
      value_max.ptr(),
      value_min.ptr(),
      rank.ptr(),
      max_count.ptr(),
      min_count.ptr(),
      (transposed ? v_max : u_max).ptr(),
      (transposed ? u_max : v_max).ptr(),
      (transposed ? v_min : u_min).ptr(),
      (transposed ? u_min : v_min).ptr(),
      squares.ptr(),
      thin.ptr(),
      of_gram};
  const sp::EndsPlan ends = sp::ends_plan(n, p);
  const Buffer<double> parts("parts", sp::ends_step(ends, batch) * ends.work_doubles());
  const bool tried = sp::launch_small_ends<float>(
      a->ptr(), batch, ends, policy, out, parts.ptr(), first_bad.ptr(), stream);
  sp::launch_small_extremes<float>(
      a->ptr(), batch, plan, policy, out, tried, work.ptr(), grid, first_bad.ptr(), stream);
  Array<double> one(1), none(1);
  one.mutable_data()[0] = 1.0;
  none.mutable_data()[0] = 0.0;
  const auto grad_max = ends_with("grad_max", batch, one),
             grad_min = ends_with("grad_min", batch, none);
  const auto grad_squares = ends_with("grad_squared_frobenius", of_gram ? batch : 1, one);
  const Buffer<float> grad("grad", batch * n * p);
  sp::launch_gradient<float>(
      {grad_max->ptr(), grad_min->ptr(), max_count.ptr(), min_count.ptr(), u_max.ptr(), v_max.ptr(),
       u_min.ptr(), v_min.ptr(), value_max.ptr(), value_min.ptr(), grad_squares->ptr(), thin.ptr(),
       of_gram},
      a->ptr(), batch, n, p, grad.ptr(), stream);
  return py::make_tuple(tail(value_max, {1}), tail(value_min, {1}), tail(grad, {n, p}));
}

// Whether CUDA takes every launch of the small route; returns the threads of a block.
unsigned small_launches(
    std::int64_t batch, std::int64_t n, std::int64_t p, std::size_t shared_limit) {
  const Stream stream = last_blocks(0, shared_limit);
  const sp::SmallPlan plan = sp::small_plan(n, p);
  const auto grid = static_cast<unsigned>(batch);
  sp::launch_small_ends<float>(
      nullptr, batch, sp::ends_plan(n, p), {0, 0, false, p}, {}, nullptr, nullptr, stream);
  sp::launch_small_extremes<float>(
      nullptr, batch, plan, {0, 0, false, p}, {}, true, nullptr, grid, nullptr, stream);
  sp::Incoming incoming{};
  sp::launch_gradient<float>(incoming, nullptr, batch, n, p, nullptr, stream);
  incoming.of_gram = true;
  sp::launch_gradient<float>(incoming, nullptr, batch, n, p, nullptr, stream);
  sp::launch_small_cluster_gradient<float>(
      incoming, nullptr, batch, plan, {0, 0, false, p}, nullptr, grid, nullptr, stream);
  return plan.threads;
}

// Whether CUDA takes every launch of the large route, for as many matrices as one call may have;
// returns how many these are.
std::int64_t large_launches(std::int64_t n, std::int64_t p, std::size_t shared_limit) {
  const Stream stream = last_blocks(0, shared_limit);
  const sp::LargePlan plan = sp::large_plan(n, p);
  const std::int64_t batch = sp::large_most_batch(plan);
  const auto one_sweep = [](const void*, int) { return false; };
  sp::launch_large_extremes<float>(
      nullptr, batch, plan, {}, {0, 0, false, p}, {}, nullptr, {one_sweep, nullptr}, stream);
  sp::launch_large_cluster_gradient<float>(
      {}, nullptr, batch, plan, {}, {0, 0, false, p}, nullptr, {one_sweep, nullptr}, stream);
  return batch;
}

}  // namespace

SIMT_BINDINGS(huge, m) {
  m.def("merge_apply", &merge_apply);
  m.def("merge_backward", &merge_backward);
  m.def("merge_sum", &merge_sum);
  m.def("precondition", &precondition);
  m.def("spectrum", &spectrum);
  m.def("small_launches", &small_launches);
  m.def("large_launches", &large_launches);
  m.def("pivoted_launch", [](std::int64_t batch, std::int64_t s, std::size_t shared_limit) {
    mg::launch_pivoted_cholesky(
        {nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, batch, s, 0},
        last_blocks(0, shared_limit));
  });
}
