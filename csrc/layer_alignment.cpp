#include "layer_alignment.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/parallel.hpp"

namespace clafusion {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

void check(const AlignmentProblem& p, std::int64_t index, AlignmentMode mode) {
  const std::string where = " in problem " + std::to_string(index);
  if (p.num_deep < 1 || p.num_shallow < 1) {
    throw std::invalid_argument("cost must have at least one deep and one shallow unit" + where);
  }
  const auto bad = [](double value) { return std::isnan(value) || value == -kInfinity; };
  if (std::any_of(p.cost, p.cost + p.num_deep * p.num_shallow, bad)) {
    throw std::invalid_argument("cost must not hold NaN or -inf" + where);
  }
  if (mode == AlignmentMode::layer && std::any_of(p.skip, p.skip + p.num_deep, bad)) {
    throw std::invalid_argument("skip must not hold NaN or -inf" + where);
  }
}

// Scratch of one thread, kept from problem to problem.
struct Workspace {
  std::vector<double> previous, current;   // rows l-1 and l of F, over k
  std::vector<std::uint8_t> matched;       // (num_deep, num_shallow + 1): the choice taken
};

void solve(const AlignmentProblem& p, AlignmentSolution& s, AlignmentMode mode, Workspace& w) {
  const std::int64_t m = p.num_deep;
  const std::int64_t n = p.num_shallow;
  const auto width = static_cast<std::size_t>(n + 1);
  w.previous.assign(width, kInfinity);
  w.current.assign(width, kInfinity);
  w.matched.assign(static_cast<std::size_t>(m) * width, 0);
  w.previous[0] = 0.0;
  s.reached_shallow = 0;
  s.reached_deep = 0;

  for (std::int64_t l = 0; l < m; ++l) {
    const double* cost = p.cost + l * n;
    std::uint8_t* matched = w.matched.data() + l * (n + 1);
    const bool first = p.pin_first && l == 0;
    const bool last = p.pin_last && l == m - 1;
    const double skip = mode == AlignmentMode::layer && !first && !last ? p.skip[l] : kInfinity;
    w.current[0] = w.previous[0] + skip;
    for (std::int64_t k = 1; k <= n; ++k) {
      const bool forbidden = (first && k != 1) || (last && k != n);
      const double pair = forbidden ? kInfinity : cost[k - 1];
      double stay;   // deep unit l goes unmatched, or joins the segment of shallow unit k - 1
      double match;  // deep unit l is the (first) partner of shallow unit k - 1
      if (mode == AlignmentMode::layer) {
        stay = w.previous[k] + skip;
        match = w.previous[k - 1] + pair;
      } else {
        stay = w.previous[k] + pair;
        match = w.previous[k - 1] + pair;
      }
      const bool take = match < stay;
      matched[k] = take;
      w.current[k] = take ? match : stay;
    }
    for (std::int64_t k = n; k >= s.reached_shallow; --k) {
      if (w.current[k] < kInfinity) {
        s.reached_shallow = k;
        s.reached_deep = l + 1;
        break;
      }
    }
    std::swap(w.previous, w.current);
  }

  s.total_cost = w.previous[n];
  std::fill(s.deep_to_shallow, s.deep_to_shallow + m, -1);
  if (s.total_cost == kInfinity) return;
  std::int64_t k = n;
  for (std::int64_t l = m - 1; l >= 0; --l) {
    const bool take = k > 0 && w.matched[l * (n + 1) + k] != 0;
    if (take || mode == AlignmentMode::segment) s.deep_to_shallow[l] = k - 1;
    if (take) --k;
  }
}

}  // namespace

void align_layers(const AlignmentProblem* problems, AlignmentSolution* solutions,
                  std::int64_t count, AlignmentMode mode) {
  constexpr std::int64_t kGrain = 64;  // problems: below this a thread costs more than it saves
  parallel_for(count, kGrain, [&](std::int64_t begin, std::int64_t end) {
    Workspace workspace;
    for (std::int64_t i = begin; i < end; ++i) {
      check(problems[i], i, mode);
      solve(problems[i], solutions[i], mode, workspace);
    }
  });
}

}  // namespace clafusion
