#include "sinkhorn/cpu/sinkhorn.hpp"

#include "common/parallel.hpp"
#include "sinkhorn/cpu/solver.hpp"

namespace clafusion {

void sinkhorn(const SinkhornProblem* problems, SinkhornSolution* solutions, std::int64_t count,
              const SinkhornSettings& settings, const std::atomic<bool>& stop) {
  require_valid(settings);
  for (std::int64_t i = 0; i < count; ++i) require_valid(problems[i], settings);
  const auto solve = [&](std::int64_t begin, std::int64_t end) {
    SinkhornSolver solver(settings, stop);
    for (std::int64_t i = begin; i < end; ++i) solver.solve(problems[i], solutions[i]);
  };
  // Fewer problems than threads: one after another, each on all threads.
  if (count < num_threads()) {
    solve(0, count);
  } else {
    parallel_for(count, 1, solve);
  }
}

}  // namespace clafusion
