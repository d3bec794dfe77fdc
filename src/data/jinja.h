// Chat templates: an interpreter for the part of Jinja that they use, with the values of Python
// that jinja2 3.1.6 and transformers give. Templates are untrusted: every resource has a limit.
#pragma once

#include <cstdint>
#include <ctime>
#include <functional>
#include <memory>
#include <string>
#include <string_view>

#include "core/json.h"

namespace detour::data::jinja {

/// What one rendering may use. At the default limits it ends within a second.
struct Limits {
  /// Work: one step is one node of the template, one element, or 64 bytes of text handled.
  int64_t max_steps = 4'000'000;
  /// Text rendered, that of macros and set blocks under way included.
  int64_t max_output_bytes = int64_t{16} << 20;
  /// Values alive at one time, the variables included.
  int64_t max_memory_bytes = int64_t{128} << 20;
};

struct RenderOptions {
  Limits limits;
  /// The time that strftime_now shows; absent: the local time of now.
  std::function<std::tm()> clock;
};

struct Program;

/// A parsed template. Const methods are thread-safe.
///
/// The environment is that of transformers' apply_chat_template: the immutable sandbox with
/// trim_blocks, lstrip_blocks, break/continue, `generation` blocks (rendered, not recorded),
/// raise_exception, strftime_now, and tojson without HTML escapes. Known to jinja2 and refused
/// here: docs/chat-templates.md.
///
/// Error("data.jinja") with `name`, line and reason, for what is no template, what is not
/// supported, what the template raises, and for a limit that is reached.
class Template {
 public:
  /// At most 1 MiB of UTF-8. A byte order mark is skipped.
  explicit Template(std::string_view source, std::string name = "chat template");

  /// `variables`: an object; its strings must be UTF-8.
  std::string Render(const Json& variables, const RenderOptions& options = {}) const;

 private:
  std::shared_ptr<const Program> program_;
};

}  // namespace detour::data::jinja
