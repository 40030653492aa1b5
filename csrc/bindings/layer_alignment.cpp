#include "layer_alignment.hpp"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <vector>

#include "bindings/aligned.hpp"
#include "bindings/register.hpp"

namespace py = pybind11;

namespace clafusion {
namespace {

using Doubles = py::array_t<double, py::array::c_style>;
using Integers = py::array_t<std::int64_t, py::array::c_style>;

// Ragged problems lie one behind the other in flat arrays; shapes tells where each one ends. Empty
// skips: leaving a deep unit unmatched costs nothing; empty skips_shallow: a shallow one, forbidden.
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

  const double* cost = costs.data();
  const bool free = skips.size() == 0;
  const double* skip = skips.data();
  const bool forbidden = skips_shallow.size() == 0;
  const double* skip_shallow = skips_shallow.data();
  if (!forbidden && mode != 0) throw py::value_error("skips_shallow needs mode 0 (layer)");
  std::int64_t* assignment = deep_to_shallow.mutable_data();
  std::vector<AlignmentProblem> problems(static_cast<std::size_t>(count));
  std::vector<AlignmentSolution> solutions(problems.size());
  std::int64_t cells = 0;
  std::int64_t units = 0;
  std::int64_t shallow_units = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    const std::int64_t m = shapes.at(i, 0);
    const std::int64_t n = shapes.at(i, 1);
    if (m < 1 || n < 1) throw py::value_error("shapes must be positive");
    if (m > (costs.size() - cells) / n) throw py::value_error("costs ends before the last problem");
    if (!forbidden && n > skips_shallow.size() - shallow_units) {
      throw py::value_error("skips_shallow must have one entry a shallow unit");
    }
    problems[i] = {cost + cells,
                   free ? nullptr : skip + units,
                   forbidden ? nullptr : skip_shallow + shallow_units,
                   m,
                   n,
                   pin_first,
                   pin_last};
    solutions[i].deep_to_shallow = assignment + units;
    cells += m * n;
    units += m;
    shallow_units += n;
  }
  if (cells != costs.size()) throw py::value_error("costs has more entries than shapes tells");
  if (!free && units != skips.size()) throw py::value_error("skips must have one entry a deep unit");
  if (!forbidden && shallow_units != skips_shallow.size()) {
    throw py::value_error("skips_shallow must have one entry a shallow unit");
  }
  if (units != deep_to_shallow.size()) {
    throw py::value_error("deep_to_shallow must have one entry a deep unit");
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

void register_layer_alignment(py::module_& module) {
  module.def("align_layers", &align_layers_ragged, py::arg("costs").noconvert(),
             py::arg("skips").noconvert(), py::arg("skips_shallow").noconvert(),
             py::arg("shapes").noconvert(), py::arg("mode"), py::arg("pin_first"),
             py::arg("pin_last"), py::arg("deep_to_shallow").noconvert(),
             py::arg("total_costs").noconvert(), py::arg("reached").noconvert());
}

}  // namespace clafusion
