"""Typical mistakes, each with the exact sentence the user sees, all raised while tracing."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_ds import deep_ep, deep_gemm, flash_mla, moe, quantization
from jax_ds._core import settings
from jax_ds.quantization import Quantized


def _zeros(*shape: int, dtype: Any = jnp.bfloat16) -> jax.Array:
    return jnp.zeros(shape, dtype)


def _per_device(function: Callable[..., Any], *operands: jax.Array) -> None:
    """Traces `function` on eight expert-parallel devices."""
    mesh = jax.make_mesh((8,), ("ep",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.P("ep")
    jax.eval_shape(jax.shard_map(function, mesh=mesh, in_specs=spec, out_specs=spec), *operands)


def _decode(**changed: Any) -> None:
    operands = {
        "q": _zeros(2, 1, 4, 576),
        "kv_pages": _zeros(8, 64, 576),
        "page_table": _zeros(2, 3, dtype=jnp.int32),
        "seq_lens": _zeros(2, dtype=jnp.int32),
    }
    flash_mla.decode(**(operands | changed))


def _activations() -> Quantized:
    return quantization.quantize_1x128(_zeros(16, 256))


def _weights(*groups: int) -> Quantized:
    return quantization.quantize_128x128(_zeros(*groups, 128, 256))


def _plan(ids: jax.Array, **changed: Any) -> deep_ep.DispatchPlan:
    return deep_ep.plan_dispatch(ids, **({"num_experts": 16, "axis_name": "ep"} | changed))


IDS = np.zeros((32, 2), np.int32)  # 4 tokens a device


def _moe(x: jax.Array) -> jax.Array:
    params = moe.MoEParams(
        router=_zeros(16, 128, dtype=jnp.float32),
        bias=_zeros(16, dtype=jnp.float32),
        gate_up=_zeros(16, 256, 128),
        down=_zeros(16, 128, 128),
    )
    y: jax.Array = moe.moe_layer(x, params, axis_name="ep", k=2)[0]
    return y


def _gradient_through_fp8() -> None:
    def loss(scales: jax.Array) -> jax.Array:
        lhs = Quantized(_activations().values, scales)
        return deep_gemm.fp8_gemm(lhs, _weights(), out_dtype=jnp.float32).sum()

    jax.grad(loss)(_activations().scales)


def _sharded_outside_shard_map() -> None:
    mesh = jax.make_mesh((8,), ("ep",))
    rows = jax.device_put(_zeros(16, 256), jax.NamedSharding(mesh, jax.P("ep")))
    jax.jit(quantization.quantize_1x128)(rows)


MISTAKES: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "a page size of another cache": (
        lambda: _decode(kv_pages=_zeros(8, 48, 576)),
        ValueError,
        "kv_pages: page size must be 16, 32, 64 or 128, got 48",
    ),
    "queries that are not absorbed into the latent space": (
        lambda: _decode(q=_zeros(2, 1, 4, 192)),
        ValueError,
        "kv_pages: must have shape [P L D] = [*, *, 192], got [8, 64, 576]",
    ),
    "lengths of another batch": (
        lambda: _decode(seq_lens=_zeros(3, dtype=jnp.int32)),
        ValueError,
        "seq_lens: must have shape [B] = [2], got [3]",
    ),
    "a list for an array": (
        lambda: _decode(seq_lens=[3, 4]),
        TypeError,
        "seq_lens: must be an array, got list",
    ),
    "a page table made by numpy without a dtype": (
        lambda: _decode(page_table=np.zeros((2, 3))),
        TypeError,
        "page_table: dtype must be int32, got float64",
    ),
    "a prompt without its batch dimension": (
        lambda: flash_mla.prefill(_zeros(8, 4, 192), _zeros(8, 4, 192), _zeros(8, 4, 128)),
        ValueError,
        "q: must have 4 dimensions, got shape [8, 4, 192]",
    ),
    "numpy's float64": (
        lambda: quantization.quantize_1x128(np.ones((4, 128))),
        TypeError,
        "x: dtype must be bfloat16 or float32, got float64",
    ),
    "a misspelt keyword's value": (
        lambda: quantization.quantize_1x128(_zeros(4, 128), scale_dtype="e8m0"),  # type: ignore[arg-type]
        ValueError,
        "scale_dtype: must be one of 'float32', 'ue8m0', got 'e8m0'",
    ),
    "transposed scales": (
        lambda: deep_gemm.fp8_gemm(
            Quantized(_activations().values, _activations().scales.T), _weights()
        ),
        ValueError,
        "lhs.scales: must have shape [... R ceil(C/128)] = [16, 2], got [2, 16]",
    ),
    "weights quantized like activations": (
        lambda: deep_gemm.fp8_gemm(_activations(), quantization.quantize_1x128(_zeros(128, 256))),
        ValueError,
        "rhs.scales: must have shape [... ceil(R/128) ceil(C/128)] = [1, 2], got [128, 2]",
    ),
    "weights stored [K, N]": (
        lambda: deep_gemm.fp8_linear(_zeros(4, 256), _zeros(256, 128)),
        ValueError,
        "w: last dimension must be x's K, got 128 and 256",
    ),
    "group sizes that add up to more than M": (
        lambda: deep_gemm.fp8_grouped_gemm(
            _activations(), _weights(4), jnp.array([9, 9, 0, 0], jnp.int32)
        ),
        ValueError,
        "group_sizes: sum must be at most M = 16, got 18",
    ),
    "fewer group sizes than groups": (
        lambda: deep_gemm.fp8_grouped_gemm(
            _activations(), _weights(4), jnp.array([9, 0, 0], jnp.int32)
        ),
        ValueError,
        "group_sizes: must have shape [G] = [4], got [3]",
    ),
    "a gradient through FP8 values": (
        _gradient_through_fp8,
        TypeError,
        "fp8_gemm: not differentiable, a cotangent cannot cross FP8 values; use fp8_linear, or "
        "apply jax.lax.stop_gradient before quantizing",
    ),
    "an unknown implementation": (
        lambda: deep_gemm.fp8_gemm(_activations(), _weights(), implementation="pallas"),  # type: ignore[arg-type]
        ValueError,
        "implementation: must be one of None, 'xla', 'cuda', got 'pallas'",
    ),
    "a kernel without a GPU": (
        lambda: quantization.quantize_1x128(_zeros(4, 128), implementation="cuda"),
        NotImplementedError,
        "quantize_1x128: implementation='cuda' cannot run here, no NVIDIA GPU is visible to JAX "
        "(jax[cuda13] not installed?); use implementation=None or 'xla'",
    ),
    "a sharded operand outside shard_map": (
        _sharded_outside_shard_map,
        ValueError,
        "quantize_1x128: operands must not be sharded outside jax.shard_map, got "
        "bfloat16[16@ep,256] sharded over ep",
    ),
    "a plan outside shard_map": (
        lambda: _plan(IDS),
        ValueError,
        "axis_name: must name axes of the enclosing jax.shard_map, got 'ep'",
    ),
    "experts that do not divide": (
        lambda: _per_device(lambda ids: _plan(ids, num_experts=12).group_sizes, IDS),
        ValueError,
        "num_experts: must be a positive multiple of the 8 ranks of axis 'ep', got 12",
    ),
    "a capacity computed in floating point": (
        lambda: _per_device(lambda ids: _plan(ids, capacity=1.25 * 64).group_sizes, IDS),
        TypeError,
        "capacity: must be a static integer, got 80.0",
    ),
    "a node's capacity without nodes": (
        lambda: _per_device(lambda ids: _plan(ids, node_capacity=2).group_sizes, IDS),
        ValueError,
        "node_capacity: needs axis_name=(node, gpu), got 'ep'",
    ),
    "tokens of another plan": (
        lambda: _per_device(lambda ids, x: deep_ep.dispatch(x, _plan(ids)), IDS, _zeros(64, 128)),
        ValueError,
        "x: must have shape [T H] = [4, *], got [8, 128]",
    ),
    "tokens given to combine in place of rows": (
        lambda: _per_device(
            lambda ids, x: deep_ep.combine(x, _plan(ids), None), IDS, _zeros(32, 128)
        ),
        ValueError,
        "rows: must have shape [C H] = [64, *], got [4, 128]",
    ),
    "more tokens than a low-latency buffer holds": (
        lambda: _per_device(
            lambda ids, x: deep_ep.low_latency_dispatch(
                x, ids, num_experts=16, max_tokens=2, axis_name="ep"
            )[1],
            IDS,
            _zeros(32, 128),
        ),
        ValueError,
        "x: must have at most max_tokens = 2 tokens, got 4",
    ),
    "expert weights that are not sharded": (
        lambda: _per_device(_moe, _zeros(32, 128)),
        ValueError,
        "params.gate_up: must have shape [E_local 2F H] = [2, *, 128], got [16, 256, 128]",
    ),
    "more experts per token than its groups have": (
        lambda: moe.group_limited_topk(
            _zeros(4, 16, dtype=jnp.float32),
            _zeros(16, dtype=jnp.float32),
            k=9,
            num_groups=4,
            top_groups=2,
        ),
        ValueError,
        "k: must lie between 1 and the 8 reachable experts, got 9",
    ),
    "a timeout with a unit": (
        lambda: settings.read({"JAX_DS_TIMEOUT_S": "1 min"}),
        ValueError,
        "JAX_DS_TIMEOUT_S: must be a positive number of seconds, got '1 min'",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake(name: str) -> None:
    make, kind, sentence = MISTAKES[name]
    with pytest.raises(kind) as caught:
        make()
    assert str(caught.value) == sentence
