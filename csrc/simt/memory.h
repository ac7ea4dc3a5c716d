// Checked memory: what a kernel's pointers point to, and the checks of every access.
//
// A region is one buffer or shared array. Each granule of it (4 or 8 bytes as a rule) has a cell
// of shadow memory that knows whether the granule was written, who wrote it last and who read it
// since. An access is refused when it leaves its region, is misaligned, reads what nobody wrote, or
// races: another thread touched the same granule, one of the two writes, and no barrier stands
// between them. Since that is judged by barriers and not by time, a race is found whatever order
// the threads happened to run in.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <string>
#include <type_traits>
#include <utility>

#include "source_lines.h"
#include "thread.h"

namespace simt {
namespace detail {

// Who did an access, and when. serial 0 means nobody.
struct Access {
  std::uint32_t serial = 0;   // block
  std::uint32_t epoch = 0;    // barriers that the block had passed
  std::uint32_t segment = 0;  // __syncwarp calls that the thread had passed
  CodeAddress code = 0;       // for the source line
  std::uint16_t thread = 0;
  bool atomic = false;
};

struct Cell {
  // Global memory: not 0 once written. Shared memory: the block that wrote it.
  std::uint32_t written = 0;
  Access writer;
  // Two readers: a thread that writes next is unordered with one of them, if it is not the only
  // one that read. (A third reader is forgotten; a race with nobody but that one is missed.)
  Access readers[2];
};

enum class Space : std::uint8_t { kGlobal, kShared };

class Region {
 public:
  static constexpr std::size_t kAlignment = 256;  // that of cudaMalloc

  // A region whose bytes start `shift` bytes after an aligned address. Without shadow memory
  // (`checked` false) reads are only checked against the bounds.
  Region(
      std::string name,
      Space space,
      std::int64_t bytes,
      std::size_t granule,
      bool checked = true,
      std::size_t shift = 0)
      : name(std::move(name)),
        space(space),
        bytes(bytes),
        granule(granule),
        granule_bits_(__builtin_ctzll(granule)) {
    memory_ = ::operator new(static_cast<std::size_t>(bytes) + shift, std::align_val_t(kAlignment));
    base = static_cast<std::byte*>(memory_) + shift;
    if (checked) {
      // calloc: pages of cells that nobody touches cost nothing.
      const std::size_t count = static_cast<std::size_t>(bytes) / granule + 1;
      cells = static_cast<Cell*>(std::calloc(count, sizeof(Cell)));
      if (cells == nullptr) {
        throw std::bad_alloc();
      }
    }
    poison();
  }
  ~Region() {
    ::operator delete(memory_, std::align_val_t(kAlignment));
    std::free(cells);
  }
  Region(const Region&) = delete;
  Region& operator=(const Region&) = delete;

  // All bits set: NaN as float and double, -1 as an integer.
  void poison() {
    std::memset(base, 0xFF, static_cast<std::size_t>(bytes));
  }

  Cell& cell(std::int64_t offset) const {
    return cells[offset >> granule_bits_];
  }

  bool is_written(std::int64_t offset) const {
    if (cells == nullptr) {
      return true;
    }
    const std::uint32_t written = cell(offset).written;
    return space == Space::kShared ? written == active.serial : written != 0;
  }

  const std::string name;
  const Space space;
  const std::int64_t bytes;
  const std::size_t granule;  // a power of two
  std::byte* base = nullptr;
  Cell* cells = nullptr;

