# detour_module(NAME [TORCH] [DEPS module...] [LIBS library...] [TEST_DEPS module...] [TEST_LIBS library...])
#   One library `detour_NAME` of every .cc in the calling folder, one program `NAME_test` of every *_test.cc, and with
#   DETOUR_FUZZ one program per *_fuzz.cc (target `fuzzers`), which ctest runs for ten seconds.
#   Which folder may include which: tools/check_includes.py.
#   TORCH: the folder uses libtorch, through one precompiled header that all such folders share.
#   TEST_DEPS, TEST_LIBS: what only the tests need (a test may use every lower layer).

# With clang a library must be instrumented for the fuzzers that link it.
if(DETOUR_FUZZ)
  add_compile_options(-fsanitize=fuzzer-no-link -Wno-unknown-warning-option)
  add_custom_target(fuzzers)
endif()

# src/ops/torch_pch.h, compiled once. -DCMAKE_DISABLE_PRECOMPILE_HEADERS=ON does without.
function(detour_torch_pch)
  if(TARGET detour_torch_pch)
    return()
  endif()
  file(GENERATE OUTPUT ${CMAKE_BINARY_DIR}/torch_pch.cc CONTENT "// A target with a precompiled header needs a source.\n")
  add_library(detour_torch_pch STATIC ${CMAKE_BINARY_DIR}/torch_pch.cc)
  # The same flags and definitions as the targets that reuse it: gcc refuses a precompiled header of other flags.
  target_link_libraries(detour_torch_pch PUBLIC fmt::fmt nlohmann_json::nlohmann_json Threads::Threads Detour::Torch)
  target_precompile_headers(detour_torch_pch PRIVATE ${CMAKE_SOURCE_DIR}/src/ops/torch_pch.h)
  target_compile_options(detour_torch_pch PRIVATE ${DETOUR_PCH_OPTIONS})
endfunction()

function(detour_reuse_torch_pch target)
  detour_torch_pch()
  target_precompile_headers(${target} REUSE_FROM detour_torch_pch)
  target_compile_options(${target} PRIVATE ${DETOUR_PCH_OPTIONS})
endfunction()

function(detour_module name)
  cmake_parse_arguments(ARG "TORCH" "" "DEPS;LIBS;TEST_DEPS;TEST_LIBS" ${ARGN})
  file(GLOB sources CONFIGURE_DEPENDS ${CMAKE_CURRENT_SOURCE_DIR}/*.cc)
  set(tests ${sources})
  set(fuzzers ${sources})
  list(FILTER sources EXCLUDE REGEX "(_test|_fuzz|/main)\\.cc$")
  list(FILTER tests INCLUDE REGEX "_test\\.cc$")
  list(FILTER fuzzers INCLUDE REGEX "_fuzz\\.cc$")
  if(NOT sources)
    add_library(detour_${name} INTERFACE)
    return()
  endif()
  list(TRANSFORM ARG_DEPS PREPEND detour_)
  list(TRANSFORM ARG_TEST_DEPS PREPEND detour_)
  add_library(detour_${name} STATIC ${sources})
  target_include_directories(detour_${name} PUBLIC ${CMAKE_SOURCE_DIR}/src)
  target_link_libraries(detour_${name} PUBLIC ${ARG_DEPS} ${ARG_LIBS} fmt::fmt nlohmann_json::nlohmann_json
                                              Threads::Threads)
  if(ARG_TORCH)
    target_link_libraries(detour_${name} PUBLIC Detour::Torch)
    detour_reuse_torch_pch(detour_${name})
  endif()
  if(tests)
    add_executable(${name}_test ${tests})
    target_link_libraries(${name}_test PRIVATE detour_${name} ${ARG_TEST_DEPS} ${ARG_TEST_LIBS}
                                               GTest::gtest GTest::gtest_main)
    target_compile_definitions(${name}_test PRIVATE DETOUR_SOURCE_DIR="${CMAKE_SOURCE_DIR}")
    if(ARG_TORCH)
      detour_reuse_torch_pch(${name}_test)
    endif()
    add_test(NAME ${name} COMMAND ${name}_test)
    # As the program does: waiting threads sleep, and tests beside each other do not starve.
    set_tests_properties(${name} PROPERTIES TIMEOUT 600 ENVIRONMENT OMP_WAIT_POLICY=passive)
  endif()
  if(DETOUR_FUZZ)
    foreach(fuzzer ${fuzzers})
      get_filename_component(fuzzer_name ${fuzzer} NAME_WE)
      add_executable(${fuzzer_name} ${fuzzer})
      target_link_libraries(${fuzzer_name} PRIVATE detour_${name})
      target_link_options(${fuzzer_name} PRIVATE -fsanitize=fuzzer)
      add_dependencies(fuzzers ${fuzzer_name})
      # What a run finds stays in the build folder; it starts from the seeds in tests/corpus.
      set(corpus ${CMAKE_BINARY_DIR}/corpus/${fuzzer_name})
      set(seeds ${CMAKE_SOURCE_DIR}/tests/corpus/${fuzzer_name})
      file(MAKE_DIRECTORY ${corpus} ${seeds})
      add_test(NAME ${fuzzer_name}
               COMMAND ${fuzzer_name} -max_total_time=10 -rss_limit_mb=512 -timeout=5 ${corpus} ${seeds})
      set_tests_properties(${fuzzer_name} PROPERTIES TIMEOUT 120)
    endforeach()
  endif()
endfunction()
