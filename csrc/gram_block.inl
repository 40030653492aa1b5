// One block of features: packing and multiplication, written once and compiled for each
// instruction set. gram.cpp includes this file inside a namespace, after it has set the target and
// the constants kWidth (floats in a vector), kRows and kVectors (a tile in registers: kRows
// samples by kVectors vectors of samples). No header may be included here.

typedef float Vector __attribute__((vector_size(4 * kWidth)));
typedef float LooseVector __attribute__((vector_size(4 * kWidth), aligned(4), may_alias));

template <int... I>
struct Indices {};

template <int N, int... I>
struct MakeIndices : MakeIndices<N - 1, N - 1, I...> {};
template <int... I>
struct MakeIndices<0, I...> {
  using type = Indices<I...>;
};

// The first (second) halves of a and b, by turns.
template <int... I>
CLAFUSION_INLINE Vector low(const Vector& a, const Vector& b, Indices<I...>) {
  return __builtin_shufflevector(a, b, (I / 2 + I % 2 * kWidth)...);
}
template <int... I>
CLAFUSION_INLINE Vector high(const Vector& a, const Vector& b, Indices<I...>) {
  return __builtin_shufflevector(a, b, (kWidth / 2 + I / 2 + I % 2 * kWidth)...);
}

// Transposes kWidth rows of kWidth numbers: interleaving them log2(kWidth) times does it.
CLAFUSION_INLINE void transpose(Vector* rows) {
  using All = typename MakeIndices<kWidth>::type;
  Vector other[kWidth];
#pragma GCC unroll 8
  for (int round = 1; round < kWidth; round *= 2) {
#pragma GCC unroll 16
    for (int i = 0; i < kWidth / 2; ++i) {
      other[2 * i] = low(rows[i], rows[i + kWidth / 2], All());
      other[2 * i + 1] = high(rows[i], rows[i + kWidth / 2], All());
    }
#pragma GCC unroll 16
    for (int i = 0; i < kWidth; ++i) rows[i] = other[i];
  }
}

// Packs `count` features of every sample: panels of kWidth samples, and in a panel the kWidth
// numbers of one feature beside each other. Samples that the last panel lacks are zero.
void pack(const float* x, long samples, long count, long row_stride, float* packed) {
  for (long first = 0; first < samples; first += kWidth, packed += count * kWidth) {
    const float* source = x + first * row_stride;
    const int rows = samples - first < kWidth ? static_cast<int>(samples - first) : kWidth;
    long k = 0;
    if (rows == kWidth) {
      for (; k + kWidth <= count; k += kWidth) {
        Vector block[kWidth];
#pragma GCC unroll 16
        for (int r = 0; r < kWidth; ++r) {
          block[r] = *reinterpret_cast<const LooseVector*>(source + r * row_stride + k);
        }
        transpose(block);
#pragma GCC unroll 16
        for (int r = 0; r < kWidth; ++r) {
          *reinterpret_cast<LooseVector*>(packed + (k + r) * kWidth) = block[r];
        }
      }
    }
    for (; k < count; ++k) {
      for (int r = 0; r < rows; ++r) packed[k * kWidth + r] = source[r * row_stride + k];
      for (int r = rows; r < kWidth; ++r) packed[k * kWidth + r] = 0.0f;
    }
  }
}

// Adds kRows samples (from `a` on, in a panel) times N panels (from `b` on) to N tiles.
template <int N>
CLAFUSION_INLINE void tile(const float* a, const float* b, long count, double* sums) {
  Vector acc[kRows][N];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 3
    for (int c = 0; c < N; ++c) acc[r][c] = Vector{};
  }
  for (long k = 0; k < count; ++k) {
    Vector columns[N];
#pragma GCC unroll 3
    for (int c = 0; c < N; ++c) {
      columns[c] = *reinterpret_cast<const LooseVector*>(b + (c * count + k) * kWidth);
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const float one = a[k * kWidth + r];
#pragma GCC unroll 3
      for (int c = 0; c < N; ++c) acc[r][c] += one * columns[c];
    }
  }
#pragma GCC unroll 3
  for (int c = 0; c < N; ++c) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      double* sum = sums + (c * kRows + r) * kWidth;
      float line[kWidth];
      *reinterpret_cast<LooseVector*>(line) = acc[r][c];
      for (int s = 0; s < kWidth; ++s) sum[s] += static_cast<double>(line[s]);
    }
  }
}

// Adds the packed features' products to the lower triangle's tiles, which lie row by row. Rows are
// the inner loop, so that the panels of the columns stay in the cache.
void multiply(const float* packed, long samples, long count, double* sums) {
  const long panels = (samples + kWidth - 1) / kWidth;
  const long row_blocks = (samples + kRows - 1) / kRows;
  for (long column = 0; column < panels; column += kVectors) {
    const float* b = packed + column * count * kWidth;
    for (long i = column * kWidth / kRows; i < row_blocks; ++i) {
      constexpr long kBlocksInPanel = kWidth / kRows;
      const long panel = i / kBlocksInPanel;  // also the last column panel that row i needs
      const float* a = packed + panel * count * kWidth + i % kBlocksInPanel * kRows;
      const long tiles_before =
          kBlocksInPanel * panel * (panel + 1) / 2 + i % kBlocksInPanel * (panel + 1);
      double* target = sums + (tiles_before + column) * kRows * kWidth;
      switch (panel + 1 - column) {
        case 1: tile<1>(a, b, count, target); break;
        case 2: tile<2>(a, b, count, target); break;
        default: tile<kVectors>(a, b, count, target); break;
      }
    }
  }
}
