"""deep_gemm in twenty lines: a linear layer whose three products run in FP8."""

import jax
import jax.numpy as jnp

from jax_ds import deep_gemm


@jax.jit
@jax.value_and_grad
def loss(w: jax.Array, x: jax.Array, target: jax.Array) -> jax.Array:
    y = deep_gemm.fp8_linear(x, w)
    return jnp.square(y - target).astype(jnp.float32).mean()


keys = jax.random.split(jax.random.key(0), 3)
x = jax.random.normal(keys[0], (1024, 512), jnp.bfloat16)
truth = jax.random.normal(keys[1], (384, 512), jnp.float32) * 512**-0.5
target = (x @ truth.T.astype(x.dtype)).astype(jnp.bfloat16)
w = jnp.zeros_like(truth)  # [N, K]
for step in range(30):
    value, gradient = loss(w, x, target)
    w = w - 100.0 * gradient
    if step % 10 == 0 or step == 29:
        print(f"step {step:2d} loss {value:.5f}")
