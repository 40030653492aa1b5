// Sinkhorn's iteration on a GPU, for many problems at once.
#pragma once

#include <cstdint>
#include <functional>
#include <string>

#include "sinkhorn/cuda/block.hpp"
#include "sinkhorn/cuda/launch_plan.hpp"
#include "sinkhorn/settings.hpp"

namespace clafusion {

// What the kernels may use on a device. Throws std::runtime_error where it cannot be asked.
DeviceLimits cuda_device_limits(int device);

// Bytes of device memory that sinkhorn_cuda needs beside inputs and outputs, for problems of the
// shapes (count, 2).
std::int64_t sinkhorn_cuda_workspace(const std::int64_t* shapes, std::int64_t count, int device);

struct CudaCall {
  int device;
  void* stream;     // a cudaStream_t of the device
  void* workspace;  // aligned to 256 bytes
  std::int64_t workspace_bytes;
};

// Solves `count` problems: `tasks` lies in the host's memory, what its pointers point to in the
// device's. Problems that fit shared memory are solved by one launch for all of a kind, without
// a wait. The others are iterated with a look at the device every few iterations; before each,
// `interrupted` is asked, and true gives up. Work is queued on the stream; results are there when
// it has run. They do not depend on the other problems of the call.
//
// Throws std::invalid_argument for settings, shapes or a workspace that are not as said, and
// std::runtime_error, which names the kernel, where CUDA fails.
void sinkhorn_cuda(const SinkhornTask* tasks, std::int64_t count, const SinkhornSettings& settings,
                   const CudaCall& call, const std::function<bool()>& interrupted);

// The number of devices, or 0 and the reason.
int cuda_device_count(std::string* reason);
std::string cuda_device_name(int device);
int cuda_runtime_version();

}  // namespace clafusion
