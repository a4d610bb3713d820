"""The online softmax: attention over one block of keys at a time, and its gradient.

Decode and prefill differ in where a block comes from; from here on both are the same thing:
rows [B, G, R, D] attend to keys [B, G, L, D] with values [B, G, L, V]. Row r sees the keys whose
position lies in its interval [first, last), [B or 1, 1, R]; an empty interval is a row without
any key. G: groups of heads that share keys, R: rows of one group.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array


class Interval(NamedTuple):
    """Positions of the keys that each row sees, int32 [B or 1, 1, R]."""

    first: Array
    last: Array

    def nonempty(self) -> Array:
        return self.first < self.last

    def sees(self, positions: Array) -> Array:
        """Which of the keys at `positions` [L] each row sees, [B or 1, 1, R, L]."""
        positions = positions[None, None, None, :]
        return (self.first[..., None] <= positions) & (positions < self.last[..., None])

    def hull(self) -> tuple[Array, Array]:
        """The smallest interval that holds those of all rows; (0, 0) if all are empty."""
        nonempty = self.nonempty()
        last = jnp.max(jnp.where(nonempty, self.last, 0), initial=0)
        return jnp.min(jnp.where(nonempty, self.first, last), initial=last), last


class State(NamedTuple):
    """What the blocks so far have given, all float32."""

    maximum: Array  # [B, G, R]: largest score, -inf before the first key
    total: Array  # [B, G, R]: sum of exp(score - maximum)
    weighted: Array  # [B, G, R, V]: sum of exp(score - maximum) * value


def product(spec: str, a: Array, b: Array) -> Array:
    """An einsum that accumulates in float32; float32 operands are not rounded to TF32."""
    exact = a.dtype == jnp.float32
    precision = jax.lax.Precision.HIGHEST if exact else None
    return jnp.einsum(spec, a, b, precision=precision, preferred_element_type=jnp.float32)


def initial(rows: tuple[int, ...], value_dim: int) -> State:
    """The state before the first key; `rows` is (B, G, R)."""
    return State(
        jnp.full(rows, -jnp.inf, jnp.float32),
        jnp.zeros(rows, jnp.float32),
        jnp.zeros((*rows, value_dim), jnp.float32),
    )


def absorb(state: State, scores: Array, visible: Array, values: Array) -> State:
    """The state after one more block: scores [B, G, R, L] (scaled), values [B, G, L, V]."""
    scores = jnp.where(visible, scores, -jnp.inf)
    maximum = jnp.maximum(state.maximum, scores.max(axis=-1))
    # Before a row's first key the maximum is -inf, and -inf - -inf would be NaN.
    shift = jnp.where(maximum == -jnp.inf, 0.0, maximum)
    weights = jnp.exp(scores - shift[..., None])
    decay = jnp.exp(state.maximum - shift)
    block = product("bgrl,bglv->bgrv", weights.astype(values.dtype), values)
    return State(
        maximum,
        state.total * decay + weights.sum(axis=-1),
        state.weighted * decay[..., None] + block,
    )


def finish(state: State) -> tuple[Array, Array]:
    """The output [B, G, R, V] and lse [B, G, R], float32; rows without any key give 0 and -inf."""
    seen = state.maximum > -jnp.inf
    # A NaN score makes the maximum NaN: such a row is not empty, its NaN must show.
    seen |= jnp.isnan(state.maximum)
    total = jnp.where(seen, state.total, 1.0)
    lse = jnp.where(seen, state.maximum + jnp.log(total), -jnp.inf)
    return state.weighted / total[..., None], lse


def score_gradient(
    scores: Array, visible: Array, lse: Array, dweights: Array, delta: Array
) -> tuple[Array, Array]:
    """Recomputes a block's probabilities; returns them and the gradient of its scaled scores.

    With dweights = dout . value and delta = sum(dout * out) - dlse per row, the gradient of the
    score is `probability * (dweights - delta)`. Callers pass rows without any key as zeros.
    """
    shift = jnp.where(lse == -jnp.inf, 0.0, lse)
    probabilities = jnp.where(visible, jnp.exp(scores - shift[..., None]), 0.0)
    return probabilities, probabilities * (dweights - delta[..., None])
