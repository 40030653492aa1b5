#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <vector>

#include "alignment/layer_alignment.hpp"
#include "alignment/layer_costs.hpp"
#include "bindings/arrays.hpp"
#include "bindings/register.hpp"

namespace py = pybind11;

namespace clafusion {
namespace {

std::vector<const double*> pointers(const std::vector<Doubles>& grams, std::int64_t samples) {
  std::vector<const double*> result;
  for (const Doubles& gram : grams) {
    if (gram.ndim() != 2 || gram.shape(0) != samples || gram.shape(1) != samples) {
      throw py::value_error("the Gram matrices must be square and of one size");
    }
    require_aligned(gram, "every Gram matrix");
    result.push_back(gram.data());
  }
  return result;
}

void hsic_of_arrays(const std::vector<Doubles>& grams_a, const std::vector<Doubles>& grams_b,
                    bool unbiased, Doubles products, Doubles norms_a, Doubles norms_b) {
  if (grams_a.empty() || grams_b.empty()) {
    throw py::value_error("grams_a and grams_b must hold at least one matrix");
  }
  const std::int64_t samples = grams_a[0].ndim() == 2 ? grams_a[0].shape(0) : -1;
  const auto a = pointers(grams_a, samples);
  const auto b = pointers(grams_b, samples);
  const auto count_a = static_cast<std::int64_t>(a.size());
  const auto count_b = static_cast<std::int64_t>(b.size());
  if (products.ndim() != 2 || products.shape(0) != count_a || products.shape(1) != count_b) {
    throw py::value_error("products must have shape (count_a, count_b)");
  }
  if (norms_a.size() != count_a || norms_b.size() != count_b) {
    throw py::value_error("norms_a and norms_b must have one entry a matrix");
  }
  require_aligned(products, "products");
  require_aligned(norms_a, "norms_a");
  require_aligned(norms_b, "norms_b");
  double* const out = products.mutable_data();
  double* const out_a = norms_a.mutable_data();
  double* const out_b = norms_b.mutable_data();
  // Safe without the GIL: the arrays are kept alive by this call's arguments.
  const py::gil_scoped_release release;
  hsic_all_pairs(a.data(), count_a, b.data(), count_b, samples,
                 unbiased ? Hsic::unbiased : Hsic::biased, out, out_a, out_b);
}

// The problems, which lie one behind the other in flat arrays; shapes tells where each one ends.
// Empty skips: leaving a deep layer unmatched costs nothing; empty skips_shallow: a shallow one,
// forbidden.
std::vector<AlignmentProblem> ragged_problems(const Doubles& costs, const Doubles& skips,
                                              const Doubles& skips_shallow, const Integers& shapes,
                                              bool pin_first, bool pin_last) {
  const bool free = skips.size() == 0;
  const bool forbidden = skips_shallow.size() == 0;
  std::vector<AlignmentProblem> problems;
  problems.reserve(static_cast<std::size_t>(shapes.shape(0)));
  std::int64_t cells = 0;
  std::int64_t deep_layers = 0;
  std::int64_t shallow_layers = 0;
  for (std::int64_t i = 0; i < shapes.shape(0); ++i) {
    const std::int64_t m = shapes.at(i, 0);
    const std::int64_t n = shapes.at(i, 1);
    if (m < 1 || n < 1) throw py::value_error("shapes must be positive");
    if (m > (costs.size() - cells) / n) throw py::value_error("costs ends before the last problem");
    if (!forbidden && n > skips_shallow.size() - shallow_layers) {
      throw py::value_error("skips_shallow must have one entry a shallow layer");
    }
    problems.push_back({costs.data() + cells, free ? nullptr : skips.data() + deep_layers,
                        forbidden ? nullptr : skips_shallow.data() + shallow_layers, m, n,
                        pin_first, pin_last});
    cells += m * n;
    deep_layers += m;
    shallow_layers += n;
  }
  if (cells != costs.size()) throw py::value_error("costs has more entries than shapes tells");
  if (!free && deep_layers != skips.size()) {
    throw py::value_error("skips must have one entry a deep layer");
  }
  if (!forbidden && shallow_layers != skips_shallow.size()) {
    throw py::value_error("skips_shallow must have one entry a shallow layer");
  }
  return problems;
}

void align_layers_ragged(const Doubles& costs, const Doubles& skips, const Doubles& skips_shallow,
                         const Integers& shapes, int mode, bool pin_first, bool pin_last,
                         Integers deep_to_shallow, Doubles total_costs, Integers reached) {
  require_aligned(costs, "costs");
  require_aligned(skips, "skips");
  require_aligned(skips_shallow, "skips_shallow");
  require_aligned(shapes, "shapes");
  require_aligned(deep_to_shallow, "deep_to_shallow");
  require_aligned(total_costs, "total_costs");
  require_aligned(reached, "reached");
  if (shapes.ndim() != 2 || shapes.shape(1) != 2) {
    throw py::value_error("shapes must have shape (count, 2)");
  }
  if (mode != 0 && mode != 1) throw py::value_error("mode must be 0 (layer) or 1 (segment)");
  const std::int64_t count = shapes.shape(0);
  if (total_costs.size() != count) throw py::value_error("total_costs must have shape (count,)");
  if (reached.size() != 2 * count) throw py::value_error("reached must have shape (count, 2)");
  if (skips_shallow.size() != 0 && mode != 0) {
    throw py::value_error("skips_shallow needs mode 0 (layer)");
  }
  const auto problems = ragged_problems(costs, skips, skips_shallow, shapes, pin_first, pin_last);
  std::int64_t deep_layers = 0;
  for (const AlignmentProblem& problem : problems) deep_layers += problem.num_deep;
  if (deep_layers != deep_to_shallow.size()) {
    throw py::value_error("deep_to_shallow must have one entry a deep layer");
  }
  std::vector<AlignmentSolution> solutions(problems.size());
  std::int64_t* next = deep_to_shallow.mutable_data();
  for (std::int64_t i = 0; i < count; ++i) {
    solutions[i].deep_to_shallow = next;
    next += problems[i].num_deep;
  }
  {
    // Safe without the GIL: the arrays above are kept alive by this call's arguments.
    const py::gil_scoped_release release;
    align_layers(problems.data(), solutions.data(), count, static_cast<AlignmentMode>(mode));
  }
  double* total = total_costs.mutable_data();
  std::int64_t* reach = reached.mutable_data();
  for (std::int64_t i = 0; i < count; ++i) {
    total[i] = solutions[i].total_cost;
    reach[2 * i] = solutions[i].reached_deep;
    reach[2 * i + 1] = solutions[i].reached_shallow;
  }
}

}  // namespace

void register_alignment(py::module_& module) {
  module.def("hsic_all_pairs", &hsic_of_arrays, py::arg("grams_a").noconvert(),
             py::arg("grams_b").noconvert(), py::arg("unbiased"), py::arg("products").noconvert(),
             py::arg("norms_a").noconvert(), py::arg("norms_b").noconvert());
  module.def("align_layers", &align_layers_ragged, py::arg("costs").noconvert(),
             py::arg("skips").noconvert(), py::arg("skips_shallow").noconvert(),
             py::arg("shapes").noconvert(), py::arg("mode"), py::arg("pin_first"),
             py::arg("pin_last"), py::arg("deep_to_shallow").noconvert(),
             py::arg("total_costs").noconvert(), py::arg("reached").noconvert());
}

}  // namespace clafusion
