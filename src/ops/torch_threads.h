// One thread pool for kernels and libtorch.
#pragma once

namespace detour::ops {

/// Sends core's ParallelFor to libtorch's intra-op pool, so that kernels and backward GEMMs share
/// their threads. Called once at the start of a program that links libtorch.
void InstallTorchThreads();

}  // namespace detour::ops
