// What a kernel is, before and after compilation.
#pragma once

#include <string>
#include <vector>

namespace jax_ds::jit {

// Everything that decides a kernel's machine code, apart from the compiler itself.
struct KernelSpec {
  std::string file;                  // under ffi/, e.g. "deep_gemm/kernels/gemm.cuh"
  std::string entry;                 // name expression, e.g. "jax_ds::gemm::Kernel<jax_ds::...>"
  std::vector<std::string> options;  // beside DefaultOptions(), e.g. "-DJAX_DS_X=1"
  // Dynamic shared memory its launches need, bytes; not part of the machine code.
  int shared_bytes = 0;

  bool operator==(const KernelSpec& other) const {
    return file == other.file && entry == other.entry && options == other.options &&
           shared_bytes == other.shared_bytes;
  }
};

// Read off the assembler's log.
struct Resources {
  int registers = 0;                 // at entry; setmaxnreg changes it later
  int static_shared = 0;             // bytes
  int stack = 0;                     // bytes of stack frame, largest function
  int spill_stores = 0;              // bytes
  int spill_loads = 0;               // bytes
  std::vector<std::string> remarks;  // lines with "(C75": serialised wgmma, ignored setmaxnreg

  // A kernel may neither spill, nor use a stack frame, nor draw such a remark.
  bool clean() const {
    return stack == 0 && spill_stores == 0 && spill_loads == 0 && remarks.empty();
  }
};

Resources ParseLog(const std::string& log);

// A compiled kernel as the disk cache stores it.
struct Binary {
  std::string cubin;
  std::string symbol;  // the entry's mangled name
  std::string log;     // of compiler and assembler
};

}  // namespace jax_ds::jit
