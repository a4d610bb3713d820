#include "support/library.h"

#include <dlfcn.h>

namespace jax_ds {

ErrorOr<SharedLibrary> SharedLibrary::Open(const std::vector<std::string>& candidates,
                                           const std::string& what, const std::string& cure) {
  std::string reason = "no candidate path";
  for (const std::string& path : candidates) {
    if (void* handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL)) {
      return SharedLibrary(handle, path);
    }
    reason = dlerror();
  }
  return FailedPrecondition(what + " could not be opened (" + reason + "): " + cure);
}

void* SharedLibrary::Address(const char* symbol) const { return dlsym(handle_, symbol); }

}  // namespace jax_ds
