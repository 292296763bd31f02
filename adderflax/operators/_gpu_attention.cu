// L1 attention, forward and backward, without a map of queries x keys in device memory.
//
//   PASS 0  softmax(SCALE * scores) @ value, and of each row of logits the maximum and the sum of
//           exp(logits - maximum)
//   PASS 1  the gradient of the queries
//   PASS 2  the gradients of the keys and of the values
//
// where scores = -sum_d |query - key|. A block works on one tile of its OWN lines, queries in
// passes 0 and 1 and keys in pass 2, and goes through the tiles of the OTHER ones. Of each it
// computes a TILE x TILE piece of the map, MICRO x MICRO of it in the registers of a thread, and
// passes it through shared memory into sums over the others, which stay in registers. The scores
// are added in the same order in all passes, so that the maximum of the forward pass fits them.
//
// _gpu_attention.py puts #defines and _gpu_common.cu in front of this text; the gradient rules are
// those of _gpu_kernels.cu: clip(2 u, -1, 1) = 2 sat(u + 1/2) - 1, of which "- 1" is subtracted
// once a tile.

constexpr int LANES = 16;  // a block is LANES x LANES threads
constexpr int THREADS = LANES * LANES;
constexpr int TILE = LANES * MICRO;
constexpr int CHUNK = 16;  // terms in shared memory at a time
// Two sets of sums leave few registers for what is read ahead.
constexpr int UNROLLED_TERMS = PASS == 2 ? 4 : CHUNK;
constexpr int LOADS_AT_ONCE = PASS == 2 ? 2 : TILE * CHUNK / THREADS;
// A transposing warp stores 8 terms of 4 lines each: to all banks if this is 4 more than a
// multiple of 8.
constexpr int STRIDE = TILE + 4;
constexpr int COLUMNS = (DEPTH + 63) / 64 * 64;  // of a row of queries or keys, padded
constexpr int VALUE_COLUMNS = (VALUE_DEPTH + 63) / 64 * 64;
constexpr int WIDEST = COLUMNS > VALUE_COLUMNS ? COLUMNS : VALUE_COLUMNS;
constexpr int OWN_TILES = (OWN_LINES + TILE - 1) / TILE;
// Above it, rounding 1/2 - slope/2 H would cost more than 2^-21 of a weight.
constexpr float LARGEST_FAST = 4.0f;
constexpr float LOWEST = -3.4028234663852886e38f;

struct SharedMemory {
  alignas(16) float own[CHUNK * STRIDE];
  alignas(16) float other[CHUNK * (WIDEST > STRIDE ? WIDEST : STRIDE)];
  alignas(16) float map[TILE * STRIDE];  // [other][own]
};
__shared__ SharedMemory shared;

using Four = Vector<float, 4>;

// The line of a tile that is a thread's i-th.
__device__ __forceinline__ int line_of(int lane, int i) {
  return MICRO % 4 == 0 ? i / 4 * 4 * LANES + lane * 4 + i % 4 : i * LANES + lane;
}

// The column of a padded row that is a thread's j-th.
__device__ __forceinline__ int column_of(int lane, int j) { return j / 4 * 4 * LANES + lane * 4 + j % 4; }

__device__ __forceinline__ void read_lines(float (&at)[MICRO], const float* lines, int lane) {
  if (MICRO % 4 == 0) {
    UNROLL for (int i = 0; i < MICRO; i += 4) {
      const Four four = *reinterpret_cast<const Four*>(lines + line_of(lane, i));
      UNROLL for (int k = 0; k < 4; ++k) at[i + k] = four.at[k];
    }
  } else {
    UNROLL for (int i = 0; i < MICRO; ++i) at[i] = lines[line_of(lane, i)];
  }
}

__device__ __forceinline__ float row_sum(float value) {
  UNROLL for (int step = LANES / 2; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
  return value;
}

__device__ __forceinline__ float row_maximum(float value) {
  UNROLL for (int step = LANES / 2; step > 0; step /= 2) {
    value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, step));
  }
  return value;
}

