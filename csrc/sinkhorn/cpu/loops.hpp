// The CPU's inner loops over one problem's matrices: plain arrays, compiled for several instruction
// sets.
#pragma once

#include <cstdint>

namespace clafusion::loops {

// Columns are padded to a multiple of kLanes, rows to one of kGroup: the loops have no remainder.
inline constexpr std::int64_t kLanes = 32;
inline constexpr std::int64_t kGroup = 16;

// How rows (or columns) are updated from the sums of the scaled kernel.
struct Update {
  float relaxation;  // over-relaxation; 1 for plain Sinkhorn
  float exponent;    // of the unbalanced update; 1 for balanced

  bool plain() const { return relaxation == 1.0f && exponent == 1.0f; }
};

// Updates u from v and adds u^T kernel to sums, reading the kernel once. Returns the mass that
// the plain row update would still move.
double scale_rows(const float* kernel, std::int64_t rows, std::int64_t stride, const float* v,
                  const float* weights, const float* offsets, Update update, float* u, float* sums);

// The column's half of the iteration. Returns the mass that the plain update would move; sets
// `least` and `largest` to the extremes of the scalings of columns with a weight.
double scale_columns(const float* sums, std::int64_t stride, const float* weights,
                     const float* offsets, Update update, float* v, float* least, float* largest);

// kernel[j] = exp(potential[j] - scale cost[j] - its maximum); returns that maximum.
float kernel_row(const float* cost, std::int64_t size, float scale, const float* potential,
                 float* kernel);

// largest[j] = max(largest[j], potential_i - scale cost_ij), one row i
void raise_column_maxima(const float* cost, std::int64_t size, float scale, float potential,
                         float* largest);

// sums[j] += exp(potential_i - scale cost_ij - largest[j])
void add_column_exponentials(const float* cost, std::int64_t size, float scale, float potential,
                             const float* largest, float* sums);

// plan[j] = u kernel[j] v[j]; returns sum_j plan[j] cost[j]
double plan_row(const float* kernel, std::int64_t size, float u, const float* v, const float* cost,
                float* plan);

// The largest |cost|; `finite` tells whether all are.
float largest_magnitude(const float* cost, std::int64_t size, bool* finite);

}  // namespace clafusion::loops
