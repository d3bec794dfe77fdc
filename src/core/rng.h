// Counter-based random numbers: a draw depends on its key and counter alone, never on who draws or
// in which order.
#pragma once

#include <array>
#include <cstdint>

namespace detour {

/// Philox4x32-10 (Salmon et al., SC 2011): 128 random bits from a 128-bit counter and a 64-bit key.
std::array<uint32_t, 4> Philox(std::array<uint32_t, 4> counter, std::array<uint32_t, 2> key);

/// What a stream of random numbers is for; part of the key, so that two purposes never share a
/// number.
enum class RngPurpose : uint32_t {
  kInit = 1,
  kFallback,
  kSample,
  kData,
  kSplit,
  kTest,
  kRoute,
  kEval
};

/// Random numbers indexed by (seed, purpose, a, b, index).
class Rng {
 public:
  Rng(uint64_t seed, RngPurpose purpose, uint32_t a = 0, uint32_t b = 0)
      : seed_(seed), purpose_(purpose), a_(a), b_(b) {}

  uint64_t Bits(uint64_t index) const;
  /// In [0, 1), 53 random bits.
  double Uniform(uint64_t index) const;
  /// Standard normal, by Box-Muller.
  double Normal(uint64_t index) const;
  /// In [0, n). Requires n >= 1. Bias below n / 2^64.
  uint64_t Below(uint64_t index, uint64_t n) const;

 private:
  std::array<uint32_t, 4> Draw(uint64_t index) const;
  uint64_t seed_;
  RngPurpose purpose_;
  uint32_t a_, b_;
};

}  // namespace detour
