// Which files a kernel's source consists of.
#include "jit/source.h"
#include "tests/native/testing.h"

using jax_ds::jit::ReadSource;

int main() {
  jax_ds::testing::TemporaryFolder root;
  root.Write("room/kernel.cuh",
             "#include \"kernels/a.cuh\"\n"
             "  #  include \"kernels/b.h\"  // indented\n"
             "#include <cstdint>\n"
             "// #include \"kernels/commented.cuh\"\n"
             "int include = 1;\n");
  root.Write("kernels/a.cuh", "#include \"kernels/b.h\"\n#include \"kernels/c.cuh\"\n");
  root.Write("kernels/b.h", "b");
  // Cycles end.
  root.Write("kernels/c.cuh", "#include \"kernels/a.cuh\"\n");

  auto source = ReadSource(root.path(), "room/kernel.cuh");
  CHECK(source.has_value());
  if (source.has_value()) {
    CHECK_EQ(source->headers.size(), 3u);
    CHECK_EQ(source->headers["kernels/b.h"], "b");
    CHECK_EQ(source->headers.count("kernels/c.cuh"), 1u);
  }

  root.Write("room/broken.cuh", "#include \"kernels/missing.cuh\"\n");
  auto broken = ReadSource(root.path(), "room/broken.cuh");
  CHECK(broken.has_error());
  CHECK(broken.error().message().find("kernels/missing.cuh cannot be read") != std::string::npos);
  CHECK(ReadSource(root.path(), "room/none.cuh").has_error());
  return jax_ds::testing::failures;
}
