#include "gram/gram.hpp"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/parallel.hpp"
#include "common/simd.hpp"

namespace clafusion {
namespace {

// Features packed at a time: two blocks of 400 samples and their tiles stay in a core's cache.
constexpr std::int64_t kBlock = 128;
// Features summed in float32, block by block, before they are added in float64.
constexpr std::int64_t kMostChunk = 4096;

// A block of features on its way to panels of samples, square by square.
struct Packing {
  const float* x;  // the first feature of the block
  std::int64_t samples;
  std::int64_t count;  // features in the block; 0: nothing to pack
  std::int64_t row_stride;
  float* packed;
  std::int64_t panel;  // where the next square is
  std::int64_t k;
};

struct Kernel {
  std::int64_t width;
  std::int64_t rows;
  void (*pack)(Packing& block);
  void (*multiply)(const float* packed, std::int64_t samples, std::int64_t columns,
                   std::int64_t count, float* sums, Packing& next);
};

// How many squares of width by width products stand before a panel of rows, of the lower triangle's
// first `columns` panels of columns.
constexpr std::int64_t squares_before(std::int64_t panel, std::int64_t columns) {
  if (panel <= columns) return panel * (panel + 1) / 2;
  return columns * (columns + 1) / 2 + (panel - columns) * columns;
}

// How many squares ahead memory is asked for: about the time that a call's tiles take.
constexpr std::int64_t kAhead = 2;

#if defined(__GNUC__) || defined(__clang__)

namespace baseline {
constexpr int kWidth = 4, kRows = 4, kVectors = 2;
#include "gram/gram_block.inl"
}  // namespace baseline

#if defined(__x86_64__) && !defined(__clang__)
#define CLAFUSION_GRAM_X86 1
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v3")
namespace avx2 {
constexpr int kWidth = 8, kRows = 4, kVectors = 3;
#include "gram/gram_block.inl"
}  // namespace avx2
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4")
namespace avx512 {
constexpr int kWidth = 16, kRows = 8, kVectors = 2;
#include "gram/gram_block.inl"
}  // namespace avx512
#pragma GCC pop_options
#endif

#else  // no vector types: plain loops

namespace baseline {
constexpr int kWidth = 1, kRows = 1;
void pack(Packing& p) {
  for (std::int64_t i = 0; i < p.samples; ++i) {
    std::copy_n(p.x + i * p.row_stride, p.count, p.packed + i * p.count);
  }
}
void multiply(const float* packed, std::int64_t samples, std::int64_t columns, std::int64_t count,
              float* sums, Packing& next) {
  for (std::int64_t i = 0; i < samples; ++i) {
    for (std::int64_t j = 0; j < std::min(i + 1, columns); ++j, ++sums) {
      float sum = 0.0f;
      for (std::int64_t k = 0; k < count; ++k) sum += packed[i * count + k] * packed[j * count + k];
      *sums += sum;
    }
  }
  pack(next);
}
}  // namespace baseline

#endif

Kernel kernel(SimdLevel level) {
  const SimdLevel best = best_simd_level();
  if (level == SimdLevel::automatic) level = best;
  if (level < SimdLevel::automatic || level > best) {
    throw std::invalid_argument("level " + std::to_string(static_cast<int>(level)) +
                                " is not available here; the highest is " +
                                std::to_string(static_cast<int>(best)));
  }
#if defined(CLAFUSION_GRAM_X86)
  if (level == SimdLevel::avx512) {
    return {avx512::kWidth, avx512::kRows, avx512::pack, avx512::multiply};
  }
  if (level == SimdLevel::avx2) return {avx2::kWidth, avx2::kRows, avx2::pack, avx2::multiply};
#endif
  return {baseline::kWidth, baseline::kRows, baseline::pack, baseline::multiply};
}

struct AlignedDelete {
  void operator()(float* data) const { ::operator delete[](data, std::align_val_t{64}); }
};
using Floats = std::unique_ptr<float[], AlignedDelete>;

Floats allocate(std::int64_t count) {
  return Floats(new (std::align_val_t{64}) float[static_cast<std::size_t>(count)]);
}

// gram += the chunks, in order, tile by tile, for the row blocks [begin, end); both triangles of the
// first `leading` samples.
void add_tiles(const Kernel& k, const float* sums, std::int64_t chunks, std::int64_t sums_size,
               std::int64_t samples, std::int64_t leading, std::int64_t begin, std::int64_t end,
               double* gram) {
  const std::int64_t tile = k.rows * k.width;
  const std::int64_t blocks_in_panel = k.width / k.rows;
  const std::int64_t columns = (leading + k.width - 1) / k.width;
  std::vector<double> total(static_cast<std::size_t>(tile));
  for (std::int64_t i = begin; i < end; ++i) {
    const std::int64_t panel = i / blocks_in_panel;
    const std::int64_t last = std::min(panel + 1, columns);
    const std::int64_t before =
        blocks_in_panel * squares_before(panel, columns) + i % blocks_in_panel * last;
    for (std::int64_t c = 0; c < last; ++c) {
      const auto visit = [&](auto body) {
        for (std::int64_t r = 0; r < k.rows && i * k.rows + r < samples; ++r) {
          const std::int64_t row = i * k.rows + r;
          const std::int64_t stop = std::min(k.width, std::min(row + 1, leading) - c * k.width);
          for (std::int64_t s = 0; s < stop; ++s) body(r * k.width + s, row, c * k.width + s);
        }
      };
      visit([&](std::int64_t e, std::int64_t row, std::int64_t column) {
        total[e] = gram[row * leading + column];
      });
      const float* one = sums + (before + c) * tile;
      for (std::int64_t chunk = 0; chunk < chunks; ++chunk, one += sums_size) {
        for (std::int64_t e = 0; e < tile; ++e) total[e] += static_cast<double>(one[e]);
      }
      visit([&](std::int64_t e, std::int64_t row, std::int64_t column) {
        gram[row * leading + column] = total[e];
        if (row < leading) gram[column * leading + row] = total[e];
      });
    }
  }
}

}  // namespace

SimdLevel best_simd_level() {
#if defined(CLAFUSION_GRAM_X86)
  if (__builtin_cpu_supports("x86-64-v4")) return SimdLevel::avx512;
  if (__builtin_cpu_supports("x86-64-v3")) return SimdLevel::avx2;
#endif
  return SimdLevel::baseline;
}

void gram(const float* x, std::int64_t num_samples, std::int64_t num_features,
          std::int64_t row_stride, std::int64_t leading, double* gram, SimdLevel level) {
  const Kernel k = kernel(level);
  if (num_samples < 0 || num_features < 0) throw std::invalid_argument("x has a negative size");
  if (leading < 0 || leading > num_samples) {
    throw std::invalid_argument("leading must be between 0 and the number of samples, " +
                                std::to_string(num_samples) + "; got " + std::to_string(leading));
  }
  if (leading == 0 || num_features == 0) return;
  const std::int64_t panels = (num_samples + k.width - 1) / k.width;
  const std::int64_t columns = (leading + k.width - 1) / k.width;
  const std::int64_t sums_size = squares_before(panels, columns) * k.width * k.width;
  const std::int64_t blocks = (num_features + kBlock - 1) / kBlock;
  // Some 16 chunks, so that threads share them evenly; a function of the shape only.
  const std::int64_t blocks_a_chunk =
      std::clamp<std::int64_t>(blocks / 16, 1024 / kBlock, kMostChunk / kBlock);
  const std::int64_t chunks = (blocks + blocks_a_chunk - 1) / blocks_a_chunk;
  // As many chunks at once as 64 MB hold: they are added in order, whatever their number.
  constexpr std::int64_t kRoom = (std::int64_t{1} << 26) / sizeof(float);
  const std::int64_t most = std::max<std::int64_t>(kRoom / sums_size, 2 * num_threads());
  const std::int64_t round = std::min(chunks, most);
  const std::int64_t buffer = panels * k.width * kBlock;
  const Floats sums = allocate(round * sums_size);

  for (std::int64_t first_chunk = 0; first_chunk < chunks; first_chunk += round) {
    const std::int64_t count = std::min(round, chunks - first_chunk);
    parallel_for(count, 1, [&](std::int64_t begin, std::int64_t end) {
      const Floats packed = allocate(2 * buffer);
      const std::int64_t first = (first_chunk + begin) * blocks_a_chunk;
      const std::int64_t stop = std::min((first_chunk + end) * blocks_a_chunk, blocks);
      const auto block = [&](std::int64_t b) {
        const std::int64_t start = b * kBlock;
        const std::int64_t size = b < stop ? std::min(kBlock, num_features - start) : 0;
        return Packing{x + (size > 0 ? start : 0),
                       size > 0 ? num_samples : 0,
                       size,
                       row_stride,
                       packed.get() + (b - first) % 2 * buffer,
                       0,
                       0};
      };
      Packing current = block(first);
      k.pack(current);
      for (std::int64_t b = first; b < stop; ++b) {
        float* target = sums.get() + (b / blocks_a_chunk - first_chunk) * sums_size;
        if (b % blocks_a_chunk == 0) std::fill_n(target, sums_size, 0.0f);
        Packing next = block(b + 1);
        k.multiply(current.packed, num_samples, columns, current.count, target, next);
        current = next;
      }
    });
    parallel_for(panels * (k.width / k.rows), 4, [&](std::int64_t begin, std::int64_t end) {
      add_tiles(k, sums.get(), count, sums_size, num_samples, leading, begin, end, gram);
    });
  }
  // NaN and infinity show in every product of a sample, numbers that are too large in its square.
  for (std::int64_t i = 0; i < num_samples; ++i) {
    if (!std::isfinite(gram[i * leading + std::min(i, leading - 1)])) {
      throw std::invalid_argument("x[" + std::to_string(i) +
                                  "] holds NaN, infinity or numbers too large for float32 squares");
    }
  }
}

}  // namespace clafusion
