#include "infer/answer_text.h"

#include <algorithm>

namespace detour::infer {

std::string AnswerText::Push(std::string_view bytes) {
  text_ += utf8_.Push(bytes);
  return Release(/*final=*/false);
}

std::string AnswerText::Finish(bool mark_unfinished) {
  if (!stopped_ && mark_unfinished) text_ += utf8_.Flush();
  return Release(/*final=*/true);
}

std::string AnswerText::Release(bool final) {
  size_t end = text_.size();
  for (const std::string& s : *stop_) {
    const size_t at = text_.find(s, released_ >= s.size() ? released_ - s.size() : 0);
    if (at != std::string::npos) {
      end = std::min(end, std::max(at, released_));
      stopped_ = true;
    }
  }
  if (!stopped_ && !final) {
    for (const std::string& s : *stop_) {
      for (size_t n = std::min(s.size() - 1, text_.size()); n > 0; --n) {
        if (text_.ends_with(std::string_view(s).substr(0, n))) {
          end = std::min(end, std::max(text_.size() - n, released_));
          break;
        }
      }
    }
  }
  std::string out = text_.substr(released_, end - released_);
  released_ = end;
  if (stopped_) text_.resize(end);
  return out;
}

}  // namespace detour::infer
