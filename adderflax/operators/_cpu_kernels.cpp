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

#include <algorithm>
#include <atomic>
#include <cfloat>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <vector>

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

#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;

// ---- vectors ----

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

// x86's processors multiply and add in other units than those that add, subtract and compare. So a sum of v times
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

// ---- threads ----

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

// ---- how a problem is cut ----

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

// ---- float32 ----

// |a - b|, or max(a, b) in its place; or the rule of gradients, and whether A or B is what it is multiplied by.
enum class Term { kForward, kMaximum, kHardtanhA, kSignA, kHardtanhB, kSignB };

constexpr bool is_gradient(Term term) { return term != Term::kForward && term != Term::kMaximum; }

// Rows of a tile that is `vectors` wide: sums, and for gradients H, fill the registers.
constexpr int tile_rows(Term term, int vectors) {
#if defined(ADDERFLAX_AVX512) || !defined(ADDERFLAX_X86)  // 32 registers, as ARM has them
  if (is_gradient(term)) return vectors == 3 ? 4 : vectors == 2 ? 6 : 10;
  return vectors == 3 ? 6 : vectors == 2 ? 8 : 12;
#else
  if (is_gradient(term)) return vectors == 3 ? 1 : vectors == 2 ? 2 : 4;
  return vectors == 3 ? 3 : vectors == 2 ? 5 : 8;
#endif
}

struct Floats {
  const float *a, *b, *h;
  float* out;
  Lengths n;
  bool a_transposed = false, b_transposed = false;  // in memory [T, R] and [C, T]
  float limit = 0.0f, factor = 1.0f;                // of differences; of the whole sum
};

// Copies columns first.. and terms t.. of B to [terms, width], zeros in the columns that are not there.
void pack(const Floats& f, const float* b, int64_t t, int64_t terms, int64_t first, int64_t columns, int64_t width,
          float* panel) {
  if (!f.b_transposed) {
    for (int64_t i = 0; i < terms; ++i)
      for (int64_t c = 0; c < width; c += kLanes)
        store(panel + i * width + c, load_first(b + (t + i) * f.n.columns + first + c, columns - c));
    return;
  }
  int64_t c = 0;
#if defined(ADDERFLAX_X86)
  for (; c + 4 <= columns; c += 4) {
    const float* from = b + (first + c) * f.n.terms + t;
    int64_t i = 0;
    for (; i + 4 <= terms; i += 4) {
      __m128 rows[4];
      for (int j = 0; j < 4; ++j) rows[j] = _mm_loadu_ps(from + j * f.n.terms + i);
      _MM_TRANSPOSE4_PS(rows[0], rows[1], rows[2], rows[3]);
      for (int j = 0; j < 4; ++j) _mm_storeu_ps(panel + (i + j) * width + c, rows[j]);
    }
    for (; i < terms; ++i)
      for (int j = 0; j < 4; ++j) panel[i * width + c + j] = from[j * f.n.terms + i];
  }
#endif
  for (; c < columns; ++c)
    for (int64_t i = 0; i < terms; ++i) panel[i * width + c] = b[(first + c) * f.n.terms + t + i];
  for (; c < width; ++c)
    for (int64_t i = 0; i < terms; ++i) panel[i * width + c] = 0.0f;
}

// Whether all lanes are finite numbers.
inline bool is_finite(Vector v) {
  const Integers differs = v - v != Vector{};
  int32_t any = 0;
  for (int i = 0; i < kLanes; ++i) any |= differs[i];
  return !any;
}

// Whether `count` numbers are finite: v - v is 0 then, and NaN otherwise.
inline bool are_finite(const float* from, int64_t count) {
  Vector sum = {};
  for (int64_t i = 0; i < count; i += kLanes) {
    const Vector v = load_first(from + i, count - i);
    sum += v - v;
  }
  return is_finite(sum);
}

