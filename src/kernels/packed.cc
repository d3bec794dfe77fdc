// Packing: every weight format's layout, and where packed matrices are kept.
#include <algorithm>
#include <array>
#include <bit>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <vector>

#include "core/error.h"
#include "core/half.h"
#include "core/threads.h"
#include "kernels/gemm.h"
#include "kernels/kernels.h"
#include "kernels/scratch.h"

namespace detour::kernels {
namespace {

constexpr std::array<const char*, 5> kFormatNames = {"f32", "bf16", "q8", "q4", "q4min"};

bool HasHalves(WeightFormat format) { return format >= WeightFormat::kQ4; }

float FromHalf(uint16_t half) { return std::bit_cast<float>(F16ToF32Bits(half)); }

int64_t NumBlocks(int64_t num_inputs) { return (num_inputs + kQuantBlock - 1) / kQuantBlock; }

/// Where number i of lane m of a block is, and by how much it is shifted.
struct Place {
  int64_t byte;
  int shift;
};
Place PlaceOf(WeightFormat f, int64_t m, int64_t i) {
  if (f == WeightFormat::kQ8) return {(i / 4 * kPanel + m) * 4 + i % 4, 0};
  return {(i / 8 * kPanel + m) * 4 + i % 4, i % 8 < 4 ? 0 : 4};
}

float Dequantize(WeightFormat f, const QuantBlock& block, int64_t i) {
  const float scale = FromHalf(block.scale);
  if (f == WeightFormat::kQ4) return scale * static_cast<float>(block.q[i] - 8);
  const float product = scale * static_cast<float>(block.q[i]);
  return f == WeightFormat::kQ4Min ? product + FromHalf(block.min) : product;
}

uint32_t FourOf(const int8_t* q) {
  uint32_t four;
  std::memcpy(&four, q, 4);
  return four;
}

void StoreBlock(WeightFormat f, const QuantBlock& from, int64_t m, std::byte* block) {
  const bool halves = HasHalves(f);
  for (int64_t i = 0; i < kQuantBlock; i += halves ? 8 : 4) {
    const uint32_t numbers = FourOf(from.q + i) | (halves ? FourOf(from.q + i + 4) << 4 : 0);
    std::memcpy(block + PlaceOf(f, m, i).byte, &numbers, 4);
  }
  std::byte* scales = block + QuantNumberBytes(f);
  std::memcpy(scales + m * 2, &from.scale, 2);
  if (f == WeightFormat::kQ4Min) std::memcpy(scales + (kPanel + m) * 2, &from.min, 2);
}

QuantBlock LoadBlock(WeightFormat f, int64_t m, const std::byte* block) {
  QuantBlock to;
  for (int64_t i = 0; i < kQuantBlock; ++i) {
    const Place place = PlaceOf(f, m, i);
    const auto byte = static_cast<uint8_t>(block[place.byte]);
    to.q[i] = static_cast<int8_t>(HasHalves(f) ? byte >> place.shift & 15 : byte);
  }
  const std::byte* scales = block + QuantNumberBytes(f);
  std::memcpy(&to.scale, scales + m * 2, 2);
  if (f == WeightFormat::kQ4Min) std::memcpy(&to.min, scales + (kPanel + m) * 2, 2);
  return to;
}

/// The panels of f32: [K][32].
void PackPanel(const float* w, int64_t ldw, int64_t used, int64_t num_inputs, float* to) {
  if (used < kPanel) std::fill_n(to, kPanel * num_inputs, 0.0f);
  // 16 columns at a time: a cache line of each row is read whole.
  for (int64_t k = 0; k < num_inputs; k += 16) {
    Transpose(w + k, ldw, used, std::min<int64_t>(16, num_inputs - k), to + k * kPanel, kPanel);
  }
}

/// The same of bf16.
void PackPanel(const float* w, int64_t ldw, int64_t used, int64_t num_inputs, uint16_t* to) {
  std::vector<float> panel(kPanel * num_inputs);
  PackPanel(w, ldw, used, num_inputs, panel.data());
  for (size_t i = 0; i < panel.size(); ++i)
    to[i] = F32ToBF16Bits(std::bit_cast<uint32_t>(panel[i]));
}

/// Where matrices are packed: chunks of huge pages, each cut from its beginning. A layer's matrix
/// alone is often smaller than such a page, and a product of one row reads 1.3 times as fast from
/// them. A chunk goes when the last matrix in it does.
class Chunks {
 public:
  std::shared_ptr<std::byte[]> Take(int64_t bytes) {
    constexpr int64_t kChunk = int64_t{64} << 20;
#if defined(__SANITIZE_ADDRESS__)
    return Allocated(bytes);  // so that it sees reads past a matrix
#endif
    bytes = (bytes + 63) / 64 * 64;
    if (bytes > kChunk / 4) return Allocated(bytes);
    const std::lock_guard lock(mutex_);
    if (!chunk_ || used_ + bytes > kChunk) {
      chunk_ = Allocated(kChunk);
      used_ = 0;
    }
    std::byte* const begin = chunk_.get() + used_;
    used_ += bytes;
    return {chunk_, begin};
  }

