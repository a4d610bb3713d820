#pragma once

#include "support/room.h"

namespace jax_ds::flash_mla {

// The state and the target jax_ds_flash_mla_prefill.
StateType PrefillStateType();
Target PrefillTarget();

}  // namespace jax_ds::flash_mla
