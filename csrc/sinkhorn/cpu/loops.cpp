#include "sinkhorn/cpu/loops.hpp"

#include <algorithm>
#include <cmath>
#include <limits>

#include "common/simd.hpp"

namespace clafusion::loops {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Loops of constant length, so that they become a few instructions.
CLAFUSION_INLINE float lane_sum(const float* lanes) {
  static_assert(kLanes == 32);
  float sixteen[16], eight[8], four[4];
  for (int l = 0; l < 16; ++l) sixteen[l] = lanes[l] + lanes[l + 16];
  for (int l = 0; l < 8; ++l) eight[l] = sixteen[l] + sixteen[l + 8];
  for (int l = 0; l < 4; ++l) four[l] = eight[l] + eight[l + 4];
  return (four[0] + four[2]) + (four[1] + four[3]);
}

// dots[r] = sum_j kernel[r, j] v[j], four rows
CLAFUSION_INLINE void row_dots(const float* kernel, std::int64_t stride, const float* v,
                               float* dots) {
  const float* k0 = kernel;
  const float* k1 = kernel + stride;
  const float* k2 = kernel + 2 * stride;
  const float* k3 = kernel + 3 * stride;
  float s0[kLanes] = {}, s1[kLanes] = {}, s2[kLanes] = {}, s3[kLanes] = {};
  for (std::int64_t j = 0; j < stride; j += kLanes) {
    for (int l = 0; l < kLanes; ++l) {
      const float x = v[j + l];
      s0[l] += k0[j + l] * x;
      s1[l] += k1[j + l] * x;
      s2[l] += k2[j + l] * x;
      s3[l] += k3[j + l] * x;
    }
  }
  dots[0] = lane_sum(s0);
  dots[1] = lane_sum(s1);
  dots[2] = lane_sum(s2);
  dots[3] = lane_sum(s3);
}

// The new scaling where `sum` times it should be `weight`; `goal` is the one without relaxation.
CLAFUSION_INLINE float updated(float weight, float sum, float old, float offset, Update update,
                               float* goal) {
  float target = weight / sum;
  if (update.exponent != 1.0f) target = simd::exp(update.exponent * simd::log(target)) * offset;
  target = weight > 0.0f ? target : 0.0f;
  *goal = target;
  if (update.relaxation == 1.0f) return target;
  // By the ratio: its logarithm is small near the solution, so that nothing is lost.
  const float relaxed = old * simd::exp(update.relaxation * simd::log(target / old));
  return weight > 0.0f ? relaxed : 0.0f;
}

}  // namespace

CLAFUSION_MULTIVERSION
double scale_rows(const float* kernel, std::int64_t rows, std::int64_t stride, const float* v,
                  const float* weights, const float* offsets, Update update, float* u,
                  float* __restrict sums) {
  const bool plain = update.plain();
  float excess[kGroup] = {};
  for (std::int64_t j = 0; j < stride; ++j) sums[j] = 0.0f;
  for (std::int64_t i = 0; i < rows; i += kGroup) {
    const float* group = kernel + i * stride;
    float dots[kGroup];
    row_dots(group, stride, v, dots);
    row_dots(group + 4 * stride, stride, v, dots + 4);
    row_dots(group + 8 * stride, stride, v, dots + 8);
    row_dots(group + 12 * stride, stride, v, dots + 12);
    if (plain) {
      for (int r = 0; r < kGroup; ++r) {
        u[i + r] = weights[i + r] > 0.0f ? weights[i + r] / dots[r] : 0.0f;
      }
    } else {
      for (int r = 0; r < kGroup; ++r) {
        float goal;
        const float scaling =
            updated(weights[i + r], dots[r], u[i + r], offsets[i + r], update, &goal);
        excess[r] += dots[r] * std::abs(scaling - goal);
        u[i + r] = scaling;
      }
    }
    for (int half = 0; half < kGroup; half += 4) {
      const float* k = group + half * stride;
      const float u0 = u[i + half], u1 = u[i + half + 1];
      const float u2 = u[i + half + 2], u3 = u[i + half + 3];
      for (std::int64_t j = 0; j < stride; ++j) {
        sums[j] += u0 * k[j] + u1 * k[stride + j] + u2 * k[2 * stride + j] + u3 * k[3 * stride + j];
      }
    }
  }
  double moved = 0.0;
  for (const float part : excess) moved += static_cast<double>(part);
  return moved;
}

