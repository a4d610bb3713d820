"""The one place that issues an XLA FFI custom call."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.experimental.compute_on import compute_on
from jax.sharding import ManualAxisType, NamedSharding, PartitionSpec

from jax_ds._runtime import native
from jax_ds._runtime.varying import to_varying, varying_axes

Layout = Sequence[int] | None


def ffi_call(
    target: str,
    outputs: Sequence[jax.ShapeDtypeStruct],
    *operands: Any,
    attributes: Mapping[str, Any],
    input_layouts: Sequence[Layout] | None = None,
    output_layouts: Sequence[Layout] | None = None,
    aliases: Mapping[int, int] | None = None,
    vmap_method: str = "broadcast_all",
    communicates: bool = False,
) -> list[Any]:
    """Calls the handler `target` on `operands`; returns its outputs as a list.

    Args:
      target: registered name of the handler.
      outputs: shapes and dtypes of the results.
      *operands: arrays, in the handler's order.
      attributes: everything the handler's Instantiate stage needs; never a leading batch size.
      input_layouts, output_layouts: major-to-minor orders; None is row-major. XLA makes the
        producers write operands so.
      aliases: operand index to output index, for updates in place.
      vmap_method: as in `jax.ffi.ffi_call`.
      communicates: runs on XLA's collective stream, which serialises it with every other
        communicating call and with XLA's own collectives.
    """
    native.ensure_registered()
    axes = varying_axes(operands)
    operands = to_varying(operands, axes)
    results = [_output(out, axes) for out in outputs]
    call = jax.ffi.ffi_call(
        target,
        results,
        vmap_method=vmap_method,
        input_layouts=input_layouts,
        output_layouts=output_layouts,
        input_output_aliases=dict(aliases) if aliases else None,
    )

    def run() -> list[Any]:
        return list(call(*operands, **attributes))

    if not communicates:
        return run()
    results = compute_on(
        compute_type="gpu_stream:collective", out_memory_spaces=jax.memory.Space.Device
    )(run)()
    # XLA puts what takes a tuple apart on the stream of the call, and then awaits the call at once;
    # not so what comes out of a barrier.
    return list(jax.lax.optimization_barrier(results)) if len(results) > 1 else results


def _output(out: jax.ShapeDtypeStruct, axes: tuple[str, ...]) -> jax.ShapeDtypeStruct:
    """The output's type: inside shard_map it varies over `axes`, or wrong out_specs would pass."""
    if not axes:
        return out
    replicated = PartitionSpec(*[None] * len(out.shape))
    return jax.ShapeDtypeStruct(
        out.shape,
        out.dtype,
        sharding=NamedSharding(jax.sharding.get_abstract_mesh(), replicated),
        manual_axis_type=ManualAxisType(varying=frozenset(axes)),
    )