 private:
  const int granule_bits_;
  void* memory_ = nullptr;
};

static_assert(std::is_trivially_copyable_v<Cell>, "cells come from calloc");

// Whether `earlier` happened before what the running thread does now.
inline bool is_ordered(const Access& earlier) {
  if (earlier.serial < active.first_serial) {
    return true;  // nobody, or an earlier launch
  }
  if (earlier.serial != active.serial) {
    // Blocks are ordered only by a fence after the access and an atomic before this one: the
    // pattern of a counter that tells the last block that the others are done. Coarse: which
    // atomic it was is not asked.
    return active.acquired && earlier.epoch < active.fences[earlier.serial - active.first_serial];
  }
  const Thread& now = *active.current;
  if (earlier.epoch < active.epoch || earlier.thread == now.linear) {
    return true;
  }
  const bool same_warp = earlier.thread / kWarpSize == now.linear / kWarpSize;
  return same_warp && earlier.segment < now.ordered[earlier.thread % kWarpSize];
}

enum class AccessKind : std::uint8_t { kRead, kWrite, kAtomic };

// One access of `size` bytes at `offset`, before it is made.
class AccessCheck {
 public:
  AccessCheck(
      Region* region,
      std::int64_t offset,
      std::size_t size,
      std::size_t alignment,
      CodeAddress code)
      : region_(region), offset_(offset), size_(size), code_(code) {
    if (active.current == nullptr) {
      fail("a kernel's pointer was dereferenced on the host");
    }
    if (region == nullptr) {
      fail("a null pointer was dereferenced" + at(code_));
    }
    if (offset < 0 || offset + static_cast<std::int64_t>(size) > region->bytes) {
      const std::int64_t end = region->bytes / static_cast<std::int64_t>(size);
      fail("out of bounds: " + element() + " of " + std::to_string(end) + " elements" + at(code_));
    }
    if ((reinterpret_cast<std::uintptr_t>(region->base + offset) & (alignment - 1)) != 0) {
      fail(
          "misaligned: " + element() + " is not aligned to " + std::to_string(alignment) +
          " bytes" + at(code_));
    }
    const std::size_t below_granule = region->granule - 1;
    if (region->cells != nullptr && ((size | offset) & below_granule) != 0) {
      fail(
          element() + " is smaller than the " + std::to_string(region->granule) +
          " bytes by which this memory is checked" + at(code_));
    }
  }

  // `bits` is what a plain write will write; null for the other kinds.
  void run(AccessKind kind, const void* bits) {
    if (region_->cells == nullptr) {
      return;
    }
    const Thread& thread = *active.current;
    Access access;
    access.serial = active.serial;
    access.epoch = active.epoch;
    access.segment = thread.segment;
    access.code = code_;
    access.thread = static_cast<std::uint16_t>(thread.linear);
    access.atomic = kind == AccessKind::kAtomic;
    for (std::size_t done = 0; done < size_; done += region_->granule) {
      const std::int64_t offset = offset_ + static_cast<std::int64_t>(done);
      Cell& cell = region_->cell(offset);
      if (kind != AccessKind::kWrite && !region_->is_written(offset)) {
        fail("uninitialised: " + element() + " is read, but nobody wrote it" + at(code_));
      }
      check_writer(cell, access, kind, bits);
      if (kind == AccessKind::kRead) {
        add_reader(cell, access);
      } else {
        check_readers(cell, bits);
        cell.written = active.serial;
        cell.writer = access;
        cell.readers[0] = cell.readers[1] = Access{};
      }
    }
  }

 private:
  std::string element() const {
    const std::int64_t size = static_cast<std::int64_t>(size_);
    const std::int64_t index = offset_ >= 0 ? offset_ / size : -((-offset_ + size - 1) / size);
    return region_->name + "[" + std::to_string(index) + "]";
  }

  // In shared memory, what other blocks did there is void.
  bool conflicts(const Access& earlier) const {
    const bool stale = region_->space == Space::kShared && earlier.serial != active.serial;
    return !stale && !is_ordered(earlier);
  }

  // A write of the value that is there already is harmless (many threads setting one flag).
  bool changes(const void* bits) const {
    return bits == nullptr || std::memcmp(region_->base + offset_, bits, size_) != 0;
  }
  void check_writer(const Cell& cell, const Access& now, AccessKind kind, const void* bits) const {
    const bool both_atomic = now.atomic && cell.writer.atomic;
    if (!both_atomic && conflicts(cell.writer) && changes(bits)) {
      report(kind == AccessKind::kRead ? "read" : "written", cell.writer, "written");
    }
  }
  void check_readers(const Cell& cell, const void* bits) const {
    for (const Access& reader : cell.readers) {
      if (conflicts(reader) && changes(bits)) {
        report("written", reader, "read");
      }
    }
  }

  void add_reader(Cell& cell, const Access& access) const {
    Access& first = cell.readers[0];
    (conflicts(first) ? cell.readers[1] : first) = access;
  }

  [[noreturn]] void report(
      const std::string& now, const Access& earlier, const std::string& then) const {
    const bool same_block = earlier.serial == active.serial;
    const std::string what = earlier.atomic ? "changed by an atomic" : then;
    fail(
        "data race: " + element() + " is " + now + at(code_) + " and was " + what + " by " +
        (same_block ? "" : "another block's ") + "thread number " + std::to_string(earlier.thread) +
        at(earlier.code) +
        (same_block ? " with no barrier between" : " with no fence and atomic between"));
  }