// Adds `terms` terms to the sums of a tile; `at_once` clips by one instruction. Half of a gradient's differences
// are fused then, so that units are equally busy, and otherwise all of them.
template <Term term, int vectors, bool at_once, int kRows>
inline __attribute__((always_inline)) void add_terms(const float* const (&a_rows)[kRows], int64_t a_term,
                                                     const float* panel, int64_t terms,
                                                     const Vector (&held)[kRows][vectors], float limit,
                                                     Vector (&sums)[kRows][vectors]) {
  const Vector bound = Vector{} + limit, one = hidden_one();
  auto clipped = [bound](Vector d) { return at_once ? clip_at_once(d, bound) : clip(d, bound); };
  for (int64_t t = 0; t < terms; ++t) {
    Vector right[vectors];
    for (int j = 0; j < vectors; ++j) right[j] = load(panel + t * vectors * kLanes + j * kLanes);
    for (int i = 0; i < kRows; ++i) {
      const Vector left = a_rows[i][t * a_term] - Vector{};  // x + 0 would be computed: -0 is not 0 then
      for (int j = 0; j < vectors; ++j) {
        const bool fuse = !at_once || (i + j) % 2 == 0;
        if (term == Term::kForward) sums[i][j] = sum_of(sums[i][j], magnitude(left - right[j]), one);
#if defined(ADDERFLAX_FUSED)
        if (term == Term::kMaximum) sums[i][j] = sum_of(sums[i][j], maximum(left, right[j]), one);
#endif
        if (term == Term::kHardtanhA) {
          const Vector d = fuse ? difference(right[j], held[i][j], one) : right[j] - held[i][j];
          sums[i][j] = fused(clipped(d), left, sums[i][j]);
        }
        if (term == Term::kSignA) sums[i][j] = fused(sign(right[j] - held[i][j]), left, sums[i][j]);
        if (term == Term::kHardtanhB) {
          const Vector d = fuse ? difference(left, held[i][j], one) : left - held[i][j];
          sums[i][j] = fused(clipped(d), right[j], sums[i][j]);
        }
        if (term == Term::kSignB) sums[i][j] = fused(sign(left - held[i][j]), right[j], sums[i][j]);
      }
    }
  }
}

#if defined(ADDERFLAX_FUSED)
inline float total(Vector v) {
#if defined(ADDERFLAX_AVX512)
  return _mm512_reduce_add_ps((__m512)v);
#else
  float sum = 0.0f;
  for (int i = 0; i < kLanes; ++i) sum += v[i];
  return sum;
#endif
}

// One bit a lane.
inline uint32_t at_least(Vector a, Vector b) {
#if defined(ADDERFLAX_AVX512)
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GE_OQ);
#else
  return _mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_GE_OQ));
#endif
}

// A sum d of |a - b| was found as 2 sum max(a, b) - sum a - sum b: of each lane, whether it is as exact as one of
// differences is. What is rounded on the way is no larger than the sums of |a| and |b|, so it is not where d is
// small beside these, or not finite.
inline uint32_t exact(Vector d, Vector row_size, Vector column_size) {
  return at_least(d * 4.0f, row_size + column_size) & at_least(Vector{} + FLT_MAX, d);
}

// Puts sums of differences where the others are not exact. Of each sum its own row and column decide, so that it
// does not depend on its tile.
template <int vectors, int kRows>
__attribute__((noinline)) void replace(const float* const (&a_rows)[kRows], const float* panel, int64_t terms,
                                       const Vector (&row_sizes)[kRows], const float* column_sizes,
                                       Vector (&sums)[kRows][vectors]) {
  const Vector none[kRows][vectors] = {};
  Vector again[kRows][vectors] = {};
  add_terms<Term::kForward, vectors, false>(a_rows, 1, panel, terms, none, 0.0f, again);
  for (int i = 0; i < kRows; ++i)
    for (int j = 0; j < vectors; ++j) {
      const uint32_t kept = exact(sums[i][j], row_sizes[i], load(column_sizes + j * kLanes));
      for (int lane = 0; lane < kLanes; ++lane)
        if (!(kept >> lane & 1)) sums[i][j][lane] = again[i][j][lane];
    }
}

