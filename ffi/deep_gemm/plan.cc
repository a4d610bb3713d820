#include "deep_gemm/plan.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>

#include "support/shape.h"

namespace jax_ds::deep_gemm {
namespace {

// Dynamic shared memory of a CTA that has an SM to itself, and of one that shares it with another.
constexpr int kSharedAlone = 232448, kSharedHalf = 115712;

// A configuration but for mode, output and stages, with what was measured for it.
struct Candidate {
  int block_m, block_n, math, multicast, split, per_sm, depth;
  double cycles;    // per tile and block of K, with the SM's other CTAs running
  int stages = 16;  // at most: slots asked for early come late where many do
};

// Many rows: the tensor cores are the limit, beside which promotion runs.
constexpr Candidate kLarge[] = {
    {128, 192, 2, 1, 1, 1, 1, 825},
    {128, 160, 2, 1, 1, 1, 1, 750},
};
// The least to bring from L2; too coarse for masked groups, of which few rows may be in use.
constexpr Candidate kLargest = {256, 128, 2, 2, 1, 1, 1, 1186};

// Few rows: memory is the limit, so every SM must load from the start to the end.
constexpr Candidate kSmall[] = {
    {64, 64, 1, 1, 1, 2, 2, 300},
    {64, 96, 1, 1, 1, 2, 1, 450},
    {64, 128, 1, 1, 1, 2, 1, 600},
};
// One matrix has too few tiles for that; K is divided too.
constexpr Candidate kSmallest[] = {
    {64, 32, 2, 1, 2, 1, 2, 130, 12}, {64, 32, 1, 1, 2, 2, 2, 170},
    {64, 64, 1, 1, 2, 2, 2, 340},     {64, 64, 1, 1, 4, 2, 2, 300},
    {64, 112, 1, 1, 2, 1, 2, 430},    {128, 32, 2, 1, 2, 1, 2, 250},
    {128, 64, 2, 1, 2, 1, 2, 380},    {128, 112, 2, 1, 2, 1, 1, 590},
    {128, 128, 2, 2, 2, 1, 2, 700},
};

// Weight gradients: every column has its own scale, which doubles the promotion. Tall tiles
// read it once for two waves of rows; wide ones win where rounds of tiles fill the GPU as well.
constexpr Candidate kGradient[] = {
    {256, 128, 2, 1, 1, 1, 1, 1640},
    {128, 160, 2, 1, 1, 1, 1, 1005},
    {128, 128, 2, 1, 1, 1, 1, 842},
};

// Fitted to what was measured on an H200: the choices for few rows are the fastest ones there.
constexpr double kClockMhz = 1600, kL2BytesPerUs = 13e6, kDramBytesPerUs = 4.2e6;

Config Configure(const Problem& problem, const Candidate& c) {
  Config config = {problem.mode, problem.output, c.block_m, c.block_n, 0,
                   c.math,       c.multicast,    c.split,   c.per_sm,  c.depth};
  const int limit = c.per_sm == 1 ? kSharedAlone : kSharedHalf;
  do {
    ++config.stages;
  } while (SharedBytes(config) <= limit && config.stages <= c.stages);
  --config.stages;
  if (config.k_parts() > 1) config.stages -= config.stages % (2 * config.depth);  // equal turns
  return config;
}

std::vector<Candidate> Candidates(Mode mode) {
  if (mode == kWgrad) return {std::begin(kGradient), std::end(kGradient)};
  std::vector<Candidate> candidates(std::begin(kLarge), std::end(kLarge));
  candidates.insert(candidates.end(), std::begin(kSmall), std::end(kSmall));
  if (mode != kMasked) candidates.push_back(kLargest);
  if (mode == kDense) {
    candidates.insert(candidates.end(), std::begin(kSmallest), std::end(kSmallest));
  }
  return candidates;
}

// The rows of lhs that meet one matrix of rhs, evenly divided: the host does not know the groups.
// Weight gradients: the rows of one output.
double ExpectedRows(const Problem& p) {
  if (p.mode == kGrouped) return static_cast<double>(p.m) / static_cast<double>(p.groups);
  if (p.mode != kMasked) return static_cast<double>(p.m);
  return p.expected_rows > 0 ? static_cast<double>(std::min(p.expected_rows, p.m))
                             : static_cast<double>(p.m) / 4;
}

// Tiles of a group of `rows` rows, lower ones as the part of a whole one that they cost: the mean
// of groups of just so many, and of random sizes.
double TilesOfGroup(double rows, const Config& c) {
  const double most = c.block_m / 64, parts = std::ceil(rows / 64);
  const double whole = std::floor(parts / most), rest = parts - whole * most;
  const double even = whole + (rest > 0 ? (2 * rest + most) / (3 * most) : 0);
  const double random = rows / c.block_m + (most > 2 ? 0.27 : most > 1 ? 0.42 : 0.5);
  return (even + random) / 2;
}

// Tiles of rows. Where groups differ, a masked product is small enough that whole tiles count: its
// groups are taken to hold evenly spread sizes within 30% of what is expected.
double RowTiles(const Problem& p, const Config& c) {
  const double rows = ExpectedRows(p), groups = static_cast<double>(p.groups);
  if (p.mode == kMasked) {
    double tiles = 0;
    for (int64_t g = 0; g < p.groups; ++g) {
      const double spread = 0.7 + 0.6 * (static_cast<double>(g) + 0.5) / groups;
      tiles += std::ceil(std::min(rows * spread, static_cast<double>(p.m)) / c.block_m);
    }
    return tiles;
  }
  if (p.mode == kGrouped) return groups * TilesOfGroup(rows, c);
  return (p.mode == kDense ? 1 : groups) * std::ceil(rows / c.block_m);
}

// Clusters that run at once. An SM pair always holds a cluster of two; larger ones do not fill
// every group of SMs (seen: 30 of 33 for four, 15 of 16 for eight).
int64_t Slots(const Config& c, int num_sms) {
  const int64_t slots = static_cast<int64_t>(num_sms) * c.per_sm / c.cluster();
  return c.cluster() > 2 ? std::max<int64_t>(1, slots * 15 / 16) : slots;
}

Estimate Cost(const Problem& p, const Config& c, double cycles, int num_sms) {
  const double rows = ExpectedRows(p), matrices = p.mode == kDense ? 1 : p.groups;
  const double row_tiles = RowTiles(p, c);
  const double columns = static_cast<double>(CeilDiv(p.n, int64_t{c.block_n} * c.multicast));
  const double clusters = row_tiles * columns, slots = static_cast<double>(Slots(c, num_sms));
  // Tiles of groups are dealt so that clusters end together, or in turn.
  const double missing = DealsTiles(c) ? 0.25 : 0.5;
  const double waves =
      p.mode == kGrouped ? std::max(1.0, clusters / slots + missing) : std::ceil(clusters / slots);
  const int64_t tokens = p.mode == kWgrad ? CeilDiv(p.k, p.groups) : p.k;
  const double blocks = static_cast<double>(CeilDiv(CeilDiv(tokens, kBlockK), c.split));
  // What stores of a tile hold up, although they run beside the next one.
  const bool slow = p.mode == kGrouped && c.math == 1;  // seen with little K
  const double area = c.block_m * c.block_n;
  const double epilogue = slow ? 2200 : StagesWhole(c) ? 1000 + area / 32 : area / 16;

  // CTAs of the busiest SM, one after the other or together.
  const double ctas = clusters * c.cluster() / num_sms;
  const double busiest = p.mode == kGrouped ? std::max(1.0, ctas + 0.5) : std::ceil(ctas);
  const double cta_bytes = (c.block_m / c.multicast + c.block_n) * double{kBlockK} * blocks;

  Estimate e;
  e.tensor_us = waves * (blocks * cycles + epilogue) / kClockMhz;
  e.l2_us = busiest * cta_bytes * num_sms / kL2BytesPerUs;
  const double out_bytes = p.output == kBfloat16 ? 2 : p.output == kFloat32 ? 4 : 8;
  const double n = static_cast<double>(p.n), k = static_cast<double>(p.k);
  const double operands = p.mode == kWgrad ? (rows + n) * k : matrices * (rows + n) * k;
  e.dram_us = (operands + matrices * rows * n * out_bytes) / kDramBytesPerUs;
  e.overhead_us = c.split > 2 ? 6.0 : 3.0;
  return e;
}

}  // namespace

double Estimate::total_us() const {
  const double longest = std::max({tensor_us, l2_us, dram_us});
  // The three overlap, but not wholly.
  return longest + 0.15 * (tensor_us + l2_us + dram_us - longest) + overhead_us;
}

jit::KernelSpec Plan::Spec() const {
  const Config& c = config;
  std::string values;
  for (int v : {c.mode, c.output, c.block_m, c.block_n, c.stages, c.math, c.multicast, c.split,
                c.per_sm, c.depth}) {
    values += (values.empty() ? "" : ", ") + std::to_string(v);
  }
  jit::KernelSpec spec;
  spec.file = "deep_gemm/kernels/gemm.cuh";
  spec.entry = "jax_ds::deep_gemm::Gemm<jax_ds::deep_gemm::Config{" + values + "}>";
  spec.shared_bytes = SharedBytes(c);
  return spec;
}

std::string Plan::Name() const {
  const Config& c = config;
  std::string name = std::to_string(c.block_m) + "x" + std::to_string(c.block_n);
  auto add = [&](const char* field, int value, int otherwise) {
    if (value != otherwise) name += std::string(",") + field + "=" + std::to_string(value);
  };
  add("math", c.math, 1);
  add("lhs", c.multicast, 1);
  add("split", c.split, 1);
  add("per_sm", c.per_sm, 1);
  add("depth", c.depth, 1);
  return name;
}

int Plan::Band() const { return std::max(1, 2048 / config.block_m); }

int64_t Plan::Clusters(const Problem& p) const {
  const int64_t columns = CeilDiv(p.n, int64_t{config.block_n} * config.multicast);
  int64_t row_tiles = CeilDiv(p.m, IsRagged(config) ? 64 : config.block_m);
  if (p.mode == kGrouped) {
    row_tiles += p.groups;  // each group, and the tail, may end in a partial tile
  } else if (p.mode != kDense) {
    row_tiles *= p.groups;
  }
  return columns * row_tiles;
}

ErrorOr<Mode> ParseMode(std::string_view name) {
  if (name == "dense") return kDense;
  if (name == "grouped") return kGrouped;
  if (name == "masked") return kMasked;
  if (name == "wgrad") return kWgrad;
  return InvalidArgument("mode: must be dense, grouped, masked or wgrad, got " + std::string(name));
}

ErrorOr<Output> ParseOutput(std::string_view name, bool accumulate) {
  if (name == "bfloat16" && !accumulate) return kBfloat16;
  if (name == "float32") return accumulate ? kFloat32Add : kFloat32;
  return InvalidArgument("output: must be bfloat16, or float32 to accumulate into, got " +
                         std::string(name));
}

ErrorOr<std::vector<Plan>> Rank(const Problem& p, int num_sms) {
  if (p.expected_rows < 0) return InvalidArgument("expected_rows: must not be negative");
  for (int64_t size : {p.m, p.n, p.k, p.groups}) {
    if (size < 1 || size > std::numeric_limits<int>::max()) {
      return InvalidArgument("sizes must be between 1 and 2^31 - 1, got " + std::to_string(size));
    }
  }
  if (p.groups > kMaxGroups) {
    return InvalidArgument("groups: at most " + std::to_string(kMaxGroups) + ", got " +
                           std::to_string(p.groups));
  }
  std::vector<Plan> ranked;
  for (const Candidate& candidate : Candidates(p.mode)) {
    Plan plan;
    plan.config = Configure(p, candidate);
    plan.estimate = Cost(p, plan.config, candidate.cycles, num_sms);
    ranked.push_back(plan);
  }
  std::stable_sort(ranked.begin(), ranked.end(), [](const Plan& a, const Plan& b) {
    return a.estimate.total_us() < b.estimate.total_us();
  });
  return ranked;
}

ErrorOr<Plan> Choose(const Problem& problem, int num_sms, std::string_view name) {
  JAX_DS_ASSIGN_OR_RETURN(std::vector<Plan> ranked, Rank(problem, num_sms));
  if (name.empty()) return ranked.front();
  std::string known;
  for (const Plan& plan : ranked) {
    if (plan.Name() == name) return plan;
    known += (known.empty() ? "" : "; ") + plan.Name();
  }
  return InvalidArgument("config: must be one of " + known + ", got " + std::string(name));
}

ErrorOr<std::string> Explain(const Problem& problem, int num_sms) {
  JAX_DS_ASSIGN_OR_RETURN(std::vector<Plan> ranked, Rank(problem, num_sms));
  size_t width = 0;
  for (const Plan& plan : ranked) width = std::max(width, plan.Name().size());
  auto pad = [&](std::string text) { return text + std::string(width - text.size(), ' '); };
  std::string text = pad("configuration") +
                     " stages shared KB threads clusters  tensor us   L2 us DRAM us total us\n";
  for (const Plan& plan : ranked) {
    const Config& c = plan.config;
    const Estimate& e = plan.estimate;
    char line[160];
    std::snprintf(line, sizeof(line), " %6d %9d %7d %8lld %10.1f %7.1f %7.1f %8.1f\n", c.stages,
                  SharedBytes(c) / 1024, c.threads(),
                  static_cast<long long>(plan.Clusters(problem)), e.tensor_us, e.l2_us, e.dram_us,
                  e.total_us());
    text += pad(plan.Name()) + line;
  }
  return text;
}

std::vector<jit::KernelSpec> AllKernels() {
  std::vector<jit::KernelSpec> specs;
  for (Mode mode : {kDense, kGrouped, kMasked, kWgrad}) {
    for (Output output : {kBfloat16, kFloat32, kFloat32Add}) {
      if (mode != kWgrad && output == kFloat32Add) continue;
      for (const Candidate& candidate : Candidates(mode)) {
        Plan plan;
        plan.config = Configure({mode, output, 0, 0, 0, 0}, candidate);
        specs.push_back(plan.Spec());
      }
    }
  }
  return specs;
}

}  // namespace jax_ds::deep_gemm
