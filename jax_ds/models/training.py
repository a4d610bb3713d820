"""Training: loss, gradients over the mesh, AdamW, and the balancing of the experts."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.flatten_util
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float32, Int32

from jax_ds._core.checks import check, check_integer, check_number
from jax_ds._runtime.varying import to_varying
from jax_ds.models.checks import check_mesh, check_tokens
from jax_ds.models.config import ModelConfig
from jax_ds.models.model import forward
from jax_ds.models.params import ModelParams, init_params, param_specs
from jax_ds.moe import MoEParams, update_bias


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """AdamW with linear warm-up and a cosine to a tenth, and the speed of expert balancing.

    Attributes:
      steps: of the whole run; the cosine ends there.
      peak_rate: the learning rate after the warm-up.
      warmup: steps of the warm-up, at most half of `steps`.
      weight_decay: of matrices; not of norms, the router or its bias.
      clip_norm: the longest gradient; longer ones are shortened to it.
      bias_rate: as `rate` in `jax_ds.moe.update_bias`.

    Raises:
      ValueError, TypeError: a number that is negative, or no number; `steps` or `clip_norm` of 0.
    """

    steps: int
    peak_rate: float = 3e-3
    warmup: int = 20
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    bias_rate: float = 0.001

    def __post_init__(self) -> None:
        check_integer("steps", self.steps, 1)
        check_integer("warmup", self.warmup, 0)
        check_number("clip_norm", self.clip_norm, positive=True)
        for name in ("peak_rate", "weight_decay", "bias_rate"):
            check_number(name, getattr(self, name))

    def optimizer(self) -> optax.GradientTransformation:
        """Element-wise only (the norm is clipped before), so it runs on sharded leaves."""
        warmup = min(self.warmup, max(1, self.steps // 2))
        rate = optax.warmup_cosine_decay_schedule(
            0.0, self.peak_rate, warmup, max(self.steps, warmup + 1), 0.1 * self.peak_rate
        )
        return optax.adamw(rate, b1=0.9, b2=0.95, weight_decay=self.weight_decay, mask=_decayed)


class TrainState(NamedTuple):
    """Everything that a step reads and writes; saved whole."""

    step: Int32[Array, ""]
    params: ModelParams
    optimizer: optax.OptState


class Metrics(NamedTuple):
    """What a training step reports."""

    loss: Float32[Array, ""]  # mean over all tokens of the step, nats
    grad_norm: Float32[Array, ""]  # before clipping
    load: Int32[Array, "L E"]  # tokens per expert and MoE layer, over all devices
    num_dropped: Int32[Array, ""]


def init_state(model: ModelConfig, train: TrainConfig, mesh: Mesh, seed: int) -> TrainState:
    """The state before the first step, placed on `mesh`; the same on any mesh for a seed.

    Args:
      model, train: the model and its optimizer.
      mesh: of the axes that `model.axis_name` names.
      seed: of the parameters.

    Returns:
      The `TrainState`, experts sharded over the mesh, the rest on every device.

    Raises:
      ValueError: where `mesh` has other axes than the model's, or they do not divide its experts.
    """
    check_mesh(model, mesh)

    def build() -> TrainState:
        params = init_params(model, jax.random.key(seed))
        return TrainState(jnp.zeros((), jnp.int32), params, train.optimizer().init(params))

    specs = state_specs(model, train)
    placed = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
    return jax.jit(build, out_shardings=placed)()


def state_specs(model: ModelConfig, train: TrainConfig) -> TrainState:
    """A PartitionSpec for every leaf of the state; moments are placed like their parameters.

    Args:
      model, train: as in `init_state`.

    Returns:
      A tree of the structure of `TrainState`.
    """
    params = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    optimizer = train.optimizer()
    specs = param_specs(model, params)
    moments = optax.tree_utils.tree_map_params(
        optimizer,
        lambda _, spec: spec,
        jax.eval_shape(optimizer.init, params),
        specs,
        transform_non_params=lambda _: PartitionSpec(),
    )
    step: Any = PartitionSpec()
    return TrainState(step, specs, moments)


def make_train_step(
    model: ModelConfig, train: TrainConfig, mesh: Mesh
) -> Callable[[TrainState, Int32[Array, "B S+1"]], tuple[TrainState, Metrics]]:
    """The jitted step `(state, tokens) -> (state, metrics)`; it donates the state.

    Args:
      model, train, mesh: as in `init_state`.

    Returns:
      The step. `tokens` int32 [B, S + 1] is the global batch, split over all devices of `mesh`;
      metrics are the same on all.

    Raises:
      ValueError: as `init_state`; the step, where `tokens` break the rule.
      TypeError: the step, for tokens of another dtype.
    """
    check_mesh(model, mesh)
    specs = state_specs(model, train)
    axes = mesh.axis_names

    def step(state: TrainState, tokens: Array) -> tuple[TrainState, Metrics]:
        local = to_varying(state.params, axes)
        total = mesh.size * tokens.shape[0] * (tokens.shape[1] - 1)

        def loss(params: ModelParams) -> tuple[Array, Any]:
            value, stats = _summed_loss(model, params, tokens)
            return value / total, stats

        (value, stats), grads = jax.value_and_grad(loss, has_aux=True)(local)
        grads = _sum_dense(grads, specs.params, axes)
        norm = _global_norm(grads, specs.params, axes)
        shrink = jnp.minimum(1.0, train.clip_norm / (norm + 1e-6))
        grads = jax.tree.map(lambda g: g * shrink, grads)
        updates, optimizer = train.optimizer().update(grads, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        dropped = stats.num_dropped.sum(dtype=jnp.int32)
        load, dropped = jax.lax.psum((stats.load, dropped), axes)
        params = _balance(params, load, train.bias_rate)
        metrics = Metrics(jax.lax.psum(value, axes), norm, load, dropped)
        return TrainState(state.step + 1, params, optimizer), metrics

    batch = PartitionSpec(model.axis_name)
    step = _on_mesh(step, mesh, in_specs=(specs, batch), out_specs=(specs, PartitionSpec()))
    return jax.jit(step, donate_argnums=0)


def make_eval_step(
    model: ModelConfig, mesh: Mesh
) -> Callable[[ModelParams, Int32[Array, "B S+1"]], Float32[Array, ""]]:
    """The jitted mean loss `(params, tokens) -> nats per token`, without dropping.

    Args:
      model, mesh: as in `init_state`.

    Returns:
      The function; `tokens` as in `make_train_step`.

    Raises:
      ValueError, TypeError: as `make_train_step`.
    """
    check_mesh(model, mesh)
    model = dataclasses.replace(model, capacity_factor=None)
    specs = param_specs(model, jax.eval_shape(lambda: init_params(model, jax.random.key(0))))

    def evaluate(params: ModelParams, tokens: Array) -> Array:
        value, _ = _summed_loss(model, to_varying(params, mesh.axis_names), tokens)
        total = mesh.size * tokens.shape[0] * (tokens.shape[1] - 1)
        return jax.lax.psum(value, mesh.axis_names) / total

    batch = PartitionSpec(model.axis_name)
    return jax.jit(_on_mesh(evaluate, mesh, in_specs=(specs, batch), out_specs=PartitionSpec()))


def _on_mesh(function: Callable[..., Any], mesh: Mesh, **specs: Any) -> Callable[..., Any]:
    """`function(first, tokens)` over the mesh; the batch is checked before it is divided."""
    sharded = jax.shard_map(function, mesh=mesh, **specs)

    @functools.wraps(function)
    def call(first: Any, tokens: Array) -> Any:
        check_tokens(tokens, "B S+1", 2)
        rule = f"must have shape [B S+1] with B a multiple of the mesh's {mesh.size} devices"
        check(tokens.shape[0] % mesh.size == 0, "tokens", rule, list(tokens.shape))
        return sharded(first, tokens)

    return call


def _summed_loss(
    model: ModelConfig, params: ModelParams, tokens: Int32[Array, "B S+1"]
) -> tuple[Float32[Array, ""], Any]:
    """Cross-entropy of the next token, summed over this device's tokens."""
    logits, stats = forward(model, params, tokens[:, :-1])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
    return losses.sum(), stats


