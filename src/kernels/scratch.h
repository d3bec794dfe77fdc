// Working memory of the kernels: per thread, kept between calls.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <memory>
#include <new>

namespace detour::kernels {

struct FreeDeleter {
  void operator()(float* p) const { std::free(p); }
};

/// 64-byte aligned floats, not initialised.
inline float* AllocateFloats(size_t n) {
  void* p = std::aligned_alloc(64, (n * sizeof(float) + 63) / 64 * 64);
  if (!p) throw std::bad_alloc();
  return static_cast<float*>(p);
}

/// At least `n` floats, 64-byte aligned, contents undefined: valid until this thread's next call.
inline float* ScratchFloats(size_t n) {
  thread_local std::unique_ptr<float[], FreeDeleter> buffer;
  thread_local size_t size = 0;
  if (n > size) {
    buffer.reset();
    size = 0;
    buffer.reset(AllocateFloats(n));
    size = n;
  }
  return buffer.get();
}

}  // namespace detour::kernels