// Turns sums of max(a, b) into those of |a - b|; `column_sums` has the sums of b, then those of |b|.
template <int vectors, int kRows>
inline __attribute__((always_inline)) void to_distances(const float* const (&a_rows)[kRows], const float* panel,
                                                        int64_t terms, const float* column_sums,
                                                        Vector (&sums)[kRows][vectors]) {
  constexpr uint32_t kAll = (1u << kLanes) - 1;
  const float* column_sizes = column_sums + vectors * kLanes;
  uint32_t all = kAll;
  Vector row_sizes[kRows];
  for (int i = 0; i < kRows; ++i) {
    Vector row = {}, size = {};
    for (int64_t t = 0; t < terms; t += kLanes) {
      const Vector a = load_first(a_rows[i] + t, terms - t);
      row += a;
      size += magnitude(a);
    }
    const Vector row_sum = Vector{} + total(row);
    row_sizes[i] = Vector{} + total(size);
    for (int j = 0; j < vectors; ++j) {
      sums[i][j] = sums[i][j] * 2.0f - (row_sum + load(column_sums + j * kLanes));
      all &= exact(sums[i][j], row_sizes[i], load(column_sizes + j * kLanes));
    }
  }
  if (all == kAll) return;
  // A copy, without which the compiler would keep the sums in memory everywhere.
  Vector copy[kRows][vectors];
  for (int i = 0; i < kRows; ++i)
    for (int j = 0; j < vectors; ++j) copy[i][j] = sums[i][j];
  replace<vectors>(a_rows, panel, terms, row_sizes, column_sizes, copy);
  for (int i = 0; i < kRows; ++i)
    for (int j = 0; j < vectors; ++j) sums[i][j] = copy[i][j];
}
#endif

// What a tile takes from its panel.
struct Panel {
  const float* columns;  // [terms, width]
  int64_t terms;
  bool finite;        // whether what H is subtracted from is known to be
  const float* sums;  // of each column, and then of its magnitudes, where maxima are summed
};

// Adds the terms of a panel to a tile of the result, or sets it to their sum.
template <Term term, int vectors>
void tile(const float* a, int64_t a_row, int64_t a_term, const Panel& panel, const float* h, float* out,
          int64_t columns, int64_t valid_rows, int64_t valid_columns, bool add, float limit, float factor) {
  constexpr int kRows = tile_rows(term, vectors);
  // Rows that are not there are the last one again, and are not stored.
  const float* a_rows[kRows];
  for (int i = 0; i < kRows; ++i) a_rows[i] = a + std::min<int64_t>(i, valid_rows - 1) * a_row;
  Vector sums[kRows][vectors], held[kRows][vectors];
  Vector finite = {};
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < vectors; ++j) sums[i][j] = Vector{};
    if (is_gradient(term)) {
      const float* from = h + std::min<int64_t>(i, valid_rows - 1) * columns;
      for (int j = 0; j < vectors; ++j) {
        held[i][j] = load_first(from + j * kLanes, valid_columns - j * kLanes);
        finite += held[i][j] - held[i][j];
      }
    }
  }
  // Two forms in one function cost registers.
  if (kClipsAtOnce && (term == Term::kHardtanhA || term == Term::kHardtanhB) && panel.finite && is_finite(finite))
    add_terms<term, vectors, true>(a_rows, a_term, panel.columns, panel.terms, held, limit, sums);
  else
    add_terms<term, vectors, false>(a_rows, a_term, panel.columns, panel.terms, held, limit, sums);
#if defined(ADDERFLAX_FUSED)
  if (term == Term::kMaximum)
    to_distances<vectors>(a_rows, panel.columns, panel.terms, panel.sums, sums);
#endif
  for (int i = 0; i < kRows; ++i) {
    if (i >= valid_rows) break;
    for (int j = 0; j < vectors; ++j) {
      float* to = out + i * columns + j * kLanes;
      const int64_t lanes = valid_columns - j * kLanes;
      const Vector before = add ? load_first(to, lanes) : Vector{};
      store_first(to, before + sums[i][j] * factor, lanes);
    }
  }
}

