# Read by llama.cpp's own CMake project when one more backend is built beside an installed package
# (python/tabagent_model/backends/): the same settings as the package's own libraries, and
# only the backend itself, which is linked with the package's libggml-base.
#
#   TABAGENT_TARGET     the backend's CMake target: ggml-cuda
#   TABAGENT_GGML_BASE  the packaged library
#   TABAGENT_RPATH      where the backend looks for what it needs besides
include("${CMAKE_CURRENT_LIST_DIR}/llama.cmake")
set(CMAKE_INSTALL_RPATH "${TABAGENT_RPATH}")

# What the backend uses and the packaged library has not is an error now, and not when it is used.
if(UNIX AND NOT APPLE)
    add_link_options(-Wl,-z,defs -Wl,-s)
endif()
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
    add_compile_options("$<$<COMPILE_LANGUAGE:CUDA>:-Xcompiler=-fno-gnu-unique>")
endif()

function(link_with_packaged_base)
    add_library(packaged-ggml-base SHARED IMPORTED GLOBAL)
    set_target_properties(packaged-ggml-base PROPERTIES
        IMPORTED_LOCATION "${TABAGENT_GGML_BASE}"
        INTERFACE_INCLUDE_DIRECTORIES "$<TARGET_PROPERTY:ggml-base,INTERFACE_INCLUDE_DIRECTORIES>"
        INTERFACE_COMPILE_DEFINITIONS "$<TARGET_PROPERTY:ggml-base,INTERFACE_COMPILE_DEFINITIONS>")
    get_target_property(libraries ${TABAGENT_TARGET} LINK_LIBRARIES)
    list(TRANSFORM libraries REPLACE "^ggml-base$" "packaged-ggml-base")
    set_target_properties(${TABAGENT_TARGET} PROPERTIES LINK_LIBRARIES "${libraries}")
endfunction()

if(PROJECT_NAME STREQUAL "ggml")
    cmake_language(DEFER CALL link_with_packaged_base)  # its targets are still to come
endif()
