"""What the communication kernels leave on the device: symmetric buffers, and recorded failures."""

from typing import Any

import jax.numpy as jnp

from jax_ds._core.checks import check as require
from jax_ds._core.checks import check_integer
from jax_ds._runtime import native

# A window's signals precede its slots.
_HEADER = 4096


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
    num_ranks: int,
    dtype: Any = jnp.bfloat16,
    training: bool = False,
) -> int:
    """Bytes of the symmetric buffers that one rank allocates for one channel of one mesh axis.

    An operation has a window: a slot for each token of each rank, which holds a whole record.

        dispatch record = align(H * itemsize [+ 4 * ceil(H/128) for float8])
        combine record  = align(2H)                     a bfloat16 partial sum (4H if float32)
        window          = 4096 + size_class(R * T * record)

    align(n) rounds up to 128 bytes, size_class(n) to 4, 5, 6 or 7 times a power of two, at least
    4 MiB, so that programs of similar sizes share windows. They are allocated when a program first
    runs, beside XLA's own memory pool (`XLA_PYTHON_CLIENT_MEM_FRACTION`), and kept to the end of
    the process. Kernels that read a rank's rows need none; nor do the portable implementation and
    the low-latency functions.

    Args:
      num_tokens: T.
      hidden: H.
      num_ranks: R.
      dtype: of the dispatched tokens, float8_e4m3fn for Quantized.
      training: with the backward pass, whose dispatch carries the cotangents of y.

    Raises:
      ValueError, TypeError: for a size below 1 or no integer.
    """
    for name, value in (
        ("num_tokens", num_tokens),
        ("hidden", hidden),
        ("num_ranks", num_ranks),
    ):
        require(check_integer(name, value) >= 1, name, "must be at least 1", value)
    sent = jnp.dtype(dtype)
    quantized = sent == jnp.float8_e4m3fn
    result = jnp.dtype(jnp.bfloat16) if quantized else sent
    scales = 4 * -(-hidden // 128) if quantized else 0
    records = [hidden * sent.itemsize + scales, hidden * result.itemsize]
    if training and quantized:
        records.append(hidden * result.itemsize)
    slots = num_ranks * num_tokens
    return sum(_HEADER + _size_class(slots * _align(record)) for record in records)


def _align(size: int) -> int:
    return -(-size // 128) * 128


def _size_class(size: int) -> int:
    """The kernels' host code rounds so too."""
    unit = 1 << 20
    while 7 * unit < size:
        unit *= 2
    return max(4, -(-size // unit)) * unit
