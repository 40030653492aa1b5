#include "alignment/layer_costs.hpp"

#include <algorithm>
#include <cstddef>
#include <memory>
#include <stdexcept>
#include <vector>

#include "common/parallel.hpp"
#include "common/simd.hpp"

namespace clafusion {
namespace {

// Packs the lower triangle of the centred matrix row by row, with the numbers off the diagonal
// multiplied by sqrt(2): inner products of packed triangles are those of the matrices. `sums` is
// scratch for one number a sample, zero on entry.
CLAFUSION_MULTIVERSION
void centre(const double* gram, std::int64_t samples, Hsic estimate, double* sums, double* packed,
            double* squared_norm) {
  const bool unbiased = estimate == Hsic::unbiased;
  const auto count = static_cast<double>(samples);
  double total = 0.0;
  for (std::int64_t i = 0; i < samples; ++i) {
    const double* row = gram + i * samples;
    double lanes[16] = {};
    std::int64_t j = 0;
    for (; j + 16 <= i; j += 16) {
      for (int l = 0; l < 16; ++l) {
        lanes[l] += row[j + l];
        sums[j + l] += row[j + l];
      }
    }
    double sum = unbiased ? 0.0 : row[i];
    for (; j < i; ++j) {
      sum += row[j];
      sums[j] += row[j];
    }
    for (double lane : lanes) sum += lane;
    sums[i] += sum;
  }
  for (std::int64_t i = 0; i < samples; ++i) total += sums[i];
  const double divisor = unbiased ? count - 2.0 : count;
  const double centre = total / (unbiased ? (count - 1.0) * (count - 2.0) : count * count);
  for (std::int64_t i = 0; i < samples; ++i) sums[i] /= divisor;

  constexpr double kRoot = 1.4142135623730951;
  double norm = 0.0;
  double* out = packed;
  for (std::int64_t i = 0; i < samples; ++i) {
    const double* row = gram + i * samples;
    const double shift = centre - sums[i];
    double lanes[16] = {};
    std::int64_t j = 0;
    for (; j + 16 <= i; j += 16) {
      for (int l = 0; l < 16; ++l) {
        const double value = kRoot * (row[j + l] + (shift - sums[j + l]));
        out[j + l] = value;
        lanes[l] += value * value;
      }
    }
    for (; j < i; ++j) {
      out[j] = kRoot * (row[j] + (shift - sums[j]));
      norm += out[j] * out[j];
    }
    out[i] = unbiased ? 0.0 : row[i] + (shift - sums[i]);
    norm += out[i] * out[i];
    for (double lane : lanes) norm += lane;
    out += i + 1;
  }
  *squared_norm = norm;
}

// sums[j] += <a, b_j> over one segment, for rows b_j at distance `stride`.
CLAFUSION_MULTIVERSION
void add_products(const double* a, const double* b, std::int64_t count, std::int64_t stride,
                  std::int64_t length, double* sums) {
  for (std::int64_t r = 0; r < count; ++r, b += stride) {
    double lanes[32] = {};
    std::int64_t k = 0;
    for (; k + 32 <= length; k += 32) {
      for (int l = 0; l < 32; ++l) lanes[l] += a[k + l] * b[k + l];
    }
    double sum = 0.0;
    for (; k < length; ++k) sum += a[k] * b[k];
    for (double lane : lanes) sum += lane;
    sums[r] += sum;
  }
}

}  // namespace

void hsic_all_pairs(const double* const* grams_a, std::int64_t count_a,
                    const double* const* grams_b, std::int64_t count_b, std::int64_t samples,
                    Hsic estimate, double* products, double* norms_a, double* norms_b) {
  if (count_a < 0 || count_b < 0) throw std::invalid_argument("the counts must not be negative");
  if (samples < (estimate == Hsic::unbiased ? 4 : 2)) {
    throw std::invalid_argument(estimate == Hsic::unbiased
                                    ? "unbiased HSIC needs Gram matrices over at least 4 samples"
                                    : "HSIC needs Gram matrices over at least 2 samples");
  }
  const std::int64_t length = samples * (samples + 1) / 2;
  const std::unique_ptr<double[]> packed(new double[(count_a + count_b) * length]);
  parallel_for(count_a + count_b, 1, [&](std::int64_t begin, std::int64_t end) {
    std::vector<double> sums(static_cast<std::size_t>(samples));
    for (std::int64_t i = begin; i < end; ++i) {
      std::fill(sums.begin(), sums.end(), 0.0);
      const bool in_a = i < count_a;
      centre(in_a ? grams_a[i] : grams_b[i - count_a], samples, estimate, sums.data(),
             packed.get() + i * length, in_a ? norms_a + i : norms_b + (i - count_a));
    }
  });
  std::fill(products, products + count_a * count_b, 0.0);
  constexpr std::int64_t kSegment = 2048;  // 16 KB of a row stay in the first cache
  parallel_for(count_a, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t start = 0; start < length; start += kSegment) {
      for (std::int64_t i = begin; i < end; ++i) {
        add_products(packed.get() + i * length + start, packed.get() + count_a * length + start,
                     count_b, length, std::min(kSegment, length - start), products + i * count_b);
      }
    }
  });
}

}  // namespace clafusion
