#pragma once

#include "support/room.h"

namespace jax_ds::deep_gemm {

// The target jax_ds_gemm.
Room GetRoom();

}  // namespace jax_ds::deep_gemm