// CHUNK terms of a tile of lines, [line][term] in memory, to [term][line]; zeros outside.
template <int LINES, int TERMS, typename T>
__device__ __forceinline__ void load_lines(float* to, const T* matrix, int first_line, int first_term) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll LOADS_AT_ONCE
  for (int i = 0; i < TILE * CHUNK / THREADS; ++i) {
    const int unit = warp + i * (THREADS / 32);
    const int line = unit / (CHUNK / 8) * 4 + lane / 8, term = unit % (CHUNK / 8) * 8 + lane % 8;
    float value = 0.0f;
    if (first_line + line < LINES && first_term + term < TERMS) {
      value = to_float(matrix[static_cast<long long>(first_line + line) * TERMS + first_term + term]);
    }
    to[term * STRIDE + line] = value;
  }
}

// CHUNK rows with all their columns, padded with zeros.
template <int ROWS, int LENGTH, int PADDED, typename T>
__device__ __forceinline__ void load_rows(float* to, const T* matrix, int first_row) {
  UNROLL for (int i = 0; i < CHUNK * PADDED / THREADS; ++i) {
    const int index = threadIdx.x + i * THREADS, row = index / PADDED, column = index % PADDED;
    float value = 0.0f;
    if (first_row + row < ROWS && column < LENGTH) {
      value = to_float(matrix[static_cast<long long>(first_row + row) * LENGTH + column]);
    }
    to[index] = value;
  }
}

// A piece of the map: -sum |own - other| if DISTANCE, else sum own * other.
template <bool DISTANCE, int TERMS, typename Own, typename Other>
__device__ __forceinline__ void map_tile(float (&at)[MICRO][MICRO], const Own* own, const Other* other,
                                         int first_own, int first_other) {
  const int row_lane = threadIdx.x / LANES, column_lane = threadIdx.x % LANES;
  UNROLL for (int i = 0; i < MICRO; ++i) {
    UNROLL for (int j = 0; j < MICRO; ++j) at[i][j] = 0.0f;
  }
#pragma unroll 1
  for (int first_term = 0; first_term < TERMS; first_term += CHUNK) {
    __syncthreads();  // everyone has read the last chunk
    load_lines<OWN_LINES, TERMS>(shared.own, own, first_own, first_term);
    load_lines<OTHER_LINES, TERMS>(shared.other, other, first_other, first_term);
    __syncthreads();
#pragma unroll UNROLLED_TERMS
    for (int term = 0; term < CHUNK; ++term) {
      float a[MICRO], b[MICRO];
      read_lines(a, shared.own + term * STRIDE, row_lane);
      read_lines(b, shared.other + term * STRIDE, column_lane);
      UNROLL for (int i = 0; i < MICRO; ++i) {
        UNROLL for (int j = 0; j < MICRO; ++j) {
          if (DISTANCE) {
            at[i][j] -= fabsf(a[i] - b[j]);
          } else {
            at[i][j] = fmaf(a[i], b[j], at[i][j]);
          }
        }
      }
    }
  }
}

__device__ __forceinline__ void store_map(const float (&at)[MICRO][MICRO]) {
  const int row_lane = threadIdx.x / LANES, column_lane = threadIdx.x % LANES;
  UNROLL for (int j = 0; j < MICRO; ++j) {
    UNROLL for (int i = 0; i < MICRO; ++i) {
      shared.map[line_of(column_lane, j) * STRIDE + line_of(row_lane, i)] = at[i][j];
    }
  }
}

// Reads what this thread has stored.
__device__ __forceinline__ void reload_map(float (&at)[MICRO][MICRO]) {
  const int row_lane = threadIdx.x / LANES, column_lane = threadIdx.x % LANES;
  UNROLL for (int j = 0; j < MICRO; ++j) {
    float lines[MICRO];
    read_lines(lines, shared.map + line_of(column_lane, j) * STRIDE, row_lane);
    UNROLL for (int i = 0; i < MICRO; ++i) at[i][j] = lines[i];
  }
}

