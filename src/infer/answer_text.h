// The text of one answer as its tokens come: whole characters, cut before a stop string.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "data/utf8_stream.h"

namespace detour::infer {

class AnswerText {
 public:
  /// `stop` (no empty strings) must outlive this.
  explicit AnswerText(const std::vector<std::string>* stop) : stop_(stop) {}

  /// Text that is certain now; what could still become a stop string is held back.
  std::string Push(std::string_view bytes);
  /// What was held back. A character that lacks its end becomes U+FFFD, or is left out.
  std::string Finish(bool mark_unfinished = true);
  /// Whether a stop string was found.
  bool stopped() const { return stopped_; }

 private:
  std::string Release(bool final);

  const std::vector<std::string>* stop_;
  data::Utf8Stream utf8_;
  std::string text_;
  size_t released_ = 0;
  bool stopped_ = false;
};

}  // namespace detour::infer