  static std::shared_ptr<std::byte[]> Allocated(int64_t bytes) {
    const auto free = [](std::byte* p) { std::free(p); };
    return {reinterpret_cast<std::byte*>(AllocateFloats((bytes + 3) / sizeof(float))), free};
  }

 private:
  std::mutex mutex_;
  std::shared_ptr<std::byte[]> chunk_;
  int64_t used_ = 0;
};

Chunks& GlobalChunks() {
  static Chunks chunks;
  return chunks;
}

}  // namespace

WeightFormat ParseWeightFormat(const std::string& name) {
  const auto found = std::find(kFormatNames.begin(), kFormatNames.end(), name);
  if (found == kFormatNames.end()) {
    Fail("flag.weights", "--weights: expected f32, bf16, q8, q4, q4min or stored, got '{}'", name);
  }
  return static_cast<WeightFormat>(found - kFormatNames.begin());
}

int64_t PackedMatrix::PanelBytes() const {
  if (IsQuantized(format_)) return NumBlocks(num_inputs_) * QuantBlockBytes(format_);
  return num_inputs_ * kPanel * (format_ == WeightFormat::kF32 ? 4 : 2);
}

int64_t PackedMatrix::bytes() const { return (num_outputs_ + kPanel - 1) / kPanel * PanelBytes(); }

void PackedMatrix::Allocate(int64_t num_outputs, int64_t num_inputs, WeightFormat format,
                            bool lasting) {
  DETOUR_CHECK(num_outputs >= 1 && num_inputs >= 1, "[{}, {}]", num_outputs, num_inputs);
  num_outputs_ = num_outputs;
  num_inputs_ = num_inputs;
  format_ = format;
  if (data_ && bytes() <= capacity_) return;
  data_.reset();
  capacity_ = bytes();
  data_ = lasting ? GlobalChunks().Take(capacity_) : Chunks::Allocated(capacity_);
}

void PackedMatrix::Pack(const float* w, int64_t num_outputs, int64_t num_inputs, int64_t ldw,
                        WeightFormat format) {
  DETOUR_CHECK(ldw >= num_inputs, "[{}, {}], stride {}", num_outputs, num_inputs, ldw);
  if (IsQuantized(format)) {
    PackBlocks(format, num_outputs, num_inputs, [&](int64_t m, QuantBlock* row) {
      for (int64_t k = 0; k < num_inputs; k += kQuantBlock) {
        QuantizeBlock(format, w + m * ldw + k, std::min(kQuantBlock, num_inputs - k),
                      row + k / kQuantBlock);
      }
    });
    return;
  }
  Allocate(num_outputs, num_inputs, format, /*lasting=*/true);
  const int64_t num_panels = (num_outputs + kPanel - 1) / kPanel;
  const int64_t grain = std::max<int64_t>(1, (1 << 14) / (num_inputs * kPanel));
  ParallelFor(0, num_panels, grain, [&](int64_t panel_begin, int64_t panel_end) {
    for (int64_t p = panel_begin; p < panel_end; ++p) {
      const int64_t used = std::min(kPanel, num_outputs - p * kPanel);
      const float* from = w + p * kPanel * ldw;
      std::byte* to = data_.get() + p * PanelBytes();
      if (format == WeightFormat::kF32) {
        PackPanel(from, ldw, used, num_inputs, reinterpret_cast<float*>(to));
      } else {
        PackPanel(from, ldw, used, num_inputs, reinterpret_cast<uint16_t*>(to));
      }
    }
  });
}

void PackedMatrix::PackTransposed(const float* w_KM, int64_t num_outputs, int64_t num_inputs,
                                  int64_t ldw) {
  DETOUR_CHECK(ldw >= num_outputs, "[{}, {}], stride {}", num_inputs, num_outputs, ldw);
  Allocate(num_outputs, num_inputs, WeightFormat::kF32, /*lasting=*/false);
  auto* panels = reinterpret_cast<float*>(data_.get());
  const int64_t num_panels = (num_outputs + kPanel - 1) / kPanel;
  const int64_t grain = std::max<int64_t>(16, (1 << 14) / num_outputs);
  ParallelFor(0, num_inputs, grain, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      for (int64_t p = 0; p < num_panels; ++p) {
        const int64_t used = std::min(kPanel, num_outputs - p * kPanel);
        float* to = panels + (p * num_inputs + k) * kPanel;
        std::memcpy(to, w_KM + k * ldw + p * kPanel, used * sizeof(float));
        std::fill(to + used, to + kPanel, 0.0f);
      }
    }
  });
}

