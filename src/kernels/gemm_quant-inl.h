// The products of gemm_quant.cc, in the namespace and for the target that include it: once per SIMD
// target, and with DETOUR_QUANT_VNNI for AVX-512 with its dot product of bytes. No include guard.

using DI = hn::RebindToSigned<D>;
using D16 = hn::Repartition<int16_t, D>;
using DU16 = hn::Repartition<uint16_t, D>;
using DU8 = hn::Repartition<uint8_t, D>;
using VI = hn::Vec<DI>;
using V16 = hn::Vec<D16>;
inline constexpr DI di{};
inline constexpr D16 d16{};
inline constexpr DU16 du16{};
inline constexpr DU8 du8{};

// Integer and float accumulators of 6 × 2 vectors fill AVX-512's registers, of 2 × 2 AVX2's.
constexpr int kQuantRows = kLanes == 16 ? 6 : 2;
constexpr int kQuantVectors = 2;
// A single row reads weights faster than the hardware fetches them ahead.
constexpr int64_t kAhead = 4096;

HWY_INLINE hn::Vec<DU16> LoadWords(const std::byte* p) {
  return hn::BitCast(du16, hn::LoadU(du8, reinterpret_cast<const uint8_t*>(p)));
}

/// The halves of bytes that hold group `g` of four bits, as bytes.
HWY_INLINE hn::Vec<DU8> LoadHalfBytes(const std::byte* lanes, int g, int v) {
  const auto words = LoadWords(lanes + g / 2 * kPanel * 4 + v * kLanes * 4);
  return hn::BitCast(
      du8, hn::And(g % 2 == 0 ? words : hn::ShiftRight<4>(words), hn::Set(du16, uint16_t{0x0F0F})));
}

/// Four inputs of kLanes outputs, and of one row of x.
#if DETOUR_QUANT_VNNI
// Unsigned times signed bytes: weights of kQ8 are moved up by 128, which the start of the sum
// undoes.
struct QuantizedBlock {
  int32_t groups[8];
  int32_t sum;
  float scale;
  void Set(int g, const int32_t* q) {
    uint32_t bytes = 0;
    for (int i = 0; i < 4; ++i) bytes |= (static_cast<uint32_t>(q[i]) & 0xffu) << 8 * i;
    groups[g] = static_cast<int32_t>(bytes);
  }
};
struct Group {
  hn::Vec<DU8> w;
};

template <WeightFormat kFormat>
HWY_INLINE Group LoadGroup(const std::byte* lanes, int g, int v) {
  if constexpr (kFormat != WeightFormat::kQ8) return {LoadHalfBytes(lanes, g, v)};
  const auto bytes = hn::BitCast(du8, LoadWords(lanes + g * kPanel * 4 + v * kLanes * 4));
  return {hn::Xor(bytes, hn::Set(du8, uint8_t{0x80}))};
}

HWY_INLINE VI AddDot(const Group& group, const QuantizedBlock& x, int g, VI sum) {
  return VI{_mm512_dpbusd_epi32(sum.raw, group.w.raw, hn::Set(di, x.groups[g]).raw)};
}
constexpr int32_t kQ8Offset = 128;
#else
// Pairs of 16-bit numbers: inputs 0 and 2 beside each other, and 1 and 3.
struct QuantizedBlock {
  int32_t even[8], odd[8];
  int32_t sum;
  float scale;
  void Set(int g, const int32_t* q) {
    const auto pair = [](int32_t low, int32_t high) {
      return static_cast<int32_t>(static_cast<uint32_t>(high) << 16 |
                                  (static_cast<uint32_t>(low) & 0xffffu));
    };
    even[g] = pair(q[0], q[2]);
    odd[g] = pair(q[1], q[3]);
  }
};
struct Group {
  V16 even, odd;
};

template <WeightFormat kFormat>
HWY_INLINE Group LoadGroup(const std::byte* lanes, int g, int v) {
  if constexpr (kFormat == WeightFormat::kQ8) {
    const auto words = LoadWords(lanes + g * kPanel * 4 + v * kLanes * 4);
    return {hn::ShiftRight<8>(hn::BitCast(d16, hn::ShiftLeft<8>(words))),
            hn::ShiftRight<8>(hn::BitCast(d16, words))};
  } else {
    const auto words = hn::BitCast(du16, LoadHalfBytes(lanes, g, v));
    return {hn::BitCast(d16, hn::And(words, hn::Set(du16, uint16_t{0x00FF}))),
            hn::BitCast(d16, hn::ShiftRight<8>(words))};
  }
}

