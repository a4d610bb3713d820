#include "jit/tensor_map.h"

#include <string>

#include "support/driver.h"

namespace jax_ds::jit {

ErrorOr<TensorMap> EncodeTensorMap(MapType type, const void* base,
                                   std::initializer_list<int64_t> dims,
                                   std::initializer_list<int64_t> strides,
                                   std::initializer_list<int> box, MapOptions options) {
  constexpr size_t kMaxRank = 5;
  if (dims.size() == 0 || dims.size() > kMaxRank || strides.size() + 1 != dims.size() ||
      box.size() != dims.size()) {
    return Internal("tensor map: dims, strides and box disagree");
  }
  uint64_t sizes[kMaxRank], bytes[kMaxRank] = {};
  uint32_t boxes[kMaxRank], steps[kMaxRank];
  size_t i = 0;
  for (int64_t d : dims) sizes[i++] = static_cast<uint64_t>(d > 0 ? d : 1);
  i = 0;
  for (int64_t s : strides) bytes[i++] = static_cast<uint64_t>(s);
  i = 0;
  for (int b : box) steps[i] = 1, boxes[i++] = static_cast<uint32_t>(b);
  JAX_DS_ASSIGN_OR_RETURN(const Driver* driver, Driver::Get());
  TensorMap map;
  JAX_DS_RETURN_IF_ERROR(driver->Check(
      driver->cuTensorMapEncodeTiled(&map, static_cast<int>(type),
                                     static_cast<unsigned int>(dims.size()),
                                     const_cast<void*>(base), sizes, bytes, boxes, steps,
                                     /*interleave=*/0, static_cast<int>(options.swizzle),
                                     options.l2_promotion, /*oob_fill=*/0),
      "cuTensorMapEncodeTiled"));
  return map;
}

}  // namespace jax_ds::jit