def _sum_dense(grads: ModelParams, specs: ModelParams, axes: tuple[str, ...]) -> ModelParams:
    """Sums the gradients of replicated leaves over the mesh, in one all-reduce.

    Experts need no sum: every token that they saw came to them.
    """
    leaves, tree = jax.tree.flatten(grads)
    dense = [i for i, spec in enumerate(_flat_specs(specs)) if spec == PartitionSpec()]
    bucket, unravel = jax.flatten_util.ravel_pytree([leaves[i] for i in dense])
    for i, leaf in zip(dense, unravel(jax.lax.psum(bucket, axes)), strict=True):
        leaves[i] = leaf
    return jax.tree.unflatten(tree, leaves)


def _global_norm(grads: ModelParams, specs: ModelParams, axes: tuple[str, ...]) -> Array:
    square = [jnp.sum(jnp.square(g)) for g in jax.tree.leaves(grads)]
    flat = _flat_specs(specs)
    dense = sum((s for s, p in zip(square, flat, strict=True) if p == PartitionSpec()), 0.0)
    experts = sum((s for s, p in zip(square, flat, strict=True) if p != PartitionSpec()), 0.0)
    return jnp.sqrt(dense + jax.lax.psum(experts, axes))


def _flat_specs(specs: ModelParams) -> list[PartitionSpec]:
    return jax.tree.leaves(specs, is_leaf=lambda leaf: isinstance(leaf, PartitionSpec))


def _balance(params: ModelParams, load: Int32[Array, "L E"], rate: float) -> ModelParams:
    moe = params.moe_layers.mlp
    assert isinstance(moe, MoEParams)
    moe = moe._replace(bias=update_bias(moe.bias, load, rate=rate))
    return params._replace(moe_layers=params.moe_layers._replace(mlp=moe))


def _decayed(params: ModelParams) -> Any:
    """Weight decay applies to matrices: not to norms, the router or its bias."""

    def decays(path: Any, _: Any) -> bool:
        name = jax.tree_util.keystr(path[-1:], simple=True)
        return "norm" not in name and name not in ("router", "bias")

    return jax.tree_util.tree_map_with_path(decays, params)
