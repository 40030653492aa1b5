// The inner products between all pairs of samples: X X^T for few samples by many features.
#pragma once

#include <cstdint>

namespace clafusion {

enum class SimdLevel : std::int32_t { automatic = 0, baseline = 1, avx2 = 2, avx512 = 3 };

// The best level that this build has and this processor can run.
SimdLevel best_simd_level();

// Adds X X^T, symmetric, (num_samples, num_samples), to `gram`. Sample i's features lie one
// behind the other from x + i * row_stride (in elements, of either sign).
//
// Products are summed in float32 within runs of 128 features, the runs in float32 within chunks of
// at most 4096, and the chunks in float64, in an order that depends on the shape and the level
// only: not on the number of threads. So an entry's error is below 160 * 2^-24 of the sum of its
// products' magnitudes.
//
// Throws std::invalid_argument when a size is negative, when the level is not available, and when
// a sample's squared norm is not finite, since it holds NaN or infinity or numbers that are too
// large; `gram` is of no use then.
void gram(const float* x, std::int64_t num_samples, std::int64_t num_features,
          std::int64_t row_stride, double* gram, SimdLevel level = SimdLevel::automatic);

}  // namespace clafusion
