// out[r, c] = sum over t of a term of A[r, t], B[t, c] and, for the gradients, H[r, c]:
//
//   OPERATION 0, forward    -|A - B|
//   OPERATION 1, hardtanh   clip(slope (other - H), -1, 1) * weight
//   OPERATION 2, sign       sign(other - H) * weight
//   OPERATION 3, bytes      -|A - B|, each term four uint8, in whole numbers: int32 results
//
// where `weight`, the cotangent, is A if WEIGHT_IS_A, else B, and `other` is the remaining one.
//
// _gpu_kernels.py puts #defines in front of this text: the shape and the tile of one problem,
// so that every edge that cannot occur costs nothing. tests/operators/gpu_emulation.h runs the
// same text on a CPU.
//
// A block computes TILE_ROWS x TILE_COLUMNS results, a thread MICRO_ROWS x MICRO_COLUMNS of
// them in registers. A and B pass through two alternating buffers in shared memory, DEPTH terms
// at a time: while the terms of one are summed, the next are already on their way.
//
// The gradients use clip(2 u, -1, 1) = 2 sat(u + 1/2) - 1, one FFMA.SAT, so that an element
// costs two instructions; `.sat` makes 0 of NaN. What "- 1" takes away, the sum of the weights,
// is subtracted every 128 terms, so that rounding errors grow with the sum itself and not with
// the sum of the magnitudes. Where |slope H| is large, u = slope/2 (other - H) is rounded after
// the subtraction instead, for one instruction more.

#define IS_GRADIENT (OPERATION == 1 || OPERATION == 2)

constexpr int THREADS = (THREADS_DOWN * THREADS_ACROSS + 31) / 32 * 32;
constexpr int TILE_ROWS = THREADS_DOWN * MICRO_ROWS;
constexpr int TILE_COLUMNS = THREADS_ACROSS * MICRO_COLUMNS;
constexpr int ROW_TILES = (ROWS + TILE_ROWS - 1) / TILE_ROWS;
constexpr int COLUMN_TILES = (COLUMNS + TILE_COLUMNS - 1) / TILE_COLUMNS;
constexpr bool PARTIAL_CHUNKS = TERMS % DEPTH != 0;
constexpr bool COLUMNS_AS_VECTORS = COLUMNS % 4 == 0;
constexpr int WIDTH = COLUMNS_AS_VECTORS ? 4 : 1;  // of accesses to H and the result
constexpr int CHUNKS_PER_CORRECTION = 128 / DEPTH;
// Above it, rounding 1/2 - slope/2 H would cost more than 2^-21 of a weight.
constexpr float LARGEST_FAST = 4.0f;

// The largest power of two up to both limits.
__device__ constexpr int power_of_two(int limit, int other_limit) {
  int power = 1;
  while (2 * power <= limit && 2 * power <= other_limit) power *= 2;
  return power;
}

// The way of one operand's tile, LINES (rows of A, columns of B) x DEPTH terms, from device
// memory through registers to shared memory, where it lies as [term][line].
template <typename T, bool TERMS_CONTIGUOUS, int LINES, int TILE, bool IS_WEIGHT>
struct Operand {
  static constexpr int CONTIGUOUS = TERMS_CONTIGUOUS ? TERMS : LINES;
  static constexpr int WIDTH = CONTIGUOUS % 4 == 0 ? 4 : 1;
  // Threads across (along contiguous memory) and, in groups, down; DEPTH is a power of two.
  static constexpr int ACROSS = (TERMS_CONTIGUOUS ? DEPTH : TILE) / WIDTH;
  static constexpr int DOWN = TERMS_CONTIGUOUS ? TILE : DEPTH;
  static constexpr int GROUPS = TERMS_CONTIGUOUS ? THREADS / ACROSS : power_of_two(THREADS / ACROSS, DEPTH);
  static constexpr int PASSES_ACROSS = (ACROSS + THREADS - 1) / THREADS;
  static constexpr int PASSES_DOWN = (DOWN + GROUPS - 1) / GROUPS;
  static constexpr bool ALL_ACTIVE = TERMS_CONTIGUOUS || PASSES_ACROSS > 1 || GROUPS * ACROSS == THREADS;
  // With the lines that the last passes load in vain.
  static constexpr int PADDED_TILE =
      TERMS_CONTIGUOUS ? PASSES_DOWN * GROUPS : PASSES_ACROSS > 1 ? PASSES_ACROSS * THREADS * WIDTH : TILE;
  static constexpr bool PARTIAL_LINES = LINES % TILE != 0 || PADDED_TILE != TILE;
  // A transposing warp stores to all banks if this is 4 more than a multiple of 8.
  static constexpr int STRIDE = TERMS_CONTIGUOUS ? (PADDED_TILE + 3) / 8 * 8 + 4 : PADDED_TILE;
  // Partial sums over the terms that a thread has loaded, SLOTS of them for each line.
  static constexpr int SLOTS = TERMS_CONTIGUOUS ? ACROSS : GROUPS;
  static constexpr int SUMS = TERMS_CONTIGUOUS ? PASSES_DOWN : PASSES_ACROSS * WIDTH;

