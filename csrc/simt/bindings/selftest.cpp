// The kernels of selftest.cuh as functions of numpy arrays: immunize_ext_simt.selftest.
#include "../selftest.cuh"

#include <pybind11/stl.h>

#include <array>

#include "../numpy.h"

namespace {

using namespace immunize_ext::selftest;
using simt::Array;
using simt::Buffer;
using simt::py::arg;

using Floats = Array<float>;
using Ints = Array<int>;

unsigned to_unsigned(std::int64_t n) {
  return static_cast<unsigned>(n);
}

template <typename T>
void define_right_kernels(simt::py::module_& m) {
  m.def(
      "row_sum",
      [](const Array<T>& x, unsigned threads, std::uint64_t seed) {
        const std::int64_t rows = x.shape(0);
        const Buffer<const T> in = simt::input("x", x);
        Buffer<T> out("out", rows);
        launch_row_sum<T>(in.ptr(), out.ptr(), rows, x.shape(1), threads, Stream{seed});
        return simt::to_numpy(out, {rows});
      },
      arg("x").noconvert(), arg("threads") = 128, arg("seed") = 0);
  m.def(
      "transpose",
      [](const Array<T>& x, std::uint64_t seed) {
        const Buffer<const T> in = simt::input("x", x);
        Buffer<T> out("out", x.size());
        launch_transpose<T>(
            in.ptr(), out.ptr(), static_cast<int>(x.shape(0)), static_cast<int>(x.shape(1)),
            Stream{seed});
        return simt::to_numpy(out, {x.shape(1), x.shape(0)});
      },
      arg("x").noconvert(), arg("seed") = 0);
}

// A kernel (x, out), run by one block with a thread for each element of x; out has `per_thread`
// elements for each.
template <typename T>
void define_one_block(
    simt::py::module_& m,
    const simt::Kernel<simt::GlobalPtr<const T>, simt::GlobalPtr<T>>& kernel,
    const char* name,
    std::int64_t per_thread = 1) {
  m.def(
      name,
      [kernel, per_thread](const Array<T>& x, std::uint64_t seed) {
        const Buffer<const T> in = simt::input("x", x);
        Buffer<T> out("out", per_thread * x.size());
        simt::launch(kernel, 1, to_unsigned(x.size()), 0, Stream{seed}, in.ptr(), out.ptr());
        return simt::to_numpy(out, {per_thread, x.size()});
      },
      arg("x").noconvert(), arg("seed") = 0);
}

// A kernel (out), run by one block with a thread for each of n elements.
void define_output_only(
    simt::py::module_& m, const simt::Kernel<simt::GlobalPtr<float>>& kernel, const char* name) {
  m.def(
      name,
      [kernel](std::int64_t n, std::uint64_t seed) {
        Buffer<float> out("out", n);
        simt::launch(kernel, 1, to_unsigned(n), 0, Stream{seed}, out.ptr());
        return simt::to_numpy(out, {n});
      },
      arg("n"), arg("seed") = 0);
}

template <bool fence>
float run_last_block_sum(const Floats& x, std::uint64_t seed) {
  const std::int64_t blocks = x.size() / 32;
  const Buffer<const float> in = simt::input("x", x);
  Buffer<float> partial("partial", blocks);
  Buffer<int> counter("counter", 1);
  counter.fill(0);
  Buffer<float> out("out", 1);
  simt::launch(
      SIMT_KERNEL(last_block_sum<fence>), to_unsigned(blocks), 32, 0, Stream{seed}, in.ptr(),
      partial.ptr(), counter.ptr(), out.ptr());
  return out.data()[0];
}

// The last of 2^25 rows of out, or all of a few; returns the last element.
template <typename Kernel, typename Index>
bool run_rows(const Kernel& kernel, std::int64_t rows, Index columns, std::size_t blocks) {
  Stream stream;
  stream.blocks = blocks;
  const Buffer<float> out("out", rows * columns);
  simt::launch(
      kernel, to_unsigned(rows), static_cast<unsigned>(columns), 0, stream, out.ptr(), columns);
  return out.is_written(rows * columns - 1);
}

// x and out of the kernel are one buffer.
template <typename Kernel>
Floats run_in_place(const Kernel& kernel, const Floats& x) {
  Buffer<float> both("both", 2 * x.size());
  std::copy_n(x.data(), x.size(), both.data());
  both.fill(1.0F);
  simt::launch(kernel, 1, to_unsigned(x.size()), 0, Stream{}, both.ptr(), both.ptr());
  return simt::to_numpy(both, {2 * x.size()});
}

}  // namespace

