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
  CHECK_EQ(ep::StagingBytes(fp8, 0, 8, 4096), int64_t{8} * 4096 * 7424);
  CHECK_EQ(ep::StagingBytes(fp8, 8, 8, 128), int64_t{8} * 128 * (7424 + 32));
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
  CHECK_EQ(comm::SizeClass(4 * mib + 1), 9 * mib / 2);
  CHECK_EQ(comm::SizeClass(15 * mib / 2 + 1), 8 * mib);
  CHECK_EQ(comm::SizeClass(232 * mib), 240 * mib);
  CHECK_EQ(comm::SizeClass(448 * mib), 448 * mib);
  CHECK_EQ(comm::SizeClass(449 * mib), 480 * mib);
  for (int64_t bytes = 1; bytes < int64_t{1} << 40; bytes = bytes * 5 / 4 + 1) {
    const int64_t rounded = comm::SizeClass(bytes);
    CHECK(rounded >= bytes && rounded % 4096 == 0);
    CHECK(bytes < 4 * mib || rounded - bytes <= bytes / 8);
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
  failure.fault = static_cast<int>(comm::Fault::kNoSlot);
  failure.operation = static_cast<int>(comm::Operation::kLowLatencyDispatch);
  CHECK(comm::Describe(failure).find("low_latency_dispatch, rank 2, round 17: earlier rounds") !=
        std::string::npos);
  CHECK(comm::Failures().empty());
}

void Slots() {
  CHECK_EQ(comm::NumSlots(comm::Operation::kDispatch), 1);
  CHECK_EQ(comm::NumSlots(comm::Operation::kCombine), 1);
  CHECK_EQ(comm::NumSlots(comm::Operation::kLowLatencyDispatch), 2);
  CHECK_EQ(comm::NumSlots(comm::Operation::kLowLatencyCombine), 2);
}

// Bits and numbers of each set, a list of all slots.
void SharedMemory() {
  CHECK_EQ(ep::slot_sets_bytes(33, 1024), 2 * 4 * 33 * 32 + 2 * 1024);
  CHECK_EQ(ep::slot_sets_bytes(1, 1), 2 * 4 + 2 * 32);
}

void LowLatencySizes() {
  const auto fits = [](int64_t ranks, int64_t tokens, int64_t top_k, int64_t experts,
                       int64_t region, int64_t hidden) {
    return ep::CheckLowLatency({ranks, tokens, top_k, experts, region, hidden}).success();
  };
  CHECK(fits(8, 128, 8, 32, 1024, 7168));
  CHECK(!fits(8, 128, 8, 32, 1023, 7168));
  CHECK(!fits(8, 128, 33, 32, 1024, 7168));
  CHECK(!fits(8, 128, 0, 32, 1024, 7168));
  CHECK(!fits(8, 128, 8, 0, 1024, 7168));
  CHECK(!fits(8, 128, 8, 32, 1024, 7160));
  CHECK(!fits(8, 128, 8, 32, 1024, 0));
  CHECK(!fits(8, 128, 8, 32, int64_t{1} << 31, 7168));
  CHECK(fits(32, 2048, 8, 1, 32 * 2048, 7168));
  CHECK(!fits(32, 2049, 8, 1, 32 * 2049, 7168));
  // 65 sets of 16384 slots do not fit in shared memory, 33 of 20480 do.
  CHECK(!fits(8, 2048, 8, 64, 16384, 7168));
  CHECK(fits(8, 2560, 8, 32, 20480, 7168));
  const ep::LowLatencySizes v3 = {8, 128, 8, 32, 1024, 7168};
  CHECK_EQ(v3.columns(), 8);
}

void Specs() {
  CHECK_EQ(ep::AllKernels().size(), size_t{18});
  CHECK(*ep::CombineSpec("bfloat16") == ep::AllKernels()[1]);
  CHECK(*ep::CombineSpec("float32") == ep::AllKernels()[2]);
  CHECK(ep::CombineSpec("float16").has_error());
  const auto sizes = [](ep::Half half) {
    return ep::LowLatencySizes{8, 128, 8, 32, 1024, 7168, half};
  };
  const auto dispatch = [&](const char* dtype, bool quantize, ep::Half half) {
    return ep::LowLatencyDispatchSpec(dtype, quantize, sizes(half));
  };
  // What receives only moves bytes; what sends has no sets of slots.
  CHECK(*dispatch("float32", false, ep::Half::kFinish) ==
        *dispatch("bfloat16", true, ep::Half::kFinish));
  CHECK(dispatch("float32", false, ep::Half::kWhole)->entry !=
        dispatch("bfloat16", false, ep::Half::kWhole)->entry);
  CHECK_EQ(dispatch("bfloat16", true, ep::Half::kStart)->shared_bytes, 0);
  CHECK_EQ(dispatch("bfloat16", true, ep::Half::kWhole)->shared_bytes,
           ep::slot_sets_bytes(33, 1024));
  CHECK_EQ(ep::LowLatencyCombineSpec("bfloat16", sizes(ep::Half::kWhole))->shared_bytes,
           ep::slot_sets_bytes(1, 1024));
  CHECK_EQ(ep::LowLatencyCombineSpec("bfloat16", sizes(ep::Half::kFinish))->shared_bytes, 0);
  CHECK(dispatch("float16", true, ep::Half::kWhole).has_error());
}

}  // namespace

int main() {
  Records();
  Grids();
  SizeClasses();
  GroupsOfRanks();
  Sentences();
  Slots();
  SharedMemory();
  LowLatencySizes();
  Specs();
  return jax_ds::testing::failures;
}