  Vector<T, WIDTH> loaded[PASSES_DOWN][PASSES_ACROSS];
  float sums[IS_WEIGHT ? SUMS : 1];
  const T* source;
  int down, across, lines_left;
  bool active;

  __device__ __forceinline__ Operand(const T* matrix, int first_line, int first_term) {
    const int thread = threadIdx.x;
    down = PASSES_ACROSS > 1 ? 0 : thread / ACROSS;
    across = (PASSES_ACROSS > 1 ? thread : thread % ACROSS) * WIDTH;
    active = ALL_ACTIVE || down < GROUPS;
    lines_left = LINES - first_line;
    const long long line = first_line + (TERMS_CONTIGUOUS ? down : across);
    const long long term = first_term + (TERMS_CONTIGUOUS ? across : down);
    source = matrix + (TERMS_CONTIGUOUS ? line * TERMS + term : term * LINES + line);
    UNROLL for (int i = 0; i < (IS_WEIGHT ? SUMS : 1); ++i) sums[i] = 0.0f;
  }

  // Starts loading a chunk of which this many terms are left; zeros outside of the matrix.
  __device__ __forceinline__ void load(int terms_left) {
    constexpr bool FEW = PASSES_DOWN * PASSES_ACROSS <= 4;  // checking them is cheaper than a branch
    const bool whole = (!PARTIAL_LINES || PADDED_TILE <= lines_left) &&
                       (!PARTIAL_CHUNKS || DEPTH <= terms_left);
    if (active) {
      if ((!PARTIAL_LINES && !PARTIAL_CHUNKS) || (!FEW && whole)) {
        load_vectors<false>(terms_left);
      } else {
        load_vectors<true>(terms_left);
      }
    }
    source += static_cast<long long>(DEPTH) * (TERMS_CONTIGUOUS ? 1 : LINES);
  }

  // Stores what was loaded.
  __device__ __forceinline__ void store(float (*shared_tile)[STRIDE]) {
    if (!active) return;
    UNROLL for (int p = 0; p < PASSES_DOWN; ++p) {
      UNROLL for (int q = 0; q < PASSES_ACROSS; ++q) {
        const int y = down + p * GROUPS, x = across + q * THREADS * WIDTH;
        Vector<float, WIDTH> values;
        UNROLL for (int i = 0; i < WIDTH; ++i) {
          values.at[i] = to_float(loaded[p][q].at[i]);
          if (IS_WEIGHT) sums[TERMS_CONTIGUOUS ? p : q * WIDTH + i] += values.at[i];
        }
        if (TERMS_CONTIGUOUS) {
          UNROLL for (int i = 0; i < WIDTH; ++i) shared_tile[x + i][y] = values.at[i];
        } else {
          *reinterpret_cast<Vector<float, WIDTH>*>(&shared_tile[y][x]) = values;
        }
      }
    }
  }

