// The custom calls of the room deep_ep.
#pragma once

#include "support/room.h"

namespace jax_ds::deep_ep {

Room GetRoom();

}  // namespace jax_ds::deep_ep
