"""The chooser, the varying types under shard_map, and the site of custom calls."""

import inspect
import types
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jax_ds import deep_ep, deep_gemm, flash_mla, moe, quantization
from jax_ds._runtime import choose as chooser
from jax_ds._runtime.call import ffi_call
from jax_ds._runtime.choose import choose
from jax_ds._runtime.varying import match_primal, to_varying, varying_axes

TARGET = "jax_ds.test.double"


def _portable(x: jax.Array) -> jax.Array:
    return x * 2


def _kernel(x: jax.Array) -> jax.Array:
    """A custom call that nobody implements: good for lowering, not for running."""
    out = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return ffi_call(TARGET, [out], x, attributes={"n": np.int64(x.shape[-1])})[0]


def _double(x: jax.Array, implementation: Any = None, **keywords: Any) -> jax.Array:
    keywords = {"xla": _portable, "cuda": _kernel, **keywords}
    return choose("double", implementation, (x,), **keywords)


def _lowered(function: Callable[..., Any], *args: Any, platform: str = "cuda") -> str:
    return jax.jit(function).trace(*args).lower(lowering_platforms=(platform,)).as_text()


def _gpus(monkeypatch: pytest.MonkeyPatch, *capabilities: str) -> None:
    """Pretends that the program has GPUs of these compute capabilities."""
    devices = [
        types.SimpleNamespace(device_kind=f"GPU {c}", compute_capability=c) for c in capabilities
    ]
    monkeypatch.setattr(chooser.jax, "devices", lambda backend: devices)


def test_portable_on_cpu() -> None:
    x = jnp.arange(3.0)
    for implementation in (None, "xla"):
        np.testing.assert_array_equal(_double(x, implementation), x * 2)
        np.testing.assert_array_equal(jax.jit(_double, static_argnums=1)(x, implementation), x * 2)


@pytest.mark.parametrize(
    ("keywords", "reason"),
    [
        ({"cuda": None}, "double has no CUDA kernel"),
        ({"unsupported": "N must be a multiple of 8, got 3"}, "N must be a multiple of 8, got 3"),
        ({}, "no NVIDIA GPU is visible to JAX (jax[cuda13] not installed?)"),
    ],
)
def test_cuda_says_why_not(keywords: dict[str, Any], reason: str) -> None:
    with pytest.raises(NotImplementedError) as caught:
        _double(jnp.ones(3), "cuda", **keywords)
    assert str(caught.value) == (
        f"double: implementation='cuda' cannot run here, {reason}; use implementation=None or 'xla'"
    )


def test_unknown_implementation() -> None:
    with pytest.raises(ValueError) as caught:
        _double(jnp.ones(3), "triton")
    said = "implementation: must be one of None, 'xla', 'cuda', got 'triton'"
    assert str(caught.value) == said


@pytest.mark.parametrize(
    ("capabilities", "native"), [(("9.0",), True), (("8.0",), False), (("9.0", "8.0"), False)]
)
def test_only_hopper(
    monkeypatch: pytest.MonkeyPatch, capabilities: tuple[str, ...], native: bool
) -> None:
    _gpus(monkeypatch, *capabilities)
    x = jnp.ones(3)
    # A function of its own: what was traced before is cached.
    assert (TARGET in _lowered(lambda x: _double(x), x)) == native
    if native:
        assert TARGET in _lowered(lambda x: _double(x, "cuda"), x)
    else:
        with pytest.raises(
            NotImplementedError,
            match=r"cannot run here, GPU 8\.0 is not Hopper \(compute capability 9\.0\); use",
        ):
            _double(x, "cuda")


