# Read by llama.cpp's own CMake project (through CMAKE_PROJECT_INCLUDE): the settings that the
# crate's build script does not forward.

# The wheel must not link what it does not ship: no TLS, no child processes, no video decoders.
set(LLAMA_OPENSSL OFF CACHE BOOL "" FORCE)
set(LLAMA_SUBPROCESS OFF CACHE BOOL "" FORCE)
set(MTMD_VIDEO OFF CACHE BOOL "" FORCE)

# Every library finds its neighbours in its own folder, wherever the wheel is installed.
set(CMAKE_BUILD_WITH_INSTALL_RPATH ON)
if(APPLE)
    set(CMAKE_INSTALL_RPATH "@loader_path")
else()
    set(CMAKE_INSTALL_RPATH "$ORIGIN")
endif()

# Names of our own, so that another llama.cpp in the same process is neither taken for ours nor
# given ours. build.rs copies libX.so as tabagent-libX.so to match.
set(CMAKE_PLATFORM_NO_VERSIONED_SONAME ON)
if(UNIX AND NOT APPLE)
    set(CMAKE_SHARED_LIBRARY_SONAME_C_FLAG "-Wl,-soname,tabagent-")
    set(CMAKE_SHARED_LIBRARY_SONAME_CXX_FLAG "-Wl,-soname,tabagent-")
endif()

# GCC makes one object of the same inline variable in all libraries of a process, also in those that
# see nothing else of each other; another llama.cpp has other classes by the same names.
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
    add_compile_options("$<$<COMPILE_LANGUAGE:CXX>:-fno-gnu-unique>")
endif()

# GCC 12 declares 8 of the 64 bytes that _tile_loadconfig reads, and drops the stores before it.
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
    add_compile_options(
        "$<$<COMPILE_LANGUAGE:CXX>:SHELL:-include ${CMAKE_CURRENT_LIST_DIR}/gcc_amx.h>")
endif()

# Each CPU module gets our products as well; what it was not compiled for leaves them out.
function(add_kernels)
    get_property(targets DIRECTORY "${CMAKE_CURRENT_SOURCE_DIR}/src" PROPERTY BUILDSYSTEM_TARGETS)
    foreach(target IN LISTS targets)
        if(target MATCHES "^ggml-cpu" AND NOT target MATCHES "-feats$")
            target_sources(${target} PRIVATE "${KERNELS}/attention.cpp" "${KERNELS}/tiles.cpp")
        endif()
    endforeach()
endfunction()

set(KERNELS "${CMAKE_CURRENT_LIST_DIR}/../kernels")
if(PROJECT_NAME STREQUAL "ggml" AND EXISTS "${KERNELS}")
    cmake_language(DEFER CALL add_kernels)  # its targets are still to come
endif()
