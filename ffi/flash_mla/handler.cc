// Each target has a handler file of its own; here they become a room.
#include "flash_mla/handler.h"

#include "flash_mla/prefill_handler.h"
#include "flash_mla/prefill_plan.h"

namespace jax_ds::flash_mla {

Room GetRoom() {
  return {"flash_mla", PrefillStateTypes(), PrefillTargets(), AllPrefillKernels()};
}

}  // namespace jax_ds::flash_mla
