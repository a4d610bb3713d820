#include "jit/spec.h"

#include <algorithm>
#include <cstdlib>
#include <sstream>

namespace jax_ds::jit {
namespace {

// The number directly before `unit` in `line`, 0 if absent: "16 bytes stack frame" -> 16.
int NumberBefore(const std::string& line, const std::string& unit) {
  size_t end = line.find(unit);
  if (end == std::string::npos) return 0;
  size_t begin = end;
  while (begin > 0 && line[begin - 1] >= '0' && line[begin - 1] <= '9') --begin;
  return std::atoi(line.substr(begin, end - begin).c_str());
}

}  // namespace

Resources ParseLog(const std::string& log) {
  Resources r;
  std::istringstream lines(log);
  for (std::string line; std::getline(lines, line);) {
    r.registers = std::max(r.registers, NumberBefore(line, " registers"));
    r.static_shared = std::max(r.static_shared, NumberBefore(line, " bytes smem"));
    r.stack = std::max(r.stack, NumberBefore(line, " bytes stack frame"));
    r.spill_stores += NumberBefore(line, " bytes spill stores");
    r.spill_loads += NumberBefore(line, " bytes spill loads");
    if (line.find("(C75") != std::string::npos) r.remarks.push_back(line);
  }
  return r;
}

}  // namespace jax_ds::jit
