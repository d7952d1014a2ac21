# The CUDA kernels as a C++ library of their own, component `cuda` of the package: csrc/cuda.
# One fat binary for every architecture from sm_80 on; the CUDA runtime is linked in. PTX of the oldest one serves those
# in between (machine code for 100a does not run on 10.3), PTX of the newest those to come.
enable_language(CUDA)
if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 12.8)
  message(FATAL_ERROR "The CUDA kernels need nvcc 12.8 or later (sm_120), found ${CMAKE_CUDA_COMPILER_VERSION} in ${CMAKE_CUDA_COMPILER}")
endif()
find_package(CUDAToolkit REQUIRED)

set(SAFELORA_CUDA_ARCHITECTURES 80 86 89 90a 100a 120 CACHE STRING "Architectures with machine code; PTX is added for the first and the last one")
option(SAFELORA_CUDA_STRICT "Make nvcc's warnings errors, register spills and local memory among them" OFF)
# The sources tell apart what is older and newer than sm_90 and no more, so the front end, most of the time of a build, runs
# once for all the older ones: ptxas makes their machine code from the same PTX.
set(gencode "")
set(front "")
foreach(architecture IN LISTS SAFELORA_CUDA_ARCHITECTURES)
  if(front STREQUAL "" OR NOT architecture MATCHES "^8[0-9]$" OR architecture LESS front)
    set(front ${architecture})
  endif()
  list(APPEND gencode "SHELL:-gencode arch=compute_${front},code=sm_${architecture}")
endforeach()
list(GET SAFELORA_CUDA_ARCHITECTURES 0 oldest)
list(GET SAFELORA_CUDA_ARCHITECTURES -1 newest)
foreach(architecture IN ITEMS ${oldest} ${newest})
  list(APPEND gencode "SHELL:-gencode arch=compute_${architecture},code=compute_${architecture}")
endforeach()

file(GLOB cuda_sources CONFIGURE_DEPENDS csrc/cuda/*.cpp csrc/cuda/*.cu)
add_library(safelora_kernels_cuda ${cuda_sources})
add_library(safelora_kernels::cuda ALIAS safelora_kernels_cuda)

set(host_flags -Wall -Wextra -Wno-unused-parameter "-ffile-prefix-map=${CMAKE_CURRENT_SOURCE_DIR}/=")
list(JOIN host_flags "," host_flags_of_nvcc)
target_compile_options(
  safelora_kernels_cuda
  PRIVATE "$<$<COMPILE_LANGUAGE:CXX>:-O3;${host_flags}>"
          "$<$<COMPILE_LANGUAGE:CUDA>:${gencode};-O3;--threads=2;-Xcompiler=${host_flags_of_nvcc};-Xptxas=-warn-spills,-warn-lmem-usage>")
if(SAFELORA_CUDA_STRICT)
  target_compile_options(
    safelora_kernels_cuda
    PRIVATE "$<$<COMPILE_LANGUAGE:CXX>:-Werror>"
            "$<$<COMPILE_LANGUAGE:CUDA>:-Werror=all-warnings;-Xcompiler=-Werror;-Xptxas=-Werror>")
endif()
target_include_directories(
  safelora_kernels_cuda
  PUBLIC "$<BUILD_INTERFACE:${CMAKE_CURRENT_SOURCE_DIR}/csrc/include>" "$<INSTALL_INTERFACE:${CMAKE_INSTALL_INCLUDEDIR}>"
  PRIVATE csrc/cuda)
target_compile_features(safelora_kernels_cuda PUBLIC cxx_std_17 PRIVATE cuda_std_17)
target_link_libraries(safelora_kernels_cuda PRIVATE CUDA::cudart_static)
set_target_properties(
  safelora_kernels_cuda
  PROPERTIES CUDA_ARCHITECTURES OFF
             CUDA_RUNTIME_LIBRARY None
             POSITION_INDEPENDENT_CODE ON
             CXX_VISIBILITY_PRESET hidden
             CUDA_VISIBILITY_PRESET hidden
             VISIBILITY_INLINES_HIDDEN ON
             VERSION ${PROJECT_VERSION}
             SOVERSION ${PROJECT_VERSION_MAJOR}.${PROJECT_VERSION_MINOR})
