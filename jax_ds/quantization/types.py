"""The quantized array: FP8 values with one float32 scale per block."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jax_ds._core.checks import check, check_dtype, check_shape, fail, format_shape
from jax_ds._core.groups import BLOCK

VALUES_DTYPE = jnp.float8_e4m3fn


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantized:
    """An array in FP8 with block scales: `dequantized = values * scale of the value's block`.

    A pytree, so it passes through jit, vmap, scan and shard_map. It carries no gradient: the
    functions that make or consume one raise when differentiated (see `deep_gemm.fp8_linear` for
    a differentiable product).

    Attributes:
      values: float8_e4m3fn `[..., R, C]`.
      scales: float32 `[..., R, ceil(C/128)]` (1x128 blocks) or
        `[..., ceil(R/128), ceil(C/128)]` (128x128 blocks). The last block of a dimension that is
        no multiple of 128 is smaller.
    """

    values: Float[Array, "..."]
    scales: Float[Array, "..."]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of `values`."""
        return tuple(self.values.shape)

    @property
    def ndim(self) -> int:
        """The number of dimensions of `values`."""
        return len(self.shape)

    @property
    def block(self) -> tuple[int, int]:
        """(1, 128) or (128, 128), read off the shape of `scales`.

        A single row is the same in both; it reads as (1, 128).
        """
        per_row = self.ndim < 2 or self.scales.shape[-2] == self.shape[-2]
        return (1, BLOCK) if per_row else (BLOCK, BLOCK)


def num_blocks(size: int) -> int:
    """ceil(size / 128)."""
    return -(-size // BLOCK)


def check_quantized(argument: str, q: Quantized, block: tuple[int, int] | None = None) -> None:
    """Checks the dtypes of a Quantized and the shape of its scales, for `block` or either block."""
    if not isinstance(q, Quantized):
        raise TypeError(f"{argument}: must be a Quantized, got {type(q).__name__}")
    check_dtype(f"{argument}.values", q.values, VALUES_DTYPE)
    check_dtype(f"{argument}.scales", q.scales, jnp.float32)
    check(q.ndim >= 1, f"{argument}.values", "must have at least 1 dimension", "shape []")
    *lead, k = q.shape
    per_row = (*lead, num_blocks(k))
    square = (*lead[:-1], num_blocks(lead[-1]), num_blocks(k)) if lead else per_row
    if block is not None:
        letters = "... R ceil(C/128)" if block[0] == 1 else "... ceil(R/128) ceil(C/128)"
        expected = per_row if block[0] == 1 else square
        check_shape(f"{argument}.scales", q.scales, expected, letters)
    elif q.scales.shape not in (per_row, square):
        rule = (
            f"must have shape {format_shape(per_row)} (1x128) or {format_shape(square)} (128x128)"
        )
        fail(f"{argument}.scales", rule, format_shape(q.scales.shape))
