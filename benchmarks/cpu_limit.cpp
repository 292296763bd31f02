// What the adder arithmetic itself allows on this CPU: -sum_k |x[m, k] - y[k, n]| in float32 with the
// sums of a 6 x 48 tile in AVX-512 registers, on as many threads as the machine has cores.
// Multiples of 6 rows and 48 columns only: a limit, not an operator.

#include <immintrin.h>

#include <algorithm>
#include <thread>
#include <vector>

namespace {

constexpr int kRows = 6, kVectors = 3, kLanes = 16;

void forward_rows(const float* x, const float* y, float* out, int first, int last, int depth, int columns) {
  const __m512 magnitude = _mm512_castsi512_ps(_mm512_set1_epi32(0x7fffffff));
  for (int n = 0; n < columns; n += kVectors * kLanes) {
    for (int m = first; m < last; m += kRows) {
      __m512 sums[kRows][kVectors];
      for (auto& row : sums)
        for (auto& sum : row) sum = _mm512_setzero_ps();
      for (int k = 0; k < depth; ++k) {
        __m512 right[kVectors];
        for (int j = 0; j < kVectors; ++j) right[j] = _mm512_loadu_ps(y + (long)k * columns + n + j * kLanes);
        for (int i = 0; i < kRows; ++i) {
          const __m512 left = _mm512_set1_ps(x[(long)(m + i) * depth + k]);
          for (int j = 0; j < kVectors; ++j)
            sums[i][j] = _mm512_add_ps(sums[i][j], _mm512_and_ps(magnitude, _mm512_sub_ps(left, right[j])));
        }
      }
      for (int i = 0; i < kRows; ++i)
        for (int j = 0; j < kVectors; ++j)
          _mm512_storeu_ps(out + (long)(m + i) * columns + n + j * kLanes,
                           _mm512_sub_ps(_mm512_setzero_ps(), sums[i][j]));
    }
  }
}

}  // namespace

extern "C" void adder_forward(const float* x, const float* y, float* out, int rows, int depth, int columns,
                              int threads) {
  const int tiles = rows / kRows;
  std::vector<std::thread> workers;
  for (int t = 0; t < threads; ++t) {
    const int first = (int)((long)tiles * t / threads) * kRows, last = (int)((long)tiles * (t + 1) / threads) * kRows;
    workers.emplace_back([=] { forward_rows(x, y, out, first, last, depth, columns); });
  }
  for (auto& worker : workers) worker.join();
}
