#include "train/schedule.h"

#include <fmt/ranges.h>

#include <algorithm>
#include <cmath>
#include <numbers>
#include <regex>

#include "core/error.h"
#include "core/json.h"

namespace detour::train {

double LearningRate(const TrainConfig& c, int64_t step, int64_t total_steps) {
  if (step < c.warmup_steps) return c.lr * static_cast<double>(step + 1) / c.warmup_steps;
  if (c.lr_schedule == "wsd") {
    const double decay_steps = std::max(1.0, c.decay_ratio * total_steps);
    const double left = static_cast<double>(total_steps - step) / decay_steps;
    return c.min_lr + (c.lr - c.min_lr) * std::clamp(left, 0.0, 1.0);
  }
  const double span = std::max<int64_t>(total_steps - c.warmup_steps, 1);
  const double progress = std::min(1.0, static_cast<double>(step - c.warmup_steps) / span);
  return c.min_lr + (c.lr - c.min_lr) * 0.5 * (1 + std::cos(std::numbers::pi * progress));
}

double Schedule::At(int64_t step, int64_t total_steps) const {
  const double done =
      static_cast<double>(step) / static_cast<double>(std::max<int64_t>(total_steps, 1));
  double part = std::clamp((done - begin) / std::max(end - begin, 1e-12), 0.0, 1.0);
  if (shape == "constant") part = done >= begin ? 1 : 0;
  if (shape == "cosine") part = 0.5 * (1 - std::cos(std::numbers::pi * part));
  if (shape == "sine") part = std::sin(0.5 * std::numbers::pi * part);
  return from + (to - from) * part;
}

namespace {

Schedule ParseSchedule(const std::string& text, const std::string& where) {
  static const std::regex pattern(
      R"(\s*([-+.eE\d]+)\s*->\s*([-+.eE\d]+)\s+(constant|linear|cosine|sine)(\s+([.\d]+)\.\.([.\d]+))?\s*)");
  std::smatch m;
  const auto number = [](const std::string& s, double fallback) {
    char* end = nullptr;
    const double value = s.empty() ? fallback : std::strtod(s.c_str(), &end);
    return !s.empty() && *end != 0 ? std::nan("") : value;
  };
  if (text.size() < 200 && std::regex_match(text, m, pattern)) {
    const Schedule s{number(m[1], 0), number(m[2], 0), number(m[5], 0), number(m[6], 1), m[3]};
    if (s.begin >= 0 && s.begin <= s.end && s.end <= 1 && std::isfinite(s.from + s.to)) return s;
  }
  Fail("train.schedule",
       "{}: expected \"FROM->TO SHAPE [BEGIN..END]\", SHAPE constant, linear, cosine or sine, 0 <= "
       "BEGIN <= END <= 1, for instance \"1->0.125 cosine 0.1..0.4\"; got \"{}\"",
       where, Printable(text));
}

}  // namespace

Schedules ParseSchedules(const std::vector<std::string>& texts) {
  Schedules schedules;
  for (const std::string& text : texts) {
    const size_t colon = text.find(':');
    const std::string knob = text.substr(0, std::min(colon, text.size()));
    if (colon == std::string::npos ||
        std::find(std::begin(kKnobs), std::end(kKnobs), knob) == std::end(kKnobs)) {
      Fail("train.schedule", "--schedule: expected KNOB: SCHEDULE with KNOB one of {}; got \"{}\"",
           fmt::join(kKnobs, ", "), Printable(text));
    }
    if (!schedules.emplace(knob, ParseSchedule(text.substr(colon + 1), "--schedule " + knob))
             .second) {
      Fail("train.schedule", "--schedule {}: given twice", knob);
    }
  }
  return schedules;
}

double ScheduledValue(const Schedules& schedules, const char* knob, double fallback, int64_t step,
                      int64_t total_steps) {
  const auto it = schedules.find(knob);
  return it == schedules.end() ? fallback : it->second.At(step, total_steps);
}

double TargetShare(const TrainConfig& c, const Schedules& schedules, int64_t step,
                   int64_t total_steps) {
  if (schedules.count("target_share") > 0) {
    return ScheduledValue(schedules, "target_share", 0, step, total_steps);
  }
  const double ramp = c.share_ramp * total_steps;
  if (c.target_share == 0 || step >= ramp) return c.target_share;
  return 1 + (c.target_share - 1) * static_cast<double>(step) / ramp;
}

double ControllerRate(const TrainConfig& c, int64_t step, int64_t total_steps) {
  return std::max(c.controller_rate, LearningRate(c, step, total_steps) / c.lr);
}

}  // namespace detour::train
