#include "data/pretokenize.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include <algorithm>

#include "core/error.h"
#include "core/json.h"
#include "data/unicode.h"

namespace detour::data {

const char kGpt2Pattern[] =
    R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";
// \w of Rust's regex, which is not Oniguruma's, spelled out.
const char kWordsPattern[] =
    R"([\p{Alphabetic}\p{M}\p{Nd}\p{Pc}\p{Join_Control}]+|[^\p{Alphabetic}\p{M}\p{Nd}\p{Pc}\p{Join_Control}\s]+)";

const std::array<std::string, 256>& ByteCharacters() {
  static const std::array<std::string, 256> characters = [] {
    std::array<std::string, 256> table;
    uint32_t next = 256;
    for (uint32_t b = 0; b < 256; ++b) {
      const bool printable = (b >= '!' && b <= '~') || (b >= 0xA1 && b <= 0xAC) || b >= 0xAE;
      AppendUtf8(printable ? b : next++, &table[b]);
    }
    return table;
  }();
  return characters;
}

std::string ToByteCharacters(std::string_view text) {
  std::string out;
  out.reserve(text.size() + text.size() / 2);
  for (const char c : text) out += ByteCharacters()[static_cast<uint8_t>(c)];
  return out;
}

namespace {

constexpr size_t kMaxPatternBytes = 1 << 16;
// A real pattern needs a few thousand steps per match at most.
constexpr uint32_t kMatchLimit = 5'000'000;
constexpr size_t kJitStackBytes = size_t{16} << 20;

// Oniguruma's word characters in a set, and elsewhere: there the digits ²³¹¼½¾ are words too.
constexpr std::string_view kWordInSet = R"(\p{Alphabetic}\p{M}\p{Nd}\p{Pc})";
constexpr std::string_view kWord =
    R"(\p{Alphabetic}\p{M}\p{Nd}\p{Pc}\x{B2}\x{B3}\x{B9}\x{BC}-\x{BE})";

std::string PcreMessage(int code) {
  PCRE2_UCHAR buffer[256] = {};
  pcre2_get_error_message(code, buffer, sizeof(buffer));
  return reinterpret_cast<const char*>(buffer);
}

/// One pass over the pattern; see OnigurumaToPcre.
class Translator {
 public:
  explicit Translator(std::string_view pattern) : pattern_(pattern) {}

  std::string Run() {
    while (at_ < pattern_.size()) {
      const char c = pattern_[at_];
      if (c == '\\') {
        Escape();
      } else if (depth_ > 0) {
        InSet(c);
      } else if (c == '[') {
        OpenSet();
      } else if (c == '{') {
        Interval();
      } else {
        if (Ahead("(*")) Unsupported("(*");
        Take(1);
      }
    }
    return std::move(out_);
  }

 private:
  [[noreturn]] void Unsupported(const std::string& what) const {
    Fail("data.tokenizer", "pattern \"{}\": unsupported construct \"{}\"", Printable(pattern_),
         Printable(what));
  }
  bool Ahead(std::string_view text) const { return pattern_.substr(at_).starts_with(text); }
  void Take(size_t n) {
    out_ += pattern_.substr(at_, n);
    at_ += n;
  }
  void Replace(size_t n, std::string_view text) {
    out_ += text;
    at_ += n;
  }

  void Escape() {
    if (at_ + 1 == pattern_.size()) Unsupported("\\ at the end");
    const bool in_set = depth_ > 0;
    switch (pattern_[at_ + 1]) {
      case 's':
        return Replace(2, "\\p{White_Space}");
      case 'S':
        return Replace(2, "\\P{White_Space}");
      case 'h':
        return Replace(2, in_set ? "0-9A-Fa-f" : "[0-9A-Fa-f]");
      case 'w':
        return Replace(2, in_set ? std::string(kWordInSet) : fmt::format("[{}]", kWord));
      case 'W':
        if (in_set) Unsupported("\\W in a set");
        return Replace(2, fmt::format("[^{}]", kWord));
      case 'b':
        if (in_set) return Take(2);
        return Replace(2, fmt::format("(?:(?<=[{0}])(?![{0}])|(?<![{0}])(?=[{0}]))", kWord));
      case 'B':
      case 'C':
      case 'E':
      case 'H':
      case 'Q':
      case 'R':
      case 'X':
      case 'O':
      case 'y':
      case 'Y':
        Unsupported(std::string(pattern_.substr(at_, 2)));
      default:
        return Take(2);
    }
  }

  void OpenSet() {
    ++depth_;
    Take(Ahead("[^") ? 2 : 1);
    // A "]" that comes first is a member in both.
    if (Ahead("]")) Replace(1, "\\]");
  }

