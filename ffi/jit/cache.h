// Compiled kernels on disk, one file a key.
#pragma once

#include <optional>
#include <string>

#include "jit/spec.h"

namespace jax_ds::jit {

// Safe for many processes at once. Files appear whole, by atomic rename; a file that is truncated,
// foreign or damaged counts as absent and is replaced. A folder that cannot be written to makes
// every kernel compile anew, nothing worse. `folder` empty: no cache.
class DiskCache {
 public:
  explicit DiskCache(std::string folder) : folder_(std::move(folder)) {}

  std::optional<Binary> Read(const std::string& key) const;

  // Whether the file was written.
  bool Write(const std::string& key, const Binary& binary) const;

  // Held by the process that compiles `key`, so that others wait for its file instead of compiling
  // too. Ends with the process that holds it; waiting is bounded, and a file system without locks
  // costs only double work.
  class Claim {
   public:
    Claim(const DiskCache& cache, const std::string& key);
    ~Claim();
    Claim(const Claim&) = delete;
    Claim& operator=(const Claim&) = delete;

   private:
    std::string path_;
    int file_ = -1;
  };

  const std::string& folder() const { return folder_; }

 private:
  std::string Path(const std::string& key) const { return folder_ + "/" + key + ".kernel"; }

  std::string folder_;
};

}  // namespace jax_ds::jit
