# libmetis_aot.so: Triton kernels compiled ahead of time for sm_80, sm_90 and sm_100, with a launcher that opens the CUDA driver
# at run time. Included where METIS_AOT is on. Needs no GPU and no CUDA toolkit, but torch and triton in the Python that runs
# the build: pip install --no-build-isolation -C cmake.define.METIS_AOT=ON .
enable_language(C ASM)
find_package(Python 3.11 COMPONENTS Interpreter REQUIRED)
find_package(Threads REQUIRED)

set(METIS_AOT_ARCHS "80;90;100" CACHE STRING "compute capabilities, times ten, to compile the Triton kernels for")

set(METIS_AOT_SOURCES ${CMAKE_CURRENT_BINARY_DIR}/aot)
# the variants come from running the host code of the ops, so any module may change them
file(GLOB_RECURSE METIS_KERNELS_PYTHON CONFIGURE_DEPENDS ${CMAKE_CURRENT_LIST_DIR}/metis_kernels/*.py)
add_custom_command(
  OUTPUT ${METIS_AOT_SOURCES}/variants.S ${METIS_AOT_SOURCES}/variants.h
  COMMAND ${CMAKE_COMMAND} -E env "PYTHONPATH=${CMAKE_CURRENT_LIST_DIR}:$ENV{PYTHONPATH}"
          ${Python_EXECUTABLE} -m metis_kernels.aot.build ${METIS_AOT_SOURCES} --arch ${METIS_AOT_ARCHS}
  DEPENDS ${METIS_KERNELS_PYTHON}
  COMMENT "Compiling Triton kernels ahead of time for sm ${METIS_AOT_ARCHS}"
  COMMAND_EXPAND_LISTS VERBATIM)

add_library(metis_aot SHARED ${CMAKE_CURRENT_LIST_DIR}/csrc/aot/launch.c ${METIS_AOT_SOURCES}/variants.S
                             ${METIS_AOT_SOURCES}/variants.h)
# the assembler file embeds what the compiler wrote beside it
set_source_files_properties(${METIS_AOT_SOURCES}/variants.S PROPERTIES OBJECT_DEPENDS ${METIS_AOT_SOURCES}/variants.h)
target_include_directories(metis_aot PRIVATE ${METIS_AOT_SOURCES})
target_compile_features(metis_aot PRIVATE c_std_11)
target_compile_options(metis_aot PRIVATE $<$<COMPILE_LANGUAGE:C>:-fvisibility=hidden -Wall -Wextra>)
target_link_libraries(metis_aot PRIVATE Threads::Threads ${CMAKE_DL_LIBS})
install(TARGETS metis_aot LIBRARY DESTINATION metis_kernels)
