#include "alignment/layer_alignment.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/parallel.hpp"
#include "common/simd.hpp"

namespace clafusion {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

[[noreturn]] void refuse(const char* what, std::int64_t index) {
  throw std::invalid_argument(what + (" in problem " + std::to_string(index)));
}

// Scratch of one thread, kept from problem to problem.
struct Workspace {
  std::vector<double> previous, current, pinned;  // rows l-1 and l of F, over k; a row of costs
  std::vector<std::int64_t> matched;              // (num_deep, num_shallow + 1): the choice taken
};

// The choices: the deep layer goes unmatched, the two match, the shallow layer goes unmatched.
constexpr std::int64_t kSkipDeep = 0;
constexpr std::int64_t kMatch = 1;
constexpr std::int64_t kSkipShallow = 2;

// One row of the recursion. Every entry depends on the row before only, so that k is the axis for
// vectors. Returns a number other than 0 when a cost is NaN or -inf.
template <bool kSegment>
CLAFUSION_INLINE std::int64_t fill_row(const double* __restrict previous,
                                       const double* __restrict cost, double skip, std::int64_t n,
                                       double* __restrict current,
                                       std::int64_t* __restrict matched) {
  std::int64_t bad = 0;
  current[0] = previous[0] + (kSegment ? kInfinity : skip);
  matched[0] = kSkipDeep;
  for (std::int64_t k = 0; k < n; ++k) {
    const double pair = cost[k];
    // Deep layer l is the (first) partner of shallow layer k,
    const double match = previous[k] + pair;
    // or goes unmatched, or joins the segment that k has already.
    const double stay = previous[k + 1] + (kSegment ? pair : skip);
    const bool take = match < stay;
    current[k + 1] = take ? match : stay;
    matched[k + 1] = take ? kMatch : kSkipDeep;
    bad |= pair > -kInfinity ? 0 : 1;
  }
  return bad;
}

// Lets shallow layers go unmatched where that is cheaper. Here an entry depends on the one before
// it in its own row, so that this is no work for vectors.
std::int64_t skip_in_row(const double* skip_shallow, std::int64_t n, double* current,
                         std::int64_t* matched) {
  std::int64_t bad = 0;
  for (std::int64_t k = 0; k < n; ++k) {
    bad |= skip_shallow[k] > -kInfinity ? 0 : 1;
    const double skipped = current[k] + skip_shallow[k];
    if (skipped < current[k + 1]) {
      current[k + 1] = skipped;
      matched[k + 1] = kSkipShallow;
    }
  }
  return bad;
}

// Fills all rows; returns F[n, m], or NaN when a cost or skip is NaN or -inf.
CLAFUSION_MULTIVERSION
double fill(const AlignmentProblem* problem, bool segment, double* previous, double* current,
            double* pinned, std::int64_t* matched) {
  const std::int64_t m = problem->num_deep;
  const std::int64_t n = problem->num_shallow;
  std::int64_t bad = 0;
  previous[0] = 0.0;
  for (std::int64_t k = 1; k <= n; ++k) previous[k] = kInfinity;
  const bool gaps = problem->skip_shallow != nullptr;
  // The first row's choices are all the same: they need not be kept.
  if (gaps && !problem->pin_first) bad |= skip_in_row(problem->skip_shallow, n, previous, matched);
  for (std::int64_t l = 0; l < m; ++l) {
    const double* cost = problem->cost + l * n;
    double skip = segment ? kInfinity : problem->skip == nullptr ? 0.0 : problem->skip[l];
    bad |= skip > -kInfinity ? 0 : 1;
    const bool first = problem->pin_first && l == 0;
    const bool last = problem->pin_last && l == m - 1;
    if (first || last) {
      for (std::int64_t k = 0; k < n; ++k) {
        const bool allowed = (!first || k == 0) && (!last || k == n - 1);
        bad |= cost[k] > -kInfinity ? 0 : 1;
        pinned[k] = allowed ? cost[k] : kInfinity;
      }
      cost = pinned;
      skip = kInfinity;
    }
    std::int64_t* row = matched + l * (n + 1);
    bad |= segment ? fill_row<true>(previous, cost, skip, n, current, row)
                   : fill_row<false>(previous, cost, skip, n, current, row);
    if (gaps) bad |= skip_in_row(problem->skip_shallow, n, current, row);
    double* const done = current;
    current = previous;
    previous = done;
  }
  return bad != 0 ? std::numeric_limits<double>::quiet_NaN() : previous[n];
}

// How far the search of a problem without an alignment came.
void find_obstacle(const AlignmentProblem& p, AlignmentSolution& s, bool segment) {
  const std::int64_t m = p.num_deep;
  const std::int64_t n = p.num_shallow;
  std::vector<std::uint8_t> previous(static_cast<std::size_t>(n + 1), 0);
  std::vector<std::uint8_t> current(previous.size());
  previous[0] = 1;
  const auto skip_shallow = [&](std::vector<std::uint8_t>& row) {
    for (std::int64_t k = 1; p.skip_shallow != nullptr && k <= n; ++k) {
      if (row[k - 1] && p.skip_shallow[k - 1] < kInfinity) row[k] = 1;
    }
  };
  if (!p.pin_first) skip_shallow(previous);
  for (std::int64_t l = 0; l < m; ++l) {
    const bool first = p.pin_first && l == 0;
    const bool last = p.pin_last && l == m - 1;
    const bool free = !segment && !first && !last && (p.skip == nullptr || p.skip[l] < kInfinity);
    current[0] = previous[0] && free;
    for (std::int64_t k = 1; k <= n; ++k) {
      const bool pair =
          p.cost[l * n + k - 1] < kInfinity && (!first || k == 1) && (!last || k == n);
      current[k] = (previous[k - 1] && pair) || (previous[k] && (segment ? pair : free));
    }
    skip_shallow(current);
    for (std::int64_t k = n; k >= s.reached_shallow; --k) {
      if (current[k]) {
        s.reached_shallow = k;
        s.reached_deep = l + 1;
        break;
      }
    }
    std::swap(previous, current);
  }
}

void solve(const AlignmentProblem& p, AlignmentSolution& s, std::int64_t index, bool segment,
           Workspace& w) {
  const std::int64_t m = p.num_deep;
  const std::int64_t n = p.num_shallow;
  if (m < 1 || n < 1) refuse("cost must have at least one deep and one shallow layer", index);
  const auto width = static_cast<std::size_t>(n + 1);
  if (w.previous.size() < width) {
    w.previous.resize(width);
    w.current.resize(width);
    w.pinned.resize(width);
  }
  if (w.matched.size() < static_cast<std::size_t>(m) * width) {
    w.matched.resize(static_cast<std::size_t>(m) * width);
  }
  s.total_cost =
      fill(&p, segment, w.previous.data(), w.current.data(), w.pinned.data(), w.matched.data());
  if (std::isnan(s.total_cost)) refuse("cost and skip must not hold NaN or -inf", index);
  s.reached_shallow = 0;
  s.reached_deep = 0;
  if (s.total_cost == kInfinity) {
    std::fill(s.deep_to_shallow, s.deep_to_shallow + m, -1);
    find_obstacle(p, s, segment);
    return;
  }
  s.reached_shallow = n;
  s.reached_deep = m;
  std::int64_t k = n;
  for (std::int64_t l = m - 1; l >= 0; --l) {
    const std::int64_t* row = w.matched.data() + l * (n + 1);
    while (row[k] == kSkipShallow) --k;
    const bool match = row[k] == kMatch;
    s.deep_to_shallow[l] = segment || match ? k - 1 : -1;
    k -= match ? 1 : 0;
  }
}

}  // namespace

void align_layers(const AlignmentProblem* problems, AlignmentSolution* solutions,
                  std::int64_t count, AlignmentMode mode) {
  constexpr std::int64_t kGrain = 64;  // problems: below this a thread costs more than it saves
  const bool segment = mode == AlignmentMode::segment;
  parallel_for(count, kGrain, [&](std::int64_t begin, std::int64_t end) {
    Workspace workspace;
    for (std::int64_t i = begin; i < end; ++i) {
      solve(problems[i], solutions[i], i, segment, workspace);
    }
  });
}

}  // namespace clafusion
