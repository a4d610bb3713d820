#pragma once

#include "support/room.h"

namespace jax_ds::flash_mla {

// States and targets of jax_ds_flash_mla_prefill and jax_ds_flash_mla_prefill_backward.
std::vector<StateType> PrefillStateTypes();
std::vector<Target> PrefillTargets();

}  // namespace jax_ds::flash_mla
