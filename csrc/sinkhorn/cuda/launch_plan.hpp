// Which kernel takes which problem, and with how many threads. Decided on the host, by the
// problem's shape and the device alone: the other problems of a call change nothing of a problem's
// result.
#pragma once

#include <cstdint>

namespace clafusion {

// What counts of a device.
struct DeviceLimits {
  std::int64_t shared_bytes;  // a block may ask for, opted in
  int most_peers;             // blocks of a cluster: 8 from compute capability 9.0 on, else 1
};

enum class SinkhornKernel : std::int32_t {
  resident = 0,  // in the shared memory of a block, or of a cluster's blocks: one launch for all
  stream = 1,    // three launches an iteration
};

// Of the streaming kernel: threads a block, for few columns and for more, and columns a thread.
inline constexpr int kFewStreamThreads = 128;
inline constexpr int kStreamThreads = 512;
inline constexpr int kStreamColumns = 8;

// How one problem is solved. Problems with equal kernel, columns, peers and threads share launches.
struct SinkhornLaunch {
  SinkhornKernel kernel;
  int columns;                   // a lane's, in registers; 0: more than registers hold
  int peers;                     // blocks a problem; resident only
  int threads;                   // a block
  std::int64_t shared_bytes;     // dynamic, a block
  std::int64_t workspace_bytes;  // in device memory

  bool shares_launch(const SinkhornLaunch& other) const {
    return kernel == other.kernel && columns == other.columns && peers == other.peers &&
           threads == other.threads;
  }
};

// Throws std::invalid_argument where a side is empty or has more than 2^31 - 2^20 entries.
SinkhornLaunch plan_launch(std::int64_t num_source, std::int64_t num_target,
                           const DeviceLimits& device);

}  // namespace clafusion
