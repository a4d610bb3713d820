// The little that our C++ unit tests need: checks that count failures and name their place.
#pragma once

#include <stdlib.h>

#include <filesystem>
#include <fstream>
#include <iostream>
#include <sstream>
#include <string>

namespace jax_ds::testing {

inline int failures = 0;

template <typename Actual, typename Expected>
void CheckEqual(const Actual& actual, const Expected& expected, const char* text, int line) {
  if (actual == expected) return;
  ++failures;
  std::cerr << "line " << line << ": " << text << " is " << actual << ", not " << expected << "\n";
}

inline void Check(bool holds, const char* text, int line) {
  if (holds) return;
  ++failures;
  std::cerr << "line " << line << ": " << text << " does not hold\n";
}

// A folder that lasts as long as this object.
class TemporaryFolder {
 public:
  TemporaryFolder() {
    std::string pattern = (std::filesystem::temp_directory_path() / "jax_ds_XXXXXX").string();
    path_ = mkdtemp(pattern.data());
  }
  ~TemporaryFolder() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  const std::string& path() const { return path_; }

  std::string Write(const std::string& name, const std::string& text) const {
    const std::filesystem::path file = std::filesystem::path(path_) / name;
    std::filesystem::create_directories(file.parent_path());
    std::ofstream(file, std::ios::binary) << text;
    return file.string();
  }

  static std::string Read(const std::string& file) {
    std::ostringstream text;
    text << std::ifstream(file, std::ios::binary).rdbuf();
    return text.str();
  }

 private:
  std::string path_;
};

}  // namespace jax_ds::testing

#define CHECK(condition) ::jax_ds::testing::Check((condition), #condition, __LINE__)
#define CHECK_EQ(actual, expected) \
  ::jax_ds::testing::CheckEqual((actual), (expected), #actual, __LINE__)
