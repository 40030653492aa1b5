// Blocks of features: packing and multiplication, written once and compiled for each
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

// Asks for the cache lines of the square at (panel, k).
CLAFUSION_INLINE void prefetch_square(const Packing& p, std::int64_t panel, std::int64_t k) {
  const std::int64_t first = panel * kWidth;
  const std::int64_t rows = p.samples - first < kWidth ? p.samples - first : kWidth;
  const float* source = p.x + first * p.row_stride + k;
  for (std::int64_t r = 0; r < rows; ++r) __builtin_prefetch(source + r * p.row_stride, 0, 3);
}

// Packs the next square of kWidth samples by kWidth features. Samples that the last panel lacks
// are zero.
CLAFUSION_INLINE void pack_square(Packing& p) {
  const std::int64_t first = p.panel * kWidth;
  const std::int64_t rows = p.samples - first < kWidth ? p.samples - first : kWidth;
  const std::int64_t columns = p.count - p.k < kWidth ? p.count - p.k : kWidth;
  const float* source = p.x + first * p.row_stride + p.k;
  float* target = p.packed + (p.panel * p.count + p.k) * kWidth;
  if (rows == kWidth && columns == kWidth) {
    Vector block[kWidth];
#pragma GCC unroll 16
    for (int r = 0; r < kWidth; ++r) {
      block[r] = *reinterpret_cast<const LooseVector*>(source + r * p.row_stride);
    }
    transpose(block);
#pragma GCC unroll 16
    for (int r = 0; r < kWidth; ++r) {
      *reinterpret_cast<LooseVector*>(target + r * kWidth) = block[r];
    }
  } else {
    for (std::int64_t k = 0; k < columns; ++k) {
      for (std::int64_t r = 0; r < rows; ++r) target[k * kWidth + r] = source[r * p.row_stride + k];
      for (std::int64_t r = rows; r < kWidth; ++r) target[k * kWidth + r] = 0.0f;
    }
  }
  p.k += kWidth;
  if (p.k >= p.count) {
    p.k = 0;
    ++p.panel;
  }
}

// Packs up to `squares` squares, and asks for the lines of the ones after them.
CLAFUSION_INLINE void pack_some(Packing& p, std::int64_t squares) {
  const std::int64_t panels = (p.samples + kWidth - 1) / kWidth;
  for (; squares > 0 && p.panel < panels; --squares) {
    const std::int64_t ahead = p.k + kAhead * kWidth;
    if (ahead < p.count) {
      prefetch_square(p, p.panel, ahead);
    } else if (p.panel + 1 < panels && ahead - p.count < p.count) {
      prefetch_square(p, p.panel + 1, ahead - p.count);
    }
    pack_square(p);
  }
}

void pack(Packing& p) { pack_some(p, std::numeric_limits<std::int64_t>::max()); }

// Adds kRows samples (from `a` on, in a panel) times N panels (from `b` on) to N tiles, and asks for
// the panel and the tiles that come next: those of thousands of samples are in no cache.
template <int N>
CLAFUSION_INLINE void tile(const float* a, const float* b, std::int64_t count, float* sums,
                           const float* next_a, const float* next_sums) {
  Vector acc[kRows][N];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 3
    for (int c = 0; c < N; ++c) acc[r][c] = Vector{};
  }
#pragma GCC unroll 24
  for (int i = 0; i < N * kRows; ++i) __builtin_prefetch(next_sums + i * kWidth, 1, 3);
  for (std::int64_t k = 0; k < count; ++k) {
    __builtin_prefetch(next_a + k * kWidth, 0, 3);
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
      *reinterpret_cast<LooseVector*>(sums + (c * kRows + r) * kWidth) += acc[r][c];
    }
  }
}

// Adds the packed features' products to the tiles of the lower triangle's first column panels,
// which lie row by row, and packs the next block meanwhile: reading x for the first time waits for
// memory, and a little of it between two tiles does not. Rows are the inner loop, so that the
// panels of the columns stay in the cache.
void multiply(const float* packed, std::int64_t samples, std::int64_t columns, std::int64_t count,
              float* sums, Packing& next) {
  constexpr std::int64_t kBlocksInPanel = kWidth / kRows;
  const std::int64_t panels = (samples + kWidth - 1) / kWidth;
  const std::int64_t row_blocks = (samples + kRows - 1) / kRows;
  const std::int64_t tiles = kBlocksInPanel * squares_before(panels, columns);
  const std::int64_t squares = panels * ((next.count + kWidth - 1) / kWidth);
  const std::int64_t squares_a_call = kVectors * squares / tiles + 1;
  const auto sums_of = [&](std::int64_t i) {  // of row block i
    const std::int64_t panel = i / kBlocksInPanel;
    const std::int64_t width = panel < columns ? panel + 1 : columns;
    return sums + (kBlocksInPanel * squares_before(panel, columns) + i % kBlocksInPanel * width) *
                      kRows * kWidth;
  };
  for (std::int64_t column = 0; column < columns; column += kVectors) {
    const float* b = packed + column * count * kWidth;
    const std::int64_t here = column * kRows * kWidth;
    for (std::int64_t i = column * kWidth / kRows; i < row_blocks; ++i) {
      const std::int64_t panel = i / kBlocksInPanel;
      const std::int64_t last = panel < columns ? panel + 1 : columns;  // of row i's column panels
      const float* a = packed + panel * count * kWidth + i % kBlocksInPanel * kRows;
      float* target = sums_of(i) + here;
      const std::int64_t after = i + 1 < row_blocks ? i + 1 : i;
      const float* next_a = packed + after / kBlocksInPanel * count * kWidth;
      const float* next_target = sums_of(after) + here;
      pack_some(next, squares_a_call);
      switch (last - column) {
        case 1: tile<1>(a, b, count, target, next_a, next_target); break;
        case 2: tile<2>(a, b, count, target, next_a, next_target); break;
        default: tile<kVectors>(a, b, count, target, next_a, next_target); break;
      }
    }
  }
  pack(next);
}