enum Weighting { PLAIN, FAST_RULE, EXACT_RULE };

// What a thread sums over the others: some columns of its own lines.
template <int LENGTH>
struct Accumulator {
  static constexpr int PADDED = (LENGTH + 63) / 64 * 64;
  static constexpr int SIZE = PADDED / LANES;
  float at[MICRO][SIZE];

  __device__ __forceinline__ Accumulator() {
    UNROLL for (int i = 0; i < MICRO; ++i) {
      UNROLL for (int j = 0; j < SIZE; ++j) at[i][j] = 0.0f;
    }
  }

  // Adds map[own, other] * other[column], or with a rule of other[column] - held.
  template <Weighting WEIGHTING, typename T>
  __device__ __forceinline__ void add(const T* other, int first_other, const float (&held)[MICRO][SIZE]) {
    const int row_lane = threadIdx.x / LANES, column_lane = threadIdx.x % LANES;
#pragma unroll 1
    for (int first = 0; first < TILE && first_other + first < OTHER_LINES; first += CHUNK) {
      __syncthreads();  // the map is stored, and everyone has read the last chunk
      load_rows<OTHER_LINES, LENGTH, PADDED>(shared.other, other, first_other + first);
      __syncthreads();
#pragma unroll UNROLLED_TERMS
      for (int term = 0; term < CHUNK; ++term) {
        float weights[MICRO];
        read_lines(weights, shared.map + (first + term) * STRIDE, row_lane);
        UNROLL for (int j = 0; j < SIZE; j += 4) {
          const Four four =
              *reinterpret_cast<const Four*>(shared.other + term * PADDED + column_of(column_lane, j));
          UNROLL for (int k = 0; k < 4; ++k) {
            UNROLL for (int i = 0; i < MICRO; ++i) {
              float factor = four.at[k];
              if (WEIGHTING == FAST_RULE) factor = __saturatef(fmaf(factor, HALF_SLOPE, held[i][j + k]));
              if (WEIGHTING == EXACT_RULE) {
                factor = __saturatef(fmaf(factor - held[i][j + k], HALF_SLOPE, 0.5f));
              }
              at[i][j + k] = fmaf(factor, weights[i], at[i][j + k]);
            }
          }
        }
      }
    }
  }

  __device__ __forceinline__ void store(float* out, int first_own) const {
    const int row_lane = threadIdx.x / LANES, column_lane = threadIdx.x % LANES;
    UNROLL for (int i = 0; i < MICRO; ++i) {
      const int row = first_own + line_of(row_lane, i);
      if (row >= OWN_LINES) continue;
      UNROLL for (int j = 0; j < SIZE; j += 4) {
        const int column = column_of(column_lane, j);
        float* result = out + static_cast<long long>(row) * LENGTH + column;
        if (LENGTH % 4 == 0) {
          if (column < LENGTH) store_four(result, at[i][j], at[i][j + 1], at[i][j + 2], at[i][j + 3]);
        } else {
          UNROLL for (int k = 0; k < 4; ++k) {
            if (column + k < LENGTH) result[k] = at[i][j + k];
          }
        }
      }
    }
  }
};

