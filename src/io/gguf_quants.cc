// The blocks of GGUF's quantized types. The order of operations is that of the `gguf` package
// (gguf/quants.py) and of ggml's reference: results are equal to the bit.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>

#include "core/error.h"
#include "core/half.h"
#include "core/threads.h"
#include "io/gguf.h"
#include "io/safetensors.h"

namespace detour::io {
namespace {

constexpr int kSmallBlock = 32;
constexpr int kSuperBlock = 256;  // "K" types: 8 or 16 sub-blocks with scales of few bits

float ReadHalf(const uint8_t* p) {
  uint16_t half;
  std::memcpy(&half, p, sizeof(half));
  return std::bit_cast<float>(F16ToF32Bits(half));
}

// Each decoder: one block at `p` to its elements at `out`.

// Small blocks of 4 bits: element i in the low half of byte i, element 16 + i in the high one.
void DecodeQ4_0(const uint8_t* p, float* out) {
  const float d = ReadHalf(p);
  for (int i = 0; i < 16; ++i) {
    out[i] = d * static_cast<float>((p[2 + i] & 15) - 8);
    out[16 + i] = d * static_cast<float>((p[2 + i] >> 4) - 8);
  }
}

void DecodeQ4_1(const uint8_t* p, float* out) {
  const float d = ReadHalf(p), min = ReadHalf(p + 2);
  for (int i = 0; i < 16; ++i) {
    out[i] = d * static_cast<float>(p[4 + i] & 15) + min;
    out[16 + i] = d * static_cast<float>(p[4 + i] >> 4) + min;
  }
}

// The fifth bit of element i is bit i of the 32 bits at `high`.
int FiveBits(const uint8_t* high, const uint8_t* low, int i) {
  const int bit = high[i / 8] >> (i % 8) & 1;
  return (i < 16 ? low[i] & 15 : low[i - 16] >> 4) | bit << 4;
}

void DecodeQ5_0(const uint8_t* p, float* out) {
  const float d = ReadHalf(p);
  for (int i = 0; i < kSmallBlock; ++i) {
    out[i] = d * static_cast<float>(FiveBits(p + 2, p + 6, i) - 16);
  }
}

void DecodeQ5_1(const uint8_t* p, float* out) {
  const float d = ReadHalf(p), min = ReadHalf(p + 2);
  for (int i = 0; i < kSmallBlock; ++i) {
    out[i] = d * static_cast<float>(FiveBits(p + 4, p + 8, i)) + min;
  }
}

void DecodeQ8_0(const uint8_t* p, float* out) {
  const float d = ReadHalf(p);
  for (int i = 0; i < kSmallBlock; ++i) {
    out[i] = static_cast<float>(static_cast<int8_t>(p[2 + i])) * d;
  }
}

// Two bits of element i: four elements that lie 32 apart share a byte.
int TwoBits(const uint8_t* p, int i) { return p[i / 128 * 32 + i % 32] >> (i / 32 % 4 * 2) & 3; }

void DecodeQ2_K(const uint8_t* p, float* out) {
  const uint8_t* const scales = p;
  const uint8_t* const quants = p + 16;
  const float d = ReadHalf(p + 80), dmin = ReadHalf(p + 82);
  for (int sub = 0; sub < 16; ++sub) {
    const float scale = d * static_cast<float>(scales[sub] & 15);
    const float min = dmin * static_cast<float>(scales[sub] >> 4);
    for (int i = sub * 16; i < sub * 16 + 16; ++i) {
      out[i] = scale * static_cast<float>(TwoBits(quants, i)) - min;
    }
  }
}

void DecodeQ3_K(const uint8_t* p, float* out) {
  const uint8_t* const high = p;
  const uint8_t* const quants = p + 32;
  const uint8_t* const scales = p + 96;
  const float d = ReadHalf(p + 108);
  for (int sub = 0; sub < 16; ++sub) {
    // 6 bits with an offset: four low ones in bytes 0-7, two high ones in bytes 8-11.
    const int low_bits = sub < 8 ? scales[sub] & 15 : scales[sub - 8] >> 4;
    const int high_bits = scales[8 + sub % 4] >> (sub / 4 * 2) & 3;
    const float scale = d * static_cast<float>((low_bits | high_bits << 4) - 32);
    for (int i = sub * 16; i < sub * 16 + 16; ++i) {
      const int bit = high[i % 32] >> (i / 32) & 1;  // set: no offset
      out[i] = scale * static_cast<float>(TwoBits(quants, i) - (bit ? 0 : 4));
    }
  }
}

// Scale and minimum, 6 bits each, of sub-block `sub` of 8: those of the first four lie in bytes 0-3
// and 4-7, the others in halves of bytes 8-11 and the two bits that bytes 0-7 have left.
std::pair<int, int> ScaleAndMin(const uint8_t* p, int sub) {
  if (sub < 4) return {p[sub] & 63, p[4 + sub] & 63};
  return {(p[4 + sub] & 15) | (p[sub - 4] >> 2 & 48), p[4 + sub] >> 4 | (p[sub] >> 2 & 48)};
}

// Q4_K, and Q5_K with the fifth bits at `high` (null without).
void DecodeQ45_K(const uint8_t* p, const uint8_t* high, const uint8_t* low, float* out) {
  const float d = ReadHalf(p), dmin = ReadHalf(p + 2);
  for (int sub = 0; sub < 8; ++sub) {
    const auto [scale_bits, min_bits] = ScaleAndMin(p + 4, sub);
    const float scale = d * static_cast<float>(scale_bits);
    const float min = dmin * static_cast<float>(min_bits);
    for (int i = 0; i < 32; ++i) {
      int q = low[sub / 2 * 32 + i] >> (sub % 2 * 4) & 15;
      if (high != nullptr) q |= (high[i] >> sub & 1) << 4;
      out[sub * 32 + i] = scale * static_cast<float>(q) - min;
    }
  }
}
void DecodeQ4_K(const uint8_t* p, float* out) { DecodeQ45_K(p, nullptr, p + 16, out); }
void DecodeQ5_K(const uint8_t* p, float* out) { DecodeQ45_K(p, p + 16, p + 48, out); }

void DecodeQ6_K(const uint8_t* p, float* out) {
  const uint8_t* const low = p;
  const uint8_t* const high = p + 128;
  const uint8_t* const scales = p + 192;
  const float d = ReadHalf(p + 208);
  for (int sub = 0; sub < 16; ++sub) {
    const float scale = d * static_cast<float>(static_cast<int8_t>(scales[sub]));
    for (int i = sub * 16; i < sub * 16 + 16; ++i) {
      const int low_bits = low[i / 128 * 64 + i % 64] >> (i / 64 % 2 * 4) & 15;
      out[i] = scale * static_cast<float>((low_bits | TwoBits(high, i) << 4) - 32);
    }
  }
}

struct Row {
  uint32_t number;
  GgufTypeInfo info;
  void (*decode)(const uint8_t* block, float* out);
};
// All types that ggml has had; those without a decoder can be skipped over.
constexpr Row kTypes[] = {
    {0, {"F32", 1, 4, true}, nullptr},
    {1, {"F16", 1, 2, true}, nullptr},
    {2, {"Q4_0", kSmallBlock, 18, true}, DecodeQ4_0},
    {3, {"Q4_1", kSmallBlock, 20, true}, DecodeQ4_1},
    {6, {"Q5_0", kSmallBlock, 22, true}, DecodeQ5_0},
    {7, {"Q5_1", kSmallBlock, 24, true}, DecodeQ5_1},
    {8, {"Q8_0", kSmallBlock, 34, true}, DecodeQ8_0},
    {9, {"Q8_1", kSmallBlock, 40, false}, nullptr},
    {10, {"Q2_K", kSuperBlock, 84, true}, DecodeQ2_K},
    {11, {"Q3_K", kSuperBlock, 110, true}, DecodeQ3_K},
    {12, {"Q4_K", kSuperBlock, 144, true}, DecodeQ4_K},
    {13, {"Q5_K", kSuperBlock, 176, true}, DecodeQ5_K},
    {14, {"Q6_K", kSuperBlock, 210, true}, DecodeQ6_K},
    {15, {"Q8_K", kSuperBlock, 292, false}, nullptr},
    {16, {"IQ2_XXS", kSuperBlock, 66, false}, nullptr},
    {17, {"IQ2_XS", kSuperBlock, 74, false}, nullptr},
    {18, {"IQ3_XXS", kSuperBlock, 98, false}, nullptr},
    {19, {"IQ1_S", kSuperBlock, 50, false}, nullptr},
    {20, {"IQ4_NL", kSmallBlock, 18, false}, nullptr},
    {21, {"IQ3_S", kSuperBlock, 110, false}, nullptr},
    {22, {"IQ2_S", kSuperBlock, 82, false}, nullptr},
    {23, {"IQ4_XS", kSuperBlock, 136, false}, nullptr},
    {24, {"I8", 1, 1, false}, nullptr},
    {25, {"I16", 1, 2, false}, nullptr},
    {26, {"I32", 1, 4, false}, nullptr},
    {27, {"I64", 1, 8, false}, nullptr},
    {28, {"F64", 1, 8, false}, nullptr},
    {29, {"IQ1_M", kSuperBlock, 56, false}, nullptr},
    {30, {"BF16", 1, 2, true}, nullptr},
    {34, {"TQ1_0", kSuperBlock, 54, false}, nullptr},
    {35, {"TQ2_0", kSuperBlock, 66, false}, nullptr},
    {39, {"MXFP4", kSmallBlock, 17, false}, nullptr},
    {40, {"NVFP4", 64, 36, false}, nullptr},
    {41, {"Q1_0", 128, 18, false}, nullptr},
};

const Row* FindRow(GgufType type) {
  const auto* const row = std::find_if(std::begin(kTypes), std::end(kTypes), [&](const Row& r) {
    return r.number == static_cast<uint32_t>(type);
  });
  return row == std::end(kTypes) ? nullptr : row;
}

// One block: F16 scale, 32 signed bytes.
bool QuantizeQ8_0(const float* values, std::byte* out) {
  float largest = 0;
  for (int i = 0; i < kSmallBlock; ++i) {
    if (!std::isfinite(values[i])) return false;
    largest = std::max(largest, std::fabs(values[i]));
  }
  const float d = largest / 127;
  const uint16_t scale = F32ToF16Bits(std::bit_cast<uint32_t>(d));
  if (scale == 0x7c00) return false;
  const float inverse = d == 0 ? 0.0f : 1 / d;
  std::memcpy(out, &scale, sizeof(scale));
  for (int i = 0; i < kSmallBlock; ++i) {
    // A scale near 2^-128 has no finite inverse; as F16 it is zero anyway.
    const float q = std::isinf(inverse) ? 0.0f : std::round(values[i] * inverse);
    out[2 + i] = static_cast<std::byte>(static_cast<int8_t>(q));
  }
  return true;
}

}  // namespace

const GgufTypeInfo* FindGgufType(GgufType type) {
  const Row* const row = FindRow(type);
  return row == nullptr ? nullptr : &row->info;
}

const GgufTypeInfo& GgufTypeOf(GgufType type) {
  const GgufTypeInfo* const info = FindGgufType(type);
  DETOUR_CHECK(info != nullptr, "type {}", static_cast<uint32_t>(type));
  return *info;
}

void DequantizeGguf(std::span<const std::byte> bytes, GgufType type, std::span<float> out) {
  switch (type) {
    case GgufType::kF32:
      return ConvertToF32(bytes, DType::kF32, out);
    case GgufType::kF16:
      return ConvertToF32(bytes, DType::kF16, out);
    case GgufType::kBF16:
      return ConvertToF32(bytes, DType::kBF16, out);
    default:
      break;
  }
  const Row* const row = FindRow(type);
  DETOUR_CHECK(row != nullptr && row->info.decoded, "type {}", static_cast<uint32_t>(type));
  const int64_t block_size = row->info.block_size, block_bytes = row->info.block_bytes;
  const int64_t num_blocks = bytes.size() / block_bytes;
  DETOUR_CHECK(bytes.size() == num_blocks * block_bytes && out.size() == num_blocks * block_size,
               "{} bytes of {} for {} elements", bytes.size(), row->info.name, out.size());
  const auto* const from = reinterpret_cast<const uint8_t*>(bytes.data());
  ParallelFor(0, num_blocks, (1 << 16) / block_size, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      row->decode(from + i * block_bytes, out.data() + i * block_size);
    }
  });
}

bool QuantizeGguf(std::span<const float> values, GgufType type, std::vector<std::byte>* out) {
  if (type == GgufType::kF32) {
    *out = ConvertF32(values, DType::kF32);
    return true;
  }
  if (type == GgufType::kF16) {
    *out = ConvertF32(values, DType::kF16);
    return std::none_of(values.begin(), values.end(), [](float x) {
      return std::isfinite(x) && (F32ToF16Bits(std::bit_cast<uint32_t>(x)) & 0x7fff) == 0x7c00;
    });
  }
  DETOUR_CHECK(type == GgufType::kQ8_0, "cannot write type {}", static_cast<uint32_t>(type));
  const int64_t num_blocks = values.size() / kSmallBlock;
  DETOUR_CHECK(values.size() == num_blocks * kSmallBlock, "{} values", values.size());
  const int64_t block_bytes = GgufTypeOf(type).block_bytes;
  out->resize(num_blocks * block_bytes);
  for (int64_t i = 0; i < num_blocks; ++i) {
    if (!QuantizeQ8_0(&values[i * kSmallBlock], out->data() + i * block_bytes)) return false;
  }
  return true;
}

}  // namespace detour::io
