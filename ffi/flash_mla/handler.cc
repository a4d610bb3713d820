// Each target has a handler file of its own; here they become a room.
#include "flash_mla/handler.h"

#include "flash_mla/decode_handler.h"
#include "flash_mla/decode_plan.h"
#include "flash_mla/prefill_handler.h"
#include "flash_mla/prefill_plan.h"

namespace jax_ds::flash_mla {
namespace {

template <typename T>
std::vector<T> Concat(std::vector<T> a, const std::vector<T>& b) {
  a.insert(a.end(), b.begin(), b.end());
  return a;
}

}  // namespace

Room GetRoom() {
  return {"flash_mla", Concat(DecodeStateTypes(), PrefillStateTypes()),
          Concat(DecodeTargets(), PrefillTargets()),
          Concat(AllDecodeKernels(), AllPrefillKernels())};
}

}  // namespace jax_ds::flash_mla
