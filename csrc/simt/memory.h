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

#include <sys/mman.h>

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
  bool read_only = false;  // a load that nvcc may take from the read-only cache
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

// Memory that is mapped, but takes no room until it is touched; zero.
inline void* map_untouched(std::size_t bytes) {
  void* memory = mmap(
      nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) {
    throw std::bad_alloc();
  }
  return memory;
}

class Region {
 public:
  static constexpr std::size_t kAlignment = 256;  // that of cudaMalloc
  // Regions beyond are never touched as a whole, so they may be larger than the machine's memory:
  // what nobody wrote is zero there, and not NaN.
  static constexpr std::int64_t kHuge = std::int64_t{1} << 28;

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
        granule_bits_(__builtin_ctzll(granule)),
        mapped_bytes_(static_cast<std::size_t>(bytes) + shift + kAlignment),
        cell_bytes_((static_cast<std::size_t>(bytes) / granule + 1) * sizeof(Cell)) {
    memory_ = map_untouched(mapped_bytes_);  // pages are aligned to more than 256 bytes
    base = static_cast<std::byte*>(memory_) + shift;
    if (checked) {
      cells = static_cast<Cell*>(map_untouched(cell_bytes_));
    }
    if (bytes <= kHuge) {
      poison();
    }
  }
  ~Region() {
    munmap(memory_, mapped_bytes_);
    if (cells != nullptr) {
      munmap(cells, cell_bytes_);
    }
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
  const std::size_t mapped_bytes_, cell_bytes_;
  void* memory_ = nullptr;
};

static_assert(std::is_trivially_copyable_v<Cell>, "cells start as zero bytes");

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

enum class AccessKind : std::uint8_t { kRead, kReadOnly, kWrite, kAtomic };

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
    if (++active.accesses > kMostAccesses) {
      fail(
          "no barrier and no end after " + std::to_string(kMostAccesses) +
          " accesses; it waits for another thread, or loops for ever" + at(code_));
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
    access.read_only = kind == AccessKind::kReadOnly;
    const bool reads = kind == AccessKind::kRead || kind == AccessKind::kReadOnly;
    for (std::size_t done = 0; done < size_; done += region_->granule) {
      const std::int64_t offset = offset_ + static_cast<std::int64_t>(done);
      Cell& cell = region_->cell(offset);
      if (kind != AccessKind::kWrite && !region_->is_written(offset)) {
        fail("uninitialised: " + element() + " is read, but nobody wrote it" + at(code_));
      }
      if (access.read_only && cell.writer.serial >= active.first_serial) {
        report_alias("read", "written" + at(cell.writer.code));
      }
      check_writer(cell, access, reads, bits);
      if (reads) {
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
  void check_writer(const Cell& cell, const Access& now, bool reads, const void* bits) const {
    const bool both_atomic = now.atomic && cell.writer.atomic;
    if (!both_atomic && conflicts(cell.writer) && changes(bits)) {
      report(reads ? "read" : "written", cell.writer, "written");
    }
  }
  void check_readers(const Cell& cell, const void* bits) const {
    for (const Access& reader : cell.readers) {
      if (reader.read_only && reader.serial >= active.first_serial) {
        report_alias("written", "read" + at(reader.code));
      }
      if (conflicts(reader) && changes(bits)) {
        report("written", reader, "read");
      }
    }
  }

  void add_reader(Cell& cell, const Access& access) const {
    Access& slot = cell.readers[conflicts(cell.readers[0]) ? 1 : 0];
    const bool promised = slot.read_only && slot.serial >= active.first_serial;
    slot = access;
    slot.read_only = access.read_only || promised;
  }

  // GlobalPtr<const T> is T* __restrict__ under nvcc, which then loads by ld.global.nc: such a load
  // may give what was there before the launch.
  [[noreturn]] void report_alias(const std::string& now, const std::string& then) const {
    fail(
        "alias: " + element() + " is " + now + at(code_) + " and was " + then +
        " in the same launch, but one of the pointers is a GlobalPtr to const");
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
[[gnu::noinline]] inline void check_read_only(
    Region* region, std::int64_t offset, std::size_t size, std::size_t alignment) {
  const CodeAddress code = code_address(__builtin_return_address(0));
  AccessCheck(region, offset, size, alignment, code).run(AccessKind::kReadOnly, nullptr);
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
    return Ptr<T>(region_, offset_, read_only_);
  }

 private:
  friend class Ptr<T>;
  template <typename U>
  friend class Ref;
  Ref(detail::Region* region, std::int64_t offset, bool read_only)
      : region_(region), offset_(offset), read_only_(read_only) {}

  [[gnu::always_inline]] Value read() const {
    if (std::is_const_v<T> && read_only_) {
      detail::check_read_only(region_, offset_, sizeof(T), alignof(T));
    } else {
      detail::check_read(region_, offset_, sizeof(T), alignof(T));
    }
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
  bool read_only_;
};

// A pointer of a kernel: T* with bounds.
template <typename T>
class Ptr {
 public:
  static_assert(std::is_trivially_copyable_v<T>, "device memory holds trivially copyable types");

  Ptr() = default;
  Ptr(std::nullptr_t) {}
  Ptr(detail::Region* region, std::int64_t offset, bool read_only = false)
      : region_(region), offset_(offset), read_only_(read_only) {}

  operator Ptr<const T>() const {
    return Ptr<const T>(region_, offset_, read_only_);
  }
  explicit operator bool() const {
    return region_ != nullptr;
  }

  [[gnu::always_inline]] Ref<T> operator[](std::int64_t i) const {
    return Ref<T>(region_, offset_ + i * kSize, read_only_);
  }
  [[gnu::always_inline]] Ref<T> operator*() const {
    return Ref<T>(region_, offset_, read_only_);
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
    return Ptr<U>(region_, offset_, read_only_);
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

 protected:
  // Whether reads rest on the promise of a GlobalPtr; what is made of such a pointer inherits it.
  bool read_only_ = false;
};

// Memory that a kernel gets as an argument, T* __restrict__ under nvcc: what is read through a
// GlobalPtr<const T>, nobody writes in the same launch.
template <typename T>
class GlobalPtr : public Ptr<T> {
 public:
  GlobalPtr() = default;
  GlobalPtr(std::nullptr_t) {}
  GlobalPtr(const Ptr<T>& p) : Ptr<T>(p) {
    this->read_only_ = std::is_const_v<T>;
  }
  template <
      typename U,
      typename = std::enable_if_t<std::is_const_v<T> && std::is_same_v<std::remove_const_t<T>, U>>>
  GlobalPtr(const Ptr<U>& p) : GlobalPtr(Ptr<T>(p)) {}
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

  bool is_written(std::int64_t i) const {
    return region_->is_written(i * static_cast<std::int64_t>(sizeof(T)));
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