template <Term term, int vectors>
void panel_of(const Floats& f, int64_t batch, int64_t start, int64_t end, int64_t first, int64_t columns) {
  constexpr int kRows = tile_rows(term, vectors), kWidth = vectors * kLanes;
  const Lengths& n = f.n;
  const float* a = f.a + batch * n.rows * n.terms;
  const float* b = f.b + batch * n.terms * n.columns;
  const float* h = is_gradient(term) ? f.h + batch * n.rows * n.columns + first : nullptr;
  float* out = f.out + batch * n.rows * n.columns + first;
  const int64_t a_row = f.a_transposed ? 1 : n.terms, a_term = f.a_transposed ? n.rows : 1;
  float* panel = workspace<float>(std::min(kMostTerms, n.terms) * kWidth + 2 * kWidth);
  for (int64_t t = 0; t < n.terms; t += kMostTerms) {
    const int64_t terms = std::min(kMostTerms, n.terms - t);
    float* sums = panel + terms * kWidth;
    pack(f, b, t, terms, first, columns, kWidth, panel);
    bool finite = kClipsAtOnce;
    if (kClipsAtOnce && term == Term::kHardtanhA) finite = are_finite(panel, terms * kWidth);
    if (kClipsAtOnce && term == Term::kHardtanhB)  // A is transposed
      for (int64_t i = 0; i < terms; ++i) finite &= are_finite(a + (t + i) * a_term + start, end - start);
    if (term == Term::kMaximum) {
      for (int j = 0; j < vectors; ++j) {
        Vector column = {}, size = {};
        for (int64_t i = 0; i < terms; ++i) {
          const Vector b = load(panel + i * kWidth + j * kLanes);
          column += b;
          size += magnitude(b);
        }
        store(sums + j * kLanes, column);
        store(sums + kWidth + j * kLanes, size);
      }
    }
    for (int64_t m = start; m < end; m += kRows)
      tile<term, vectors>(a + m * a_row + t * a_term, a_row, a_term, {panel, terms, finite, sums},
                          is_gradient(term) ? h + m * n.columns : nullptr, out + m * n.columns, n.columns,
                          std::min<int64_t>(kRows, end - m), columns, t > 0, f.limit, f.factor);
  }
}

template <Term term>
void run(ffi::ThreadPool& pool, const Floats& f) {
  constexpr int kVectors = 3;
  cut(pool, f.n, kVectors * kLanes,
      [&](int64_t batch, int64_t start, int64_t end, int64_t first, int64_t columns) {
        const int64_t vectors = ceil_div(columns, kLanes);
        if (vectors == 1) panel_of<term, 1>(f, batch, start, end, first, columns);
        if (vectors == 2) panel_of<term, 2>(f, batch, start, end, first, columns);
        if (vectors == 3) panel_of<term, 3>(f, batch, start, end, first, columns);
      });
}

// ---- bytes ----

// Terms are taken eight at a time: a step of a panel has eight consecutive terms of each of its columns,
// which is what x86's sums of absolute differences (psadbw) take, 64 terms an instruction with AVX-512.

struct Bytes {
  const uint8_t *a, *b;
  int32_t* out;
  Lengths n;
};

constexpr int kStep = 8;

#if defined(ADDERFLAX_AVX512)
typedef __m512i Sums;  // of one column in each lane of 64 bits
constexpr int kByteRows = 6, kMostByteVectors = 4;
inline Sums add_distances(Sums sums, int64_t left, const uint8_t* right) {
  return _mm512_add_epi64(sums, _mm512_sad_epu8(_mm512_set1_epi64(left), _mm512_loadu_si512(right)));
}
#elif defined(ADDERFLAX_AVX2)
typedef __m256i Sums;
constexpr int kByteRows = 4, kMostByteVectors = 2;
inline Sums add_distances(Sums sums, int64_t left, const uint8_t* right) {
  return _mm256_add_epi64(
      sums, _mm256_sad_epu8(_mm256_set1_epi64x(left), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(right))));
}
#else
struct Sums {
  int64_t lanes[2];
};
constexpr int kByteRows = 4, kMostByteVectors = 2;
inline Sums add_distances(Sums sums, int64_t left, const uint8_t* right) {
  uint8_t bytes[kStep];
  std::memcpy(bytes, &left, kStep);
  for (int lane = 0; lane < 2; ++lane) {
    int distance = 0;
    for (int i = 0; i < kStep; ++i) distance += std::abs(bytes[i] - right[lane * kStep + i]);
    sums.lanes[lane] += distance;
  }
  return sums;
}
#endif
constexpr int kByteLanes = sizeof(Sums) / 8;

