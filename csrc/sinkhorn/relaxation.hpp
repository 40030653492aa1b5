// How far Sinkhorn's updates go beyond the plain ones, on the CPU and on a GPU alike.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/host_device.hpp"

namespace clafusion {

// Over-relaxation (Lehmann, von Renesse, Sambale, Uschmajew, Optim. Lett. 2021), chosen by
// Young's theory as in Hageman and Young, Applied Iterative Methods (1981): where the error
// declines by `rate` an iteration at the relaxation omega, plain iterations would decline it by
// (rate + omega - 1)^2 / (omega^2 rate), and from that follows the best omega.
struct Relaxation {
  double omega = 1.0;
  double start = 0.0, middle = 0.0;
  std::int64_t seen = 0;

  CLAFUSION_HOST_DEVICE void observe(double error) {
    // After a change the error first grows, for about 1 / (2 - omega) iterations: only the
    // second half of the window counts.
    const auto half = static_cast<std::int64_t>(4.0 / (2.0 - omega));
    if (seen == 0) start = error;
    if (seen == half) middle = error;
    if (++seen <= 2 * half) return;
    seen = 0;
    const double rate = std::pow(error / middle, 1.0 / static_cast<double>(half));
    // Stuck, in an oscillation or in float's noise, which omega magnifies by 1 / (2 - omega):
    // plain iterations damp both.
    if (!(error < start) || (omega > 1.0 && rate > 1.0 - (2.0 - omega) / 4.0)) {
      omega = 1.0;
    } else if (rate > omega - 1.0 && rate < 1.0) {
      const double root = (rate + omega - 1.0) / omega;
      const double square = root * root / rate;
      const double plain = square < 0.9998 ? square : 0.9998;
      const double best = 2.0 / (1.0 + std::sqrt(1.0 - plain));
      omega = best > omega ? best : omega;
    }
  }
};

}  // namespace clafusion