#if PASS == 0

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM)
    adder_kernel(const OWN_TYPE* __restrict__ own_all, const OTHER_TYPE* __restrict__ other_all,
                 const OTHER_VALUE_TYPE* __restrict__ other_value_all, float* __restrict__ product_all,
                 float* __restrict__ maximum_all, float* __restrict__ sums_all) {
  const int row_lane = threadIdx.x / LANES, column_lane = threadIdx.x % LANES;
  const int first_own = blockIdx.x % OWN_TILES * TILE;
  const long long group = blockIdx.x / OWN_TILES;
  const OWN_TYPE* own = own_all + group * OWN_LINES * DEPTH;
  const OTHER_TYPE* other = other_all + group * OTHER_LINES * DEPTH;
  const OTHER_VALUE_TYPE* other_value = other_value_all + group * OTHER_LINES * VALUE_DEPTH;

  float maximum[MICRO], sums[MICRO];
  Accumulator<VALUE_DEPTH> product;
  UNROLL for (int i = 0; i < MICRO; ++i) maximum[i] = LOWEST, sums[i] = 0.0f;
#pragma unroll 1
  for (int first_other = 0; first_other < OTHER_LINES; first_other += TILE) {
    float map[MICRO][MICRO];
    map_tile<true, DEPTH>(map, own, other, first_own, first_other);
    UNROLL for (int i = 0; i < MICRO; ++i) {
      float top = LOWEST, sum = 0.0f;
      UNROLL for (int j = 0; j < MICRO; ++j) {
        // Rounded here, not fused into the subtraction below: large logits would miss their maximum.
        map[i][j] = __fmul_rn(map[i][j], SCALE);
        if (first_other + line_of(column_lane, j) < OTHER_LINES) top = fmaxf(top, map[i][j]);
      }
      top = fmaxf(maximum[i], row_maximum(top));
      UNROLL for (int j = 0; j < MICRO; ++j) {
        const bool inside = first_other + line_of(column_lane, j) < OTHER_LINES;
        map[i][j] = inside ? expf(map[i][j] - top) : 0.0f;
        sum += map[i][j];
      }
      const float shrink = expf(maximum[i] - top);
      sums[i] = fmaf(sums[i], shrink, row_sum(sum));
      maximum[i] = top;
      UNROLL for (int j = 0; j < product.SIZE; ++j) product.at[i][j] *= shrink;
    }
    store_map(map);
    product.add<PLAIN>(other_value, first_other, product.at);
  }

  UNROLL for (int i = 0; i < MICRO; ++i) {
    UNROLL for (int j = 0; j < product.SIZE; ++j) product.at[i][j] /= sums[i];
    const int row = first_own + line_of(row_lane, i);
    if (column_lane == 0 && row < OWN_LINES) {
      maximum_all[group * OWN_LINES + row] = maximum[i];
      sums_all[group * OWN_LINES + row] = sums[i];
    }
  }
  product.store(product_all + group * OWN_LINES * VALUE_DEPTH, first_own);
}

#else

// What the backward pass knows of a query.
struct Query {
  float maximum, inverse_sum, delta;

