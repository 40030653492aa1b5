// Linear assignment: one partner for each, at least total cost.
#pragma once

#include <cstdint>

namespace clafusion {

struct AssignmentProblem {
  const double* cost;  // (size, size), row-major; magnitudes up to kLargestAssignmentCost
  std::int64_t size;
};

struct AssignmentSolution {
  std::int64_t* target;  // (size): the column of each row
  // The dual solution: f_i + g_j <= C_ij, with equality where i is matched with j, to rounding.
  double* source_potential;  // (size): f
  double* target_potential;  // (size): g
  double cost;               // the sum over the matched pairs
};

// Sums and differences of potentials stay finite up to here.
inline constexpr double kLargestAssignmentCost = 1e200;

// Solves `count` independent problems exactly by the algorithm of Jonker and Volgenant (Computing
// 38, 1987): column reduction, augmenting row reduction, shortest augmenting paths; O(size^3) each
// at worst. Of equally near columns a free one ends a search at once. Threads share the problems
// out; the result does not depend on their number. Throws std::invalid_argument when a problem is
// empty or a cost is NaN or too large.
void assign(const AssignmentProblem* problems, AssignmentSolution* solutions, std::int64_t count);

}  // namespace clafusion
