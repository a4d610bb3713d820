#pragma once

#include "support/room.h"

namespace jax_ds::flash_mla {

// The targets of decode, append and prefill.
Room GetRoom();

}  // namespace jax_ds::flash_mla
