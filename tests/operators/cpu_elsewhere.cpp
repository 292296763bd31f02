// The CPU kernels without XLA and Python, for processors that are emulated: operands in, results out.
//
//   cpu_elsewhere batch M K N limit < operands > results
//
// Operands: x [B, M, K], y [B, K, N], g [B, M, N] in float32, then x and y in bytes. Results: forward, gradient_x
// and gradient_y by hardtanh and by sign in float32, then the sums of bytes in int32.

#include <cstdio>
#include <cstdlib>
#include <vector>

#include "_cpu_bytes.h"
#include "_cpu_floats.h"

template <typename T>
std::vector<T> read(int64_t count) {
  std::vector<T> values(count);
  if ((int64_t)std::fread(values.data(), sizeof(T), count, stdin) != count) std::exit(1);
  return values;
}

template <typename T>
void write(const std::vector<T>& values) {
  std::fwrite(values.data(), sizeof(T), values.size(), stdout);
}

int main(int, char** arguments) {
  const int64_t b = std::atoll(arguments[1]), m = std::atoll(arguments[2]), k = std::atoll(arguments[3]),
                n = std::atoll(arguments[4]);
  const float limit = std::atof(arguments[5]);
  const auto x = read<float>(b * m * k), y = read<float>(b * k * n), g = read<float>(b * m * n);
  const auto byte_x = read<uint8_t>(b * m * k), byte_y = read<uint8_t>(b * k * n);
  ffi::ThreadPool pool;
  std::vector<float> out(b * m * n), dx(b * m * k), dy(b * k * n);
  std::vector<int32_t> sums(b * m * n);
  run<kDistance>(pool, Floats{x.data(), y.data(), nullptr, out.data(), {b, m, n, k}});
  write(out);
  const Floats of_x{g.data(), y.data(), x.data(), dx.data(), {b, m, k, n}, false, true, limit};
  const Floats of_y{x.data(), g.data(), y.data(), dy.data(), {b, k, n, m}, true, false, limit};
  run<Term::kHardtanhA>(pool, of_x);
  run<Term::kHardtanhB>(pool, of_y);
  write(dx);
  write(dy);
  run<Term::kSignA>(pool, of_x);
  run<Term::kSignB>(pool, of_y);
  write(dx);
  write(dy);
  run(pool, Bytes{byte_x.data(), byte_y.data(), sums.data(), {b, m, n, k}});
  write(sums);
}
