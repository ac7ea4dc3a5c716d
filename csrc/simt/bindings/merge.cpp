// The kernels of merge.cuh as functions of numpy arrays: immunize_ext_simt.merge.
//
// Weights come as arrays of their own type, bfloat16 as uint16, and `dtype` says which; C, B and
// the coefficients in the type that the kernels compute in.
#include "../../cuda/merge_launchers.h"

#include <pybind11/stl.h>

#include <memory>

#include "../numpy.h"

namespace immunize_ext::merge {

IMMUNIZE_EXT_MERGE_LAUNCHERS(SIMT_EXTERN, float);
IMMUNIZE_EXT_MERGE_LAUNCHERS(SIMT_EXTERN, double);
IMMUNIZE_EXT_MERGE_LAUNCHERS(SIMT_EXTERN, Half);
IMMUNIZE_EXT_MERGE_LAUNCHERS(SIMT_EXTERN, BFloat16);

}  // namespace immunize_ext::merge

namespace {

using namespace immunize_ext;
using namespace immunize_ext::merge;
using simt::Array;
using simt::Buffer;
using simt::py::arg;
namespace py = simt::py;

using Arrays = std::vector<py::array>;

struct Options {
  std::uint64_t seed = 0;
  std::size_t shared_limit = simt::Device{}.shared_limit;
  std::int64_t largest_grid = 0x7FFFFFFF;
  std::int64_t shift = 0;  // elements by which every matrix is off its alignment
  Stream stream() const {
    return simt::on({seed, shared_limit});
  }
};

template <typename T>
std::unique_ptr<Buffer<const T>> input(
    const std::string& name, const py::array& array, std::int64_t shift = 0) {
  if (array.itemsize() != sizeof(T) || (array.flags() & py::array::c_style) == 0) {
    throw py::value_error(name + " has the wrong type or is not contiguous");
  }
  return std::make_unique<Buffer<const T>>(
      name, static_cast<const T*>(array.data()), array.size(), shift);
}

template <typename T>
std::vector<std::unique_ptr<Buffer<const T>>> inputs(
    const std::string& name, const Arrays& arrays, std::int64_t shift) {
  std::vector<std::unique_ptr<Buffer<const T>>> result;
  for (const py::array& array : arrays) {
    result.push_back(input<T>(name + "[" + std::to_string(result.size()) + "]", array, shift));
  }
  return result;
}

// Results: arrays of the given shape and type, written by kernels.
template <typename T>
class Output {
 public:
  Output(
      const std::string& name, std::vector<py::ssize_t> shape, py::dtype dtype, std::int64_t shift)
      : shape_(std::move(shape)), dtype_(std::move(dtype)), buffer_(name, size(), shift) {}
  auto ptr() const {
    return buffer_.ptr();
  }
  py::array numpy() const {
    if (buffer_.first_unwritten() >= 0) {
      throw simt::Error("no kernel wrote " + buffer_.name());
    }
    py::array result(dtype_, shape_);
    std::memcpy(result.mutable_data(), buffer_.data(), static_cast<std::size_t>(result.nbytes()));
    return result;
  }

 private:
  std::int64_t size() const {
    std::int64_t n = 1;
    for (const py::ssize_t side : shape_) {
      n *= side;
    }
    return n;
  }
  std::vector<py::ssize_t> shape_;
  py::dtype dtype_;
  Buffer<T> buffer_;
};

template <typename T>
using Outputs = std::vector<std::unique_ptr<Output<T>>>;

template <typename T>
Outputs<T> outputs_like(
    const Arrays& like, py::ssize_t columns, py::dtype dtype, std::int64_t shift) {
  Outputs<T> result;
  for (const py::array& array : like) {
    result.push_back(
        std::make_unique<Output<T>>(
            "output", std::vector<py::ssize_t>{array.shape(0), array.shape(1), columns}, dtype,
            shift));
  }
  return result;
}

template <typename T>
Arrays numpy(const Outputs<T>& outputs) {
  Arrays result;
  for (const auto& output : outputs) {
    result.push_back(output->numpy());
  }
  return result;
}

std::vector<std::int64_t> starts(const std::vector<std::int64_t>& rows) {
  std::vector<std::int64_t> result{0};
  for (const std::int64_t n : rows) {
    result.push_back(result.back() + n);
  }
  return result;
}

template <typename T>
std::vector<Weight<T>> weights(const std::vector<std::unique_ptr<Buffer<const T>>>& buffers) {
  std::vector<Weight<T>> result;
  for (const auto& buffer : buffers) {
    result.push_back({buffer->ptr()});
  }
  return result;
}

// C and B [batch, s, d] and what else all launches take.
template <typename T>
struct Problem {
  using A = Accumulate<T>;
  std::unique_ptr<Buffer<const A>> c, b;
  Buffer<std::uint64_t> table;
  Shared<T> shared;