// Takes the first columns' sums off what is there, or off 0.
inline void subtract_first(int32_t* from, Sums sums, int64_t columns, bool add) {
#if defined(ADDERFLAX_AVX512)
  const auto mask = (__mmask8)((1u << std::max<int64_t>(0, std::min<int64_t>(columns, kByteLanes))) - 1);
  const __m256i before = add ? _mm256_maskz_loadu_epi32(mask, from) : _mm256_setzero_si256();
  _mm256_mask_storeu_epi32(from, mask, _mm256_sub_epi32(before, _mm512_cvtepi64_epi32(sums)));
#else
  int64_t lanes[kByteLanes];
  std::memcpy(lanes, &sums, sizeof(sums));
  for (int64_t i = 0; i < std::min<int64_t>(columns, kByteLanes); ++i)
    from[i] = (int32_t)((add ? from[i] : 0) - lanes[i]);
#endif
}

// Copies columns first.. of B [all, columns] to [steps, width, kStep], zeros in terms and columns that are not
// there.
void pack(const Bytes& f, const uint8_t* b, int64_t all, int64_t first, int64_t columns, int64_t width,
          uint8_t* panel) {
  for (int64_t t = 0; t < all; t += kStep, panel += width * kStep) {
    const int64_t terms = std::min<int64_t>(kStep, all - t);
    const uint8_t* from = b + t * f.n.columns + first;
    int64_t c = 0;
#if defined(ADDERFLAX_X86)
    for (; terms == kStep && c + 16 <= columns; c += 16) {
      __m128i rows[8], pairs[8], fours[8];
      for (int i = 0; i < 8; ++i)
        rows[i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i * f.n.columns + c));
      for (int i = 0; i < 4; ++i) {
        pairs[i] = _mm_unpacklo_epi8(rows[2 * i], rows[2 * i + 1]);
        pairs[i + 4] = _mm_unpackhi_epi8(rows[2 * i], rows[2 * i + 1]);
      }
      for (int half = 0; half < 8; half += 4) {
        const __m128i* p = pairs + half;
        fours[half] = _mm_unpacklo_epi16(p[0], p[1]);
        fours[half + 1] = _mm_unpackhi_epi16(p[0], p[1]);
        fours[half + 2] = _mm_unpacklo_epi16(p[2], p[3]);
        fours[half + 3] = _mm_unpackhi_epi16(p[2], p[3]);
        __m128i* to = reinterpret_cast<__m128i*>(panel + (c + 2 * half) * kStep);
        for (int i = 0; i < 2; ++i) {
          _mm_storeu_si128(to + 2 * i, _mm_unpacklo_epi32(fours[half + i], fours[half + i + 2]));
          _mm_storeu_si128(to + 2 * i + 1, _mm_unpackhi_epi32(fours[half + i], fours[half + i + 2]));
        }
      }
    }
#endif
    for (; c < width; ++c)
      for (int64_t i = 0; i < kStep; ++i)
        panel[c * kStep + i] = i < terms && c < columns ? from[i * f.n.columns + c] : 0;
  }
}

// Takes the distances of `terms` terms off a tile of the result, or off 0.
template <int vectors>
void tile(const uint8_t* a, const uint8_t* panel, int64_t terms, int32_t* out, const Lengths& n, int64_t valid_rows,
          int64_t valid_columns, bool add_to_it) {
  const uint8_t* a_rows[kByteRows];
  for (int i = 0; i < kByteRows; ++i) a_rows[i] = a + std::min<int64_t>(i, valid_rows - 1) * n.terms;
  Sums sums[kByteRows][vectors] = {};
  auto add = [&](int i, int64_t left) {
    for (int j = 0; j < vectors; ++j)
      sums[i][j] = add_distances(sums[i][j], left, panel + j * kByteLanes * kStep);
  };
  int64_t t = 0;
  for (; t + kStep <= terms; t += kStep, panel += vectors * kByteLanes * kStep) {
    for (int i = 0; i < kByteRows; ++i) {
      int64_t left;
      std::memcpy(&left, a_rows[i] + t, kStep);
      add(i, left);
    }
  }
  if (t < terms) {  // the last ones, filled up by zeros that meet those of the panel
    for (int i = 0; i < kByteRows; ++i) {
      int64_t left = 0;
      std::memcpy(&left, a_rows[i] + t, terms - t);
      add(i, left);
    }
  }
  for (int i = 0; i < kByteRows; ++i) {
    if (i >= valid_rows) break;
    for (int j = 0; j < vectors; ++j)
      subtract_first(out + i * n.columns + j * kByteLanes, sums[i][j], valid_columns - j * kByteLanes, add_to_it);
  }
}

