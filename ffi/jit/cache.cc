#include "jit/cache.h"

#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <thread>

#include "jit/sha256.h"

namespace jax_ds::jit {
namespace {

namespace fs = std::filesystem;

// First line of every file; the number changes with the format.
constexpr char kMagic[] = "jax_ds kernel 1";
constexpr auto kPatience = std::chrono::seconds(120);

std::string Encode(const std::string& key, const Binary& binary) {
  std::string payload = binary.symbol + binary.log + binary.cubin;
  std::ostringstream out;
  out << kMagic << '\n'
      << key << '\n'
      << Sha256(payload) << '\n'
      << binary.symbol.size() << ' ' << binary.log.size() << ' ' << binary.cubin.size() << '\n'
      << payload;
  return out.str();
}

std::optional<Binary> Decode(const std::string& key, const std::string& data) {
  std::istringstream in(data);
  std::string magic, stored_key, digest, sizes;
  std::getline(in, magic);
  std::getline(in, stored_key);
  std::getline(in, digest);
  std::getline(in, sizes);
  if (!in || magic != kMagic || stored_key != key) return std::nullopt;
  size_t symbol = 0, log = 0, cubin = 0;
  std::istringstream(sizes) >> symbol >> log >> cubin;
  std::string_view payload = std::string_view(data).substr(static_cast<size_t>(in.tellg()));
  // The digest covers the payload; the sizes must add up without wrapping around.
  if (symbol > payload.size() || log > payload.size() || cubin > payload.size() ||
      symbol + log + cubin != payload.size() || Sha256(payload) != digest) {
    return std::nullopt;
  }
  return Binary{std::string(payload.substr(symbol + log)), std::string(payload.substr(0, symbol)),
                std::string(payload.substr(symbol, log))};
}

}  // namespace

std::optional<Binary> DiskCache::Read(const std::string& key) const {
  if (folder_.empty()) return std::nullopt;
  std::ifstream in(Path(key), std::ios::binary);
  if (!in) return std::nullopt;
  std::ostringstream data;
  data << in.rdbuf();
  return Decode(key, data.str());
}

bool DiskCache::Write(const std::string& key, const Binary& binary) const {
  if (folder_.empty()) return false;
  static std::atomic<int> count{0};
  std::error_code error;
  fs::create_directories(folder_, error);
  std::string temporary =
      Path(key) + "." + std::to_string(getpid()) + "." + std::to_string(count++);
  {
    std::ofstream out(temporary, std::ios::binary);
    out << Encode(key, binary);
    out.close();
    if (!out) {
      std::remove(temporary.c_str());
      return false;
    }
  }
  if (std::rename(temporary.c_str(), Path(key).c_str()) == 0) return true;
  std::remove(temporary.c_str());
  return false;
}

DiskCache::Claim::Claim(const DiskCache& cache, const std::string& key) {
  if (cache.folder_.empty()) return;
  std::error_code error;
  fs::create_directories(cache.folder_, error);
  path_ = cache.Path(key) + ".lock";
  file_ = open(path_.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600);
  if (file_ < 0) return;
  const auto deadline = std::chrono::steady_clock::now() + kPatience;
  while (flock(file_, LOCK_EX | LOCK_NB) != 0) {
    if (errno != EWOULDBLOCK && errno != EINTR) return;
    if (std::chrono::steady_clock::now() > deadline) return;
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }
}

DiskCache::Claim::~Claim() {
  if (file_ < 0) return;
  // Removed while still held: whoever waits on the old file looks into the cache next.
  unlink(path_.c_str());
  close(file_);
}

}  // namespace jax_ds::jit