HWY_INLINE VI AddDot(const Group& group, const QuantizedBlock& x, int g, VI sum) {
  VI unused = hn::Zero(di);
  const V16 even = hn::BitCast(d16, hn::Set(di, x.even[g]));
  const V16 odd = hn::BitCast(d16, hn::Set(di, x.odd[g]));
  sum = hn::ReorderWidenMulAccumulate(di, group.even, even, sum, unused);
  return hn::ReorderWidenMulAccumulate(di, group.odd, odd, sum, unused);
}
constexpr int32_t kQ8Offset = 0;
#endif

HWY_INLINE V LoadHalves(const std::byte* p) {
  const hn::Rebind<hwy::float16_t, D> half;
  return hn::PromoteTo(d, hn::LoadU(half, reinterpret_cast<const hwy::float16_t*>(p)));
}

/// What the numbers that LoadGroup gives are too large by.
constexpr int32_t OffsetOf(WeightFormat format) {
  return format == WeightFormat::kQ8 ? kQ8Offset : format == WeightFormat::kQ4 ? 8 : 0;
}

/// y[r][0, 2 · kLanes) = x W for kRows rows; `lane` is the first output in its panel.
template <WeightFormat kFormat, int kRows>
void QuantTile(const QuantizedBlock* x, int64_t num_blocks, const std::byte* panel, int64_t lane,
               float* y, int64_t ldy) {
  V acc[kRows][kQuantVectors];
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kQuantVectors; ++v) acc[r][v] = hn::Zero(d);
  }
  for (int64_t b = 0; b < num_blocks; ++b, panel += QuantBlockBytes(kFormat)) {
    const QuantizedBlock* block = x + b;
    const std::byte* lanes = panel + lane * 4;
    if constexpr (kRows <= 2) {
      for (int64_t at = 0; at < QuantBlockBytes(kFormat); at += 64)
        hwy::Prefetch(panel + kAhead + at);
    }
    VI dot[kRows][kQuantVectors];
    for (int r = 0; r < kRows; ++r) {
      const int32_t from = -OffsetOf(kFormat) * block[r * num_blocks].sum;
      for (int v = 0; v < kQuantVectors; ++v) dot[r][v] = hn::Set(di, from);
    }
    HWY_UNROLL(8)
    for (int g = 0; g < 8; ++g) {
      Group w[kQuantVectors];
      for (int v = 0; v < kQuantVectors; ++v) w[v] = LoadGroup<kFormat>(lanes, g, v);
      for (int r = 0; r < kRows; ++r) {
        for (int v = 0; v < kQuantVectors; ++v) {
          dot[r][v] = AddDot(w[v], block[r * num_blocks], g, dot[r][v]);
        }
      }
    }
    const std::byte* scales = panel + QuantNumberBytes(kFormat) + lane * 2;
    for (int v = 0; v < kQuantVectors; ++v) {
      const V scale = LoadHalves(scales + v * kLanes * 2);
      for (int r = 0; r < kRows; ++r) {
        const V s = hn::Mul(hn::Set(d, block[r * num_blocks].scale), scale);
        acc[r][v] = hn::MulAdd(hn::ConvertTo(d, dot[r][v]), s, acc[r][v]);
      }
      if constexpr (kFormat == WeightFormat::kQ4Min) {
        const V min = LoadHalves(scales + (kPanel + v * kLanes) * 2);
        for (int r = 0; r < kRows; ++r) {
          const QuantizedBlock& q = block[r * num_blocks];
          const V s = hn::Mul(hn::Set(d, q.scale), min);
          acc[r][v] = hn::MulAdd(hn::Set(d, static_cast<float>(q.sum)), s, acc[r][v]);
        }
      }
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kQuantVectors; ++v) hn::StoreU(acc[r][v], d, y + r * ldy + v * kLanes);
  }
}