CLAFUSION_MULTIVERSION
double scale_columns(const float* sums, std::int64_t stride, const float* weights,
                     const float* offsets, Update update, float* v, float* least, float* largest) {
  float moved[kLanes] = {}, low[kLanes], high[kLanes] = {};
  for (int l = 0; l < kLanes; ++l) low[l] = kInfinity;
  for (std::int64_t j = 0; j < stride; j += kLanes) {
    for (int l = 0; l < kLanes; ++l) {
      const float weight = weights[j + l];
      const float old = v[j + l];
      float goal;
      const float scaling = updated(weight, sums[j + l], old, offsets[j + l], update, &goal);
      moved[l] += weight > 0.0f ? sums[j + l] * std::abs(old - goal) : 0.0f;
      const float seen = weight > 0.0f ? scaling : 1.0f;
      low[l] = seen < low[l] ? seen : low[l];
      high[l] = seen > high[l] ? seen : high[l];
      v[j + l] = scaling;
    }
  }
  double total = 0.0;
  *least = low[0];
  *largest = high[0];
  for (int l = 0; l < kLanes; ++l) {
    total += static_cast<double>(moved[l]);
    *least = std::min(*least, low[l]);
    *largest = std::max(*largest, high[l]);
  }
  return total;
}

CLAFUSION_MULTIVERSION
float kernel_row(const float* cost, std::int64_t size, float scale, const float* potential,
                 float* __restrict kernel) {
  float largest[kLanes];
  for (int l = 0; l < kLanes; ++l) largest[l] = -kInfinity;
  const std::int64_t whole = size / kLanes * kLanes;
  for (std::int64_t j = 0; j < whole; j += kLanes) {
    for (int l = 0; l < kLanes; ++l) {
      const float x = potential[j + l] - scale * cost[j + l];
      largest[l] = x > largest[l] ? x : largest[l];
    }
  }
  float most = -kInfinity;
  for (int l = 0; l < kLanes; ++l) most = std::max(most, largest[l]);
  for (std::int64_t j = whole; j < size; ++j) {
    most = std::max(most, potential[j] - scale * cost[j]);
  }
  for (std::int64_t j = 0; j < size; ++j) {
    kernel[j] = simd::exp((potential[j] - scale * cost[j]) - most);
  }
  return most;
}

CLAFUSION_MULTIVERSION
void raise_column_maxima(const float* cost, std::int64_t size, float scale, float potential,
                         float* __restrict largest) {
  for (std::int64_t j = 0; j < size; ++j) {
    const float x = potential - scale * cost[j];
    largest[j] = x > largest[j] ? x : largest[j];
  }
}

CLAFUSION_MULTIVERSION
void add_column_exponentials(const float* cost, std::int64_t size, float scale, float potential,
                             const float* largest, float* __restrict sums) {
  for (std::int64_t j = 0; j < size; ++j) {
    sums[j] += simd::exp((potential - scale * cost[j]) - largest[j]);
  }
}

CLAFUSION_MULTIVERSION
double plan_row(const float* kernel, std::int64_t size, float u, const float* v, const float* cost,
                float* __restrict plan) {
  double total[8] = {};
  const std::int64_t whole = size / 8 * 8;
  for (std::int64_t j = 0; j < whole; j += 8) {
    for (int l = 0; l < 8; ++l) {
      const float p = u * kernel[j + l] * v[j + l];
      plan[j + l] = p;
      total[l] += static_cast<double>(p) * static_cast<double>(cost[j + l]);
    }
  }
  for (std::int64_t j = whole; j < size; ++j) {
    plan[j] = u * kernel[j] * v[j];
    total[0] += static_cast<double>(plan[j]) * static_cast<double>(cost[j]);
  }
  double sum = 0.0;
  for (const double part : total) sum += part;
  return sum;
}

CLAFUSION_MULTIVERSION
float largest_magnitude(const float* cost, std::int64_t size, bool* finite) {
  float largest[kLanes] = {};
  float zero[kLanes] = {};  // stays 0 exactly while all entries are finite
  const std::int64_t whole = size / kLanes * kLanes;
  for (std::int64_t j = 0; j < whole; j += kLanes) {
    for (int l = 0; l < kLanes; ++l) {
      const float x = std::abs(cost[j + l]);
      largest[l] = x > largest[l] ? x : largest[l];
      zero[l] += x * 0.0f;
    }
  }
  for (std::int64_t j = whole; j < size; ++j) {
    largest[0] = std::max(largest[0], std::abs(cost[j]));
    zero[0] += cost[j] * 0.0f;
  }
  float sum = 0.0f;
  for (int l = 0; l < kLanes; ++l) {
    sum += zero[l];
    largest[0] = std::max(largest[0], largest[l]);
  }
  *finite = sum == 0.0f;
  return largest[0];
}

}  // namespace clafusion::loops