  void InSet(char c) {
    if (Ahead("[:")) Unsupported("[:");
    if (Ahead("&&")) Unsupported("&&");
    if (Ahead("[^")) Unsupported("[^ in a set");
    if (c == '[') {  // A set in a set is a union: its brackets fall away.
      ++depth_;
      ++at_;
    } else if (c == ']') {
      --depth_;
      Replace(1, depth_ == 0 ? "]" : "");
    } else {
      Take(1);
    }
  }

  void Interval() {
    const size_t close = pattern_.find('}', at_);
    const std::string_view body =
        close == std::string_view::npos ? "" : pattern_.substr(at_ + 1, close - at_ - 1);
    if (body.empty() || body.find_first_not_of("0123456789,") != std::string_view::npos) {
      return Take(1);  // a literal brace
    }
    if (pattern_.substr(close + 1).starts_with('+')) Unsupported("{n,m}+");
    out_ += body.starts_with(',') ? "{0" : "{";
    ++at_;
    Take(body.size() + 1);
  }

  std::string_view pattern_;
  size_t at_ = 0;
  int depth_ = 0;  // open sets
  std::string out_;
};

}  // namespace

std::string OnigurumaToPcre(std::string_view pattern) {
  if (pattern.size() > kMaxPatternBytes) {
    Fail("data.tokenizer", "a pattern of {} bytes: at most {} are read", pattern.size(),
         kMaxPatternBytes);
  }
  return Translator(pattern).Run();
}

struct Regex::Scratch::Impl {
  pcre2_match_data* data = pcre2_match_data_create(1, nullptr);
  pcre2_match_context* context = pcre2_match_context_create(nullptr);
  pcre2_jit_stack* stack = pcre2_jit_stack_create(32 << 10, kJitStackBytes, nullptr);
  Impl() {
    pcre2_set_match_limit(context, kMatchLimit);
    pcre2_jit_stack_assign(context, nullptr, stack);
  }
  ~Impl() {
    pcre2_jit_stack_free(stack);
    pcre2_match_context_free(context);
    pcre2_match_data_free(data);
  }
};

Regex::Scratch::Scratch() : impl_(std::make_unique<Impl>()) {}
Regex::Scratch::~Scratch() = default;

Regex::Regex(const std::string& pattern) {
  int error = 0;
  size_t offset = 0;
  pcre2_code* code = pcre2_compile(
      reinterpret_cast<PCRE2_SPTR>(pattern.data()), pattern.size(),
      PCRE2_UTF | PCRE2_UCP | PCRE2_MULTILINE | PCRE2_NEVER_BACKSLASH_C, &error, &offset, nullptr);
  if (code == nullptr) {
    Fail("data.tokenizer", "pattern \"{}\": {} at byte {}", Printable(pattern), PcreMessage(error),
         offset);
  }
  code_ =
      std::shared_ptr<void>(code, [](void* p) { pcre2_code_free(static_cast<pcre2_code*>(p)); });
  // Where the system forbids generated code the interpreter runs instead, with the same matches.
  pcre2_jit_compile(code, PCRE2_JIT_COMPLETE);
}

bool Regex::Find(std::string_view text, size_t start, Scratch* scratch, Match* match) const {
  Scratch::Impl& impl = *scratch->impl_;
  const int result = pcre2_match(static_cast<const pcre2_code*>(code_.get()),
                                 reinterpret_cast<PCRE2_SPTR>(text.data()), text.size(), start,
                                 PCRE2_NO_UTF_CHECK, impl.data, impl.context);
  if (result == PCRE2_ERROR_NOMATCH) return false;
  // 0: more groups than the one slot, which holds the whole match.
  if (result < 0) Fail("data.tokenizer", "pre-tokenizer pattern: {}", PcreMessage(result));
  const size_t* range = pcre2_get_ovector_pointer(impl.data);
  *match = {range[0], range[1]};
  return true;
}

Pretokenizer::Pretokenizer(const std::vector<PretokenStep>& steps) {
  for (const PretokenStep& step : steps) {
    auto regex = step.separator != Separator::kRegex || step.pattern.empty()
                     ? nullptr
                     : std::make_unique<Regex>(OnigurumaToPcre(step.pattern));
    steps_.push_back({step, std::move(regex)});
  }
}

void Pretokenizer::Split(std::string_view text, PieceStart start, Regex::Scratch* scratch,
                         const PieceFn& emit) const {
  Run(0, text, start, {scratch, emit, HasNewCharacter(text)});
}

namespace {

/// Whether a piece of kind `match` continues the one before it.
bool Joins(SplitBehavior behavior, bool previous_match, bool match) {
  switch (behavior) {
    case SplitBehavior::kContiguous:
      return previous_match == match;
    case SplitBehavior::kMergedWithPrevious:
      return match && !previous_match;
    case SplitBehavior::kMergedWithNext:
      return previous_match && !match;
    case SplitBehavior::kIsolated:
    case SplitBehavior::kRemoved:
      return false;
  }
  return false;
}

template <typename F>
void ForEachOfKind(bool (*is_kind)(uint32_t), std::string_view text, F&& f) {
  size_t done = 0;
  ForEachCharacter(text, [&](uint32_t c, size_t begin, size_t end) {
    if (!is_kind(c)) return;
    if (done < begin) f(done, begin, false);
    f(begin, end, true);
    done = end;
  });
  if (done < text.size()) f(done, text.size(), false);
}

template <typename F>
void ForEachSeparator(const PretokenStep& step, const Regex* regex, std::string_view text,
                      Regex::Scratch* scratch, F&& f) {
  switch (step.separator) {
    case Separator::kRegex:
      return ForEachMatch(*regex, text, scratch, f);
    case Separator::kText:
      return ForEachLiteral(step.pattern, text, f);
    case Separator::kNumeric:
      return ForEachOfKind(IsNumeric, text, f);
    case Separator::kPunctuation:
      return ForEachOfKind(IsPunctuation, text, f);
    case Separator::kWhiteSpace:
      return ForEachOfKind(IsWhiteSpace, text, f);
  }
}

/// `piece` with a mark for each ' ' and perhaps one in front.
std::string Mark(const PretokenStep& step, std::string_view piece, PieceStart* start) {
  const bool add =
      !start->continues && (step.prepend == PrependScheme::kAlways ||
                            (step.prepend == PrependScheme::kFirst && start->of_first));
  std::string out;
  out.reserve(piece.size() + piece.size() / 2 + step.metaspace.size());
  size_t of_first = 0;
  ForEachLiteral(" ", piece, [&](size_t begin, size_t end, bool is_space) {
    if (start->of_first > begin) {
      of_first = is_space ? out.size() + step.metaspace.size()
                          : out.size() + std::min(start->of_first, end) - begin;
    }
    out += is_space ? std::string_view(step.metaspace) : piece.substr(begin, end - begin);
  });
  if (add && !out.starts_with(step.metaspace)) {
    out.insert(0, step.metaspace);
    if (of_first > 0) of_first += step.metaspace.size();
  }
  start->of_first = of_first;
  return out;
}

}  // namespace

void Pretokenizer::Run(size_t step_idx, std::string_view piece, PieceStart start,
                       const Call& call) const {
  if (piece.empty()) return;
  if (step_idx == steps_.size()) return call.emit(piece);
  const PretokenStep& step = steps_[step_idx].spec;
  if (!step.metaspace.empty()) {
    const std::string marked = Mark(step, piece, &start);
    if (!step.split) return Run(step_idx + 1, marked, start, call);
    size_t begin = 0;
    while (begin < marked.size()) {
      size_t end = marked.find(step.metaspace, begin + 1);
      if (end == std::string::npos) end = marked.size();
      Run(step_idx + 1, std::string_view(marked).substr(begin, end - begin), start.Part(begin),
          call);
      begin = end;
    }
    return;
  }
  if (step.add_prefix_space && piece.front() != ' ' && !start.continues) {
    std::string prefixed;
    prefixed.reserve(piece.size() + 1);
    prefixed.append(" ").append(piece);
    if (start.of_first > 0) ++start.of_first;
    return Cut(step_idx, prefixed, start, call);
  }
  Cut(step_idx, piece, start, call);
}

void Pretokenizer::Cut(size_t step_idx, std::string_view piece, PieceStart start,
                       const Call& call) const {
  const PretokenStep& step = steps_[step_idx].spec;
  const Regex* regex = steps_[step_idx].regex.get();
  const bool emits = step_idx + 1 == steps_.size() && !step.byte_characters;
  const auto next = [&](size_t begin, size_t end) {
    const std::string_view part = piece.substr(begin, end - begin);
    if (emits) return call.emit(part);  // never empty: flush passes none on
    PieceStart part_start = start.Part(begin);
    if (!step.byte_characters) return Run(step_idx + 1, part, part_start, call);
    part_start.of_first = ToByteCharacters(part.substr(0, part_start.of_first)).size();
    Run(step_idx + 1, ToByteCharacters(part), part_start, call);
  };
  if (step.separator == Separator::kRegex && regex == nullptr) return next(0, piece.size());

  Regex::Match pending;
  bool pending_match = false;
  const auto flush = [&] {
    if (pending.begin == pending.end) return;
    if (pending_match && step.behavior == SplitBehavior::kRemoved) return;
    next(pending.begin, pending.end);
  };
  const auto add = [&](size_t begin, size_t end, bool match) {
    match ^= step.invert;
    if (Joins(step.behavior, pending_match, match) && begin > 0) {
      pending.end = end;
    } else {
      flush();
      pending = {begin, end};
    }
    pending_match = match;
  };
  std::string old;
  if (call.has_new && regex != nullptr) old = ReplaceNewCharacters(piece);
  ForEachSeparator(step, regex, old.empty() ? piece : std::string_view(old), call.scratch, add);
  flush();
}

}  // namespace detour::data
