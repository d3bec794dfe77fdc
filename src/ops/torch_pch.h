// What most files that use libtorch include, precompiled once (cmake/DetourModule.cmake). Never
// included by name: each file includes what it uses, so that the build without precompiled headers
// works too.
#pragma once

#include <ATen/ATen.h>
#include <fmt/format.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>