/// Inputs [0, n) of a block, n <= 32; the others are 0.
void QuantizeBlock(const float* x, int64_t n, QuantizedBlock* to) {
  alignas(64) float whole[kQuantBlock] = {};
  std::memcpy(whole, x, n * sizeof(float));
  // The bits of |x| as integers: a NaN is the largest of all.
  VI largest = hn::Zero(di);
  const VI magnitude = hn::Set(di, 0x7fffffff);
  for (int64_t i = 0; i < kQuantBlock; i += kLanes) {
    const VI bits = hn::And(hn::BitCast(di, hn::Load(d, whole + i)), magnitude);
    largest = hn::Max(largest, bits);
  }
  const int32_t top = hn::GetLane(hn::MaxOfLanes(di, largest));
  const float max = std::bit_cast<float>(top);
  const bool finite = top < 0x7f800000;
  const float inverse = finite && max >= kLeastQuantized ? 127.0f / max : 0.0f;
  alignas(64) int32_t q[kQuantBlock];
  VI sum = hn::Zero(di);
  for (int64_t i = 0; i < kQuantBlock; i += kLanes) {
    const V scaled = hn::Mul(hn::Load(d, whole + i), hn::Set(d, inverse));
    const VI nearest = finite ? hn::NearestInt(scaled) : hn::Zero(di);
    hn::Store(nearest, di, q + i);
    sum = hn::Add(sum, nearest);
  }
  for (int g = 0; g < 8; ++g) to->Set(g, q + 4 * g);
  to->sum = hn::GetLane(hn::SumOfLanes(di, sum));
  to->scale = finite ? max / 127.0f : std::numeric_limits<float>::quiet_NaN();
}

using QuantTileFn = decltype(&QuantTile<WeightFormat::kQ8, 1>);

template <WeightFormat kFormat, int... kRows>
constexpr std::array<QuantTileFn, kQuantRows> QuantTiles(std::integer_sequence<int, kRows...>) {
  return {&QuantTile<kFormat, kRows + 1>...};
}
template <WeightFormat kFormat>
constexpr auto kQuantTiles = QuantTiles<kFormat>(std::make_integer_sequence<int, kQuantRows>());

const std::array<QuantTileFn, kQuantRows>& QuantTilesOf(WeightFormat format) {
  if (format == WeightFormat::kQ8) return kQuantTiles<WeightFormat::kQ8>;
  if (format == WeightFormat::kQ4) return kQuantTiles<WeightFormat::kQ4>;
  return kQuantTiles<WeightFormat::kQ4Min>;
}

void RunQuantGemmBlock(const GemmArgs& args, const GemmBlock& block) {
  const PackedMatrix& w = *args.w;
  const auto& tiles = QuantTilesOf(w.format());
  const int64_t num_rows = block.row_end - block.row_begin;
  const int64_t num_blocks = (w.num_inputs() + kQuantBlock - 1) / kQuantBlock;
  auto* x = reinterpret_cast<QuantizedBlock*>(
      ScratchFloats(num_rows * num_blocks * sizeof(QuantizedBlock) / sizeof(float)));
  for (int64_t r = 0; r < num_rows; ++r) {
    const float* from = args.x + (block.row_begin + r) * args.ldx;
    for (int64_t b = 0; b < num_blocks; ++b) {
      QuantizeBlock(from + b * kQuantBlock, std::min(kQuantBlock, w.num_inputs() - b * kQuantBlock),
                    x + r * num_blocks + b);
    }
  }
  constexpr int64_t kWidth = kQuantVectors * kLanes;
  const int64_t num_tiles = (num_rows + kQuantRows - 1) / kQuantRows;
  const int64_t end = std::min(block.panel_end * kPanel, w.num_outputs());
  for (int64_t column = block.panel_begin * kPanel; column < end; column += kWidth) {
    const std::byte* panel = w.data() + column / kPanel * w.PanelBytes();
    const int64_t used = std::min(kWidth, end - column);
    // A panel stays in the cache while the row tiles pass over it.
    for (int64_t t = 0; t < num_tiles; ++t) {
      const int64_t r = num_rows * t / num_tiles, rows = num_rows * (t + 1) / num_tiles - r;
      float* y = args.y + (block.row_begin + r) * args.ldy + column;
      alignas(64) float whole[kQuantRows * kWidth];
      const bool all = used == kWidth;
      tiles[rows - 1](x + r * num_blocks, num_blocks, panel, column % kPanel, all ? y : whole,
                      all ? args.ldy : kWidth);
      for (int64_t i = 0; !all && i < rows; ++i) {
        std::copy_n(whole + i * kWidth, used, y + i * args.ldy);
      }
      if (args.bias) AddBias(args.bias + column, rows, used, y, args.ldy);
    }
  }
}
