// The Python files that let transformers load a routed model, as they are in src/convert/python.
#pragma once

namespace detour::convert {

extern const char kConfigurationPy[];  ///< configuration_detour.py
extern const char kModelingPy[];       ///< modeling_detour.py

}  // namespace detour::convert
