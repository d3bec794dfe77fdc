#include "core/rng.h"

#include <cmath>
#include <numbers>

namespace detour {

std::array<uint32_t, 4> Philox(std::array<uint32_t, 4> c, std::array<uint32_t, 2> k) {
  // Constants: Salmon et al. 2011, section 3.3.
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53} * c[0];
    const uint64_t p1 = uint64_t{0xCD9E8D57} * c[2];
    c = {static_cast<uint32_t>(p1 >> 32) ^ c[1] ^ k[0], static_cast<uint32_t>(p1),
         static_cast<uint32_t>(p0 >> 32) ^ c[3] ^ k[1], static_cast<uint32_t>(p0)};
    k[0] += 0x9E3779B9;
    k[1] += 0xBB67AE85;
  }
  return c;
}

std::array<uint32_t, 4> Rng::Draw(uint64_t index) const {
  const uint32_t purpose = static_cast<uint32_t>(purpose_) << 24;
  return Philox({static_cast<uint32_t>(index), static_cast<uint32_t>(index >> 32), a_, b_},
                {static_cast<uint32_t>(seed_), static_cast<uint32_t>(seed_ >> 32) ^ purpose});
}

uint64_t Rng::Bits(uint64_t index) const {
  const auto r = Draw(index);
  return (uint64_t{r[1]} << 32) | r[0];
}

double Rng::Uniform(uint64_t index) const {
  return static_cast<double>(Bits(index) >> 11) * 0x1.0p-53;
}

double Rng::Normal(uint64_t index) const {
  const auto r = Draw(index);
  const double u1 = (static_cast<double>((uint64_t{r[1]} << 32 | r[0]) >> 11) + 1.0) * 0x1.0p-53;
  const double u2 = static_cast<double>((uint64_t{r[3]} << 32 | r[2]) >> 11) * 0x1.0p-53;
  return std::sqrt(-2.0 * std::log(u1)) * std::cos(2.0 * std::numbers::pi * u2);
}

uint64_t Rng::Below(uint64_t index, uint64_t n) const {
  return static_cast<uint64_t>((static_cast<unsigned __int128>(Bits(index)) * n) >> 64);
}

}  // namespace detour
