// Working memory of the kernels: per thread, kept between calls.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdlib>
#include <memory>
#include <new>

namespace detour::kernels {

struct FreeDeleter {
  void operator()(float* p) const { std::free(p); }
};

/// 64-byte aligned floats, not initialised. Large ones ask for huge pages: a matrix-vector product
/// reads 1.3 times as fast from them.
inline float* AllocateFloats(size_t n) {
  constexpr size_t kHugePage = size_t{2} << 20;
  const size_t bytes = n * sizeof(float);
  const bool large = bytes >= 2 * kHugePage;
  void* p = nullptr;
  if (posix_memalign(&p, large ? kHugePage : 64, bytes) != 0) throw std::bad_alloc();
  if (large) madvise(p, bytes, MADV_HUGEPAGE);
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