template <int vectors>
void panel_of(const Bytes& f, int64_t batch, int64_t start, int64_t end, int64_t first, int64_t columns) {
  constexpr int kWidth = vectors * kByteLanes;
  const Lengths& n = f.n;
  const uint8_t *a = f.a + batch * n.rows * n.terms, *b = f.b + batch * n.terms * n.columns;
  int32_t* out = f.out + batch * n.rows * n.columns + first;
  uint8_t* panel = workspace<uint8_t>(ceil_div(std::min(kMostByteTerms, n.terms), kStep) * kStep * kWidth);
  for (int64_t t = 0; t < n.terms; t += kMostByteTerms) {
    const int64_t terms = std::min(kMostByteTerms, n.terms - t);
    pack(f, b + t * n.columns, terms, first, columns, kWidth, panel);
    for (int64_t m = start; m < end; m += kByteRows)
      tile<vectors>(a + m * n.terms + t, panel, terms, out + m * n.columns, n, std::min<int64_t>(kByteRows, end - m),
                    columns, t > 0);
  }
}

void run(ffi::ThreadPool& pool, const Bytes& f) {
  cut(pool, f.n, kMostByteVectors * kByteLanes,
      [&](int64_t batch, int64_t start, int64_t end, int64_t first, int64_t columns) {
        const int64_t vectors = ceil_div(columns, kByteLanes);
        if (vectors == 1) panel_of<1>(f, batch, start, end, first, columns);
        if (vectors == 2) panel_of<2>(f, batch, start, end, first, columns);
        if (vectors == 3) panel_of<3>(f, batch, start, end, first, columns);
        if (vectors == 4) panel_of<4>(f, batch, start, end, first, columns);
      });
}

// ---- what XLA calls ----

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
  f.factor = -1.0f;
#if defined(ADDERFLAX_FUSED)
  run<Term::kMaximum>(pool, f);
#else
  run<Term::kForward>(pool, f);
#endif
  return ffi::Error::Success();
}

// The rule is slope * clip(d, -limit, limit), or sign(d) where the limit is 0.
template <Term hardtanh, Term sign>
ffi::Error gradient(ffi::ThreadPool& pool, Floats f, float limit, float slope) {
  f.limit = limit;
  f.factor = slope;
  limit > 0 ? run<hardtanh>(pool, f) : run<sign>(pool, f);
  return ffi::Error::Success();
}

ffi::Error gradient_x(ffi::ThreadPool pool, F32 x, F32 y, F32 g, ffi::Result<F32> out, float limit, float slope) {
  Floats f = {g.typed_data(), y.typed_data(), x.typed_data(), out->typed_data(), lengths(*out, axis(g, 1))};
  f.b_transposed = true;
  return gradient<Term::kHardtanhA, Term::kSignA>(pool, f, limit, slope);
}

ffi::Error gradient_y(ffi::ThreadPool pool, F32 x, F32 y, F32 g, ffi::Result<F32> out, float limit, float slope) {
  Floats f = {x.typed_data(), g.typed_data(), y.typed_data(), out->typed_data(), lengths(*out, axis(g, 2))};
  f.a_transposed = true;
  return gradient<Term::kHardtanhB, Term::kSignB>(pool, f, limit, slope);
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
    with_pool().Arg<F32>().Arg<F32>().Arg<F32>().Ret<F32>().Attr<float>("limit").Attr<float>("slope"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    adderflax_gradient_y, gradient_y,
    with_pool().Arg<F32>().Arg<F32>().Arg<F32>().Ret<F32>().Attr<float>("limit").Attr<float>("slope"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(adderflax_bytes, bytes, with_pool().Arg<U8>().Arg<U8>().Ret<S32>());