  Region* region_;
  std::int64_t offset_;
  std::size_t size_;
  CodeAddress code_;
};

// Not inlined, so that the return address lies in the kernel (the operators that call these are).
[[gnu::noinline]] inline void check_read(
    Region* region, std::int64_t offset, std::size_t size, std::size_t alignment) {
  const CodeAddress code = code_address(__builtin_return_address(0));
  AccessCheck(region, offset, size, alignment, code).run(AccessKind::kRead, nullptr);
}
[[gnu::noinline]] inline void check_write(
    Region* region,
    std::int64_t offset,
    std::size_t size,
    std::size_t alignment,
    const void* bits) {
  const CodeAddress code = code_address(__builtin_return_address(0));
  AccessCheck(region, offset, size, alignment, code).run(AccessKind::kWrite, bits);
}
[[gnu::noinline]] inline void check_atomic(
    Region* region, std::int64_t offset, std::size_t size, std::size_t alignment) {
  const CodeAddress code = code_address(__builtin_return_address(0));
  AccessCheck(region, offset, size, alignment, code).run(AccessKind::kAtomic, nullptr);
  active.acquired = active.acquired || region->space == Space::kGlobal;
}

}  // namespace detail

template <typename T>
class Ptr;

// What p[i] gives: reads and writes go through the checks. It lives for one expression only, so
// `auto v = p[i]` does not compile once v is used: write the type.
template <typename T>
class Ref {
 public:
  using Value = std::remove_const_t<T>;

  Ref(const Ref&) = delete;

  [[gnu::always_inline]] operator Value() && {
    return read();
  }
  [[gnu::always_inline]] Value operator=(Value value) && {
    return write(value);
  }
  [[gnu::always_inline]] Value operator=(Ref&& other) && {
    return write(other.read());
  }
#define SIMT_COMPOUND_ASSIGNMENT(op)                                     \
  template <typename U>                                                  \
  [[gnu::always_inline]] Value operator op## = (const U& other) && {     \
    return write(static_cast<Value>(read() op other));                   \
  }                                                                      \
  template <typename U>                                                  \
  [[gnu::always_inline]] Value operator op## = (Ref<U> && other) && {    \
    return write(static_cast<Value>(read() op std::move(other).read())); \
  }
  SIMT_COMPOUND_ASSIGNMENT(+)
  SIMT_COMPOUND_ASSIGNMENT(-)
  SIMT_COMPOUND_ASSIGNMENT(*)
  SIMT_COMPOUND_ASSIGNMENT(/)
  SIMT_COMPOUND_ASSIGNMENT(&)
  SIMT_COMPOUND_ASSIGNMENT(|)
  SIMT_COMPOUND_ASSIGNMENT(^)
#undef SIMT_COMPOUND_ASSIGNMENT
  Ptr<T> operator&() && {
    return Ptr<T>(region_, offset_);
  }

 private:
  friend class Ptr<T>;
  template <typename U>
  friend class Ref;
  Ref(detail::Region* region, std::int64_t offset) : region_(region), offset_(offset) {}

  [[gnu::always_inline]] Value read() const {
    detail::check_read(region_, offset_, sizeof(T), alignof(T));
    Value value;
    std::memcpy(&value, region_->base + offset_, sizeof(T));
    return value;
  }
  [[gnu::always_inline]] Value write(const Value& value) const {
    static_assert(!std::is_const_v<T>, "this memory is const");
    detail::check_write(region_, offset_, sizeof(T), alignof(T), &value);
    std::memcpy(region_->base + offset_, &value, sizeof(T));
    return value;
  }

  detail::Region* region_;
  std::int64_t offset_;
};

// A pointer of a kernel: T* with bounds.
template <typename T>
class Ptr {
 public:
  static_assert(std::is_trivially_copyable_v<T>, "device memory holds trivially copyable types");

  Ptr() = default;
  Ptr(std::nullptr_t) {}
  Ptr(detail::Region* region, std::int64_t offset) : region_(region), offset_(offset) {}

  operator Ptr<const T>() const {
    return Ptr<const T>(region_, offset_);
  }
  explicit operator bool() const {
    return region_ != nullptr;
  }

  [[gnu::always_inline]] Ref<T> operator[](std::int64_t i) const {
    return Ref<T>(region_, offset_ + i * kSize);
  }
  [[gnu::always_inline]] Ref<T> operator*() const {
    return Ref<T>(region_, offset_);
  }