  // Moves the partial sums to shared memory, [slot][line], and starts new ones.
  __device__ __forceinline__ void store_sums(float (*shared_sums)[STRIDE]) {
    if (!active) return;
    UNROLL for (int i = 0; i < SUMS; ++i) {
      const int slot = TERMS_CONTIGUOUS ? across / WIDTH : down;
      const int line =
          TERMS_CONTIGUOUS ? down + i * GROUPS : across + i / WIDTH * THREADS * WIDTH + i % WIDTH;
      shared_sums[slot][line] = sums[i];
      sums[i] = 0.0f;
    }
  }

 private:
  template <bool AT_EDGE>
  __device__ __forceinline__ void load_vectors(int terms_left) {
    UNROLL for (int p = 0; p < PASSES_DOWN; ++p) {
      UNROLL for (int q = 0; q < PASSES_ACROSS; ++q) {
        const int y = down + p * GROUPS, x = across + q * THREADS * WIDTH;
        const int line = TERMS_CONTIGUOUS ? y : x, term = TERMS_CONTIGUOUS ? x : y;
        bool inside = true;
        if (AT_EDGE && PARTIAL_LINES) inside = line < lines_left;
        if (AT_EDGE && PARTIAL_CHUNKS) inside = inside && term < terms_left;
        Vector<T, WIDTH> vector = {};
        if (inside) {
          const long long step = static_cast<long long>(p) * GROUPS * CONTIGUOUS + q * THREADS * WIDTH;
          vector = *reinterpret_cast<const Vector<T, WIDTH>*>(source + step);
        }
        loaded[p][q] = vector;
      }
    }
  }
};

// Which lines of a tile a thread works on, and their values for one term.
template <int MICRO, int THREADS_ALONG, bool AS_VECTORS>
struct Fragment {
  static constexpr int SIZE = MICRO;
  float at[MICRO];

  static __device__ __forceinline__ int line(int lane, int i) {
    return AS_VECTORS ? i / 4 * 4 * THREADS_ALONG + lane * 4 + i % 4 : i * THREADS_ALONG + lane;
  }

  __device__ __forceinline__ void read(const float* shared_line, int lane) {
    constexpr int WIDTH = AS_VECTORS ? 4 : 1;
    UNROLL for (int i = 0; i < MICRO; i += WIDTH) {
      const auto* vector = reinterpret_cast<const Vector<float, WIDTH>*>(shared_line + line(lane, i));
      *reinterpret_cast<Vector<float, WIDTH>*>(at + i) = *vector;
    }
  }
};

using OperandA = Operand<A_TYPE, A_TERMS_CONTIGUOUS, ROWS, TILE_ROWS, IS_GRADIENT && WEIGHT_IS_A>;
using OperandB = Operand<B_TYPE, B_TERMS_CONTIGUOUS, COLUMNS, TILE_COLUMNS, IS_GRADIENT && !WEIGHT_IS_A>;
using RowFragment = Fragment<MICRO_ROWS, THREADS_DOWN, true>;
using ColumnFragment = Fragment<MICRO_COLUMNS, THREADS_ACROSS, COLUMNS_AS_VECTORS>;

struct SharedMemory {
  alignas(16) float a[2][DEPTH][OperandA::STRIDE];
  alignas(16) float b[2][DEPTH][OperandB::STRIDE];
#if IS_GRADIENT && WEIGHT_IS_A
  alignas(16) float sums[OperandA::SLOTS][OperandA::STRIDE];
#elif IS_GRADIENT
  alignas(16) float sums[OperandB::SLOTS][OperandB::STRIDE];
#endif
};
__shared__ SharedMemory shared;

#if IS_GRADIENT
template <typename Lines, typename Weight>
__device__ __forceinline__ Lines sum_slots(int lane) {
  Lines total, slot_sums;
  total.read(shared.sums[0], lane);
#pragma unroll 1
  for (int slot = 1; slot < Weight::SLOTS; ++slot) {
    slot_sums.read(shared.sums[slot], lane);
    UNROLL for (int i = 0; i < Lines::SIZE; ++i) total.at[i] += slot_sums.at[i];
  }
  return total;
}
#endif