@pytest.mark.parametrize(
    ("kind", "native"),
    [("NVIDIA H200", True), ("NVIDIA GH200 480GB", True), ("NVIDIA A100-SXM4-80GB", False)],
)
def test_the_chip_of_an_abstract_mesh(kind: str, native: bool) -> None:
    device = jax.sharding.AbstractDevice(device_kind=kind, platform="gpu", num_cores=None)
    mesh = jax.sharding.AbstractMesh((2,), ("data",), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        assert (chooser._why_not_hopper(aot=True) is None) == native


def test_lowering_decides_by_platform() -> None:
    """Without any GPU, a program is lowered for either platform."""
    x = jnp.ones(3)
    assert TARGET in _lowered(_double, x)
    assert TARGET not in _lowered(_double, x, platform="cpu")
    assert TARGET not in _lowered(lambda x: _double(x, "xla"), x)
    assert TARGET not in _lowered(lambda x: _double(x, cuda=None), x)
    assert TARGET not in _lowered(lambda x: _double(x, unsupported="too odd"), x)


def test_operands_may_be_pytrees_and_none() -> None:
    def xla(pair: tuple[jax.Array, jax.Array], extra: jax.Array | None) -> jax.Array:
        return pair[0] + pair[1] if extra is None else extra

    operands = ((jnp.ones(3), jnp.ones(3)), None)
    out = choose("sum", None, operands, xla=xla, cuda=lambda pair, extra: _kernel(pair[0]))
    np.testing.assert_array_equal(out, np.full(3, 2.0))


def test_transformations() -> None:
    x = jnp.arange(6.0).reshape(2, 3)
    np.testing.assert_array_equal(jax.vmap(_double)(x), x * 2)
    np.testing.assert_array_equal(jax.lax.scan(lambda c, r: (c, _double(r)), 0, x)[1], x * 2)

    @jax.custom_vjp
    def layer(x: jax.Array) -> jax.Array:
        return _double(x)

    layer.defvjp(lambda x: (layer(x), None), lambda _, g: (_double(g),))
    grad = jax.grad(lambda x: jnp.sum(jax.checkpoint(layer)(x)))
    np.testing.assert_array_equal(jax.jit(grad)(x), np.full((2, 3), 2.0))
    assert _lowered(grad, x).count(TARGET) > 0


def test_sharded_operands_belong_inside_shard_map() -> None:
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Explicit,))
    x = jax.device_put(jnp.ones((4, 3)), jax.NamedSharding(mesh, P("data")))
    with jax.set_mesh(mesh):
        for implementation in (None, "cuda"):
            with pytest.raises(ValueError) as caught:
                _double(x, implementation)
            assert str(caught.value) == (
                "double: operands must not be sharded outside jax.shard_map, "
                "got float32[4@data,3] sharded over data"
            )
        np.testing.assert_array_equal(_double(x, "xla"), np.full((4, 3), 2.0))
        mapped = jax.shard_map(_double, in_specs=P("data"), out_specs=P("data"))
        np.testing.assert_array_equal(mapped(x), np.full((4, 3), 2.0))


def _on_mesh(function: Callable[..., Any], out_specs: Any, **keywords: Any) -> Callable[..., Any]:
    """`function(replicated, split)` on a mesh of 2 x 2, the second operand split over "b"."""
    mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    return jax.shard_map(
        function, mesh=mesh, in_specs=(P(), P("b")), out_specs=out_specs, **keywords
    )


def test_varying_axes() -> None:
    seen: list[tuple[str, ...]] = []

    def per_device(w: jax.Array, x: jax.Array) -> jax.Array:
        everywhere = to_varying({"w": w}, ("a", "b"))
        seen.extend([varying_axes(w), varying_axes(w, [x]), varying_axes(everywhere)])
        assert to_varying(x, ("b",)) is x
        return x

    _on_mesh(per_device, P("b"))(jnp.ones(2), jnp.ones(2))
    assert seen == [(), ("b",), ("a", "b")]
    assert varying_axes(jnp.ones(2)) == ()


@pytest.mark.parametrize("check_vma", [True, False])
def test_both_implementations_have_one_type(check_vma: bool) -> None:
    """A result that happens not to depend on the varying operand still counts as varying."""

    def per_device(w: jax.Array, x: jax.Array) -> jax.Array:
        return choose(
            "first",
            None,
            (w, x),
            xla=lambda w, x: w * 2,
            cuda=lambda w, x: _kernel(to_varying(w, varying_axes(x))),
        )

    mapped = _on_mesh(per_device, P("b"), check_vma=check_vma)
    np.testing.assert_array_equal(mapped(jnp.ones(2), jnp.ones(2)), np.full(4, 2.0))
    if check_vma:
        with pytest.raises(ValueError, match="out_specs"):
            _on_mesh(per_device, P())(jnp.ones(2), jnp.ones(2))


