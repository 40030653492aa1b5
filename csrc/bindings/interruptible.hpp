// Whether Python's user has asked to stop, from code that runs without the GIL.
#pragma once

#include <pybind11/pybind11.h>

namespace clafusion {

// Takes the GIL for a moment. True: an exception is set, to be thrown on once the GIL is held again.
inline bool signal_pending() {
  const pybind11::gil_scoped_acquire acquire;
  return PyErr_CheckSignals() != 0;
}

}  // namespace clafusion
