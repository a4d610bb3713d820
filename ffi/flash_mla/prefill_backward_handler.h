#pragma once

#include "support/room.h"

namespace jax_ds::flash_mla {

// State and target of jax_ds_flash_mla_prefill_backward.
StateType PrefillBackwardStateType();
Target PrefillBackwardTarget();

}  // namespace jax_ds::flash_mla
