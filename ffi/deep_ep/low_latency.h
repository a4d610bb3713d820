// The custom calls of low-latency dispatch and combine: whole, first half, second half.
#pragma once

#include <vector>

#include "support/room.h"

namespace jax_ds::deep_ep {

std::vector<Target> LowLatencyTargets();

}  // namespace jax_ds::deep_ep
