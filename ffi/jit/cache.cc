#include "jit/cache.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <string_view>
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

// Takes the first line off `rest`; false if no line ends.
bool TakeLine(std::string_view* rest, std::string_view* line) {
  const size_t end = rest->find('\n');
  if (end == std::string_view::npos) return false;
  *line = rest->substr(0, end);
  rest->remove_prefix(end + 1);
  return true;
}

std::optional<Binary> Decode(const std::string& key, std::string_view data) {
  std::string_view magic, stored_key, digest, sizes;
  if (!TakeLine(&data, &magic) || !TakeLine(&data, &stored_key) || !TakeLine(&data, &digest) ||
      !TakeLine(&data, &sizes) || magic != kMagic || stored_key != key) {
    return std::nullopt;
  }
  size_t symbol = 0, log = 0, cubin = 0;
  std::istringstream(std::string(sizes)) >> symbol >> log >> cubin;
  // The digest covers the payload; the sizes must add up without wrapping around.
  if (symbol > data.size() || log > data.size() || cubin > data.size() ||
      symbol + log + cubin != data.size() || Sha256(data) != digest) {
    return std::nullopt;
  }
  return Binary{std::string(data.substr(symbol + log)), std::string(data.substr(0, symbol)),
                std::string(data.substr(symbol, log))};
}

// Whether the open `file` is the one that `path` names.
bool IsAt(int file, const std::string& path) {
  struct stat open_file, named;
  return fstat(file, &open_file) == 0 && stat(path.c_str(), &named) == 0 &&
         open_file.st_dev == named.st_dev && open_file.st_ino == named.st_ino;
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
  const auto deadline = std::chrono::steady_clock::now() + kPatience;
  while (std::chrono::steady_clock::now() < deadline) {
    if (file_ < 0) file_ = open(path_.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    if (file_ < 0) return;
    if (flock(file_, LOCK_EX | LOCK_NB) == 0) {
      if (IsAt(file_, path_)) return;
      // Its holder removed the file meanwhile; whoever comes now locks a new one.
      close(file_);
      file_ = -1;
      continue;
    }
    if (errno != EWOULDBLOCK && errno != EINTR) break;
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }
  // No locks here, or somebody has held one too long: go on without.
  if (file_ >= 0) close(file_);
  file_ = -1;
}

DiskCache::Claim::~Claim() {
  if (file_ < 0) return;
  unlink(path_.c_str());
  close(file_);
}

}  // namespace jax_ds::jit
