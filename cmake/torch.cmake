# _C.abi3.so: registers the CPU kernels with PyTorch through the LibTorch stable ABI.
# It holds no PyInit function, so it serves every CPython and every torch from the target version on.
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

add_library(_C MODULE csrc/torch/library.cpp)
target_include_directories(_C SYSTEM PRIVATE "${SAFELORA_TORCH_DIR}/include")
target_compile_options(_C PRIVATE "-ffile-prefix-map=${SAFELORA_TORCH_DIR}/include/=")
target_compile_definitions(_C PRIVATE TORCH_TARGET_VERSION=${SAFELORA_TORCH_TARGET_VERSION})
# libtorch_cpu carries copies of a few libstdc++ functions; named first, the real ones win.
target_link_libraries(_C PRIVATE safelora_options safelora_kernels $<$<CXX_COMPILER_ID:GNU>:stdc++> "${SAFELORA_TORCH_CPU}")
set_target_properties(
  _C
  PROPERTIES PREFIX ""
             SUFFIX ".abi3.so"
             CXX_VISIBILITY_PRESET hidden
             VISIBILITY_INLINES_HIDDEN ON
             BUILD_WITH_INSTALL_RPATH ON
             INSTALL_RPATH "")
if(NOT APPLE)
  target_link_options(_C PRIVATE -Wl,--exclude-libs,ALL -Wl,--as-needed)
endif()
install(TARGETS _C LIBRARY DESTINATION . COMPONENT python EXCLUDE_FROM_ALL)
