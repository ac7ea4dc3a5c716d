// The spectrum kernels as functions of numpy arrays: immunize_ext_simt.spectrum.
#include "../../cuda/spectrum_launchers.h"

#include <climits>
#include <tuple>

#include "../numpy.h"

namespace immunize_ext::spectrum {

IMMUNIZE_EXT_SPECTRUM_LAUNCHERS(SIMT_EXTERN, float);
IMMUNIZE_EXT_SPECTRUM_LAUNCHERS(SIMT_EXTERN, double);

}  // namespace immunize_ext::spectrum

namespace {

using namespace immunize_ext::spectrum;
using immunize_ext::Policy;
using simt::Array;
using simt::Buffer;
using simt::py::arg;

// Buffers of everything that a forward pass returns.
struct Results {
  std::int64_t batch, n, p, t;
  bool of_gram;
  Buffer<double> value_max, value_min, u_max, v_max, u_min, v_min, squared_frobenius, thin_gram;
  Buffer<std::int64_t> rank, multiplicity_max, multiplicity_min;
  Buffer<int> first_bad;

  Results(std::int64_t batch, std::int64_t n, std::int64_t p, bool of_gram)
      : batch(batch),
        n(n),
        p(p),
        t(n < p ? n : p),
        of_gram(of_gram),
        value_max("value_max", batch),
        value_min("value_min", batch),
        u_max("u_max", batch * n),
        v_max("v_max", batch * p),
        u_min("u_min", batch * n),
        v_min("v_min", batch * p),
        squared_frobenius("squared_frobenius", of_gram ? batch : 0),
        thin_gram("thin_gram", of_gram ? batch * t * t : 0),
        rank("rank", batch),
        multiplicity_max("multiplicity_max", batch),
        multiplicity_min("multiplicity_min", batch),
        first_bad("first_bad", 1) {
    first_bad.fill(INT_MAX);
  }

  Outputs outputs() const {
    const bool transposed = n <= p;
    return {
        value_max.ptr(),
        value_min.ptr(),
        rank.ptr(),
        multiplicity_max.ptr(),
        multiplicity_min.ptr(),
        (transposed ? v_max : u_max).ptr(),
        (transposed ? u_max : v_max).ptr(),
        (transposed ? v_min : u_min).ptr(),
        (transposed ? u_min : v_min).ptr(),
        squared_frobenius.ptr(),
        thin_gram.ptr(),
        of_gram};
  }

  simt::py::dict to_dict() const {
    simt::py::dict out;
    out["value_max"] = simt::to_numpy(value_max, {batch});
    out["value_min"] = simt::to_numpy(value_min, {batch});
    out["rank"] = simt::to_numpy(rank, {batch});
    out["multiplicity_max"] = simt::to_numpy(multiplicity_max, {batch});
    out["multiplicity_min"] = simt::to_numpy(multiplicity_min, {batch});
    out["u_max"] = simt::to_numpy(u_max, {batch, n});
    out["v_max"] = simt::to_numpy(v_max, {batch, p});
    out["u_min"] = simt::to_numpy(u_min, {batch, n});
    out["v_min"] = simt::to_numpy(v_min, {batch, p});
    if (of_gram) {
      out["squared_frobenius"] = simt::to_numpy(squared_frobenius, {batch});
      out["thin_gram"] = simt::to_numpy(thin_gram, {batch, t, t});
    }
    out["first_bad"] = first_bad.data()[0];
    return out;
  }
};

Policy policy_for(
    std::int64_t n,
    std::int64_t p,
    double rank_rtol,
    double cluster_rtol,
    bool full_rank,
    bool of_gram) {
  return {rank_rtol, cluster_rtol, full_rank, of_gram || p < n ? p : n};
}

// What the kernels of the backward pass read, as numpy holds it.
struct Gradients {
  Buffer<const double> grad_max, grad_min, u_max, v_max, u_min, v_min;
  Buffer<const std::int64_t> multiplicity_max, multiplicity_min;
  Buffer<const double> lambda_max, lambda_min, grad_squared_frobenius, thin_gram;
  bool of_gram;

  static Buffer<const double> numbers(const simt::py::dict& from, const char* name) {
    return from.contains(name) ? simt::input(name, from[name].cast<Array<double>>())
                               : Buffer<const double>(name, 0);
  }
  static Buffer<const std::int64_t> counts(const simt::py::dict& from, const char* name) {
    return simt::input(name, from[name].cast<Array<std::int64_t>>());
  }

