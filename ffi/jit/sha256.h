// SHA-256 (FIPS 180-4): cache keys must not collide, whatever the sources contain.
#pragma once

#include <string>
#include <string_view>

namespace jax_ds::jit {

// The digest of `data`, 64 hexadecimal digits.
std::string Sha256(std::string_view data);

}  // namespace jax_ds::jit
