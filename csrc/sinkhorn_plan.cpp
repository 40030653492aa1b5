#include "sinkhorn_plan.hpp"

#include <cmath>
#include <stdexcept>

#include "sinkhorn_resident.hpp"
#include "sinkhorn_stream.hpp"

namespace clafusion {
namespace {

constexpr std::int64_t kLargestSide = (std::int64_t{1} << 31) - (std::int64_t{1} << 20);
constexpr int kWarp = 32;

// Few warps where two blocks or more fit a multiprocessor together, many where one fills it.
int resident_threads(std::int64_t entries) {
  if (entries <= 96 * 96) return 128;
  return entries <= 26'000 ? 256 : 512;
}

bool fits(std::int64_t n, std::int64_t m, int peers, const DeviceLimits& device, int columns,
          SinkhornLaunch* launch) {
  const int threads = resident_threads(block::rows_of_peer(n, peers) * m);
  const std::int64_t bytes = block::resident_bytes(n, m, peers, threads / kWarp);
  if (bytes > device.shared_bytes) return false;
  *launch = {SinkhornKernel::resident, columns, peers, threads, bytes, 0};
  return true;
}

}  // namespace

SinkhornLaunch plan_launch(std::int64_t num_source, std::int64_t num_target,
                           const DeviceLimits& device) {
  if (num_source < 1 || num_target < 1) {
    throw std::invalid_argument("a problem needs at least one source and one target");
  }
  if (num_source > kLargestSide || num_target > kLargestSide) {
    throw std::invalid_argument("a problem may have at most 2^31 - 2^20 sources and targets");
  }
  SinkhornLaunch launch{};
  int columns = 4;
  while (columns < 32 && columns * kWarp < num_target) columns *= 2;
  if (columns * kWarp >= num_target) {
    for (int peers = 1; peers <= device.most_peers; peers *= 2) {
      if (fits(num_source, num_target, peers, device, columns, &launch)) return launch;
    }
  }
  const bool few = num_target <= kFewStreamThreads * kStreamColumns;
  const int threads = few ? kFewStreamThreads : kStreamThreads;
  const bool wide = num_target > threads * kStreamColumns;
  return {SinkhornKernel::stream, wide ? 0 : kStreamColumns, 1, threads, 0,
          block::stream_bytes(num_source, num_target)};
}

void require_valid(const SinkhornLimits& limits) {
  if (!(limits.epsilon > 0.0) || !std::isfinite(limits.epsilon)) {
    throw std::invalid_argument("epsilon must be a positive number");
  }
  if (!(limits.tolerance > 0.0)) throw std::invalid_argument("tolerance must be positive");
  if (limits.max_iterations < 1) throw std::invalid_argument("max_iterations must be positive");
  if (!(limits.marginal_relaxation > 0.0)) {
    throw std::invalid_argument("marginal_relaxation must be positive");
  }
}

}  // namespace clafusion
