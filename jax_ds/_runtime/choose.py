"""The one place that decides which implementation runs.

`implementation="xla"` is the portable one, `"cuda"` ours or an error that says why not. `None`
takes ours on Hopper: the choice is made per platform when the program is lowered, so that a
CPU-only machine can lower for CUDA; where the GPUs are known not to be Hopper, the CUDA branch
is left out while tracing. The choice depends only on facts that are equal on every process.
"""

from collections.abc import Callable
from typing import Any, Literal

import jax

from jax_ds._core.checks import check_choice
from jax_ds._runtime.varying import to_varying, varying_axes

Implementation = Literal["cuda", "xla"] | None

_HOPPER = "9.0"


def check_implementation(implementation: object) -> None:
    """Requires what `choose` takes."""
    check_choice("implementation", implementation, (None, "xla", "cuda"))


def choose(
    op: str,
    implementation: Implementation,
    operands: tuple[Any, ...],
    *,
    xla: Callable[..., Any],
    cuda: Callable[..., Any] | None,
    unsupported: str | None = None,
) -> Any:
    """Returns `xla(*operands)` or `cuda(*operands)`.

    Args:
      op: public name of the operation, for messages.
      implementation: what the caller asked for.
      operands: arrays or pytrees of arrays.
      xla: the portable implementation.
      cuda: the kernel's implementation; None where the operation has none.
      unsupported: why the kernel cannot take these operands, None if it can.
    """
    check_implementation(implementation)
    if implementation == "xla":
        return xla(*operands)
    _reject_sharded(op, operands)
    reason = f"{op} has no CUDA kernel" if cuda is None else unsupported
    if implementation == "cuda":
        reason = reason or _why_not_hopper(aot=False)
        if reason:
            raise NotImplementedError(
                f"{op}: implementation='cuda' cannot run here, {reason}; "
                "use implementation=None or 'xla'"
            )
        assert cuda is not None
        return cuda(*operands)
    if cuda is None or reason or _why_not_hopper(aot=True):
        return xla(*operands)
    return by_platform(operands, cuda=cuda, default=xla)


def by_platform(
    operands: tuple[Any, ...], *, cuda: Callable[..., Any], default: Callable[..., Any]
) -> Any:
    """`cuda(*operands)` where the program is lowered for CUDA, `default(*operands)` elsewhere.

    Both results vary over the mesh axes that any operand varies over, so that their types agree.
    """
    axes = varying_axes(operands)
    return jax.lax.platform_dependent(
        *operands,
        cuda=lambda *args: to_varying(cuda(*args), axes),
        default=lambda *args: to_varying(default(*args), axes),
    )


def _why_not_hopper(*, aot: bool) -> str | None:
    """Why the devices at hand cannot run our kernels; None if they can.

    With `aot`, a machine without any GPU is no reason: it may lower for one.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is not None and device.platform != "cpu":
        name = device.device_kind
        # A mesh names the chip only by its product name; GH200 is Hopper too.
        hopper = any(chip in name for chip in ("H100", "H200", "H800", "H20", "GH200"))
        return None if hopper else f"the mesh's devices are {name}, not Hopper"
    try:
        gpus = jax.devices("cuda")  # of every process: all must choose alike
    except RuntimeError:
        return None if aot else "no NVIDIA GPU is visible to JAX (jax[cuda13] not installed?)"
    others = {d.device_kind for d in gpus if getattr(d, "compute_capability", "") != _HOPPER}
    return f"{', '.join(sorted(others))} is not Hopper (compute capability 9.0)" if others else None


def _reject_sharded(op: str, operands: tuple[Any, ...]) -> None:
    """Under explicit sharding, a sharded operand outside shard_map would be gathered: refuse it."""
    for leaf in jax.tree.leaves(operands):
        sharding = jax.typeof(leaf).sharding
        axes = [a for a in jax.tree.leaves(tuple(sharding.spec)) if a is not None]
        if axes:
            raise ValueError(
                f"{op}: operands must not be sharded outside jax.shard_map, "
                f"got {jax.typeof(leaf).str_short()} sharded over {', '.join(map(str, axes))}"
            )
