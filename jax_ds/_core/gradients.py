"""FP8 values carry no gradient: differentiating through one is an error, never a guess."""

from collections.abc import Callable
from typing import Any, NoReturn

import jax

FP8 = "a cotangent cannot cross FP8 values"


def without_gradient(
    op: str, instead: str, function: Callable[..., Any], *operands: Any, why: str = FP8
) -> Any:
    """`function(*operands)`, whose differentiation raises a TypeError.

    Differentiated as it stands, XLA would round the cotangent to FP8 at the first conversion.
    `instead` says what to do; `function` must close over nothing that is traced.
    """

    def refuse(*_: Any) -> NoReturn:
        raise TypeError(f"{op}: not differentiable, {why}; {instead}")

    call = jax.custom_vjp(function)
    call.defvjp(refuse, refuse)
    return call(*operands)