#if OPERATION == 3
using Sum = unsigned;
// As the bits of a float: all results leave as such.
__device__ __forceinline__ float result_of(Sum sum) { return __uint_as_float(0u - sum); }
#else
using Sum = float;
__device__ __forceinline__ float result_of(Sum sum) { return (OPERATION == 0 ? 1.0f : 2.0f) * sum; }
#endif

struct Accumulator {
  Sum at[MICRO_ROWS][MICRO_COLUMNS];
  float held[MICRO_ROWS][MICRO_COLUMNS];  // 1/2 - slope/2 H if fast, else H
  bool fast;

  __device__ __forceinline__ Accumulator() {
    UNROLL for (int i = 0; i < MICRO_ROWS; ++i) {
      UNROLL for (int j = 0; j < MICRO_COLUMNS; ++j) at[i][j] = 0;
    }
  }

  template <bool FAST>
  __device__ __forceinline__ void add_chunk(int buffer, int row_lane, int column_lane) {
    UNROLL for (int term = 0; term < DEPTH; ++term) {
      RowFragment a;
      ColumnFragment b;
      a.read(shared.a[buffer][term], row_lane);
      b.read(shared.b[buffer][term], column_lane);
      UNROLL for (int i = 0; i < MICRO_ROWS; ++i) {
        UNROLL for (int j = 0; j < MICRO_COLUMNS; ++j) {
#if OPERATION == 0
          at[i][j] -= fabsf(a.at[i] - b.at[j]);
#elif OPERATION == 3
          at[i][j] = add_byte_differences(at[i][j], __float_as_uint(a.at[i]), __float_as_uint(b.at[j]));
#else
          const float weight = WEIGHT_IS_A ? a.at[i] : b.at[j];
          const float other = WEIGHT_IS_A ? b.at[j] : a.at[i];
          const float u = FAST ? fmaf(other, HALF_SLOPE, held[i][j])
                               : fmaf(other - held[i][j], HALF_SLOPE, 0.5f);
          at[i][j] = fmaf(__saturatef(u), weight, at[i][j]);
#endif
        }
      }
    }
  }
};

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM)
    adder_kernel(const A_TYPE* __restrict__ a_all, const B_TYPE* __restrict__ b_all,
#if IS_GRADIENT
                 const H_TYPE* __restrict__ h_all,
#endif
                 float* __restrict__ out_all) {
  // One grid axis holds columns, rows, batch and splits: the others end at 65535.
  unsigned block = blockIdx.x;
  const int first_column = block % COLUMN_TILES * TILE_COLUMNS;
  block /= COLUMN_TILES;
  const int first_row = block % ROW_TILES * TILE_ROWS;
  block /= ROW_TILES;
  const long long batch = block % BATCH;
  const int first_term = SPLITS == 1 ? 0 : block / BATCH * SPLIT_TERMS;
  const int end = SPLITS == 1 || TERMS - first_term < SPLIT_TERMS ? TERMS : first_term + SPLIT_TERMS;
  const long long results = static_cast<long long>(ROWS) * COLUMNS;
  float* out = out_all + results * block;  // [split][batch][row][column]

  // The last warp may be larger than what is left of the tile: its rest repeats the last row.
  const int thread = threadIdx.x;
  const bool spare = THREADS_DOWN * THREADS_ACROSS % 32 != 0 && thread >= THREADS_DOWN * THREADS_ACROSS;
  const int row_lane = spare ? THREADS_DOWN - 1 : thread / THREADS_ACROSS;
  const int column_lane = thread % THREADS_ACROSS;

  OperandA a(a_all + batch * ROWS * TERMS, first_row, first_term);
  OperandB b(b_all + batch * COLUMNS * TERMS, first_column, first_term);
  a.load(end - first_term);
  b.load(end - first_term);

  Accumulator sum;
#if IS_GRADIENT
  sum.fast = OPERATION == 1;
  const H_TYPE* h = h_all + results * batch;
  UNROLL for (int i = 0; i < MICRO_ROWS; ++i) {
    const int row = first_row + RowFragment::line(row_lane, i);
    UNROLL for (int j = 0; j < MICRO_COLUMNS; j += WIDTH) {
      const int column = first_column + ColumnFragment::line(column_lane, j);
      Vector<H_TYPE, WIDTH> vector = {};
      if (row < ROWS && column < COLUMNS) {
        const H_TYPE* source = h + static_cast<long long>(row) * COLUMNS + column;
        vector = *reinterpret_cast<const Vector<H_TYPE, WIDTH>*>(source);
      }
      UNROLL for (int k = 0; k < WIDTH; ++k) {
        const float value = to_float(vector.at[k]);
        sum.held[i][j + k] = value;
        sum.fast &= fabsf(HALF_SLOPE * value) <= LARGEST_FAST;  // false for NaN
      }
    }
  }
  sum.fast = __all_sync(0xffffffffu, sum.fast);
  if (sum.fast) {
    UNROLL for (int i = 0; i < MICRO_ROWS; ++i) {
      UNROLL for (int j = 0; j < MICRO_COLUMNS; ++j) {
        sum.held[i][j] = fmaf(-HALF_SLOPE, sum.held[i][j], 0.5f);
      }
    }
  }
#endif

  a.store(shared.a[0]);
  b.store(shared.b[0]);
  __syncthreads();
  const int chunks = (end - first_term + DEPTH - 1) / DEPTH;
#pragma unroll 1
  for (int chunk = 0; chunk < chunks; ++chunk) {
    const int buffer = chunk & 1;
    const bool more = chunk + 1 < chunks;
    if (more) {
      a.load(end - first_term - (chunk + 1) * DEPTH);
      b.load(end - first_term - (chunk + 1) * DEPTH);
    }
#if OPERATION == 1
    if (sum.fast) {
      sum.add_chunk<true>(buffer, row_lane, column_lane);
    } else {
      sum.add_chunk<false>(buffer, row_lane, column_lane);
    }
#else
    sum.add_chunk<false>(buffer, row_lane, column_lane);
#endif
    if (more) {
      // The other buffer: everyone left it before the barrier at the end of the last chunk.
      a.store(shared.a[buffer ^ 1]);
      b.store(shared.b[buffer ^ 1]);
      __syncthreads();
    }
#if IS_GRADIENT
    if (!more || chunk % CHUNKS_PER_CORRECTION == CHUNKS_PER_CORRECTION - 1) {
      __syncthreads();  // everyone has read the sums of the last correction
#if WEIGHT_IS_A
      a.store_sums(shared.sums);
      __syncthreads();
      RowFragment weights = sum_slots<RowFragment, OperandA>(row_lane);
      UNROLL for (int i = 0; i < MICRO_ROWS; ++i) {
        UNROLL for (int j = 0; j < MICRO_COLUMNS; ++j) sum.at[i][j] -= 0.5f * weights.at[i];
      }
#else
      b.store_sums(shared.sums);
      __syncthreads();
      ColumnFragment weights = sum_slots<ColumnFragment, OperandB>(column_lane);
      UNROLL for (int i = 0; i < MICRO_ROWS; ++i) {
        UNROLL for (int j = 0; j < MICRO_COLUMNS; ++j) sum.at[i][j] -= 0.5f * weights.at[j];
      }
#endif
    }
#endif
  }

  if (spare) return;
  UNROLL for (int i = 0; i < MICRO_ROWS; ++i) {
    const int row = first_row + RowFragment::line(row_lane, i);
    UNROLL for (int j = 0; j < MICRO_COLUMNS; j += WIDTH) {
      const int column = first_column + ColumnFragment::line(column_lane, j);
      if (row >= ROWS || column >= COLUMNS) continue;
      float* result = out + static_cast<long long>(row) * COLUMNS + column;
      if (WIDTH == 4) {
        store_four(result, result_of(sum.at[i][j]), result_of(sum.at[i][j + 1 % WIDTH]),
                   result_of(sum.at[i][j + 2 % WIDTH]), result_of(sum.at[i][j + 3 % WIDTH]));
      } else {
        *result = result_of(sum.at[i][j]);
      }
    }
  }
}
