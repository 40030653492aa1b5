#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <vector>

#include "assignment/assignment.hpp"
#include "bindings/arrays.hpp"
#include "bindings/register.hpp"

namespace py = pybind11;

namespace clafusion {
namespace {

// Targets and potentials of the problems lie one behind the other in flat arrays.
void assign_ragged(const std::vector<Doubles>& costs, Integers targets, Doubles source_potentials,
                   Doubles target_potentials, Doubles totals) {
  require_aligned(targets, "targets");
  require_aligned(source_potentials, "source_potentials");
  require_aligned(target_potentials, "target_potentials");
  require_aligned(totals, "totals");
  const auto count = static_cast<std::int64_t>(costs.size());
  if (totals.size() != count) throw py::value_error("totals must have one entry a problem");
  std::int64_t rows = 0;
  for (const Doubles& cost : costs) {
    if (cost.ndim() != 2 || cost.shape(0) != cost.shape(1)) {
      throw py::value_error("costs must be square matrices");
    }
    require_aligned(cost, "costs");
    rows += cost.shape(0);
  }
  for (const auto size : {targets.size(), source_potentials.size(), target_potentials.size()}) {
    if (size != rows) throw py::value_error("targets and potentials must have one entry a row");
  }
  std::int64_t* target = targets.mutable_data();
  double* f = source_potentials.mutable_data();
  double* g = target_potentials.mutable_data();
  double* total = totals.mutable_data();
  std::vector<AssignmentProblem> problems;
  std::vector<AssignmentSolution> solutions;
  rows = 0;
  for (const Doubles& cost : costs) {
    problems.push_back({cost.data(), cost.shape(0)});
    solutions.push_back({target + rows, f + rows, g + rows, 0.0});
    rows += cost.shape(0);
  }
  {
    // Safe without the GIL: the arrays above are kept alive by this call's arguments.
    const py::gil_scoped_release release;
    assign(problems.data(), solutions.data(), count);
  }
  for (std::int64_t i = 0; i < count; ++i) total[i] = solutions[i].cost;
}

}  // namespace

void register_assignment(py::module_& module) {
  module.def("assign", &assign_ragged, py::arg("costs").noconvert(), py::arg("targets").noconvert(),
             py::arg("source_potentials").noconvert(), py::arg("target_potentials").noconvert(),
             py::arg("totals").noconvert());
}

}  // namespace clafusion
