// What the PTX instructions mean, by name: those that nvcc makes of the kernels of this project. A
// name that is not here stops the load of a program.
//
// Arithmetic is that of the CPU where PTX says the same: IEEE 754 to nearest, integers modulo
// 2^bits. Source: NVIDIA, Parallel Thread Execution ISA 9.0.
#include <alloca.h>

#include <cmath>
#include <limits>
#include <type_traits>
#include <unordered_map>

#include "../cuda_names.h"
#include "address_space.h"

namespace simt::ptx {
namespace {

// --- Slots ----------------------------------------------------------------------------------------

template <typename T>
T get(const Frame& f, int slot) {
  T value;
  std::memcpy(&value, &f.slots[slot], sizeof(T));
  return value;
}
template <>
bool get<bool>(const Frame& f, int slot) {
  return (f.slots[slot] & 1) != 0;
}

// Signed numbers are extended: a register may be wider than what is loaded into it.
template <typename T>
void put(Frame& f, int slot, T value) {
  std::uint64_t bits = 0;
  if constexpr (std::is_integral_v<T> && std::is_signed_v<T>) {
    bits = static_cast<std::uint64_t>(static_cast<std::int64_t>(value));
  } else {
    std::memcpy(&bits, &value, sizeof(T));
  }
  f.slots[slot] = bits;
}

template <typename T>
T in(const Frame& f, const Instruction& i, int operand) {
  return get<T>(f, i.slots[operand]);
}

// --- Operations -----------------------------------------------------------------------------------

template <typename T>
using Unsigned = typename std::
    conditional_t<std::is_integral_v<T>, std::make_unsigned<T>, std::common_type<T>>::type;

// Integers wrap.
#define SIMT_WRAPPING(name, op)                                      \
  struct name {                                                      \
    template <typename T>                                            \
    T operator()(T a, T b) const {                                   \
      using U = Unsigned<T>;                                         \
      return static_cast<T>(static_cast<U>(a) op static_cast<U>(b)); \
    }                                                                \
  };
SIMT_WRAPPING(Add, +)
SIMT_WRAPPING(Sub, -)
#undef SIMT_WRAPPING

struct Mul {
  template <typename T>
  T operator()(T a, T b) const {
    if constexpr (std::is_integral_v<T>) {
      // In 64 bits: two uint16_t would be multiplied as int.
      return static_cast<T>(static_cast<std::uint64_t>(a) * static_cast<std::uint64_t>(b));
    } else {
      return a * b;
    }
  }
};
struct Div {
  template <typename T>
  T operator()(T a, T b) const {
    if (std::is_integral_v<T> && b == T(0)) {
      detail::fail("division by zero");
    }
    return static_cast<T>(a / b);
  }
};
struct Rem {
  template <typename T>
  T operator()(T a, T b) const {
    if (b == T(0)) {
      detail::fail("division by zero");
    }
    return static_cast<T>(a % b);
  }
};
// Of a number and NaN, the number.
struct Min {
  template <typename T>
  T operator()(T a, T b) const {
    if constexpr (std::is_floating_point_v<T>) {
      return std::fmin(a, b);
    } else {
      return b < a ? b : a;
    }
  }
};
struct Max {
  template <typename T>
  T operator()(T a, T b) const {
    if constexpr (std::is_floating_point_v<T>) {
      return std::fmax(a, b);
    } else {
      return a < b ? b : a;
    }
  }
};
struct And {
  template <typename T>
  T operator()(T a, T b) const {
    return static_cast<T>(a & b);
  }
};
struct Or {
  template <typename T>
  T operator()(T a, T b) const {
    return static_cast<T>(a | b);
  }
};
struct Xor {
  template <typename T>
  T operator()(T a, T b) const {
    return static_cast<T>(a ^ b);
  }
};
struct CopySign {  // PTX names the sign first
  template <typename T>
  T operator()(T sign, T size) const {
    return std::copysign(size, sign);
  }
};
struct Exchange {
  template <typename T>
  T operator()(T, T b) const {
    return b;
  }
};

struct Not {
  template <typename T>
  T operator()(T a) const {
    if constexpr (std::is_same_v<T, bool>) {
      return !a;
    } else {
      return static_cast<T>(~a);
    }
  }
};
struct Neg {
  template <typename T>
  T operator()(T a) const {
    if constexpr (std::is_integral_v<T>) {
      return Sub()(T(0), a);
    } else {
      return -a;
    }
  }
};
struct Abs {
  template <typename T>
  T operator()(T a) const {
    if constexpr (std::is_integral_v<T>) {
      return a < 0 ? Sub()(T(0), a) : a;
    } else {
      return std::fabs(a);
    }
  }
};
struct Sqrt {
  template <typename T>
  T operator()(T a) const {
    return std::sqrt(a);
  }
};
struct Reciprocal {
  template <typename T>
  T operator()(T a) const {
    return T(1) / a;
  }
};
struct Same {
  template <typename T>
  T operator()(T a) const {
    return a;
  }
};

template <typename T>
constexpr unsigned kBits = 8 * sizeof(T);

// --- Handlers -------------------------------------------------------------------------------------

template <typename T, typename Op>
void unary(Frame& f, const Instruction& i) {
  put<T>(f, i.slots[0], Op()(in<T>(f, i, 1)));
}
template <typename T, typename Op>
void binary(Frame& f, const Instruction& i) {
  put<T>(f, i.slots[0], Op()(in<T>(f, i, 1), in<T>(f, i, 2)));
}
template <typename T>
void fused(Frame& f, const Instruction& i) {
  put<T>(f, i.slots[0], std::fma(in<T>(f, i, 1), in<T>(f, i, 2), in<T>(f, i, 3)));
}
template <typename T>
void multiply_add(Frame& f, const Instruction& i) {
  put<T>(f, i.slots[0], Add()(Mul()(in<T>(f, i, 1), in<T>(f, i, 2)), in<T>(f, i, 3)));
}
template <typename T, typename Wide, bool add>
void multiply_wide(Frame& f, const Instruction& i) {
  const Wide product = static_cast<Wide>(in<T>(f, i, 1)) * static_cast<Wide>(in<T>(f, i, 2));
  put<Wide>(f, i.slots[0], add ? Add()(product, in<Wide>(f, i, 3)) : product);
}
template <typename T, typename Wide>
void multiply_high(Frame& f, const Instruction& i) {
  const Wide product = static_cast<Wide>(in<T>(f, i, 1)) * static_cast<Wide>(in<T>(f, i, 2));
  put<T>(f, i.slots[0], static_cast<T>(product >> kBits<T>));
}
template <typename T, bool left>
void shift(Frame& f, const Instruction& i) {
  const T value = in<T>(f, i, 1);
  const std::uint32_t by = in<std::uint32_t>(f, i, 2);
  if (left) {
    put<T>(
        f, i.slots[0],
        by >= kBits<T> ? T(0) : static_cast<T>(static_cast<std::uint64_t>(value) << by));
  } else {
    const std::uint32_t most = kBits<T> - 1;
    put<T>(
        f, i.slots[0],
        by > most ? static_cast<T>(std::is_signed_v<T> && value < 0 ? -1 : 0)
                  : static_cast<T>(value >> by));
  }
}
template <typename T>
void select(Frame& f, const Instruction& i) {
  put<T>(f, i.slots[0], in<bool>(f, i, 3) ? in<T>(f, i, 1) : in<T>(f, i, 2));
}

enum class Compare { kEq, kNe, kLt, kLe, kGt, kGe };
// `unordered`: true if one of them is NaN.
template <typename T, Compare compare, bool unordered>
void set_predicate(Frame& f, const Instruction& i) {
  const T a = in<T>(f, i, 1), b = in<T>(f, i, 2);
  bool result = false;
  switch (compare) {
    case Compare::kEq:
      result = a == b;
      break;
    case Compare::kNe:
      result = a < b || a > b;
      break;
    case Compare::kLt:
      result = a < b;
      break;
    case Compare::kLe:
      result = a <= b;
      break;
    case Compare::kGt:
      result = a > b;
      break;
    case Compare::kGe:
      result = a >= b;
      break;
  }
  put<bool>(f, i.slots[0], result || (unordered && (a != a || b != b)));
}

template <typename To, typename From>
void convert(Frame& f, const Instruction& i) {
  put<To>(f, i.slots[0], static_cast<To>(in<From>(f, i, 1)));
}
// Toward zero, to the nearest end of the range where there is no such integer; NaN gives 0.
template <typename To, typename From>
void truncate(Frame& f, const Instruction& i) {
  const From value = in<From>(f, i, 1);
  const auto least = static_cast<From>(std::numeric_limits<To>::min());
  const auto most = static_cast<From>(std::numeric_limits<To>::max());
  To result = 0;
  if (value >= most) {
    result = std::numeric_limits<To>::max();
  } else if (value <= least) {
    result = std::numeric_limits<To>::min();
  } else if (value == value) {
    result = static_cast<To>(value);
  }
  put<To>(f, i.slots[0], result);
}
void widen_half(Frame& f, const Instruction& i) {
  put<float>(f, i.slots[0], static_cast<float>(in<_Float16>(f, i, 1)));
}
void narrow_half(Frame& f, const Instruction& i) {
  put<_Float16>(f, i.slots[0], static_cast<_Float16>(in<float>(f, i, 1)));
}
void widen_bfloat16(Frame& f, const Instruction& i) {
  put<std::uint32_t>(f, i.slots[0], static_cast<std::uint32_t>(in<std::uint16_t>(f, i, 1)) << 16);
}
void narrow_bfloat16(Frame& f, const Instruction& i) {
  const float value = in<float>(f, i, 1);
  const std::uint32_t bits = in<std::uint32_t>(f, i, 1);
  // To nearest, ties to even.
  const std::uint32_t rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
  put<std::uint16_t>(f, i.slots[0], static_cast<std::uint16_t>(value != value ? 0x7FFF : rounded));
}

template <typename T>
void pack(Frame& f, const Instruction& i) {
  std::uint64_t bits = 0;
  for (int k = 1; k < i.count; ++k) {
    bits |= static_cast<std::uint64_t>(in<T>(f, i, k)) << ((k - 1) * static_cast<int>(kBits<T>));
  }
  put<std::uint64_t>(f, i.slots[0], bits);
}
template <typename T>
void unpack(Frame& f, const Instruction& i) {
  const std::uint64_t bits = in<std::uint64_t>(f, i, i.count - 1);
  for (int k = 0; k + 1 < i.count; ++k) {
    put<T>(f, i.slots[k], static_cast<T>(bits >> (k * static_cast<int>(kBits<T>))));
  }
}

template <typename T>
void count_leading_zeros(Frame& f, const Instruction& i) {
  const T value = in<T>(f, i, 1);
  std::uint32_t zeros = 0;
  while (zeros < kBits<T> && (value >> (kBits<T> - 1 - zeros) & 1) == 0) {
    ++zeros;
  }
  put<std::uint32_t>(f, i.slots[0], zeros);
}
template <typename T>
void count_bits(Frame& f, const Instruction& i) {
  put<std::uint32_t>(
      f, i.slots[0], static_cast<std::uint32_t>(__builtin_popcountll(in<T>(f, i, 1))));
}
// The low bits of a, put into b at a position.
template <typename T>
void insert_bits(Frame& f, const Instruction& i) {
  const T a = in<T>(f, i, 1), b = in<T>(f, i, 2);
  const std::uint32_t position = in<std::uint32_t>(f, i, 3) & 0xFF;
  const std::uint32_t length = in<std::uint32_t>(f, i, 4) & 0xFF;
  T result = b;
  for (std::uint32_t bit = 0; bit < length && position + bit < kBits<T>; ++bit) {
    const T at = T(1) << (position + bit);
    result = (a >> bit & 1) != 0 ? result | at : result & ~at;
  }
  put<T>(f, i.slots[0], result);
}

// --- Memory ---------------------------------------------------------------------------------------

constexpr int kWidest = 4;

template <Where where, typename T>
void load_from(Frame& f, const Instruction& i) {
  const int elements = i.count - 1;
  const std::uint64_t address =
      in<std::uint64_t>(f, i, elements) + static_cast<std::uint64_t>(i.offset);
  T values[kWidest];
  load<where>(f, i, address, sizeof(T) * static_cast<std::size_t>(elements), values);
  for (int k = 0; k < elements; ++k) {
    put<T>(f, i.slots[k], values[k]);
  }
}
template <Where where, typename T>
void store_to(Frame& f, const Instruction& i) {
  const int elements = i.count - 1;
  const std::uint64_t address = in<std::uint64_t>(f, i, 0) + static_cast<std::uint64_t>(i.offset);
  T values[kWidest];
  for (int k = 0; k < elements; ++k) {
    values[k] = in<T>(f, i, k + 1);
  }
  store<where>(f, i, address, sizeof(T) * static_cast<std::size_t>(elements), values);
}
template <typename T>
void load_parameter(Frame& f, const Instruction& i) {
  const int elements = i.count - 1;
  const char* from = reinterpret_cast<const char*>(in<std::uint64_t>(f, i, elements)) + i.offset;
  for (int k = 0; k < elements; ++k) {
    T value;
    std::memcpy(&value, from + static_cast<std::size_t>(k) * sizeof(T), sizeof(T));
    put<T>(f, i.slots[k], value);
  }
}
template <Where where, typename T, typename Op>
void atomic_to(Frame& f, const Instruction& i) {
  const T value = in<T>(f, i, 2);
  const std::uint64_t address = in<std::uint64_t>(f, i, 1) + static_cast<std::uint64_t>(i.offset);
  put<T>(
      f, i.slots[0], atomic<where, T>(f, i, address, [value](T old) { return Op()(old, value); }));
}

// --- Control --------------------------------------------------------------------------------------

void branch(Frame& f, const Instruction& i) {
  f.next = static_cast<std::size_t>(i.offset);
}
void leave(Frame& f, const Instruction&) {
  f.done = true;
}
// A hint, without effect on the numbers.
void prefetch(Frame&, const Instruction&) {}

void fence(Frame&, const Instruction&) {
  __threadfence();
}
void barrier(Frame&, const Instruction& i) {
  detail::arrive(detail::Collective::kSyncthreads, 0, 0, 0, site(i));
  counters.passed_barrier();
}
template <detail::Collective kind>
void reducing_barrier(Frame& f, const Instruction& i) {
  const std::uint64_t vote = in<bool>(f, i, 2) ? 1 : 0;
  put<bool>(f, i.slots[0], detail::arrive(kind, 0, vote, 0, site(i)) != 0);
  counters.passed_barrier();
}
void warp_barrier(Frame& f, const Instruction& i) {
  detail::arrive(detail::Collective::kSyncwarp, in<std::uint32_t>(f, i, 0), 0, 0, site(i));
}
void ballot(Frame& f, const Instruction& i) {
  // d, a, mask
  const std::uint64_t vote = in<bool>(f, i, 1) ? 1 : 0;
  const auto mask = in<std::uint32_t>(f, i, 2);
  put<std::uint32_t>(
      f, i.slots[0],
      static_cast<std::uint32_t>(
          detail::arrive(detail::Collective::kBallot, mask, vote, 0, site(i))));
  counters.passed_shuffle();
}

enum class Shuffle { kUp, kDown, kXor, kIndex };
template <Shuffle mode>
void shuffle(Frame& f, const Instruction& i) {
  // d | p, a, b, c, mask; c has the width of a segment in bits 8 to 12, the clamp in bits 0 to 4.
  const int lane = static_cast<int>(detail::active.current->lane());
  const int b = static_cast<int>(in<std::uint32_t>(f, i, 3) & 31);
  const int c = static_cast<int>(in<std::uint32_t>(f, i, 4));
  const int segment = c >> 8 & 31;
  const int end = (lane & segment) | (c & 31 & ~segment);
  int source = lane;
  switch (mode) {
    case Shuffle::kUp:
      source = lane - b;
      break;
    case Shuffle::kDown:
      source = lane + b;
      break;
    case Shuffle::kXor:
      source = lane ^ b;
      break;
    case Shuffle::kIndex:
      source = (lane & segment) | (b & ~segment);
      break;
  }
  const bool inside = mode == Shuffle::kUp ? source >= end : source <= end;
  const auto value = in<std::uint32_t>(f, i, 2);
  put<std::uint32_t>(
      f, i.slots[0],
      detail::shuffle(in<std::uint32_t>(f, i, 5), value, inside ? source : lane, site(i)));
  put<bool>(f, i.slots[1], inside);
  counters.passed_shuffle();
}

// --- The table ------------------------------------------------------------------------------------

using Table = std::unordered_map<std::string, Handler>;

template <Where where, typename T>
void add_memory(Table& t, const std::string& space, const std::string& type) {
  for (const char* vector : {"", "v2.", "v4."}) {
    t["ld." + space + vector + type] = &load_from<where, T>;
    if (where != Where::kReadOnly) {
      t["st." + space + vector + type] = &store_to<where, T>;
    }
  }
}
template <typename T>
void add_all_memory(Table& t, const std::string& type) {
  add_memory<Where::kGlobal, T>(t, "global.", type);
  add_memory<Where::kGlobal, T>(t, "", type);  // generic; shared memory is never addressed so
  add_memory<Where::kReadOnly, T>(t, "global.nc.", type);
  add_memory<Where::kShared, T>(t, "shared.", type);
  for (const char* vector : {"", "v2.", "v4."}) {
    t[std::string("ld.param.") + vector + type] = &load_parameter<T>;
  }
}

template <typename T, typename Op>
void add_atomic(Table& t, const std::string& op, const std::string& type) {
  t["atom.global." + op + "." + type] = &atomic_to<Where::kGlobal, T, Op>;
  t["atom.shared." + op + "." + type] = &atomic_to<Where::kShared, T, Op>;
}

template <typename T>
void add_comparisons(Table& t, const std::string& type) {
  t["setp.eq." + type] = &set_predicate<T, Compare::kEq, false>;
  // Of integers "ne" is that; of floating-point numbers it is false for NaN.
  t["setp.ne." + type] = &set_predicate<T, Compare::kNe, false>;
  t["setp.lt." + type] = &set_predicate<T, Compare::kLt, false>;
  t["setp.le." + type] = &set_predicate<T, Compare::kLe, false>;
  t["setp.gt." + type] = &set_predicate<T, Compare::kGt, false>;
  t["setp.ge." + type] = &set_predicate<T, Compare::kGe, false>;
}

template <typename T>
void add_moves(Table& t, const std::string& type) {
  t["mov." + type] = &unary<T, Same>;
  t["selp." + type] = &select<T>;
}

template <typename T>
void add_bits(Table& t, const std::string& type) {
  t["and." + type] = &binary<T, And>;
  t["or." + type] = &binary<T, Or>;
  t["xor." + type] = &binary<T, Xor>;
  t["not." + type] = &unary<T, Not>;
}

template <typename T>
void add_integer(Table& t, const std::string& type) {
  add_moves<T>(t, type);
  add_comparisons<T>(t, type);
  t["add." + type] = &binary<T, Add>;
  t["sub." + type] = &binary<T, Sub>;
  t["mul.lo." + type] = &binary<T, Mul>;
  t["mad.lo." + type] = &multiply_add<T>;
  t["div." + type] = &binary<T, Div>;
  t["rem." + type] = &binary<T, Rem>;
  t["min." + type] = &binary<T, Min>;
  t["max." + type] = &binary<T, Max>;
  t["shr." + type] = &shift<T, false>;
  if constexpr (std::is_signed_v<T>) {
    t["neg." + type] = &unary<T, Neg>;
    t["abs." + type] = &unary<T, Abs>;
  }
}

template <typename T>
void add_untyped(Table& t, const std::string& type) {
  add_bits<T>(t, type);
  add_moves<T>(t, type);
  t["setp.eq." + type] = &set_predicate<T, Compare::kEq, false>;
  t["setp.ne." + type] = &set_predicate<T, Compare::kNe, false>;
  t["shl." + type] = &shift<T, true>;
  t["shr." + type] = &shift<T, false>;
  if constexpr (sizeof(T) >= 4) {
    t["clz." + type] = &count_leading_zeros<T>;
    t["popc." + type] = &count_bits<T>;
    t["bfi." + type] = &insert_bits<T>;
  }
}

template <typename T>
void add_floating(Table& t, const std::string& type) {
  add_moves<T>(t, type);
  add_comparisons<T>(t, type);
  t["setp.equ." + type] = &set_predicate<T, Compare::kEq, true>;
  t["setp.neu." + type] = &set_predicate<T, Compare::kNe, true>;
  t["setp.ltu." + type] = &set_predicate<T, Compare::kLt, true>;
  t["setp.leu." + type] = &set_predicate<T, Compare::kLe, true>;
  t["setp.gtu." + type] = &set_predicate<T, Compare::kGt, true>;
  t["setp.geu." + type] = &set_predicate<T, Compare::kGe, true>;
  for (const char* rounding : {"", "rn."}) {
    t[std::string("add.") + rounding + type] = &binary<T, Add>;
    t[std::string("sub.") + rounding + type] = &binary<T, Sub>;
    t[std::string("mul.") + rounding + type] = &binary<T, Mul>;
  }
  t["fma.rn." + type] = &fused<T>;
  t["div.rn." + type] = &binary<T, Div>;
  t["rcp.rn." + type] = &unary<T, Reciprocal>;
  t["sqrt.rn." + type] = &unary<T, Sqrt>;
  t["abs." + type] = &unary<T, Abs>;
  t["neg." + type] = &unary<T, Neg>;
  t["min." + type] = &binary<T, Min>;
  t["max." + type] = &binary<T, Max>;
  t["copysign." + type] = &binary<T, CopySign>;
}

template <typename To>
void add_conversions(Table& t, const std::string& to) {
  t["cvt." + to + ".u8"] = &convert<To, std::uint8_t>;
  t["cvt." + to + ".s8"] = &convert<To, std::int8_t>;
  t["cvt." + to + ".u16"] = &convert<To, std::uint16_t>;
  t["cvt." + to + ".s16"] = &convert<To, std::int16_t>;
  t["cvt." + to + ".u32"] = &convert<To, std::uint32_t>;
  t["cvt." + to + ".s32"] = &convert<To, std::int32_t>;
  t["cvt." + to + ".u64"] = &convert<To, std::uint64_t>;
  t["cvt." + to + ".s64"] = &convert<To, std::int64_t>;
  if constexpr (std::is_integral_v<To> && sizeof(To) >= 4) {
    t["cvt.rzi." + to + ".f32"] = &truncate<To, float>;
    t["cvt.rzi." + to + ".f64"] = &truncate<To, double>;
  }
}
template <typename To>
void add_rounded_conversions(Table& t, const std::string& to) {
  t["cvt.rn." + to + ".u32"] = &convert<To, std::uint32_t>;
  t["cvt.rn." + to + ".s32"] = &convert<To, std::int32_t>;
  t["cvt.rn." + to + ".u64"] = &convert<To, std::uint64_t>;
  t["cvt.rn." + to + ".s64"] = &convert<To, std::int64_t>;
}

Table make_table() {
  Table t;
  add_integer<std::int16_t>(t, "s16");
  add_integer<std::uint16_t>(t, "u16");
  add_integer<std::int32_t>(t, "s32");
  add_integer<std::uint32_t>(t, "u32");
  add_integer<std::int64_t>(t, "s64");
  add_integer<std::uint64_t>(t, "u64");
  add_untyped<std::uint16_t>(t, "b16");
  add_untyped<std::uint32_t>(t, "b32");
  add_untyped<std::uint64_t>(t, "b64");
  add_bits<bool>(t, "pred");
  t["mov.pred"] = &unary<bool, Same>;
  add_floating<float>(t, "f32");
  add_floating<double>(t, "f64");

  add_conversions<std::int16_t>(t, "s16");
  add_conversions<std::uint16_t>(t, "u16");
  add_conversions<std::int32_t>(t, "s32");
  add_conversions<std::uint32_t>(t, "u32");
  add_conversions<std::int64_t>(t, "s64");
  add_conversions<std::uint64_t>(t, "u64");
  add_rounded_conversions<float>(t, "f32");
  add_rounded_conversions<double>(t, "f64");
  t["cvt.rn.f32.f64"] = &convert<float, double>;
  t["cvt.f64.f32"] = &convert<double, float>;
  t["cvt.f32.f16"] = &widen_half;
  t["cvt.rn.f16.f32"] = &narrow_half;
  t["cvt.f32.bf16"] = &widen_bfloat16;
  t["cvt.rn.bf16.f32"] = &narrow_bfloat16;
  t["cvta.to.global.u64"] = &unary<std::uint64_t, Same>;

  t["mul.wide.s16"] = &multiply_wide<std::int16_t, std::int32_t, false>;
  t["mul.wide.u16"] = &multiply_wide<std::uint16_t, std::uint32_t, false>;
  t["mul.wide.s32"] = &multiply_wide<std::int32_t, std::int64_t, false>;
  t["mul.wide.u32"] = &multiply_wide<std::uint32_t, std::uint64_t, false>;
  t["mad.wide.s32"] = &multiply_wide<std::int32_t, std::int64_t, true>;
  t["mad.wide.u32"] = &multiply_wide<std::uint32_t, std::uint64_t, true>;
  t["mul.hi.s32"] = &multiply_high<std::int32_t, std::int64_t>;
  t["mul.hi.u32"] = &multiply_high<std::uint32_t, std::uint64_t>;
  t["mul.hi.s64"] = &multiply_high<std::int64_t, __int128>;
  t["mul.hi.u64"] = &multiply_high<std::uint64_t, unsigned __int128>;
  t["mov.pack.b16"] = &pack<std::uint16_t>;
  t["mov.pack.b32"] = &pack<std::uint32_t>;
  t["mov.unpack.b16"] = &unpack<std::uint16_t>;
  t["mov.unpack.b32"] = &unpack<std::uint32_t>;

  add_all_memory<std::uint8_t>(t, "u8");
  add_all_memory<std::int8_t>(t, "s8");
  add_all_memory<std::uint8_t>(t, "b8");
  add_all_memory<std::uint16_t>(t, "u16");
  add_all_memory<std::int16_t>(t, "s16");
  add_all_memory<std::uint16_t>(t, "b16");
  add_all_memory<std::uint32_t>(t, "u32");
  add_all_memory<std::int32_t>(t, "s32");
  add_all_memory<std::uint32_t>(t, "b32");
  add_all_memory<std::uint64_t>(t, "u64");
  add_all_memory<std::int64_t>(t, "s64");
  add_all_memory<std::uint64_t>(t, "b64");
  add_all_memory<float>(t, "f32");
  add_all_memory<double>(t, "f64");
  add_atomic<std::int32_t, Add>(t, "add", "s32");
  add_atomic<std::uint32_t, Add>(t, "add", "u32");
  add_atomic<std::uint64_t, Add>(t, "add", "u64");
  add_atomic<float, Add>(t, "add", "f32");
  add_atomic<double, Add>(t, "add", "f64");
  add_atomic<std::int32_t, Min>(t, "min", "s32");
  add_atomic<std::int32_t, Max>(t, "max", "s32");
  add_atomic<std::uint32_t, Max>(t, "max", "u32");
  add_atomic<std::uint64_t, Max>(t, "max", "u64");
  add_atomic<std::uint32_t, Or>(t, "or", "b32");
  add_atomic<std::uint32_t, And>(t, "and", "b32");
  add_atomic<std::uint32_t, Exchange>(t, "exch", "b32");

  t["bra"] = &branch;
  t["ret"] = &leave;
  t["exit"] = &leave;
  t["prefetch.global.L2"] = &prefetch;
  t["membar.gl"] = &fence;
  t["fence.acq_rel.gpu"] = &fence;
  t["bar.sync"] = &barrier;
  t["barrier.sync"] = &barrier;
  t["bar.warp.sync"] = &warp_barrier;
  t["bar.red.or.pred"] = &reducing_barrier<detail::Collective::kSyncthreadsOr>;
  t["bar.red.and.pred"] = &reducing_barrier<detail::Collective::kSyncthreadsAnd>;
  t["vote.sync.ballot.b32"] = &ballot;
  t["shfl.sync.up.b32"] = &shuffle<Shuffle::kUp>;
  t["shfl.sync.down.b32"] = &shuffle<Shuffle::kDown>;
  t["shfl.sync.bfly.b32"] = &shuffle<Shuffle::kXor>;
  t["shfl.sync.idx.b32"] = &shuffle<Shuffle::kIndex>;
  return t;
}

}  // namespace

Handler find_handler(const std::string& name) {
  static const Table table = make_table();
  const auto found = table.find(name);
  return found == table.end() ? nullptr : found->second;
}

void run_thread(const Program& program, void* const* arguments) {
  const auto bytes = static_cast<std::size_t>(program.slots) * sizeof(std::uint64_t);
  auto* slots = static_cast<std::uint64_t*>(alloca(bytes));
  std::memset(slots, 0xFF, bytes);  // a register that nobody set is a huge number
  const auto set3 = [slots](int first, unsigned x, unsigned y, unsigned z) {
    slots[first] = x;
    slots[first + 1] = y;
    slots[first + 2] = z;
  };
  const detail::Launch& active = detail::active;
  const uint3& thread = active.current->index;
  set3(kTid, thread.x, thread.y, thread.z);
  set3(kNtid, active.block.x, active.block.y, active.block.z);
  set3(kCtaid, active.block_index.x, active.block_index.y, active.block_index.z);
  set3(kNctaid, active.grid.x, active.grid.y, active.grid.z);
  slots[kLane] = active.current->lane();
  for (std::size_t p = 0; p < program.parameters.size(); ++p) {
    slots[kFirstParameter + p] = reinterpret_cast<std::uint64_t>(arguments[p]);
  }
  for (const auto& [slot, bits] : program.constants) {
    slots[slot] = bits;
  }
  Frame frame{program, slots};
  const Instruction* const code = program.code.data();
  while (!frame.done) {
    const Instruction& i = code[frame.next++];
    if (i.guard < 0 || get<bool>(frame, i.guard) != i.negated) {
      i.run(frame, i);
    }
  }
}

}  // namespace simt::ptx
