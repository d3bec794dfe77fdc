# Finds libtorch without its own CMake config, which for the CUDA wheel fails where no CUDA toolkit is installed.
# Only the include folder, libtorch_cpu and libc10 are needed; libtorch itself is a shell, which in the CUDA wheel would
# load the CUDA libraries at every start. Searched in this order:
#   DETOUR_TORCH_DIR (a libtorch or a site-packages/torch folder), CMAKE_PREFIX_PATH, .venv of this checkout.
set(_roots "")
if(DETOUR_TORCH_DIR)
  list(APPEND _roots "${DETOUR_TORCH_DIR}")
elseif(DEFINED ENV{DETOUR_TORCH_DIR})
  list(APPEND _roots "$ENV{DETOUR_TORCH_DIR}")
else()
  file(TO_CMAKE_PATH "$ENV{CMAKE_PREFIX_PATH}" _env_prefix_path)
  foreach(_p ${CMAKE_PREFIX_PATH} ${_env_prefix_path})
    # torch.utils.cmake_prefix_path is <torch>/share/cmake.
    list(APPEND _roots "${_p}" "${_p}/../..")
  endforeach()
  file(GLOB _venv "${CMAKE_SOURCE_DIR}/.venv/lib/python3*/site-packages/torch")
  list(APPEND _roots ${_venv})
endif()
foreach(_r ${_roots})
  if(EXISTS "${_r}/include/ATen/ATen.h" AND EXISTS "${_r}/lib/libtorch_cpu.so")
    get_filename_component(DetourTorch_ROOT "${_r}" ABSOLUTE)
    break()
  endif()
endforeach()
include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(DetourTorch REQUIRED_VARS DetourTorch_ROOT
  REASON_FAILURE_MESSAGE "no libtorch found: run scripts/setup, or set DETOUR_TORCH_DIR or CMAKE_PREFIX_PATH")
if(DetourTorch_FOUND AND NOT TARGET Detour::Torch)
  # at::parallel_for is a header that compiles to OpenMP. The runtime is the one that libtorch brings, so that a program
  # never holds two.
  find_package(OpenMP REQUIRED)
  file(GLOB _openmp "${DetourTorch_ROOT}/lib/libgomp*.so*")
  if(NOT _openmp)
    set(_openmp ${OpenMP_CXX_LIBRARIES})
  endif()
  add_library(Detour::Torch INTERFACE IMPORTED)
  # libtorch ships headers of its own fmt, of another version than the one we link: ours must be found first, although
  # /usr/include is always searched last.
  get_target_property(_fmt_include fmt::fmt INTERFACE_INCLUDE_DIRECTORIES)
  file(MAKE_DIRECTORY "${CMAKE_BINARY_DIR}/include")
  file(CREATE_LINK "${_fmt_include}/fmt" "${CMAKE_BINARY_DIR}/include/fmt" SYMBOLIC)
  target_include_directories(Detour::Torch SYSTEM INTERFACE "${CMAKE_BINARY_DIR}/include"
    "${DetourTorch_ROOT}/include" "${DetourTorch_ROOT}/include/torch/csrc/api/include")
  target_link_libraries(Detour::Torch INTERFACE "${DetourTorch_ROOT}/lib/libtorch_cpu.so"
    "${DetourTorch_ROOT}/lib/libc10.so" ${_openmp})
  target_compile_options(Detour::Torch INTERFACE ${OpenMP_CXX_FLAGS})
  # --no-as-needed: libtorch registers its operators from static initialisers, so that a program needs it even where it
  # uses no symbol of it.
  target_link_options(Detour::Torch INTERFACE -Wl,--no-as-needed "-Wl,-rpath,${DetourTorch_ROOT}/lib")
endif()
