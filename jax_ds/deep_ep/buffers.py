"""What the communication kernels leave on the device: symmetric buffers, and recorded failures."""

from typing import Any

import jax.numpy as jnp

from jax_ds._core.checks import check as require
from jax_ds._runtime import native


def check() -> None:
    """Raises what a wait for another rank has recorded on this process's devices.

    A communication kernel never waits longer than `JAX_DS_TIMEOUT_S`. Where it waited in vain its
    results are NaN, and the next execution of a communicating program fails, or this function
    does, with the operation, this rank, the awaited rank and the round. Later waits of the device
    end at once: restart all ranks. XLA's collectives, which carry the portable implementation,
    report their failures themselves.

    Raises:
      RuntimeError: with all that was recorded.
    """
    failures = native.communication_failures()
    if failures:
        raise RuntimeError("; ".join(failures))


def buffer_bytes(
    *,
    num_tokens: int,
    hidden: int,
    top_k: int,
    num_ranks: int,
    dtype: Any = jnp.bfloat16,
    low_latency: bool = False,
) -> int:
    """Bytes of the symmetric buffers that one rank registers for one channel.

    Every pair of ranks has T slots in each direction; a slot holds a whole record:

        dispatch record = align(H * itemsize [+ 4 * ceil(H/128) for float8] + 4K + 16)
        combine record  = align(2H) + align(4K)          a bfloat16 partial sum, and the weights
        bytes           = R * T * (dispatch record + combine record)

    with align(n) = n rounded up to 128 bytes, and twice that for `low_latency`, which is
    double-buffered. The portable implementation registers nothing.

    Args:
      num_tokens: T, or max_tokens of the low-latency functions.
      hidden: H.
      top_k: K.
      num_ranks: R; those of one node where `axis_name` is (node, gpu).
      dtype: of the dispatched tokens, float8_e4m3fn for Quantized.
      low_latency: whether for the low-latency functions.

    Raises:
      ValueError: for a size below 1.
    """
    for name, value in (
        ("num_tokens", num_tokens),
        ("hidden", hidden),
        ("top_k", top_k),
        ("num_ranks", num_ranks),
    ):
        require(value >= 1, name, "must be at least 1", value)
    payload = hidden * jnp.dtype(dtype).itemsize
    if jnp.dtype(dtype) == jnp.float8_e4m3fn:
        payload += 4 * -(-hidden // 128)
    record = _align(payload + 4 * top_k + 16) + _align(2 * hidden) + _align(4 * top_k)
    return num_ranks * num_tokens * record * (2 if low_latency else 1)


def _align(size: int) -> int:
    return -(-size // 128) * 128
