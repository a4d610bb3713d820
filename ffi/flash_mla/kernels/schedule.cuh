// Sharing out the KV blocks of all requests to groups of CTAs, worked out by every CTA for itself
// from seq_lens: no schedule is stored, no kernel runs before this one.
//
// A request costs kOverhead and one more per block. Where that is even enough, groups get whole
// requests: neighbours (`whole`), or the longest first, to and fro (`deal`), or each request has
// groups of its own (`cut`). Else requests lie one after the other on a line, and group g gets
// positions [g * payload, (g + 1) * payload). A boundary inside a request splits it, unless it
// falls within `tolerance` of the request's first or last block: then it moves to that end. All is
// a pure function of the boundary, so both neighbours agree. Where there is less work than that,
// late groups have none: two blocks take hardly longer than one, but half the parts.
#pragma once

#include "flash_mla/kernels/params.h"
#include "kernels/warp.cuh"

namespace jax_ds::flash_mla {

struct Position {
  int request;
  int block;
};

// Requests that may be dealt to a group, and requests that may be sorted for it.
inline constexpr int kMaxDealt = 8;
inline constexpr int kMaxSorted = 512;

// The work of one group, in shared memory.
struct Schedule {
  Position begin, end;  // end.request == B where the group runs to the end
  int end_parts;        // parts of request end.request, if that one starts in this group
  int deal;             // requests to deal to a group, if that proves even; or 0
  int limit;            // what requests dealt to a group may cost
  bool dealt;           // whether positions count `requests`, not all requests
  int requests[kMaxDealt + 1];
};

JAX_DS_DEVICE int warp_max(int value) { return __reduce_max_sync(0xffffffffu, value); }

// Tokens of request b, kept inside what its row of the page table can name.
JAX_DS_DEVICE int length_of(const DecodeParams& p, int b) {
  return min(max(__ldg(p.seq_lens + b), 0), p.N * p.page_size);
}

JAX_DS_DEVICE int blocks_of(int length) { return (length + kBlock - 1) / kBlock; }

inline constexpr int kLeastPayload = 2;
inline constexpr int kLeastSorted = 16;  // sorting takes about as long as a block

// One warp. Of the configuration:
//   kOverhead  what starting a request costs, in blocks;
//   kSlack     by one part in so many a group may exceed its even share if that splits less;
//   kDeals     whether requests may be dealt, or cut alike: it pays where parts are large.
template <typename Config>
struct Scheduler {
  const DecodeParams& p;
  int per_lane;  // requests a lane sums up
  int before;    // positions before this lane's requests
  int sum;       // positions of this lane's requests
  int total, payload, tolerance, whole, limit, deal, cut;

  JAX_DS_DEVICE int cost(int b) const {
    return b < p.B ? Config::kOverhead + blocks_of(length_of(p, b)) : 0;
  }

  JAX_DS_DEVICE explicit Scheduler(const DecodeParams& params) : p(params) {
    per_lane = (p.B + 31) / 32;
    sum = 0;
    int largest = 0;
#pragma unroll 4
    for (int i = 0; i < per_lane; ++i) {
      const int c = cost(lane_id() * per_lane + i);
      sum += c;
      largest = max(largest, c);
    }
    const int inclusive = warp_inclusive_sum(sum);
    before = inclusive - sum;
    total = __shfl_sync(0xffffffffu, inclusive, 31);
    largest = warp_max(largest);
    payload = max((total + p.num_groups - 1) / p.num_groups, kLeastPayload);
    tolerance = payload >> 5;
    whole = (p.B + p.num_groups - 1) / p.num_groups;
    limit = payload + payload / Config::kSlack + 1;
    deal = cut = 0;
    if (whole * largest <= limit) return;
    if (Config::kDeals) look_for_even_shares(largest);
    whole = 0;
  }

  JAX_DS_DEVICE void look_for_even_shares(int largest) {
    if (whole > 1) {
      const bool few = whole <= kMaxDealt && p.B <= kMaxSorted;
      if (few && payload >= kLeastSorted && largest <= limit) deal = whole;
      return;
    }
    const int groups = p.num_groups / p.B;
    const int share = max((largest - Config::kOverhead + groups - 1) / groups, kLeastPayload);
    if (Config::kOverhead + share > limit) return;
    cut = groups;
    payload = share;
  }

