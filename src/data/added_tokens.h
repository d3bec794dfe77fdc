// Tokens that are found in the text before everything else.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "data/unicode.h"

namespace detour::data {

struct AddedToken {
  int32_t id = 0;
  std::string content;
  bool single_word = false, lstrip = false, rstrip = false, normalized = false, special = false;
};

/// Finds added tokens: leftmost, the longest first.
class AddedTokenFinder {
 public:
  /// Requires that `content` is not empty. Returns false, and changes nothing, if it is there.
  bool Add(std::string_view content, int32_t idx);
  bool empty() const { return edges_.empty(); }

  /// The first match at or after `start`: its begin, end and the idx it was added with.
  struct Match {
    size_t begin, end;
    int32_t idx;
  };
  bool Find(std::string_view text, size_t start, Match* match) const;

 private:
  std::array<bool, 256> first_{};
  std::unordered_map<uint64_t, uint32_t> edges_;  // node << 8 | byte -> node
  std::vector<int32_t> idx_ = {-1};               // of the token that ends at a node, or -1
};

/// Where the white space that ends `text` begins, and where that which `text` has at `begin` ends.
size_t TrailingSpace(std::string_view text);
size_t SkipSpace(std::string_view text, size_t begin);
/// Whether text[begin, end) has no word character beside it.
bool StandsAlone(std::string_view text, size_t begin, size_t end);

/// Cuts `text` (well-formed UTF-8) at the tokens in `finder`, whose idx count in `tokens`. Calls
/// plain(begin, end) for what is between them, if not empty, and found(token), in order.
template <typename Plain, typename Found>
void SplitAtAddedTokens(std::string_view text, const AddedTokenFinder& finder,
                        const std::vector<AddedToken>& tokens, bool parse_special, Plain&& plain,
                        Found&& found) {
  size_t done = 0;
  AddedTokenFinder::Match match;
  for (size_t at = 0; finder.Find(text, at, &match); at = match.end) {
    const AddedToken& token = tokens[match.idx];
    if (token.special && !parse_special) continue;
    if (token.single_word && !StandsAlone(text, match.begin, match.end)) continue;
    size_t begin = match.begin, end = match.end;
    if (token.lstrip) begin = std::max(TrailingSpace(text.substr(0, begin)), done);
    if (token.rstrip) end = SkipSpace(text, end);
    if (done < begin) plain(done, begin);
    found(token);
    done = end;
  }
  if (done < text.size()) plain(done, text.size());
}

}  // namespace detour::data
