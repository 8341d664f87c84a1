# hps_find_cuda(<variable>): decides by HPS_CUDA whether device code is built, and sets what enable_language(CUDA) needs.
#
# The compiler is CMAKE_CUDA_COMPILER where that is given, otherwise what tools/build_tools.py finds.

function(hps_find_nvcc result)
  if(CMAKE_CUDA_COMPILER)
    set(nvcc ${CMAKE_CUDA_COMPILER})
  elseif(Python_EXECUTABLE)
    execute_process(COMMAND ${Python_EXECUTABLE} ${CMAKE_SOURCE_DIR}/tools/build_tools.py nvcc
      OUTPUT_VARIABLE nvcc OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
  else()
    find_program(nvcc NAMES nvcc PATHS /usr/local/cuda/bin NO_CACHE)
  endif()
  set(${result} ${nvcc} PARENT_SCOPE)
endfunction()

function(hps_find_cuda result)
  set(${result} OFF PARENT_SCOPE)
  string(TOLOWER "${HPS_CUDA}" mode)
  if(NOT mode MATCHES "^(auto|on|off)$")
    message(FATAL_ERROR "HPS_CUDA is '${HPS_CUDA}'; use auto, on or off")
  endif()
  if(mode STREQUAL "off")
    return()
  endif()
  hps_find_nvcc(nvcc)
  if(NOT nvcc)
    if(mode STREQUAL "on")
      message(FATAL_ERROR "HPS_CUDA=on, but there is no CUDA compiler. Install NVIDIA's CUDA toolkit (12.0 or later), or "
        "the five pip packages that the extra 'cuda' in pyproject.toml names with their versions, all of them "
        "(an isolated 'pip install .' fetches them by itself). HPS_CUDA=off builds for the CPU only.")
    endif()
    message(STATUS "CUDA: no compiler found, building for the CPU only")
    return()
  endif()

  execute_process(COMMAND ${nvcc} --version OUTPUT_VARIABLE text RESULT_VARIABLE exit_code ERROR_VARIABLE text)
  if(exit_code OR NOT text MATCHES "release ([0-9]+\\.[0-9]+)")
    message(FATAL_ERROR "'${nvcc} --version' does not work: ${text}")
  endif()
  set(version ${CMAKE_MATCH_1})
  if(NOT HPS_CUDA_ARCHITECTURES)
    # Machine code for each generation, and for the newest one also the portable form that later ones translate.
    set(HPS_CUDA_ARCHITECTURES 75-real 80-real 86-real 89-real 90)
    if(version VERSION_GREATER_EQUAL 12.8)
      set(HPS_CUDA_ARCHITECTURES 75-real 80-real 86-real 89-real 90-real 100-real 120)
    endif()
  endif()
  set(CMAKE_CUDA_COMPILER ${nvcc} PARENT_SCOPE)
  set(CMAKE_CUDA_ARCHITECTURES ${HPS_CUDA_ARCHITECTURES} PARENT_SCOPE)
  # The pip packages keep their libraries in lib, where nvcc looks in lib64.
  cmake_path(GET nvcc PARENT_PATH bin)
  cmake_path(GET bin PARENT_PATH toolkit)
  if(NOT EXISTS ${toolkit}/lib64 AND EXISTS ${toolkit}/lib/libcudart_static.a)
    set(CMAKE_CUDA_FLAGS "${CMAKE_CUDA_FLAGS} -L${toolkit}/lib" PARENT_SCOPE)
  endif()
  set(${result} ON PARENT_SCOPE)
endfunction()
