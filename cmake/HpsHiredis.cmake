# Offers the target hps_hiredis: hiredis with TLS, and OpenSSL.
#
# All of it is static and position independent, because TensorFlow exports the names of another OpenSSL (BoringSSL) into
# the whole process; libhps_core.so hides the names of static libraries. The machine's hiredis is taken where it is 1.0 or
# later and has static libraries with TLS; otherwise the C sources that the Python package hiredis carries are built
# (tools/build_tools.py fetches them once, by name and checksum).
#
# HPS_SYSTEM_HIREDIS=OFF builds the sources in any case.
option(HPS_SYSTEM_HIREDIS "use the machine's hiredis where it is good enough" ON)

find_path(HPS_OPENSSL_INCLUDE openssl/ssl.h)
find_library(HPS_LIBSSL libssl.a)
find_library(HPS_LIBCRYPTO libcrypto.a)
if(NOT HPS_OPENSSL_INCLUDE OR NOT HPS_LIBSSL OR NOT HPS_LIBCRYPTO)
  message(FATAL_ERROR "OpenSSL's headers and static libraries are needed: apt-get install libssl-dev")
endif()

function(hps_find_system_hiredis result)
  set(${result} OFF PARENT_SCOPE)
  find_path(HPS_HIREDIS_INCLUDE hiredis/hiredis_ssl.h)
  find_library(HPS_HIREDIS_LIBRARY libhiredis.a)
  find_library(HPS_HIREDIS_SSL_LIBRARY libhiredis_ssl.a)
  if(NOT HPS_HIREDIS_INCLUDE OR NOT HPS_HIREDIS_LIBRARY OR NOT HPS_HIREDIS_SSL_LIBRARY)
    return()
  endif()
  file(STRINGS ${HPS_HIREDIS_INCLUDE}/hiredis/hiredis.h line REGEX "^#define HIREDIS_MAJOR [0-9]+")
  if(line MATCHES "([0-9]+)$" AND CMAKE_MATCH_1 GREATER_EQUAL 1)
    set(${result} ON PARENT_SCOPE)
  endif()
endfunction()

set(system_hiredis OFF)
if(HPS_SYSTEM_HIREDIS)
  hps_find_system_hiredis(system_hiredis)
endif()

if(system_hiredis)
  message(STATUS "hiredis: ${HPS_HIREDIS_LIBRARY}")
  add_library(hps_hiredis INTERFACE)
  target_include_directories(hps_hiredis SYSTEM INTERFACE ${HPS_HIREDIS_INCLUDE})
  target_link_libraries(hps_hiredis INTERFACE ${HPS_HIREDIS_SSL_LIBRARY} ${HPS_HIREDIS_LIBRARY})
else()
  if(NOT Python_EXECUTABLE)
    message(FATAL_ERROR "Python 3.10 or later with pip is needed to fetch hiredis, or a hiredis 1.0 or later with static "
      "libraries and TLS on this machine")
  endif()
  execute_process(COMMAND ${Python_EXECUTABLE} ${CMAKE_SOURCE_DIR}/tools/build_tools.py hiredis ${CMAKE_BINARY_DIR}
    OUTPUT_VARIABLE vendor OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
  message(STATUS "hiredis: ${vendor}")
  add_library(hps_hiredis STATIC)
  foreach(source alloc async hiredis net read sds sockcompat ssl)
    target_sources(hps_hiredis PRIVATE ${vendor}/hiredis/${source}.c)
  endforeach()
  target_include_directories(hps_hiredis SYSTEM PUBLIC ${vendor})
  target_compile_options(hps_hiredis PRIVATE -w)
  set_target_properties(hps_hiredis PROPERTIES C_VISIBILITY_PRESET hidden)
endif()
if(system_hiredis)
  set(scope INTERFACE)
else()
  set(scope PUBLIC)
endif()
target_include_directories(hps_hiredis SYSTEM ${scope} ${HPS_OPENSSL_INCLUDE})
target_link_libraries(hps_hiredis ${scope} ${HPS_LIBSSL} ${HPS_LIBCRYPTO} Threads::Threads ${CMAKE_DL_LIBS})
