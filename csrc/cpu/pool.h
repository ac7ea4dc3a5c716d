// Memory of large outputs, kept warm from call to call. Torch-free.
//
// A training loop asks for the same few hundred megabytes in every step and gives them back. What
// malloc returns to the system and fetches again costs a page fault every 4 KiB: of a merge of
// Stable Diffusion's weights more than its arithmetic and its memory traffic together [measured].
// A block that is released here waits for the next call that wants one of its size.
//
// Bounded twice: a block that 32 calls had no use for goes back to the system, and what is in use
// and what waits are together no more than was in use at once in that time. A block belongs to one
// owner at a time.

#pragma once

#include <cstdint>

namespace immunize_ext::pool {

// Blocks below this are left to malloc, which keeps them.
constexpr int64_t kSmallest = int64_t{1} << 19;

// Off where IMMUNIZE_EXT_POOL is 0.
bool enabled();

// A call begins: what the last 32 did not use is given back.
void begin_call();

// A block of memory with one owner.
struct Block {
  void* memory;   // starts a page
  int64_t bytes;  // at least what was asked for
  int64_t call;   // the call that used it last
};

// Throws std::bad_alloc. Give it back with release(), from any thread.
Block* acquire(int64_t bytes);
void release(Block* block);

// Bytes that wait for an owner.
int64_t waiting();

// Gives back to the system what waits, and forgets what was in use; how many bytes.
int64_t empty();

}  // namespace immunize_ext::pool
