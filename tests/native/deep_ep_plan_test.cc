// Records, staging, size classes, groups and the sentences of failures.
#include "comm/clique.h"
#include "comm/device.h"
#include "comm/window.h"
#include "deep_ep/plan.h"
#include "tests/native/testing.h"

namespace comm = jax_ds::comm;
namespace ep = jax_ds::deep_ep;

namespace {

void Records() {
  const ep::Record fp8 = *ep::MakeRecord(7168, 56);
  CHECK_EQ(fp8.vectors, 448);
  CHECK_EQ(fp8.num_scales, 56);
  CHECK_EQ(fp8.stride, 7424);
  CHECK_EQ(ep::StagingBytes(fp8, 8, 4096), int64_t{8} * 4096 * 7424);
  CHECK_EQ(ep::MakeRecord(128, 0)->stride, 128);
  for (int64_t bytes : {0, 8, 24, -16, 1 << 25}) CHECK(ep::MakeRecord(bytes, 0).has_error());
  CHECK(ep::MakeRecord(16, -1).has_error());
}

void Grids() {
  CHECK_EQ(*ep::Grid(0), 16u);
  CHECK_EQ(*ep::Grid(3), 3u);
  CHECK_EQ(*ep::Grid(132), 132u);
  CHECK(ep::Grid(133).has_error());
  CHECK(ep::Grid(-1).has_error());
}

void SizeClasses() {
  const int64_t mib = 1 << 20;
  CHECK_EQ(comm::SizeClass(1), 4 * mib);
  CHECK_EQ(comm::SizeClass(4 * mib), 4 * mib);
  CHECK_EQ(comm::SizeClass(4 * mib + 1), 5 * mib);
  CHECK_EQ(comm::SizeClass(7 * mib + 1), 8 * mib);
  CHECK_EQ(comm::SizeClass(232 * mib), 256 * mib);
  CHECK_EQ(comm::SizeClass(448 * mib), 448 * mib);
  for (int64_t bytes = 1; bytes < int64_t{1} << 40; bytes = bytes * 5 / 4 + 1) {
    const int64_t rounded = comm::SizeClass(bytes);
    CHECK(rounded >= bytes && rounded % 4096 == 0);
    CHECK(bytes < 4 * mib || rounded - bytes <= bytes / 4);
    CHECK_EQ(comm::SizeClass(rounded), rounded);
  }
}

void GroupsOfRanks() {
  const int64_t ids[] = {0, 2, 4, 6, 1, 3, 5, 7};
  CHECK_EQ(comm::Groups::Make({ids, 8}, 4)->num_ranks(), 4);
  CHECK_EQ(comm::Groups::Make({ids, 8}, 1)->num_ranks(), 1);
  CHECK(comm::Groups::Make({ids, 8}, 3).has_error());
  CHECK(comm::Groups::Make({ids, 0}, 1).has_error());
  CHECK(comm::Groups::Make({ids, 8}, 0).has_error());
  CHECK(comm::Groups::Make({ids, 8}, 64).has_error());
}

void Sentences() {
  comm::Failure failure = {};
  failure.fault = static_cast<int>(comm::Fault::kPeerMissing);
  failure.operation = static_cast<int>(comm::Operation::kCombine);
  failure.rank = 2;
  failure.peer = 5;
  failure.round = 17;
  const std::string text = comm::Describe(failure);
  CHECK_EQ(text.substr(0, text.find(" (")),
           "deep_ep.combine, rank 2, round 17: waited in vain for rank 5");
  failure.fault = static_cast<int>(comm::Fault::kRankMismatch);
  CHECK(comm::Describe(failure).find("NCCL numbers this rank 5") != std::string::npos);
  CHECK(comm::Failures().empty());
}

void Specs() {
  CHECK_EQ(ep::AllKernels().size(), size_t{3});
  CHECK(*ep::CombineSpec("bfloat16") == ep::AllKernels()[1]);
  CHECK(*ep::CombineSpec("float32") == ep::AllKernels()[2]);
  CHECK(ep::CombineSpec("float16").has_error());
}

}  // namespace

int main() {
  Records();
  Grids();
  SizeClasses();
  GroupsOfRanks();
  Sentences();
  Specs();
  return jax_ds::testing::failures;
}