  Problem(
      const py::array& c_array,
      const py::array& b_array,
      const std::vector<std::int64_t>& rows,
      std::size_t layers,
      const Options& options)
      : c(input<A>("c", c_array)),
        b(input<A>("b", b_array)),
        table("table", table_words(layers, rows.size(), c_array.shape(1))) {
    shared.c = c->ptr();
    shared.b = b->ptr();
    shared.batch = c_array.shape(0);
    shared.s = c_array.shape(1);
    shared.d = c_array.shape(2);
    shared.first_token = starts(rows);
    shared.largest_grid = options.largest_grid;
  }
};

template <typename T>
py::tuple apply(
    const Arrays& base,
    const Arrays& targets,
    const std::vector<std::int64_t>& rows,
    bool values,
    const py::array& c,
    const py::array& b,
    const Options& options) {
  using A = Accumulate<T>;
  const Problem<T> problem(c, b, rows, base.size(), options);
  const Shared<T>& shared = problem.shared;
  const auto base_in = inputs<T>("base", base, options.shift);
  const auto value_in = inputs<A>("values", values ? targets : Arrays{}, 0);
  const auto target_in = inputs<T>("targets", values ? Arrays{} : targets, options.shift);
  const auto merged = outputs_like<T>(base, shared.d, base[0].dtype(), options.shift);
  const auto residual = outputs_like<A>(base, shared.s, c.dtype(), 0);
  Buffer<double> norm("token_norm", shared.batch * shared.s);
  const A* token = static_cast<const A*>(c.data());
  for (std::int64_t j = 0; j < shared.batch * shared.s; ++j) {
    double squared = 0;
    for (std::int64_t k = 0; k < shared.d; ++k) {
      squared += static_cast<double>(token[j * shared.d + k]) * token[j * shared.d + k];
    }
    norm.data()[j] = std::sqrt(squared);
  }
  const Buffer<const double> token_norm("token_norm", norm.data(), shared.batch * shared.s);
  const std::int64_t layer_count = static_cast<std::int64_t>(base.size());
  Buffer<int> status("status", shared.batch * layer_count);
  status.fill(0);
  std::vector<ApplyLayer<T>> layers;
  for (std::size_t l = 0; l < base.size(); ++l) {
    layers.push_back(
        {base_in[l]->ptr(), values ? value_in[l]->ptr() : simt::GlobalPtr<const A>(),
         merged[l]->ptr(), residual[l]->ptr(), base[l].shape(1)});
  }
  launch_apply<T>(
      layers, weights<T>(target_in), values, shared, token_norm.ptr(), status.ptr(),
      problem.table.ptr(), options.stream());
  return py::make_tuple(
      numpy(merged), numpy(residual), simt::to_numpy(status, {shared.batch, layer_count}));
}

template <typename T>
py::tuple backward(
    const Arrays& grad,
    const std::vector<std::int64_t>& rows,
    const py::array& c,
    const py::array& b,
    bool need_base,
    bool need_targets,
    bool need_coefficients,
    const Options& options) {
  using A = Accumulate<T>;
  const Problem<T> problem(c, b, rows, grad.size(), options);
  const Shared<T>& shared = problem.shared;
  const auto grad_in = inputs<T>("grad", grad, options.shift);
  const Arrays none;
  const auto grad_base =
      outputs_like<T>(need_base ? grad : none, shared.d, grad[0].dtype(), options.shift);
  Arrays target_shapes;
  for (std::size_t n = 0; need_targets && n < rows.size(); ++n) {
    target_shapes.insert(target_shapes.end(), grad.begin(), grad.end());
  }
  const auto grad_targets =
      outputs_like<T>(target_shapes, shared.d, grad[0].dtype(), options.shift);
  const auto coefficients =
      outputs_like<A>(need_coefficients ? grad : none, shared.s, c.dtype(), 0);
  std::vector<BackwardLayer<T>> layers;
  for (std::size_t l = 0; l < grad.size(); ++l) {
    layers.push_back(
        {grad_in[l]->ptr(), need_base ? grad_base[l]->ptr() : simt::GlobalPtr<T>(),
         need_coefficients ? coefficients[l]->ptr() : simt::GlobalPtr<A>(), grad[l].shape(1)});
  }
  std::vector<Gradient<T>> gradients;
  for (const auto& output : grad_targets) {
    gradients.push_back({output->ptr()});
  }
  launch_backward<T>(layers, gradients, shared, problem.table.ptr(), options.stream());
  return py::make_tuple(numpy(grad_base), numpy(grad_targets), numpy(coefficients));
}

template <typename T>
py::array sum_rows(
    const Arrays& coefficients,
    const Arrays& plain,
    const Arrays& targets,
    const std::vector<std::int64_t>& rows,
    double sign,
    const Options& options) {
  using A = Accumulate<T>;
  const std::int64_t batch = plain[0].shape(0), d = plain[0].shape(2);
  const auto coefficients_in = inputs<A>("coefficients", coefficients, 0);
  const auto plain_in = inputs<T>("plain", plain, options.shift);
  const auto targets_in = inputs<T>("targets", targets, options.shift);
  Shared<T> shared;
  shared.batch = batch;
  shared.s = coefficients[0].shape(2);
  shared.d = d;
  shared.first_token = starts(rows);
  shared.largest_grid = options.largest_grid;
  std::vector<SumLayer<T>> layers;
  for (std::size_t l = 0; l < plain.size(); ++l) {
    layers.push_back({coefficients_in[l]->ptr(), plain_in[l]->ptr(), plain[l].shape(1)});
  }
  const SumPlan plan = make_sum_plan(layers, shared.first_token, batch, d);
  Buffer<std::uint64_t> table("table", table_words(plain.size(), rows.size(), shared.s));
  Buffer<double> partial("partial", batch * plan.splits * shared.s * d);
  Buffer<double> out("out", batch * shared.s * d);
  launch_sum<T>(
      layers, weights<T>(targets_in), shared, plan, sign, partial.ptr(), out.ptr(), table.ptr(),
      options.stream());
  return simt::to_numpy(out, {batch, shared.s, d});
}

// Calls function(T()) for the type named `dtype`.
template <typename F>
auto with_type(const std::string& dtype, F function) {
  if (dtype == "float32") {
    return function(float());
  }
  if (dtype == "float64") {
    return function(double());
  }
  if (dtype == "float16") {
    return function(Half());
  }
  if (dtype == "bfloat16") {
    return function(BFloat16());
  }
  throw py::value_error("dtype must be float32, float64, float16 or bfloat16, got " + dtype);
}

}  // namespace

