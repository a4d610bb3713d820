// What a room (one system, one folder) hands to the module: its custom-call targets, the types of
// their states, and every kernel its plans can choose.
#pragma once

#include <vector>

#include "jit/spec.h"
#include "xla/ffi/api/ffi.h"

namespace jax_ds {

// Base of a handler's state: `struct GemmState : Stateful<GemmState> { ... };`
template <typename T>
struct Stateful {
  inline static xla::ffi::TypeId id = {};
  static const xla::ffi::TypeInfo* info() {
    static const xla::ffi::TypeInfo type_info = xla::ffi::MakeTypeInfo<T>();
    return &type_info;
  }
};

struct StateType {
  const char* name;
  xla::ffi::TypeId* id;
  const xla::ffi::TypeInfo* info;
};

// The stages of one custom-call target; absent stages are null.
struct Target {
  const char* name;
  XLA_FFI_Handler* instantiate;
  XLA_FFI_Handler* prepare;
  XLA_FFI_Handler* initialize;
  XLA_FFI_Handler* execute;
};

struct Room {
  const char* name;
  std::vector<StateType> types;
  std::vector<Target> targets;
  std::vector<jit::KernelSpec> kernels;  // every configuration a plan can choose
};

}  // namespace jax_ds
