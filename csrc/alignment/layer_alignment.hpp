// Cross-layer alignment: which layer of the deep network each layer of the shallow one matches.
#pragma once

#include <cstdint>

namespace clafusion {

enum class AlignmentMode : std::int32_t {
  // Every shallow layer matches one deep layer, in order; a deep layer may stay unmatched at its
  // skip cost (CLAFusion, arXiv 2110.15538, section 3.2):
  //   F[k, l] = min(F[k, l-1] + skip[l], F[k-1, l-1] + C[l, k]),  F[0, 0] = 0
  // Where shallow layers may stay unmatched too, at skip_shallow[k], there is a third choice:
  //   F[k-1, l] + skip_shallow[k]
  layer = 0,
  // Consecutive deep layers form segments, one for each shallow layer (arXiv 2501.00061):
  //   F[k, l] = min(F[k, l-1], F[k-1, l-1]) + C[l, k]
  segment = 1,
};

struct AlignmentProblem {
  const double* cost;  // (num_deep, num_shallow), row-major; +inf forbids a pair
  const double* skip;  // (num_deep): what leaving a deep layer unmatched costs, in layer mode;
                       // null: nothing
  const double* skip_shallow;  // (num_shallow): the same of a shallow layer; null: forbidden
  std::int64_t num_deep;
  std::int64_t num_shallow;
  bool pin_first;  // deep layer 0 must match shallow layer 0
  bool pin_last;   // the last deep layer must match the last shallow layer
};

struct AlignmentSolution {
  std::int64_t* deep_to_shallow;  // (num_deep): the matched shallow layer, -1 for none
  double total_cost;              // +inf when no alignment exists
  // Where the search ended when no alignment exists: the largest number of leading shallow layers
  // that can be matched, and the largest number of leading deep layers that can be used up by it.
  // All of them when one exists.
  std::int64_t reached_shallow;
  std::int64_t reached_deep;
};

// Solves `count` independent problems exactly, O(num_deep * num_shallow) each. Ties are broken
// towards the earliest deep layer. Throws std::invalid_argument when a cost is NaN or -inf or a
// problem has no layer.
void align_layers(const AlignmentProblem* problems, AlignmentSolution* solutions,
                  std::int64_t count, AlignmentMode mode);

}  // namespace clafusion
