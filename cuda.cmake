# SPDX-License-Identifier: Apache-2.0
#
# The CUDA module, _C_cuda.abi3.so: kernels in CuTe, and their torch operators on the stable ABI.
#
#   -DSPARSE_ATTN_CUDA=ON            asks for it (AUTO looks whether it makes sense)
#   -DSPARSE_ATTN_CUTLASS_DIR=...    headers of CUTLASS 4.2; fetched from PyPI when empty
#
# With SPARSE_ATTN_CUDA_EMULATED it is built as PTX for tools/ptxemu, whose libcudart stands in for
# the CUDA runtime, and its operators take CPU tensors (tests/cuda_emulation.py).
set(SPARSE_ATTN_CUTLASS_DIR "" CACHE PATH "Include directory of CUTLASS; fetched when empty")
set(SPARSE_ATTN_CUDA_ARCHITECTURES "80-real;90" CACHE STRING
    "What to compile for; newer GPUs than the last one compile its PTX when they first run it")
set(SPARSE_ATTN_EMULATED_RUNTIME "" CACHE PATH "Directory of the stand-in libcudart.so.13")
option(SPARSE_ATTN_CUDA_FAULTS "For tests: kernels with faults that SPARSE_ATTN_FAULT seeds" OFF)
set(SPARSE_ATTN_CUDA_ONLY "" CACHE STRING "For tests: the one instantiation to build, as bf16_64")

if(SPARSE_ATTN_CUDA_EMULATED)
  set(build_cuda ON)
elseif(SPARSE_ATTN_CUDA STREQUAL "AUTO")
  include(CheckLanguage)
  set(build_cuda OFF)
  if(EXISTS "${torch_dir}/lib/libtorch_cuda.so")
    check_language(CUDA)
    if(CMAKE_CUDA_COMPILER)
      set(build_cuda ON)
    endif()
  endif()
else()
  set(build_cuda "${SPARSE_ATTN_CUDA}")
endif()
message(STATUS "sparse_attn: CUDA module: ${build_cuda}")
if(NOT build_cuda)
  return()
endif()

if(SPARSE_ATTN_CCACHE AND NOT DEFINED CMAKE_CUDA_COMPILER_LAUNCHER)
  set(CMAKE_CUDA_COMPILER_LAUNCHER "${SPARSE_ATTN_CCACHE}")
endif()
if(SPARSE_ATTN_CUDA_EMULATED)
  set(CMAKE_CUDA_ARCHITECTURES "80-virtual")
else()
  set(CMAKE_CUDA_ARCHITECTURES "${SPARSE_ATTN_CUDA_ARCHITECTURES}")
endif()
enable_language(CUDA)
if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 12.4)
  message(FATAL_ERROR "sparse_attn: nvcc ${CMAKE_CUDA_COMPILER_VERSION} is too old; 12.4 or newer")
endif()

if(SPARSE_ATTN_CUTLASS_DIR)
  set(cutlass_dir "${SPARSE_ATTN_CUTLASS_DIR}")
else()
  if(NOT Python_EXECUTABLE)
    find_package(Python 3.10 REQUIRED COMPONENTS Interpreter)
  endif()
  execute_process(
    COMMAND "${Python_EXECUTABLE}" "${PROJECT_SOURCE_DIR}/tools/cuda/fetch_cutlass.py"
      "${PROJECT_BINARY_DIR}/cutlass"
    OUTPUT_VARIABLE cutlass_dir ERROR_VARIABLE cutlass_error RESULT_VARIABLE cutlass_status
    OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_STRIP_TRAILING_WHITESPACE)
  if(NOT cutlass_status EQUAL 0)
    message(FATAL_ERROR "sparse_attn: cannot fetch the headers of CUTLASS: ${cutlass_error}\n"
      "Give their directory as -DSPARSE_ATTN_CUTLASS_DIR=, or build without the CUDA module: "
      "-DSPARSE_ATTN_CUDA=OFF.")
  endif()
endif()

# --- kernels: torch is not on their include path ---

file(GLOB cuda_kernels CONFIGURE_DEPENDS "${PROJECT_SOURCE_DIR}/csrc/cuda/*/instantiations/*.cu")
if(SPARSE_ATTN_CUDA_ONLY)
  list(FILTER cuda_kernels INCLUDE REGEX "/${SPARSE_ATTN_CUDA_ONLY}\\.cu$")
endif()
add_library(sparse_attn_cuda_kernels OBJECT ${cuda_kernels})
target_include_directories(sparse_attn_cuda_kernels SYSTEM PRIVATE "${cutlass_dir}")
target_compile_options(sparse_attn_cuda_kernels PRIVATE
  -std=c++20 -lineinfo --expt-relaxed-constexpr
  "-Xcompiler=-ffile-prefix-map=${PROJECT_SOURCE_DIR}/=")
if(SPARSE_ATTN_CUDA_EMULATED)
  target_compile_options(sparse_attn_cuda_kernels PRIVATE --compress-mode=none)
endif()

# --- operators ---

file(GLOB cuda_ops CONFIGURE_DEPENDS "${PROJECT_SOURCE_DIR}/csrc/ops/cuda/*.cpp")
add_library(_C_cuda MODULE
  "${PROJECT_SOURCE_DIR}/csrc/registration_cuda.cpp" "${PROJECT_SOURCE_DIR}/csrc/ops/common.cpp"
  ${cuda_ops})
target_link_libraries(_C_cuda PRIVATE sparse_attn_cuda_kernels)
target_include_directories(_C_cuda SYSTEM PRIVATE ${CMAKE_CUDA_TOOLKIT_INCLUDE_DIRECTORIES})
if(SPARSE_ATTN_CUDA_EMULATED)
  target_compile_definitions(_C_cuda PRIVATE SPARSE_ATTN_EMULATED)
  if(SPARSE_ATTN_CUDA_FAULTS)
    target_compile_definitions(sparse_attn_cuda_kernels PRIVATE SPARSE_ATTN_FAULTS)
  endif()
  if(SPARSE_ATTN_CUDA_ONLY)
    string(REPLACE "bf16_" "" only_dim "${SPARSE_ATTN_CUDA_ONLY}")
    target_compile_definitions(_C_cuda PRIVATE SPARSE_ATTN_ONLY_BF16=${only_dim})
  endif()
  set_target_properties(_C_cuda PROPERTIES CUDA_RUNTIME_LIBRARY None)
  target_link_libraries(_C_cuda PRIVATE "${SPARSE_ATTN_EMULATED_RUNTIME}/libcudart.so.13")
  sparse_attn_module(_C_cuda "_C_cuda_emulated")
  set_target_properties(_C_cuda PROPERTIES SKIP_BUILD_RPATH OFF
    BUILD_RPATH "${SPARSE_ATTN_EMULATED_RUNTIME}")
else()
  # The runtime is linked in: the module loads where no CUDA is installed.
  set_target_properties(_C_cuda PROPERTIES CUDA_RUNTIME_LIBRARY Static)
  sparse_attn_module(_C_cuda "_C_cuda")
endif()
