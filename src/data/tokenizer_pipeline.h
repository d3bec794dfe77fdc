// The components of a tokenizer.json around its model.
#pragma once

#include <string>

#include "core/json.h"
#include "data/bpe_spec.h"

namespace detour::data {

/// Reads "normalizer", "pre_tokenizer", "post_processor" and "decoder" of `root` into `spec`, whose
/// vocabulary and added tokens are there already. Error("data.tokenizer" or "json") naming `name`
/// and the component that is malformed or unknown.
void ReadPipeline(const Json& root, const std::string& name, BpeSpec* spec);

}  // namespace detour::data
