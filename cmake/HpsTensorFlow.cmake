# Finds TensorFlow's headers and framework library without importing it, and offers
#   hps_add_op_library(<target> <sources>...)
#
# Nothing is cached: an isolated pip build has its TensorFlow in another place every time.
execute_process(COMMAND ${Python_EXECUTABLE} ${CMAKE_SOURCE_DIR}/tools/build_tools.py tensorflow
  OUTPUT_VARIABLE tensorflow_dir OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
if(NOT tensorflow_dir)
  message(FATAL_ERROR "${Python_EXECUTABLE} has no TensorFlow 2.21: pip install 'tensorflow~=2.21.0', or build without "
    "the ops: -DHPS_TENSORFLOW=OFF")
endif()
set(tensorflow_include ${tensorflow_dir}/include)
set(tensorflow_library ${tensorflow_dir}/libtensorflow_framework.so.2)
message(STATUS "TensorFlow: ${tensorflow_dir}")

function(hps_add_op_library name)
  add_library(${name} MODULE ${ARGN})
  target_include_directories(${name} PRIVATE ${CMAKE_SOURCE_DIR})
  # As system headers: they warn a lot.
  target_include_directories(${name} SYSTEM PRIVATE ${tensorflow_include})
  target_compile_definitions(${name} PRIVATE _GLIBCXX_USE_CXX11_ABI=1 EIGEN_MAX_ALIGN_BYTES=64)
  if(HPS_WITH_CUDA)
    target_compile_definitions(${name} PRIVATE HPS_WITH_CUDA)
  endif()
  target_compile_options(${name} PRIVATE $<$<COMPILE_LANGUAGE:CXX>:${HPS_WARNINGS}>)
  target_link_options(${name} PRIVATE -Wl,-z,defs)
  target_link_libraries(${name} PRIVATE hps ${tensorflow_library})
  # Beside libhps_core.so, in a package folder that is a sibling of tensorflow's.
  set_target_properties(${name} PROPERTIES
    CXX_VISIBILITY_PRESET hidden VISIBILITY_INLINES_HIDDEN ON
    BUILD_WITH_INSTALL_RPATH ON INSTALL_RPATH "$ORIGIN;$ORIGIN/../tensorflow")
endfunction()
