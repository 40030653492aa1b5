#include "layer_costs.hpp"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <vector>

#include "bindings/aligned.hpp"
#include "bindings/register.hpp"

namespace py = pybind11;

namespace clafusion {
namespace {

using Doubles = py::array_t<double, py::array::c_style>;

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

}  // namespace

void register_layer_costs(py::module_& module) {
  module.def("hsic_all_pairs", &hsic_of_arrays, py::arg("grams_a").noconvert(),
             py::arg("grams_b").noconvert(), py::arg("unbiased"), py::arg("products").noconvert(),
             py::arg("norms_a").noconvert(), py::arg("norms_b").noconvert());
}

}  // namespace clafusion