void PackedMatrix::PackBlocks(WeightFormat format, int64_t num_outputs, int64_t num_inputs,
                              const std::function<void(int64_t m, QuantBlock* row)>& blocks_of) {
  DETOUR_CHECK(IsQuantized(format));
  Allocate(num_outputs, num_inputs, format, /*lasting=*/true);
  const int64_t num_panels = (num_outputs + kPanel - 1) / kPanel;
  const int64_t num_blocks = NumBlocks(num_inputs), block_bytes = QuantBlockBytes(format);
  ParallelFor(0, num_panels, 1, [&](int64_t panel_begin, int64_t panel_end) {
    std::vector<QuantBlock> row(num_blocks);
    for (int64_t p = panel_begin; p < panel_end; ++p) {
      std::byte* panel = data_.get() + p * PanelBytes();
      const int64_t used = std::min(kPanel, num_outputs - p * kPanel);
      if (used < kPanel) std::memset(panel, 0, PanelBytes());
      for (int64_t m = 0; m < used; ++m) {
        blocks_of(p * kPanel + m, row.data());
        for (int64_t b = 0; b < num_blocks; ++b) {
          StoreBlock(format, row[b], m, panel + b * block_bytes);
        }
      }
    }
  });
}

void PackedMatrix::CopyBlocks(int64_t m, QuantBlock* row) const {
  DETOUR_CHECK(IsQuantized(format_) && m >= 0 && m < num_outputs_, "{} of {}", m, num_outputs_);
  const std::byte* panel = data_.get() + m / kPanel * PanelBytes();
  for (int64_t b = 0; b < NumBlocks(num_inputs_); ++b) {
    row[b] = LoadBlock(format_, m % kPanel, panel + b * QuantBlockBytes(format_));
  }
}

void PackedMatrix::CopyRow(int64_t m, float* row) const {
  DETOUR_CHECK(data_ && m >= 0 && m < num_outputs_, "{} of {}", m, num_outputs_);
  const std::byte* panel = data_.get() + m / kPanel * PanelBytes();
  QuantBlock block;
  for (int64_t k = 0; k < num_inputs_; ++k) {
    const int64_t at = k * kPanel + m % kPanel;
    if (format_ == WeightFormat::kF32) {
      row[k] = reinterpret_cast<const float*>(panel)[at];
    } else if (format_ == WeightFormat::kBf16) {
      row[k] = std::bit_cast<float>(uint32_t{reinterpret_cast<const uint16_t*>(panel)[at]} << 16);
    } else {
      const int64_t i = k % kQuantBlock;
      if (i == 0)
        block = LoadBlock(format_, m % kPanel, panel + k / kQuantBlock * QuantBlockBytes(format_));
      row[k] = Dequantize(format_, block, i);
    }
  }
}

}  // namespace detour::kernels
