// PTX programs and what runs them: parse.py reads them, interpreter.h gives instructions a meaning.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "../executor.h"

namespace simt::ptx {

struct Frame;
struct Instruction;
using Handler = void (*)(Frame&, const Instruction&);

// The slots that every thread starts with, as SPECIAL of parse.py; parameters follow.
enum Special {
  kSink,
  kTid,
  kNtid = kTid + 3,
  kCtaid = kNtid + 3,
  kNctaid = kCtaid + 3,
  kLane = kNctaid + 3
};
constexpr int kFirstParameter = kLane + 1;
constexpr int kMostOperands = 6;

struct Instruction {
  Handler run = nullptr;
  int slots[kMostOperands] = {};
  int count = 0;
  std::int64_t offset = 0;  // of an address; of a branch, where it goes
  int guard = -1;
  bool negated = false;
  int number = 0;                            // among all instructions, for places and counts
  mutable detail::Region* region = nullptr;  // where it found its address last
};

struct Program {
  std::string name;
  std::vector<int> parameters;  // bytes
  unsigned max_threads = 0;
  std::vector<std::pair<std::string, std::int64_t>> shared;  // static arrays
  std::vector<std::pair<int, std::uint64_t>> constants;      // slot, bits
  int slots = 0;
  std::vector<Instruction> code;
};

// A thread: its slots hold registers of any type in their low bits.
struct Frame {
  const Program& program;
  std::uint64_t* slots;
  std::size_t next = 0;
  bool done = false;
};

// Where an instruction stands in the CUDA sources.
struct Line {
  std::string file;
  int line;
};
inline std::vector<Line> lines;  // by Instruction::number

inline detail::Site site(const Instruction& i) {
  const Line& place = lines[static_cast<std::size_t>(i.number)];
  return {place.file.c_str(), place.line};
}

// Throws, naming the place, if there is no such instruction.
Handler find_handler(const std::string& name);

// The running thread executes `program`; `arguments` are the bytes of its parameters.
void run_thread(const Program& program, void* const* arguments);

}  // namespace simt::ptx
