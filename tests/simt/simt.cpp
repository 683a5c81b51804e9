#include "simt.h"

#include <algorithm>
#include <cstdlib>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(SIMT_ADDRESS_SANITIZER)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace simt {
namespace {

constexpr int kWarp = 32;
constexpr size_t kStack = 128 << 10;
constexpr size_t kFence = 64;
constexpr unsigned char kFenceByte = 0xa5, kPoison = 0xff;  // all bits set is a NaN

// -- Fibers ----------------------------------------------------------------------------------------------------------

#if defined(__x86_64__)

using Context = void*;  // stack pointer

extern "C" void simt_switch(void** save, void* load);
asm(R"(
.text
.type simt_switch, @function
simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size simt_switch, .-simt_switch
)");

void switch_context(Context& from, Context& to) { simt_switch(&from, to); }

void make_context(Context& context, char* stack, void (*entry)()) {
  void** top = reinterpret_cast<void**>(stack + kStack);
  *--top = nullptr;  // the stack is aligned to 16 behind a return address
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  context = top;
}

#else

using Context = ucontext_t;

void switch_context(Context& from, Context& to) { swapcontext(&from, &to); }

void make_context(Context& context, char* stack, void (*entry)()) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = kStack;
  context.uc_link = nullptr;
  makecontext(&context, entry, 0);
}

#endif

// -- A block -----------------------------------------------------------------------------------------------------------

enum class State { kReady, kBarrier, kCollective, kDone };

struct Thread {
  Context context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  State state = State::kDone;
  int line;          // where it waits
  unsigned mask;     // of the collective
  uint64_t bits;     // brought, then received
  int offset;
};

struct Shared {
  std::vector<unsigned char> memory;
  unsigned char* data() { return memory.data() + kFence; }
  size_t bytes() const { return memory.size() - 2 * kFence; }
};

class Block {
 public:
  void run(unsigned index, int threads, const std::function<void()>& body, std::mt19937& random) {
    index_ = index;
    body_ = &body;
    error_.clear();
    shared_.clear();
    while (static_cast<int>(threads_.size()) < threads) threads_.emplace_back();
    count_ = threads;
    for (int i = 0; i < count_; ++i) {
      clean(threads_[i]);
      threads_[i].state = State::kReady;
      make_context(threads_[i].context, threads_[i].stack.get(), &Block::enter);
    }
    std::vector<int> order(count_);
    std::iota(order.begin(), order.end(), 0);
    while (true) {
      std::shuffle(order.begin(), order.end(), random);
      bool ran = false;
      for (const int i : order) {
        if (threads_[i].state != State::kReady) continue;
        ran = true;
        resume(i);
        if (!error_.empty()) throw std::runtime_error(error_);
      }
      if (ran) continue;
      if (std::all_of(threads_.begin(), threads_.begin() + count_, [](auto& t) { return t.state == State::kDone; }))
        break;
      if (!finish_collectives() && !finish_barrier()) throw std::runtime_error(deadlock());
    }
    for (auto& [line, array] : shared_) check_fences(line, array);
  }

  unsigned index() const { return index_; }
  unsigned thread() const { return current_; }

  void wait(State state, int line) {
    threads_[current_].state = state;
    threads_[current_].line = line;
    suspend();
  }

  uint64_t exchange(unsigned mask, uint64_t bits, int offset, int line) {
    Thread& t = threads_[current_];
    if ((mask >> (current_ % kWarp) & 1) == 0) fail("a lane is not in the mask of its own warp collective", line);
    t.mask = mask;
    t.bits = bits;
    t.offset = offset;
    wait(State::kCollective, line);
    return t.bits;
  }

  // From inside a thread: it is never resumed.
  void fail(const std::string& what, int line) {
    error_ = what + " (line " + std::to_string(line) + ", block " + std::to_string(index_) + ", thread " +
             std::to_string(current_) + ")";
    wait(State::kCollective, line);
  }

  void* shared(size_t bytes, int line) {
    Shared& array = shared_[line];
    if (array.memory.empty()) {
      array.memory.assign(bytes + 2 * kFence, kFenceByte);
      std::fill_n(array.data(), bytes, kPoison);
    }
    return array.data();
  }

  static Block*& current() {
    static thread_local Block* block = nullptr;
    return block;
  }

 private:
  [[noreturn]] static void enter() {
    Block& block = *current();
    block.arrived();
    (*block.body_)();
    block.threads_[block.current_].state = State::kDone;
    block.suspend();
    std::abort();  // a finished thread is not resumed
  }

  // The sanitizer's marks around variables of functions that never returned: the two that a finished thread ends in, and
  // anything where a launch was given up.
  static void clean([[maybe_unused]] Thread& t) {
#if defined(SIMT_ADDRESS_SANITIZER)
    constexpr size_t kLastFrames = 4096;
    const size_t bytes = t.state == State::kDone ? kLastFrames : kStack;
    __asan_unpoison_memory_region(t.stack.get() + kStack - bytes, bytes);
#endif
  }

  void resume(int i) {
    current_ = i;
#if defined(SIMT_ADDRESS_SANITIZER)
    __sanitizer_start_switch_fiber(&scheduler_fake_stack_, threads_[i].stack.get(), kStack);
#endif
    switch_context(scheduler_, threads_[i].context);
#if defined(SIMT_ADDRESS_SANITIZER)
    __sanitizer_finish_switch_fiber(scheduler_fake_stack_, nullptr, nullptr);
#endif
  }

