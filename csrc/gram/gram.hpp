// The inner products between pairs of samples: X X^T for few samples by many features.
#pragma once

#include <cstdint>

namespace clafusion {

enum class SimdLevel : std::int32_t { automatic = 0, baseline = 1, avx2 = 2, avx512 = 3 };

// The best level that this build has and this processor can run.
SimdLevel best_simd_level();

// Adds the products of all samples with the first `leading` ones, the leading columns of X X^T, to
// `gram`, (num_samples, leading). Sample i's features lie one behind the other from
// x + i * row_stride (in elements, of either sign).
//
// Products are summed in float32 within runs of 128 features, the runs in float32 within chunks of
// at most 4096, and the chunks in float64, in an order that depends on the shape and the level
// only: not on the number of threads. So an entry's error is below 160 * 2^-24 of the sum of its
// products' magnitudes.
//
// Throws std::invalid_argument when a size is negative, when `leading` exceeds num_samples, when the
// level is not available, and when a sample holds NaN, infinity or numbers that are too large: where
// a leading sample's squared norm or another one's product with the last leading one is not finite.
// `gram` is of no use then.
void gram(const float* x, std::int64_t num_samples, std::int64_t num_features,
          std::int64_t row_stride, std::int64_t leading, double* gram,
          SimdLevel level = SimdLevel::automatic);

}  // namespace clafusion
