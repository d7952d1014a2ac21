# _C.abi3.so and _CUDA.abi3.so: register the kernels with PyTorch through the LibTorch stable ABI.
# They hold no PyInit function, so they serve every CPython and every torch from the target version on.
set(SAFELORA_TORCH_TARGET_MAJOR 2)
set(SAFELORA_TORCH_TARGET_MINOR 10)
set(SAFELORA_TORCH_TARGET_VERSION 0x020a000000000000ULL)

if(BUILD_SHARED_LIBS)
  message(FATAL_ERROR "The PyTorch ops link the static library: configure with BUILD_SHARED_LIBS=OFF or without SAFELORA_TORCH_DIR")
endif()

# A target version newer than the torch at hand compiles without a word, so the version is checked here.
set(torch_version_header "${SAFELORA_TORCH_DIR}/include/torch/headeronly/version.h")
if(NOT EXISTS "${torch_version_header}")
  message(FATAL_ERROR "No torch >= 2.10 in SAFELORA_TORCH_DIR=${SAFELORA_TORCH_DIR}: include/torch/headeronly/version.h is missing")
endif()
file(STRINGS "${torch_version_header}" torch_version_lines REGEX "define TORCH_VERSION_(MAJOR|MINOR) ")
string(REGEX REPLACE ".*MAJOR ([0-9]+).*MINOR ([0-9]+).*" "\\1.\\2" torch_version "${torch_version_lines}")
if(torch_version VERSION_LESS "${SAFELORA_TORCH_TARGET_MAJOR}.${SAFELORA_TORCH_TARGET_MINOR}")
  message(FATAL_ERROR "The PyTorch ops need torch >= 2.10, found ${torch_version} in ${SAFELORA_TORCH_DIR}")
endif()
find_library(SAFELORA_TORCH_CPU torch_cpu PATHS "${SAFELORA_TORCH_DIR}/lib" NO_DEFAULT_PATH)
if(NOT SAFELORA_TORCH_CPU)
  message(FATAL_ERROR "libtorch_cpu is missing from ${SAFELORA_TORCH_DIR}/lib")
endif()

# A module named safelora_kernels/<name>.abi3.so.
function(safelora_torch_module name)
  target_include_directories(${name} SYSTEM PRIVATE "${SAFELORA_TORCH_DIR}/include")
  target_compile_options(${name} PRIVATE "-ffile-prefix-map=${SAFELORA_TORCH_DIR}/include/=")
  target_compile_definitions(${name} PRIVATE TORCH_TARGET_VERSION=${SAFELORA_TORCH_TARGET_VERSION})
  # libtorch_cpu carries copies of a few libstdc++ functions; named first, the real ones win.
  target_link_libraries(${name} PRIVATE safelora_options $<$<CXX_COMPILER_ID:GNU>:stdc++> "${SAFELORA_TORCH_CPU}")
  set_target_properties(
    ${name}
    PROPERTIES PREFIX ""
               SUFFIX ".abi3.so"
               CXX_VISIBILITY_PRESET hidden
               VISIBILITY_INLINES_HIDDEN ON
               BUILD_WITH_INSTALL_RPATH ON
               INSTALL_RPATH "")
  if(NOT APPLE)
    target_link_options(${name} PRIVATE -Wl,--exclude-libs,ALL -Wl,--as-needed)
  endif()
  install(TARGETS ${name} LIBRARY DESTINATION . COMPONENT python EXCLUDE_FROM_ALL)
endfunction()

add_library(_C MODULE csrc/torch/library.cpp)
target_link_libraries(_C PRIVATE safelora_kernels)
safelora_torch_module(_C)

# A file of its own, so that CPU users need not carry it, and so that the CPU kernels load where this one does not.
if(SAFELORA_CUDA)
  # An archive, because its symbols stay inside, and one of its own: the CPU kernels are not needed here.
  add_library(safelora_debug STATIC EXCLUDE_FROM_ALL csrc/cpu/debug.cpp)
  target_include_directories(safelora_debug PRIVATE csrc/include)
  target_link_libraries(safelora_debug PRIVATE safelora_options)
  set_target_properties(safelora_debug PROPERTIES POSITION_INDEPENDENT_CODE ON CXX_VISIBILITY_PRESET hidden)
  add_library(_CUDA MODULE csrc/torch/cuda_library.cpp csrc/torch/cuda_call.cpp)
  target_link_libraries(_CUDA PRIVATE safelora_kernels_cuda safelora_debug)
  safelora_torch_module(_CUDA)
  set_target_properties(_CUDA PROPERTIES LINKER_LANGUAGE CXX)
endif()
