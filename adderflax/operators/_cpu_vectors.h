// Vectors of float32 as wide as the processor's, and what the kernels do with them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

// With ADDERFLAX_PLAIN the text is compiled that other processors than x86's get: for tests.
#if defined(__x86_64__) && !defined(ADDERFLAX_PLAIN)
#define ADDERFLAX_X86
#include <immintrin.h>
#if defined(__AVX512BW__) && defined(__AVX512VL__)
#define ADDERFLAX_AVX512
#elif defined(__AVX2__)
#define ADDERFLAX_AVX2
#endif
#endif

namespace {

#if defined(ADDERFLAX_AVX512)
constexpr int kLanes = 16;
#elif defined(ADDERFLAX_AVX2)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vector __attribute__((vector_size(4 * kLanes)));
typedef int32_t Integers __attribute__((vector_size(4 * kLanes)));

inline Vector load(const float* from) {
  Vector vector;
  std::memcpy(&vector, from, sizeof(vector));
  return vector;
}

inline void store(float* to, Vector vector) { std::memcpy(to, &vector, sizeof(vector)); }

// The first lanes only, of any number: zeros in the others, which are neither read nor written.
inline Vector load_first(const float* from, int64_t lanes) {
  if (lanes >= kLanes) return load(from);
#if defined(ADDERFLAX_AVX512)
  return (Vector)_mm512_maskz_loadu_ps((__mmask16)((1u << std::max<int64_t>(lanes, 0)) - 1), from);
#else
  Vector vector = {};
  for (int64_t i = 0; i < lanes; ++i) vector[i] = from[i];
  return vector;
#endif
}

inline void store_first(float* to, Vector vector, int64_t lanes) {
  if (lanes >= kLanes) return store(to, vector);
#if defined(ADDERFLAX_AVX512)
  _mm512_mask_storeu_ps(to, (__mmask16)((1u << std::max<int64_t>(lanes, 0)) - 1), (__m512)vector);
#else
  for (int64_t i = 0; i < lanes; ++i) to[i] = vector[i];
#endif
}

inline Vector magnitude(Vector d) { return (Vector)((Integers)d & 0x7fffffff); }

// AMD's processors multiply and add in other units than those that add, subtract and compare. So a sum of v times
// 1, and a difference of b times 1, cost nothing where those are busy; they are rounded once, and so the same. The
// compiler must not know that it is 1.
#if defined(ADDERFLAX_AVX512) || (defined(ADDERFLAX_AVX2) && defined(__FMA__))
#define ADDERFLAX_FUSED
#if defined(ADDERFLAX_AVX512)
inline Vector fused(Vector a, Vector b, Vector c) { return (Vector)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
inline Vector difference(Vector a, Vector b, Vector one) {
  return (Vector)_mm512_fmsub_ps((__m512)a, (__m512)one, (__m512)b);
}
inline Vector maximum(Vector a, Vector b) { return (Vector)_mm512_max_ps((__m512)a, (__m512)b); }
#else
inline Vector fused(Vector a, Vector b, Vector c) { return (Vector)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
inline Vector difference(Vector a, Vector b, Vector one) {
  return (Vector)_mm256_fmsub_ps((__m256)a, (__m256)one, (__m256)b);
}
inline Vector maximum(Vector a, Vector b) { return (Vector)_mm256_max_ps((__m256)a, (__m256)b); }
#endif
inline Vector hidden_one() {
  Vector one = Vector{} + 1.0f;
  asm volatile("" : "+v"(one));
  return one;
}
inline Vector sum_of(Vector sum, Vector v, Vector one) { return fused(v, one, sum); }
#else
inline Vector fused(Vector a, Vector b, Vector c) { return a * b + c; }
inline Vector hidden_one() { return Vector{}; }
inline Vector sum_of(Vector sum, Vector v, Vector) { return sum + v; }
inline Vector difference(Vector a, Vector b, Vector) { return a - b; }
#endif

#if defined(ADDERFLAX_AVX512) && defined(__AVX512DQ__)
constexpr bool kClipsAtOnce = true;
// The one of less magnitude, with the sign of d, which is no NaN: between -limit and limit by one instruction.
inline Vector clip_at_once(Vector d, Vector limit) { return (Vector)_mm512_range_ps((__m512)d, (__m512)limit, 2); }
#else
constexpr bool kClipsAtOnce = false;
inline Vector clip_at_once(Vector d, Vector) { return d; }
#endif

// Between -limit and limit; a NaN stays one, so the second operand of these instructions is d.
inline Vector clip(Vector d, Vector limit) {
#if defined(ADDERFLAX_AVX512)
  return (Vector)_mm512_min_ps((__m512)limit, _mm512_max_ps((__m512)-limit, (__m512)d));
#elif defined(ADDERFLAX_AVX2)
  return (Vector)_mm256_min_ps((__m256)limit, _mm256_max_ps((__m256)-limit, (__m256)d));
#else
  d = d < -limit ? -limit : d;
  return d > limit ? limit : d;
#endif
}

// -1, 0 or 1, and NaN for NaN.
inline Vector sign(Vector d) {
  const Vector one = Vector{} + 1.0f;
  const Vector result = d > 0.0f ? one : (d < 0.0f ? -one : Vector{});
  return d == d ? result : d;
}

}  // namespace
