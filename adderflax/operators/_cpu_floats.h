// float32: sums of tiles, for the forward pass and for gradients.
#pragma once

#include <algorithm>
#include <cstdint>

#include "_cpu_cut.h"
#include "_cpu_vectors.h"

namespace {

// |a - b|, or max(a, b) in its place; or the rule of gradients, and whether A or B is what it is multiplied by.
enum class Term { kForward, kMaximum, kHardtanhA, kSignA, kHardtanhB, kSignB };

// How distances are summed here.
#if defined(ADDERFLAX_FUSED)
constexpr Term kDistance = Term::kMaximum;
#else
constexpr Term kDistance = Term::kForward;
#endif

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
  float limit = 0.0f;                               // of differences
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

// Distances are summed in chains of so many terms, then the chains' sums: short ones round less.
constexpr int64_t kChain = 64;

// Adds `terms` terms to the sums of a tile; `at_once` clips by one instruction. Half of a gradient's differences
// are fused then, so that units are equally busy, and otherwise all of them.
template <Term term, int vectors, bool at_once, int kRows>
inline __attribute__((always_inline)) void add_chain(const float* const (&a_rows)[kRows], int64_t a_term,
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

// The same with the terms of a whole panel, for distances in chains.
template <Term term, int vectors, bool at_once, int kRows>
inline __attribute__((always_inline)) void add_terms(const float* const (&a_rows)[kRows], int64_t a_term,
                                                     const float* panel, int64_t terms,
                                                     const Vector (&held)[kRows][vectors], float limit,
                                                     Vector (&sums)[kRows][vectors]) {
  if (is_gradient(term) || terms <= kChain)
    return add_chain<term, vectors, at_once>(a_rows, a_term, panel, terms, held, limit, sums);
  for (int64_t t = 0; t < terms; t += kChain) {
    const float* from[kRows];
    for (int i = 0; i < kRows; ++i) from[i] = a_rows[i] + t * a_term;
    Vector chain[kRows][vectors];
    for (int i = 0; i < kRows; ++i)
      for (int j = 0; j < vectors; ++j) chain[i][j] = Vector{};
    add_chain<term, vectors, at_once>(from, a_term, panel + t * vectors * kLanes, std::min(kChain, terms - t), held,
                                      limit, chain);
    for (int i = 0; i < kRows; ++i)
      for (int j = 0; j < vectors; ++j) sums[i][j] += chain[i][j];
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

// Up to here float32 holds every whole number, and a sum of them that was rounded lies above.
constexpr float kWhole = (1 << 24) - 1;

// A sum d of |a - b| was found as 2 sum max(a, b) - sum a - sum b: of each lane, whether that is taken. What is
// rounded on the way is no larger than the sums of |a| and |b|, their sizes, so that it is not where d is small
// beside these. Nor where they reach 2^24, so that whole numbers are summed exactly up to there, nor where they are
// not finite.
inline uint32_t exact(Vector d, Vector row_size, Vector column_size) {
  const Vector size = row_size + column_size;
  return at_least(d * 4.0f, size) & at_least(Vector{} + kWhole, size);
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
          int64_t columns, int64_t valid_rows, int64_t valid_columns, bool add, float limit) {
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
      store_first(to, is_gradient(term) ? before + sums[i][j] : before - sums[i][j], lanes);
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
        for (int64_t i = 0; i < terms; i += kChain) {
          Vector chain = {};
          for (int64_t k = i; k < std::min(terms, i + kChain); ++k) {
            const Vector b = load(panel + k * kWidth + j * kLanes);
            chain += b;
            size += magnitude(b);
          }
          column += chain;
        }
        store(sums + j * kLanes, column);
        store(sums + kWidth + j * kLanes, size);
      }
    }
    for (int64_t m = start; m < end; m += kRows)
      tile<term, vectors>(a + m * a_row + t * a_term, a_row, a_term, {panel, terms, finite, sums},
                          is_gradient(term) ? h + m * n.columns : nullptr, out + m * n.columns, n.columns,
                          std::min<int64_t>(kRows, end - m), columns, t > 0, f.limit);
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

}  // namespace