  // Where the group whose first position is `boundary` starts. `parts`: of the request there.
  JAX_DS_DEVICE Position locate(int boundary, int* parts) const {
    *parts = 1;
    if (boundary >= total) return {p.B, 0};
    const u32 owners = __ballot_sync(0xffffffffu, before <= boundary && boundary < before + sum);
    const int owner = __ffs(owners) - 1;
    int start = __shfl_sync(0xffffffffu, before, owner);
    for (int i = 0; i < per_lane; i += 32) {
      const int b = owner * per_lane + i + lane_id();
      const int c = i + lane_id() < per_lane ? cost(b) : 0;
      const int inclusive = warp_inclusive_sum(c) + start;
      const u32 past = __ballot_sync(0xffffffffu, inclusive > boundary);
      if (past != 0) {
        const int found = __ffs(past) - 1;
        const int end = __shfl_sync(0xffffffffu, inclusive, found);
        start = end - __shfl_sync(0xffffffffu, c, found);
        return resolve(owner * per_lane + i + found, start, end, boundary, parts);
      }
      start = __shfl_sync(0xffffffffu, inclusive, 31);
    }
    return {p.B, 0};
  }

  JAX_DS_DEVICE Position resolve(int b, int start, int end, int boundary, int* parts) const {
    // Boundaries in (low, high) split the request.
    const int low = start + Config::kOverhead + tolerance;
    const int high = end - tolerance;
    if (boundary <= low) return {b, 0};
    if (boundary >= high) return {b + 1, 0};
    *parts = 1 + (high - 1) / payload - low / payload;
    return {b, boundary - start - Config::kOverhead};
  }

  // Where each request has `cut` groups of its own.
  JAX_DS_DEVICE Position piece(int group, int* parts) const {
    const int b = group / cut;
    if (b >= p.B) return {p.B, 0};
    const int blocks = blocks_of(length_of(p, b));
    const int block = (group - b * cut) * payload;
    if (block == 0) return {b, 0};
    if (block >= blocks) return {b + 1, 0};
    *parts = (blocks + payload - 1) / payload;
    return {b, block};
  }

  // Where a group starts. `parts`: of the request there.
  JAX_DS_DEVICE Position start(int group, int* parts) const {
    *parts = 1;
    if (whole != 0) return {min(group * whole, p.B), 0};
    if (Config::kDeals && cut != 0) return piece(group, parts);
    return locate(group * payload, parts);
  }
};

// Warps 0 and 1: one finds where the group's work begins, the other where it ends.
template <typename Config>
JAX_DS_DEVICE void make_schedule(const DecodeParams& p, Schedule& schedule, int group, u32 warp) {
  const Scheduler<Config> scheduler(p);
  int parts;
  const Position position = scheduler.start(group + static_cast<int>(warp), &parts);
  if (lane_id() != 0) return;
  if (warp == 0) {
    schedule.begin = position;
    if (Config::kDeals) {
      schedule.deal = scheduler.deal;
      schedule.limit = scheduler.limit;
      schedule.dealt = false;
    }
  } else {
    schedule.end = position;
    schedule.end_parts = parts;
  }
}

// A request, or a run of its blocks, for one group.
struct Item {
  int request;
  int length;       // tokens
  int first, last;  // blocks [first, last)
  bool split;
  int part_slot;  // 0: continues an earlier group's request; 1: starts one

  JAX_DS_DEVICE bool empty() const { return first == last; }
};

// Walks a group's items; every role of the kernel walks them alike.
template <typename Config>
struct Items {
  const DecodeParams& p;
  const Schedule& schedule;  // in shared memory
  int at;                    // a request, or a place among those dealt
  int length;                // of that request, read ahead

  JAX_DS_DEVICE Items(const DecodeParams& params, const Schedule& s)
      : p(params), schedule(s), at(s.begin.request), length(0) {
    if (at < p.B) length = length_of(p, request());
  }

  JAX_DS_DEVICE int request() const {
    return Config::kDeals && schedule.dealt ? schedule.requests[at] : at;
  }

  JAX_DS_DEVICE bool next(Item& item) {
    const Position end = schedule.end;
    if (at >= p.B || at > end.request || (at == end.request && end.block == 0)) return false;
    const int blocks = blocks_of(length);
    item.request = request();
    item.length = length;
    item.first = at == schedule.begin.request ? schedule.begin.block : 0;
    item.last = at == end.request ? end.block : blocks;
    item.split = item.first != 0 || item.last != blocks;
    item.part_slot = item.first == 0 ? 1 : 0;
    ++at;
    if (at < p.B && at <= end.request) length = length_of(p, request());
    return true;
  }
};

// How many of a request's first tokens its row `row` may look at: the causal mask is aligned at the
// last token. Padding rows beyond R are never stored, so they may look at anything.
JAX_DS_DEVICE int visible_tokens(const DecodeParams& p, int length, int row) {
  return p.causal ? min(length, length - p.S + row / p.H + 1) : length;
}

}  // namespace jax_ds::flash_mla