SIMT_BINDINGS(merge, m) {
  py::class_<Options>(m, "Options")
      .def(
          py::init(
              [](std::uint64_t seed, std::size_t shared_limit, std::int64_t largest_grid,
                 std::int64_t shift) { return Options{seed, shared_limit, largest_grid, shift}; }),
          py::kw_only(), arg("seed") = 0, arg("shared_limit") = Options{}.shared_limit,
          arg("largest_grid") = Options{}.largest_grid, arg("shift") = 0);
  m.def(
      "apply",
      [](const std::string& dtype, const Arrays& base, const Arrays& targets,
         const std::vector<std::int64_t>& rows, bool values, const py::array& c, const py::array& b,
         const Options& options) {
        return with_type(dtype, [&](auto type) {
          return apply<decltype(type)>(base, targets, rows, values, c, b, options);
        });
      },
      arg("dtype"), arg("base"), arg("targets"), arg("rows"), arg("values"), arg("c"), arg("b"),
      arg("options"));
  m.def(
      "backward",
      [](const std::string& dtype, const Arrays& grad, const std::vector<std::int64_t>& rows,
         const py::array& c, const py::array& b, bool need_base, bool need_targets,
         bool need_coefficients, const Options& options) {
        return with_type(dtype, [&](auto type) {
          return backward<decltype(type)>(
              grad, rows, c, b, need_base, need_targets, need_coefficients, options);
        });
      },
      arg("dtype"), arg("grad"), arg("rows"), arg("c"), arg("b"), arg("need_base"),
      arg("need_targets"), arg("need_coefficients"), arg("options"));
  m.def(
      "sum_rows",
      [](const std::string& dtype, const Arrays& coefficients, const Arrays& plain,
         const Arrays& targets, const std::vector<std::int64_t>& rows, double sign,
         const Options& options) {
        return with_type(dtype, [&](auto type) {
          return sum_rows<decltype(type)>(coefficients, plain, targets, rows, sign, options);
        });
      },
      arg("dtype"), arg("coefficients"), arg("plain"), arg("targets"), arg("rows"), arg("sign"),
      arg("options"));
  m.attr("TILE_ROWS") = kTileRows;
  m.attr("TILE_TOKENS") = kTileTokens;
  m.attr("CHUNK") = kChunk;
  m.attr("PAIR_COLUMNS") = kPairColumns;
  m.attr("GROUP_ROWS") = kGroupRows;
  m.attr("PLACE_BYTES") = kPlaceWords * sizeof(std::int64_t);
}