  __device__ __forceinline__ void read(const float* maxima, const float* sums, const float* deltas, int line) {
    maximum = maxima[line];
    inverse_sum = 1.0f / sums[line];
    delta = deltas[line];
  }
};

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM)
    adder_kernel(const OWN_TYPE* __restrict__ own_all, const OTHER_TYPE* __restrict__ other_all,
                 const OWN_VALUE_TYPE* __restrict__ own_value_all,
                 const OTHER_VALUE_TYPE* __restrict__ other_value_all, const float* __restrict__ maximum_all,
                 const float* __restrict__ sums_all, const float* __restrict__ delta_all,
#if PASS == 2
                 float* __restrict__ value_gradient_all,
#endif
                 float* __restrict__ gradient_all) {
  constexpr int QUERIES = PASS == 1 ? OWN_LINES : OTHER_LINES;
  const int row_lane = threadIdx.x / LANES, column_lane = threadIdx.x % LANES;
  const int first_own = blockIdx.x % OWN_TILES * TILE;
  const long long group = blockIdx.x / OWN_TILES;
  const OWN_TYPE* own = own_all + group * OWN_LINES * DEPTH;
  const OTHER_TYPE* other = other_all + group * OTHER_LINES * DEPTH;
  const OWN_VALUE_TYPE* own_value = own_value_all + group * OWN_LINES * VALUE_DEPTH;
  const OTHER_VALUE_TYPE* other_value = other_value_all + group * OTHER_LINES * VALUE_DEPTH;
  const float* maxima = maximum_all + group * QUERIES;
  const float* sums = sums_all + group * QUERIES;
  const float* deltas = delta_all + group * QUERIES;

  Accumulator<DEPTH> gradient;
  float held[MICRO][gradient.SIZE];  // 1/2 - slope/2 own if fast, else own
  bool fast = IS_HARDTANH;
  UNROLL for (int i = 0; i < MICRO; ++i) {
    const int row = first_own + line_of(row_lane, i);
    UNROLL for (int j = 0; j < gradient.SIZE; ++j) {
      const int column = column_of(column_lane, j);
      held[i][j] = row < OWN_LINES && column < DEPTH ? to_float(own[static_cast<long long>(row) * DEPTH + column])
                                                     : 0.0f;
      fast &= fabsf(HALF_SLOPE * held[i][j]) <= LARGEST_FAST;  // false for NaN
    }
  }
  fast = __all_sync(0xffffffffu, fast);
  if (fast) {
    UNROLL for (int i = 0; i < MICRO; ++i) {
      UNROLL for (int j = 0; j < gradient.SIZE; ++j) held[i][j] = fmaf(-HALF_SLOPE, held[i][j], 0.5f);
    }
  }
#if PASS == 1
  Query own_queries[MICRO];
  UNROLL for (int i = 0; i < MICRO; ++i) {
    const int row = first_own + line_of(row_lane, i);
    own_queries[i].read(maxima, sums, deltas, row < OWN_LINES ? row : OWN_LINES - 1);
  }
#else
  Accumulator<VALUE_DEPTH> value_gradient;
#endif

#pragma unroll 1
  for (int first_other = 0; first_other < OTHER_LINES; first_other += TILE) {
    float map[MICRO][MICRO], products[MICRO][MICRO];
    map_tile<true, DEPTH>(map, own, other, first_own, first_other);
    UNROLL for (int j = 0; j < MICRO; ++j) {
      const int column = first_other + line_of(column_lane, j);
      const bool inside = column < OTHER_LINES;
#if PASS == 2
      Query query;
      query.read(maxima, sums, deltas, inside ? column : OTHER_LINES - 1);
#endif
      UNROLL for (int i = 0; i < MICRO; ++i) {
#if PASS == 1
        const Query query = own_queries[i];
#endif
        const float exponential = expf(__fmul_rn(map[i][j], SCALE) - query.maximum);
        map[i][j] = inside ? exponential * query.inverse_sum : 0.0f;
      }
    }
#if PASS == 2
    store_map(map);
    value_gradient.add<PLAIN>(other_value, first_other, value_gradient.at);
#endif
    map_tile<false, VALUE_DEPTH>(products, own_value, other_value, first_own, first_other);
#if PASS == 2
    reload_map(map);  // instead of keeping it: registers are short
#endif
    float total[MICRO];
    UNROLL for (int i = 0; i < MICRO; ++i) {
      float sum = 0.0f;
      UNROLL for (int j = 0; j < MICRO; ++j) {
#if PASS == 1
        const float delta = own_queries[i].delta;
#else
        const int column = first_other + line_of(column_lane, j);
        const float delta = deltas[column < OTHER_LINES ? column : OTHER_LINES - 1];
#endif
        map[i][j] *= (products[i][j] - delta) * SCALE;
        sum += map[i][j];
      }
      total[i] = row_sum(sum);
    }
    store_map(map);
    if (fast) {
      gradient.add<FAST_RULE>(other, first_other, held);
    } else {
      gradient.add<EXACT_RULE>(other, first_other, held);
    }
    UNROLL for (int i = 0; i < MICRO; ++i) {
      UNROLL for (int j = 0; j < gradient.SIZE; ++j) gradient.at[i][j] -= 0.5f * total[i];
    }
  }

  UNROLL for (int i = 0; i < MICRO; ++i) {
    UNROLL for (int j = 0; j < gradient.SIZE; ++j) gradient.at[i][j] *= 2.0f;
  }
  gradient.store(gradient_all + group * OWN_LINES * DEPTH, first_own);
#if PASS == 2
  value_gradient.store(value_gradient_all + group * OWN_LINES * VALUE_DEPTH, first_own);
#endif
}

#endif
