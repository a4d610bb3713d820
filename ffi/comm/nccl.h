// The part of NCCL that we call, opened at run time: the library that XLA itself has loaded.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "support/cuda.h"
#include "support/status.h"

namespace jax_ds::comm {

// Declared by us, as in nccl.h 2.30: no NCCL header is needed to build.
using NcclComm = struct ncclComm*;
using NcclWindow = struct ncclWindow_vidmem*;
using NcclResult = int;
constexpr NcclResult kNcclSuccess = 0, kNcclInProgress = 7;
constexpr int kNcclInt32 = 2, kNcclMin = 3, kNcclWindowSymmetric = 1;
// From here on, peers' pointers into a window can be had on the host.
constexpr int kOldestNccl = 23004;

struct NcclTeam {
  int num_ranks, rank, stride;
};

// Entry points of libnccl.so.2. Immutable once opened.
struct Nccl {
  // The process's NCCL. The first call opens the one already loaded, or else the first of the
  // candidates that SetCandidates named.
  static ErrorOr<const Nccl*> Get();
  static void SetCandidates(std::vector<std::string> candidates);

  // Turns a result into a status that names the call.
  Error Check(NcclResult result, const char* call) const;

  // The same, after waiting for an operation that `communicator` carries on in the background.
  Error Finish(NcclComm communicator, NcclResult result, const char* call) const;

  int version = 0;  // 10000 * major + 100 * minor + patch

  NcclResult (*ncclGetVersion)(int*);
  const char* (*ncclGetErrorString)(NcclResult);
  NcclResult (*ncclCommGetAsyncError)(NcclComm, NcclResult*);
  NcclResult (*ncclCommUserRank)(NcclComm, int*);
  NcclResult (*ncclCommCount)(NcclComm, int*);
  NcclResult (*ncclMemAlloc)(void**, size_t);
  NcclResult (*ncclMemFree)(void*);
  NcclResult (*ncclAllReduce)(const void*, void*, size_t, int, int, NcclComm, cuda::Stream);
  NcclResult (*ncclCommWindowRegister)(NcclComm, void*, size_t, NcclWindow*, int);
  NcclTeam (*ncclTeamLsa)(NcclComm);
  NcclResult (*ncclGetLsaDevicePointer)(NcclWindow, size_t, int, void**);

 private:
  static ErrorOr<Nccl> Open();
};

}  // namespace jax_ds::comm
