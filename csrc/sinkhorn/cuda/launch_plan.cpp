#include "sinkhorn/cuda/launch_plan.hpp"

#include <stdexcept>

#include "sinkhorn/cuda/resident.hpp"
#include "sinkhorn/cuda/stream.hpp"
#include "sinkhorn/problem.hpp"

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
  require_shape(num_source, num_target);
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
  return {SinkhornKernel::stream,
          wide ? 0 : kStreamColumns,
          1,
          threads,
          0,
          block::stream_bytes(num_source, num_target)};
}

}  // namespace clafusion
