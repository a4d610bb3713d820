"""A DeepSeek-V3 model on the public functions of jax_ds: trains, decodes, serves.

Everything here runs per device, inside one `jax.shard_map` over the expert-parallel axis: the
batch is split, dense parameters are replicated, experts are sharded.
"""

from jax_ds.models.checkpoint import load_tree, save_tree
from jax_ds.models.config import ModelConfig
from jax_ds.models.decoding import (
    decode_step,
    empty_pages,
    prefill_step,
    prepare_for_decoding,
)
from jax_ds.models.model import forward
from jax_ds.models.params import ModelParams, init_params, param_specs
from jax_ds.models.serving import Completion, Engine, PagePool, Request
from jax_ds.models.training import (
    Metrics,
    TrainConfig,
    TrainState,
    init_state,
    make_eval_step,
    make_train_step,
    state_specs,
)

__all__ = [
    "Completion",
    "Engine",
    "Metrics",
    "ModelConfig",
    "ModelParams",
    "PagePool",
    "Request",
    "TrainConfig",
    "TrainState",
    "decode_step",
    "empty_pages",
    "forward",
    "init_params",
    "init_state",
    "load_tree",
    "make_eval_step",
    "make_train_step",
    "param_specs",
    "prefill_step",
    "prepare_for_decoding",
    "save_tree",
    "state_specs",
]