  void suspend() {
#if defined(SIMT_ADDRESS_SANITIZER)
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(threads_[current_].state == State::kDone ? nullptr : &fake, scheduler_stack_,
                                   scheduler_stack_size_);
#endif
    switch_context(threads_[current_].context, scheduler_);
#if defined(SIMT_ADDRESS_SANITIZER)
    __sanitizer_finish_switch_fiber(fake, &scheduler_stack_, &scheduler_stack_size_);
#endif
  }

  void arrived() {
#if defined(SIMT_ADDRESS_SANITIZER)
    __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack_, &scheduler_stack_size_);
#endif
  }

  bool finish_collectives() {
    bool any = false;
    for (int first = 0; first < count_; first += kWarp) {
      const int lanes = std::min(kWarp, count_ - first);
      for (int lane = 0; lane < lanes; ++lane) {
        if (threads_[first + lane].state == State::kCollective) any |= finish_collective(first, lanes, lane);
      }
    }
    return any;
  }

  // The one that `lane` waits at, if all lanes of its mask are there.
  bool finish_collective(int first, int lanes, int lane) {
    const Thread& waiting = threads_[first + lane];
    const unsigned mask = waiting.mask;
    const int line = waiting.line;
    for (int i = 0; i < kWarp; ++i) {
      if ((mask >> i & 1) == 0) continue;
      if (i >= lanes) throw std::runtime_error(at(line) + "the mask names a lane that the block does not have");
      const Thread& t = threads_[first + i];
      if (t.state == State::kDone) throw std::runtime_error(at(line) + "the mask names a lane that has exited");
      if (t.state != State::kCollective || t.line != line || t.mask != mask) return false;
    }
    uint64_t received[kWarp];
    for (int i = 0; i < lanes; ++i) {
      if ((mask >> i & 1) == 0) continue;
      const int source = i ^ threads_[first + i].offset;
      if (source >= kWarp || (mask >> source & 1) == 0)
        throw std::runtime_error(at(line) + "a lane reads from one that is not in the mask");
      received[i] = threads_[first + source].bits;
    }
    for (int i = 0; i < lanes; ++i) {
      if ((mask >> i & 1) == 0) continue;
      threads_[first + i].bits = received[i];
      threads_[first + i].state = State::kReady;
    }
    return true;
  }

  // Threads that have exited do not count.
  bool finish_barrier() {
    int line = -1;
    for (int i = 0; i < count_; ++i) {
      const Thread& t = threads_[i];
      if (t.state == State::kDone) continue;
      if (t.state != State::kBarrier) return false;
      if (line != -1 && t.line != line) throw std::runtime_error(at(line) + "threads wait at different barriers");
      line = t.line;
    }
    for (int i = 0; i < count_; ++i)
      if (threads_[i].state == State::kBarrier) threads_[i].state = State::kReady;
    return true;
  }

  std::string deadlock() const {
    for (int i = 0; i < count_; ++i)
      if (threads_[i].state == State::kCollective)
        return at(threads_[i].line) + "a warp collective waits for lanes of its mask that do not come";
    return "threads wait for each other";
  }

  std::string at(int line) const { return "line " + std::to_string(line) + ", block " + std::to_string(index_) + ": "; }

  void check_fences(int line, Shared& array) const {
    const auto intact = [](const unsigned char* fence) {
      return std::all_of(fence, fence + kFence, [](unsigned char b) { return b == kFenceByte; });
    };
    if (!intact(array.memory.data()) || !intact(array.data() + array.bytes()))
      throw std::runtime_error(at(line) + "a shared array was written out of its bounds");
  }

  std::vector<Thread> threads_;
  int count_ = 0, current_ = 0;
  unsigned index_ = 0;
  const std::function<void()>* body_ = nullptr;
  std::map<int, Shared> shared_;
  std::string error_;
  Context scheduler_;
#if defined(SIMT_ADDRESS_SANITIZER)
  void* scheduler_fake_stack_ = nullptr;
  const void* scheduler_stack_ = nullptr;
  size_t scheduler_stack_size_ = 0;
#endif
};

}  // namespace

Index thread_index() { return {Block::current()->thread()}; }
Index block_index() { return {Block::current()->index()}; }
void barrier(int line) { Block::current()->wait(State::kBarrier, line); }
uint64_t exchange(unsigned mask, uint64_t bits, int offset, int line) {
  return Block::current()->exchange(mask, bits, offset, line);
}
void fail(const char* what, int line) { Block::current()->fail(what, line); }
void* shared(size_t bytes, int line) { return Block::current()->shared(bytes, line); }

void run(int64_t blocks, int threads, const std::function<void()>& body) {
  static std::mt19937 random{1};  // another order at each launch, the same ones in each process
  static thread_local Block block;
  Block::current() = &block;
  std::vector<int64_t> order(blocks);
  std::iota(order.begin(), order.end(), int64_t{0});
  std::shuffle(order.begin(), order.end(), random);
  for (const int64_t b : order) block.run(static_cast<unsigned>(b), threads, body, random);
}

}  // namespace simt