  Gradients(const simt::py::dict& forward, const simt::py::dict& grads)
      : grad_max(numbers(grads, "grad_max")),
        grad_min(numbers(grads, "grad_min")),
        u_max(numbers(forward, "u_max")),
        v_max(numbers(forward, "v_max")),
        u_min(numbers(forward, "u_min")),
        v_min(numbers(forward, "v_min")),
        multiplicity_max(counts(forward, "multiplicity_max")),
        multiplicity_min(counts(forward, "multiplicity_min")),
        lambda_max(numbers(forward, "value_max")),
        lambda_min(numbers(forward, "value_min")),
        grad_squared_frobenius(numbers(grads, "grad_squared_frobenius")),
        thin_gram(numbers(forward, "thin_gram")),
        of_gram(grads.contains("grad_squared_frobenius")) {}

  Incoming incoming() const {
    return {
        grad_max.ptr(),
        grad_min.ptr(),
        multiplicity_max.ptr(),
        multiplicity_min.ptr(),
        u_max.ptr(),
        v_max.ptr(),
        u_min.ptr(),
        v_min.ptr(),
        lambda_max.ptr(),
        lambda_min.ptr(),
        grad_squared_frobenius.ptr(),
        thin_gram.ptr(),
        of_gram};
  }
};

// Workspace of the large route.
struct LargeBuffers {
  Buffer<double> work, partial, rotation, sigma;
  Buffer<Bits> largest;
  Buffer<int> flags;

