// Digests published with the standard (FIPS 180-4 examples), and every padding length.
#include <set>

#include "jit/sha256.h"
#include "tests/native/testing.h"

using jax_ds::jit::Sha256;

int main() {
  CHECK_EQ(Sha256(""), "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
  CHECK_EQ(Sha256("abc"), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
  CHECK_EQ(Sha256("abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq"),
           "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1");
  CHECK_EQ(Sha256(std::string(1000000, 'a')),
           "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0");
  std::set<std::string> digests;
  for (size_t size = 0; size < 200; ++size) digests.insert(Sha256(std::string(size, '\0')));
  CHECK_EQ(digests.size(), 200u);
  return jax_ds::testing::failures;
}
