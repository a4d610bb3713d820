#pragma once

#include "support/room.h"

namespace jax_ds::quantization {

// The targets jax_ds_quantize_rows and jax_ds_quantize_tiles.
Room GetRoom();

}  // namespace jax_ds::quantization
