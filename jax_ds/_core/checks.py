"""Checks of a user's arguments, raised while tracing.

Every message names the argument, the rule and the value, in that order:
`kv_pages: page size must be 64, got 16`.
"""

import math
import numbers
from collections.abc import Sequence
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np


def fail(argument: str, rule: str, got: object) -> NoReturn:
    """Raises the ValueError for a rule that `argument` breaks."""
    raise ValueError(f"{argument}: {rule}, got {got}")


def check(condition: bool, argument: str, rule: str, got: object) -> None:
    """Raises unless `condition` holds."""
    if not condition:
        fail(argument, rule, got)


def check_rank(argument: str, x: Any, rank: int) -> None:
    """Requires exactly `rank` dimensions."""
    if np.ndim(x) != rank:
        fail(argument, f"must have {rank} dimensions", f"shape {format_shape(np.shape(x))}")


def check_dtype(argument: str, x: Any, *allowed: Any) -> None:
    """Requires an array of one of the `allowed` dtypes; a TypeError otherwise."""
    if not hasattr(x, "dtype"):
        raise TypeError(f"{argument}: must be an array, got {type(x).__name__}")
    dtype = jnp.dtype(x.dtype)
    if dtype not in {jnp.dtype(a) for a in allowed}:
        *names, last = (jnp.dtype(a).name for a in allowed)
        rule = f"{', '.join(names)} or {last}" if names else last
        raise TypeError(f"{argument}: dtype must be {rule}, got {dtype.name}")


def check_shape(argument: str, x: Any, expected: Sequence[int | None], letters: str) -> None:
    """Requires the `expected` shape, where None stands for any size.

    `letters` names the dimensions as the docstrings do, for instance `"B S H 576"`.
    """
    shape = np.shape(x)
    fits = len(shape) == len(expected) and all(
        want is None or have == want for have, want in zip(shape, expected, strict=True)
    )
    if not fits:
        wanted = ", ".join("*" if want is None else str(want) for want in expected)
        fail(argument, f"must have shape [{letters}] = [{wanted}]", format_shape(shape))


def check_choice(argument: str, value: object, choices: Sequence[object]) -> None:
    """Requires `value` to be one of `choices`; an array, traced above all, is none."""
    if isinstance(value, jax.Array | np.ndarray) or value not in choices:
        fail(argument, "must be one of " + ", ".join(map(repr, choices)), repr(value))


def check_dtype_choice(argument: str, dtype: Any, *allowed: Any) -> jnp.dtype:
    """Requires a keyword that names one of the `allowed` dtypes; returns that dtype."""
    try:
        name = None if dtype is None else jnp.dtype(dtype).name
    except TypeError:
        name = dtype
    check_choice(argument, name, [jnp.dtype(a).name for a in allowed])
    return jnp.dtype(dtype)


def check_integer(argument: str, value: Any, least: int | None = None) -> int:
    """Requires a static integer, numpy's included, of `least` or more; returns it as Python's."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise TypeError(f"{argument}: must be a static integer, got {value!r}")
    integer = int(value)
    check(least is None or integer >= least, argument, f"must be at least {least}", value)
    return integer


def check_number(argument: str, value: Any, *, positive: bool = False) -> float:
    """Requires a static finite number, positive or else not negative; returns it as Python's."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise TypeError(f"{argument}: must be a static number, got {value!r}")
    number = float(value)
    fits = math.isfinite(number) and (number > 0 if positive else number >= 0)
    rule = "must be positive and finite" if positive else "must be finite and not negative"
    check(fits, argument, rule, value)
    return number


def known_values(x: Any) -> np.ndarray[Any, Any] | None:
    """The values of an array, where this process knows them while tracing; None elsewhere."""
    known = isinstance(x, np.ndarray) or (
        isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer) and x.is_fully_addressable
    )
    return np.asarray(x) if known else None


def axis_names(axis_name: str | Sequence[str]) -> tuple[str, ...]:
    """The names of one mesh axis or of several."""
    return (axis_name,) if isinstance(axis_name, str) else tuple(axis_name)


def check_axis(argument: str, axis_name: str | tuple[str, ...]) -> int:
    """Requires mesh axes that are manual here (inside `jax.shard_map`); returns their size."""
    try:
        return int(jax.lax.axis_size(axis_names(axis_name)))
    except (NameError, KeyError, TypeError):
        fail(argument, "must name axes of the enclosing jax.shard_map", repr(axis_name))


def format_shape(shape: Sequence[int]) -> str:
    return "[" + ", ".join(map(str, shape)) + "]"
