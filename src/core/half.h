// 16-bit floats, bit by bit: exact one way, rounded to nearest (ties to even) the other. All
// patterns survive the way to F32 and back.
#pragma once

#include <bit>
#include <cstdint>

namespace detour {

inline uint32_t F16ToF32Bits(uint16_t half) {
  const uint32_t sign = uint32_t{half & 0x8000u} << 16;
  const uint32_t exponent = half >> 10 & 0x1f;
  const uint32_t mantissa = half & 0x3ff;
  const uint32_t subnormal = std::bit_cast<uint32_t>(static_cast<float>(mantissa) * 0x1p-24f);
  // 112 = 127 - 15, the difference of the biases; infinity and NaN have all exponent bits set.
  const uint32_t normal = ((exponent == 31 ? 255 : exponent + 112) << 23) | mantissa << 13;
  return sign | (exponent == 0 ? subnormal : normal);
}

inline uint16_t F32ToF16Bits(uint32_t bits) {
  const uint32_t sign = bits >> 16 & 0x8000;
  const uint32_t magnitude = bits & 0x7fffffff;
  uint32_t half;
  if (magnitude > 0x7f800000) {  // NaN: keep what fits of the payload, and one bit of it set
    const uint32_t payload = magnitude >> 13 & 0x3ff;
    half = 0x7c00 | (payload == 0 ? 0x200 : payload);
  } else if (magnitude >= 0x477ff000) {  // 65520 and above
    half = 0x7c00;
  } else if (magnitude < 0x38800000) {  // below 2^-14: the ulp of 0.5f is that of a subnormal half
    const float shifted = std::bit_cast<float>(magnitude) + 0.5f;
    half = std::bit_cast<uint32_t>(shifted) - 0x3f000000;
  } else {
    half = (magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
  }
  return static_cast<uint16_t>(sign | half);
}

inline uint16_t F32ToBF16Bits(uint32_t bits) {
  if ((bits & 0x7fffffff) > 0x7f800000) {
    const uint32_t top = bits >> 16;
    return static_cast<uint16_t>((top & 0x7f) == 0 ? top | 0x40 : top);
  }
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

}  // namespace detour
