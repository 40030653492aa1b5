#include "gram.hpp"

#include <algorithm>
#include <cmath>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/parallel.hpp"
#include "common/simd.hpp"

namespace clafusion {
namespace {

// Long enough to hide the float64 sums, short enough for 400 samples to stay in a core's cache and
// for float32 sums to lose little.
constexpr std::int64_t kBlock = 512;

struct Kernel {
  std::int64_t width;
  std::int64_t rows;
  void (*pack)(const float* x, long samples, long count, long row_stride, float* packed);
  void (*multiply)(const float* packed, long samples, long count, double* sums);
};

#if defined(__GNUC__) || defined(__clang__)

namespace baseline {
constexpr int kWidth = 4, kRows = 4, kVectors = 2;
#include "gram_block.inl"
}  // namespace baseline

#if defined(__x86_64__) && !defined(__clang__)
#define CLAFUSION_GRAM_X86 1
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v3")
namespace avx2 {
constexpr int kWidth = 8, kRows = 4, kVectors = 3;
#include "gram_block.inl"
}  // namespace avx2
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4")
namespace avx512 {
constexpr int kWidth = 16, kRows = 8, kVectors = 3;
#include "gram_block.inl"
}  // namespace avx512
#pragma GCC pop_options
#endif

#else  // no vector types: plain loops

namespace baseline {
constexpr int kWidth = 1, kRows = 1;
void pack(const float* x, long samples, long count, long row_stride, float* packed) {
  for (long i = 0; i < samples; ++i) std::copy_n(x + i * row_stride, count, packed + i * count);
}
void multiply(const float* packed, long samples, long count, double* sums) {
  for (long i = 0; i < samples; ++i) {
    for (long j = 0; j <= i; ++j, ++sums) {
      float sum = 0.0f;
      for (long k = 0; k < count; ++k) sum += packed[i * count + k] * packed[j * count + k];
      *sums += sum;
    }
  }
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

// How many parts the features are split into, each with its own sums: as many as threads can use,
// while their sums stay small. A function of the shape only, so that the bytes are.
std::int64_t num_parts(std::int64_t blocks, std::int64_t sums_size) {
  constexpr std::int64_t kMostParts = 16;
  constexpr std::int64_t kMostSums = std::int64_t{1} << 25;  // 256 MB
  return std::clamp<std::int64_t>(kMostSums / sums_size, 1, std::min(kMostParts, blocks));
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
          std::int64_t row_stride, double* gram, SimdLevel level) {
  const Kernel k = kernel(level);
  if (num_samples < 0 || num_features < 0) throw std::invalid_argument("x has a negative size");
  if (num_samples == 0) return;
  if (num_features == 0) {
    std::fill_n(gram, num_samples * num_samples, 0.0);
    return;
  }
  const std::int64_t panels = (num_samples + k.width - 1) / k.width;
  const std::int64_t sums_size = panels * (panels + 1) / 2 * k.width * k.width;
  const std::int64_t blocks = (num_features + kBlock - 1) / kBlock;
  const std::int64_t parts = num_parts(blocks, sums_size);
  std::vector<std::unique_ptr<double[]>> sums(static_cast<std::size_t>(parts));

  parallel_for(parts, 1, [&](std::int64_t begin, std::int64_t end) {
    const std::unique_ptr<float[]> packed(new float[panels * k.width * kBlock]);
    for (std::int64_t part = begin; part < end; ++part) {
      sums[part] = std::make_unique<double[]>(static_cast<std::size_t>(sums_size));
      for (std::int64_t b = blocks * part / parts; b < blocks * (part + 1) / parts; ++b) {
        const std::int64_t first = b * kBlock;
        const std::int64_t count = std::min(kBlock, num_features - first);
        k.pack(x + first, num_samples, count, row_stride, packed.get());
        k.multiply(packed.get(), num_samples, count, sums[part].get());
      }
    }
  });

  // The parts in order, tile by tile, to both triangles.
  const std::int64_t tile = k.rows * k.width;
  const std::int64_t blocks_in_panel = k.width / k.rows;
  parallel_for(panels, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin * blocks_in_panel; i < end * blocks_in_panel; ++i) {
      const std::int64_t panel = i / blocks_in_panel;
      const std::int64_t before =
          blocks_in_panel * panel * (panel + 1) / 2 + i % blocks_in_panel * (panel + 1);
      for (std::int64_t c = 0; c <= panel; ++c) {
        double* const total = sums[0].get() + (before + c) * tile;
        for (std::int64_t part = 1; part < parts; ++part) {
          const double* const one = sums[part].get() + (before + c) * tile;
          for (std::int64_t e = 0; e < tile; ++e) total[e] += one[e];
        }
        for (std::int64_t e = 0; e < tile; ++e) {
          const std::int64_t row = i * k.rows + e / k.width;
          const std::int64_t column = c * k.width + e % k.width;
          if (row >= num_samples || column > row) continue;
          gram[row * num_samples + column] = total[e];
          gram[column * num_samples + row] = total[e];
        }
      }
    }
  });
  for (std::int64_t i = 0; i < num_samples; ++i) {
    if (!std::isfinite(gram[i * num_samples + i])) {
      throw std::invalid_argument("x[" + std::to_string(i) +
                                  "] holds NaN, infinity or numbers too large for float32 squares");
    }
  }
}

}  // namespace clafusion
