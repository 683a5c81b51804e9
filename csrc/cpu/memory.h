// Memory of large activations.
//
// The C library hands a large block back to the kernel when it is freed, so a training step pays a page fault for every
// 4 KiB of every activation, each time: measured, touching fresh pages costs ten times what writing them again does.
// Freed blocks are therefore kept for the next step, on huge pages where the system has them.  The pool never holds
// more than what was in use at one time, nor more unused memory than the cache limit.
#pragma once

#include <cstdint>
#include <new>

namespace layerwise::cpu {

// Blocks at least this large come from the pool.
constexpr int64_t kPooledBytes = 1 << 20;

// Throws std::bad_alloc.  The memory is aligned to 64 KiB and uninitialised.
void* acquire(int64_t bytes);
void release(void* block);
// Before so many bytes are allocated elsewhere: gives back cached blocks, so that both together stay within the largest
// amount that was ever in use at once.
void make_room(int64_t bytes);

void set_cache_limit(int64_t bytes);  // throws std::invalid_argument for a negative value
int64_t cache_limit();
int64_t cached_bytes();
void empty_cache();

// Uninitialised workspace of one pass, aligned to a cache line.  The C library keeps blocks of this size.
class Scratch {
 public:
  explicit Scratch(int64_t bytes) : data_(::operator new(bytes, kAlignment)) {}
  ~Scratch() { ::operator delete(data_, kAlignment); }
  Scratch(const Scratch&) = delete;
  void* data() { return data_; }

 private:
  static constexpr std::align_val_t kAlignment{64};
  void* data_;
};

}  // namespace layerwise::cpu
