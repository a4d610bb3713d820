// Handlers bound by their functions' parameters are those that a written-out binding gives.
#include <type_traits>

#include "support/room.h"
#include "support/stages.h"
#include "tests/native/testing.h"

namespace {

namespace ffi = xla::ffi;
using ffi::AnyBuffer;
using jax_ds::Error;

struct State : jax_ds::Stateful<State> {};

Error Initialize(State*, int32_t) { return Error::Success(); }
Error Execute(State*, int32_t, jax_ds::cuda::Stream, AnyBuffer, AnyBuffer, ffi::RemainingArgs,
              ffi::Result<AnyBuffer>, ffi::RemainingRets) {
  return Error::Success();
}

auto Initializer() {
  return ffi::Ffi::BindInitialize().Ctx<ffi::State<State>>().Ctx<ffi::DeviceOrdinal>().To(
      Initialize);
}
auto Executor() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::State<State>>()
      .Ctx<ffi::DeviceOrdinal>()
      .Ctx<ffi::PlatformStream<jax_ds::cuda::Stream>>()
      .Arg<AnyBuffer>()
      .Arg<AnyBuffer>()
      .RemainingArgs()
      .Ret<AnyBuffer>()
      .RemainingRets()
      .To(Execute);
}

template <ffi::ExecutionStage stage, auto function>
using Handler = decltype(jax_ds::MakeHandler<stage>(function));
static_assert(
    std::is_same_v<Handler<ffi::ExecutionStage::kInitialize, Initialize>, decltype(Initializer())>);
static_assert(
    std::is_same_v<Handler<ffi::ExecutionStage::kExecute, Execute>, decltype(Executor())>);

// What XLA asks of a handler before it runs it.
XLA_FFI_Metadata Ask(XLA_FFI_Handler* handler) {
  XLA_FFI_Metadata metadata = {};
  metadata.struct_size = XLA_FFI_Metadata_STRUCT_SIZE;
  metadata.api_version.struct_size = XLA_FFI_Api_Version_STRUCT_SIZE;
  XLA_FFI_Metadata_Extension extension = {};
  extension.extension_base.struct_size = XLA_FFI_Metadata_Extension_STRUCT_SIZE;
  extension.extension_base.type = XLA_FFI_Extension_Metadata;
  extension.metadata = &metadata;
  XLA_FFI_CallFrame frame = {};
  frame.struct_size = XLA_FFI_CallFrame_STRUCT_SIZE;
  frame.extension_start = &extension.extension_base;
  CHECK(handler(&frame) == nullptr);
  return metadata;
}

}  // namespace

int main() {
  CHECK_EQ(Ask(jax_ds::InitializeStage<Initialize>).traits, 0u);
  CHECK_EQ(Ask(jax_ds::ExecuteStage<Execute>).traits,
           static_cast<unsigned>(XLA_FFI_HANDLER_TRAITS_COMMAND_BUFFER_COMPATIBLE));
  return jax_ds::testing::failures;
}
