// CUDA calls that do not fail in silence.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>

namespace clafusion::cuda {

// Throws std::runtime_error that tells what was done and CUDA's reason.
inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // an error that can be left behind is not for the next caller
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorName(error) + ", " +
                           cudaGetErrorString(error));
}

struct Geometry {
  std::int64_t blocks;
  int threads;
  std::int64_t shared_bytes = 0;
  int cluster = 1;  // blocks of a thread block cluster
};

// A geometry as CUDA takes it. It points into itself: not to be copied.
struct LaunchConfig {
  LaunchConfig(const Geometry& geometry, cudaStream_t stream) {
    config.gridDim = dim3(static_cast<unsigned>(geometry.blocks));
    config.blockDim = dim3(static_cast<unsigned>(geometry.threads));
    config.dynamicSmemBytes = static_cast<std::size_t>(geometry.shared_bytes);
    config.stream = stream;
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = static_cast<unsigned>(geometry.cluster);
    cluster.val.clusterDim.y = 1;
    cluster.val.clusterDim.z = 1;
    if (geometry.cluster > 1) {
      config.attrs = &cluster;
      config.numAttrs = 1;
    }
  }
  LaunchConfig(const LaunchConfig&) = delete;
  LaunchConfig& operator=(const LaunchConfig&) = delete;

  cudaLaunchConfig_t config = {};
  cudaLaunchAttribute cluster = {};
};

// Launches a kernel and checks that it was accepted; the error names it.
template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), const Geometry& geometry,
            cudaStream_t stream, Arguments&&... arguments) {
  if (geometry.blocks == 0) return;
  const LaunchConfig launch(geometry, stream);
  const std::string what = std::string("launch of the CUDA kernel ") + name;
  check(cudaLaunchKernelEx(&launch.config, kernel, std::forward<Arguments>(arguments)...),
        what.c_str());
  check(cudaPeekAtLastError(), what.c_str());
}

}  // namespace clafusion::cuda
