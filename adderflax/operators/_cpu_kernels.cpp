// The adder operator on CPUs: sums of tiles in vector registers, called by XLA through its FFI.
//
// All kernels compute out[r, c] = sum over t of a term of A[r, t], B[t, c] and, for gradients, of H[r, c],
// which has the result's shape. The columns lie along the lanes of vectors. Panels of a few vectors of
// columns are copied ("packed") into one run of memory, padded with zeros, and every tile of rows walks down
// its panel with its sums in registers: of A it reads scalars, which the processor broadcasts.
//
//   forward     A = x [M, K]           B = y [K, N]                           |a - b|, or 2 max(a, b) - a - b
//   gradient_x  A = g [M, N]           B = y, transposed   H = x [M, K]       clip(b - h) a
//   gradient_y  A = x, transposed      B = g [M, N]        H = y [K, N]       clip(a - h) b
//   bytes       A = x [M, K], uint8    B = y [K, N]                           |a - b|, eight terms a step
//
// The headers are parts of this one translation unit: vectors, how problems are cut, then a file a kind of kernel.

#include <cstdint>

#include "_cpu_bytes.h"
#include "_cpu_cut.h"
#include "_cpu_floats.h"
#include "xla/ffi/api/ffi.h"

namespace {

template <ffi::DataType type>
int64_t axis(const ffi::Buffer<type>& array, int from_the_end) {
  return array.dimensions()[array.dimensions().size() - from_the_end];
}

template <ffi::DataType type>
Lengths lengths(const ffi::Buffer<type>& result, int64_t terms) {
  const int64_t rows = axis(result, 2), columns = axis(result, 1);
  return {(int64_t)result.element_count() / (rows * columns), rows, columns, terms};
}

using F32 = ffi::Buffer<ffi::F32>;
using U8 = ffi::Buffer<ffi::U8>;
using S32 = ffi::Buffer<ffi::S32>;

ffi::Error forward(ffi::ThreadPool pool, F32 x, F32 y, ffi::Result<F32> out) {
  Floats f = {x.typed_data(), y.typed_data(), nullptr, out->typed_data(), lengths(*out, axis(x, 1))};
  run<kDistance>(pool, f);
  return ffi::Error::Success();
}

// The rule is clip(d, -limit, limit), or sign(d) where the limit is 0.
template <Term hardtanh, Term sign>
ffi::Error gradient(ffi::ThreadPool& pool, Floats f, float limit) {
  f.limit = limit;
  limit > 0 ? run<hardtanh>(pool, f) : run<sign>(pool, f);
  return ffi::Error::Success();
}

ffi::Error gradient_x(ffi::ThreadPool pool, F32 x, F32 y, F32 g, ffi::Result<F32> out, float limit) {
  Floats f = {g.typed_data(), y.typed_data(), x.typed_data(), out->typed_data(), lengths(*out, axis(g, 1))};
  f.b_transposed = true;
  return gradient<Term::kHardtanhA, Term::kSignA>(pool, f, limit);
}

ffi::Error gradient_y(ffi::ThreadPool pool, F32 x, F32 y, F32 g, ffi::Result<F32> out, float limit) {
  Floats f = {x.typed_data(), g.typed_data(), y.typed_data(), out->typed_data(), lengths(*out, axis(g, 2))};
  f.a_transposed = true;
  return gradient<Term::kHardtanhB, Term::kSignB>(pool, f, limit);
}

ffi::Error bytes(ffi::ThreadPool pool, U8 x, U8 y, ffi::Result<S32> out) {
  run(pool, Bytes{x.typed_data(), y.typed_data(), out->typed_data(), lengths(*out, axis(x, 1))});
  return ffi::Error::Success();
}

auto with_pool() { return ffi::Ffi::Bind().Ctx<ffi::ThreadPool>(); }

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(adderflax_forward, forward, with_pool().Arg<F32>().Arg<F32>().Ret<F32>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    adderflax_gradient_x, gradient_x,
    with_pool().Arg<F32>().Arg<F32>().Arg<F32>().Ret<F32>().Attr<float>("limit"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    adderflax_gradient_y, gradient_y,
    with_pool().Arg<F32>().Arg<F32>().Arg<F32>().Ret<F32>().Attr<float>("limit"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(adderflax_bytes, bytes, with_pool().Arg<U8>().Arg<U8>().Ret<S32>());
