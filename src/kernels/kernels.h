// The CPU kernels that every value of a model comes from, in training and in serving.
//
// Contract (docs/architecture.md): an output element is a function of its inputs alone. It never
// depends on the number of rows in the call, their order, the threads, padding, or the SIMD target
// (AVX2 and AVX-512 give equal bits):
//   - matrix products: lanes over outputs, acc = fma(x_k, w_mk, acc) for k = 0, 1, …, from +0;
//   - reductions to one number: 16 virtual lanes (element i into lane i mod 16, ascending i, from
//     +0), then the fixed tree lane[j] += lane[j + h] for h = 8, 4, 2, 1;
//   - attention: see Attend;
//   - exp: the polynomial of reference::Exp; no approximate reciprocals; IEEE division and sqrt.
// Each kernel equals its scalar twin in kernels/reference.h bit for bit (NaNs: some NaN for a NaN).
//
// All data is f32 unless said; no alignment is required; pointers must not alias unless said;
// strides (`ld*`) are in elements. Parallel over rows or outputs with core/threads.h; may be called
// from several threads at once. Working memory is kept per thread between calls.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

namespace detour::kernels {

// --- SIMD target

enum class Simd { kAuto, kAvx2, kAvx512 };
/// Chooses the target of every later call. Throws Error("kernels.simd") where the CPU lacks it;
/// a CPU without AVX2+FMA has none, and every kernel throws this error there. Not thread-safe.
void SetSimd(Simd simd);
/// "auto" | "avx2" | "avx512"; Error("flag.simd") otherwise.
Simd ParseSimd(const std::string& name);
/// The target in force, "avx2" or "avx512".
std::string SimdName();

// --- Matrix product

/// How a matrix keeps its weights. Each is one exact definition, the same on every target.
enum class WeightFormat {
  kF32,
  kBf16,   ///< rounded to nearest, ties to even; products as in f32
  kQ8,     ///< w = scale · q, q in −127..127 (GGUF's Q8_0): 8.5 bits a weight
  kQ4,     ///< w = scale · (q − 8), q in 0..15 (Q4_0): 4.5 bits
  kQ4Min,  ///< w = scale · q + min, q in 0..15 (Q4_1): 5 bits
};
/// "f32", "bf16", "q8", "q4" or "q4min"; Error("flag.weights") otherwise.
WeightFormat ParseWeightFormat(const std::string& name);
inline bool IsQuantized(WeightFormat format) { return format >= WeightFormat::kQ8; }

/// Inputs that share a scale in the formats kQ8, kQ4, kQ4Min.
inline constexpr int64_t kQuantBlock = 32;
/// Blocks of x below this are zeros: 127 / x would be no number.
inline constexpr float kLeastQuantized = 0x1p-120f;
/// One output's weights of one block; scale and min are f16 bits. Missing inputs are 0 (kQ4: 8).
struct QuantBlock {
  uint16_t scale = 0, min = 0;
  int8_t q[kQuantBlock] = {};
};

/// W [M,K] packed for Gemm, 64-byte aligned: ceil(M/32) panels of 32 outputs. kF32, kBf16:
/// [K][32]. The others: for each block of inputs the numbers, then the scales [32] and minima [32]
/// as f16; kQ8 [8][32][4] int8, input 4 g + i at [g][·][i]; kQ4 [4][32][4] bytes, inputs 8 g + i in
/// the low half and 8 g + 4 + i in the high half of [g][·][i]. Missing outputs are zero.
class PackedMatrix {
 public:
  PackedMatrix() = default;
  PackedMatrix(PackedMatrix&&) = default;
  PackedMatrix& operator=(PackedMatrix&&) = default;
  /// Copies row-major W [M,K] with row stride `ldw`. Cost: M·K reads and writes. Keeps a buffer
  /// that is large enough. Quantized as GGUF does: scale = f16(largest |w| / 127), q8; f16(w of
  /// largest magnitude / −8), q4; f16((max − min) / 15), q4min; by nearest q.
  /// Error("weights.range") if a scale does not fit f16, or a weight to be quantized is no number.
  void Pack(const float* w, int64_t num_outputs, int64_t num_inputs, int64_t ldw,
            WeightFormat format = WeightFormat::kF32);
  /// The same in f32 of row-major Wᵀ [K,M] with row stride `ldw`.
  void PackTransposed(const float* w_KM, int64_t num_outputs, int64_t num_inputs, int64_t ldw);
  /// Weights that are quantized already: blocks_of(m, row) fills the ceil(K/32) blocks of output m;
  /// called from several threads.
  void PackBlocks(WeightFormat format, int64_t num_outputs, int64_t num_inputs,
                  const std::function<void(int64_t m, QuantBlock* row)>& blocks_of);
  /// The weights of output m as the products see them, [K].
  void CopyRow(int64_t m, float* row) const;
  /// The blocks of output m of a quantized matrix, [ceil(K/32)].
  void CopyBlocks(int64_t m, QuantBlock* row) const;
  int64_t num_outputs() const { return num_outputs_; }
  int64_t num_inputs() const { return num_inputs_; }
  WeightFormat format() const { return format_; }
  const std::byte* data() const { return data_.get(); }
  int64_t PanelBytes() const;
  int64_t bytes() const;

