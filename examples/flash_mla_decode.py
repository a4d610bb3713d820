"""flash_mla in twenty lines: one decode step of latent attention on a paged cache."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jax_ds import flash_mla


@jax.jit
def step(q: Array, row: Array, pages: Array, table: Array, lengths: Array) -> tuple[Any, Array]:
    pages = flash_mla.append(pages, row, table, lengths)
    return flash_mla.decode(q, pages, table, lengths, scale=192**-0.5), pages


keys = jax.random.split(jax.random.key(0), 3)
pages = jax.random.normal(keys[0], (8, 64, 576), jnp.bfloat16)  # 8 pages of 64 tokens
table = jnp.array([[3, 1, 7], [5, 0, 0]], jnp.int32)  # the pages of two sequences
lengths = jnp.array([130, 17], jnp.int32)  # with the new token
row = jax.random.normal(keys[1], (2, 1, 576), jnp.bfloat16)  # its latent (512) and rope (64)
q = jax.random.normal(keys[2], (2, 1, 16, 576), jnp.bfloat16)  # 16 heads, absorbed queries
out, pages = step(q, row, pages, table, lengths)
print("out", out.shape, out.dtype, "mean square", jnp.square(out.astype(jnp.float32)).mean())