def test_match_primal_sums_what_devices_share() -> None:
    def per_device(w: jax.Array, x: jax.Array) -> jax.Array:
        @jax.custom_vjp
        def product(w: jax.Array, x: jax.Array) -> jax.Array:
            return w * x

        def backward(res: Any, g: jax.Array) -> Any:
            w, x = res
            return match_primal((g * x, g * w), (w, x))

        product.defvjp(lambda w, x: (product(w, x), (w, x)), backward)
        return jax.lax.psum(jnp.sum(product(w, x)), "b")

    w, x = jnp.asarray([2.0]), jnp.asarray([3.0, 4.0])
    dw, dx = jax.grad(_on_mesh(per_device, P()), (0, 1))(w, x)
    np.testing.assert_array_equal(dw, [7.0])
    np.testing.assert_array_equal(dx, [2.0, 2.0])


def test_match_primal_takes_types_and_casts() -> None:
    def per_device(w: jax.Array, x: jax.Array) -> jax.Array:
        out = match_primal(w, jax.typeof(x))
        assert varying_axes(out) == ("b",)
        return out

    out = _on_mesh(per_device, P("b"))(jnp.ones(2), jnp.ones(2))
    np.testing.assert_array_equal(out, np.ones(4))


def test_custom_call_carries_attributes_layouts_and_aliases() -> None:
    def run(x: jax.Array, y: jax.Array) -> list[jax.Array]:
        return ffi_call(
            TARGET,
            [jax.ShapeDtypeStruct((4, 3), jnp.float32)],
            x,
            y,
            attributes={"n": np.int64(7)},
            input_layouts=[(1, 0), None],
            aliases={1: 0},
        )

    text = _lowered(run, jnp.ones((4, 3)), jnp.ones((4, 3)))
    call = next(line for line in text.splitlines() if TARGET in line)
    assert "n = 7 : i64" in call
    assert "operand_layouts = [dense<[0, 1]> : tensor<2xindex>, dense<[1, 0]>" in call
    assert "operand_index = 1" in call
    assert "has_side_effect" not in call


def test_custom_call_under_vmap_and_shard_map() -> None:
    text = _lowered(jax.vmap(_kernel), jnp.ones((5, 3)))
    assert f"@{TARGET}" in text and "tensor<5x3xf32>" in text

    def per_device(w: jax.Array, x: jax.Array) -> jax.Array:
        return _kernel(w + x)

    for check_vma in (True, False):
        mapped = _on_mesh(per_device, P("b"), check_vma=check_vma)
        assert TARGET in _lowered(mapped, jnp.ones(2), jnp.ones(4))
    with pytest.raises(ValueError, match="out_specs"):
        _lowered(_on_mesh(per_device, P()), jnp.ones(2), jnp.ones(4))


def test_communicating_calls_run_on_the_collective_stream() -> None:
    def run(x: jax.Array) -> list[jax.Array]:
        out = jax.ShapeDtypeStruct(x.shape, x.dtype)
        return ffi_call(TARGET, [out], x, attributes={}, communicates=True)

    text = _lowered(run, jnp.ones(3))
    call = next(line for line in text.splitlines() if TARGET in line)
    assert '_xla_stream_annotation = "collective"' in call
    assert "_xla_stream_annotation" not in _lowered(_kernel, jnp.ones(3))


# Helpers, and halves that go on as their first half began.
WITHOUT_A_CHOICE = {
    "deep_ep.buffer_bytes",
    "deep_ep.check",
    "deep_ep.low_latency_combine_finish",
    "deep_ep.low_latency_dispatch_finish",
    "deep_gemm.explain",
    "deep_gemm.tune",
    "moe.update_bias",
    "quantization.dequantize",
    "quantization.padded_tokens",
}


def test_every_operation_lets_its_caller_choose() -> None:
    parameters = {
        f"{room.__name__.removeprefix('jax_ds.')}.{name}": inspect.signature(
            getattr(room, name)
        ).parameters
        for room in (deep_ep, deep_gemm, flash_mla, moe, quantization)
        for name in room.__all__
        if inspect.isfunction(getattr(room, name))
    }
    choices = {name: given.get("implementation") for name, given in parameters.items()}
    assert {name for name, choice in choices.items() if choice is None} == WITHOUT_A_CHOICE
    for name, choice in choices.items():
        if choice is not None:
            assert (choice.kind, choice.default) == (choice.KEYWORD_ONLY, None), name
    sending = {"plan_dispatch", "low_latency_dispatch", "low_latency_dispatch_start", "moe_layer"}
    channels = {name.split(".")[1]: given.get("channel") for name, given in parameters.items()}
    assert {name for name, channel in channels.items() if channel is not None} == sending
    assert all(channel.default == 0 for channel in channels.values() if channel is not None)
