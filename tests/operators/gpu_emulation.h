// Runs the text of a CUDA kernel on a CPU, for tests.
//
// The threads of a block are fibers. Between two barriers they run one after another, from the
// first to the last or the other way: a kernel that lacks a barrier gives different results.
// Shared memory and results start out as NaN, and the address sanitizer watches every access to
// device memory; the undefined behaviour sanitizer watches the alignment of vectors.

#pragma once

#define GPU_EMULATION
#define UNROLL
#define __device__
#define __global__
#define __forceinline__ inline
#define __restrict__
#define __shared__ static
#define __launch_bounds__(...)

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <numeric>
#include <vector>

namespace emulation {

struct Index {
  unsigned x;
};

struct Fiber {
  ucontext_t context;
  std::vector<char> stack;
  bool finished;
};

inline std::vector<Fiber> fibers;
inline std::vector<int> votes;
inline std::vector<float> exchanged;
inline ucontext_t scheduler;
inline unsigned current;
inline std::function<void()> body;

[[noreturn]] inline void fail(const char* message) {
  std::fprintf(stderr, "%s\n", message);
  std::exit(1);
}

inline void run_fiber() {
  body();
  fibers[current].finished = true;
  swapcontext(&fibers[current].context, &scheduler);
}

}  // namespace emulation

inline emulation::Index threadIdx, blockIdx;

inline void __syncthreads() {
  swapcontext(&emulation::fibers[emulation::current].context, &emulation::scheduler);
}

// Every thread of a block must call it; a barrier more than the GPU's.
inline bool __all_sync(unsigned, bool vote) {
  const unsigned self = threadIdx.x, warp = self / 32 * 32;
  emulation::votes[self] = vote;
  __syncthreads();
  bool all = true;
  for (unsigned i = warp; i < warp + 32; ++i) all = all && emulation::votes[i];
  __syncthreads();
  return all;
}

// Likewise.
inline float __shfl_xor_sync(unsigned, float value, int mask) {
  const unsigned self = threadIdx.x;
  emulation::exchanged[self] = value;
  __syncthreads();
  const float other = emulation::exchanged[self ^ mask];
  __syncthreads();
  return other;
}

inline float __fmul_rn(float a, float b) { return a * b; }

inline float __uint_as_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

inline unsigned __float_as_uint(float value) {
  unsigned bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

inline unsigned add_byte_differences(unsigned sum, unsigned a, unsigned b) {
  for (int shift = 0; shift < 32; shift += 8) sum += std::abs(int(a >> shift & 255) - int(b >> shift & 255));
  return sum;
}

inline float __saturatef(float value) { return value > 0.0f ? std::min(value, 1.0f) : 0.0f; }

inline float half_bits_to_float(unsigned short bits) {
  const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
  const float magnitude = exponent == 0    ? std::ldexp(float(mantissa), -24)
                          : exponent == 31 ? (mantissa ? NAN : INFINITY)
                                           : std::ldexp(float(mantissa + 1024), exponent - 25);
  return bits >> 15 ? -magnitude : magnitude;
}

inline void store_four(float* to, float a, float b, float c, float d) {
  if (reinterpret_cast<std::uintptr_t>(to) % 16) emulation::fail("store_four: not aligned to 16 bytes");
  to[0] = a, to[1] = b, to[2] = c, to[3] = d;
}

namespace emulation {

// Launches a grid; `shared` is the kernel's shared memory.
inline void launch(unsigned blocks, unsigned threads, void* shared, size_t shared_bytes, bool descending,
                   std::function<void()> kernel) {
  body = kernel;
  fibers.resize(threads);
  votes.resize(threads);
  exchanged.resize(threads);
  for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) {
    std::memset(shared, 0xff, shared_bytes);  // NaN
    for (Fiber& fiber : fibers) {
      fiber.finished = false;
      fiber.stack.resize(1 << 16);
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.data();
      fiber.context.uc_stack.ss_size = fiber.stack.size();
      fiber.context.uc_link = nullptr;
      makecontext(&fiber.context, run_fiber, 0);
    }
    std::vector<unsigned> turns(threads);
    std::iota(turns.begin(), turns.end(), 0);
    if (descending) std::reverse(turns.begin(), turns.end());
    for (unsigned finished = 0; finished < threads;) {
      finished = 0;
      for (unsigned turn : turns) {
        current = threadIdx.x = turn;
        if (fibers[turn].finished) fail("a thread ended while others waited at a barrier");
        swapcontext(&scheduler, &fibers[turn].context);
        finished += fibers[turn].finished;
      }
    }
  }
}

// An array of a file, on the heap alone so that the sanitizer sees its ends.
template <typename T>
std::vector<T> read(std::FILE* file, size_t count) {
  std::vector<T> array(count);
  if (std::fread(array.data(), sizeof(T), count, file) != count) fail("the input ends early");
  return array;
}

// Runs a kernel in both orders, which must agree bit by bit, and writes its results.
inline void run(std::FILE* output, unsigned blocks, unsigned threads, void* shared, size_t shared_bytes,
                size_t results, std::function<void(float*)> kernel) {
  std::vector<float> out[2];
  for (bool descending : {false, true}) {
    out[descending].assign(results, std::numeric_limits<float>::quiet_NaN());
    launch(blocks, threads, shared, shared_bytes, descending, [&] { kernel(out[descending].data()); });
  }
  if (std::memcmp(out[0].data(), out[1].data(), results * sizeof(float))) {
    // Tells the reader of the results, who knows which kernel this is.
    std::fill(out[0].begin(), out[0].end(), std::numeric_limits<float>::infinity());
  }
  std::fwrite(out[0].data(), sizeof(float), results, output);
}

}  // namespace emulation
