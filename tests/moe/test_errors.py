"""What a user reads after a typical mistake with the layer."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jax_ds.moe import MoEParams, moe_layer
from jax_ds.quantization import quantize_1x128, quantize_128x128

HIDDEN, FFN, EXPERTS = 32, 16, 8


def _params(**changes: Any) -> MoEParams:
    shapes = {
        "router": (EXPERTS, HIDDEN),
        "bias": (EXPERTS,),
        "gate_up": (EXPERTS // 2, 2 * FFN, HIDDEN),
        "down": (EXPERTS // 2, HIDDEN, FFN),
    }
    return MoEParams(**{n: jnp.zeros(s) for n, s in shapes.items()} | changes)


def _trace(params: MoEParams | None = None, x: Any = None, **keywords: Any) -> None:
    """Traces the layer on two devices."""
    mesh = jax.make_mesh((2,), ("ep",), devices=jax.devices()[:2])
    x = jnp.zeros((4, HIDDEN), jnp.bfloat16) if x is None else x
    params = params or _params()
    keywords = {"axis_name": "ep", "k": 2, **keywords}
    jax.eval_shape(
        jax.shard_map(
            lambda: moe_layer(x, params, **keywords)[0],
            mesh=mesh,
            in_specs=(),
            out_specs=jax.P("ep"),
        )
    )


MISTAKES: dict[str, tuple[Callable[[], Any], str]] = {
    "outside shard_map": (
        lambda: moe_layer(jnp.zeros((4, HIDDEN), jnp.bfloat16), _params(), axis_name="ep", k=2),
        "axis_name: must name axes of the enclosing jax.shard_map, got 'ep'",
    ),
    "an odd number of experts": (
        lambda: _trace(_params(router=jnp.zeros((7, HIDDEN)), bias=jnp.zeros(7))),
        "params.router: the number of experts must be a multiple of the 2 ranks of axis_name, "
        "got 7",
    ),
    "experts not sharded": (
        lambda: _trace(_params(gate_up=jnp.zeros((8, 2 * FFN, HIDDEN)))),
        "params.gate_up: must have shape [E_local 2F H] = [4, *, 32], got [8, 32, 32]",
    ),
    "another inner width": (
        lambda: _trace(_params(down=jnp.zeros((4, HIDDEN, 24)))),
        "params.down: must have shape [E_local H F] = [4, 32, 16], got [4, 32, 24]",
    ),
    "gate without up": (
        lambda: _trace(_params(gate_up=jnp.zeros((4, 15, HIDDEN)))),
        "params.gate_up: gate and up must have the same width, got 15",
    ),
    "half a shared expert": (
        lambda: _trace(_params(shared_gate_up=jnp.zeros((8, HIDDEN)))),
        "params.shared_down: must be given together with params.shared_gate_up, got one of them",
    ),
    "a shared expert of another model": (
        lambda: _trace(
            _params(shared_gate_up=jnp.zeros((8, 24)), shared_down=jnp.zeros((HIDDEN, 4)))
        ),
        "params.shared_gate_up: must have shape [2Fs H] = [*, 32], got [8, 24]",
    ),
    "a shared gate without its up": (
        lambda: _trace(
            _params(shared_gate_up=jnp.zeros((7, HIDDEN)), shared_down=jnp.zeros((HIDDEN, 4)))
        ),
        "params.shared_gate_up: gate and up must have the same width, got 7",
    ),
    "a shared expert stored [in, out]": (
        lambda: _trace(
            _params(shared_gate_up=jnp.zeros((8, HIDDEN)), shared_down=jnp.zeros((4, HIDDEN)))
        ),
        "params.shared_down: must have shape [H Fs] = [32, 4], got [4, 32]",
    ),
    "a batch of sequences": (
        lambda: _trace(x=jnp.zeros((2, 4, HIDDEN), jnp.bfloat16)),
        "x: must have 2 dimensions, got shape [2, 4, 32]",
    ),
    "no capacity": (
        lambda: _trace(capacity_factor=0.0),
        "capacity_factor: must be positive and finite, got 0.0",
    ),
    "a capacity that is text": (
        lambda: _trace(capacity_factor="1.25"),
        "capacity_factor: must be a static number, got '1.25'",
    ),
    "no experts": (
        lambda: _trace(_params(down=None)),
        "params.down: must be an array, got NoneType",
    ),
    "quantized weights in bfloat16 products": (
        lambda: _trace(
            _params(
                shared_gate_up=quantize_128x128(jnp.zeros((2 * FFN, HIDDEN))),
                shared_down=quantize_128x128(jnp.zeros((HIDDEN, FFN))),
            ),
            precision="bf16",
            low_latency=True,
        ),
        "params.shared_gate_up: may be Quantized with precision='fp8' and low_latency=True only, "
        "got precision='bf16', low_latency=True",
    ),
    "weights quantized like activations": (
        lambda: _trace(
            _params(gate_up=quantize_1x128(jnp.zeros((4, 2 * FFN, HIDDEN)))), low_latency=True
        ),
        "params.gate_up: must come from quantize_128x128, got blocks of 1x128",
    ),
    "unknown precision": (
        lambda: _trace(precision="fp4"),
        "precision: must be one of 'fp8', 'bf16', got 'fp4'",
    ),
    "quantized experts for training": (
        lambda: _trace(_params(gate_up=quantize_128x128(jnp.zeros((4, 2 * FFN, HIDDEN))))),
        "params.gate_up: may be Quantized with precision='fp8' and low_latency=True only, got "
        "precision='fp8', low_latency=False",
    ),
    "more experts than the groups hold": (
        lambda: _trace(k=5, num_groups=4, top_groups=2),
        "k: must lie between 1 and the 4 reachable experts, got 5",
    ),
    "a mask of another length": (
        lambda: _trace_valid(jnp.ones(3, bool)),
        "valid: must have shape [T] = [4], got [3]",
    ),
}


def _trace_valid(valid: Any) -> None:
    mesh = jax.make_mesh((2,), ("ep",), devices=jax.devices()[:2])
    x = jnp.zeros((4, HIDDEN), jnp.bfloat16)
    jax.eval_shape(
        jax.shard_map(
            lambda: moe_layer(x, _params(), valid, axis_name="ep", k=2)[0],
            mesh=mesh,
            in_specs=(),
            out_specs=jax.P("ep"),
        )
    )


@pytest.mark.parametrize("name", MISTAKES)
def test_message(name: str) -> None:
    run, message = MISTAKES[name]
    with pytest.raises((ValueError, TypeError)) as error:
        run()
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (
            lambda: _trace(_params(router=jnp.zeros((EXPERTS, HIDDEN), jnp.bfloat16))),
            "params.router: dtype must be float32, got bfloat16",
        ),
        (
            lambda: _trace(_params(down=jnp.zeros((4, HIDDEN, FFN), jnp.int32)), precision="bf16"),
            "params.down: dtype must be bfloat16 or float32, got int32",
        ),
        (
            lambda: _trace_valid(jnp.ones(4, jnp.int32)),
            "valid: dtype must be bool, got int32",
        ),
        (lambda: _trace(k=2.0), "k: must be a static integer, got 2.0"),
        (lambda: _trace((1, 2)), "params: must be a MoEParams, got tuple"),
    ],
)
def test_types(run: Callable[[], Any], message: str) -> None:
    with pytest.raises(TypeError) as error:
        run()
    assert str(error.value) == message


def test_gradient_of_the_low_latency_form() -> None:
    mesh = jax.make_mesh((2,), ("ep",), devices=jax.devices()[:2])

    def loss(x: Any) -> Any:
        y, _ = moe_layer(x, _params(), axis_name="ep", k=2, low_latency=True)
        return y.astype(jnp.float32).sum()

    grad = jax.shard_map(jax.grad(loss), mesh=mesh, in_specs=jax.P(), out_specs=jax.P())
    with pytest.raises(TypeError, match="low_latency_dispatch"):
        jax.eval_shape(grad, jnp.zeros((4, HIDDEN), jnp.bfloat16))