  Ptr& operator+=(std::int64_t n) {
    offset_ += n * kSize;
    return *this;
  }
  Ptr& operator-=(std::int64_t n) {
    return *this += -n;
  }
  Ptr& operator++() {
    return *this += 1;
  }
  Ptr& operator--() {
    return *this -= 1;
  }
  friend Ptr operator+(Ptr p, std::int64_t n) {
    return p += n;
  }
  friend Ptr operator+(std::int64_t n, Ptr p) {
    return p += n;
  }
  friend Ptr operator-(Ptr p, std::int64_t n) {
    return p -= n;
  }
  friend std::int64_t operator-(const Ptr& p, const Ptr& q) {
    if (p.region_ != q.region_) {
      detail::fail("pointers into two buffers were subtracted");
    }
    return (p.offset_ - q.offset_) / kSize;
  }
  friend bool operator==(const Ptr& p, const Ptr& q) {
    return p.region_ == q.region_ && p.offset_ == q.offset_;
  }
  friend bool operator!=(const Ptr& p, const Ptr& q) {
    return !(p == q);
  }
  friend bool operator<(const Ptr& p, const Ptr& q) {
    return p - q < 0;
  }

  // The same address as a pointer to another type.
  template <typename U>
  Ptr<U> cast() const {
    return Ptr<U>(region_, offset_);
  }

  // The address itself, for alignment tests.
  std::uintptr_t address() const {
    return region_ == nullptr ? 0 : reinterpret_cast<std::uintptr_t>(region_->base + offset_);
  }

  // Replaces the value by update(value) as one atomic operation; returns the old value.
  template <typename Update>
  [[gnu::always_inline]] T atomic_update(Update update) const {
    detail::check_atomic(region_, offset_, sizeof(T), alignof(T));
    T old;
    std::memcpy(&old, region_->base + offset_, sizeof(T));
    const T value = update(old);
    std::memcpy(region_->base + offset_, &value, sizeof(T));
    return old;
  }

 private:
  static constexpr std::int64_t kSize = static_cast<std::int64_t>(sizeof(T));
  detail::Region* region_ = nullptr;
  std::int64_t offset_ = 0;
};

// Global memory, owned by the host. `shift` moves the first element off its alignment by so many
// elements, as a slice of a tensor does. Buffer<const T> is input: kernels cannot write it.
template <typename T>
class Buffer {
 public:
  using Value = std::remove_const_t<T>;

  // `n` elements that nobody wrote yet.
  Buffer(std::string name, std::int64_t n, std::int64_t shift = 0)
      : size_(n),
        region_(
            std::make_unique<detail::Region>(
                std::move(name),
                detail::Space::kGlobal,
                n * static_cast<std::int64_t>(sizeof(T)),
                alignof(T),
                !std::is_const_v<T>,
                static_cast<std::size_t>(shift) * sizeof(T))) {}

  // A copy of `n` elements at `data`.
  Buffer(std::string name, const Value* data, std::int64_t n, std::int64_t shift = 0)
      : Buffer(std::move(name), n, shift) {
    if (n > 0) {
      std::memcpy(region_->base, data, static_cast<std::size_t>(region_->bytes));
    }
    mark_written();
  }

  Ptr<T> ptr() const {
    return Ptr<T>(region_.get(), 0);
  }
  std::int64_t size() const {
    return size_;
  }
  const std::string& name() const {
    return region_->name;
  }
  Value* data() {
    return reinterpret_cast<Value*>(region_->base);
  }
  const Value* data() const {
    return reinterpret_cast<const Value*>(region_->base);
  }

  // Sets every element, as torch.zeros and torch.full do.
  void fill(const Value& value) {
    std::fill_n(data(), size_, value);
    mark_written();
  }

  // The first element that no kernel wrote, or -1.
  std::int64_t first_unwritten() const {
    for (std::int64_t offset = 0; offset < region_->bytes; offset += alignof(T)) {
      if (!region_->is_written(offset)) {
        return offset / static_cast<std::int64_t>(sizeof(T));
      }
    }
    return -1;
  }

 private:
  void mark_written() {
    if (region_->cells != nullptr) {
      for (std::int64_t offset = 0; offset < region_->bytes; offset += alignof(T)) {
        region_->cell(offset).written = 1;
      }
    }
  }

  std::int64_t size_;
  std::unique_ptr<detail::Region> region_;
};

}  // namespace simt
