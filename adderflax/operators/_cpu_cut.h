// How a problem is cut into items of work, and who does them.
#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;

// Calls run(0) to run(count - 1), on XLA's threads too. The caller takes its share and waits only for what
// others have begun, so that it never waits for a thread that waits like itself.
template <typename Run>
void for_each(ffi::ThreadPool& pool, int64_t count, const Run& run) {
  struct State {
    std::atomic<int64_t> next{0};
    int64_t finished = 0;
    std::mutex mutex;
    std::condition_variable all_finished;
  };
  auto state = std::make_shared<State>();
  // One that starts late finds nothing left, and touches nothing of the caller's, which may be gone.
  auto work = [state, count, &run] {
    int64_t done = 0;
    for (int64_t i; (i = state->next.fetch_add(1)) < count; ++done) run(i);
    if (done == 0) return;
    std::lock_guard<std::mutex> lock(state->mutex);
    if ((state->finished += done) == count) state->all_finished.notify_all();
  };
  const int64_t helpers = std::min<int64_t>(pool.num_threads(), count) - 1;
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule(decltype(work)(work));
  work();
  std::unique_lock<std::mutex> lock(state->mutex);
  state->all_finished.wait(lock, [&] { return state->finished == count; });
}

int64_t ceil_div(int64_t length, int64_t step) { return (length + step - 1) / step; }

struct Lengths {
  int64_t batch, rows, columns, terms;
};

// Memory on whole cache lines, a thread's own, kept for its next call.
template <typename T>
T* workspace(int64_t count) {
  thread_local std::vector<T> memory;
  constexpr int64_t kLine = 64 / sizeof(T);
  if ((int64_t)memory.size() < count + kLine) memory.resize(count + kLine);
  auto address = reinterpret_cast<uintptr_t>(memory.data());
  return memory.data() + (64 - address % 64) % 64 / sizeof(T);
}

constexpr int64_t kMostRows = 240;   // of an item of work: enough that packing its panel costs little
constexpr int64_t kFewestRows = 48;  // where threads would idle otherwise
constexpr int64_t kRowStep = 24;     // most heights of tiles divide it
// In a panel, so that it stays in the second-level cache: 96 KiB of float32, 128 of bytes.
constexpr int64_t kMostTerms = 512, kMostByteTerms = 4096;

// Runs tiles(batch, first row, last row, first column, columns) for all of a problem.
template <typename Tiles>
void cut(ffi::ThreadPool& pool, const Lengths& n, int64_t panel, const Tiles& tiles) {
  const int64_t panels = ceil_div(n.columns, panel);
  const int64_t threads = std::max<int64_t>(1, pool.num_threads());
  const int64_t fair = n.batch * n.rows * panels / (4 * threads);
  const int64_t most = std::max(kFewestRows, std::min(kMostRows, fair));
  const int64_t chunks = ceil_div(n.rows, most);
  const int64_t rows = ceil_div(ceil_div(n.rows, chunks), kRowStep) * kRowStep;
  for_each(pool, n.batch * panels * chunks, [&](int64_t item) {
    const int64_t chunk = item % chunks, first = item / chunks % panels * panel;
    const int64_t start = chunk * rows, end = std::min(n.rows, start + rows);
    if (start < end) tiles(item / chunks / panels, start, end, first, std::min(panel, n.columns - first));
  });
}

}  // namespace
