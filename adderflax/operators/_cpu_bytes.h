// Bytes: exact sums of their distances.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "_cpu_cut.h"
#include "_cpu_vectors.h"

namespace {

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

}  // namespace