 private:
  void Allocate(int64_t num_outputs, int64_t num_inputs, WeightFormat format, bool lasting);
  int64_t num_outputs_ = 0, num_inputs_ = 0, capacity_ = 0;
  WeightFormat format_ = WeightFormat::kF32;
  std::shared_ptr<std::byte[]> data_;  // of this matrix alone; shared is the chunk around it
};

/// y_NM = x_NK Wᵀ (+ bias_M, added last). bias may be null. N = 0 is fine. Adds 2·N·M·K to the op
/// counter. Against quantized weights x is quantized too, each row in blocks of 32: s = largest |x|
/// / 127, q_k = nearest(x_k · (127 / largest |x|)), ties to even; then per output, for the blocks
/// in order, acc = fma(dot, s · scale, acc) with dot = Σ q_x q_w in integers, from +0, and for
/// kQ4Min acc = fma(Σ q_x, s · min, acc) after it. A block of x with a NaN or an infinity makes
/// NaN.
void Gemm(const float* x, int64_t ldx, int64_t num_rows, const PackedMatrix& w, const float* bias,
          float* y, int64_t ldy);

/// A product of a backward pass: as Gemm, but x may be [K,N], and y may be added to (its sums then
/// begin at y instead of +0). W is not quantized. The op counter, which counts forward passes,
/// stays.
struct GemmForm {
  bool transposed = false, add = false;
};
void GemmBackward(const float* x, int64_t ldx, int64_t num_rows, const PackedMatrix& w,
                  GemmForm form, float* y, int64_t ldy);

// --- Attention over pages

inline constexpr int64_t kPageEntries = 16;
inline constexpr int64_t kMaxHeadDim = 512;

/// A page holds up to 16 entries of one layer of one sequence: Kᵀ [G][K][16] (rotated keys), then V
/// [G][16][K], then, if `with_positions`, int32 positions [16]. With `block_pages` a block is that
/// many pages, and each full page ends with the sum [G][K] of the keys of its block so far. 64-byte
/// aligned. Unwritten entries are never read as values.
struct KvLayout {
  int64_t num_kv_heads = 0, head_dim = 0;
  bool with_positions = false;
  int64_t block_pages = 0;
  int64_t PositionsAt() const { return 2 * num_kv_heads * head_dim * kPageEntries; }  ///< floats
  int64_t SumsAt() const { return PositionsAt() + (with_positions ? kPageEntries : 0); }
  int64_t PageBytes() const {
    const int64_t sums = (num_kv_heads * head_dim + 15) / 16 * 16;
    return (SumsAt() + (block_pages > 0 ? sums : 0)) * 4;
  }
  /// Position of an entry of a page table; the layout has positions.
  int32_t Position(const float* const* pages, int64_t entry) const {
    return reinterpret_cast<const int32_t*>(pages[entry / kPageEntries] +
                                            PositionsAt())[entry % kPageEntries];
  }
};

/// Writes entry `slot` (0..15) of `page`: k_GK, v_GK, and the position if the layout has them.
void WriteKv(const KvLayout& layout, float* page, int64_t slot, const float* k_GK,
             const float* v_GK, int32_t position);

/// The same for many rows: row r goes to entry first_entry + r of the page table `pages`. k row
/// stride ldk, v row stride ldv.
void WriteKvRows(const KvLayout& layout, float* const* pages, int64_t first_entry, int64_t num_rows,
                 const float* k, int64_t ldk, const float* v, int64_t ldv,
                 const int32_t* positions);

/// Entries [0, kept) and [begin, end) of a page table, kept <= begin.
struct RowView {
  int64_t kept = 0, begin = 0, end = 0;
};

/// Query rows [row_begin, row_begin + num_rows) of one sequence; row i sees entries [0, first_limit
/// + i) of `pages`, or with `views` those of views[i]. With `head` >= 0 that query head alone.
struct AttendSegment {
  const float* const* pages = nullptr;
  int64_t row_begin = 0, num_rows = 0, first_limit = 0;
  const RowView* views = nullptr;
  int64_t head = -1;

