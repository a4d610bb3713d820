// Shared libraries opened at run time: building needs none of them, importing never fails.
#pragma once

#include <string>
#include <vector>

#include "support/status.h"

namespace jax_ds {

class SharedLibrary {
 public:
  // Opens the first of `candidates` (full paths, or names for the loader to search) that loads.
  // `what` and `cure` make the error's sentence. Libraries stay open for the life of the process.
  static ErrorOr<SharedLibrary> Open(const std::vector<std::string>& candidates,
                                     const std::string& what, const std::string& cure);

  // Sets `*function` to the symbol, or fails naming it.
  template <typename Function>
  Error Find(const char* symbol, Function** function) const {
    void* address = Address(symbol);
    if (address == nullptr) {
      return FailedPrecondition(path_ + " has no function " + symbol + "; install a newer version");
    }
    *function = reinterpret_cast<Function*>(address);
    return Error::Success();
  }

  const std::string& path() const { return path_; }

 private:
  SharedLibrary(void* handle, std::string path) : handle_(handle), path_(std::move(path)) {}
  void* Address(const char* symbol) const;

  void* handle_;
  std::string path_;
};

}  // namespace jax_ds