  LargeBuffers(const LargePlan& plan, std::int64_t batch)
      : work("work", batch * plan.work_doubles()),
        partial("partial", batch * plan.partial_doubles()),
        rotation("rotation", batch * plan.rotation_doubles()),
        sigma("sigma", batch * plan.side),
        largest("largest", batch),
        flags("flags", batch * plan.flags()) {
    largest.fill(0);
    flags.fill(0);
  }
  LargeSpace space() const {
    return {work.ptr(), partial.ptr(), rotation.ptr(), sigma.ptr(), largest.ptr(), flags.ptr()};
  }
};

// As spectrum.cpp watches, on the buffers of the executor.
bool rotated_in(const void* context, int sweep) {
  const auto& [buffers, plan, batch] =
      *static_cast<const std::tuple<const LargeBuffers*, LargePlan, std::int64_t>*>(context);
  bool any = false;
  for (std::int64_t b = 0; b < batch; ++b)
    any = any || buffers->flags.data()[b * plan.flags() + 2 + sweep] != 0;
  return any;
}

template <typename T>
void define_large(simt::py::module_& m) {
  m.def(
      "large_extremes",
      [](const Array<T>& a, double rank_rtol, double cluster_rtol, bool full_rank, int column_block,
         bool watched, std::uint64_t seed) {
        const std::int64_t batch = a.shape(0), n = a.shape(1), p = a.shape(2);
        const LargePlan plan = large_plan(n, p, column_block);
        const Buffer<const T> in = simt::input("a", a);
        const LargeBuffers buffers(plan, batch);
        const Results results(batch, n, p, false);
        const std::tuple<const LargeBuffers*, LargePlan, std::int64_t> context{
            &buffers, plan, batch};
        const Watch watch = watched ? Watch{rotated_in, &context} : Watch{};
        launch_large_extremes<T>(
            in.ptr(), batch, plan, buffers.space(),
            policy_for(n, p, rank_rtol, cluster_rtol, full_rank, false), results.outputs(),
            results.first_bad.ptr(), watch, simt::on({seed}));
        simt::py::dict out = results.to_dict();
        int sweeps = 0;
        for (int s = 0; s < kLargeSweeps; ++s)
          sweeps += buffers.flags.data()[2 + s];
        out["sweeps"] = sweeps;
        return out;
      },
      arg("a").noconvert(), arg("rank_rtol"), arg("cluster_rtol"), arg("full_rank") = false,
      arg("column_block") = kColumnBlock, arg("watched") = false, arg("seed") = 0);
  m.def(
      "large_gradient",
      [](const Array<T>& a, const simt::py::dict& forward, const simt::py::dict& grads,
         double rank_rtol, double cluster_rtol, bool full_rank, int column_block,
         std::uint64_t seed) {
        const std::int64_t batch = a.shape(0), n = a.shape(1), p = a.shape(2);
        const Stream stream = simt::on({seed});
        const LargePlan plan = large_plan(n, p, column_block);
        const Buffer<const T> in = simt::input("a", a);
        const Gradients gradients(forward, grads);
        const LargeBuffers buffers(plan, batch);
        Buffer<T> grad("grad", a.size());
        launch_gradient<T>(gradients.incoming(), in.ptr(), batch, n, p, grad.ptr(), stream);
        launch_large_cluster_gradient<T>(
            gradients.incoming(), in.ptr(), batch, plan, buffers.space(),
            policy_for(n, p, rank_rtol, cluster_rtol, full_rank, gradients.of_gram), grad.ptr(),
            Watch{}, stream);
        return simt::to_numpy(grad, {batch, n, p});
      },
      arg("a").noconvert(), arg("forward"), arg("grads"), arg("rank_rtol"), arg("cluster_rtol"),
      arg("full_rank") = false, arg("column_block") = kColumnBlock, arg("seed") = 0);
}

template <typename T>
void define_small(simt::py::module_& m) {
  m.def(
      "small_extremes",
      [](const Array<T>& a, double rank_rtol, double cluster_rtol, bool full_rank, bool of_gram,
         unsigned most_blocks, std::uint64_t seed, bool by_ends) {
        const std::int64_t batch = a.shape(0), n = a.shape(1), p = a.shape(2);
        const Stream stream = simt::on({seed});
        const SmallPlan plan = small_plan(n, p);
        unsigned grid = small_grid(plan, batch, stream);
        grid = grid < most_blocks ? grid : most_blocks;
        const Buffer<const T> in = simt::input("a", a);
        Buffer<double> work("work", grid * plan.work_doubles());
        const Results results(batch, n, p, of_gram);
        const Policy policy = policy_for(n, p, rank_rtol, cluster_rtol, full_rank, of_gram);
        const EndsPlan ends = ends_plan(n, p);
        const Buffer<double> parts("parts", ends_step(ends, batch) * ends.work_doubles());
        const bool tried = by_ends && launch_small_ends<T>(
                                          in.ptr(), batch, ends, policy, results.outputs(),
                                          parts.ptr(), results.first_bad.ptr(), stream);
        Array<bool> refused(batch);
        for (std::int64_t b = 0; b < batch; ++b)
          refused.mutable_data()[b] = !tried || results.rank.data()[b] < 0;
        launch_small_extremes<T>(
            in.ptr(), batch, plan, policy, results.outputs(), tried, work.ptr(), grid,
            results.first_bad.ptr(), stream);
        simt::py::dict out = results.to_dict();
        out["refused"] = refused;
        return out;
      },
      arg("a").noconvert(), arg("rank_rtol"), arg("cluster_rtol"), arg("full_rank") = false,
      arg("of_gram") = false, arg("most_blocks") = UINT_MAX, arg("seed") = 0,
      arg("by_ends") = true);
  m.def(
      "small_gradient",
      [](const Array<T>& a, const simt::py::dict& forward, const simt::py::dict& grads,
         double rank_rtol, double cluster_rtol, bool full_rank, std::uint64_t seed) {
        const std::int64_t batch = a.shape(0), n = a.shape(1), p = a.shape(2);
        const Stream stream = simt::on({seed});
        const SmallPlan plan = small_plan(n, p);
        const unsigned grid = small_grid(plan, batch, stream);
        const Buffer<const T> in = simt::input("a", a);
        const Gradients gradients(forward, grads);
        Buffer<double> work("work", grid * plan.work_doubles());
        Buffer<T> grad("grad", a.size());
        launch_gradient<T>(gradients.incoming(), in.ptr(), batch, n, p, grad.ptr(), stream);
        launch_small_cluster_gradient<T>(
            gradients.incoming(), in.ptr(), batch, plan,
            policy_for(n, p, rank_rtol, cluster_rtol, full_rank, gradients.of_gram), work.ptr(),
            grid, grad.ptr(), stream);
        return simt::to_numpy(grad, {batch, n, p});
      },
      arg("a").noconvert(), arg("forward"), arg("grads"), arg("rank_rtol"), arg("cluster_rtol"),
      arg("full_rank") = false, arg("seed") = 0);
}

}  // namespace

SIMT_BINDINGS(spectrum, m) {
  define_small<float>(m);
  define_small<double>(m);
  define_large<float>(m);
  define_large<double>(m);
  m.def(
      "ends_fit",
      [](std::int64_t n, std::int64_t p, std::size_t device_limit) {
        return ends_fit(ends_plan(n, p), simt::on({0, device_limit}));
      },
      arg("n"), arg("p"), arg("device_limit"));
  m.def(
      "is_small",
      [](std::int64_t n, std::int64_t p, std::size_t device_limit) {
        return is_small(n, p, simt::on({0, device_limit}));
      },
      arg("n"), arg("p"), arg("device_limit") = simt::Device{}.shared_limit);
}
