#include "memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <mutex>
#include <new>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

namespace layerwise::cpu {
namespace {

constexpr int64_t kHugePage = 2 << 20;
constexpr int64_t kGranularity = 64 << 10;  // the rest of a block behind its last whole huge page is on small ones
constexpr int64_t kDefaultCacheLimit = int64_t{1} << 30;

int64_t round_up(int64_t bytes) { return (bytes + kGranularity - 1) / kGranularity * kGranularity; }

// Aligned to a huge page: maps one page more than needed and cuts off what lies outside.
void* map_pages(int64_t bytes) {
  void* raw = mmap(nullptr, bytes + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (raw == MAP_FAILED) throw std::bad_alloc();
  char* start = static_cast<char*>(raw);
  char* aligned = start + (kHugePage - reinterpret_cast<uintptr_t>(start) % kHugePage) % kHugePage;
  if (aligned != start) munmap(start, aligned - start);
  const int64_t behind = start + kHugePage - aligned;
  if (behind != 0) munmap(aligned + bytes, behind);
#if defined(MADV_HUGEPAGE)
  madvise(aligned, bytes, MADV_HUGEPAGE);  // advice: without huge pages the block works as well
#endif
  return aligned;
}

class Pool {
 public:
  void* acquire(int64_t requested) {
    const int64_t bytes = round_up(requested);
    const std::lock_guard lock(mutex_);
    void* block = take_cached(bytes);
    if (block == nullptr) {
      replace_cached(bytes);
      block = map_pages(bytes);
    }
    sizes_[block] = bytes;
    live_ += bytes;
    peak_ = std::max(peak_, live_);
    return block;
  }

  void release(void* block) {
    const std::lock_guard lock(mutex_);
    Free freed{static_cast<char*>(block), sizes_.at(block)};
    sizes_.erase(block);
    live_ -= freed.bytes;
    cached_ += freed.bytes;
    for (auto it = free_.begin(); it != free_.end();) {  // one block with what is free beside it
      const bool before = it->end() == freed.block;
      if (!before && freed.end() != it->block) {
        ++it;
        continue;
      }
      if (before) freed.block = it->block;
      freed.bytes += it->bytes;
      it = free_.erase(it);
    }
    free_.push_back(freed);
    shrink_cache(limit_);
  }

  void make_room(int64_t bytes) {
    const std::lock_guard lock(mutex_);
    replace_cached(bytes);
  }

  void set_limit(int64_t bytes) {
    const std::lock_guard lock(mutex_);
    limit_ = bytes;
    shrink_cache(limit_);
  }
  int64_t limit() {
    const std::lock_guard lock(mutex_);
    return limit_;
  }
  int64_t cached() {
    const std::lock_guard lock(mutex_);
    return cached_;
  }
  void empty() {
    const std::lock_guard lock(mutex_);
    shrink_cache(0);
    peak_ = live_;
  }

 private:
  struct Free {
    char* block;
    int64_t bytes;

    char* end() const { return block + bytes; }
  };

  // New memory replaces cached blocks, oldest first, beyond the largest amount that was ever in use at once.
  void replace_cached(int64_t bytes) { shrink_cache(std::max<int64_t>(0, peak_ - live_ - bytes)); }

  // From the smallest fitting block; among equals the one freed last, which is the most likely to be in a cache.  What is
  // left of it stays free.
  void* take_cached(int64_t bytes) {
    auto best = free_.end();
    for (auto it = free_.begin(); it != free_.end(); ++it) {
      if (it->bytes < bytes) continue;
      if (best == free_.end() || it->bytes <= best->bytes) best = it;
    }
    if (best == free_.end()) return nullptr;
    void* block = best->block;
    cached_ -= bytes;
    best->block += bytes;
    best->bytes -= bytes;
    if (best->bytes == 0) free_.erase(best);
    return block;
  }

  // Gives back the oldest blocks, of the last one what is too much.
  void shrink_cache(int64_t target) {
    auto kept = free_.begin();
    while (kept != free_.end() && cached_ > target) {
      const int64_t surplus = std::min(kept->bytes, round_up(cached_ - target));
      munmap(kept->end() - surplus, surplus);
      cached_ -= surplus;
      kept->bytes -= surplus;
      if (kept->bytes == 0) ++kept;
    }
    free_.erase(free_.begin(), kept);
  }

  std::mutex mutex_;
  std::vector<Free> free_;  // in the order in which they were freed
  std::unordered_map<void*, int64_t> sizes_;  // of the blocks in use
  int64_t live_ = 0, cached_ = 0, peak_ = 0, limit_ = kDefaultCacheLimit;
};

// Never destroyed: tensors may outlive static objects.
Pool& pool() {
  static Pool* instance = new Pool;
  return *instance;
}

}  // namespace

void* acquire(int64_t bytes) { return pool().acquire(bytes); }
void release(void* block) { pool().release(block); }
void make_room(int64_t bytes) { pool().make_room(bytes); }

void set_cache_limit(int64_t bytes) {
  if (bytes < 0) throw std::invalid_argument("cache limit must be at least 0 bytes, got " + std::to_string(bytes));
  pool().set_limit(bytes);
}
int64_t cache_limit() { return pool().limit(); }
int64_t cached_bytes() { return pool().cached(); }
void empty_cache() { pool().empty(); }

}  // namespace layerwise::cpu
