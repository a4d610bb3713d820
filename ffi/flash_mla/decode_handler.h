#pragma once

#include "support/room.h"

namespace jax_ds::flash_mla {

// States and targets of jax_ds_flash_mla_decode and jax_ds_flash_mla_append.
std::vector<StateType> DecodeStateTypes();
std::vector<Target> DecodeTargets();

}  // namespace jax_ds::flash_mla
