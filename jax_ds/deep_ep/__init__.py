"""Expert parallelism for mixtures of experts: dispatch and combine under `jax.shard_map`."""

from jax_ds.deep_ep.api import combine, dispatch, plan_dispatch
from jax_ds.deep_ep.buffers import buffer_bytes, check
from jax_ds.deep_ep.plan import DispatchPlan

__all__ = [
    "DispatchPlan",
    "buffer_bytes",
    "check",
    "combine",
    "dispatch",
    "plan_dispatch",
]
