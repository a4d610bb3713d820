#include "jit/source.h"

#include <fstream>
#include <sstream>
#include <vector>

namespace jax_ds::jit {
namespace {

ErrorOr<std::string> ReadText(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  std::ostringstream text;
  text << in.rdbuf();
  if (!in) {
    return FailedPrecondition("kernel source " + path +
                              " cannot be read: reinstall jax_ds, its package data is incomplete");
  }
  return text.str();
}

// Names in `#include "name"` lines. Includes inside conditional blocks count too: at worst the
// cache key depends on one header more.
std::vector<std::string> QuotedIncludes(const std::string& text) {
  std::vector<std::string> names;
  std::istringstream lines(text);
  for (std::string line; std::getline(lines, line);) {
    size_t i = line.find_first_not_of(" \t");
    if (i == std::string::npos || line[i] != '#') continue;
    i = line.find_first_not_of(" \t", i + 1);
    if (i == std::string::npos || line.compare(i, 7, "include") != 0) continue;
    i = line.find_first_not_of(" \t", i + 7);
    if (i == std::string::npos || line[i] != '"') continue;
    size_t end = line.find('"', i + 1);
    if (end != std::string::npos) names.push_back(line.substr(i + 1, end - i - 1));
  }
  return names;
}

}  // namespace

ErrorOr<Source> ReadSource(const std::string& root, const std::string& file) {
  Source source;
  JAX_DS_ASSIGN_OR_RETURN(source.main, ReadText(root + "/" + file));
  std::vector<std::string> pending = QuotedIncludes(source.main);
  while (!pending.empty()) {
    std::string name = std::move(pending.back());
    pending.pop_back();
    if (source.headers.count(name)) continue;
    JAX_DS_ASSIGN_OR_RETURN(std::string text, ReadText(root + "/" + name));
    for (std::string& next : QuotedIncludes(text)) pending.push_back(std::move(next));
    source.headers.emplace(std::move(name), std::move(text));
  }
  return source;
}

}  // namespace jax_ds::jit
