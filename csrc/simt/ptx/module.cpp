// The Python module immunize_ext_ptx: the binding files over launchers and kernels that nvcc
// compiled, and launches of programs by name. Built by build.py for tests only.
#include <pybind11/stl.h>

#include <array>

#include "../numpy.h"
#include "counters.h"
#include "runtime.h"

namespace {

using namespace simt::ptx;
namespace py = simt::py;
using py::arg;

// name, slots, offset, guard, negated, file, line; and a program: see parse.py.
using Code = std::tuple<std::string, std::vector<int>, std::int64_t, int, bool, std::string, int>;
using Parsed = std::tuple<
    std::string,
    std::vector<int>,
    unsigned,
    std::vector<std::pair<std::string, std::int64_t>>,
    std::vector<std::pair<int, std::uint64_t>>,
    int,
    std::vector<Code>>;

Instruction instruction(const Code& parsed, const std::string& kernel) {
  const auto& [name, slots, offset, guard, negated, file, line] = parsed;
  Instruction i;
  i.run = find_handler(name);
  if (i.run == nullptr || slots.size() > kMostOperands) {
    throw py::value_error("unknown PTX instruction " + name + " in " + kernel);
  }
  std::copy(slots.begin(), slots.end(), i.slots);
  i.count = static_cast<int>(slots.size());
  i.offset = offset;
  i.guard = guard;
  i.negated = negated;
  i.number = static_cast<int>(lines.size());
  lines.push_back({file, line});
  return i;
}

void load(const std::vector<Parsed>& parsed) {
  std::vector<Program> programs;
  for (const auto& [name, parameters, max_threads, shared, constants, slots, code] : parsed) {
    Program program{name, parameters, max_threads, shared, constants, slots, {}};
    for (const Code& one : code) {
      program.code.push_back(instruction(one, name));
    }
    programs.push_back(std::move(program));
  }
  add_programs(std::move(programs));
}

// `arguments` are bytes of scalars and arrays; arrays are copied to buffers and back, so that the
// kernel's results stand in them. Those of `unwritten` start as buffers that nobody wrote.
void launch(
    const std::string& kernel,
    const std::array<unsigned, 3>& grid,
    const std::array<unsigned, 3>& block,
    std::size_t shared_bytes,
    const py::list& arguments,
    const std::vector<std::size_t>& unwritten,
    std::uint64_t seed) {
  simt::Device device;
  device.seed = seed;
  set_device(device);
  std::vector<std::string> scalars(arguments.size());
  std::vector<void*> addresses(arguments.size()), pointers;
  std::vector<std::pair<py::array, void*>> arrays;
  for (std::size_t a = 0; a < arguments.size(); ++a) {
    if (py::isinstance<py::bytes>(arguments[a])) {
      scalars[a] = arguments[a].cast<std::string>();
      pointers.push_back(scalars[a].data());
      continue;
    }
    const auto array = arguments[a].cast<py::array>();
    const bool starts = std::find(unwritten.begin(), unwritten.end(), a) == unwritten.end();
    addresses[a] = allocate(
        "argument " + std::to_string(a), array.nbytes(), static_cast<std::size_t>(array.itemsize()),
        true, 0, starts ? array.data() : nullptr);
    arrays.emplace_back(array, addresses[a]);
    pointers.push_back(&addresses[a]);
  }
  const auto finish = [&arrays] {
    for (auto& [array, address] : arrays) {
      std::memcpy(array.mutable_data(), address, static_cast<std::size_t>(array.nbytes()));
      release(address);
    }
  };
  try {
    launch_by_name(
        kernel, dim3(grid[0], grid[1], grid[2]), dim3(block[0], block[1], block[2]), shared_bytes,
        pointers.data());
  } catch (...) {
    finish();
    throw;
  }
  finish();
}

py::list take_counts() {
  py::list result;
  for (const Record& record : counters.records) {
    py::dict row;
    row["kernel"] = record.kernel;
    row["blocks"] = record.blocks;
    row["threads"] = record.threads;
    row["dynamic_shared"] = record.dynamic_shared;
    row["sectors"] = record.global.moved;
    row["least_sectors"] = record.global.least;
    row["wavefronts"] = record.shared.moved;
    row["least_wavefronts"] = record.shared.least;
    row["barriers"] = record.barriers;
    result.append(row);
  }
  counters.records.clear();
  return result;
}

}  // namespace

PYBIND11_MODULE(immunize_ext_ptx, m) {
  m.doc() = "Runs the PTX of the CUDA kernels of immunize_ext on the CPU, with checks.";
  py::register_local_exception<simt::Error>(m, "SimtError", PyExc_RuntimeError);
  py::register_local_exception<simt::LaunchError>(m, "LaunchError", PyExc_RuntimeError);
  m.def("load", &load, arg("programs"), "Add programs of parse.py to those that can be launched.");
  m.def(
      "launch", &launch, arg("kernel"), arg("grid"), arg("block"), arg("shared_bytes"),
      arg("arguments"), arg("unwritten") = std::vector<std::size_t>{}, arg("seed") = 0);
  m.def("shared_limits", &shared_limits);
  m.def("count", [](bool enabled) { counters.enabled = enabled; }, arg("enabled"));
  m.def("take_counts", &take_counts, "Return what the launches since the last call cost.");
  for (const simt::Bindings& bindings : simt::all_bindings()) {
    py::module_ submodule = m.def_submodule(bindings.stem);
    bindings.define(submodule);
  }
}
