// Reading the assembler's log.
#include "jit/spec.h"
#include "tests/native/testing.h"

using jax_ds::jit::ParseLog;
using jax_ds::jit::Resources;

int main() {
  const Resources clean = ParseLog(
      "ptxas info    : 0 bytes gmem\n"
      "ptxas info    : Function properties for kernel\n"
      "ptxas         .     0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n"
      "ptxas info    : Used 168 registers, used 3 barriers, 1024 bytes smem\n");
  CHECK_EQ(clean.registers, 168);
  CHECK_EQ(clean.static_shared, 1024);
  CHECK(clean.clean());

  const Resources spills = ParseLog(
      "ptxas         .     8 bytes stack frame, 12 bytes spill stores, 16 bytes spill loads\n"
      "ptxas         .     24 bytes stack frame, 4 bytes spill stores, 4 bytes spill loads\n");
  CHECK_EQ(spills.stack, 24);
  CHECK_EQ(spills.spill_stores, 16);
  CHECK_EQ(spills.spill_loads, 20);
  CHECK(!spills.clean());

  const std::string remark = "ptxas info    : (C7514) Potential Performance Loss: wgmma serialised";
  const Resources serialised = ParseLog("first\n" + remark + "\n");
  CHECK_EQ(serialised.remarks.size(), 1u);
  CHECK_EQ(serialised.remarks.front(), remark);
  CHECK(!serialised.clean());

  CHECK(ParseLog("").clean());
  return jax_ds::testing::failures;
}
