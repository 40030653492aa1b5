// For functions that are the same on the host and on a GPU.
#pragma once

#if defined(__CUDACC__)
#define CLAFUSION_HOST_DEVICE __host__ __device__ inline
#else
#define CLAFUSION_HOST_DEVICE inline
#endif
