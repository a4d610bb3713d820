"""With jax_enable_x64, integers that jnp makes are 64 bits wide unless told otherwise: what we
hand from one function to the next must stay 32."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_ds import deep_ep, deep_gemm, flash_mla, models, quantization
from tests.models import tiny


def _array(*shape: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _ints(*shape: int) -> jax.ShapeDtypeStruct:
    return _array(*shape, dtype=jnp.int32)


def _gradient(function: Callable[..., Any], *argnums: int) -> Callable[..., Any]:
    def loss(*operands: Any) -> jax.Array:
        return jnp.sum(function(*operands), dtype=jnp.float32)

    return jax.value_and_grad(loss, argnums=argnums)


def _low_latency(x: jax.Array, ids: jax.Array) -> jax.Array:
    def body(x: jax.Array, ids: jax.Array) -> jax.Array:
        rows, _, handle = deep_ep.low_latency_dispatch(
            x, ids, num_experts=16, max_tokens=4, axis_name="ep"
        )
        weights = jnp.ones(ids.shape, jnp.float32)
        return deep_ep.low_latency_combine(quantization.dequantize(rows), handle, weights)

    mesh = jax.make_mesh((8,), ("ep",), axis_types=(jax.sharding.AxisType.Auto,))
    mapped: Callable[..., jax.Array] = jax.shard_map(
        body, mesh=mesh, in_specs=jax.P("ep"), out_specs=jax.P("ep")
    )
    return mapped(x, ids)


CACHE = (_array(4, 64, 576), _ints(2, 2), _ints(2))
PROGRAMS: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    "quantize along tokens": (quantization.quantize_1x128_both, (_array(16, 128), _ints(3))),
    "fp8_grouped_linear": (
        _gradient(deep_gemm.fp8_grouped_linear, 0, 1),
        (_array(16, 128), _array(3, 64, 128), _ints(3)),
    ),
    "bf16_grouped_gemm": (
        _gradient(deep_gemm.bf16_grouped_gemm, 0, 1),
        (_array(16, 128), _array(3, 64, 128), _ints(3)),
    ),
    "decode": (_gradient(flash_mla.decode, 0, 1), (_array(2, 1, 4, 576), *CACHE)),
    "append": (_gradient(flash_mla.append, 0, 1), (CACHE[0], _array(2, 1, 576), *CACHE[1:])),
    "prefill": (
        _gradient(flash_mla.prefill, 0, 1, 2),
        (_array(1, 9, 4, 192), _array(1, 9, 4, 192), _array(1, 9, 4, 128)),
    ),
    "low latency": (_low_latency, (_array(32, 128), _ints(32, 2))),
}


def _assert_narrow(results: Any) -> None:
    wide = [leaf for leaf in jax.tree.leaves(results) if np.dtype(leaf.dtype).itemsize > 4]
    assert not wide


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize("platform", ["cpu", "cuda"])
def test_program(name: str, platform: str) -> None:
    function, operands = PROGRAMS[name]
    with jax.enable_x64(True):
        traced = jax.jit(function).trace(*operands)
        traced.lower(lowering_platforms=(platform,))
    _assert_narrow(traced.out_info)


def test_training_step() -> None:
    """Gate, dispatch over two axes, FP8 experts and combine, forward and backward."""
    mesh, axis = tiny.mesh(2, 4)
    config = tiny.config(axis_name=axis, precision="fp8", capacity_factor=2.0)
    with jax.enable_x64(True):
        shapes = jax.eval_shape(lambda: models.init_state(config, tiny.TRAIN, mesh, 0))
        state = jax.tree.map(
            lambda leaf, spec: jax.ShapeDtypeStruct(
                leaf.shape, leaf.dtype, sharding=jax.NamedSharding(mesh, spec)
            ),
            shapes,
            models.state_specs(config, tiny.TRAIN),
        )
        tokens = jax.ShapeDtypeStruct(
            (8, 17), jnp.int32, sharding=jax.NamedSharding(mesh, jax.P(mesh.axis_names))
        )
        step = models.make_train_step(config, tiny.TRAIN, mesh)
        _, metrics = jax.eval_shape(step, state, tokens)
    _assert_narrow(metrics)
