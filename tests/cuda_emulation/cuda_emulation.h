// Enough of CUDA to execute a kernel's source on a CPU: one fiber a thread, one block after the other.
//
// A fiber runs until it waits: at a barrier for its block, at a shuffle for its warp. Whoever waits for a thread that
// has left, or for one that waits for something else, is told of (std::logic_error). Shared memory is the heap's and
// poisoned before every block, so that the address sanitizer sees its bounds and a sum of what was never written is
// NaN. What it cannot find are races: the fibers of a block run in a fixed order.
#pragma once

#include <sys/mman.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define LAUNCH(kernel, grid, block, shared, stream, ...) \
  (static_cast<void>(stream), cuda_emulation::run(grid, block, shared, [&] { (kernel)(__VA_ARGS__); }))
#define SHARED(name, ...) \
  __VA_ARGS__& name = *reinterpret_cast<__VA_ARGS__*>(cuda_emulation::shared_memory(sizeof(__VA_ARGS__)))
#define DYNAMIC_SHARED(name, type) \
  type* const name = reinterpret_cast<type*>(cuda_emulation::shared_memory(cuda_emulation::block.dynamic_size))

namespace cuda_emulation {

struct Index {
  unsigned x = 0;
};

enum class Waits { for_nothing, for_block, for_warp, for_ever };

// Switches to another stack: everything a called function must preserve is pushed on the one left behind.
#if defined(__x86_64__)
extern "C" void cuda_emulation_switch(void** from, void* to);
__asm__(
    ".text\n.weak cuda_emulation_switch\n.type cuda_emulation_switch,@function\ncuda_emulation_switch:\n"
    "pushq %rbp\npushq %rbx\npushq %r12\npushq %r13\npushq %r14\npushq %r15\n"
    "movq %rsp, (%rdi)\nmovq %rsi, %rsp\n"
    "popq %r15\npopq %r14\npopq %r13\npopq %r12\npopq %rbx\npopq %rbp\nret\n");
#else
#error "The emulation switches stacks in x86-64 assembly; there is none here for other machines."
#endif

constexpr size_t stack_size = 64 << 10;

struct Fiber {
  void* stack_pointer = nullptr;
  char* stack = nullptr;
  Waits waits = Waits::for_ever;
};

// The block that runs, and its threads.
struct Block {
  std::vector<Fiber> fibers;
  std::vector<uint64_t>
      exchange[2];  // what lanes give to a shuffle; by turns, for the next begins before all have read
  std::vector<unsigned> turn;
  std::unique_ptr<char[]> shared;
  size_t dynamic_size = 0;  // of the shared memory that the launch asks for
  void* scheduler = nullptr;
  const std::function<void()>* kernel = nullptr;
  unsigned current = 0;
#if defined(__SANITIZE_ADDRESS__)
  const void* scheduler_bottom = nullptr;
  size_t scheduler_size = 0;
#endif
};

inline Block block;
inline Index thread_index, block_index;

inline void wait(Waits waits) {
  Fiber& fiber = block.fibers[block.current];
  fiber.waits = waits;
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(waits == Waits::for_ever ? nullptr : &fake, block.scheduler_bottom,
                                 block.scheduler_size);
#endif
  cuda_emulation_switch(&fiber.stack_pointer, block.scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake, &block.scheduler_bottom, &block.scheduler_size);
#endif
}

inline void fiber_main() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &block.scheduler_bottom, &block.scheduler_size);
#endif
  (*block.kernel)();
  wait(Waits::for_ever);
  std::abort();
}

inline void resume(unsigned thread) {
  Fiber& fiber = block.fibers[thread];
  block.current = thread_index.x = thread;
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(&fake, fiber.stack, stack_size);
#endif
  cuda_emulation_switch(&block.scheduler, fiber.stack_pointer);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
}

// Lets a range of threads that wait for the same go on; throws where they do not.
inline bool released(unsigned begin, unsigned end, Waits what) {
  bool some = false, all = true;
  for (unsigned i = begin; i < end; ++i) (block.fibers[i].waits == what ? some : all) = block.fibers[i].waits == what;
  if (!some || !all) return false;
  for (unsigned i = begin; i < end; ++i) block.fibers[i].waits = Waits::for_nothing;
  return true;
}

template <class Kernel>
void run(unsigned grid, unsigned threads, size_t shared, const Kernel& kernel) {
  const std::function<void()> call = kernel;
  while (block.fibers.size() < threads) {
    Fiber fiber;
    fiber.stack = static_cast<char*>(
        mmap(nullptr, stack_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (fiber.stack == MAP_FAILED) throw std::bad_alloc();
    block.fibers.push_back(fiber);
  }
  for (auto& values : block.exchange) values.resize(threads);
  block.turn.resize(threads);
  block.kernel = &call;
  block.dynamic_size = shared;
  for (block_index.x = 0; block_index.x < grid; ++block_index.x) {
    block.shared.reset();
    for (unsigned i = 0; i < threads; ++i) {
      Fiber& fiber = block.fibers[i];
      void** top = reinterpret_cast<void**>(fiber.stack + stack_size) - 2;
      top[0] = reinterpret_cast<void*>(&fiber_main);  // where the switch returns to; the stack is then aligned
      fiber.stack_pointer = top - 6;
      fiber.waits = Waits::for_nothing;
      block.turn[i] = 0;
    }
    for (bool running = true; running;) {
      running = false;
      for (unsigned i = 0; i < threads; ++i)
        if (block.fibers[i].waits == Waits::for_nothing) {
          resume(i);
          running = true;
        }
      for (unsigned i = 0; i < threads; i += 32) running |= released(i, i + 32, Waits::for_warp);
      running |= released(0, threads, Waits::for_block);
    }
    for (unsigned i = 0; i < threads; ++i)
      if (block.fibers[i].waits != Waits::for_ever)
        throw std::logic_error("block " + std::to_string(block_index.x) + ", thread " + std::to_string(i) +
                               (block.fibers[i].waits == Waits::for_warp ? ": its warp" : ": its block") +
                               " never came to where it waits");
  }
  block.shared.reset();
}

// One shared variable a kernel: poisoned by the block's first thread to come, of exactly its size.
inline char* shared_memory(size_t size) {
  if (block.shared == nullptr) {
    block.shared.reset(new char[size]);
    std::memset(block.shared.get(), 0xff, size);
  }
  return block.shared.get();
}

}  // namespace cuda_emulation

#define threadIdx cuda_emulation::thread_index
#define blockIdx cuda_emulation::block_index

inline void __syncthreads() { cuda_emulation::wait(cuda_emulation::Waits::for_block); }

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int offset) {
  using cuda_emulation::block;
  static_assert(sizeof(T) <= sizeof(uint64_t));
  if (mask != 0xffffffffu) throw std::logic_error("only full warps are emulated");
  const unsigned me = block.current;
  std::vector<uint64_t>& values = block.exchange[block.turn[me]++ % 2];
  std::memcpy(&values[me], &value, sizeof value);
  cuda_emulation::wait(cuda_emulation::Waits::for_warp);
  std::memcpy(&value, &values[me ^ unsigned(offset)], sizeof value);
  return value;
}

// Copies that CUDA may make later are made at once.
inline void __pipeline_memcpy_async(void* to, const void* from, size_t size) { std::memcpy(to, from, size); }
inline void __pipeline_commit() {}
inline void __pipeline_wait_prior(size_t) {}