  RowView View(int64_t i) const { return views ? views[i] : RowView{0, 0, first_limit + i}; }
};

/// out_RHK = softmax(scale · q kᵀ) v per query row and head; query head h reads kv head h / (H/G).
/// Per (row, head): s_j = scale · (fma over d = 0..K-1 of q_d k_jd, from +0); m = max_j s_j; p_j =
/// exp(s_j − m); l = virtual-lane sum of p_j by entry index j; o_d = fma over j = 0, 1, … of p_j
/// v_jd, from +0; out_d = o_d / l. j runs over the entries the row sees, by their place in `pages`:
/// an entry's lane is its slot. If lse_RH is not null: lse = m + ln(l) (libm double log, rounded).
/// Requires that each row sees an entry, and K <= kMaxHeadDim. Scratch: 24 × keys floats per thread
/// (fewer for fewer queries). Adds 4·K·H per visited (row, key) to the op counter.
void Attend(const KvLayout& layout, int64_t num_heads, float scale, const float* q, int64_t ldq,
            std::span<const AttendSegment> segments, float* out, int64_t ldout, float* lse_RH);

/// Query rows [row_begin, row_begin + num_rows) of one sequence, row i being entry first_entry + i
/// of `pages`, of which each query head sees `top` blocks of layout.block_pages pages: chosen_RHT,
/// ascending, of this segment's rows, the last the row's own block, of that up to itself.
struct BlockSegment {
  const float* const* pages = nullptr;
  int64_t row_begin = 0, num_rows = 0, first_entry = 0, top = 0;
  const int32_t* chosen_RHT = nullptr;
};
/// Attend, the same bits as over a table of each query head's own blocks. Queries of up to 128 rows
/// that chose a block read it together. Scratch: as many scores as they see, at most 1 MB or 16
/// rows' a thread. Counted as Attend.
void AttendBlocks(const KvLayout& layout, int64_t num_heads, float scale, const float* q,
                  int64_t ldq, const BlockSegment& segment, float* out, int64_t ldout,
                  float* lse_RH);
/// scores [H, R, num_blocks] = q · (sum of the block's keys), fma over d = 0..K-1 from +0, of R
/// query rows and the first blocks of a page table, all full.
void ScoreBlocks(const KvLayout& layout, int64_t num_heads, const float* q, int64_t ldq,
                 int64_t num_rows, const float* const* pages, int64_t num_blocks,
                 float* scores_HRB);

/// Query rows [row_begin, row_begin + num_rows) among a table of entries, of which entry e is row
/// `entries`[e] of k and v (null: first_entry + e). Row i sees entries [0, first_limit + i), or
/// with `views` those of views[i]. With `rows_of_head` head h of the rows rows_of_head[h] queries
/// instead, each all entries.
struct AttendGradSegment {
  int64_t row_begin = 0, num_rows = 0, num_entries = 0, first_entry = 0, first_limit = 0;
  const int32_t* entries = nullptr;
  const RowView* views = nullptr;
  const std::vector<int32_t>* rows_of_head = nullptr;

