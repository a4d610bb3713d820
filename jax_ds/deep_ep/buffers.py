"""What the communication kernels leave on the device: symmetric buffers, and recorded failures."""

from typing import Any

import jax.numpy as jnp

from jax_ds._core.checks import check as require
from jax_ds._core.checks import check_dtype_choice, check_integer
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
    top_k: int = 8,
    low_latency: bool = False,
) -> int:
    """Bytes of the symmetric buffers that one rank allocates for one channel of one mesh axis.

    An operation has a window: a slot for each token of each rank, which holds a whole record.

        dispatch record = align(H * itemsize [+ 4 * ceil(H/128) for float8])
        combine record  = align(2H) + 4K       a bfloat16 partial sum (4H if float32), the weights
        window          = 4096 + size_class(R * T * record)

    The low-latency functions have windows of their own, twice this size because calls take turns;
    the ids of a token travel beside its dispatch record, 4K bytes more.

    align(n) rounds up to 128 bytes, size_class(n) to 8 to 15 times a power of two, at least 4 MiB,
    so that programs of similar sizes share windows. They are allocated when a program first
    runs, beside XLA's own memory pool (`XLA_PYTHON_CLIENT_MEM_FRACTION`), and kept to the end of
    the process. The portable implementation needs none.

    Args:
      num_tokens: T.
      hidden: H.
      num_ranks: R.
      dtype: of the dispatched tokens: bfloat16, float32, or float8_e4m3fn for Quantized.
      training: with the backward pass, whose dispatch carries the cotangents of y.
      top_k: K.
      low_latency: for `low_latency_dispatch` and `low_latency_combine` instead.

    Returns:
      Bytes of all its windows together.

    Raises:
      ValueError, TypeError: for a size below 1 or no integer, or a dtype that is not dispatched.
    """
    for name, value in (
        ("num_tokens", num_tokens),
        ("hidden", hidden),
        ("num_ranks", num_ranks),
        ("top_k", top_k),
    ):
        check_integer(name, value, 1)
    sent = check_dtype_choice("dtype", dtype, jnp.bfloat16, jnp.float32, jnp.float8_e4m3fn)
    quantized = sent == jnp.float8_e4m3fn
    result = jnp.dtype(jnp.bfloat16) if quantized else sent
    scales = 4 * -(-hidden // 128) if quantized else 0
    dispatch = _align(hidden * sent.itemsize + scales)
    combine = _align(hidden * result.itemsize)
    notes = 4 * top_k
    if low_latency:
        no_gradient = "must be False for low latency, which has no gradient"
        require(not training, "training", no_gradient, training)
        records, turns = [dispatch + notes, combine + notes], 2
    else:
        records, turns = [dispatch, combine + notes], 1
        if training and quantized:
            records.append(combine)
    slots = num_ranks * num_tokens
    return sum(turns * (_HEADER + _size_class(slots * record)) for record in records)


def _align(size: int) -> int:
    return -(-size // 128) * 128


def _size_class(size: int) -> int:
    """The kernels' host code rounds so too."""
    unit = 1 << 19
    while 15 * unit < size:
        unit *= 2
    return max(8, -(-size // unit)) * unit
