// The disk cache heals itself and serves many.
#include <atomic>
#include <chrono>
#include <thread>
#include <vector>

#include "jit/cache.h"
#include "tests/native/testing.h"

using jax_ds::jit::Binary;
using jax_ds::jit::DiskCache;
using jax_ds::testing::TemporaryFolder;

namespace {

const Binary kBinary = {std::string("\x7f"
                                    "ELF\0\n\0machine code",
                                    18),
                        "_Z6kernelv", "Used 8\n"};

bool Same(const std::optional<Binary>& read) {
  return read && read->cubin == kBinary.cubin && read->symbol == kBinary.symbol &&
         read->log == kBinary.log;
}

void RoundTrip() {
  TemporaryFolder folder;
  // The folder need not exist.
  DiskCache cache(folder.path() + "/deep/er");
  CHECK(!cache.Read("key"));
  CHECK(cache.Write("key", kBinary));
  CHECK(Same(cache.Read("key")));
  CHECK(!cache.Read("other"));
}

// Whatever a file holds, it is the whole right thing or nothing; and writing repairs it.
void Damage() {
  TemporaryFolder folder;
  DiskCache cache(folder.path());
  cache.Write("key", kBinary);
  const std::string file = folder.path() + "/key.kernel";
  const std::string whole = TemporaryFolder::Read(file);
  for (size_t size = 0; size < whole.size(); ++size) {
    folder.Write("key.kernel", whole.substr(0, size));
    CHECK(!cache.Read("key"));
  }
  for (size_t i = 0; i < whole.size(); ++i) {
    std::string damaged = whole;
    damaged[i] ^= 1;
    folder.Write("key.kernel", damaged);
    auto read = cache.Read("key");
    CHECK(!read || Same(read));
  }
  for (const char* foreign : {"", "not ours", "jax_ds kernel 1\n", "\n\n\n\n",
                              "\x7f"
                              "ELF"}) {
    folder.Write("key.kernel", foreign);
    CHECK(!cache.Read("key"));
  }
  folder.Write("key.kernel", whole + "more");
  CHECK(!cache.Read("key"));
  // A file under another key's name.
  folder.Write("another.kernel", whole);
  CHECK(!cache.Read("another"));
  CHECK(cache.Write("key", kBinary));
  CHECK(Same(cache.Read("key")));
}

void NoFolder() {
  DiskCache none("");
  CHECK(!none.Write("key", kBinary));
  CHECK(!none.Read("key"));
  DiskCache::Claim claim(none, "key");
  TemporaryFolder folder;
  folder.Write("file", "");
  DiskCache unwritable(folder.path() + "/file/below");
  CHECK(!unwritable.Write("key", kBinary));
  DiskCache::Claim unclaimed(unwritable, "key");
}

// Nobody ever reads half a file while others replace it, and nothing is left lying around.
void Concurrency() {
  TemporaryFolder folder;
  std::atomic<bool> stop{false};
  std::atomic<int> bad{0};
  DiskCache(folder.path()).Write("key", kBinary);
  std::vector<std::thread> threads;
  for (int i = 0; i < 3; ++i) {
    threads.emplace_back([&] {
      for (int n = 0; n < 200; ++n) DiskCache(folder.path()).Write("key", kBinary);
    });
  }
  std::thread reader([&] {
    while (!stop) bad += !Same(DiskCache(folder.path()).Read("key"));
  });
  for (std::thread& thread : threads) thread.join();
  stop = true;
  reader.join();
  CHECK_EQ(bad.load(), 0);
  int files = 0;
  for ([[maybe_unused]] const auto& entry : std::filesystem::directory_iterator(folder.path())) {
    ++files;
  }
  CHECK_EQ(files, 1);
}

// One claim at a time, for each key.
void Claims() {
  TemporaryFolder folder;
  DiskCache cache(folder.path());
  std::atomic<int> inside{0}, most{0};
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([&] {
      for (int n = 0; n < 10; ++n) {
        DiskCache::Claim claim(cache, "key");
        int now = ++inside;
        if (now > most) most = now;
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
        --inside;
      }
    });
  }
  {
    DiskCache::Claim other(cache, "other");
  }
  for (std::thread& thread : threads) thread.join();
  CHECK_EQ(most.load(), 1);
}

}  // namespace

int main() {
  RoundTrip();
  Damage();
  NoFolder();
  Concurrency();
  Claims();
  return jax_ds::testing::failures;
}
