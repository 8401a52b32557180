// Argument checks of the bindings: a failed one becomes Python's ValueError.
#pragma once

#include <sstream>
#include <stdexcept>

namespace stellar_fast {

template <typename... Parts>
void check(bool condition, const Parts &...parts) {
  if (condition) return;
  std::ostringstream message;
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

}  // namespace stellar_fast
