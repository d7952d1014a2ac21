include(CMakePackageConfigHelpers)

set(config_dir "${CMAKE_INSTALL_LIBDIR}/cmake/safelora_kernels")
# Each component can be installed without the other: what both need goes with both.
set(components cpp)
if(SAFELORA_CUDA)
  list(APPEND components cuda)
endif()
install(
  TARGETS safelora_kernels
  EXPORT safelora_kernels
  COMPONENT cpp)
install(
  EXPORT safelora_kernels
  NAMESPACE safelora_kernels::
  FILE safelora_kernelsTargets.cmake
  DESTINATION "${config_dir}"
  COMPONENT cpp)

if(SAFELORA_CUDA)
  set_target_properties(safelora_kernels_cuda PROPERTIES EXPORT_NAME cuda)
  install(
    TARGETS safelora_kernels_cuda
    EXPORT safelora_kernels_cuda
    COMPONENT cuda)
  install(
    EXPORT safelora_kernels_cuda
    NAMESPACE safelora_kernels::
    FILE safelora_kernelsCudaTargets.cmake
    DESTINATION "${config_dir}"
    COMPONENT cuda)
endif()

configure_package_config_file(cmake/safelora_kernelsConfig.cmake.in safelora_kernelsConfig.cmake
                              INSTALL_DESTINATION "${config_dir}")
write_basic_package_version_file(safelora_kernelsConfigVersion.cmake COMPATIBILITY SameMinorVersion)
foreach(component IN LISTS components)
  install(DIRECTORY csrc/include/safelora DESTINATION "${CMAKE_INSTALL_INCLUDEDIR}" COMPONENT ${component})
  install(
    FILES "${CMAKE_CURRENT_BINARY_DIR}/safelora_kernelsConfig.cmake"
          "${CMAKE_CURRENT_BINARY_DIR}/safelora_kernelsConfigVersion.cmake"
    DESTINATION "${config_dir}"
    COMPONENT ${component})
endforeach()