SIMT_BINDINGS(selftest, m) {
  define_right_kernels<float>(m);
  define_right_kernels<double>(m);
  define_one_block<int>(m, SIMT_KERNEL(collectives), "collectives", 10);
  define_one_block<float>(m, SIMT_KERNEL(reverse_warp<true>), "reverse_warp");
  define_one_block<float>(m, SIMT_KERNEL(reverse_warp<false>), "missing_syncwarp");
  define_one_block<float>(m, SIMT_KERNEL(missing_barrier), "missing_barrier");
  define_one_block<float>(m, SIMT_KERNEL(missing_second_barrier), "missing_second_barrier", 2);
  define_one_block<float>(m, SIMT_KERNEL(out_of_bounds_read), "out_of_bounds_read");
  define_one_block<float>(m, SIMT_KERNEL(uninitialised_global), "uninitialised_global");
  define_one_block<float>(m, SIMT_KERNEL(uninitialised_shared), "uninitialised_shared");
  define_output_only(m, SIMT_KERNEL(divergent_barrier), "divergent_barrier");
  define_output_only(m, SIMT_KERNEL(divergent_shuffle), "divergent_shuffle");
  define_output_only(m, SIMT_KERNEL(shuffle_from_absent_lane), "shuffle_from_absent_lane");
  define_output_only(m, SIMT_KERNEL(out_of_bounds_write), "out_of_bounds_write");
  define_output_only(m, SIMT_KERNEL(unwritten_output), "unwritten_output");
  m.def("last_block_sum", &run_last_block_sum<true>, arg("x").noconvert(), arg("seed") = 0);
  m.def("missing_fence", &run_last_block_sum<false>, arg("x").noconvert(), arg("seed") = 0);

  m.def(
      "scale_packs",
      [](const Floats& x, float scale, std::int64_t shift, std::uint64_t seed) {
        const Buffer<const float> in = simt::input("x", x, shift);
        Buffer<float> out("out", x.size());
        const unsigned blocks = to_unsigned(x.size() / 4 + 31) / 32;
        simt::launch(
            SIMT_KERNEL(scale_packs), blocks, 32, 0, Stream{seed}, in.ptr(), out.ptr(), scale,
            x.size());
        return simt::to_numpy(out, {x.size()});
      },
      arg("x").noconvert(), arg("scale"), arg("shift") = 0, arg("seed") = 0);
  m.def(
      "histogram",
      [](const Ints& x, std::int64_t bins, std::uint64_t seed) {
        const Buffer<const int> in = simt::input("x", x);
        Buffer<int> counts("counts", bins);
        counts.fill(0);
        Buffer<int> largest("largest", 1);
        largest.fill(-1);
        const unsigned blocks = to_unsigned(x.size() + 63) / 64;
        simt::launch(
            SIMT_KERNEL(histogram), blocks, 64, 0, Stream{seed}, in.ptr(), counts.ptr(),
            largest.ptr(), x.size());
        return simt::py::make_tuple(simt::to_numpy(counts, {bins}), largest.data()[0]);
      },
      arg("x").noconvert(), arg("bins"), arg("seed") = 0);
  m.def(
      "atomic_float_sum",
      [](const Floats& x, std::uint64_t seed) {
        const Buffer<const float> in = simt::input("x", x);
        Buffer<float> out("out", 1);
        out.fill(0);
        simt::launch(
            SIMT_KERNEL(atomic_float_sum), to_unsigned(x.size() / 32), 32, 0, Stream{seed},
            in.ptr(), out.ptr());
        return out.data()[0];
      },
      arg("x").noconvert(), arg("seed") = 0);
  m.def(
      "barrier_after_exit",
      [](std::int64_t threads, unsigned n, std::uint64_t seed) {
        Buffer<float> out("out", threads);
        simt::launch(
            SIMT_KERNEL(barrier_after_exit), 1, to_unsigned(threads), 0, Stream{seed}, out.ptr(),
            n);
      },
      arg("threads"), arg("n"), arg("seed") = 0);
  m.def(
      "race_between_blocks",
      [](unsigned blocks, std::uint64_t seed) {
        Buffer<int> out("out", 1);
        simt::launch(SIMT_KERNEL(race_between_blocks), blocks, 1, 0, Stream{seed}, out.ptr());
        return out.data()[0];
      },
      arg("blocks"), arg("seed") = 0);
  m.def(
      "atomic_and_plain",
      [](unsigned threads, std::uint64_t seed) {
        Buffer<int> out("out", 1);
        out.fill(0);
        simt::launch(SIMT_KERNEL(atomic_and_plain), 1, threads, 0, Stream{seed}, out.ptr());
      },
      arg("threads"), arg("seed") = 0);
  m.def(
      "local_array_overflow",
      [](const Ints& x, int last) {
        const Buffer<const int> in = simt::input("x", x);
        Buffer<int> out("out", 1);
        simt::launch(
            SIMT_KERNEL(local_array_overflow), 1, 1, 0, Stream{}, in.ptr(), out.ptr(), last);
        return out.data()[0];
      },
      arg("x").noconvert(), arg("last"));
  m.def(
      "index_overflow",
      [](int rows, int columns) {
        Buffer<int> out("out", 1);
        simt::launch(SIMT_KERNEL(index_overflow), 1, 1, 0, Stream{}, out.ptr(), rows, columns);
        return out.data()[0];
      },
      arg("rows"), arg("columns"));
  m.def(
      "dynamic_shared",
      [](std::size_t bytes, std::size_t device_limit) {
        Buffer<float> out("out", 1);
        simt::launch(
            SIMT_KERNEL(use_dynamic_shared), 1, 1, bytes, Stream{0, device_limit}, out.ptr());
      },
      arg("bytes"), arg("device_limit") = Stream{}.shared_limit);
  m.def(
      "plain_maximum",
      [](const Ints& x, std::uint64_t seed) {
        const Buffer<const int> in = simt::input("x", x);
        Buffer<int> largest("largest", 1);
        largest.fill(-1);
        simt::launch(
            SIMT_KERNEL(plain_maximum), to_unsigned(x.size()), 1, 0, Stream{seed}, in.ptr(),
            largest.ptr());
        return largest.data()[0];
      },
      arg("x").noconvert(), arg("seed") = 0);
  m.def(
      "too_many_threads",
      [](unsigned threads) {
        simt::launch(SIMT_KERNEL(too_many_threads), 1, threads, 0, Stream{});
      },
      arg("threads"));
  m.def(
      "bound_of_a_template",
      [](unsigned threads) {
        const Buffer<double> out("out", threads);
        simt::launch(SIMT_KERNEL(bound_of_a_template<double>), 1, threads, 0, Stream{}, out.ptr());
      },
      arg("threads"));
  m.def("narrow_index", [](std::int64_t rows, int columns, std::size_t blocks) {
    return run_rows(SIMT_KERNEL(narrow_index<int>), rows, columns, blocks);
  });
  m.def("unsigned_index", [](std::int64_t rows, unsigned columns, std::size_t blocks) {
    return run_rows(SIMT_KERNEL(narrow_index<unsigned>), rows, columns, blocks);
  });
  m.def("wide_index", [](std::int64_t rows, std::int64_t columns, std::size_t blocks) {
    return run_rows(SIMT_KERNEL(wide_index), rows, columns, blocks);
  });
  m.def("written_before_read", [](const Floats& x) {
    return run_in_place(SIMT_KERNEL(written_before_read), x);
  });
  m.def("read_before_written", [](const Floats& x) {
    return run_in_place(SIMT_KERNEL(read_before_written), x);
  });
  m.def("batch_in_y", [](std::int64_t batch, std::int64_t rows, std::size_t blocks) {
    Stream stream;
    stream.blocks = blocks;
    const Buffer<float> out("out", batch * rows);
    launch_batch_in_y(out.ptr(), batch, rows, stream);
  });
  m.def("spin", [](unsigned threads) {
    Buffer<int> flag("flag", 1);
    flag.fill(0);
    simt::launch(SIMT_KERNEL(spin), 1, threads, 0, Stream{}, flag.ptr());
  });
  m.def("endless_barriers", [](unsigned threads) {
    simt::launch(SIMT_KERNEL(endless_barriers), 1, threads, 0, Stream{});
  });
  m.def(
      "launch_empty_kernel",
      [](const std::array<unsigned, 3>& grid, const std::array<unsigned, 3>& block) {
        simt::launch(
            SIMT_KERNEL(empty_kernel), dim3(grid[0], grid[1], grid[2]),
            dim3(block[0], block[1], block[2]), 0, Stream{});
      },
      arg("grid"), arg("block"));
  m.def(
      "barriers",
      [](unsigned blocks, unsigned threads, int count, std::uint64_t seed) {
        simt::launch(SIMT_KERNEL(many_barriers), blocks, threads, 0, Stream{seed}, count);
      },
      arg("blocks"), arg("threads"), arg("count"), arg("seed") = 0);
}
