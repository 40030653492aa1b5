#include <pybind11/numpy.h>

#include <vector>

#include "bindings/arrays.hpp"
#include "bindings/interruptible.hpp"
#include "bindings/register.hpp"
#include "bindings/sinkhorn_settings.hpp"
#include "sinkhorn/cuda/sinkhorn.hpp"

namespace py = pybind11;

namespace clafusion {
namespace {

template <class T>
T* pointer(std::uintptr_t address, const char* name) {
  if (address == 0 || address % alignof(T) != 0) {
    throw py::value_error(std::string(name) + " must be the address of device memory, aligned");
  }
  return reinterpret_cast<T*>(address);
}

std::int64_t check_shapes(const Integers& shapes) {
  if (shapes.ndim() != 2 || shapes.shape(1) != 2) {
    throw py::value_error("shapes must have shape (count, 2)");
  }
  require_aligned(shapes, "shapes");
  return shapes.shape(0);
}

std::int64_t workspace_bytes(const Integers& shapes, int device) {
  return sinkhorn_cuda_workspace(shapes.data(), check_shapes(shapes), device);
}

// Addresses are of memory on `device`; weights and potentials of ragged problems lie one behind the
// other in flat arrays. initial_potential: 0 for none.
void sinkhorn_on_device(const Integers& shapes, const Integers& costs, const Integers& plans,
                        std::uintptr_t source_weights, std::uintptr_t target_weights,
                        std::uintptr_t initial_potential, std::uintptr_t source_potentials,
                        std::uintptr_t target_potentials, std::uintptr_t totals,
                        std::uintptr_t errors, std::uintptr_t iterations, std::uintptr_t status,
                        double epsilon, double tolerance, std::int64_t max_iterations,
                        double marginal_relaxation, std::uintptr_t workspace,
                        std::int64_t workspace_size, int device, std::uintptr_t stream) {
  const std::int64_t count = check_shapes(shapes);
  require_aligned(costs, "costs");
  require_aligned(plans, "plans");
  if (costs.size() != count || plans.size() != count) {
    throw py::value_error("costs and plans must have one address a problem");
  }
  const auto settings = sinkhorn_settings(epsilon, tolerance, max_iterations, marginal_relaxation);
  if (count == 0) return;
  const auto* a = pointer<const double>(source_weights, "source_weights");
  const auto* b = pointer<const double>(target_weights, "target_weights");
  const auto* initial = initial_potential == 0
                            ? nullptr
                            : pointer<const double>(initial_potential, "initial_potential");
  auto* f = pointer<double>(source_potentials, "source_potentials");
  auto* g = pointer<double>(target_potentials, "target_potentials");
  auto* total = pointer<double>(totals, "totals");
  auto* error = pointer<double>(errors, "errors");
  auto* passes = pointer<std::int64_t>(iterations, "iterations");
  auto* outcome = pointer<std::int64_t>(status, "status");
  std::vector<SinkhornTask> tasks;
  for (std::int64_t i = 0; i < count; ++i) {
    const std::int64_t n = shapes.at(i, 0);
    const std::int64_t m = shapes.at(i, 1);
    if (n < 1 || m < 1) throw py::value_error("shapes must be positive");
    const auto* cost = pointer<const float>(static_cast<std::uintptr_t>(costs.data()[i]), "costs");
    auto* plan = pointer<float>(static_cast<std::uintptr_t>(plans.data()[i]), "plans");
    tasks.push_back(
        {{cost, n, m, a, b, initial}, plan, f, g, total + i, error + i, passes + i, outcome + i});
    a += n;
    f += n;
    b += m;
    g += m;
    if (initial != nullptr) initial += m;
  }
  const CudaCall call{device, reinterpret_cast<void*>(stream),
                      pointer<char>(workspace, "workspace"), workspace_size};
  bool interrupted = false;
  {
    // Safe without the GIL: the tasks are a copy, and the caller keeps the device's memory.
    const py::gil_scoped_release release;
    sinkhorn_cuda(tasks.data(), count, settings, call,
                  [&] { return interrupted = signal_pending(); });
  }
  if (interrupted) throw py::error_already_set();
}

}  // namespace

void register_sinkhorn_cuda(py::module_& module) {
  module.def("sinkhorn_workspace", &workspace_bytes, py::arg("shapes").noconvert(),
             py::arg("device"));
  module.def("sinkhorn", &sinkhorn_on_device, py::arg("shapes").noconvert(),
             py::arg("costs").noconvert(), py::arg("plans").noconvert(), py::arg("source_weights"),
             py::arg("target_weights"), py::arg("initial_potential"), py::arg("source_potentials"),
             py::arg("target_potentials"), py::arg("totals"), py::arg("errors"),
             py::arg("iterations"), py::arg("status"), py::arg("epsilon"), py::arg("tolerance"),
             py::arg("max_iterations"), py::arg("marginal_relaxation"), py::arg("workspace"),
             py::arg("workspace_bytes"), py::arg("device"), py::arg("stream"));
}

}  // namespace clafusion
