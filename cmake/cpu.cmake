# The framework-free C++ library: public headers in csrc/include, kernels in csrc/cpu.
include(CheckCXXCompilerFlag)

set(SAFELORA_AVX2_FLAGS -mavx2 -mfma -mf16c)
set(SAFELORA_AVX512_FLAGS -mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mf16c)
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU") # false alarms inside its own AVX-512 headers
  list(APPEND SAFELORA_AVX512_FLAGS -Wno-uninitialized -Wno-maybe-uninitialized)
endif()
set(SAFELORA_AVX512_BF16_FLAGS ${SAFELORA_AVX512_FLAGS} -mavx512bf16 -mavx512vnni)
set(SAFELORA_AMX_FLAGS ${SAFELORA_AVX512_FLAGS} -mamx-tile -mamx-bf16)

add_library(
  safelora_kernels
  csrc/cpu/cpu_features.cpp
  csrc/cpu/debug.cpp
  csrc/cpu/gram_apply.cpp
  csrc/cpu/isa_scalar.cpp
  csrc/cpu/parallel.cpp
  csrc/cpu/project_layers.cpp
  csrc/cpu/project_out.cpp
  csrc/cpu/salora_linear.cpp
  csrc/cpu/select_layers.cpp
  csrc/cpu/update_cosine.cpp)
add_library(safelora_kernels::safelora_kernels ALIAS safelora_kernels)

if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64)$")
  list(JOIN SAFELORA_AVX512_BF16_FLAGS " " bf16_flags)
  list(JOIN SAFELORA_AMX_FLAGS " " amx_flags)
  check_cxx_compiler_flag("${bf16_flags} ${amx_flags}" SAFELORA_HAS_X86_FLAGS)
  if(SAFELORA_HAS_X86_FLAGS)
    target_sources(safelora_kernels PRIVATE csrc/cpu/isa_avx2.cpp csrc/cpu/isa_avx512.cpp csrc/cpu/isa_avx512_rows.cpp
                                            csrc/cpu/isa_avx512_thin.cpp csrc/cpu/isa_avx512_bf16.cpp csrc/cpu/isa_amx.cpp)
    set_source_files_properties(csrc/cpu/isa_avx2.cpp PROPERTIES COMPILE_OPTIONS "${SAFELORA_AVX2_FLAGS}")
    set_source_files_properties(csrc/cpu/isa_avx512.cpp csrc/cpu/isa_avx512_rows.cpp csrc/cpu/isa_avx512_thin.cpp
                                PROPERTIES COMPILE_OPTIONS "${SAFELORA_AVX512_FLAGS}")
    set_source_files_properties(csrc/cpu/isa_avx512_bf16.cpp
                                PROPERTIES COMPILE_OPTIONS "${SAFELORA_AVX512_BF16_FLAGS}")
    set_source_files_properties(csrc/cpu/isa_amx.cpp PROPERTIES COMPILE_OPTIONS "${SAFELORA_AMX_FLAGS}")
    target_compile_definitions(safelora_kernels PRIVATE SAFELORA_X86=1)
  else()
    message(WARNING "This compiler lacks the AMX flags (GCC 11 or Clang 12 have them): only the scalar kernels are built")
  endif()
endif()

target_include_directories(
  safelora_kernels
  PUBLIC "$<BUILD_INTERFACE:${CMAKE_CURRENT_SOURCE_DIR}/csrc/include>" "$<INSTALL_INTERFACE:${CMAKE_INSTALL_INCLUDEDIR}>"
  PRIVATE csrc/cpu)
target_compile_features(safelora_kernels PUBLIC cxx_std_17)
target_link_libraries(safelora_kernels PRIVATE $<BUILD_INTERFACE:safelora_options> PUBLIC Threads::Threads)
set_target_properties(
  safelora_kernels
  PROPERTIES POSITION_INDEPENDENT_CODE ON
             CXX_VISIBILITY_PRESET hidden
             VISIBILITY_INLINES_HIDDEN ON
             VERSION ${PROJECT_VERSION}
             SOVERSION ${PROJECT_VERSION_MAJOR}.${PROJECT_VERSION_MINOR})