  int64_t NumRows(int64_t head) const {
    return rows_of_head ? std::ssize(rows_of_head[head]) : num_rows;
  }
  int64_t Row(int64_t head, int64_t i) const {
    return rows_of_head ? rows_of_head[head][i] : row_begin + i;
  }
  int64_t Entry(int64_t e) const { return entries ? entries[e] : first_entry + e; }
  RowView View(int64_t i) const {
    if (rows_of_head) return {0, 0, num_entries};
    return views ? views[i] : RowView{0, 0, first_limit + i};
  }
};
/// q, out, dout, dq [R, H·K]; k, v, dk, dv [W, G·K]; lse [R, H]; all rows contiguous.
struct AttendGradArgs {
  int64_t num_heads = 0, num_kv_heads = 0, head_dim = 0;
  float scale = 1;
  const float *q = nullptr, *k = nullptr, *v = nullptr, *out = nullptr, *lse_RH = nullptr,
              *dout = nullptr;
  float *dq = nullptr, *dk = nullptr, *dv = nullptr;
};
/// Gradients of Attend, whose results `out` and `lse` are, added to dq, dk and dv; a row may be in
/// several segments. Every sum has one order, whatever runs it. Costs 10·K·H per (row, entry)
/// of the panels of 32 entries that a block of up to 96 rows sees, and memory of 2·H + 3·G copies
/// of the entries of a segment. Not counted.
void AttendBackward(const AttendGradArgs& args, std::span<const AttendGradSegment> segments);

// --- Rows

/// y_ND = (x · (1 / sqrt(Σx²/D + eps))) · w_D; inv_rms_N is written if not null.
void RmsNorm(const float* x, int64_t num_rows, int64_t dim, const float* w, float eps, float* y,
             float* inv_rms_N);
/// dx_ND (overwritten) and dw_D (overwritten) of the above. dw is summed over rows in row order
/// within 64-row chunks, the chunks in order: independent of threads.
void RmsNormBackward(const float* dy, const float* x, const float* w, const float* inv_rms_N,
                     int64_t num_rows, int64_t dim, float* dx, float* dw);

/// Half-split rotary embedding (Llama): for i < K/2 of each of `num_heads` heads of row r, with (c,
/// s) = table row of positions[r]: y_i = x_i c_i − x_{i+K/2} s_i ; y_{i+K/2} = x_{i+K/2} c_i + x_i
/// s_i. `inverse` negates s. x == y allowed. cos_sin: [max_position][2][K/2] f32. Second products
/// are rounded, then fused: fma(x_i, c_i, −(x_{i+K/2}·s_i)).
void Rope(const float* x, int64_t ldx, int64_t num_rows, int64_t num_heads, int64_t head_dim,
          const int32_t* positions, const float* cos_sin, bool inverse, float* y, int64_t ldy);

/// h = (g / (1 + exp(−g))) · u over n elements.
void SiluMul(const float* g, const float* u, int64_t n, float* h);
/// dg, du of the above; dg may alias g, du may alias u.
void SiluMulBackward(const float* dh, const float* g, const float* u, int64_t n, float* dg,
                     float* du);
/// y = x / (1 + exp(−x)), and its backward dx = dy · σ(x)(1 + x(1 − σ(x))).
void Silu(const float* x, int64_t n, float* y);
void SiluBackward(const float* dy, const float* x, int64_t n, float* dx);
/// y = 1 / (1 + exp(−x)).
void Sigmoid(const float* x, int64_t n, float* y);
/// y = exp(x) as everywhere in these kernels: within 1 ulp, +0 below 2^−126.
void Exp(const float* x, int64_t n, float* y);

/// y_ND = fma(weight_N, f_ND, x_ND); with weight null: x + f. y may alias x or f.
void AddScaledRows(const float* x, const float* f, const float* weight_N, int64_t num_rows,
                   int64_t dim, float* y);

/// y_RD = x[rows_R] ; and y[rows_R] = x_RD. Row strides given.
void GatherRows(const float* x, int64_t ldx, const int32_t* rows, int64_t num_rows, int64_t dim,
                float* y, int64_t ldy);
void ScatterRows(const float* x, int64_t ldx, const int32_t* rows, int64_t num_rows, int64_t dim,
                 float* y, int64_t ldy);

/// y[rows_R]: each kv head's value repeated for its H/G query heads: y_{h,d} = v_{h/(H/G), d}. v
/// rows are v[rows_R].
void RepeatKvRows(const float* v, int64_t ldv, const int32_t* rows, int64_t num_rows,
                  int64_t num_kv_heads, int64_t num_heads, int64_t head_dim, float* y, int64_t ldy);

/// loss_N = ln Σ_v exp(logit_v − max) + max − logit_target (libm double log, rounded); target < 0
/// gives 0, target >= vocab fails a CHECK. In place, if `write_gradient`: logits become (softmax −
/// onehot) · gradient_scale, zero for target < 0.
void CrossEntropyRows(float* logits, int64_t num_rows, int64_t vocab, const int32_t* targets,
                      bool write_gradient, float gradient_scale, float* loss_N);

}  // namespace detour::kernels
