# The CUDA kernels, as a module of their own: clafusion._cuda. One build serves machines with and
# without a GPU, so the CUDA runtime is linked statically and the driver is looked for at run time.
find_program(CLAFUSION_NVCC nvcc HINTS ENV CUDACXX ENV CUDA_HOME ENV CUDA_PATH
  PATHS /usr/local/cuda PATH_SUFFIXES bin DOC "The CUDA compiler")
set(cuda_reason "")
set(cuda_architectures "")
if(NOT CLAFUSION_NVCC)
  set(cuda_reason "nvcc was not found")
else()
  # Machine code for what this compiler knows of the list, and PTX of the newest for what comes.
  execute_process(COMMAND ${CLAFUSION_NVCC} --list-gpu-code OUTPUT_VARIABLE known ERROR_QUIET)
  foreach(one 80 86 89 90 100 120)
    if(known MATCHES "sm_${one}[^0-9a-z]")
      list(APPEND cuda_architectures ${one})
    endif()
  endforeach()
  if(NOT cuda_architectures)
    set(cuda_reason "${CLAFUSION_NVCC} knows none of the supported GPUs")
  else()
    # It may be there and not work, for one with a host compiler newer than it knows.
    file(WRITE ${CMAKE_CURRENT_BINARY_DIR}/probe.cu
      "#include <tuple>\n__global__ void probe(int* x) { *x = 1; }\n")
    list(GET cuda_architectures 0 first)
    execute_process(
      COMMAND ${CLAFUSION_NVCC} -std=c++17 -ccbin ${CMAKE_CXX_COMPILER} -arch=sm_${first}
              -c probe.cu -o probe.o
      WORKING_DIRECTORY ${CMAKE_CURRENT_BINARY_DIR}
      RESULT_VARIABLE failed ERROR_VARIABLE complaint OUTPUT_VARIABLE complaint)
    if(failed)
      string(STRIP "${complaint}" complaint)
      set(cuda_reason "${CLAFUSION_NVCC} cannot compile: ${complaint}")
    endif()
  endif()
endif()

if(cuda_reason)
  if(CLAFUSION_CUDA STREQUAL "ON")
    message(FATAL_ERROR "CLAFUSION_CUDA=ON, but ${cuda_reason}")
  endif()
  message(STATUS "No CUDA kernels: ${cuda_reason}")
  return()
endif()

list(TRANSFORM cuda_architectures APPEND "-real" OUTPUT_VARIABLE CMAKE_CUDA_ARCHITECTURES)
list(GET cuda_architectures -1 newest)
list(APPEND CMAKE_CUDA_ARCHITECTURES "${newest}-virtual")
set(CMAKE_CUDA_COMPILER ${CLAFUSION_NVCC})
set(CMAKE_CUDA_HOST_COMPILER ${CMAKE_CXX_COMPILER})
enable_language(CUDA)
message(STATUS "CUDA kernels for ${CMAKE_CUDA_ARCHITECTURES}")

pybind11_add_module(_cuda
  csrc/bindings/cuda_module.cpp
  csrc/bindings/sinkhorn_cuda.cpp
  csrc/sinkhorn/cuda/launch_plan.cpp
  csrc/sinkhorn/cuda/sinkhorn.cu
  csrc/sinkhorn/validation.cpp
)
target_include_directories(_cuda PRIVATE csrc)
# Releases of CMake differ in which compilers they think know C++20; the kernels do with 17.
set_target_properties(_cuda PROPERTIES CUDA_RUNTIME_LIBRARY Static CUDA_STANDARD 17)
string(REPLACE ";" ", " listed "${cuda_architectures}")
target_compile_definitions(_cuda PRIVATE CLAFUSION_CUDA_ARCHITECTURES="${listed}")
if(MSVC)
  target_compile_options(_cuda PRIVATE
    $<$<COMPILE_LANGUAGE:CXX>:/W4> $<$<COMPILE_LANGUAGE:CUDA>:-Xcompiler=/W4>)
else()
  target_compile_options(_cuda PRIVATE
    $<$<COMPILE_LANGUAGE:CXX>:-Wall -Wextra>
    $<$<COMPILE_LANGUAGE:CUDA>:-Xfatbin=-compress-all -Xcompiler=-Wall,-Wextra>)
  if(CLAFUSION_WERROR)
    target_compile_options(_cuda PRIVATE
      $<$<COMPILE_LANGUAGE:CXX>:-Werror>
      $<$<COMPILE_LANGUAGE:CUDA>:-Werror=all-warnings -Xcompiler=-Werror>)
  endif()
endif()
install(TARGETS _cuda LIBRARY DESTINATION clafusion)
