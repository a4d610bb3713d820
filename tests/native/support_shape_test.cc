// The handlers' second look at their operands.
#include <vector>

#include "support/shape.h"
#include "tests/native/testing.h"

using jax_ds::AnyBuffer;
using jax_ds::CheckBuffer;
using jax_ds::DataType;

int main() {
  std::vector<int64_t> dims = {3, 2, 64, 576};
  XLA_FFI_Buffer raw = {};
  raw.dtype = XLA_FFI_DataType_BF16;
  raw.rank = static_cast<int64_t>(dims.size());
  raw.dims = dims.data();
  const AnyBuffer buffer(&raw);
  CHECK(CheckBuffer("q", buffer, DataType::BF16, {64, 576}).success());
  CHECK(CheckBuffer("q", buffer, DataType::BF16, {-1, 576}).success());
  CHECK(CheckBuffer("q", buffer, DataType::BF16, {}).success());
  CHECK(CheckBuffer("q", buffer, DataType::BF16, {63, 576}).failure());
  CHECK(CheckBuffer("q", buffer, DataType::F16, {64, 576}).failure());
  CHECK(CheckBuffer("q", buffer, DataType::BF16, {1, 3, 2, 64, 576}).failure());
  CHECK_EQ(CheckBuffer("q", buffer, DataType::BF16, {64, 512}).message(),
           "jax_ds: q: must be [..., 64, 512] of XLA type 16, got [3, 2, 64, 576, ] of type 16");
  CHECK_EQ(jax_ds::LeadingSize(buffer, 2), 6);
  CHECK_EQ(jax_ds::LeadingSize(buffer, 4), 1);
  CHECK_EQ(jax_ds::Blocks128(0), 0);
  CHECK_EQ(jax_ds::Blocks128(129), 2);
  return jax_ds::testing::failures;
}
